"""Batches for training and evaluation: the same ones whatever the number of workers and processes."""

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .images import IMG_MODES, ImageError, shown
from .quiet import ignored
from .samples import Failure, Samples, collate, init_worker, sample_seed, with_transform
from .streams import Stream, regroup
from .transforms import draft_size, make_transform, transform_settings

__all__ = ['ImageLoader', 'create_loader', 'default_workers', 'draft_size']

_logger = logging.getLogger(__name__)

_CPU = torch.device('cpu')
# torch's word on more workers than cores, which are the user's choice.
_MANY_WORKERS = 'This DataLoader will create'


def default_workers(device: torch.device = _CPU, world_size: int = 1) -> int:
    """Loader processes that leave the cores to the model where this computes on them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    cores = max(cores // world_size, 1)
    return min(cores, 8) if device.type != 'cpu' else min(cores, 2) if cores < 8 else 4


class _Order:
    """Batches of (seed, index) of one process, for `DataLoader(batch_sampler=...)`."""

    def __init__(self, count: int, batch_size: int, is_training: bool, seed: int, rank: int, world_size: int):
        self.count = count
        self.batch_size = batch_size
        self.is_training = is_training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def _share(self, count: int) -> slice:
        """Part of `count` things that is this process's, in order."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def __len__(self) -> int:
        if self.is_training:
            return max(self.count // self.batch_size, 1)
        share = self._share(self.count)
        return math.ceil((share.stop - share.start) / max(self.batch_size // self.world_size, 1))

    def __iter__(self) -> Iterator[List[Tuple[Optional[int], int]]]:
        if not self.is_training:
            indices = range(self.count)[self._share(self.count)]
            step = max(self.batch_size // self.world_size, 1)
            for start in range(0, len(indices), step):
                yield [(None, index) for index in indices[start : start + step]]
            return
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [(sample_seed(self.seed, self.epoch, index), index) for index in batch[self._share(len(batch))]]


class _Batches:
    """Batches as the workers make them; says in one sentence what a worker failed at."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        # torch's handler raises in the middle of whatever the main process does when a worker dies; without it the
        # next batch tells
        in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD')
        handler = signal.getsignal(signal.SIGCHLD) if in_main else None
        self.loader.dataset.current.fill_(-1)
        with ignored(_MANY_WORKERS):
            batches = iter(self.loader)
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as e:
                message = None if 'in DataLoader worker process' in str(e) else self._obituary(str(e))
                if message is None:
                    raise
                raise RuntimeError(message) from e
            if isinstance(batch, Failure):
                del batches  # ends the workers now, which the traceback would keep waiting
                raise ImageError(batch.message)
            yield batch

    def _obituary(self, error: str) -> Optional[str]:
        """A sentence on a worker that is gone, with the file it was at as far as that is known."""
        samples = self.loader.dataset
        of_worker, dead = 'DataLoader worker (pid' in error, []
        for _ in range(20):  # its connections break a moment before the process is gone
            alive = {process.pid for process in multiprocessing.active_children()}
            dead = [index for pid, index in samples.current.tolist() if pid >= 0 and pid not in alive]
            if dead or of_worker or not self.loader.num_workers:
                break
            time.sleep(0.05)
        if not dead and not of_worker:
            return None
        files = [shown(name) for name in map(samples.name, dead) if name]
        where = f" at '{', '.join(files)}'" if files else ''
        return f'A loader process died{where}; if it was out of memory, fewer workers or a smaller batch need less.'


class _StreamBatches(_Batches):
    """Batches of a stream: as many as the data set's number of images makes, however the workers share them.

    Args:
        loader: Loader of a `Stream`.
        size: Images of a batch.
        is_training: Whole batches alone, of further passes through a stream that ends too early. Otherwise every
            image once.
        world_size: Number of processes, which all take the same number of steps.
    """

    def __init__(self, loader: DataLoader, size: int, is_training: bool, world_size: int):
        super().__init__(loader)
        count = len(loader.dataset)
        self.size = min(size, count)
        self.is_training = is_training
        self.steps = count // self.size if is_training else math.ceil(count / self.size)
        self.most = self.steps if is_training or world_size > 1 else None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        given = 0
        for batch in regroup(super().__iter__, self.size, self.most, self.is_training):
            given += len(batch[1])
            yield batch
        count = len(self.loader.dataset)
        if self.most is None and given != count:
            _logger.warning(f'The data set says that it has {count} images, and gave {given}.')


class ImageLoader:
    """Batches on a device, made by `create_loader`.

    Iterating gives (images, targets): float (B, C, H, W), normalised, in memory with channels last, and int64 (B,).

    Args:
        batches: Loader of uint8 images, or of float ones that are normalised already.
        order: What has the epoch.
        seed: Seed of what a stream shuffles.
        normalised: Which of the two.
        mean: Mean by channel, of 0 to 1.
        std: Standard deviation by channel.
        device: Where batches go.
    """

    def __init__(
        self,
        batches: _Batches,
        order: Union[_Order, Stream],
        seed: int,
        normalised: bool,
        mean: Tuple[float, ...],
        std: Tuple[float, ...],
        device: torch.device,
    ):
        self.batches = batches
        self.order = order
        self.seed = seed
        self.device = device
        self._mean, self._std = (torch.tensor(values, device=device) for values in (mean, std))
        self._prefetcher = None
        if device.type == 'cuda' and not normalised:
            self._prefetcher = PrefetchLoader(batches, mean, std, channels=len(mean), device=device)

    @property
    def dataset(self) -> Dataset:
        """The data set that is read: a copy of the given one, with the loader's transform."""
        return self.batches.loader.dataset.dataset

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int):
        """The epoch that the next iteration's order and augmentation belong to; 0 if it is never set."""
        self.order.epoch = epoch
        self.batches.loader.generator.manual_seed(sample_seed(self.seed, epoch))
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Float images of uint8 ones (B, C, H, W), by the very steps of timm's transform: the very same values."""
        images = images.to(self.device, non_blocking=True)
        if images.dtype != torch.uint8:
            return images
        # image by image and with whole rows of the mean, which takes half the time of a batch and its channels
        rows = images.permute(0, 2, 3, 1).flatten(2)
        mean, std = (values.repeat(images.shape[3]) for values in (self._mean, self._std))
        normalised = torch.empty(rows.shape, device=self.device)
        for source, target in zip(rows, normalised):
            target.copy_(source).div_(255).sub_(mean).div_(std)
        return normalised.unflatten(2, (images.shape[3], images.shape[1])).permute(0, 3, 1, 2)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        if self._prefetcher is not None:
            yield from self._prefetcher
            return
        for images, targets in self.batches:
            yield self._normalised(images), targets.to(self.device, non_blocking=True)


def create_loader(
    dataset: Dataset,
    data_config: Dict[str, Any],
    batch_size: int,
    workers: Optional[int] = 2,
    device: torch.device = _CPU,
    is_training: bool = False,
    train_size: Optional[int] = None,
    train_aug: Optional[Dict[str, Any]] = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ImageLoader:
    """Batches of images as a model takes them, by timm's transforms.

    Order and augmentation of a training epoch depend on `seed`, the epoch and each image's index alone: not on the
    workers, not on the processes, not on what ran before. The caller's random states are left as they are. Streams
    ('wds/...', 'tfds/...', 'hfids/...') have no indices: their order is their own, and their augmentation depends on
    the place in the stream and so on the number of workers and processes.

    Args:
        dataset: Of `create_datasets` or `create_split`, or any with a `transform` that gives images. It is not changed.
        data_config: As `timm.data.resolve_model_data_config` gives it; every key is used.
        batch_size: Images of a step over all processes.
        workers: Processes that read images, each with one thread; 0 reads in this one, None is `default_workers`.
        device: Where batches go.
        is_training: Augmented images in random order, without the last, smaller batch unless it is the only one.
            Otherwise every image once, in order.
        train_size: Height and width of training images, None for the data config's.
        train_aug: Further arguments of `timm.data.create_transform` for training (scale, ratio, hflip, ...).
        seed: Seed of order and augmentation.
        rank: This process among `world_size`. In training it takes its part of every batch, in evaluation its part of
            the images; the parts in order of the ranks are the whole.
        world_size: Number of processes.

    Returns:
        A loader with `set_epoch(epoch)`, whose length is its number of steps.

    Raises:
        ValueError: If an argument does not fit the others, or timm's transform fails; the message names its setting.
        TypeError: If `train_aug` or the data config has a key that nothing takes.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f'No loader of batch size {batch_size} for process {rank} of {world_size}.')
    if is_training and batch_size % world_size:
        raise ValueError(f'A batch size of {batch_size} cannot be shared by {world_size} processes.')
    settings = transform_settings(data_config, is_training, train_size, train_aug)
    # erasing comes after normalisation, which then is the workers' too
    in_worker = is_training and bool(settings.get('re_prob'))
    transform = make_transform(settings, is_training, normalize=in_worker)

    if workers is None:
        workers = default_workers(device, world_size)
    mode = IMG_MODES[data_config['input_size'][0]]
    dataset = with_transform(dataset, transform, mode, draft_size(settings, is_training))
    common = dict(
        collate_fn=collate,
        pin_memory=device.type == 'cuda',
        worker_init_fn=init_worker,
        generator=torch.Generator().manual_seed(sample_seed(seed, 0)),  # or the loader would draw from the caller's
    )
    if isinstance(dataset, IterableDataset):
        order = Stream(dataset, seed if is_training else None, rank, workers)
        share = max(batch_size // world_size, 1)
        with ignored(_MANY_WORKERS):
            loader = DataLoader(order, share, num_workers=workers, **common)
        batches = _StreamBatches(loader, share, is_training, world_size)
    else:
        if is_training and len(dataset) < world_size:
            raise ValueError(f'{len(dataset)} training images are too few for {world_size} process(es).')
        order = _Order(len(dataset), batch_size, is_training, seed, rank, world_size)
        workers = min(workers, len(order))  # one without a batch would only be started
        # what a worker needs to know of the epoch comes with each index, so those that are slow to start may stay
        stay = workers > 0 and multiprocessing.get_context().get_start_method() != 'fork'
        samples = Samples(dataset, workers)
        with ignored(_MANY_WORKERS):
            loader = DataLoader(samples, batch_sampler=order, num_workers=workers, persistent_workers=stay, **common)
        batches = _Batches(loader)
    return ImageLoader(batches, order, seed, in_worker, settings['mean'], settings['std'], device)
