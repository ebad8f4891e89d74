"""Class names: of the data that a run of timm's train script read, or of a file."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.utils import natural_key
from torch import nn

from .._compat import search_split

__all__ = ['class_names', 'given_names', 'ordered_names', 'read_label_names', 'stored_label_names']

_logger = logging.getLogger(__name__)


class _UncertainError(Exception):
    """Why the names of a run's classes, or their order, are not known for sure."""


def read_label_names(path: Union[str, Path]) -> List[str]:
    """Read class names from a file: one in each line, or a JSON list.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not such a file.
    """
    try:
        text = Path(path).read_text(encoding='utf-8-sig').strip()
    except UnicodeDecodeError:
        raise ValueError(f"The label names '{path}' are no text in UTF-8.") from None
    except (OSError, ValueError) as e:
        reason = getattr(e, 'strerror', None) or str(e)
        kind = type(e) if isinstance(e, OSError) else ValueError
        raise kind(f"The label names '{path}' cannot be read ({reason}).") from None
    try:
        names = json.loads(text) if text.startswith(('[', '{')) else None
    except ValueError as e:
        if text.endswith((']', '}')) or text[1:].lstrip().startswith('"'):
            raise ValueError(f"The label names '{path}' are not valid JSON: {e}.") from None
        names = None  # a name may begin with a bracket
    if names is None:
        names = [line.strip() for line in text.split('\n')]
    elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"The label names '{path}' must be a JSON list of strings.")
    if '' in names:
        raise ValueError(f"The label names '{path}' have no name for class {names.index('')}.")
    return names


def ordered_names(names: Any, num_classes: int) -> Optional[List[str]]:
    """Class names as timm's configs have them, as a list in the order of the logits.

    Args:
        names: List, {index: name}, whose gaps are filled by numbers, or {name: index}.
        num_classes: Number of classes.

    Returns:
        As many names as classes; None if these are the names of another number of them.
    """
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            names = {index: name for name, index in names.items()}
        if not all(str(index).isdecimal() and int(index) < num_classes for index in names):
            return None
        by_index = {int(index): str(name) for index, name in names.items()}
        return [by_index.get(index, str(index)) for index in range(num_classes)]
    return [str(name) for name in names] if len(names) == num_classes else None


def given_names(
    names: Union[str, Path, Sequence[str], Dict[Any, Any], None], num_classes: Optional[int] = None
) -> Union[List[str], Dict[Any, Any], None]:
    """Class names as a caller gives them.

    Args:
        names: List, tuple, dictionary as for `ordered_names`, file as for `read_label_names`, or None.
        num_classes: Number of classes; None before it is known.

    Returns:
        Names in the order of the logits, or as they are without `num_classes`; None for None.

    Raises:
        OSError: If the file cannot be read.
        TypeError: If they are something else.
        ValueError: If they are the names of another number of classes, or the file is no list of names.
    """
    if isinstance(names, (str, os.PathLike)):
        names = read_label_names(names)
    if names is not None and not isinstance(names, (list, tuple, dict)):
        kind = type(names).__name__
        raise TypeError(f"'label_names' must be a list of names, {{index: name}}, or a file of them, got {kind}.")
    if names is None or num_classes is None:
        return names
    ordered = ordered_names(names, num_classes)
    if ordered is None:
        what = 'other indices' if isinstance(names, dict) and len(names) <= num_classes else f'{len(names)} names'
        raise ValueError(f"'label_names' must name {num_classes} classes, got {what}.")
    return ordered


def stored_label_names(model: nn.Module) -> Optional[List[str]]:
    """Class names that a model has in its `pretrained_cfg`, in the order of the logits; None without."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return ordered_names(names, model.num_classes) if names and model.num_classes else None


def _training_directory(args: Dict[str, Any], folder: Path) -> Optional[Path]:
    """Directory that a run was started in, to which its paths are relative, if the place of its folder tells.

    The train script writes to OUTPUT/NAME. A run without that argument counts as one of the current directory if it
    lies there.
    """
    folder = folder.resolve()
    if 'output' not in args:
        return Path.cwd() if Path.cwd() in (folder, *folder.parents) else None
    output = Path(args['output'] or 'output/train')
    depth = len(output.parts)
    if output.is_absolute() or '..' in output.parts or depth >= len(folder.parents):
        return None
    directory = folder.parents[depth]
    return directory if directory / output == folder.parent else None


def _load_map(args: Dict[str, Any], data_dir: Optional[str], directory: Optional[Path]) -> Dict[str, int]:
    """Class map of a run, whose path is relative to where the run was started, or to the folder of its images."""
    class_map = args['class_map']
    is_relative = not Path(class_map).is_absolute()
    bases = [] if directory is None else [directory]
    if data_dir and (directory is not None or Path(data_dir).is_absolute()):
        bases.append(search_split(str((directory or Path()) / data_dir), args.get('train_split') or 'train'))
    found = next((path for base in bases if (path := Path(base, class_map)).is_file()), None)
    if found is None and directory is None and is_relative and Path(class_map).is_file():
        raise _UncertainError(f"the class map '{class_map}' is relative, and where the run was started is not known")
    try:
        return load_class_map(str(found or class_map))
    except (AssertionError, ValueError, OSError, pickle.UnpicklingError) as e:  # timm asserts that it is there
        raise ValueError(f"The class map '{class_map}' of the run cannot be read: {e}.") from None


def _class_to_idx(args: Dict[str, Any], folder: Path) -> Dict[str, int]:
    name = args.get('dataset') or ''
    kind = name.partition('/')[0].lower() if '/' in name else ''
    data_dir = args.get('data_dir') or args.get('data')
    directory = _training_directory(args, folder)
    if kind not in ('', 'torch'):
        raise _UncertainError(f"those of the dataset '{name}' are not looked up")
    if not kind and args.get('class_map'):
        return _load_map(args, data_dir, directory)
    if not data_dir:
        raise _UncertainError('its arguments name no data folder')
    if directory is None and not Path(data_dir).is_absolute():
        raise _UncertainError(f"the data folder '{data_dir}' is relative, and where the run was started is not known")
    root = (directory or Path()) / data_dir
    if not root.exists():
        raise _UncertainError(f"the data folder '{root}' is not there")
    options = {} if kind else dict(input_key=args.get('input_key'))
    try:
        dataset = create_dataset(name, root=str(root), split=args.get('train_split') or 'train', **options)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
        raise _UncertainError(f"the data folder '{root}' cannot be read as in training ({reason})") from None
    class_to_idx = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if class_to_idx is None:
        raise _UncertainError(f"the dataset '{name}' tells none")
    if not kind:
        places: Dict[tuple, str] = {}
        for label in class_to_idx:
            other = places.setdefault(tuple(natural_key(label)), label)
            if other != label:  # timm sorts a set of them
                raise _UncertainError(f"the order of '{other}' and '{label}' is another in each process")
    return class_to_idx


def class_names(args: Dict[str, Any], path: Path, num_classes: int) -> Optional[List[str]]:
    """Names of the classes of a run of timm's train script, read as training did.

    Args:
        args: The run's arguments.
        path: Its checkpoint.
        num_classes: Number of the model's classes.

    Returns:
        Names in the order of the logits; None, with a warning, if they are not there or not certain.

    Raises:
        ValueError: If the run's class map cannot be read.
    """
    try:
        class_to_idx = _class_to_idx(args, path.parent)
        if sorted(class_to_idx.values()) != list(range(num_classes)):
            raise _UncertainError(f'the data have {len(class_to_idx)} classes, and the model has {num_classes}')
        if not all(isinstance(name, str) for name in class_to_idx):
            raise _UncertainError('the class map has numbers in their place')
    except _UncertainError as e:
        _logger.warning(f"The class names of '{path}' are left out: {e}. Give them by --label-names FILE.")
        return None
    return sorted(class_to_idx, key=class_to_idx.get)
