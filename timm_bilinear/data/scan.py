"""What lies in a folder of images by class: found, in one order, and with everything that does not fit named."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from tqdm import tqdm

from .._compat import search_split
from .images import ImageError, image_extensions, is_hidden, is_huge, name_key, open_image, shown

__all__ = [
    'SPLITS',
    'Found',
    'ScannedSplit',
    'count_copies',
    'find_flat_splits',
    'find_named_split',
    'find_split',
    'find_splits',
    'is_of_classes',
    'listed',
    'scan_beside',
    'scan_split',
    'unreadable',
]

# Names of the split folders: timm's own, and the same for 'test', which timm has none for.
SPLITS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}


@dataclass(frozen=True)
class Found:
    """An image file.

    Args:
        path: Where it is.
        size: Its bytes, 0 for a link that leads nowhere.
    """

    path: Path
    size: int


@dataclass
class ScannedSplit:
    """A folder of class folders.

    Args:
        folder: Where it is.
        classes: Images by class name (in Unicode's composed form), classes and images in natural order.
        skipped: A message on each entry that was left out.
        problems: What does not fit into class/file, each with its place.
        taken: Whether the images are a part of another split's.
    """

    folder: Path
    classes: Dict[str, List[Found]] = field(default_factory=dict)
    skipped: List[str] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)
    taken: bool = False

    def images(self) -> List[Found]:
        return [image for images in self.classes.values() for image in images]


def listed(items: Sequence[str], most: int = 10) -> str:
    """Items in a sentence, the first ones and how many more there are."""
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(items[:most]) + more


def _identity(path: Path) -> Tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _entries(folder: Path) -> List[Path]:
    return [folder / name for name in sorted(os.listdir(folder), key=name_key) if not is_hidden(name)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in image_extensions()


def _count_images(folder: Path) -> int:
    try:
        return sum(map(_is_image, folder.iterdir()))
    except OSError:  # a file, or not for reading
        return 0


def _scan_class(folder: Path, label: Callable[[Path], str], split: ScannedSplit) -> List[Found]:
    images, deep = [], False
    for path in _entries(folder):
        if os.path.isdir(path):
            deep = True
            split.problems.append(f'{label(path)} (a folder inside a class folder)')
        elif not _is_image(path):
            split.skipped.append(f'{label(path)} is no image.')
        elif os.path.isfile(path):
            images.append(Found(path, os.stat(path).st_size))
        elif not os.path.exists(path):  # a link that leads nowhere: an image that cannot be read
            images.append(Found(path, 0))
        else:
            split.skipped.append(f'{label(path)} is no file.')
    if not images and not deep:
        split.problems.append(f'{label(folder)} (a class folder without images)')
    return images


def scan_split(folder: Path, base: Path, ignore: Iterable[Path] = ()) -> ScannedSplit:
    """Class folders and their images, without opening an image.

    Args:
        folder: The folder of class folders.
        base: Folder that names in messages are relative to.
        ignore: Entries of `folder` that are something else.

    Raises:
        OSError: If a folder cannot be read.
    """

    def label(path: Path) -> str:
        return f"'{shown(os.path.relpath(path, base))}'"

    split = ScannedSplit(folder)
    for path in map(folder.joinpath, sorted(filter(is_hidden, os.listdir(folder)))):
        if count := _count_images(path):
            split.skipped.append(f'{label(path)} is hidden ({count} images).')
    above = {_identity(path) for path in (folder, base, *folder.resolve().parents)}
    seen: Dict[Tuple[int, int], Path] = {}
    ignore = set(ignore)
    for path in _entries(folder):
        if path in ignore:
            continue
        if not os.path.isdir(path):
            if _is_image(path):
                split.problems.append(f'{label(path)} (an image outside of a class folder)')
            elif path.is_symlink() and not os.path.exists(path):
                split.problems.append(f'{label(path)} (a link that leads nowhere)')
            else:
                split.skipped.append(f'{label(path)} is no class folder.')
            continue
        identity, name = _identity(path), unicodedata.normalize('NFC', path.name)
        if identity in above:
            split.problems.append(f'{label(path)} (a link to a folder that it lies in)')
        elif identity in seen:
            split.problems.append(f'{label(path)} (the same folder as {label(seen[identity])})')
        elif name in split.classes:
            split.problems.append(f'{label(path)} (a second folder of that name, in another Unicode form)')
        elif not name.isascii() and name.encode('utf-8', 'replace').decode() != name:
            split.problems.append(f'{label(path)} (a class name that is not UTF-8)')
        else:
            seen[identity] = path
            images = _scan_class(path, label, split)
            if images:
                split.classes[name] = images
    split.classes = {name: split.classes[name] for name in sorted(split.classes, key=name_key)}
    return split


def scan_beside(data_dir: Path, folders: Iterable[Path]) -> ScannedSplit:
    """What lies beside the split folders: images there belong to no split, anything else is left alone."""
    beside, folders = ScannedSplit(data_dir), set(folders)
    flat = find_flat_splits(data_dir).values()
    for path in _entries(data_dir):
        if path in folders:
            continue
        if path in flat:
            beside.skipped.append(f"'{shown(path.name)}' has no class folders.")
        elif os.path.isdir(path) or not _is_image(path):
            beside.skipped.append(f"'{shown(path.name)}' belongs to no split.")
        else:
            beside.problems.append(f"'{shown(path.name)}' (an image outside of a split)")
    return beside


def _holds_classes(folder: Path) -> bool:
    """Whether a folder is one of class folders, or empty, rather than a class that is called 'train'."""
    entries = _entries(folder)
    return any(os.path.isdir(path) for path in entries) or not any(_is_image(path) for path in entries)


def _split_key(name: str) -> Optional[str]:
    """'train', 'val' or 'test' of timm's names for it, in any case; None for another name."""
    return next((key for key, names in SPLITS.items() if name.lower() in names), None)


def _split_folders(data_dir: Path) -> List[Tuple[str, Path]]:
    keys = [(_split_key(path.name), path) for path in _entries(data_dir) if os.path.isdir(path)]
    return [(key, path) for key, path in keys if key is not None]


def find_splits(data_dir: Path) -> Dict[str, Path]:
    """Folders of the splits by 'train', 'val' and 'test', under timm's names for them and in any case.

    Raises:
        ValueError: If a split has two folders.
    """
    splits: Dict[str, Path] = {}
    for key, path in _split_folders(data_dir):
        if not _holds_classes(path):
            continue
        if key in splits:
            raise ValueError(
                f"Data folder '{shown(data_dir)}' has two folders for '{key}': '{splits[key].name}' and '{path.name}'."
            )
        splits[key] = path
    return splits


def find_flat_splits(data_dir: Path) -> Dict[str, Path]:
    """Folders that are called like a split and hold images themselves: classes, or splits without class folders."""
    return {key: path for key, path in _split_folders(data_dir) if not _holds_classes(path)}


def is_of_classes(data_dir: Path) -> bool:
    """Whether a folder has class folders: folders that are not called like a split."""
    return any(os.path.isdir(path) and _split_key(path.name) is None for path in _entries(data_dir))


def find_split(data_dir: Path, split: str, folders: Dict[str, Path]) -> Optional[Path]:
    """Folder of a split, under any of its names; None for a folder of class folders, which is one whole."""
    if split.strip() in ('', '.', '..') or any(separator in split for separator in '/\\\0'):
        raise ValueError(f"split must be the name of a folder in '{shown(data_dir)}', got {split!r}.")
    key, own = _split_key(split), data_dir / split
    if key in folders:
        return folders[key]
    if own.is_dir() and _holds_classes(own):
        return own
    flat = find_flat_splits(data_dir).get(key)
    if flat is not None and (folders or not is_of_classes(data_dir)):
        raise ValueError(f"'{shown(flat)}' has no class folders: images belong into folders '{shown(flat)}/CLASS'.")
    if folders or key is None:
        there = f', but {listed([repr(path.name) for path in folders.values()])}' if folders else ''
        raise FileNotFoundError(
            f"Data folder '{shown(data_dir)}' has no '{shown(split)}' folder of class folders{there}."
        )
    return None


def find_named_split(root: Path, split: str) -> Path:
    """Folder of a split, as timm finds it."""
    folder = Path(search_split(str(root), split))
    if folder == root or not folder.is_dir():
        raise FileNotFoundError(f"Data folder '{shown(root)}' has no '{shown(split)}' folder.")
    return folder


def unreadable(images: Sequence[Found], progress: bool = True) -> Tuple[Dict[Path, str], List[Path]]:
    """Decodes every image to its end.

    Args:
        images: What to decode.
        progress: Show a bar, on a terminal.

    Returns:
        Messages on the images that cannot be read, by path, and the images that Pillow warns of for their size.
    """

    def problem(image: Found) -> Tuple[str, bool]:
        try:
            open_image(image.path, min_size=1)  # JPEG at an eighth of its size, which reads it all the same
        except ImageError as e:
            return str(e), False
        return '', is_huge(image.path)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        results = pool.map(problem, images)
        disable = None if progress else True  # None: if it is no terminal
        bar = tqdm(results, total=len(images), desc='Checking images', unit='img', leave=False, disable=disable)
        found = {image.path: result for image, result in zip(images, bar)}
    bad = {path: message for path, (message, _) in found.items() if message}
    return bad, sorted(path for path, (_, huge) in found.items() if huge)


def _digest(path: Path) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                content.update(block)
    except OSError:  # equal to none: what cannot be read is named elsewhere
        return os.fsencode(path)
    return content.digest()


def count_copies(images: Sequence[Found], others: Sequence[Found]) -> int:
    """How many of `others` have the same content as one of `images`; only files of equal size are read."""
    sizes = {image.size for image in images} & {image.size for image in others}
    by_size = defaultdict(set)
    for image in images:
        if image.size in sizes:
            by_size[image.size].add(_digest(image.path))
    return sum(_digest(image.path) in by_size[image.size] for image in others if image.size in sizes)
