"""What a loader's worker does: one image read and transformed, with a random state of its own."""

import copy
import hashlib
import os
import random
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from .images import ImageError, open_image, shown
from .quiet import PILLOW, ignored

__all__ = [
    'Failure',
    'Samples',
    'checked',
    'collate',
    'init_worker',
    'reason',
    'sample_seed',
    'seeded',
    'whereabouts',
    'with_transform',
]


@dataclass
class Failure:
    """A sample that could not be made; the message goes to the main process, which raises it as it is."""

    message: str


def reason(error: Exception) -> str:
    """An exception on one line, without the full stop."""
    text = ' '.join(str(error).split()).rstrip('.')
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def sample_seed(*of: int) -> int:
    """63 bits that depend on all of the numbers."""
    return (
        int.from_bytes(hashlib.blake2b(repr([int(number) for number in of]).encode(), digest_size=8).digest(), 'big')
        >> 1
    )


@contextmanager
def seeded(seed: Optional[int]) -> Iterator[None]:
    """Seeds the generators that augmentations use, and gives them back as they were; None leaves them alone."""
    if seed is None:
        yield
        return
    # only torch's CPU generator: torch.manual_seed reaches for those of the GPUs too
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class _Converted:
    """A transform that first makes of any image one of the mode that the model takes."""

    def __init__(self, mode: str, transform: Callable):
        self.mode = mode
        self.transform = transform

    def __call__(self, image: Any) -> torch.Tensor:
        return self.transform(open_image(image, self.mode))


def with_transform(dataset: Dataset, transform: Callable, mode: str, min_size: Optional[int]) -> Dataset:
    """A copy of a data set that gives transformed images of a mode; the data set itself serves other loaders too."""
    dataset = copy.copy(dataset)
    if hasattr(dataset, 'min_size'):  # one of ours, which opens its images as told
        dataset.input_img_mode, dataset.min_size = mode, min_size
        dataset.transform = transform
    elif hasattr(dataset, 'transform'):
        if hasattr(dataset, 'input_img_mode'):
            dataset.input_img_mode = None
        dataset.transform = _Converted(mode, transform)
    else:
        raise TypeError(f"A {type(dataset).__name__} has no 'transform' to set.")
    return dataset


def checked(image: Any, target: Any) -> Tuple[torch.Tensor, int]:
    """A sample of which a batch can be made."""
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        raise TypeError(f'the transform gives no image tensor (C, H, W) but {type(image).__name__}')
    return image, int(target)


def collate(
    samples: List[Union[Tuple[torch.Tensor, int], Failure]],
) -> Union[Tuple[torch.Tensor, torch.Tensor], Failure]:
    """Images (B, C, H, W), in memory with channels last as they were decoded, and targets (B,) int64."""
    failure = next((sample for sample in samples if isinstance(sample, Failure)), None)
    if failure is not None:
        return failure
    images = [image for image, _ in samples]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        return Failure(f'Images of one batch have different shapes: {", ".join(map(str, shapes))}.')
    batch = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype, memory_format=torch.channels_last)
    for row, image in zip(batch, images):
        row.copy_(image)
    return batch, torch.tensor([target for _, target in samples], dtype=torch.int64)


def init_worker(_: int) -> None:
    """One thread a worker, and signals are the main process's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the main process may have a handler of its own


def whereabouts(workers: int) -> torch.Tensor:
    """What each worker is at, as (process id, index), for when one dies."""
    return torch.full((max(workers, 1), 2), -1, dtype=torch.int64).share_memory_()


class Samples(Dataset):
    """Samples by (seed or None, index).

    Args:
        dataset: Data set with a transform that gives tensors.
        workers: Number of processes that read it.
    """

    def __init__(self, dataset: Dataset, workers: int):
        self.dataset = dataset
        self.current = whereabouts(workers)

    def __getitem__(self, key: Tuple[Optional[int], int]) -> Union[Tuple[torch.Tensor, int], Failure]:
        seed, index = key
        info = get_worker_info()
        if info is not None:
            self.current[info.id] = torch.tensor([os.getpid(), index])
        try:
            with seeded(seed), ignored(module=PILLOW):
                return checked(*self.dataset[index][:2])
        except ImageError as e:
            return Failure(str(e))
        except Exception as e:  # of a transform or a data set of the user's, in a worker as without one
            return Failure(f"Cannot load '{shown(self.name(index))}': {reason(e)}.")

    def name(self, index: int) -> str:
        """File name of an image where there is one, else its index."""
        try:
            return str(self.dataset.filename(index))
        except Exception:  # not every data set has names
            return f'image {index}'
