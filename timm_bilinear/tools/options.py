"""What a setting may be: its type and bounds, kept as the metadata of a dataclass's field, and their check."""

import math
from dataclasses import Field
from typing import Any, Dict, Mapping, get_args

__all__ = ['check_value', 'option']


def option(help: str, **metadata: Any) -> Dict[str, Any]:
    """What is known of a setting beside its default.

    Args:
        help: Its line in the command's help, without the default.
        **metadata: 'type' of its numbers or words (int, float, str, bool, dict, list); 'least', 'most', 'above' and
            'below', the bounds of its numbers; 'lengths', how many of them it may have; 'choices'; 'nargs' and
            'metavar' as in argparse; 'flag', its option if that is not its name; 'cli', False if it has none.
    """
    return dict(metadata, help=help)


def _range(metadata: Mapping[str, Any]) -> str:
    words = dict(least='at least', above='above', most='at most', below='below')
    return ' and '.join(f'{word} {metadata[key]:g}' for key, word in words.items() if key in metadata)


def _check_number(name: str, metadata: Mapping[str, Any], value: Any) -> None:
    wanted = metadata['type']
    is_number = isinstance(value, int if wanted is int else (int, float)) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"'{name}' must be {'a whole number' if wanted is int else 'a number'}, got {value!r}.")
    is_inside = (
        math.isfinite(value)
        and value >= metadata.get('least', -math.inf)
        and value <= metadata.get('most', math.inf)
        and value > metadata.get('above', -math.inf)
        and value < metadata.get('below', math.inf)
    )
    if not is_inside:
        raise ValueError(f"'{name}' must be {_range(metadata) or 'finite'}, got {value!r}.")


def check_value(setting: Field, value: Any, or_none: bool = False) -> None:
    """Refuse a value of a wrong type or out of range.

    Args:
        setting: Field of `Settings`, `Stage` or `TrainAug`.
        value: The value.
        or_none: None is a value, also if it is not the default.

    Raises:
        TypeError: If it has a wrong type.
        ValueError: If it is out of range.
    """
    name, metadata = setting.name, setting.metadata
    if value is None and (or_none or type(None) in get_args(setting.type)):
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
    if 'choices' in metadata and value not in metadata['choices']:
        raise ValueError(f"'{name}' must be one of {', '.join(metadata['choices'])}, got {value!r}.")
