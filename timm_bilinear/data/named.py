"""timm's named data sets ('torch/...', 'hfds/...', 'wds/...'), with images opened as those of folders are."""

import copy
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map as load_timm_class_map
from torch.utils.data import Dataset, IterableDataset

from .images import name_key, open_image, shown

__all__ = [
    'FileSamples',
    'NamedDataset',
    'NamedStream',
    'class_map_names',
    'is_named',
    'load_class_map',
    'open_named',
]

_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')


def is_named(data_dir: Union[str, Path]) -> bool:
    """Whether this is a name of timm's data sets; a folder that exists is none."""
    prefix, separator, _ = str(data_dir).partition('/')
    return bool(separator) and prefix.lower() in _PREFIXES and not os.path.exists(data_dir)


def load_class_map(class_map: Union[str, Path, Dict[str, int]], root: Union[str, Path] = '') -> Dict[str, int]:
    """Indices by class folder, as timm reads them: a dictionary, a .pkl of one, or a .txt with a folder per line.

    Raises:
        FileNotFoundError: If there is no such file, here or in `root`.
        ValueError: If it is in another format, or its indices are not 0 to n - 1.
    """
    if not isinstance(class_map, dict):
        if not os.path.exists(class_map) and not os.path.exists(os.path.join(root, class_map)):
            raise FileNotFoundError(f"Class map '{shown(class_map)}' does not exist.")
        if Path(class_map).suffix.lower() not in ('.txt', '.pkl'):
            raise ValueError(f"Class map '{shown(class_map)}' is neither a .txt nor a .pkl file.")
    try:
        indices = dict(load_timm_class_map(class_map if isinstance(class_map, dict) else str(class_map), str(root)))
    except Exception as e:  # pickles fail in many ways
        raise ValueError(f"Cannot read class map '{shown(class_map)}': {' '.join(str(e).split())}.") from e
    if indices.get('') == len(indices) - 1:  # the empty line at the end of a text
        del indices['']
    name = 'Class map' if isinstance(class_map, dict) else f"Class map '{shown(class_map)}'"
    values = list(indices.values())
    if not indices or any(type(v) is not int for v in values) or set(values) != set(range(max(values) + 1)):
        raise ValueError(f'{name} must give its classes the indices 0 to n - 1.')
    return {unicodedata.normalize('NFC', key) if isinstance(key, str) else key: v for key, v in indices.items()}


def class_map_names(indices: Dict[str, int]) -> List[str]:
    """Names of the classes of a class map; one of several folders has all their names."""
    names: List[List[str]] = [[] for _ in range(max(indices.values()) + 1)]
    for name, index in indices.items():
        names[index].append(str(name))
    return [', '.join(sorted(group, key=name_key)) for group in names]


@dataclass
class FileSamples:
    """Image files of a data set of torchvision."""

    paths: List[Path]
    targets: List[int]
    class_names: List[str]


class _Named:
    transform: Optional[Callable] = None
    input_img_mode: str = 'RGB'
    min_size: Optional[int] = None
    class_names: List[str]

    def _image(self, source: Any) -> Any:
        image = open_image(source, self.input_img_mode, self.min_size)
        return image if self.transform is None else self.transform(image)


class NamedDataset(_Named, Dataset):
    """A data set of torchvision or Hugging Face, by index.

    Args:
        dataset: What timm created; its own transforms are not used.
        class_names: Classes, by index.
    """

    def __init__(self, dataset: Dataset, class_names: List[str]):
        self.dataset = dataset
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        # timm's own data set takes the next image for one that cannot be read, and its class with it
        source, target = getattr(self.dataset, 'reader', self.dataset)[index][:2]
        try:
            return self._image(source), int(target)
        finally:
            if hasattr(source, 'read'):
                source.close()

    @property
    def targets(self) -> List[int]:
        """Classes of all images, without opening these."""
        reader = getattr(self.dataset, 'reader', None)
        targets = self.dataset.targets if reader is None else reader.iter_targets()
        return [int(target) for target in targets]

    def filename(self, index: int, **kwargs) -> str:
        """The file's name where the data set has one, else the index."""
        reader = getattr(self.dataset, 'reader', None)
        return (reader.filename(index, **kwargs) if reader is not None else None) or str(index)


class NamedStream(_Named, IterableDataset):
    """A data set that is read from its beginning to its end: WebDataset, TensorFlow Datasets, streamed Hugging Face.

    Args:
        dataset: What timm created.
        class_names: Classes, by index.
    """

    def __init__(self, dataset: IterableDataset, class_names: List[str]):
        self.dataset = dataset
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __copy__(self) -> 'NamedStream':
        # readers set themselves up for the workers that they first run in, so each loader has one of its own
        dataset = copy.copy(self.dataset)
        if hasattr(dataset, 'reader'):
            dataset.reader = copy.copy(dataset.reader)
        other = NamedStream(dataset, self.class_names)
        other.__dict__.update({**self.__dict__, 'dataset': dataset})
        return other

    def sources(self) -> Iterator[Tuple[Any, int]]:
        """Images as they come, not transformed, and targets."""
        return iter(self.dataset)

    def __iter__(self) -> Iterator[Tuple[Any, int]]:
        for image, target in self.sources():
            yield self._image(image), int(target)

    def set_epoch(self, epoch: int):
        self.dataset.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: Optional[int] = None):
        self.dataset.set_loader_cfg(num_workers=num_workers)


def _names_of(dataset: Any) -> List[str]:
    """Classes by index, or none where the data set does not tell."""
    classes = getattr(dataset, 'classes', None)
    if classes:  # torchvision's ImageNet has several names for each
        return [str(name if isinstance(name, str) else name[0]) for name in classes]
    indices = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if not indices or set(indices.values()) != set(range(len(set(indices.values())))):
        return []
    return class_map_names(indices)


def open_named(
    name: str,
    split: str,
    root: Union[str, Path, None] = None,
    class_map: Union[str, Path, Dict[str, int], None] = None,
    is_training: bool = False,
    seed: int = 0,
    download: bool = False,
) -> Union[NamedDataset, NamedStream, FileSamples]:
    """A split of a data set by timm's name for it.

    Args:
        name: Prefix and name, as for `timm.data.create_dataset`.
        split: Split, as the data set calls it, or one of timm's names for training and validation.
        root: Folder of the data.
        class_map: Class map; for 'wds/...', whose samples have numbers, a .txt only names them.
        is_training: Let a stream be shuffled.
        seed: Seed of a stream's order.
        download: Download what is not there.

    Raises:
        ValueError: If it cannot be opened; the message says why.
    """
    prefix = name.partition('/')[0].lower()
    if root is None and prefix in ('torch', 'wds'):
        raise ValueError(f"'{name}' needs the folder that its data lie in: root (--data-root).")
    names = class_map_names(load_class_map(class_map)) if class_map else []
    only_names = prefix == 'wds' and bool(class_map) and str(class_map).lower().endswith('.txt')
    try:
        dataset = create_dataset(
            name,
            root=None if root is None else str(root),
            split=split,
            # torchvision's classes take no class map
            class_map=None if only_names or prefix == 'torch' else class_map or None,
            is_training=is_training,
            download=download,
            seed=seed,
            input_img_mode='RGB' if prefix == 'tfds' else '',  # '': not converted, open_image does that better
        )
    except ImportError as e:
        raise ValueError(f"'{name}' needs a package that is not installed: {e.name or e}.") from e
    except Exception as e:  # whatever the library behind it raises
        reason = ' '.join(str(e).split()).rstrip('.') or type(e).__name__
        raise ValueError(f"Cannot open split '{split}' of '{name}': {reason}.") from e
    if prefix == 'torch' and class_map:
        raise ValueError(f"'{name}' takes no class map: its classes are torchvision's.")
    names = names or _names_of(dataset)
    if isinstance(dataset, IterableDataset):
        return NamedStream(dataset, names)
    if hasattr(dataset, 'samples'):
        return FileSamples([Path(path) for path, _ in dataset.samples], [i for _, i in dataset.samples], names)
    return NamedDataset(dataset, names)
