"""A stage of training on images, and the loop that validates."""

import difflib
import math
import time
from functools import partial
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..models import BilinearCNN
from .distributed import Ranks, reduce_sum, share_of_batch, sync_batch_norm, wrap
from .evaluate import evaluate_loader
from .inference import autocast
from .progress import RunLog
from .recipe import Stage

__all__ = ['ImageStage', 'check_augmentation', 'check_optimizers', 'class_weights', 'evaluate']

_ONE_PROCESS = Ranks()
_TIMED_STEPS = 10  # of the first epoch, after which the time to expect is told


def class_weights(targets: Iterable[int], num_classes: int) -> torch.Tensor:
    """(K,) weights of the loss: the inverse of each class's number of images, their mean 1.

    Raises:
        ValueError: If a class has no image.
    """
    counts = torch.bincount(torch.as_tensor(list(targets)), minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"'class_weights' wants images of every class, class {counts.argmin().item()} has none.")
    weights = 1 / counts.double()
    return (weights / weights.mean()).float()


def check_optimizers(stages: Iterable[Stage]) -> None:
    """Check that every stage's optimizer can be had, on a parameter of one number.

    Raises:
        ValueError: If not, naming it and what comes close.
    """
    for opt in {stage.opt for stage in stages}:
        try:
            create_optimizer_v2([nn.Parameter(torch.zeros(1))], opt=opt, lr=0.1)
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as e:
            reason = ' '.join(str(e).split()).rstrip('.')
            close = difflib.get_close_matches(opt.lower(), list_optimizers(), n=3)
            hint = f'; close to it are {", ".join(close)}' if close and opt.lower() not in close else ''
            raise ValueError(f"'opt': {opt!r} cannot be had ({reason}){hint}.") from e


def check_augmentation(augmentation: Dict[str, Any]) -> None:
    """Check that timm takes each argument of the augmentation.

    Raises:
        ValueError: If not, naming it.
    """
    for name, value in augmentation.items():
        try:
            create_transform(64, is_training=True, **{name: value})
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as e:
            reason = ' '.join(str(e).split()).rstrip('.') or type(e).__name__
            hint = (
                '; timm has rand-..., augmix-..., original, originalr, v0, v0r and 3a' if name == 'auto_augment' else ''
            )
            raise ValueError(f"'{name}': timm takes no {value!r} ({reason}){hint}.") from e


def _create_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    head_module = model.head if isinstance(model, BilinearCNN) else model.get_classifier()
    head_parameters = set(head_module.parameters())
    head, decay, no_decay = [], [], []
    for param in model.parameters():
        if not param.requires_grad:
            continue
        group = head if param in head_parameters else decay if param.ndim > 1 else no_decay
        group.append(param)
    groups = [
        dict(params=head, lr=stage.head_lr, weight_decay=0.0),
        dict(params=decay, lr=stage.lr, weight_decay=stage.weight_decay),
        dict(params=no_decay, lr=stage.lr, weight_decay=0.0),
    ]
    return create_optimizer_v2([group for group in groups if group['params']], opt=stage.opt, lr=stage.lr)


def evaluate(
    model: nn.Module,
    loader,
    device: torch.device,
    amp_dtype: Optional[torch.dtype] = None,
    desc: str = 'Validating',
    progress: bool = False,
    ranks: Ranks = _ONE_PROCESS,
) -> Dict[str, float]:
    """Loss and top-1 accuracy of a model, by the project's one evaluation loop.

    Args:
        model: The model, on `device`; it is left in eval mode.
        loader: Gives (images, targets).
        device: Device to compute on.
        amp_dtype: Dtype to autocast to, None for float32.
        desc: What it is, for the bar.
        progress: Show a bar.
        ranks: The processes, each of which has its share of the images.

    Returns:
        'loss' (mean cross entropy) and 'top1' (percent).
    """
    reduce = partial(reduce_sum, ranks=ranks)
    metrics = evaluate_loader(model, loader, device, amp_dtype, desc, progress, reduce)
    return {key: metrics[key] for key in ('loss', 'top1')}


class ImageStage:
    """Training of a stage on images, which go through the streams in every epoch.

    Args:
        net: The model, on its device; its streams are frozen here, or trained, as the stage says.
        stage: Epochs, optimizer and learning rates.
        loaders: Loaders by 'train' and 'val'.
        amp_dtype: Dtype to autocast to, None for float32.
        smoothing: Label smoothing.
        class_weights: (K,) weights of the classes in the loss, None for equal ones.
        log: Where the progress goes.
        ranks: The processes that train together.
    """

    save_interval = 0.0  # seconds between checkpoints: one after each epoch
    prepared_at = 0.0  # there is nothing to prepare

    def __init__(
        self,
        net: nn.Module,
        stage: Stage,
        loaders: Dict[str, Any],
        amp_dtype: Optional[torch.dtype] = None,
        smoothing: float = 0.0,
        class_weights: Optional[torch.Tensor] = None,
        log: Optional[RunLog] = None,
        ranks: Ranks = _ONE_PROCESS,
    ):
        self.net, self.stage, self.loaders = net, stage, loaders
        self.amp_dtype, self.smoothing, self.ranks, self.device = amp_dtype, smoothing, ranks, ranks.device
        self.log = log or RunLog(is_quiet=True)
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        if isinstance(net, BilinearCNN):
            net.set_freeze_backbone(stage.lr == 0.0)
        self.optimizer = _create_optimizer(net, stage)
        self.steps = len(loaders['train'])
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=stage.epochs,
            warmup_epochs=1 if stage.epochs > 4 else 0,
            warmup_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self.batch_norms = sync_batch_norm(net, ranks)
        self.wrapped = wrap(net, ranks)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, float]:
        """Mean loss of this process's images, and the weight of that mean."""
        loss = F.cross_entropy(logits.float(), targets, self.class_weights, label_smoothing=self.smoothing)
        weight = len(targets) if self.class_weights is None else self.class_weights[targets].sum().item()
        return loss, weight

    def train_epoch(
        self, epoch: int, desc: str = '', on_pace: Optional[Callable[[float], None]] = None
    ) -> Dict[str, float]:
        """Train an epoch of the stage.

        Args:
            epoch: Its number within the stage, from 0.
            desc: What it is, for the progress.
            on_pace: Called once with the seconds of a step, when some are done.

        Returns:
            'loss' and 'top1' (percent) on the way.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        self.net.train()
        self.wrapped.train()
        if isinstance(self.net, BilinearCNN):
            self.net.train()  # frozen streams stay in eval mode
        loss_sum = correct = count = weight_sum = 0.0
        figures: Dict[str, float] = {}
        start = None
        for step, (images, targets) in enumerate(self.log.steps(self.loaders['train'], self.steps, desc, figures)):
            self.scheduler.step_update(epoch * self.steps + step)
            images = images.to(self.device, memory_format=torch.channels_last)
            targets = targets.to(self.device)
            with autocast(self.device, self.amp_dtype):
                logits = self.wrapped(images)
            loss, weight = self._loss(logits, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f'the loss became {value}')
            self.optimizer.zero_grad()
            self.scaler.scale(loss * share_of_batch(weight, self.ranks)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss_sum, weight_sum = loss_sum + value * weight, weight_sum + weight
            correct, count = correct + (logits.argmax(1) == targets).sum().item(), count + len(targets)
            figures.update(loss=loss_sum / weight_sum, top1=100 * correct / count)
            if on_pace is not None and start is None:
                start = time.monotonic()  # the first step sets up what later ones find
            elif on_pace is not None and step == min(_TIMED_STEPS, self.steps - 1):
                on_pace((time.monotonic() - start) / step)
        sums = reduce_sum(dict(loss=loss_sum, weight=weight_sum, correct=correct, count=count), self.ranks)
        return {'loss': sums['loss'] / sums['weight'], 'top1': 100 * sums['correct'] / sums['count']}

    def evaluate(self, desc: str = 'Validating') -> Dict[str, float]:
        """Loss and top-1 accuracy, in percent, on the validation images."""
        progress = self.log.has_bars
        return evaluate(self.net, self.loaders['val'], self.device, self.amp_dtype, desc, progress, self.ranks)

    def snapshot(self) -> Tuple[torch.Tensor, ...]:
        """What `write_classifier` takes, of which there is nothing: the model is what is trained."""
        return ()

    def write_classifier(self, snapshot: Optional[Tuple[torch.Tensor, ...]] = None) -> None:
        """Put what is trained into the model, where it is already."""

    def state_dict(self) -> Dict[str, Any]:
        """What `load_state_dict` of a stage made with the same arguments takes to go on after an epoch."""
        return dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])

    def close(self) -> None:
        """Leave the model as it is without the other processes."""
        self.batch_norms.remove()
