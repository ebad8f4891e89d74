"""The first stage of B-CNN, streams frozen, without computing the same features in every epoch.

What the trained part of the head sees of every image, and of its mirror image, is computed once and kept in half
precision in a file: descriptors where that part is the classifier alone, feature maps where it has projections too.
"""

import copy
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..data.folder import ImageList
from ..data.loader import create_loader
from ..models import BilinearCNN
from .descriptors import DescriptorFile, FeatureError, descriptor_key
from .distributed import Ranks, broadcast
from .inference import autocast
from .progress import RunLog
from .recipe import Stage

__all__ = ['FeatureError', 'FrozenStage', 'count_views']

_ONE_PROCESS = Ranks()
_UNSAVED_BYTES = 2**28  # of the file that an interruption may cost


def count_views(hflip: float) -> int:
    """Views of a training image: itself, and its mirror image if there are flips."""
    return 2 if hflip > 0 else 1


class FrozenStage:
    """Training of a stage on what is kept of each image; a base class, see `create_frozen_stage`.

    Args:
        net: The model, on its device, with the head that the stage starts from; its streams are frozen here.
        stage: Epochs, optimizer and learning rate of the head.
        datasets: Data sets by 'train' and 'val'.
        data_config: The model's preprocessing.
        folder: Folder for the file.
        batch_size: Images per step.
        hflip: Probability of the mirror image in training.
        seed: Seed of the order of images.
        fingerprint: Hash of the images.
        workers: Loader processes, None for a number by the cores.
        amp_dtype: Dtype that features are computed in under autocast, None for float32.
        smoothing: Label smoothing.
        class_weights: (K,) weights of the classes in the loss, None for equal ones.
        log: Where the progress goes.
        ranks: Processes, each of which computes its share of the file, and then does as all do.
    """

    save_interval = 60.0  # seconds between checkpoints, which take longer than epochs
    prepared_at = 0.0  # when the first epoch really began
    trained_prefix: str  # of the names of the parameters that what is kept does not depend on
    noun: str  # what is kept

    def __init__(
        self,
        net: BilinearCNN,
        stage: Stage,
        datasets: Dict[str, ImageList],
        data_config: Dict[str, Any],
        folder: Path,
        batch_size: int = 32,
        hflip: float = 0.5,
        seed: int = 0,
        fingerprint: str = '',
        workers: Optional[int] = None,
        amp_dtype: Optional[torch.dtype] = None,
        smoothing: float = 0.0,
        class_weights: Optional[torch.Tensor] = None,
        log: Optional[RunLog] = None,
        ranks: Ranks = _ONE_PROCESS,
    ):
        net.set_freeze_backbone()
        self.net, self.stage, self.datasets, self.data_config = net, stage, datasets, data_config
        self.num_train, self.num_val = len(datasets['train']), len(datasets['val'])
        self.batch_size = min(batch_size, self.num_train)
        self.hflip, self.seed, self.workers, self.amp_dtype = hflip, seed, workers, amp_dtype
        self.smoothing, self.ranks, self.device = smoothing, ranks, ranks.device
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.log = log or RunLog(is_quiet=True)
        self.targets = {split: torch.tensor(datasets[split].targets, device=self.device) for split in ('train', 'val')}

        self.views = count_views(hflip)
        self.num_views = self.views * self.num_train  # rows, those of an image one after the other; then validation's
        self.columns = self.count_columns(net, data_config)
        shape = (self.num_views + self.num_val, self.columns)
        key = descriptor_key(net, self.trained_prefix, data_config, fingerprint, amp_dtype)
        if ranks.is_first:
            DescriptorFile(Path(folder), shape, key).close()
        broadcast(None, ranks)  # the file is there for all
        self.file = DescriptorFile(Path(folder), shape, key, ranks.rank)
        self.is_prepared = False

        groups = [dict(params=self._create_parameters(), lr=stage.head_lr, weight_decay=0.0)]
        self.optimizer = create_optimizer_v2(groups, opt=stage.opt, lr=stage.head_lr)
        self.steps = max(self.num_train // self.batch_size, 1)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=stage.epochs,
            warmup_epochs=1 if stage.epochs > 4 else 0,
            warmup_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )

    # What each kind of stage does in its own way

    @classmethod
    def count_columns(cls, net: BilinearCNN, data_config: Dict[str, Any]) -> int:
        """Entries that are kept of a view."""
        raise NotImplementedError

    def _create_parameters(self) -> List[nn.Parameter]:
        """Parameters that are trained."""
        raise NotImplementedError

    def _describe(self, images: torch.Tensor) -> torch.Tensor:
        """(B, columns) that is kept of (B, C, H, W) images."""
        raise NotImplementedError

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def snapshot(self) -> Tuple[torch.Tensor, ...]:
        """What `write_classifier` makes the head of, as it is now."""
        raise NotImplementedError

    def write_classifier(self, snapshot: Optional[Tuple[torch.Tensor, ...]] = None) -> None:
        """Put what is trained into the model: as it was at a snapshot, or as it is now."""
        raise NotImplementedError

    def _after_preparing(self) -> None:
        """Compute what training takes beside the file."""

    def _backward(self, loss: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    # What all do alike

    def _prepare(self) -> None:
        """Compute what is not in the file yet."""
        if self.is_prepared:
            return
        for split in ('train', 'val'):
            self._compute(split)
        broadcast(None, self.ranks)  # all have computed theirs
        self._after_preparing()
        self.is_prepared, self.prepared_at = True, time.monotonic()

    @torch.inference_mode()
    def _compute(self, split: str) -> None:
        dataset, views = copy.copy(self.datasets[split]), self.views if split == 'train' else 1
        rank, world_size, count = self.ranks.rank, self.ranks.world_size, len(dataset)
        start, stop = count * rank // world_size, count * (rank + 1) // world_size
        start += self.file.done.get(split, 0)
        if start >= stop:
            return
        first_row = 0 if split == 'train' else self.num_views
        dataset.paths, dataset.targets = dataset.paths[start:stop], dataset.targets[start:stop]
        loader = create_loader(dataset, self.data_config, min(self.batch_size, 16), self.workers, self.device)
        self.net.eval()
        unsaved = 0
        try:
            for images, _ in self.log.steps(loader, len(loader), f'{self.noun}, {split}', {}):
                rows = self._describe_views(images.to(memory_format=torch.channels_last), views)
                try:
                    self.file.write(first_row + views * start, rows)
                except FeatureError as e:
                    path = self.datasets[split].paths[start]
                    raise FeatureError(f"{e}, of '{path}' or one of the {len(images) - 1} images after it") from None
                start, unsaved = start + len(images), unsaved + rows.nbytes
                self.file.done[split] = start - count * rank // world_size
                if unsaved > _UNSAVED_BYTES:
                    self.file.save_progress()
                    unsaved = 0
        except BaseException:  # Ctrl-C above all
            with suppress(OSError):
                self.file.save_progress()
            raise
        self.file.save_progress()

    def _describe_views(self, images: torch.Tensor, views: int) -> torch.Tensor:
        """(B * views, columns) that is kept of images and, for two views, their mirror images, in turn."""
        values = []
        for view in (images, images.flip(3))[:views]:
            with autocast(self.device, self.amp_dtype):
                values.append(self._describe(view).float())
        return torch.stack(values, 1).flatten(0, 1)

    def _step(self, rows: torch.Tensor, targets: torch.Tensor) -> Tuple[float, int]:
        """Loss before the step and number of images that were right."""
        logits = self._logits(rows)
        loss = F.cross_entropy(logits, targets, self.class_weights, label_smoothing=self.smoothing)
        if not loss.isfinite():
            raise FloatingPointError(f'the loss became {loss.item()}')
        self._backward(loss, logits, rows)
        self.optimizer.step()
        return loss.item(), (logits.argmax(1) == targets).sum().item()

    def train_epoch(
        self, epoch: int, desc: str = '', on_pace: Optional[Callable[[float], None]] = None
    ) -> Dict[str, float]:
        """Train an epoch of the stage.

        Args:
            epoch: Its number within the stage, from 0.
            desc: What it is, for the progress.
            on_pace: Called once with the seconds of a step.

        Returns:
            'loss' and 'top1' (percent) on the way.

        Raises:
            FloatingPointError: If the loss is not finite; FeatureError, if what is kept of an image is not.
            OSError: If the disk is full.
        """
        self._prepare()
        self.net.train()
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(self.num_train, generator=generator)
        mirrored = (torch.rand(self.num_train, generator=generator) < self.hflip).long() * (self.views - 1)
        loss_sum = correct = count = weight_sum = 0.0
        began = time.monotonic()
        for step, batch in enumerate(order.split(self.batch_size)[: self.steps]):
            self.scheduler.step_update(epoch * self.steps + step)
            targets = self.targets['train'][batch.to(self.device)]
            loss, right = self._step((self.views * batch + mirrored[batch]).to(self.device), targets)
            weight = len(batch) if self.class_weights is None else self.class_weights[targets].sum().item()
            loss_sum, weight_sum = loss_sum + loss * weight, weight_sum + weight
            correct, count = correct + right, count + len(batch)
        if on_pace is not None:
            on_pace((time.monotonic() - began) / self.steps)
        return {'loss': loss_sum / weight_sum, 'top1': 100 * correct / count}

    @torch.no_grad()
    def evaluate(self, desc: str = 'Validating') -> Dict[str, float]:
        """Loss and top-1 accuracy, in percent, on the validation images."""
        self.net.eval()
        rows = torch.arange(self.num_views, self.num_views + self.num_val, device=self.device)
        logits, targets = torch.cat([self._logits(part) for part in rows.split(64)]), self.targets['val']
        top1 = (logits.argmax(1) == targets).sum().item() / self.num_val
        return {'loss': F.cross_entropy(logits, targets).item(), 'top1': 100 * top1}

    def state_dict(self) -> Dict[str, Any]:
        """What `load_state_dict` of a stage made with the same arguments, and the model's weights, takes to go on."""
        return dict(kind=type(self).__name__, optimizer=self.optimizer.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state['optimizer'])

    def close(self) -> None:
        """Remove the file."""
        broadcast(None, self.ranks)  # nobody reads it any more
        if self.ranks.is_first:
            self.file.remove()
        else:
            self.file.close()
