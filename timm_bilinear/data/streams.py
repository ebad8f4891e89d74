"""Data sets without indices in a loader: their samples, and whole batches of what several workers give of them."""

import copy
import os
from typing import Any, Callable, Iterator, Optional, Tuple, Union

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .images import ImageError, open_image
from .quiet import PILLOW, ignored
from .samples import Failure, checked, reason, sample_seed, seeded, whereabouts

__all__ = ['Stream', 'regroup']

_Batch = Tuple[torch.Tensor, torch.Tensor]


class Stream(IterableDataset):
    """Samples of a data set without indices, in the order in which it gives them.

    Args:
        dataset: Data set with a transform that gives tensors.
        seed: Seed of the augmentation of each sample, together with epoch, rank, worker and place in the stream. None
            for none.
        rank: Process among several.
        workers: Number of processes that read it.
    """

    def __init__(self, dataset: IterableDataset, seed: Optional[int], rank: int, workers: int):
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.epoch = 0
        self.current = whereabouts(workers)
        has_workers = hasattr(dataset, 'set_loader_cfg')
        if has_workers:  # of several it would tell a rounded sum
            dataset.set_loader_cfg(num_workers=1)
        try:
            self.count = len(dataset)
        except TypeError:
            self.count = 0
        if not self.count:
            raise ValueError('The data set does not say how many images it has.')
        if has_workers:
            dataset.set_loader_cfg(num_workers=workers)

    def __len__(self) -> int:
        """Images of one process's part, as far as the data set knows."""
        return self.count

    def _sources(self) -> Iterator[Tuple[Any, Any]]:
        if hasattr(self.dataset, 'sources'):
            yield from self.dataset.sources(sample_seed(self.seed or 0, self.epoch, self.rank))
            return
        dataset = copy.copy(self.dataset)
        dataset.transform = None
        yield from dataset

    def __iter__(self) -> Iterator[Union[Tuple[torch.Tensor, int], Failure]]:
        info = get_worker_info()
        place = self.epoch, self.rank, 0 if info is None else info.id
        if info is not None:
            self.current[info.id] = torch.tensor([os.getpid(), 0])
        dataset, sources, number = self.dataset, self._sources(), 0
        while True:
            try:
                with ignored(module=PILLOW):
                    source, target = next(sources)
            except StopIteration:
                return
            except Exception as e:
                yield Failure(f'Cannot read image {number} of the data set: {reason(e)}.')
                return
            try:
                with seeded(None if self.seed is None else sample_seed(self.seed, *place, number)):
                    if hasattr(dataset, 'sources'):
                        source = open_image(source, dataset.input_img_mode, dataset.min_size)
                    sample = checked(dataset.transform(source), target)
            except ImageError as e:
                sample = Failure(str(e))
            except Exception as e:
                sample = Failure(f'Cannot load image {number} of the data set: {reason(e)}.')
            yield sample
            number += 1

    def name(self, index: int) -> str:
        """Nothing: the images of a stream have no names."""
        return ''


def regroup(read: Callable[[], Iterator[_Batch]], size: int, steps: Optional[int], again: bool) -> Iterator[_Batch]:
    """Whole batches of what the workers of a stream give: each of them ends with a smaller one.

    Args:
        read: Starts a pass through the stream.
        size: Images of a batch; the last one may have less, unless `again`.
        steps: Batches to give at most, None for all that there are.
        again: Begin a further pass where one ends before there are so many.

    Raises:
        ValueError: If the stream gives nothing.
    """
    given, rest = 0, None
    while True:
        is_empty = True
        for batch in read():
            is_empty = False
            if rest is not None:
                batch = tuple(torch.cat(parts) for parts in zip(rest, batch))
            while len(batch[1]) >= size:
                yield tuple(part[:size] for part in batch)
                given += 1
                if given == steps:
                    return
                batch = tuple(part[size:] for part in batch)
            rest = batch if len(batch[1]) else None
        if is_empty:
            raise ValueError('The data set gives no images.')
        if not again:
            break
    if rest is not None:
        yield rest
