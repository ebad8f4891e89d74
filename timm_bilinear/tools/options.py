"""What a setting may be: its type and bounds, kept as the metadata of a dataclass's field, and their check."""

import math
import os
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any, Dict, Mapping, get_args

__all__ = ['check_value', 'option', 'plain_value']


def option(help: str, **metadata: Any) -> Dict[str, Any]:
    """What is known of a setting beside its default.

    Args:
        help: Its line in the command's help, without the default.
        **metadata: 'type' of its numbers or words (int, float, str, bool, dict, list); 'least', 'most', 'above' and
            'below', the bounds of its numbers; 'infinite', True if they may be; 'lengths', how many of them it may
            have; 'choices'; 'nargs' and 'metavar' as in argparse; 'flag', its option if that is not its name; 'cli',
            False if it has none.
    """
    return dict(metadata, help=help)


def plain_value(value: Any) -> Any:
    """A value of Python for one that says the same: of numpy, a path, torch's dtype or device, also within others."""
    if callable(getattr(value, 'tolist', None)):  # arrays, tensors, and numpy's numbers and texts
        value = value.tolist()
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_value, value)) if type(value) in (list, tuple) else [*map(plain_value, value)]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: plain_value(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, (bytes, os.PathLike)):
        return os.fsdecode(value)
    if type(value).__module__ == 'torch' and type(value).__name__ in ('dtype', 'device'):
        return str(value).removeprefix('torch.')
    for kind in (str, int, float):  # of their subclasses, as of enumerations
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind.__str__(value) if kind is str else kind(value)
    return value


def _range(metadata: Mapping[str, Any]) -> str:
    words = dict(least='at least', above='above', most='at most', below='below')
    return ' and '.join(f'{word} {metadata[key]:g}' for key, word in words.items() if key in metadata)


def _check_number(name: str, metadata: Mapping[str, Any], value: Any) -> None:
    wanted = metadata['type']
    is_number = isinstance(value, int if wanted is int else (int, float)) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"'{name}' must be {'a whole number' if wanted is int else 'a number'}, got {value!r}.")
    is_inside = (
        (math.isfinite(value) or (metadata.get('infinite', False) and value == math.inf))
        and value >= metadata.get('least', -math.inf)
        and value <= metadata.get('most', math.inf)
        and value > metadata.get('above', -math.inf)
        and ('below' not in metadata or value < metadata['below'])
    )
    if not is_inside:
        raise ValueError(f"'{name}' must be {_range(metadata) or 'finite'}, got {value!r}.")


def check_value(setting: Field, value: Any) -> None:
    """Refuse a value of a wrong type or out of range.

    Args:
        setting: Field of `Settings`, `Stage` or `TrainAug`.
        value: The value; None where the field may be None.

    Raises:
        TypeError: If it has a wrong type.
        ValueError: If it is out of range.
    """
    name, metadata = setting.name, setting.metadata
    if value is None and type(None) in get_args(setting.type):
        return
    wanted = metadata['type']
    if wanted in (int, float):
        if isinstance(value, (list, tuple)) and 'lengths' in metadata:
            if len(value) not in metadata['lengths']:
                lengths = ' or '.join(map(str, metadata['lengths']))
                raise ValueError(f"'{name}' must be {lengths} numbers, got {len(value)}.")
        elif metadata.get('nargs') == 2:
            raise TypeError(f"'{name}' must be two numbers, got {value!r}.")
        for number in value if isinstance(value, (list, tuple)) and 'lengths' in metadata else (value,):
            _check_number(name, metadata, number)
    elif not isinstance(value, wanted):
        words = {str: 'a text', bool: 'True or False', dict: 'a dict', list: 'a list'}
        raise TypeError(f"'{name}' must be {words[wanted]}, got {value!r}.")
    elif value == '':
        raise ValueError(f"'{name}' must not be empty, got ''.")
    if 'choices' in metadata and value not in metadata['choices']:
        raise ValueError(f"'{name}' must be one of {', '.join(metadata['choices'])}, got {value!r}.")
