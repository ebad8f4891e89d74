"""Evaluation of a model on images whose classes are known: the one loop that validation and all reports go through."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from timm.utils import unwrap_model
from torch import nn
from tqdm import tqdm

from ..data.folder import create_split
from ..data.images import shown
from ..data.loader import create_loader
from ..data.named import is_named
from ..data.scan import find_split, find_splits
from .evaluation_files import Evaluation, ResultFolder, image_name
from .inference import (
    AMP_DTYPES,
    TTA,
    check_choice,
    label_descriptions,
    left_as_it_was,
    load,
    model_name,
    precision,
    predict_logits,
    resolve_amp_dtype,
    resolve_device,
    resolve_tta,
    view_data_config,
    whole_number,
)
from .inference import label_names as read_label_names
from .metrics import ImageMetrics, confused_pairs, image_metrics, summarize

__all__ = ['Evaluation', 'evaluate', 'evaluate_dataset', 'evaluate_loader', 'format_metrics']


def _measure_batches(
    model: nn.Module,
    loader,
    device: torch.device,
    amp_dtype: Optional[torch.dtype],
    tta: Optional[str],
    desc: str,
    progress: bool,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Logits and targets of every batch: the loop that all evaluation goes through."""
    model.eval()
    with tqdm(loader, desc=desc, unit='batch', leave=False, disable=None if progress else True) as bar:
        for logits, targets in predict_logits(model, bar, device, amp_dtype, tta):
            yield logits, targets.to(logits.device)


def evaluate_loader(
    model: nn.Module,
    loader,
    device: torch.device,
    amp_dtype: Optional[torch.dtype] = None,
    desc: str = 'Evaluating',
    progress: bool = True,
    reduce: Optional[Callable[[Dict[str, float]], Dict[str, float]]] = None,
) -> Dict[str, float]:
    """Loss and accuracy of a model on a loader, for validation between epochs. Puts the model into eval mode.

    Args:
        model: The model, on `device`.
        loader: Gives (images, targets).
        device: Device to compute on.
        amp_dtype: Dtype to autocast to, None for float32.
        desc: Text before the progress bar.
        progress: Show a bar.
        reduce: Adds up sums over several processes, of which each has a part of the images.

    Returns:
        'loss', 'top1', 'top5' (both in percent, the latter if there are more than five classes) and 'images'. The
        loss is nan if logits are.

    Raises:
        ValueError: If there are no images.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    num_classes = getattr(unwrap_model(model), 'num_classes', None)
    images = 0
    for logits, targets in _measure_batches(model, loader, device, amp_dtype, None, desc, progress):
        num_classes = logits.shape[1]
        batch = image_metrics(logits, targets)
        values = torch.stack([batch.losses, (batch.ranks == 1).float(), (batch.ranks <= 5).float()])
        # in double precision, so that the sums do not depend on the batches' sizes
        totals += values.cpu().double().sum(1)
        images += len(targets)
    loss, correct, within_five = totals.tolist()
    sums = dict(loss=loss, correct=correct, within_five=within_five, images=images)
    sums = reduce(sums) if reduce else sums
    if not sums['images']:
        raise ValueError('There are no images to evaluate.')
    result = dict(loss=sums['loss'] / sums['images'], top1=100 * sums['correct'] / sums['images'])
    if num_classes is None or num_classes > 5:
        result['top5'] = 100 * sums['within_five'] / sums['images']
    return dict(result, images=int(sums['images']))


def _check_batch(logits: torch.Tensor, targets: torch.Tensor, dataset, first: int, num_classes: int, in_amp: bool):
    """Check that a batch can be measured.

    Raises:
        ValueError: If logits or targets are of no use, naming the image.
    """
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ValueError(f'The model gives logits of shape {tuple(logits.shape[1:])} for {num_classes} classes.')
    bad = ~logits.softmax(1).isfinite().all(1)  # a logit of -inf is that of a class that is masked
    if bad.any():
        name = shown(image_name(dataset, first + int(bad.nonzero()[0])))
        remedy = '; they may be with --amp float32' if in_amp else ''
        raise ValueError(f"The model's probabilities for '{name}' are not finite{remedy}.")
    unknown = (targets < 0) | (targets >= num_classes)
    if unknown.any():
        at = int(unknown.nonzero()[0])
        raise ValueError(
            f"'{shown(image_name(dataset, first + at))}' has class {int(targets[at])}, the model has classes 0 to "
            f'{num_classes - 1}.'
        )


def evaluate_dataset(
    model: nn.Module,
    dataset,
    class_names: Sequence[str],
    tta: Optional[str] = None,
    batch_size: int = 32,
    workers: int = 2,
    amp: Optional[str] = 'auto',
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model on a dataset whose targets are the model's classes. Logits and images are not kept.

    Args:
        model: The model as `load` gives it, on the device to compute on.
        dataset: Of `create_split`.
        class_names: Names of the model's classes.
        tta: 'flip', 'crops' or 'scales' for the mean of several views' probabilities.
        batch_size: Images per step.
        workers: Loader processes, None for a number by the cores.
        amp: Dtype to autocast to, as for `resolve_amp_dtype`.
        progress: Show a bar if the run has a terminal.

    Raises:
        ValueError: If there are no images, logits are not finite, or a target is no class of the model.
    """
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    loader = create_loader(dataset, view_data_config(model, tta), batch_size, workers=workers, device=device)
    amp_dtype = resolve_amp_dtype(amp, device)
    parts: List[ImageMetrics] = []
    done = 0
    for logits, targets in _measure_batches(model, loader, device, amp_dtype, tta, 'Evaluating', progress):
        _check_batch(logits, targets, dataset, done, len(class_names), amp_dtype is not None)
        done += len(targets)
        parts.append(ImageMetrics(*(values.cpu() for values in image_metrics(logits, targets))))
    if not parts:
        raise ValueError('There are no images to evaluate.')
    images = ImageMetrics(*(torch.cat(values) for values in zip(*parts)))
    metrics = summarize(images, len(class_names))
    metrics['amp'] = precision(model, amp_dtype)
    return Evaluation(metrics, images, list(class_names), dataset)


def _check_names(data: Any, split: Any, **places: Any):
    """Check the names of folders and files, and of the split, before anything is loaded.

    Raises:
        TypeError, ValueError: If one is no name, by name of the argument.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f"'data' must be a folder, or the name of a data set, got {data!r}.")
    for name, place in dict(places, data=data).items():
        if isinstance(place, str) and not place.strip():
            raise ValueError(f"'{name}' is empty.")
    is_name = isinstance(split, str) and split.strip() not in ('', '.', '..')
    if not is_name or (not is_named(data) and ('/' in split or '\\' in split)):
        raise ValueError(f"'split' must be the name of a split, such as 'test', got {split!r}.")


def _read_classes(model: nn.Module) -> Tuple[Optional[int], Optional[List[str]]]:
    """Number of a model's classes, and their names, as far as it tells them."""
    inner = unwrap_model(model)
    num_classes = getattr(inner, 'num_classes', None)
    if num_classes == 0:
        raise ValueError(f"'{model_name(model)}' has no classifier: there is nothing to evaluate.")
    given = (getattr(inner, 'pretrained_cfg', None) or {}).get('label_names') or ()
    names = read_label_names(model) if given else []
    # names that are not as many as classes are not its own, and numbers in their place say nothing
    is_named = bool(names) and (len(given) == len(names) or isinstance(given, dict))
    return num_classes, names if is_named else None


def _find_images(
    model: nn.Module, data: Union[str, Path], split: str, **options: Any
) -> Tuple[Any, List[str], List[str]]:
    """Images to evaluate a model on, names of its classes, and what there is to say about them."""
    num_classes, names = _read_classes(model)
    if options['class_map'] is not None:
        names = None  # the map says which folder has which index
    with redirect_stdout(sys.stderr):  # timm prints of packages that are missing
        found = create_split(data, split, class_names=names, **options)
    notes = [*found.warnings, *found.skipped]
    if names is None:
        names = list(found.class_names) or read_label_names(model)
        if options['class_map'] is not None:  # which need not name every class
            names += read_label_names(model)[len(names) :]
        if len(names) != (num_classes or len(names)):
            raise ValueError(
                f"'{data}' has {len(names)} classes and the model {num_classes} without names; give their names "
                'in the order of the logits (--label-names).'
            )
        if found.class_names and options['class_map'] is None:
            notes.append(f"The model has no class names: those of '{data}' are taken in their order.")
    (dataset,) = found.splits.values()
    return dataset, names, notes


def evaluate(
    model: Union[str, Path, nn.Module],
    data: Union[str, Path],
    split: str = 'test',
    output: Optional[Union[str, Path]] = None,
    tta: Optional[str] = 'auto',
    batch_size: int = 32,
    workers: Optional[int] = None,
    device: Optional[str] = None,
    amp: Optional[str] = 'auto',
    label_names: Union[Sequence[str], Dict[Any, Any], str, Path, None] = None,
    skip_bad: bool = False,
    class_map: Optional[Union[str, Path, Dict[str, int]]] = None,
    root: Optional[Union[str, Path]] = None,
    download: bool = False,
    worst: int = 25,
    pairs: int = 10,
    progress: bool = True,
) -> Dict[str, Any]:
    """Measure a model on images in folders of their classes.

    Of equal logits the class with the lower index counts as the higher. Classes of the model without images in `data`
    are left out of the mean per class.

    Args:
        model: Whatever `load` takes. A module is left as it is.
        data: Folder with splits, or with a folder per class, or name of a dataset as timm has it.
        split: Which split, where there are several.
        output: Folder for metrics.json, predictions.csv, classes.csv, confusion_matrix.csv and .png,
            worst_images.png and confused_pairs.png. Results of an earlier evaluation in it are replaced, nothing else.
        tta: 'flip', 'crops' or 'scales' for the mean of several views' probabilities, 'none' or 'auto': see `predict`.
        batch_size: Images per step.
        workers: Loader processes, None for a number by the cores.
        device: Device to compute on; None for a GPU if there is one.
        amp: 'auto' for bfloat16 where the hardware has it, 'bfloat16', 'float16', or 'float32'.
        label_names: Class names in the order of the logits, {index: name}, or a file of them, instead of the model's.
        skip_bad: Leave out images that cannot be read.
        class_map: File or dictionary from class folders to indices, as for timm's train script.
        root: Folder of a named dataset.
        download: Download a named dataset that is not there.
        worst: Images in worst_images.png.
        pairs: Pairs in confused_pairs.png.
        progress: Show a bar if the run has a terminal.

    Returns:
        'images', 'loss', and in percent 'top1' with its 95 % confidence interval by Wilson 'top1_low' to 'top1_high',
        'top5' if there are more than five classes, 'mean_per_class' and the expected 'calibration_error' of 15 bins;
        'model', 'data', 'split' (None where there are none), 'tta', 'amp', 'classes', 'classes_without_images',
        'most_confused' pairs of classes and 'notes' on what was left out.

    Raises:
        FileExistsError: If files of `output` would be overwritten that are not of an evaluation.
        FileNotFoundError: If model or data are not there.
        ValueError: If arguments are wrong, data show a class that the model does not know, or probabilities are not
            finite.
        TypeError: If an argument is something else than it should be.
        OSError: If results cannot be written.
        KeyboardInterrupt: If it is stopped; the message says that `output` is as it was.
    """
    _check_names(data, split, output=output, class_map=class_map, root=root)
    check_choice('tta', tta, TTA)
    check_choice('amp', amp, AMP_DTYPES)
    batch_size, worst = whole_number('batch_size', batch_size, 1), whole_number('worst', worst, 0)
    pairs, workers = whole_number('pairs', pairs, 0), None if workers is None else whole_number('workers', workers, 0)
    resolve_device(device)
    progress = progress and sys.stderr is not None  # which a shell may have closed
    if output is not None and Path(output).resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"The output '{output}' must not lie inside the data '{data}': it would be taken for a class.")
    with ResultFolder(output) as folder, left_as_it_was(model):
        net = load(model, device, label_names)
        tta = resolve_tta(net, tta)
        dataset, names, notes = _find_images(
            net, data, split, skip_bad=skip_bad, class_map=class_map, root=root, download=download, progress=progress
        )
        if not is_named(data) and find_split(Path(data), split, find_splits(Path(data))) is None:
            split = None  # as a note says
        result = evaluate_dataset(net, dataset, names, tta, batch_size, workers, amp, progress)
        result.shown_names = label_descriptions(net) if read_label_names(net) == names else None
        images = torch.bincount(result.images.targets, minlength=len(names)).tolist()
        absent = [name for name, count in zip(names, images) if not count]
        if absent:
            present = len(names) - len(absent)
            notes.append(f'The mean per class is that of the {present} of {len(names)} classes that have images.')
        result.metrics.update(
            model=model_name(net) if isinstance(model, nn.Module) else str(model),
            data=str(data),
            split=split,
            tta=tta,
            classes=len(names),
            classes_without_images=absent,
            most_confused=[
                dict(classes=[names[a], names[b]], taken_for=list(counts))
                for (a, b), counts in confused_pairs(result.images.targets, result.images.predictions)[:20]
            ],
            notes=notes,
        )
        folder.write(result, worst, pairs)
    return result.metrics


def format_metrics(metrics: Dict[str, Any]) -> str:
    """Lines to print of what `evaluate` returns."""
    lines = [
        f'{metrics["images"]:,} images of {metrics["classes"] - len(metrics["classes_without_images"]):,} classes, '
        f'{metrics["amp"]}' + (f', test-time augmentation: {metrics["tta"]}' if metrics['tta'] else ''),
        f'top-1 {metrics["top1"]:.2f} %, 95 % confidence interval {metrics["top1_low"]:.2f} to '
        f'{metrics["top1_high"]:.2f} % (Wilson)',
    ]
    if 'top5' in metrics:
        lines.append(f'top-5 {metrics["top5"]:.2f} %')
    lines.append(f'mean per class {metrics["mean_per_class"]:.2f} %')
    lines.append(f'expected calibration error {metrics["calibration_error"]:.2f} % (15 bins)')
    lines.append(f'loss {metrics["loss"]:.4f}')
    for pair in metrics['most_confused'][:5]:
        (a, b), (forth, back) = pair['classes'], pair['taken_for']
        lines.append(f'{forth + back:,} confused: {shown(a)} / {shown(b)} ({forth:,} and {back:,})')
    return '\n'.join(lines + metrics['notes'])
