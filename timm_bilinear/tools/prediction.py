"""A stream of predictions on images as users have them: files, folders, globs, images in memory."""

import glob
import itertools
import logging
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from io import BytesIO, TextIOBase
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from PIL import Image
from timm.utils import unwrap_model
from torch import nn

from ..data.images import find_images, image_extensions, open_image
from ..data.loader import default_workers, draft_size
from ..data.transforms import make_transform, transform_settings
from ..models.image_modes import IMG_MODES
from .inference import batch_logits, label_descriptions, resolve_amp_dtype, view_data_config

__all__ = ['Decoded', 'Source', 'find_sources', 'iterate_images', 'iterate_predictions', 'one_line']

_logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """An image to predict: what it is called, where it is (path, image or bytes), or why it is not there."""

    name: str
    place: Any = None
    error: Optional[str] = None


class Decoded(NamedTuple):
    """What became of a source: its name, its pixels or why there are none."""

    name: str
    image: Optional[torch.Tensor]  # (C, H, W) uint8
    error: Optional[str]


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return ' '.join(str(error).split()) or type(error).__name__


def _find_paths(given: str) -> Iterator[Source]:
    """Images of a file, a folder or a glob. A file that is there is taken by its name, whatever that looks like."""
    path = Path(given)
    if not given:
        yield Source(given, error='The name is empty.')
        return
    try:
        if not path.is_dir() and os.path.lexists(path):
            yield Source(given, given)
            return
        is_glob = not path.is_dir() and glob.has_magic(given)
        if not path.is_dir() and not is_glob:
            yield Source(given, error=f"There is no file '{given}'.")
            return
        found, skipped = find_images([given])
        if is_glob and found == [path] and not os.path.lexists(path):  # what matches nothing is given back
            found = []
    except (OSError, ValueError) as e:  # a folder that cannot be read, a name with a null byte
        yield Source(given, error=one_line(e))
        return
    if skipped and found:
        more = f' And {len(skipped) - 3} more.' if len(skipped) > 3 else ''
        _logger.warning(f"Skipped in '{given}': {' '.join(skipped[:3])}{more}")
    if not found:
        yield Source(given, error=f"{'Nothing matches' if is_glob else 'There is no image in'} '{given}'.")
    yield from (Source(str(path), str(path)) for path in found)


def find_sources(images: Any) -> Iterator[Source]:
    """Images in the order they are given, those of a folder or a glob in the order of `find_images`.

    Args:
        images: Path of a file, a folder or a glob, PIL image, binary file object, or an iterable of these.

    Yields:
        Where each image is; for what is not there, why.

    Raises:
        TypeError: If something else is among them.
    """
    is_one = isinstance(images, (str, os.PathLike, Image.Image)) or hasattr(images, 'read')
    if not is_one and (isinstance(images, (bytes, bytearray, dict)) or not hasattr(images, '__iter__')):
        images = [images]  # refused below
        is_one = False
    for number, image in enumerate([images] if is_one else images):
        if isinstance(image, (str, os.PathLike)):
            yield from _find_paths(os.fsdecode(image))
        elif isinstance(image, Image.Image):
            yield Source(getattr(image, 'filename', '') or f'image {number}', image)
        elif hasattr(image, 'read'):
            name = getattr(image, 'name', None)
            name = name if isinstance(name, str) else f'image {number}'
            try:  # here, for one object may be given twice
                if isinstance(image, TextIOBase):
                    raise ValueError('it is open in text mode')
                if image.seekable():
                    image.seek(0)
                data = bytes(image.read())
            except (OSError, ValueError, TypeError, AttributeError) as e:
                yield Source(name, error=f"Cannot read '{name}': {one_line(e)}.")
            else:
                yield Source(name, data)
        else:
            what = type(image).__name__
            raise TypeError(f'An image must be a path, a PIL image or a binary file object, got {what} ({number}).')


_in_memory = threading.Lock()  # an image that is given twice is not for two threads at once


def _decode(source: Source, transform: Callable, mode: str, min_size: Optional[int]) -> Decoded:
    """Read an image, in any thread; what is wrong with it is no matter of the others."""
    if source.error is not None:
        return Decoded(source.name, None, source.error)
    try:
        place = BytesIO(source.place) if isinstance(source.place, bytes) else source.place
        with _in_memory if isinstance(place, Image.Image) else nullcontext():
            image = open_image(place, mode, min_size=min_size)
        return Decoded(source.name, transform(image), None)
    except Exception as e:
        return Decoded(source.name, None, one_line(e))


def _ahead(sources: Iterable[Source], decode: Callable, workers: int, depth: int) -> Iterator[Decoded]:
    """Decode in threads (Pillow lets go of the interpreter's lock), in order, no more than `depth` images ahead."""
    if workers == 0:
        yield from map(decode, sources)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix='decode')
    pending: Deque = deque()
    try:
        for source in sources:
            pending.append(pool.submit(decode, source))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _normalise(images: torch.Tensor, config: Dict[str, Any]) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize do, but a batch at once."""
    mean, std = (torch.tensor(config[key], device=images.device).view(-1, 1, 1) for key in ('mean', 'std'))
    return images.float().div_(255).sub_(mean).div_(std)


def _best(logits: torch.Tensor, names: List[str], topk: int) -> Iterator[Dict[str, Any]]:
    """What is said of each row of logits (B, K)."""
    probabilities = logits.softmax(-1)
    values, indices = probabilities.sort(dim=-1, descending=True, stable=True)  # of equal ones the first class
    finite = probabilities.isfinite().all(-1).tolist()
    for is_finite, row, order in zip(finite, values[:, :topk].tolist(), indices[:, :topk].tolist()):
        if not is_finite:
            yield dict(error='The model gives probabilities that are not finite.', predictions=[])
            continue
        predictions = [dict(name=names[i], index=i, probability=p) for i, p in zip(order, row)]
        yield dict(error=None, predictions=predictions)


def iterate_images(
    net: nn.Module,
    sources: Iterable[Source],
    batch_size: int = 32,
    workers: Optional[int] = None,
    tta: Optional[str] = None,
) -> Iterator[Tuple[List[Decoded], torch.Tensor]]:
    """Images as a model wants them, a batch at a time, no more than three batches of which are in memory.

    Args:
        net: Model in eval mode, as `load` gives it.
        sources: Images, of `find_sources`.
        batch_size, workers, tta: As for `predict`.

    Yields:
        What became of each source, and the pixels (B, C, H, W), on the model's device, of those that can be read.
    """
    config = view_data_config(net, tta)
    channels = config['input_size'][0]
    if channels not in IMG_MODES:
        raise ValueError(f'Images have 1 to {max(IMG_MODES)} channels, the model wants {channels}.')
    device = next((p.device for p in net.parameters()), torch.device('cpu'))
    transform = make_transform(transform_settings(config), is_training=False, normalize=False)
    decode = partial(_decode, transform=transform, mode=IMG_MODES[channels], min_size=draft_size(config))
    image_extensions()  # Pillow's readers are imported here, not by several threads
    workers = default_workers(device) if workers is None else workers
    decoded = _ahead(sources, decode, workers, depth=2 * batch_size)
    while batch := list(itertools.islice(decoded, batch_size)):
        images = [entry.image for entry in batch if entry.image is not None]
        pixels = torch.stack(images).to(device) if images else torch.empty(0, *config['input_size'], device=device)
        yield batch, _normalise(pixels, config)


@torch.inference_mode()
def iterate_predictions(
    net: nn.Module,
    sources: Iterable[Source],
    topk: int = 5,
    batch_size: int = 32,
    workers: Optional[int] = None,
    amp: Optional[str] = 'auto',
    tta: Optional[str] = None,
) -> Iterator[Dict[str, Any]]:
    """Predictions of a loaded model, one image after another, as `predict` returns them.

    Args:
        net: Model in eval mode, as `load` gives it.
        sources: Images, of `find_sources`.
        topk, batch_size, workers, amp, tta: As for `predict`.
    """
    inner = unwrap_model(net)
    if getattr(inner, 'num_classes', None) == 0:
        raise ValueError("'model' has no classifier (num_classes is 0), so there is nothing to predict.")
    amp_dtype = resolve_amp_dtype(amp, next((p.device for p in net.parameters()), torch.device('cpu')))
    names = label_descriptions(net)
    for batch, pixels in iterate_images(net, sources, batch_size, workers, tta):
        said: Iterator[Dict[str, Any]] = iter(())
        if len(pixels):
            try:
                logits = batch_logits(net, pixels, amp_dtype, tta)
            except torch.OutOfMemoryError as e:
                raise RuntimeError(f"Out of memory at 'batch_size' {batch_size}: give a smaller one.") from e
            if logits.ndim != 2 or logits.shape[1] == 0:
                raise ValueError(f"'model' gives no logits of classes (B, K), but {tuple(logits.shape)}.")
            if len(names) != logits.shape[1]:
                names = [str(i) for i in range(logits.shape[1])]
            said = _best(logits, names, topk)
        for entry in batch:
            what = dict(error=entry.error, predictions=[]) if entry.image is None else next(said)
            yield dict(image=entry.name, **what)
