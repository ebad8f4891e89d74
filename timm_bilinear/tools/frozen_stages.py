"""The three ways to train a head on what is kept of each image.

Where a classifier's steps are linear in the gradients (SGD with or without momentum), its weight is at all times
W = W0 + A^T Z: W0 as it started, Z the (n, D) descriptors of all views, A (n, K) coefficients that follow the same SGD.
Logits of a batch are Z_b W0^T + (Z_b Z^T) A, so that an epoch takes the Gram matrix Z Z^T and never the descriptors, at
a cost that does not depend on D: the steps are those of the weight itself, only cheaper. Other steps train on the
descriptors, and heads with projections on the feature maps.
"""

import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
from torch import nn

from ..data.folder import ImageList
from ..models import BilinearCNN
from .frozen import FrozenStage, count_views
from .recipe import Stage

__all__ = ['DescriptorStage', 'GramStage', 'MapStage', 'create_frozen_stage', 'no_cache_reason']

_GRAM_BYTES = 3 * 2**30  # beyond this the classifier trains on the descriptors themselves
_COLUMNS = 4096  # of the descriptors, in float32 at a time
_ROWS = 2048  # of a Gram matrix, computed at a time
_LINEAR_OPTIMIZERS = ('sgd', 'nesterov', 'momentum')


class _HeadStage(FrozenStage):
    """Training of parameters of the model's own head."""

    def _create_parameters(self) -> List[nn.Parameter]:
        self._as_it_is: Optional[Tuple[torch.Tensor, ...]] = None  # the head, while a snapshot is in its place
        return [p for p in self.net.head.parameters() if p.requires_grad]

    def snapshot(self) -> Tuple[torch.Tensor, ...]:
        return tuple(value.detach().clone() for value in self.net.head.state_dict().values())

    @torch.no_grad()
    def write_classifier(self, snapshot: Optional[Tuple[torch.Tensor, ...]] = None) -> None:
        if snapshot is not None and self._as_it_is is None:
            self._as_it_is = self.snapshot()
        values = self._as_it_is if snapshot is None else snapshot
        for value, kept in zip(self.net.head.state_dict().values(), values or ()):
            value.copy_(kept)
        if snapshot is None:
            self._as_it_is = None


class MapStage(_HeadStage):
    """Training of a head, projections included, on kept feature maps."""

    trained_prefix = 'head.'
    noun = 'Feature maps'

    @classmethod
    @torch.inference_mode()
    def _shape(cls, net: BilinearCNN, data_config: Dict[str, Any]) -> Tuple[int, ...]:
        """Channels, height and width of the features of one image."""
        is_training = net.training
        param = next(net.parameters())
        features = net.eval().forward_features(torch.zeros(1, *data_config['input_size'], device=param.device))
        net.train(is_training)
        return tuple(features.shape[1:])

    @classmethod
    def count_columns(cls, net: BilinearCNN, data_config: Dict[str, Any]) -> int:
        channels, height, width = cls._shape(net, data_config)
        return channels * height * width

    def _create_parameters(self) -> List[nn.Parameter]:
        self.shape = self._shape(self.net, self.data_config)
        return super()._create_parameters()

    def _describe(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(images).flatten(1)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        maps = self.file.read(rows.cpu().numpy()).to(self.device).unflatten(1, self.shape)
        return self.net.head(maps).float()


class DescriptorStage(_HeadStage):
    """Training of a classifier on kept descriptors."""

    trained_prefix = 'head.fc.'
    noun = 'Descriptors'

    @classmethod
    def count_columns(cls, net: BilinearCNN, data_config: Dict[str, Any]) -> int:
        return net.head.num_features

    def _describe(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.forward_head(self.net.forward_features(images), pre_logits=True)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        head = self.net.head
        return head.fc(head.drop(self.file.read(rows.cpu().numpy()).to(self.device)))


class GramStage(DescriptorStage):
    """Training of a classifier's coefficients on the Gram matrix of the kept descriptors."""

    def _create_parameters(self) -> List[nn.Parameter]:
        fc = self.net.head.fc
        self.start_weight = fc.weight.detach().float().clone()
        self.bias = None if fc.bias is None else nn.Parameter(fc.bias.detach().float().clone())
        self.coefficients = nn.Parameter(torch.zeros(self.num_views, self.net.num_classes, device=self.device))
        return [self.coefficients] if self.bias is None else [self.coefficients, self.bias]

    def _column_blocks(self) -> Iterator[Tuple[slice, torch.Tensor]]:
        """Some columns of all descriptors after others, in float32."""
        for start in range(0, self.columns, _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            yield columns, self.file.read(slice(None), columns).to(self.device)

    @torch.no_grad()
    def _after_preparing(self) -> None:
        """Multiply all rows with those trained on, and with the weight that the classifier starts with."""
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
        with torch.no_grad():
            logits = self.start_logits[rows] + self.gram[rows] @ self.coefficients
            logits = logits if self.bias is None else logits + self.bias
        return logits.requires_grad_(torch.is_grad_enabled())

    def _backward(self, loss: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Coefficients have the gradient of the logits of their own rows."""
        (gradient,) = torch.autograd.grad(loss, logits)
        self.coefficients.grad = torch.zeros_like(self.coefficients).index_add_(0, rows, gradient)
        if self.bias is not None:
            self.bias.grad = gradient.sum(0)

    def snapshot(self) -> Tuple[torch.Tensor, ...]:
        values = (self.coefficients,) if self.bias is None else (self.coefficients, self.bias)
        return tuple(value.detach().clone() for value in values)

    @torch.no_grad()
    def write_classifier(self, snapshot: Optional[Tuple[torch.Tensor, ...]] = None) -> None:
        coefficients, *bias = self.snapshot() if snapshot is None else snapshot
        fc = self.net.head.fc
        for columns, block in self._column_blocks():
            fc.weight[:, columns] = self.start_weight[:, columns] + coefficients.T @ block[: self.num_views]
        for value in bias:
            fc.bias.copy_(value)

    def state_dict(self) -> Dict[str, Any]:
        return dict(super().state_dict(), start_weight=self.start_weight, snapshot=list(self.snapshot()))

    @torch.no_grad()
    def load_state_dict(self, state: Dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.start_weight.copy_(state['start_weight'])
        coefficients, *bias = state['snapshot']
        self.coefficients.copy_(coefficients)
        for value in bias:
            self.bias.copy_(value)
        if self.is_prepared:  # with the weight that the model had
            self._after_preparing()


def _choose(net: BilinearCNN, stage: Stage, num_views: int, num_rows: int) -> Type[FrozenStage]:
    fc = net.head.fc
    classifier = {id(p) for p in fc.parameters()}
    others = [p for name, p in net.named_parameters() if not name.startswith('stream_') and id(p) not in classifier]
    if others or type(fc) is not nn.Linear:
        return MapStage
    is_linear = stage.opt.lower() in _LINEAR_OPTIMIZERS and net.head.drop.p == 0.0
    return GramStage if is_linear and 4 * num_views * num_rows <= _GRAM_BYTES else DescriptorStage


def create_frozen_stage(
    net: BilinearCNN, stage: Stage, datasets: Dict[str, ImageList], *args, hflip: float = 0.5, **kwargs
) -> FrozenStage:
    """Make the stage that suits the head, the optimizer and the number of images; arguments as of `FrozenStage`."""
    num_views = count_views(hflip) * len(datasets['train'])
    kind = _choose(net, stage, num_views, num_views + len(datasets['val']))
    return kind(net, stage, datasets, *args, hflip=hflip, **kwargs)


def no_cache_reason(
    net: nn.Module,
    stage: Stage,
    datasets: Dict[str, Any],
    data_config: Dict[str, Any],
    hflip: float,
    budget: float,
    folder: Path,
) -> Optional[str]:
    """Why nothing can be kept of a data set, as the end of a sentence; None if it can.

    Args:
        net: Model whose streams are to be frozen.
        stage: The stage.
        datasets: Data sets by 'train' and 'val'.
        data_config: The model's preprocessing.
        hflip: Probability of a flip in training; with 0 there are no mirror images.
        budget: Most gigabytes (10^9 bytes) that the file may take, 0 for none.
        folder: Folder it would lie in.
    """
    if not isinstance(net, BilinearCNN):
        return 'the model is no bilinear CNN'
    if net.head.pool is None:
        return 'the model has no pooling'
    if not all(isinstance(datasets[split], ImageList) for split in ('train', 'val')):
        return 'the data are no image folder'
    num_views = count_views(hflip) * len(datasets['train'])
    num_rows = num_views + len(datasets['val'])
    kind = _choose(net, stage, num_views, num_rows)
    size = 2 * num_rows * kind.count_columns(net, data_config)
    what = kind.noun.lower()
    if size > 1e9 * budget:
        return f'their {what} take {size / 1e9:.1f} GB and --head-cache is {budget:g}'
    kept = folder / 'descriptors.bin'
    free = shutil.disk_usage(folder.parent).free + (kept.stat().st_size if kept.is_file() else 0)
    if size > free:
        return f"their {what} take {size / 1e9:.1f} GB and '{folder.parent}' has {free / 1e9:.1f} GB left"
    return None
