"""A model folder in the Hub's layout: that what it says of the number of classes is one number, and that it loads."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

__all__ = ['best_checkpoint', 'find_model', 'load_folder', 'read_config']

_logger = logging.getLogger(__name__)


def best_checkpoint(folder: Path) -> Optional[Path]:
    """The best checkpoint of a folder of a run, finetune's or the train script's, else the last."""
    names = ('checkpoints/model_best.pth.tar', 'checkpoints/last.pth.tar', 'model_best.pth.tar', 'last.pth.tar')
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_model(model: Union[str, Path]) -> Path:
    """Find what a local name of a model means.

    Args:
        model: Path of a folder or file, or 'local-dir:FOLDER'.

    Returns:
        Folder with a config.json and weights, or checkpoint file: of a run without a result, its best so far, with a
        warning.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the name is empty.
    """
    name = os.fspath(model)
    source, colon, place = name.partition(':')
    is_folder = bool(colon) and source.lower().replace('_', '-') == 'local-dir'
    name = place if is_folder else name
    if not name.strip():
        raise ValueError(f"The name of a model is missing in '{os.fspath(model)}'.")
    path = Path(name).expanduser()
    if is_folder and not path.is_dir():
        raise FileNotFoundError(f"There is no folder '{name}'.")
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint '{name}'.")
    if path.name == 'model.safetensors' and path.is_file() and path.with_name('config.json').is_file():
        path = path.parent
    if not path.is_dir():
        return path
    if (path / 'config.json').is_file():
        if not any(found for pattern in ('*.safetensors', '*.bin', '*.pth') for found in path.glob(pattern)):
            raise FileNotFoundError(f"'{path}' has no weights beside its config.json (model.safetensors).")
        return path
    checkpoint = best_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(
            f"'{path}' is no folder of a model: it has neither a config.json nor checkpoints of a run."
        )
    if (path / 'checkpoints').is_dir():
        _logger.warning(f"'{path}' is a run that has not ended: taking its best so far, '{checkpoint}'.")
    else:
        _logger.info(f"Taking '{checkpoint}'.")
    return checkpoint


def read_config(folder: Path) -> Dict[str, Any]:
    """Read config.json.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not valid.
    """
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f"'{path}' is not valid JSON ({str(e).splitlines()[0]}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' is no config of a model: it must be a JSON object.")
    for key, kind in (('pretrained_cfg', dict), ('model_args', dict), ('label_names', (list, dict))):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise ValueError(f"'{path}' is no config of a model: its {key} is {config[key]!r:.80}.")
    if not isinstance(config.get('architecture'), str):
        raise ValueError(f"'{path}' is no config of a model: it names no architecture.")
    return config


def _classes_of_weights(folder: Path, cfg: Dict[str, Any]) -> Dict[str, int]:
    """Rows of the classifiers in model.safetensors, by their names there."""
    path = folder / 'model.safetensors'
    if not path.is_file():
        return {}
    names = cfg.get('classifier') or ()
    names = [names] if isinstance(names, str) else names
    counts = {}
    with safe_open(path, 'pt') as weights:
        for key in (f'{name}.weight' for name in names):
            if key in weights.keys() and (shape := weights.get_slice(key).get_shape()):
                counts[f'{key} in model.safetensors'] = shape[0] - (cfg.get('label_offset') or 0)
    return counts


def _check_num_classes(folder: Path, config: Dict[str, Any]) -> None:
    """Check that all of a folder speaks of the same number of classes.

    timm believes one of them, and fills a classifier of another size with random numbers.
    """
    cfg = config.get('pretrained_cfg') or {k: v for k, v in config.items() if k != 'model_args'}
    counts = {'num_classes': config.get('num_classes')}
    counts['model_args.num_classes'] = (config.get('model_args') or {}).get('num_classes')
    counts['pretrained_cfg.num_classes'] = (config.get('pretrained_cfg') or {}).get('num_classes')
    counts = {key: count for key, count in counts.items() if count is not None}
    for key, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"'{folder}' is no folder of a model: its {key} is {count!r:.80}.")
    counts.update(_classes_of_weights(folder, cfg))
    if len(set(counts.values())) > 1:
        told = ', '.join(f'{key} is {count}' for key, count in counts.items())
        raise ValueError(f"The numbers of classes in '{folder}' disagree: {told}.")
    names = config.get('label_names') or cfg.get('label_names')
    count = next(iter(counts.values()), None)
    # a dict may have gaps
    if names and count is not None and (len(names) > count if isinstance(names, dict) else len(names) != count):
        raise ValueError(f"The numbers of classes in '{folder}' disagree: num_classes is {count}, names {len(names)}.")


def load_folder(folder: Path) -> nn.Module:
    """Load the model of a folder with its weights.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If config or weights are damaged, or do not fit each other: which and why, in one sentence.
    """
    config = read_config(folder)
    try:
        _check_num_classes(folder, config)
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            return timm.create_model(f'local-dir:{folder}', pretrained=True)
    except SafetensorError as e:
        raise ValueError(f"'{folder / 'model.safetensors'}' cannot be read ({e}).") from e
    except (RuntimeError, TypeError, KeyError, AttributeError, AssertionError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        raise ValueError(f"'{folder}' does not give a model: {lines[-1].rstrip('.')}.") from e
