"""Class maps, as timm's train script takes them: which class folder has which index."""

import os
import unicodedata
from pathlib import Path
from typing import Dict, List, Union

from timm.data.readers.class_map import load_class_map as load_timm_class_map

from .images import name_key, shown
from .scan import listed

__all__ = ['ClassMap', 'class_map_label', 'class_map_names', 'load_class_map']

ClassMap = Union[str, Path, Dict[str, int]]


def class_map_label(class_map: ClassMap) -> str:
    """What a message calls a class map."""
    return 'The class map' if isinstance(class_map, dict) else f"Class map '{shown(class_map)}'"


def _read_text(path: str) -> Dict[str, int]:
    """Indices by line, each of which is the name of a folder."""
    with open(path, encoding='utf-8-sig') as file:  # some editors put a mark in front
        names = [line.strip() for line in file.read().rstrip().splitlines()]
    empty = [str(number) for number, name in enumerate(names, 1) if not name]
    if empty:
        raise ValueError(f'there is no name in line {listed(empty)}')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'{listed([repr(name) for name in twice])} is there more than once')
    return {name: index for index, name in enumerate(names)}


def load_class_map(class_map: ClassMap, root: Union[str, Path] = '') -> Dict[str, int]:
    """Indices by class folder, as timm reads them: a dictionary, a .pkl of one, or a .txt with a folder per line.

    Raises:
        FileNotFoundError: If there is no such file, here or in `root`.
        ValueError: If it is in another format, names nothing or something twice, or its indices are not 0 to n - 1.
    """
    label = class_map_label(class_map)
    if isinstance(class_map, dict):
        indices = class_map
    else:
        path = str(class_map) if os.path.exists(class_map) else os.path.join(root, class_map)
        if not os.path.exists(path):
            raise FileNotFoundError(f'{label} does not exist.')
        suffix = Path(path).suffix.lower()
        if suffix not in ('.txt', '.pkl') or not os.path.isfile(path):
            raise ValueError(f'{label} is neither a .txt nor a .pkl file.')
        try:
            indices = dict(load_timm_class_map(path)) if suffix == '.pkl' else _read_text(path)
        except Exception as e:  # pickles fail in many ways
            raise ValueError(f'{label} cannot be read: {" ".join(str(e).split()).rstrip(".")}.') from e
    if not indices:
        raise ValueError(f'{label} names no classes.')
    if any(isinstance(name, str) and not name.strip() for name in indices):
        raise ValueError(f'{label} has a class without a name.')
    values = list(indices.values())
    if any(type(value) is not int for value in values) or set(values) != set(range(max(values) + 1)):
        raise ValueError(f'{label} must give its classes the indices 0 to n - 1.')
    composed = {unicodedata.normalize('NFC', name) if isinstance(name, str) else name: i for name, i in indices.items()}
    if len(composed) < len(indices):
        raise ValueError(f'{label} names a class more than once, in several Unicode forms.')
    return composed


def class_map_names(indices: Dict[str, int]) -> List[str]:
    """Names of the classes of a class map; one of several folders has all their names."""
    names: List[List[str]] = [[] for _ in range(max(indices.values()) + 1)]
    for name, index in indices.items():
        names[index].append(str(name))
    return [', '.join(sorted(group, key=name_key)) for group in names]
