"""The low-rank bilinear classifier: a difference of two squared projections of the features for each class.

Source: Kong, Fowlkes, 'Low-rank Bilinear Pooling for Fine-Grained Classification', https://arxiv.org/abs/1611.05109.
"""

import math
from typing import Annotated, List, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from ...ops import descriptor_size, reference
from ..arguments import Bounds
from .plain import PlainPooling, mean_products
from .registry import Terms, register_pooling

__all__ = ['LowRankClassifier', 'LowRankPooling']


class LowRankClassifier(nn.Module):
    """Linear classifier on packed matrices whose weight for class k is the matrix U_k U_k^T - V_k V_k^T.

    Of the mean outer product of features X (C, N) it gives (|U_k^T X|^2 - |V_k^T X|^2) / N + b_k.
    """

    def __init__(self, channels: int, num_classes: int, rank: int, device=None, dtype=None):
        """
        Args:
            channels: Rows and columns C of the matrices.
            num_classes: Number of classes K.
            rank: Columns of U_k and V_k together.
        """
        super().__init__()
        self.channels = channels
        self.in_features = descriptor_size(channels)
        self.out_features = num_classes
        self.rank = rank
        # (K, C, rank): columns of U, then those of V
        self.weight = nn.Parameter(torch.empty(num_classes, channels, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        # matrices of the length that nn.Linear's rows have
        nn.init.normal_(self.weight, std=(self.channels * math.sqrt(3 * self.rank)) ** -0.5)
        nn.init.zeros_(self.bias)

    def packed_weight(self) -> torch.Tensor:
        """The weight of a linear classifier on packed descriptors that it is, (K, C (C + 1) / 2)."""
        weight = self.weight.to(reference.compute_dtype(self.weight.dtype))
        u, v = weight[:, :, : (self.rank + 1) // 2], weight[:, :, (self.rank + 1) // 2 :]
        return reference.pack(torch.bmm(u, u.transpose(1, 2)) - torch.bmm(v, v.transpose(1, 2)))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of packed matrices (B, C (C + 1) / 2)."""
        if not torch.jit.is_scripting():
            if isinstance(z, torch.fx.Proxy):  # a node of the graph, as poolings are
                return z.tracer.create_proxy('call_module', z.tracer.path_of_module(self), (z,), {})
        return F.linear(z, self.packed_weight().to(z.dtype), self.bias.to(z.dtype))

    def extra_repr(self) -> str:
        return f'channels={self.channels}, out_features={self.out_features}, rank={self.rank}'


@register_pooling('lowrank')
class LowRankPooling(PlainPooling):
    """Mean outer product of features projected to few channels, for a classifier of low rank; packed."""

    max_streams = 1

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        rank: Annotated[int, Bounds(1, 1024)] = 8,
        norm: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels, of which there should be few: 100 in the paper.
            rank: Rank of the classifier's matrix of each class, half of it for and half of it against the class.
            norm: Divide the matrix by its Frobenius norm.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_features = descriptor_size(*in_features)
        self.rank = rank
        self.norm = self.is_unit_length = norm

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        if not self.norm:
            scale, _ = reference.safe_scales(a, a)
            largest = 1.79e308 if a.dtype == torch.float64 else 3.38e38  # bfloat16 holds it, too
            a = a / scale
            z = reference.pack(reference.products(a, a, 'avg'))
            z = (z * scale[:, 0]).clamp(-largest, largest)
            return (z * scale[:, 0]).clamp(-largest, largest)
        z = reference.pack(mean_products(a, None))
        return z / reference.norm(z)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        return [Terms(reference.pack(mean_products(a, None)), (a,), 2)]

    def create_classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        return LowRankClassifier(self.in_features[0], num_classes, self.rank, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, rank={self.rank}, norm={self.norm}'
