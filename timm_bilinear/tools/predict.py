"""Prediction: what images show, in Python and as a command."""

import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import torch
from PIL import Image
from timm.utils import unwrap_model
from torch import nn
from tqdm import tqdm

from .inference import (
    AMP_DTYPES,
    TTA,
    check_choice,
    left_as_it_was,
    load,
    model_name,
    precision,
    resolve_amp_dtype,
    resolve_device,
    view_data_config,
    whole_number,
)
from .prediction import find_sources, iterate_predictions
from .prediction_files import check_targets, open_writers, printable

__all__ = ['predict', 'run_predict']


def _check_arguments(
    topk: int, batch_size: int, workers: Optional[int], amp: Optional[str], tta: Optional[str], device: Any
) -> Dict[str, Any]:
    """Check what a user gives, before a model is loaded.

    Returns:
        Arguments for `iterate_predictions`.

    Raises:
        TypeError: If a number is none, by name.
        ValueError: If one is too small, a word is none of those possible, or there is no such device, by name.
    """
    check_choice('amp', amp, AMP_DTYPES)
    check_choice('tta', tta, TTA)
    if device is not None:
        resolve_device(device)
    workers = None if workers is None else whole_number('workers', workers, 0)
    topk, batch_size = whole_number('topk', topk, 1), whole_number('batch_size', batch_size, 1)
    return dict(topk=topk, batch_size=batch_size, workers=workers, amp=amp, tta=tta)


def _show_progress(results: Iterable, total: Optional[int], progress: bool = True) -> Iterable:
    """Results with a bar on stderr, on a terminal, once they take more than two seconds."""
    is_hidden = not progress or sys.stderr is None
    return tqdm(results, 'Predicting', total, unit='img', delay=2, disable=True if is_hidden else None)


def _say(text: str):
    """Print to stderr, where there is one."""
    if sys.stderr is not None:
        tqdm.write(printable(text), file=sys.stderr)


def predict(
    model: Union[str, Path, nn.Module],
    images: Union[str, Path, Image.Image, Any, Iterable],
    topk: int = 5,
    batch_size: int = 32,
    workers: Optional[int] = None,
    amp: Optional[str] = 'auto',
    device: Optional[Union[str, torch.device]] = None,
    label_names: Union[Sequence[str], Dict[Any, Any], str, Path, None] = None,
    tta: Optional[str] = 'auto',
    progress: bool = False,
) -> List[Dict[str, Any]]:
    """Predict the classes of images.

    Each image is oriented, converted, resized and normalised as the weights of the model want it; large JPEGs are
    decoded at a reduced size that is still twice what they are resized to.

    Args:
        model: What `load` takes.
        images: Path of a file, a folder (with those within it) or a glob, PIL image, binary file object, or an
            iterable of these.
        topk: Most classes for each image.
        batch_size: Images that go through the model together.
        workers: Threads that decode images, by the cores if None; 0 decodes between the batches.
        amp: 'auto' for bfloat16 where the hardware has it, 'bfloat16', 'float16' or 'float32'.
        device: Device to compute on; None for a GPU if there is one, and for where a given module is.
        label_names: Class names in the order of the logits, {index: name}, or a file of them, instead of the model's.
        tta: Mean of the probabilities of several views: an image and its mirror image ('flip'), five crops ('crops'),
            or the whole and its parts at several scales ('scales'); 'none' for the image alone. 'auto' is 'scales' for
            models that want images padded whole (`crop_mode` 'border'), else 'none'.
        progress: Show a bar on stderr if it takes more than some seconds.

    Returns:
        For each image, in the order given: 'image', its path or what it was called; 'error', None or why there is no
        prediction; 'predictions', most probable first: 'name', 'index' and 'probability' (softmax, within 0 to 1).

    Raises:
        TypeError: If something that is no image is among the images, a number is none, or label names are none.
        ValueError: If an argument is wrong, or the model has no classifier.
        OSError: If the model cannot be loaded.
        RuntimeError: If memory does not suffice for the batch.
    """
    options = _check_arguments(topk, batch_size, workers, amp, tta, device)
    sources = find_sources(images)
    if isinstance(images, (str, os.PathLike, list, tuple)):
        sources = list(sources)  # paths are checked before the model is loaded
    with left_as_it_was(model):
        net = load(model, device, label_names)
        results = iterate_predictions(net, sources, **options)
        total = len(sources) if isinstance(sources, list) else None
        return list(_show_progress(results, total, progress))


def run_predict(
    model: Union[str, Path, torch.nn.Module],
    images: Sequence[Any],
    topk: int = 5,
    json: Optional[str] = None,
    csv: Optional[str] = None,
    batch_size: int = 32,
    workers: Optional[int] = None,
    amp: Optional[str] = 'auto',
    device: Optional[str] = None,
    label_names: Union[Sequence[str], Dict[Any, Any], str, Path, None] = None,
    tta: Optional[str] = 'auto',
) -> int:
    """Predict, and print the results or write them to files, image by image.

    Results go to stdout, everything else to stderr. A file keeps what it had until the new one is whole.

    Args:
        model, images, topk, batch_size, workers, amp, device, label_names, tta: As for `predict`.
        json: File for a list of what `predict` returns, '-' for stdout.
        csv: File for a table with a row for each image and class, '-' for stdout; an image without prediction has
            one row with its error.

    Returns:
        Exit code: 0, or 1 if there is an image without prediction.

    Raises:
        OSError, RuntimeError, TypeError, ValueError: As for `predict`, and if a file cannot be written.
        KeyboardInterrupt: If it is stopped; files are as they were, and the message says so.
    """
    options = _check_arguments(topk, batch_size, workers, amp, tta, device)
    check_targets(json, csv)
    sources = list(find_sources(images))
    if not sources:
        raise ValueError("'images' are empty: name at least one file, folder or pattern.")
    net = load(model, device, label_names)
    where = next((p.device for p in net.parameters()), torch.device('cpu'))
    amp_dtype = resolve_amp_dtype(amp, where)
    options['amp'] = amp if amp_dtype else None  # what is missing is said once
    _, height, width = view_data_config(net)['input_size']
    classes = getattr(unwrap_model(net), 'num_classes', '?')
    _say(
        f'{model_name(net)} ({classes} classes, {height} x {width} pixels) on {where.type} in'
        f' {precision(net, amp_dtype)}, {len(sources)} image{"s" * (len(sources) != 1)}'
    )
    failed = 0
    results = _show_progress(iterate_predictions(net, sources, **options), len(sources))
    try:
        with open_writers(json, csv) as writers:
            for result in results:
                for write in writers:
                    write(result)
                if result['error'] is not None:
                    failed += 1
                    name = '' if result['image'] in result['error'] else f'{result["image"]}: '
                    _say(f'timm-bilinear: error: {name}{result["error"]}')
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if failed:
        _say(
            f'timm-bilinear: error: {failed} of {len(sources)} image{"s" * (len(sources) != 1)}'
            f' {"has" if failed == 1 else "have"} no prediction.'
        )
    return 1 if failed else 0
