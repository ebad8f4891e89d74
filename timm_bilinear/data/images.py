"""Images as models want them: any file that Pillow reads, upright, in 8 bits, on white where it is transparent."""

import glob
import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, FrozenSet, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
from PIL import ExifTags, Image

from ..models.image_modes import IMG_MODES
from .quiet import PILLOW, ignored

__all__ = [
    'IMG_MODES',
    'ImageError',
    'find_images',
    'image_extensions',
    'is_hidden',
    'is_huge',
    'name_key',
    'open_image',
    'shown',
]

# Formats that Pillow opens and cannot decode by itself, or only by starting Ghostscript.
_NO_IMAGES = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PDF', 'WMF')
# Edges' ratio above which an image is refused: with its shorter edge resized for a model it would fill the memory.
_LONGEST = 1000
# What file managers, synchronisation and archive programs leave behind without a dot in front.
_LEFT_BEHIND = {'thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r', '__macosx', '@eadir', '$recycle.bin'}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be read; the message is one line and names the file and the reason."""


def shown(name: Any) -> str:
    """A file name for a message: on one line, and printable on every terminal."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(name))


def name_key(name: str) -> Tuple[list, str]:
    """Key of the one order of names: timm's natural order, then the names themselves where that leaves them equal."""
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's data."""
    return name.startswith('.') or name.lower() in _LEFT_BEHIND


@cache
def _formats() -> Tuple[str, ...]:
    Image.preinit()  # the common formats first: they are tried in this order
    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_IMAGES)


def image_extensions() -> FrozenSet[str]:
    """Lower-case extensions, with their dot, of the formats that Pillow reads (with its registered plugins)."""
    formats = {*_formats(), 'MPO'}  # which JPEG's reader opens
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return 'it is in no image format that Pillow reads'
    if isinstance(error, IsADirectoryError):
        return 'it is a folder'
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return ' '.join(text.split()).rstrip('.')


def _eight_bits(values: np.ndarray, largest: Optional[int]) -> Image.Image:
    """Grey levels of 16 or 32 bits, or of floating point, in 8 bits.

    Args:
        values: Levels (H, W).
        largest: What stands for white. None for the first of 1 (floating point only), 255, 65535 and 2^32 - 1 that no
            value exceeds.
    """
    if values.dtype.kind == 'u' and largest is not None:  # exact, and with half the memory
        values = np.minimum(values, largest).astype(np.uint32)
        return Image.fromarray(((510 * values + largest) // (2 * largest)).astype(np.uint8))
    limits = (1, 255, 65535, 2**32 - 1) if values.dtype.kind == 'f' else (255, 65535, 2**32 - 1)
    values = np.nan_to_num(values, posinf=np.inf, neginf=0.0)
    values = np.maximum(values, 0).astype(np.float64)
    if largest is None:
        finite = values[np.isfinite(values)]
        highest = finite.max() if finite.size else 0
        largest = next((limit for limit in limits if highest <= limit), highest)
    return Image.fromarray(np.floor(np.minimum(values / largest, 1.0) * 255 + 0.5).astype(np.uint8))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _grey(image: Image.Image) -> Image.Image:
    """An image of one channel of mode I, F or one of 16 bits, in 8 bits."""
    values, largest = np.asarray(image), None
    tags = getattr(image, 'tag_v2', {})  # of TIFF
    if image.mode.startswith('I;16') or (image.format in ('PNG', 'PPM') and image.mode != 'F'):
        largest = 4095 if _first(tags.get(ExifTags.Base.BitsPerSample)) == 12 else 65535
    elif image.mode == 'I' and tags and _first(tags.get(ExifTags.Base.SampleFormat, 1)) == 1:
        values = values.view(np.uint32)  # without a sign, for which Pillow has no mode
    grey = _eight_bits(values, largest)
    # Pillow turns negatives over in 8 bits alone
    is_negative = bool(tags) and tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return grey.point(lambda level: 255 - level) if is_negative else grey


def _with_key(image: Image.Image, values: np.ndarray, key: Any) -> Image.Image:
    """Makes the pixels of one colour transparent."""
    same = values == np.asarray(key)
    image.putalpha(Image.fromarray(np.where(same.all(-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8)))
    return image


def _plain(image: Image.Image, rawmode: str) -> Image.Image:
    """The image as L, LA, RGB or RGBA, in 8 bits and with what is transparent as alpha."""
    mode, key = image.mode, image.info.get('transparency')
    if mode == 'F' or mode.startswith('I'):
        grey = _grey(image)
        return _with_key(grey, np.asarray(image), key) if isinstance(key, int) else grey
    if mode in ('1', 'L'):
        grey = image.convert('L')
        if isinstance(key, int):
            # PNG gives the key in the bits of its pixels, which Pillow has spread to 0 ... 255
            grey = _with_key(grey, np.asarray(grey), key * {'L;2': 85, 'L;4': 17}.get(rawmode, 1))
        return grey
    if mode == 'RGB' and isinstance(key, tuple) and len(key) == 3:
        key = [v >> 8 for v in key] if rawmode == 'RGB;16B' else key
        return _with_key(image.copy(), np.asarray(image), key)
    if mode in ('P', 'PA'):
        return image.convert('RGBA' if image.has_transparency_data else 'RGB')
    if mode in ('LA', 'RGB', 'RGBA'):
        return image
    return image.convert({'La': 'LA', 'RGBa': 'RGBA'}.get(mode, 'RGB'))


def _on_white(image: Image.Image) -> Image.Image:
    background = Image.new(image.mode.rstrip('A'), image.size, 'white')
    background.paste(image.convert(background.mode), mask=image.getchannel('A'))
    return background


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data have many errors, and leave the picture as it is
        return None


def _convert(source: Image.Image, mode: str) -> Image.Image:
    tile = getattr(source, 'tile', None)
    rawmode = str(tile[0][3]) if tile and isinstance(tile[0][3], str) else ''
    if 0 in source.size:
        raise ValueError('it has no pixels')
    if max(source.size) > _LONGEST * min(source.size):
        raise ValueError('it has {} x {} pixels, too narrow for any model'.format(*source.size))
    source.load()
    turn = _UPRIGHT.get(_orientation(source))
    image = _plain(source, rawmode)
    if image.mode.endswith('A') and not mode.endswith('A'):
        image = _on_white(image)
    image = image.copy() if image.mode == mode and image is source else image.convert(mode)
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # neither rotated nor blended a second time by whoever gets it
    return image


def open_image(
    source: Union[str, Path, BinaryIO, Image.Image], mode: str = 'RGB', min_size: Optional[int] = None
) -> Image.Image:
    """An image as a model wants it, from anything that Pillow reads.

    It is turned upright (EXIF), its 16 bits are scaled to 8, and what is transparent is blended onto white unless the
    mode has alpha. Of several frames it is the first. Grey levels of 32 bits or floating point have no fixed white:
    it is the first of 1 (floating point only), 255, 65535 and 2^32 - 1 that no value exceeds.

    Args:
        source: File name, file opened for reading bytes, or image. An image is left as it was.
        mode: 'L', 'LA', 'RGB' or 'RGBA', see `IMG_MODES`.
        min_size: Lets JPEG files be decoded at a half, quarter or eighth of their size, which is faster, as long as
            both edges are multiples of that and the shorter keeps so many pixels. None decodes them whole.

    Returns:
        A new image of this mode, without metadata.

    Raises:
        ImageError: If there is no such file, no image in it that can be read to its end, or one that is more than
            1000 times as long as it is wide.
        TypeError: If the source is something else.
        ValueError: If the mode is another one.
    """
    if mode not in IMG_MODES.values():
        raise ValueError(f'Images are read as one of {", ".join(IMG_MODES.values())}, not as {mode!r}.')
    if min_size is not None and min_size < 1:
        raise ValueError(f'min_size must be at least 1 pixel, got {min_size}.')
    if isinstance(source, Image.Image):
        name = getattr(source, 'filename', '') or 'in memory'
    elif hasattr(source, 'read'):
        name = getattr(source, 'name', '') if isinstance(getattr(source, 'name', ''), (str, bytes)) else ''
        name = name or 'of a file object'
    elif isinstance(source, (str, os.PathLike)):
        name = source
    else:
        kinds = 'a file name, a file that is open for reading bytes or an image of Pillow'
        raise TypeError(f'An image is {kinds}, not of type {type(source).__name__}.')
    try:
        with ignored(module=PILLOW):
            if isinstance(source, Image.Image):
                return _convert(source, mode)
            if hasattr(source, 'read'):
                return _read(source, mode, min_size)
            kind = os.stat(source).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # a pipe would be waited for
                raise ValueError('it is no file')
            with open(source, 'rb') as file:
                return _read(file, mode, min_size)
    except FileNotFoundError as e:
        raise ImageError(f"Image '{shown(name)}' does not exist.") from e
    except Exception as e:  # Pillow's readers raise whatever a damaged file leads them to
        raise ImageError(f"Cannot read image '{shown(name)}': {_reason(e)}.") from e


def _reduce(image: Image.Image, min_size: int):
    """Lets JPEG's decoder reduce an image, where that leaves its proportions: its edges are multiples of the factor.

    Of others the decoder adds a part of a row or column, which would shift everything that the model sees.
    """
    width, height = image.size
    for factor in (8, 4, 2):
        if width % factor == height % factor == 0 and min(width, height) // factor >= min_size:
            image.draft(None, (width // factor, height // factor))
            return


def _read(file: BinaryIO, mode: str, min_size: Optional[int]) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        if min_size is not None:
            _reduce(image, min_size)
        return _convert(image, mode)


def is_huge(path: Path) -> bool:
    """Whether an image that can be read has more pixels than Pillow warns of."""
    with ignored(module=PILLOW), Image.open(path, formats=_formats()) as image:
        return Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS


def _identity(path: Path) -> Tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _walk(folder: Path, seen: Set[Tuple[int, int]], images: List[Path], messages: List[str]):
    """Images below a folder, each real folder once however many links lead to it."""
    if _identity(folder) in seen:
        messages.append(f"'{shown(folder)}' leads to a folder that was read already.")
        return
    seen.add(_identity(folder))
    folders = []
    for name in os.listdir(folder):
        path = folder / name
        if is_hidden(name):
            continue
        if os.path.isdir(path):
            folders.append((path.is_symlink(), path))
        elif path.suffix.lower() not in image_extensions():
            messages.append(f"'{shown(path)}' is no image.")
        elif os.path.isfile(path) or not os.path.exists(path):  # a broken link fails when it is read
            images.append(path)
        else:
            messages.append(f"'{shown(path)}' is no file.")
    for _, path in sorted(folders, key=lambda item: (item[0], name_key(item[1].name))):  # links last
        _walk(path, seen, images, messages)


def _path_key(path: Path) -> list:
    return [name_key(part) for part in path.parts]


def find_images(paths: Sequence[Union[str, Path]]) -> Tuple[List[Path], List[str]]:
    """Image files from what a user names: files, folders with all that is below them, and patterns.

    A file that is named, or a pattern that nothing matches, is returned as it is: reading it says what is wrong.
    In folders and patterns, hidden entries and files that are no images (by extension) are left out, and a folder
    that links lead to a second time is read once.

    Args:
        paths: File names, folders and patterns with `*`, `?`, `[...]` and `**`. What exists is not a pattern.

    Returns:
        Images in the order of `paths`, in natural order inside each, and a message on every entry left out.

    Raises:
        OSError: If a folder cannot be read.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    images: List[Path] = []
    messages: List[str] = []
    for given in paths:
        path = Path(given)
        if str(given) and os.path.isdir(path):
            found = [path]
        elif not os.path.lexists(path) and glob.has_magic(str(given)):
            found = sorted(map(Path, glob.glob(str(given), recursive=True)), key=_path_key)
        else:
            found = []
        if not found:
            images.append(path)
            continue
        seen: Set[Tuple[int, int]] = set()
        part: List[Path] = []
        for match in found:
            if match.is_dir():
                if _identity(match) in seen:  # '**' matches folders and what is in them
                    continue
                before = len(part)
                _walk(match, seen, part, messages)
                if len(part) == before:
                    messages.append(f"'{shown(match)}' has no images.")
            elif match.suffix.lower() in image_extensions():
                part.append(match)
            elif not is_hidden(match.name):
                messages.append(f"'{shown(match)}' is no image.")
        images += sorted(dict.fromkeys(part), key=_path_key)
    return images, list(dict.fromkeys(messages))
