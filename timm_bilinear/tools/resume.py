"""What a resumed run takes from the run it continues, and what may not differ from it."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from .inference import resolve_amp_dtype
from .settings import FREE_ON_RESUME, Settings, Stage

__all__ = ['check_data', 'check_machine', 'dtype_name', 'resume_settings']

# What only the stages depend on: two ways of saying the same stages are no difference.
_RECIPE = ('stages', 'epochs', 'head_epochs', 'opt', 'lr', 'head_lr', 'weight_decay', 'freeze')
_SIZES = ('img_size', 'train_size')


def dtype_name(dtype: Optional[torch.dtype]) -> Optional[str]:
    """Name of the dtype of autocast as args.yaml has it, None for float32."""
    return None if dtype is None else str(dtype).removeprefix('torch.')


def _location(value: Any) -> Any:
    """A path, or a model name with one in it, in a form that can be compared."""
    if isinstance(value, str) and value.startswith('local-dir:'):
        return 'local-dir:' + os.path.realpath(value.removeprefix('local-dir:'))
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _settings_of(args: Dict[str, Any]) -> Settings:
    """Settings of the run that wrote these arguments."""
    known = {f.name for f in fields(Settings)}
    settings = Settings(**{k: v for k, v in args.items() if k in known and k != 'stages'})
    if 'stages' in args['given']:
        settings.stages = [Stage(**stage) for stage in args['stages']]
    settings.given = frozenset(args['given'])
    return settings


def _resolved(name: str, settings: Settings, data_config: Dict[str, Any]) -> Any:
    """What a setting comes to where it was not given: in the stages of the recipe, or in the model's preprocessing."""
    value = getattr(settings, name)
    if name in _SIZES:
        height, width = data_config['input_size'][1:]
        return value or settings.img_size or (height if height == width else [height, width])
    if name in ('stages', 'freeze') or (value is not None and settings.stages is None):
        return value
    stages = settings.resolve_stages()
    if name in ('epochs', 'head_epochs'):
        return sum(stage.epochs for stage in stages if (stage.lr == 0.0) == (name == 'head_epochs'))
    values = [getattr(stage, name) for stage in stages if stage.lr > 0 or name in ('opt', 'head_lr')]
    return values[0] if values and values == values[:1] * len(values) else values or None


def _refuse(name: str, here: Any, there: Any, output: Optional[str]) -> None:
    raise ValueError(
        f"'{name}' is {here!r} here and {there!r} in the run that is to be resumed in '{output}': leave it out, or"
        ' start a new run in another folder.'
    )


def resume_settings(
    given: Settings, args: Dict[str, Any], device: torch.device, data_config: Dict[str, Any]
) -> Settings:
    """Settings of a resumed run: those of the run, and of what was given now that which does not change the result.

    Args:
        given: What was given now.
        args: What the run's checkpoint has as its arguments.
        device: Device to train on.
        data_config: The preprocessing that its checkpoint has.

    Returns:
        Settings to go on with.

    Raises:
        ValueError: If something was given that differs, naming it and both values.
    """
    run = _settings_of(args)
    here = given.plain()
    recipe = {name: getattr(given, name) for name in _RECIPE if name in given.given}
    merged = replace(run, **recipe)
    if merged.stages is not None and 'stages' not in recipe and any(recipe[n] != getattr(run, n) for n in recipe):
        merged.stages = None  # the stages that were given are not those that a recipe makes
    same_stages = merged.resolve_stages() == run.resolve_stages()
    for name in sorted(given.given - set(FREE_ON_RESUME)):
        value, there = here[name], args[name]
        if name in _RECIPE:
            resolved = _resolved(name, run, data_config)
            if not same_stages and recipe[name] not in (getattr(run, name), resolved):
                shown = (value, there) if name == 'stages' else (recipe[name], resolved)
                _refuse(name, *shown, given.output)
        elif name == 'train_aug':
            for key in given.train_aug or {}:
                if value[key] != there[key]:
                    _refuse(key, value[key], there[key], given.output)
        elif name == 'amp_dtype':
            resolved = dtype_name(resolve_amp_dtype(value, device))
            if resolved != there:
                _refuse(name, value, there or 'float32', given.output)
        elif name in _SIZES:
            here_size, there_size = (_resolved(name, each, data_config) for each in (given, run))
            if here_size != there_size:
                _refuse(name, here_size, there_size, given.output)
        elif name == 'model_kwargs':
            if (value or {}) != (there or {}):
                _refuse(name, value, there, given.output)
        elif _location(value) != _location(there):
            _refuse(name, value, there, given.output)
    free = {name: getattr(given, name) for name in FREE_ON_RESUME if name in given.given}
    settings = replace(run, **dict(free, output=given.output, resume=True, overwrite=False))
    settings.amp_dtype = args['amp_dtype'] or 'float32'
    settings.given = given.given
    if settings.data_dir is not None and 'data_dir' not in given.given and _is_gone(settings.data_dir):
        raise FileNotFoundError(f"The data of the run, '{settings.data_dir}', are not there; give where they are now.")
    return settings


def _is_gone(data_dir: str) -> bool:
    return Path(data_dir).is_absolute() and not Path(data_dir).exists()


def check_data(checkpoint: Dict[str, Any], class_names: List[str], fingerprint: str, data_dir: Optional[str]) -> None:
    """Refuse to go on with other data than those of the run.

    Raises:
        ValueError: If classes or images are other ones.
    """
    there = checkpoint['class_names']
    if list(class_names) != list(there):
        gone = [name for name in there if name not in class_names]
        new = [name for name in class_names if name not in there]
        parts = [f'{", ".join(map(repr, names[:5]))} {what}' for names, what in ((new, 'new'), (gone, 'gone')) if names]
        told = f' ({"; ".join(parts)})' if parts else ' (in another order)'
        raise ValueError(f"The classes of '{data_dir}' are not those of the run that is to be resumed{told}.")
    if fingerprint != checkpoint['args'].get('fingerprint'):
        raise ValueError(f"The images of '{data_dir}' are not those of the run that is to be resumed.")


def check_machine(args: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    """What is another than in the run so far and may change the last digits of what is computed."""
    notes = []
    for name in ('threads', 'processes', 'device_name'):
        if args.get(name) != now.get(name):
            notes.append(f'{name} {now.get(name)}, before {args.get(name)}')
    old, new = args.get('versions') or {}, now.get('versions') or {}
    notes += [f'{name} {new.get(name)}, before {old.get(name)}' for name in new if new.get(name) != old.get(name)]
    return notes
