"""What training leaves behind, by timm's train script or by `finetune`, as a model and what is known about it."""

import argparse
import csv
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import timm
import torch
import yaml
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from timm.models import clean_state_dict, resolve_model_input_args
from torch import nn

from .labels import class_names

__all__ = ['Trained', 'load_trained']


@dataclass
class Trained:
    """A trained model and what its card can say of it."""

    model: nn.Module
    label_names: Optional[List[str]] = None
    data_config: Optional[Dict[str, Any]] = None
    metrics: Dict[str, float] = field(default_factory=dict)
    args: Dict[str, Any] = field(default_factory=dict)


def _read_args(folder: Path) -> Dict[str, Any]:
    path = folder / 'args.yaml'
    return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}


def _summary_row(folder: Path, epoch: Optional[int], metric: str) -> Dict[str, float]:
    """Validation figures of an epoch, or of the best one, in a summary.csv."""
    path = folder / 'summary.csv'
    if not path.is_file():
        return {}
    with path.open() as f:
        rows = list(csv.DictReader(f))
    if epoch is not None:
        rows = [row for row in rows if int(row['epoch']) == epoch]
    if not rows or f'eval_{metric}' not in rows[0]:
        return {}
    row = max(rows, key=lambda row: float(row[f'eval_{metric}']))
    return {key: float(row[key]) for key in ('eval_top1', 'eval_top5') if row.get(key)}


def _load_folder(folder: Path, label_names: Optional[List[str]]) -> Trained:
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except SafetensorError as e:
        raise ValueError(f"'{folder / 'model.safetensors'}' cannot be read ({e}).") from e
    names = label_names or model.pretrained_cfg.get('label_names')
    metrics = _summary_row(folder, None, 'top1')
    if (folder / 'results.json').is_file():  # of finetune
        results = json.loads((folder / 'results.json').read_text())
        metrics.update({key: results[key] for key in ('test_top1',) if key in results})
    return Trained(model, list(names) if names else None, resolve_input_data_config(model), metrics, _read_args(folder))


def _load_file(path: Path, label_names: Optional[List[str]]) -> Trained:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as e:
        raise ValueError(f"'{path}' is not a checkpoint that can be read ({str(e).splitlines()[0]}).") from e
    args = _read_args(path.parent)
    if not args and isinstance(checkpoint, dict) and isinstance(checkpoint.get('args'), argparse.Namespace):
        args = vars(checkpoint['args'])
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint or 'model' not in args:
        raise ValueError(f"'{path}' is not a checkpoint of timm's train script: it has no state_dict, or no arguments.")

    state_dict = clean_state_dict(checkpoint.get('state_dict_ema') or checkpoint['state_dict'])
    kwargs = dict(args.get('model_kwargs') or {}, global_pool=args.get('gp') or None)
    kwargs.pop('freeze_backbone', None)
    # as the train script makes the model, for its --in-chans, --img-size and --input-size
    model_args = resolve_model_input_args(args['model'], args, **kwargs)
    classifier = model_args['pretrained_cfg'].get('classifier')
    if f'{classifier}.weight' not in state_dict:
        raise ValueError(f"'{path}' has no classifier ({classifier}.weight).")
    model = timm.create_model(**model_args, num_classes=len(state_dict[f'{classifier}.weight']))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        problem = str(e).splitlines()[-1].strip()
        raise ValueError(f"'{path}' does not fit the model that its arguments make: {problem}") from e

    metric = args.get('eval_metric') or 'top1'
    return Trained(
        model,
        label_names or class_names(args, path, model.num_classes),
        resolve_input_data_config(model, args),
        _summary_row(path.parent, checkpoint.get('epoch'), metric),
        args,
    )


def load_trained(path: Union[str, Path], label_names: Optional[Sequence[str]] = None) -> Trained:
    """Load a model from what training has written.

    Args:
        path: Folder of `finetune` (or any in the Hub's layout), or a checkpoint file of timm's train script, whose EMA
            weights are taken if it has them, and whose args.yaml and summary.csv lie beside it.
        label_names: Class names in the order of the logits; None for those of the folder, or of the data trained on.

    Returns:
        Model and what is known about it.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no such folder or file.
    """
    path = Path(path)
    names = list(label_names) if label_names else None
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint '{path}'.")
    if path.is_file():
        return _load_file(path, names)
    if not (path / 'config.json').is_file():
        raise ValueError(f"'{path}' has no config.json; give a folder of finetune, or a file of timm's train script.")
    return _load_folder(path, names)
