"""The head: split the streams' features, project, pool, drop, classify."""

from typing import Annotated, Any, ClassVar, Dict, List, Literal, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.layers import ConvNormAct, get_device_dtype

from .._compat import FakeTensor, has_global_hooks
from ..ops import descriptor_size
from .arguments import Bounds, argument_problem, check_arguments
from .pooling import BilinearPooling, check_pooling, check_takes_levels, create_pooling, pooling_arguments

__all__ = ['BilinearHead', 'is_plain_linear']

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def _projection(in_features: int, proj_dim: Optional[int], proj_type: str, dd: dict) -> nn.Module:
    if proj_dim is None or in_features <= proj_dim:
        return nn.Identity()
    if proj_type == 'conv_bn_relu':
        return ConvNormAct(in_features, proj_dim, 1, **dd)
    proj = nn.Conv2d(in_features, proj_dim, 1, bias=False, **dd)
    # A random projection that keeps inner products of features in expectation.
    nn.init.normal_(proj.weight, std=proj_dim**-0.5)
    return proj


def _is_unhooked(module: nn.Module) -> bool:
    """Whether nobody would notice that a module is not called."""
    return 'forward' not in vars(module) and not any(getattr(module, hooks) for hooks in _HOOKS)


def _is_plain_tensor(x: Optional[torch.Tensor]) -> bool:
    """Whether a tensor is dense and of no subclass (DTensor, quantised, one that intercepts functions)."""
    return x is None or (type(x) in (torch.Tensor, nn.Parameter, FakeTensor) and x.layout is torch.strided)


def is_plain_linear(fc: nn.Module) -> bool:
    """Whether a classifier is its weight and bias and nothing else.

    Not so a subclass (LoRA, parametrizations, quantisation-aware training), or one with hooks (pruning, observers,
    offloading, sharding).
    """
    is_linear = type(fc) is nn.Linear and _is_unhooked(fc)
    return is_linear and _is_plain_tensor(fc.weight) and _is_plain_tensor(fc.bias)


def _is_idle_dropout(drop: nn.Module) -> bool:
    """Whether a module before the classifier does nothing: dropout in eval mode, that is, as it is in."""
    is_idle = type(drop) is nn.Identity or (type(drop) is nn.Dropout and not (drop.training and drop.p > 0.0))
    return is_idle and _is_unhooked(drop)


def _is_fusible(pool: nn.Module) -> bool:
    """Whether a pooling's fused path is one of its own: a subclass with another `forward` needs another of them."""
    if not isinstance(pool, BilinearPooling) or not _is_unhooked(pool):
        return False
    defines = [c for c in type(pool).__mro__ if 'forward' in vars(c) or 'classify' in vars(c)]
    return 'classify' in vars(defines[0])


class BilinearHead(nn.Module):
    """Classifier head w/ bilinear pooling, dropout and optional 1x1 projections of the features.

    Source: Bilinear CNNs for Fine-grained Visual Recognition, https://arxiv.org/abs/1504.07889.
    """

    __jit_unused_properties__: ClassVar[List[str]] = ['grad_checkpointing']

    def __init__(
        self,
        in_features: Annotated[Union[int, Tuple[int, ...]], Bounds(1)],
        num_classes: Annotated[int, Bounds(0)],
        in_features_b: Annotated[Optional[int], Bounds(1)] = None,
        pool_type: str = 'avg',
        proj_dim: Annotated[Optional[int], Bounds(1)] = None,
        drop_rate: Annotated[float, Bounds(0, 1)] = 0.0,
        proj_type: Literal['conv', 'conv_bn_relu'] = 'conv',
        device=None,
        dtype=None,
        **pool_args,
    ):
        """
        Args:
            in_features: Channels of stream a; of several levels of it, concatenated in one map, those of each.
            num_classes: Number of classes, 0 for no classifier (the head returns descriptors).
            in_features_b: Channels of stream b, None if stream a is paired with itself (packed symmetric descriptors).
            pool_type: Pooling, one of `list_poolings()`; '' for none (the head returns its input).
            proj_dim: Streams with more channels are projected to this many by a 1x1 convolution. None for never.
            drop_rate: Dropout rate of the descriptor.
            proj_type: 'conv' for the convolution alone, 'conv_bn_relu' for batch norm and ReLU after it, as MPN-COV.
            **pool_args: Arguments of the pooling, e.g. `eps`.

        Raises:
            TypeError: If an argument is of the wrong type, or the pooling does not have it.
            ValueError: If an argument is out of its range, or the pooling does not take so many streams or levels.
        """
        super().__init__()
        checked = check_arguments(BilinearHead, {k: v for k, v in locals().items() if k != 'pool_args'})
        in_features, num_classes, proj_dim = (checked[k] for k in ('in_features', 'num_classes', 'proj_dim'))
        in_features_b, drop_rate = checked['in_features_b'], checked['drop_rate']
        pool_args = check_pooling(pool_type, pool_args, beside=BilinearHead)
        dd = {'device': device, 'dtype': dtype}
        self.levels = None if isinstance(in_features, int) else in_features
        in_features = in_features if self.levels is None else sum(self.levels)
        if self.levels is not None and (proj_dim is not None or in_features_b is not None):
            raise ValueError("Several levels are of one stream, and pooled without 'proj_dim'.")
        self.in_features = in_features
        self.in_features_b = in_features_b
        self.width = in_features + (in_features_b or 0)
        self.proj_a = _projection(in_features, proj_dim, proj_type, dd)
        self.proj_b = None if in_features_b is None else _projection(in_features_b, proj_dim, proj_type, dd)
        # channels that are pooled
        self.channels = min(in_features, proj_dim or in_features)
        self.channels_b = None if in_features_b is None else min(in_features_b, proj_dim or in_features_b)
        self._set_pool(pool_type, pool_args, dd)
        self.drop = nn.Dropout(drop_rate)
        self.fc = self._create_fc(num_classes, dd)

    def _set_pool(self, pool_type: str, pool_args: Dict[str, Any], dd: dict):
        pool = None
        if pool_type:
            in_features = (self.channels,) if self.channels_b is None else (self.channels, self.channels_b)
            if self.levels is not None:
                check_takes_levels(pool_type)
                in_features = self.levels
            pool = create_pooling(pool_type, in_features, **pool_args, **dd)
        self.pool_type = pool_type
        self.pool_args = pool_args
        self.pool = pool
        # without a pooling, the size of descriptors that the exact one would make
        self.num_features = descriptor_size(self.channels, self.channels_b) if pool is None else pool.num_features

    def _create_fc(self, num_classes: int, dd: dict) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        if self.pool is None:
            return nn.Linear(self.num_features, num_classes, **dd)
        return self.pool.create_classifier(num_classes, **dd)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether backward makes descriptors again instead of keeping them, where the pooling can."""
        return self.pool is not None and self.pool.grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool):
        if self.pool is not None:
            self.pool.grad_checkpointing = enable

    def reset(self, num_classes: int, pool_type: Optional[str] = None, device=None, dtype=None):
        """
        Args:
            num_classes: The number of classes for the new classifier, 0 to remove it.
            pool_type: New pooling, unchanged if None. It keeps those arguments of the old one that it takes.

        Raises:
            ValueError: If `pool_type` is unknown or `num_classes` negative.
        """
        num_classes = check_arguments(BilinearHead, dict(num_classes=num_classes))['num_classes']
        dd = get_device_dtype(self, device=device, dtype=dtype)
        if pool_type is not None and pool_type != self.pool_type:
            pool_args = self.pool_args
            if pool_type:
                known = pooling_arguments(pool_type)
                pool_args = {k: v for k, v in pool_args.items() if k in known and not argument_problem(known[k], v)}
            grad_checkpointing = self.grad_checkpointing
            self._set_pool(pool_type, pool_args, dd)
            self.grad_checkpointing = grad_checkpointing
        self.fc = self._create_fc(num_classes, dd)
        self.train(self.training)

    def _can_fuse(self, x: torch.Tensor, x_b: Optional[torch.Tensor]) -> bool:
        """Whether the classifier may be merged with the pooling, and neither it, pooling nor dropout be called."""
        if isinstance(x, torch.fx.Proxy) or has_global_hooks():
            return False
        is_plain = _is_plain_tensor(x) and _is_plain_tensor(x_b)
        return is_plain and is_plain_linear(self.fc) and _is_idle_dropout(self.drop) and _is_fusible(self.pool)

    def _check_width(self, x: torch.Tensor, x_b: Optional[torch.Tensor]):
        if x.dim() != 4 or x.shape[1] + (0 if x_b is None else x_b.shape[1]) != self.width:
            raise ValueError(f'Features must be (B, {self.width}, H, W), got shape {x.shape}.')

    def forward(
        self,
        x: torch.Tensor,
        pre_logits: bool = False,
        x_b: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """
        Args:
            x: (B, C, H, W) features; two streams: channels concatenated, a then b, or those of a alone.
            pre_logits: Return descriptors.
            x_b: (B, Cb, H, W) features of stream b, if `x` has those of a alone.

        Returns:
            (B, num_classes) logits; (B, D) descriptors, dropped out in training, if `pre_logits` or without a
            classifier; the features themselves, (B, C, H, W), without a pooling.

        Raises:
            ValueError: If features are not of these shapes, or a classifier is asked to work on unpooled features.
        """
        if self.pool is None:
            if isinstance(self.fc, nn.Linear) and not pre_logits:
                raise ValueError("The classifier needs pooled features, but 'pool_type' is ''.")
            return x if x_b is None else torch.cat([x, x_b], dim=1)
        if torch.jit.is_scripting():
            self._check_width(x, x_b)
        elif not isinstance(x, torch.fx.Proxy):  # whose shape is not known
            self._check_width(x, x_b)
        b = x_b
        if self.proj_b is not None:
            if b is None:
                x, b = x[:, : self.in_features], x[:, self.in_features :]
            b = self.proj_b(b)
        a = self.proj_a(x)
        if not torch.jit.is_scripting():
            if not pre_logits and self._can_fuse(a, b):
                logits = self.pool.classify((a,) if b is None else (a, b), self.fc)
                if logits is not None:
                    return logits
        # of one stream the second call is none that TorchScript compiles
        z = self.pool(a) if self.proj_b is None else self.pool(a, b)
        z = self.drop(z)
        return z if pre_logits else self.fc(z)
