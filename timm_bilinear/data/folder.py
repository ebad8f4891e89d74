"""Image data for training and evaluation: folders split/class/image, one folder of classes, or timm's named data sets.

Everything that is wrong with a folder is said before anything is trained: first what does not fit into
split/class/image, all of it in one error, last the images that cannot be read, all of them in one error.
"""

import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from torch.utils.data import Dataset

from . import checks
from .class_maps import ClassMap, class_map_label, class_map_names, load_class_map
from .images import open_image, shown
from .named import FileSamples, is_image_folder, is_named, open_named
from .scan import SPLITS, ScannedSplit, find_named_split, find_split, find_splits, listed, scan_beside, scan_split

__all__ = ['ImageData', 'ImageList', 'create_datasets', 'create_split']


class ImageList(Dataset):
    """Image files with their classes.

    Args:
        paths: Files.
        targets: Index of the class of each, into `class_names`.
        class_names: Classes, by index.
        root: Folder that `filename` gives names relative to.
        transform: Called with each image.
        input_img_mode: PIL mode of the images, see `IMG_MODES`.
        min_size: Pixels that the shorter edge of a JPEG image must keep when it is decoded, see `open_image`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        targets: Sequence[int],
        class_names: Sequence[str],
        root: Union[str, Path, None] = None,
        transform: Optional[Callable] = None,
        input_img_mode: str = 'RGB',
        min_size: Optional[int] = None,
    ):
        if len(paths) != len(targets):
            raise ValueError(f'Got {len(paths)} paths and {len(targets)} targets.')
        self.paths = list(paths)
        self.targets = list(targets)
        self.class_names = list(class_names)
        self.root = root
        self.transform = transform
        self.input_img_mode = input_img_mode
        self.min_size = min_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        """The transformed image and its target; raises `ImageError` if the file cannot be read."""
        image = open_image(self.paths[index], self.input_img_mode, self.min_size)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of a file, relative to `root` if there is one."""
        path = self.paths[index]
        if basename:
            return os.path.basename(path)
        if absolute:
            return os.path.abspath(path)
        return str(path) if self.root is None else os.path.relpath(path, self.root)


@dataclass
class ImageData:
    """What a data folder, or a named data set, holds.

    Args:
        splits: Data sets by 'train', 'val' and 'test', as far as there are.
        class_names: Classes, by index: the same in every split.
        skipped: A message on each file that was left out.
        warnings: What is no error, and worth a look.
        fingerprint: Hash of the classes and of every image's split, class, name and size, and of what is in the files
            if the images were checked.
    """

    splits: Dict[str, Dataset]
    class_names: List[str]
    skipped: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    fingerprint: str = ''


def _checksum(path: Union[str, Path]) -> int:
    """CRC-32 of a file: images of uncompressed formats have the same size whatever they show."""
    value = 0
    with open(path, 'rb') as f:
        while chunk := f.read(2**20):
            value = zlib.crc32(chunk, value)
    return value


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_arguments(
    data_dir: Union[str, Path], class_names: Optional[Sequence[str]], class_map: Optional[ClassMap], **folders: Any
):
    for name, value in {'data_dir': data_dir, **folders}.items():
        if value is not None or name == 'data_dir':
            if not isinstance(value, (str, os.PathLike)):
                raise TypeError(f'{name} must be the path of a folder, got {value!r}.')
            if not str(value):
                raise FileNotFoundError(f"{name} is empty: the folder '' does not exist.")
    if class_names is not None:
        if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
            raise TypeError(f'class_names must be a list of names, got {class_names!r}.')
        if class_map is not None:
            raise ValueError('Classes come from class_names or from class_map, not from both.')


def _existing(data_dir: Union[str, Path]) -> Path:
    path = Path(data_dir)
    if not path.exists():
        raise FileNotFoundError(f"Data folder '{shown(path)}' does not exist.")
    if not path.is_dir():
        raise NotADirectoryError(f"'{shown(path)}' is no folder.")
    return path


def _finish(
    data_dir: Path,
    scans: Dict[str, ScannedSplit],
    indices: Dict[str, int],
    class_names: List[str],
    warnings: List[str],
    skipped: List[str],
    with_content: bool = False,
) -> ImageData:
    splits, content = {}, {}
    for key, scan in scans.items():
        found = [(image, indices[name]) for name, images in scan.classes.items() for image in images]
        splits[key] = ImageList([image.path for image, _ in found], [i for _, i in found], class_names, data_dir)
        content[key] = [(i, os.fsencode(image.path.name).hex(), image.size) for image, i in found]
        if with_content:
            with ThreadPoolExecutor(4) as pool:
                content[f'{key} files'] = list(pool.map(_checksum, splits[key].paths))
        skipped += scan.skipped
    return ImageData(splits, class_names, skipped, warnings, _hash([class_names, content]))


def create_datasets(
    data_dir: Union[str, Path],
    val_fraction: Optional[float] = None,
    seed: int = 0,
    skip_bad: bool = False,
    class_names: Optional[Sequence[str]] = None,
    check_images: bool = True,
    class_map: Optional[ClassMap] = None,
    root: Union[str, Path, None] = None,
    train_split: str = 'train',
    val_split: str = 'validation',
    test_split: Optional[str] = None,
    download: bool = False,
    progress: bool = True,
) -> ImageData:
    """Data for training, checked: every class and image is where it belongs and can be read.

    Hidden entries are passed over, files that are no images (by extension) are listed in `skipped`. Classes are in
    timm's natural order, and names that it leaves equal ('a' and 'A', '1' and '01') in order of their characters.

    Args:
        data_dir: Folder with `train`, `val` and optionally `test` (or timm's other names for them), each with a
            folder per class that holds images. With `val_fraction` also one folder of class folders. Or a name of
            timm's data sets, with prefix: 'torch/...', 'hfds/...', 'hfids/...', 'tfds/...', 'wds/...'.
        val_fraction: Part of each class, 0 < f < 1, to set aside for validation, at least one of two or more images.
        seed: Seed of that choice, which depends on the names of classes and files alone.
        skip_bad: Go on without images that cannot be read, and list them in `skipped`.
        class_names: Classes by index, of a model say. None for the class folders of the training split.
        check_images: Decode every image, and look for images of one split in another.
        class_map: File (.txt with a class folder per line, .pkl) or dictionary from class folders to indices, as for
            timm's train script. Folders that it does not name are left out.
        root: Folder of a named data set.
        train_split: Training split of a named data set.
        val_split: Validation split of a named data set.
        test_split: Test split of a named data set, None for none.
        download: Download a named data set that is not there.
        progress: Show a bar while images are checked, on a terminal.

    Raises:
        FileNotFoundError: If the folder or a split is missing.
        TypeError: If an argument is of another type.
        ValueError: If something does not fit into split/class/image, a class is unknown to the training set, there
            is one class only, or an image cannot be read. The message names all of them.
    """
    _check_arguments(data_dir, class_names, class_map, root=root)
    if val_fraction is not None:
        if not isinstance(val_fraction, Real):
            raise TypeError(f'val_fraction must be a number between 0 and 1, got {val_fraction!r}.')
        if not 0 < val_fraction < 1:
            raise ValueError(f'val_fraction must lie between 0 and 1, got {val_fraction}.')
    of_timm = is_named(data_dir)
    if of_timm:
        if val_fraction is not None:
            raise ValueError(f"val_fraction is for image folders; '{data_dir}' has splits of its own (val_split).")
        splits = {'train': train_split, 'val': val_split, **({'test': test_split} if test_split else {})}
        if not is_image_folder(data_dir):
            named = dict(skip_bad=skip_bad, check_images=check_images, progress=progress)
            return _named_data(data_dir, splits, root, class_map, class_names, seed, download, **named)
        data_dir = _root_of(data_dir, root, class_map)
        folders = {key: find_named_split(data_dir, split) for key, split in splits.items()}
    else:
        data_dir = _existing(data_dir)
        folders = find_splits(data_dir)
    if val_fraction is not None and 'val' in folders:
        raise ValueError(
            f"'{shown(data_dir)}' has a folder '{folders['val'].name}': val_fraction would make a second one."
        )
    checks.refuse_flat(data_dir, ('train',) if val_fraction is not None else ('train', 'val'), folders)
    of_classes = 'train' not in folders and val_fraction is not None
    for key in ('train', 'val') if val_fraction is None else ():
        if key not in folders:
            raise FileNotFoundError(
                f"Data folder '{shown(data_dir)}' has no '{key}' folder of class folders; "
                'val_fraction (--val-fraction) takes a part of the training images for validation.'
            )
    scans = {key: scan_split(folders[key], data_dir) for key in SPLITS if key in folders}
    beside = ScannedSplit(data_dir)
    if of_classes:
        scans = {'train': scan_split(data_dir, data_dir, folders.values()), **scans}
    elif not of_timm:
        beside = scan_beside(data_dir, folders.values())
    for scan in scans.values():
        if not scan.classes and not scan.problems:
            place = shown(os.path.relpath(scan.folder, data_dir))
            scan.problems.append(f"'{place}' (a folder of no class folders)")
    checks.refuse_problems(data_dir, [beside, *scans.values()])

    owner = 'The training set'
    if class_map is not None:
        indices, owner = load_class_map(class_map, data_dir), class_map_label(class_map)
        class_names = class_map_names(indices)
        for key, scan in scans.items():
            checks.leave_out(scan, indices, data_dir, owner, least=2 if key == 'train' else 1)
    elif class_names is not None:
        class_names, indices, owner = list(class_names), checks.class_indices(class_names), 'The model'
    else:
        class_names = sorted(scans['train'].classes) if of_timm else list(scans['train'].classes)  # as torchvision
        indices = checks.class_indices(class_names)
    checks.refuse_unknown(data_dir, scans, indices, owner)
    if len({indices[name] for name in scans['train'].classes}) < 2:
        raise ValueError(f"The training set '{shown(scans['train'].folder)}' needs two classes or more.")
    warnings = checks.warn_of_links(data_dir, {key: scan.folder for key, scan in scans.items()})

    if check_images:
        warnings += checks.check_images(scans, skip_bad, progress)
    if val_fraction is not None:
        scans = {'train': scans['train'], 'val': checks.take_out(scans['train'], val_fraction, seed), **scans}
        if not scans['val'].images():
            raise ValueError(f"'{shown(data_dir)}' has no class of two or more images to take validation images from.")
    warnings += checks.warn_of_classes(scans, indices, class_names)
    if check_images:
        warnings += checks.warn_of_copies(scans)
    return _finish(data_dir, scans, indices, class_names, warnings, beside.skipped, with_content=check_images)


def create_split(
    data_dir: Union[str, Path],
    split: str = 'test',
    class_names: Optional[Sequence[str]] = None,
    skip_bad: bool = False,
    check_images: bool = True,
    class_map: Optional[ClassMap] = None,
    root: Union[str, Path, None] = None,
    download: bool = False,
    progress: bool = True,
) -> ImageData:
    """One split of a data folder, or a folder of class folders as it is, to evaluate on; checked as for training.

    Args:
        data_dir: Folder with a folder for the split, or a name of timm's data sets. Of a folder of class folders
            'train', 'val' and 'test' are all images, with a warning.
        split: 'train', 'val' or 'test' (under any of timm's names for them), or the name of another folder.
        class_names: Classes by index, of the model. None for those of the training split beside it, else its own.
        skip_bad: Go on without images that cannot be read, and list them in `skipped`.
        check_images: Decode every image.
        class_map: As for `create_datasets`.
        root: Folder of a named data set.
        download: Download a named data set that is not there.
        progress: Show a bar while images are checked, on a terminal.

    Returns:
        The data, with `split` as the one key of `splits`.

    Raises:
        FileNotFoundError: If the folder or the split is missing.
        TypeError: If an argument is of another type.
        ValueError: If a class is unknown to the model, or anything that `create_datasets` refuses.
    """
    _check_arguments(data_dir, class_names, class_map, root=root)
    if not isinstance(split, str):
        raise TypeError(f'split must be the name of a split, got {split!r}.')
    of_timm = is_named(data_dir)
    if of_timm and not is_image_folder(data_dir):
        if not split.strip():
            raise ValueError('split must be the name of a split, it is empty.')
        named = dict(skip_bad=skip_bad, check_images=check_images, progress=progress)
        return _named_data(data_dir, {split: split}, root, class_map, class_names, 0, download, **named)
    data_dir = _root_of(data_dir, root, class_map) if of_timm else _existing(data_dir)
    folders = find_splits(data_dir)
    folder = find_split(data_dir, split, folders)
    scan = scan_split(folder or data_dir, data_dir)
    checks.refuse_problems(data_dir, [scan])
    if not scan.classes:
        raise ValueError(f"'{shown(scan.folder)}' has no class folders with images.")

    owner = 'The model'
    if class_map is not None:
        indices, owner = load_class_map(class_map, data_dir), class_map_label(class_map)
        class_names = class_map_names(indices)
        checks.leave_out(scan, indices, data_dir, owner)
    else:
        if class_names is None:
            source = scan_split(folders['train'], data_dir) if 'train' in folders else scan
            class_names = sorted(source.classes) if of_timm else list(source.classes)
            owner = 'The training set'
        class_names, indices = list(class_names), checks.class_indices(class_names)
    checks.refuse_unknown(data_dir, {split: scan}, indices, owner)
    warnings = checks.check_images({split: scan}, skip_bad, progress) if check_images else []
    warnings += checks.warn_of_classes({split: scan}, indices, class_names)
    if folder is None:
        warnings.append(f"'{shown(data_dir)}' has no folders of splits: all its images are taken as '{split}'.")
    return _finish(data_dir, {split: scan}, indices, class_names, warnings, [])


def _root_of(name: Union[str, Path], root: Union[str, Path, None], class_map: Optional[ClassMap]) -> Path:
    """Folder of an image folder that is named as a data set of torchvision."""
    if root is None:
        raise ValueError(f"'{name}' needs the folder that its data lie in: root (--data-root).")
    if class_map is not None:
        raise ValueError(f"'{name}' takes no class map: its classes are torchvision's.")
    return _existing(root)


def _named_data(
    name: Union[str, Path],
    split_names: Dict[str, str],
    root: Union[str, Path, None],
    class_map: Optional[ClassMap],
    class_names: Optional[Sequence[str]],
    seed: int,
    download: bool,
    skip_bad: bool,
    check_images: bool,
    progress: bool,
) -> ImageData:
    splits, names = {}, None if class_names is None else list(class_names)
    owner = 'the model' if names else 'the training split'
    for key, split in split_names.items():
        dataset = open_named(str(name), split, root, class_map, key == 'train', seed, download)
        own = dataset.class_names
        if names is None:
            names = own
        elif own and own != names:
            differing = [repr(name) for name in dict.fromkeys([*own, *names]) if (name in own) != (name in names)]
            what = f'not both have {listed(differing)}' if differing else 'their order differs'
            raise ValueError(f"Split '{split}' of '{name}' has other classes than {owner}: {what}.")
        splits[key] = dataset
    if not names:
        raise ValueError(f"'{name}' does not name its classes; give them by class_map (--class-map) or class_names.")
    if len(names) < 2 and 'train' in splits:
        raise ValueError(f"The training set of '{name}' needs two classes or more.")
    if all(isinstance(dataset, FileSamples) for dataset in splits.values()):
        scans = {key: dataset.scan(Path(root)) for key, dataset in splits.items()}
        indices = {path.parent.name: i for files in splits.values() for path, i in zip(files.paths, files.targets)}
        warnings = checks.check_images(scans, skip_bad, progress) if check_images else []
        warnings += checks.warn_of_classes(scans, indices, names)
        return _finish(Path(root), scans, indices, names, warnings, [], with_content=check_images)
    for dataset in splits.values():
        dataset.class_names = names
    return ImageData(splits, names, fingerprint=_hash([str(name), split_names, names, seed]))
