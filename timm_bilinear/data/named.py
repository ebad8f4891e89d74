"""timm's named data sets ('torch/...', 'hfds/...', 'wds/...'), with images opened as those of folders are."""

import copy
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from .class_maps import ClassMap, class_map_names, load_class_map
from .images import open_image
from .samples import reason
from .scan import Found, ScannedSplit

__all__ = [
    'FileSamples',
    'NamedDataset',
    'NamedStream',
    'is_image_folder',
    'is_named',
    'open_named',
]

# Prefixes, and the packages that they need.
_PREFIXES = {
    'torch': 'torchvision',
    'hfds': 'datasets',
    'hfids': 'datasets',
    'tfds': 'tensorflow_datasets',
    'wds': 'webdataset',
}


def is_named(data_dir: Union[str, Path]) -> bool:
    """Whether this is a name of timm's data sets; a folder that exists is none."""
    prefix, separator, _ = str(data_dir).partition('/')
    return bool(separator) and prefix.lower() in _PREFIXES and not os.path.exists(data_dir)


def is_image_folder(name: Union[str, Path]) -> bool:
    """Whether a named data set is a folder of split/class/image, which timm has torchvision read."""
    prefix, _, rest = str(name).lower().partition('/')
    return prefix == 'torch' and rest.rpartition('/')[2] in ('folder', 'image_folder')


@dataclass
class FileSamples:
    """Image files of a data set of torchvision."""

    paths: List[Path]
    targets: List[int]
    class_names: List[str]

    def scan(self, root: Path) -> ScannedSplit:
        """The files by the folder that they lie in."""
        split = ScannedSplit(root)
        for path in self.paths:
            size = os.stat(path).st_size if path.exists() else 0
            split.classes.setdefault(path.parent.name, []).append(Found(path, size))
        return split


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

    def sources(self, seed: int = 0) -> Iterator[Tuple[Any, int]]:
        """Images as they come, not transformed, and targets; of a copy, for a second pass to begin anew."""
        dataset = copy.copy(self).dataset
        reader = getattr(dataset, 'reader', None)
        if hasattr(reader, 'worker_seed'):  # workers have their own, a pass without them would be as the one before
            reader.worker_seed = seed
        return iter(dataset)

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
    class_map: Optional[ClassMap] = None,
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
    if prefix == 'torch' and class_map is not None:
        raise ValueError(f"'{name}' takes no class map: its classes are torchvision's.")
    indices = None if class_map is None else load_class_map(class_map)
    names = [] if indices is None else class_map_names(indices)
    only_names = prefix == 'wds' and str(class_map).lower().endswith('.txt')
    try:
        with redirect_stdout(StringIO()):  # of timm's and torchvision's, which may be a command's result
            dataset = create_dataset(
                name,
                root=None if root is None else str(root),
                split=split,
                class_map=None if only_names else indices,
                is_training=is_training,
                download=download,
                seed=seed,
                input_img_mode='RGB' if prefix == 'tfds' else '',  # '': not converted, open_image does that better
            )
    except Exception as e:  # whatever the library behind it raises
        if isinstance(e, ImportError) or 'Please install' in str(e):
            package = getattr(e, 'name', None) or _PREFIXES[prefix]
            raise ValueError(f"'{name}' needs a package that is not installed: {package}.") from e
        raise ValueError(f"Cannot open split '{split}' of '{name}': {reason(e)}.") from e
    names = names or _names_of(dataset)
    if isinstance(dataset, IterableDataset):
        return NamedStream(dataset, names)
    if hasattr(dataset, 'samples'):
        return FileSamples([Path(path) for path, _ in dataset.samples], [i for _, i in dataset.samples], names)
    return NamedDataset(dataset, names)
