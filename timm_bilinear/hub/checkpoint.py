"""What training leaves behind, by `finetune` or by timm's train script, as a model and what is known about it."""

import argparse
import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import timm
import torch
import yaml
from timm.data import resolve_input_data_config
from timm.models import clean_state_dict, resolve_model_input_args
from torch import nn

from .folder import find_model, load_folder, read_config
from .labels import class_names, given_names, ordered_names, stored_label_names

__all__ = ['Trained', 'load_trained']

_CHECKPOINTS = 'checkpoints'  # finetune's folder of them
# Of a checkpoint of finetune, without which it is none.
_OF_FINETUNE = {'arch', 'model_args', 'num_classes', 'state_dict', 'class_names', 'data_config', 'args'}


@dataclass
class Trained:
    """A trained model and what its card can say of it.

    Args:
        model: The model.
        label_names: Class names in the order of the logits.
        data_config: Preprocessing, as of `timm.data.resolve_input_data_config`.
        metrics: Figures of exactly these weights, in percent: 'eval_top1', 'eval_top5', 'test_top1'.
        args: Arguments of the run that trained it.
    """

    model: nn.Module
    label_names: Optional[List[str]] = None
    data_config: Optional[Dict[str, Any]] = None
    metrics: Dict[str, float] = field(default_factory=dict)
    args: Dict[str, Any] = field(default_factory=dict)


def _first_line(error: BaseException) -> str:
    name = type(error).__name__
    text = f'{name} {error}' if isinstance(error, LookupError) else str(error).strip()  # of which the key says nothing
    return (text or name).splitlines()[0].rstrip('.')


def _read_args(folder: Path) -> Dict[str, Any]:
    path = folder / 'args.yaml'
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8')) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"'{path}' cannot be read ({_first_line(e)}).") from None
    if not isinstance(args or {}, dict):
        raise ValueError(f"'{path}' does not hold the arguments of a run.")
    return args or {}


def _read_results(folder: Path) -> Dict[str, Any]:
    """What finetune says of the weights that it saved, all of it numbers."""
    path = folder / 'results.json'
    try:
        results = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    except ValueError as e:
        raise ValueError(f"'{path}' cannot be read ({_first_line(e)}).") from None
    if not isinstance(results, dict):
        raise ValueError(f"'{path}' does not hold the results of a run.")
    return {key: value for key, value in results.items() if isinstance(value, (int, float))}


def _figures(rows: Iterable[Dict[str, Any]], epoch: Any) -> Dict[str, float]:
    """Validation figures of an epoch, of the rows of a summary; the last one tells, of an epoch run twice."""
    metrics: Dict[str, float] = {}
    for row in rows:
        try:
            if epoch is not None and int(row['epoch']) == int(epoch):
                metrics = {key: float(row[key]) for key in ('eval_top1', 'eval_top5') if row.get(key)}
        except (KeyError, TypeError, ValueError):
            continue  # a row that was cut off
    return metrics


def _read_figures(folder: Path, epoch: Any) -> Dict[str, float]:
    path = folder / 'summary.csv'
    if epoch is None or not path.is_file():
        return {}
    with path.open(encoding='utf-8', newline='') as f:
        return _figures(csv.DictReader(f), epoch)


def _read_test_figures(folder: Path, epoch: Any) -> Dict[str, float]:
    """Test figures of a run that has ended, if they are of this epoch."""
    results = _read_results(folder)
    is_same = epoch is not None and results.get('epoch') == epoch
    return {'test_top1': results['test_top1']} if is_same and 'test_top1' in results else {}


def _load_folder(folder: Path, label_names: Any) -> Trained:
    model = load_folder(folder)
    results = _read_results(folder)
    metrics = _read_figures(folder, results.get('epoch'))
    if 'val_top1' in results:
        metrics['eval_top1'] = results['val_top1']
    if 'test_top1' in results:
        metrics['test_top1'] = results['test_top1']
    names = label_names or stored_label_names(model)
    return Trained(model, names, resolve_input_data_config(model), metrics, _read_args(folder))


def _load_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        problem = str(e).splitlines()[-1].strip()
        raise ValueError(f"'{path}' does not fit the model that its arguments make: {problem}") from e


def _load_finetuned(path: Path, checkpoint: Dict[str, Any], label_names: Any) -> Trained:
    """Model of a checkpoint of finetune, which has all in it: the model it started from may be gone."""
    model_args, num_classes = dict(checkpoint['model_args']), checkpoint['num_classes']
    counts = {'num_classes': num_classes, 'class_names': len(checkpoint['class_names'] or ()) or num_classes}
    counts['model_args.num_classes'] = model_args.pop('num_classes', num_classes)
    if len(set(counts.values())) > 1:
        told = ', '.join(f'{key} is {count}' for key, count in counts.items())
        raise ValueError(f"The numbers of classes in '{path}' disagree: {told}.")
    for name in ('freeze_backbone', 'pretrained'):  # of the stage it was saved in, and of its start
        model_args.pop(name, None)
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(checkpoint['arch'], pretrained=False, num_classes=num_classes, **model_args)
    except (RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"'{path}' does not give a model: {_first_line(e)}.") from e
    _load_weights(model, checkpoint['state_dict'], path)
    cfg = checkpoint.get('pretrained_cfg') or {}  # of the weights it started from, with other classes
    model.pretrained_cfg.update({k: v for k, v in cfg.items() if k not in ('label_names', 'label_descriptions')})
    run = path.parent.parent if path.parent.name == _CHECKPOINTS else path.parent
    epoch = checkpoint.get('epoch')
    metrics = _figures(checkpoint.get('history') or (), epoch)
    # a checkpoint that was moved away does not take the figures of where it lies now
    if metrics and _read_figures(run, epoch) == metrics:
        metrics.update(_read_test_figures(run, epoch))
    names = label_names or [str(name) for name in checkpoint['class_names'] or ()]
    data_config = resolve_input_data_config(model, checkpoint['data_config'])
    return Trained(model, names or None, data_config, metrics, dict(checkpoint['args']))


def _stored_names(run: Path, num_classes: int) -> Optional[List[str]]:
    """Names that a run of finetune which has ended stored with its model."""
    try:
        names = read_config(run).get('label_names') if (run / 'config.json').is_file() else None
    except ValueError:
        return None
    return ordered_names(names, num_classes) if names else None


def _load_scripts(path: Path, checkpoint: Dict[str, Any], label_names: Any, remedy: str) -> Trained:
    """Model of a checkpoint by timm's saver: of the train script, or of finetune as it was."""
    # the train script's folder has both, finetune's has the checkpoints one below
    folders = [path.parent, *([path.parent.parent] if path.parent.name == _CHECKPOINTS else [])]
    run = next((folder for folder in folders if (folder / 'args.yaml').is_file()), path.parent)
    args = _read_args(run)
    if not args and isinstance(checkpoint.get('args'), argparse.Namespace):
        args = vars(checkpoint['args'])
    if 'state_dict' not in checkpoint or 'model' not in args:
        raise ValueError(f"'{path}' has no state_dict, or no arguments of timm's train script: {remedy}.")

    is_ema = bool(checkpoint.get('state_dict_ema'))
    state_dict = clean_state_dict(checkpoint['state_dict_ema'] if is_ema else checkpoint['state_dict'])
    kwargs = dict(args.get('model_kwargs') or {}, global_pool=args.get('gp') or None)
    kwargs.pop('freeze_backbone', None)
    try:
        # as the train script makes the model, for its --in-chans, --img-size and --input-size
        model_args = resolve_model_input_args(args['model'], args, **kwargs)
    except (OSError, RuntimeError) as e:
        raise ValueError(
            f"'{path}' was trained from '{args['model']}', which is not to be had: {_first_line(e)}."
        ) from e
    classifier = model_args['pretrained_cfg'].get('classifier')
    if f'{classifier}.weight' not in state_dict:
        raise ValueError(f"'{path}' has no classifier ({classifier}.weight).")
    model_args['num_classes'] = len(state_dict[f'{classifier}.weight'])
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(**model_args)
    _load_weights(model, state_dict, path)

    epoch, is_finetunes = checkpoint.get('epoch'), 'stages' in args
    # the train script measures averaged weights, unless they are kept on the CPU
    is_measured = not (is_ema and args.get('model_ema_force_cpu'))
    metrics = _read_figures(run, epoch) if is_measured else {}
    names = label_names
    if is_finetunes:
        metrics.update(_read_test_figures(run, epoch))
        names = names or _stored_names(run, model.num_classes)
    names = names or class_names(args, run / path.name, model.num_classes)
    return Trained(model, names, resolve_input_data_config(model, args), metrics, args)


def _load_file(path: Path, label_names: Any) -> Trained:
    remedy = (
        "give a folder with a config.json (save_model writes one), a checkpoint of finetune, or one of timm's train"
        ' script with its args.yaml beside it'
    )
    is_alone = path.suffix == '.safetensors'
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = {} if is_alone else torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a damaged file leads to errors of every kind
        # torch's own sentence on a file that holds no tensors is advice to read it without care
        reason = f'{type(e).__name__} of torch.load' if 'weights_only' in str(e) else _first_line(e)
        raise ValueError(f"'{path}' is not a checkpoint that can be read ({reason}).") from e
    if not isinstance(checkpoint, dict):
        raise ValueError(f"'{path}' is not a checkpoint of a model: {remedy}.")
    if is_alone or (checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values())):
        raise ValueError(f"'{path}' holds weights, and nothing of the model that they are for: {remedy}.")
    if _OF_FINETUNE <= checkpoint.keys():
        return _load_finetuned(path, checkpoint, label_names)
    return _load_scripts(path, checkpoint, label_names, remedy)


def load_trained(
    path: Union[str, Path], label_names: Union[Sequence[str], Dict[Any, Any], str, Path, None] = None
) -> Trained:
    """Load a model from what training has written.

    Args:
        path: Folder of `finetune` (or any in the Hub's layout), also as 'local-dir:FOLDER', or a checkpoint file: one
            in its checkpoints/, or of timm's train script, whose EMA weights are taken if it has them, and whose
            args.yaml and summary.csv lie beside it. Of a folder of a run without a config.json, the best checkpoint.
        label_names: Class names in the order of the logits, {index: name}, or a file of them; None for those of the
            folder, or of the data trained on.

    Returns:
        Model and what is known about it.

    Raises:
        FileNotFoundError: If it is not there, or there is no model in it.
        TypeError: If `label_names` are no names.
        ValueError: If it is no such folder or file, one that contradicts itself, or `label_names` are not as many as
            classes.
    """
    given = given_names(label_names)
    path = find_model(path)
    try:
        trained = _load_folder(path, given) if path.is_dir() else _load_file(path, given)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as e:
        raise ValueError(f"'{path}' cannot be loaded ({_first_line(e)}).") from e
    if given is not None:
        trained.label_names = given_names(given, trained.model.num_classes)
    return trained
