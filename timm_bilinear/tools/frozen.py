"""The first stage of B-CNN, streams frozen, without computing the same features in every epoch.

Descriptors of every image, and of its mirror image, are computed once and kept in half precision in a file. The linear
classifier then trains on them. Where its gradient steps are linear in the gradients (SGD with or without momentum), its
weight is at all times W = W0 + A^T Z: W0 as it started, Z the (n, D) descriptors of all views, A (n, K) coefficients
that follow the same SGD. Logits of a batch are Z_b W0^T + (Z_b Z^T) A, so that an epoch takes the Gram matrix Z Z^T and
never the descriptors, at a cost that does not depend on D: the steps are those of the weight itself, only cheaper.
"""

import copy
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..data.folder import ImageList
from ..data.loader import create_loader
from ..models import BilinearCNN
from .descriptors import DescriptorFile, descriptor_key
from .distributed import Ranks, broadcast
from .inference import autocast
from .progress import RunLog
from .recipe import Stage

__all__ = ['FrozenStage', 'no_cache_reason']

_ONE_PROCESS = Ranks()
_GRAM_BYTES = 3 * 2**30  # beyond this the classifier trains on the descriptors themselves
_COLUMNS = 4096  # of the descriptors, in float32 at a time
_ROWS = 2048  # of a Gram matrix, computed at a time
_UNSAVED_BYTES = 2**28  # descriptors that an interruption may cost
_LINEAR_OPTIMIZERS = ('sgd', 'nesterov', 'momentum')


def _count_views(hflip: float) -> int:
    return 2 if hflip > 0 else 1


def no_cache_reason(
    net: nn.Module, datasets: Dict[str, Any], hflip: float, budget: float, folder: Path
) -> Optional[str]:
    """Why the descriptors of a data set cannot be kept, as the end of a sentence; None if they can.

    Args:
        net: Model whose streams are to be frozen.
        datasets: Data sets by 'train' and 'val'.
        hflip: Probability of a flip in training; with 0 there are no mirror images.
        budget: Most gigabytes (10^9 bytes) that they may take, 0 for none.
        folder: Folder they would lie in.
    """
    if not isinstance(net, BilinearCNN):
        return 'the model is no bilinear CNN'
    if type(net.head.fc) is not nn.Linear or net.head.pool is None:
        return 'the classifier is not a linear one on pooled features'
    fc = {id(p) for p in net.head.fc.parameters()}
    if not all(id(p) in fc for name, p in net.named_parameters() if not name.startswith('stream_')):
        return 'the head trains more than its classifier'
    if not all(isinstance(datasets[split], ImageList) for split in ('train', 'val')):
        return 'the data are no image folder'
    size = 2 * net.head.num_features * (_count_views(hflip) * len(datasets['train']) + len(datasets['val']))
    if size > 1e9 * budget:
        return f'their descriptors take {size / 1e9:.1f} GB and --head-cache is {budget:g}'
    kept = folder / 'descriptors.bin'
    free = shutil.disk_usage(folder.parent).free + (kept.stat().st_size if kept.is_file() else 0)
    if size > free:
        return f"their descriptors take {size / 1e9:.1f} GB and '{folder.parent}' has {free / 1e9:.1f} GB left"
    return None


class FrozenStage:
    """Training of a stage, the classifier's, on descriptors that are computed once.

    Args:
        net: The model, on its device, with the classifier that the stage starts from; its streams are frozen here.
        stage: Epochs, optimizer and learning rate of the head.
        datasets: Data sets by 'train' and 'val'.
        data_config: The model's preprocessing.
        folder: Folder for the descriptors.
        batch_size: Images per step.
        hflip: Probability of the mirror image in training.
        seed: Seed of the order of images.
        fingerprint: Hash of the images.
        workers: Loader processes, None for a number by the cores.
        amp_dtype: Dtype that features are computed in under autocast, None for float32.
        smoothing: Label smoothing.
        class_weights: (K,) weights of the classes in the loss, None for equal ones.
        log: Where the progress goes.
        ranks: Processes, each of which computes its share of the descriptors, and then does as all do.
    """

    save_interval = 60.0  # seconds between checkpoints, which take longer than epochs

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

        self.views = _count_views(hflip)
        self.num_views = self.views * self.num_train  # rows, those of an image one after the other; then validation's
        shape = (self.num_views + self.num_val, net.head.num_features)
        key = descriptor_key(net, data_config, fingerprint, amp_dtype)
        if ranks.is_first:
            DescriptorFile(Path(folder), shape, key)
        broadcast(None, ranks)  # the file is there for all
        self.file = DescriptorFile(Path(folder), shape, key, ranks.rank)

        fc = net.head.fc
        self.start_weight = fc.weight.detach().float().clone()
        self.bias = None if fc.bias is None else nn.Parameter(fc.bias.detach().float().clone())
        is_linear = stage.opt.lower() in _LINEAR_OPTIMIZERS and net.head.drop.p == 0.0
        self.uses_gram = is_linear and 4 * self.num_views * shape[0] <= _GRAM_BYTES
        start = torch.zeros(self.num_views, net.num_classes, device=self.device)
        self.trained = nn.Parameter(start if self.uses_gram else self.start_weight.clone())
        params = [self.trained] if self.bias is None else [self.trained, self.bias]
        groups = [dict(params=params, lr=stage.head_lr, weight_decay=0.0)]
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
        self.is_prepared = False

    def _prepare(self):
        """Compute the descriptors that are not in the file yet, and the products that training takes."""
        if self.is_prepared:
            return
        for split in ('train', 'val'):
            self._compute(split)
        broadcast(None, self.ranks)  # all have computed theirs
        if self.uses_gram:
            self._multiply()
        self.is_prepared = True

    @torch.inference_mode()
    def _compute(self, split: str):
        dataset, views = copy.copy(self.datasets[split]), self.views if split == 'train' else 1
        rank, world_size, count = self.ranks.rank, self.ranks.world_size, len(dataset)
        start, stop = count * rank // world_size, count * (rank + 1) // world_size
        start += self.file.done.get(split, 0)
        if start >= stop:
            return
        first_row = 0 if split == 'train' else self.num_views
        dataset.paths, dataset.targets = dataset.paths[start:stop], dataset.targets[start:stop]
        loader = create_loader(dataset, self.data_config, min(self.batch_size, 16), self.workers, self.device)
        net, unsaved = self.net.eval(), 0
        desc = f'Descriptors, {split}'
        for images, _ in self.log.steps(loader, len(loader), desc, {}):
            images = images.to(memory_format=torch.channels_last)
            descriptors = []
            for view in (images, images.flip(3))[:views]:
                with autocast(self.device, self.amp_dtype):
                    descriptors.append(net.forward_head(net.forward_features(view), pre_logits=True).float())
            values = torch.stack(descriptors, 1).flatten(0, 1)
            try:
                self.file.write(first_row + views * start, values)
            except FloatingPointError as e:
                path = self.datasets[split].paths[start]
                raise FloatingPointError(f"{e}, of '{path}' or one of the {len(images) - 1} images after it") from None
            start, unsaved = start + len(images), unsaved + values.nbytes
            self.file.done[split] = start - count * rank // world_size
            if unsaved > _UNSAVED_BYTES:
                self.file.save_progress()
                unsaved = 0
        self.file.save_progress()

    def _column_blocks(self) -> Iterator[Tuple[slice, torch.Tensor]]:
        """Some columns of all descriptors after others, in float32."""
        for start in range(0, self.net.head.num_features, _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            yield columns, self.file.read(slice(None), columns).to(self.device)

    @torch.no_grad()
    def _multiply(self):
        """Gram matrix of all rows with those trained on, and the logits that the classifier starts with."""
        rows, stop = self.num_views + self.num_val, self.num_views
        self.gram = torch.zeros(rows, stop, device=self.device)
        self.start_logits = torch.zeros(rows, self.net.num_classes, device=self.device)
        for columns, block in self._column_blocks():
            self.start_logits.addmm_(block, self.start_weight[:, columns].T)
            for start in range(0, rows, _ROWS):  # of what is symmetric, the lower triangle
                part, last = slice(start, start + _ROWS), min(start + _ROWS, stop)
                self.gram[part, :last].addmm_(block[part], block[:last].T)
        for start in range(0, stop, _ROWS):
            part = slice(start, min(start + _ROWS, stop))
            self.gram[part, part.stop :] = self.gram[part.stop : stop, part].T

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        if self.uses_gram:
            logits = self.start_logits[rows] + self.gram[rows] @ self.trained
        else:
            descriptors = self.file.read(rows.cpu().numpy()).to(self.device)
            logits = F.linear(self.net.head.drop(descriptors), self.trained)
        return logits if self.bias is None else logits + self.bias

    def _step(self, rows: torch.Tensor, targets: torch.Tensor) -> Tuple[float, int]:
        """Loss before the step and number of images that were right."""
        if self.uses_gram:  # coefficients have the gradient of the logits
            with torch.no_grad():
                logits = self._logits(rows)
            logits.requires_grad_()
        else:
            logits = self._logits(rows)
        loss = F.cross_entropy(logits, targets, self.class_weights, label_smoothing=self.smoothing)
        if not loss.isfinite():
            raise FloatingPointError(f'the loss became {loss.item()}')
        self.optimizer.zero_grad()
        loss.backward()
        if self.uses_gram:
            self.trained.grad = torch.zeros_like(self.trained).index_add_(0, rows, logits.grad)
            if self.bias is not None:
                self.bias.grad = logits.grad.sum(0)
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
            FloatingPointError: If the loss or a descriptor is not finite.
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
        logits, targets = torch.cat([self._logits(part) for part in rows.split(1024)]), self.targets['val']
        top1 = (logits.argmax(1) == targets).sum().item() / self.num_val
        return {'loss': F.cross_entropy(logits, targets).item(), 'top1': 100 * top1}

    def snapshot(self) -> Tuple[torch.Tensor, ...]:
        """What `write_classifier` makes the classifier of, as it is now."""
        values = (self.trained,) if self.bias is None else (self.trained, self.bias)
        return tuple(value.detach().clone() for value in values)

    @torch.no_grad()
    def write_classifier(self, snapshot: Optional[Tuple[torch.Tensor, ...]] = None) -> None:
        """Put weight and bias into the model: of a snapshot, or as they are now."""
        trained, *bias = self.snapshot() if snapshot is None else snapshot
        fc = self.net.head.fc
        if self.uses_gram:
            for columns, block in self._column_blocks():
                fc.weight[:, columns] = self.start_weight[:, columns] + trained.T @ block[: self.num_views]
        else:
            fc.weight.copy_(trained)
        for value in bias:
            fc.bias.copy_(value)

    def state_dict(self) -> Dict[str, Any]:
        """What `load_state_dict` of a stage made with the same arguments takes to go on after an epoch."""
        return dict(
            snapshot=list(self.snapshot()),
            start_weight=self.start_weight if self.uses_gram else None,
            optimizer=self.optimizer.state_dict(),
        )

    @torch.no_grad()
    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if state['start_weight'] is not None:
            self.start_weight.copy_(state['start_weight'])
        trained, *bias = state['snapshot']
        self.trained.copy_(trained)
        for value in bias:
            self.bias.copy_(value)
        self.optimizer.load_state_dict(state['optimizer'])

    def close(self) -> None:
        """Remove the descriptors."""
        broadcast(None, self.ranks)  # nobody reads them any more
        if self.ranks.is_first:
            self.file.remove()
