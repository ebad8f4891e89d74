"""Classifier head on bilinear descriptors."""

from typing import Optional

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import register_notrace_module

from ..ops import POOL_TYPES, bilinear_classify, bilinear_pool, descriptor_size, reference

__all__ = ['BilinearHead']


def _projection(in_features: int, proj_dim: Optional[int], dd: dict) -> nn.Module:
    if proj_dim is None or in_features <= proj_dim:
        return nn.Identity()
    proj = nn.Conv2d(in_features, proj_dim, 1, bias=False, **dd)
    # A random projection that keeps inner products of features in expectation.
    nn.init.normal_(proj.weight, std=proj_dim**-0.5)
    return proj


@register_notrace_module  # reason: argument checks and dispatch in the ops are not symbolically traceable
class BilinearHead(nn.Module):
    """Classifier head w/ bilinear pooling, dropout and optional 1x1 projections of the features.

    Source: Bilinear CNNs for Fine-grained Visual Recognition, https://arxiv.org/abs/1504.07889.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        in_features_b: Optional[int] = None,
        pool_type: str = 'avg',
        eps: float = 1e-10,
        proj_dim: Optional[int] = None,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels of stream a.
            num_classes: Number of classes, 0 for no classifier (the head returns descriptors).
            in_features_b: Channels of stream b, None if stream a is paired with itself (packed symmetric descriptors).
            pool_type: 'avg', 'sum' or 'max' over locations, '' for none (the head returns its input).
            eps: Offset under the signed square root, > 0.
            proj_dim: Streams with more channels are projected to this many by a 1x1 convolution. None for never.
            drop_rate: Dropout rate of the descriptor.

        Raises:
            ValueError: If an argument is out of its range.
        """
        super().__init__()
        for name, value in (('in_features', in_features), ('in_features_b', in_features_b), ('proj_dim', proj_dim)):
            if value is not None and value < 1:
                raise ValueError(f"'{name}' must be positive, got {value}.")
        if not 0.0 < eps < float('inf'):
            raise ValueError(f"'eps' must be positive and finite, got {eps}.")
        dd = {'device': device, 'dtype': dtype}
        self.in_features = in_features
        self.in_features_b = in_features_b
        self.width = in_features + (in_features_b or 0)
        self.eps = eps
        self.proj_a = _projection(in_features, proj_dim, dd)
        self.proj_b = None if in_features_b is None else _projection(in_features_b, proj_dim, dd)
        # channels that meet in the outer product, and the descriptor (pre-logits) width D they make
        self.channels = min(in_features, proj_dim or in_features)
        self.channels_b = None if in_features_b is None else min(in_features_b, proj_dim or in_features_b)
        self.num_features = descriptor_size(self.channels, self.channels_b)
        self.drop = nn.Dropout(drop_rate)
        self.grad_checkpointing = False  # the fused classifier keeps no descriptors for backward, but makes them again
        self._set_pool(pool_type)
        self.fc = self._create_fc(num_classes, dd)

    def _set_pool(self, pool_type: str):
        if pool_type and pool_type not in POOL_TYPES:
            raise ValueError(f"'pool_type' must be one of {', '.join(map(repr, POOL_TYPES))} or '', got {pool_type!r}.")
        self.pool_type = pool_type

    def _create_fc(self, num_classes: int, dd: dict) -> nn.Module:
        if num_classes < 0:
            raise ValueError(f"'num_classes' must not be negative, got {num_classes}.")
        return nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def reset(self, num_classes: int, pool_type: Optional[str] = None, device=None, dtype=None):
        """
        Args:
            num_classes: The number of classes for the new classifier, 0 to remove it.
            pool_type: New pooling type, unchanged if None.

        Raises:
            ValueError: If `pool_type` is unknown or `num_classes` negative.
        """
        dd = get_device_dtype(self, device=device, dtype=dtype)
        if pool_type is not None:
            self._set_pool(pool_type)
        self.fc = self._create_fc(num_classes, dd)
        self.fc.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """
        Args:
            x: (B, C, H, W) features; two streams: channels concatenated, a then b.
            pre_logits: Return descriptors.

        Returns:
            (B, num_classes) logits; (B, D) descriptors of unit length, dropped out in training, if `pre_logits` or
            without a classifier; `x` itself if `pool_type` is ''.

        Raises:
            ValueError: If `x` is not of this shape, or (on the CPU) not finite, or a classifier is asked to work on
                unpooled features.
        """
        has_classifier = isinstance(self.fc, nn.Linear)
        if not self.pool_type:
            if has_classifier and not pre_logits:
                raise ValueError("The classifier needs pooled features, but 'pool_type' is ''.")
            return x
        if x.dim() != 4 or x.shape[1] != self.width:
            raise ValueError(f'Features must be (B, {self.width}, H, W), got shape {x.shape}.')
        a = self.proj_a(x[:, : self.in_features])
        b: Optional[torch.Tensor] = None
        if self.proj_b is not None:
            b = self.proj_b(x[:, self.in_features :])
        fused = has_classifier and not pre_logits and not (self.training and self.drop.p > 0.0)
        if torch.jit.is_scripting():  # TorchScript takes neither the ops' keyword-only arguments nor their checks
            z = self.drop(reference.bilinear_pool(a, b, self.pool_type, self.eps))
        elif fused:
            return bilinear_classify(
                a,
                b,
                self.fc.weight,
                self.fc.bias,
                pool=self.pool_type,
                eps=self.eps,
                recompute=self.grad_checkpointing,
            )
        else:
            z = self.drop(bilinear_pool(a, b, pool=self.pool_type, eps=self.eps))
        return z if pre_logits else self.fc(z)
