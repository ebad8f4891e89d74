"""Image data for training and evaluation: folders split/class/image, one folder of classes, or timm's named data sets.

Everything that is wrong with a folder is said before anything is trained: first what does not fit into
split/class/image, all of it in one error, last the images that cannot be read, all of them in one error.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from torch.utils.data import Dataset

from . import checks
from .images import open_image, shown
from .named import FileSamples, class_map_names, is_named, load_class_map, open_named
from .scan import SPLITS, ScannedSplit, find_splits, listed, scan_beside, scan_split

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
        fingerprint: Hash of the classes and of every image's split, class, name and size.
    """

    splits: Dict[str, Dataset]
    class_names: List[str]
    skipped: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    fingerprint: str = ''


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _existing(data_dir: Union[str, Path]) -> Path:
    path = Path(data_dir)
    if not str(data_dir) or not path.exists():
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
) -> ImageData:
    splits, content = {}, {}
    for key, scan in scans.items():
        found = [(image, indices[name]) for name, images in scan.classes.items() for image in images]
        splits[key] = ImageList([image.path for image, _ in found], [i for _, i in found], class_names, data_dir)
        content[key] = [(i, os.fsencode(image.path.name).hex(), image.size) for image, i in found]
        skipped += scan.skipped
    return ImageData(splits, class_names, skipped, warnings, _hash([class_names, content]))


def create_datasets(
    data_dir: Union[str, Path],
    val_fraction: Optional[float] = None,
    seed: int = 0,
    skip_bad: bool = False,
    class_names: Optional[Sequence[str]] = None,
    check_images: bool = True,
    class_map: Union[str, Path, Dict[str, int], None] = None,
    root: Union[str, Path, None] = None,
    train_split: str = 'train',
    val_split: str = 'validation',
    test_split: Optional[str] = None,
    download: bool = False,
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

    Raises:
        FileNotFoundError: If the folder or a split is missing.
        ValueError: If something does not fit into split/class/image, a class is unknown to the training set, there
            is one class only, or an image cannot be read. The message names all of them.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction must lie between 0 and 1, got {val_fraction}.')
    if class_names is not None and class_map:
        raise ValueError('Classes come from class_names or from class_map, not from both.')
    if is_named(data_dir):
        if val_fraction is not None:
            raise ValueError(f"val_fraction is for image folders; '{data_dir}' has splits of its own (val_split).")
        splits = {'train': train_split, 'val': val_split, **({'test': test_split} if test_split else {})}
        return _named_data(data_dir, splits, root, class_map, class_names, seed, download)

    data_dir = _existing(data_dir)
    folders = find_splits(data_dir)
    if val_fraction is not None and 'val' in folders:
        raise ValueError(
            f"'{shown(data_dir)}' has a folder '{folders['val'].name}': val_fraction would make a second one."
        )
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
    else:
        beside = scan_beside(data_dir, folders.values())
    checks.refuse_problems(data_dir, [beside, *scans.values()])

    owner = 'The training set'
    if class_map:
        indices = load_class_map(class_map, data_dir)
        class_names = class_map_names(indices)
        for scan in scans.values():
            checks.leave_out(scan, indices, data_dir)
    elif class_names is not None:
        class_names, indices, owner = list(class_names), checks.class_indices(class_names), 'The model'
    else:
        class_names = list(scans['train'].classes)
        indices = checks.class_indices(class_names)
    checks.refuse_unknown(data_dir, scans, indices, owner)
    if len({indices[name] for name in scans['train'].classes}) < 2:
        raise ValueError(f"The training set '{shown(scans['train'].folder)}' needs two classes or more.")
    warnings = checks.warn_of_links(data_dir, {key: scan.folder for key, scan in scans.items()})

    if check_images:
        warnings += checks.check_images(scans, skip_bad)
    if val_fraction is not None:
        scans = {'train': scans['train'], 'val': checks.take_out(scans['train'], val_fraction, seed), **scans}
        if not scans['val'].images():
            raise ValueError(f"'{shown(data_dir)}' has no class of two or more images to take validation images from.")
    warnings += checks.warn_of_classes(scans, indices, class_names)
    if check_images:
        warnings += checks.warn_of_copies(scans)
    return _finish(data_dir, scans, indices, class_names, warnings, beside.skipped)


def create_split(
    data_dir: Union[str, Path],
    split: str = 'test',
    class_names: Optional[Sequence[str]] = None,
    skip_bad: bool = False,
    check_images: bool = True,
    class_map: Union[str, Path, Dict[str, int], None] = None,
    root: Union[str, Path, None] = None,
    download: bool = False,
) -> ImageData:
    """One split of a data folder, or a folder of class folders as it is, to evaluate on; checked as for training.

    Args:
        data_dir: Folder with a folder for the split, or one of class folders, or a name of timm's data sets.
        split: 'train', 'val' or 'test' (under any of timm's names for them), or the name of another folder.
        class_names: Classes by index, of the model. None for those of the training split beside it, else its own.
        skip_bad: Go on without images that cannot be read, and list them in `skipped`.
        check_images: Decode every image.
        class_map: As for `create_datasets`.
        root: Folder of a named data set.
        download: Download a named data set that is not there.

    Returns:
        The data, with `split` as the one key of `splits`.

    Raises:
        FileNotFoundError: If the folder or the split is missing.
        ValueError: If a class is unknown to the model, or anything that `create_datasets` refuses.
    """
    if class_names is not None and class_map:
        raise ValueError('Classes come from class_names or from class_map, not from both.')
    if is_named(data_dir):
        return _named_data(data_dir, {split: split}, root, class_map, class_names, 0, download)
    data_dir = _existing(data_dir)
    folders = find_splits(data_dir)
    folder = folders.get(next((key for key, names in SPLITS.items() if split.lower() in names), split))
    if folder is None and (data_dir / split).is_dir():
        folder = data_dir / split
    if folder is None and folders:
        raise FileNotFoundError(
            f"Data folder '{shown(data_dir)}' has no '{split}' folder of class folders, "
            f'but {listed([repr(path.name) for path in folders.values()])}.'
        )
    scan = scan_split(folder or data_dir, data_dir)
    checks.refuse_problems(data_dir, [scan])
    if not scan.classes:
        raise ValueError(f"'{shown(scan.folder)}' has no class folders with images.")

    owner = 'The model'
    if class_map:
        indices = load_class_map(class_map, data_dir)
        class_names = class_map_names(indices)
        checks.leave_out(scan, indices, data_dir)
    else:
        if class_names is None:
            source = scan_split(folders['train'], data_dir) if 'train' in folders else scan
            class_names, owner = list(source.classes), 'The training set'
        class_names, indices = list(class_names), checks.class_indices(class_names)
    checks.refuse_unknown(data_dir, {split: scan}, indices, owner)
    warnings = checks.check_images({split: scan}, skip_bad) if check_images else []
    warnings += checks.warn_of_classes({split: scan}, indices, class_names)
    return _finish(data_dir, {split: scan}, indices, class_names, warnings, [])


def _named_data(
    name: Union[str, Path],
    split_names: Dict[str, str],
    root: Union[str, Path, None],
    class_map: Union[str, Path, Dict[str, int], None],
    class_names: Optional[Sequence[str]],
    seed: int,
    download: bool,
) -> ImageData:
    splits, names = {}, None if class_names is None else list(class_names)
    for key, split in split_names.items():
        dataset = open_named(str(name), split, root, class_map, key == 'train', seed, download)
        if isinstance(dataset, FileSamples):
            dataset = ImageList(dataset.paths, dataset.targets, dataset.class_names, root)
        own = dataset.class_names
        if names is None:
            names = own
        elif own and own != names:
            raise ValueError(f"Split '{split}' of '{name}' has other classes than the model or the training split.")
        splits[key] = dataset
    if not names:
        raise ValueError(f"'{name}' does not name its classes; give them by class_map (--class-map) or class_names.")
    if len(names) < 2 and 'train' in splits:
        raise ValueError(f"The training set of '{name}' needs two classes or more.")
    for dataset in splits.values():
        dataset.class_names = names
    return ImageData(splits, names, fingerprint=_hash([str(name), split_names, names, seed]))
