"""The official archives of CUB-200-2011, FGVC-Aircraft and Stanford Cars as image folders for timm's train script.

One reader per data set turns its lists into classes and splits; the rest (unpacking, checks, links) is shared.
"""

import os
import re
import shutil
import tarfile
import uuid
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Callable, Dict, Iterator, List, Optional, Tuple, Union

from tqdm import tqdm

__all__ = ['COUNTS', 'prepare']

# The official numbers: CUB-200-2011's technical report, FGVC-Aircraft's README, Stanford Cars' devkit.
COUNTS = {
    'cub200': {'classes': 200, 'train': 5994, 'val': 5794},
    'aircraft': {'classes': 100, 'train': 6667, 'val': 3333},
    'cars': {'classes': 196, 'train': 8144, 'val': 8041},
}

_STORE = '.source'  # where archives are unpacked, below dst


@dataclass
class _Split:
    list_file: Path
    image_dir: Path
    images: List[Tuple[int, str]]  # class index and path below image_dir


@dataclass
class _Dataset:
    class_file: Path
    classes: List[str]  # folder names
    splits: Dict[str, _Split]


def _name(path: Path) -> str:
    """For messages: an unpacked file by its path in the archive, as it will be gone by the time it is read."""
    parts = path.parts
    return '/'.join(parts[parts.index(_STORE) + 1 :]) if _STORE in parts else str(path)


class _Source:
    """What was downloaded: finds folders, or unpacks their archives below `store`."""

    def __init__(self, src: Path, store: Path):
        self.src = src
        self.store = store

    def _find(self, archives: Tuple[str, ...], folder: str) -> Optional[Path]:
        paths = [self.src / folder, *(self.src / archive for archive in archives)]
        if self.src.name in archives:  # the archive itself
            paths.append(self.src)
        return next((path for path in paths if path.exists()), None)

    def require(self, *parts: Tuple[Tuple[str, ...], str]):
        """Everything that is missing in one message, and before anything is unpacked."""
        missing = [
            f"'{archives[0]}' (or the folder '{folder}' it unpacks to)" if archives else f"'{folder}'"
            for archives, folder in parts
            if self._find(archives, folder) is None
        ]
        if missing:
            raise FileNotFoundError(f"'{self.src}' lacks {', '.join(missing)}.")

    def folder(self, archives: Tuple[str, ...], folder: str) -> Path:
        """The folder if it is there, else the one its archive unpacks to."""
        path = self._find(archives, folder)
        if path is None or path.is_dir():
            return path or self.src / folder
        _unpack(path, self.store)
        if not (self.store / folder).is_dir():
            raise ValueError(f"Archive '{path}' has no folder '{folder}'.")
        return self.store / folder


def _unpack(archive: Path, folder: Path):
    if not hasattr(tarfile, 'data_filter'):
        raise RuntimeError(
            'Unpacking safely needs Python 3.10.12, 3.11.4, 3.12 or newer; unpack the archives yourself.'
        )
    folder.mkdir(exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f'Unpacking {archive.name}', unit='file'):
                # the filter refuses members that would land, or point, outside the folder
                tar.extract(member, folder, filter='data')
            while tar.fileobj.read(1 << 20):  # what tar does not need, after which gzip compares its checksum
                pass
    except tarfile.FilterError as e:
        raise ValueError(f"Archive '{archive}' is not the official one, its contents are unsafe: {e}") from e
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise ValueError(f"Archive '{archive}' is broken or incomplete ({e}); download it again.") from e
    except OSError as e:
        if e.errno is None:  # gzip's own errors, a wrong checksum for one; the system's have a number
            raise ValueError(f"Archive '{archive}' is broken or incomplete ({e}); download it again.") from e
        raise


def _lines(path: Path, fields: int) -> Iterator[List[str]]:
    """Lines split at blanks into so many fields, the last of which may have blanks itself."""
    if not path.is_file():
        raise FileNotFoundError(f"'{_name(path)}' is missing.")
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        if not line.strip():
            continue
        values = line.strip().split(' ', fields - 1)
        if len(values) != fields:
            raise ValueError(f"'{_name(path)}', line {number}: expected {fields} fields, got {line!r}.")
        yield values


def _table(path: Path) -> Dict[str, str]:
    return dict(_lines(path, 2))


def _folder_name(name: str) -> str:
    """A class name without what a file system refuses; blanks stay, folder names are the labels of the model."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|]', '_', name).strip(' .')


def _read_cub200(source: _Source) -> _Dataset:
    archives, folder = ('CUB_200_2011.tgz', 'CUB_200_2011.tar.gz'), 'CUB_200_2011'
    root = source.src
    if not (root / 'images.txt').is_file():
        source.require((archives, folder))
        root = source.folder(archives, folder)

    classes = _table(root / 'classes.txt')
    index = {number: i for i, number in enumerate(classes)}
    labels_file, split_file = root / 'image_class_labels.txt', root / 'train_test_split.txt'
    labels, is_train = _table(labels_file), _table(split_file)
    splits = {split: _Split(split_file, root / 'images', []) for split in ('train', 'val')}
    for number, name in _lines(root / 'images.txt', 2):
        if labels.get(number) not in index:
            raise ValueError(f"'{_name(labels_file)}' has no known class for image {number}, '{name}'.")
        if is_train.get(number) not in ('0', '1'):
            raise ValueError(f"'{_name(split_file)}' has no 0 or 1 for image {number}, '{name}'.")
        splits['train' if is_train[number] == '1' else 'val'].images.append((index[labels[number]], name))
    return _Dataset(root / 'classes.txt', list(classes.values()), splits)


def _read_aircraft(source: _Source) -> _Dataset:
    archives, folder = ('fgvc-aircraft-2013b.tar.gz',), 'fgvc-aircraft-2013b'
    root = source.src
    if not (root / 'data' / 'variants.txt').is_file():
        source.require((archives, folder))
        root = source.folder(archives, folder)

    data = root / 'data'
    variants = [name for (name,) in _lines(data / 'variants.txt', 1)]
    index = {name: i for i, name in enumerate(variants)}
    splits = {}
    for split, part in (('train', 'trainval'), ('val', 'test')):
        list_file = data / f'images_variant_{part}.txt'
        images = []
        for number, variant in _lines(list_file, 2):
            if variant not in index:
                raise ValueError(f"'{_name(list_file)}': variant '{variant}' of image {number} is not in variants.txt.")
            images.append((index[variant], f'{number}.jpg'))
        splits[split] = _Split(list_file, data / 'images', images)
    return _Dataset(data / 'variants.txt', variants, splits)


def _load_mat(path: Path, *names: str) -> list:
    import numpy as np
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"'{_name(path)}' is missing.")
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as e:  # scipy has no common error for files it cannot read
        raise ValueError(f"Cannot read '{_name(path)}': {e}") from e
    for name in names:
        if name not in content:
            raise ValueError(f"'{_name(path)}' has no '{name}'.")
    return [np.atleast_1d(content[name]) for name in names]  # a single entry was squeezed to no dimension


def _car_images(path: Path, annotations, field: str) -> List[Tuple[int, str]]:
    for name in (field, 'class'):
        if name not in (annotations.dtype.names or ()):
            raise ValueError(
                f"'{_name(path)}': its annotations have no '{name}'; the test list must be the one with labels."
            )
    return [(int(a['class']) - 1, str(a[field])) for a in annotations]


def _read_cars(source: _Source) -> _Dataset:
    try:
        import scipy.io  # noqa: F401
    except ImportError as e:
        raise RuntimeError(
            "Stanford Cars' lists are .mat files, which take scipy to read; it is optional: pip install scipy"
        ) from e
    src = source.src

    if (src / 'cars_annos.mat').is_file():  # the one archive of all images
        archives, folder = ('car_ims.tgz',), 'car_ims'
        source.require((archives, folder))
        list_file = src / 'cars_annos.mat'
        annotations, names = _load_mat(list_file, 'annotations', 'class_names')
        images = _car_images(list_file, annotations, 'relative_im_path')  # car_ims/000001.jpg
        if 'test' not in annotations.dtype.names:
            raise ValueError(f"'{_name(list_file)}': its annotations have no 'test'.")
        root = source.folder(archives, folder).parent
        class_file, splits = list_file, {}
        for split, flag in (('train', 0), ('val', 1)):
            part = [image for image, test in zip(images, annotations['test']) if int(test) == flag]
            splits[split] = _Split(list_file, root, part)
    else:
        kit = (('car_devkit.tgz',), 'devkit')
        folders = {'train': (('cars_train.tgz',), 'cars_train'), 'val': (('cars_test.tgz',), 'cars_test')}
        test_name = 'cars_test_annos_withlabels.mat'
        in_kit = (src / 'devkit' / test_name).is_file()
        source.require(kit, *folders.values(), *([] if in_kit else [((), test_name)]))
        devkit = source.folder(*kit)
        class_file = devkit / 'cars_meta.mat'
        (names,) = _load_mat(class_file, 'class_names')
        splits = {}
        for split, list_file in (
            ('train', devkit / 'cars_train_annos.mat'),
            ('val', devkit / test_name if in_kit else src / test_name),
        ):
            (annotations,) = _load_mat(list_file, 'annotations')
            images = _car_images(list_file, annotations, 'fname')
            splits[split] = _Split(list_file, source.folder(*folders[split]), images)

    # numbered, because timm sorts classes by folder name and the official order is not alphabetical
    classes = [f'{i:03d}.{name}' for i, name in enumerate(map(str, names), 1)]
    return _Dataset(class_file, classes, splits)


_READERS: Dict[str, Callable[[_Source], _Dataset]] = {
    'cub200': _read_cub200,
    'aircraft': _read_aircraft,
    'cars': _read_cars,
}


def _check(dataset: _Dataset, expected: Dict[str, int]):
    """Numbers of classes and images, each image once, all of them there."""
    names = [_folder_name(name) for name in dataset.classes]
    if len(names) != expected['classes']:
        raise ValueError(f"'{_name(dataset.class_file)}': expected {expected['classes']} classes, found {len(names)}.")
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"'{_name(dataset.class_file)}' has classes without a name or with the same one.")
    for split, part in dataset.splits.items():
        if len(part.images) != expected[split]:
            raise ValueError(
                f"'{_name(part.list_file)}': expected {expected[split]} images for '{split}', found {len(part.images)}."
            )
        for label, name in part.images:
            path = PurePosixPath(name)
            if not 0 <= label < len(names) or path.is_absolute() or '..' in path.parts:
                raise ValueError(f"'{_name(part.list_file)}': image '{name}' of class {label + 1} is not possible.")
        (_, name), count = Counter((label, PurePosixPath(n).name) for label, n in part.images).most_common(1)[0]
        if count > 1:
            raise ValueError(f"'{_name(part.list_file)}' has image '{name}' {count} times in one class.")
        missing = [name for _, name in part.images if not (part.image_dir / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"'{_name(part.image_dir)}' lacks {len(missing)} of the {len(part.images)} images in "
                f"'{part.list_file.name}' for '{split}', first '{missing[0]}'."
            )


def _link(image: Path, target: str, link: Path):
    """Symbolic link to `target`; where there are none, a hard link to or a copy of `image`, the same file."""
    try:
        link.symlink_to(target)
    except (OSError, NotImplementedError):
        try:
            os.link(image, link)
        except OSError:
            shutil.copyfile(image, link)


def _build(dataset: _Dataset, folder: Path, final: Path):
    total = sum(len(part.images) for part in dataset.splits.values())
    with tqdm(total=total, desc='Linking', unit='img') as bar:
        for split, part in dataset.splits.items():
            for name in dataset.classes:
                (folder / split / _folder_name(name)).mkdir(parents=True)
            for label, name in part.images:
                image = part.image_dir / name
                link = Path(split, _folder_name(dataset.classes[label]), image.name)
                # where the image will be once the folder has its final name
                target = final / image.relative_to(folder) if image.is_relative_to(folder) else image
                _link(image, os.path.relpath(target, (final / link).parent), folder / link)
                bar.update()


def prepare(dataset: str, src: Union[str, Path], dst: Union[str, Path]) -> Dict[str, int]:
    """Turn a data set as downloaded into an image folder: `train/CLASS/` and `val/CLASS/`.

    `train` is the official training split (for aircraft training and validation together) and `val` the official test
    split, under the name that timm's train script looks for. Images are relative links to the unpacked ones (hard
    links or copies where the file system has no symbolic links). Archives are unpacked into `dst/.source`: `src` may be
    read-only, is never half-unpacked, and `dst` can be moved and deleted as a whole. If `src` has the unpacked folders,
    the links lead there and both must stay where they are to each other.

    `dst` gets its name once it is whole; after an error there is nothing.

    Class folders have the official names, without the characters that file systems refuse ('F/A-18' is 'F_A-18'). timm
    numbers classes in the order of these names. That is the official order for birds ('001.Black_footed_Albatross', as
    in the archive) and cars ('001.AM General Hummer SUV 2000', numbered here), but for aircraft the alphabet's.

    Aircraft images have a banner with the copyright in their lowest 20 pixels. Links cannot crop, so it stays, as it
    does in the authors' release of B-CNN, and with it in the accuracy published there.

    Args:
        dataset: 'cub200' for CUB-200-2011, 'aircraft' for FGVC-Aircraft (variants), 'cars' for Stanford Cars.
        src: Folder with the files as downloaded, or unpacked. CUB-200-2011: CUB_200_2011.tgz. FGVC-Aircraft:
            fgvc-aircraft-2013b.tar.gz. Stanford Cars: cars_train.tgz, cars_test.tgz, car_devkit.tgz and
            cars_test_annos_withlabels.mat; or car_ims.tgz and cars_annos.mat. The first two may be given as the archive
            or the unpacked folder itself.
        dst: New folder.

    Returns:
        Numbers of 'classes', 'train' and 'val' images.

    Raises:
        FileExistsError: If `dst` exists and is not empty.
        FileNotFoundError: If an archive, a list or an image is missing.
        RuntimeError: If scipy, which Stanford Cars takes, is missing.
        ValueError: If `dataset` is unknown, an archive or a list broken, or a number is not the official one.
        OSError: If `dst` cannot be written.
    """
    if dataset not in _READERS:
        raise ValueError(f"'dataset' must be one of {', '.join(map(repr, _READERS))}, got {dataset!r}.")
    # resolved: a relative link counts from where it really is
    src, dst = Path(src).resolve(), Path(dst).resolve()
    if not src.exists():
        raise FileNotFoundError(f"'{src}' does not exist.")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"'{dst}' exists and is not an empty folder.")
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.parent / f'.{dst.name}.{uuid.uuid4().hex[:8]}.partial'
    partial.mkdir()
    try:
        content = _READERS[dataset](_Source(src, partial / _STORE))
        _check(content, COUNTS[dataset])
        _build(content, partial, dst)
        if dst.exists():
            dst.rmdir()  # empty; not every system renames onto a folder
        partial.rename(dst)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing, once it has its name
    return {'classes': len(content.classes), **{split: len(part.images) for split, part in content.splits.items()}}
