"""Cross-layer bilinear pooling: products of projections of several feature levels, pair by pair.

Source: Yu, Zhao, Zheng, Zhang, You, 'Hierarchical Bilinear Pooling for Fine-Grained Visual Recognition',
https://arxiv.org/abs/1807.09915.
"""

from itertools import combinations
from typing import Annotated, List, Optional, Tuple

import torch
import torch.nn as nn

from ..arguments import Bounds
from .plain import PlainPooling, mean_products, project_products, root_and_norm
from .registry import Terms, register_pooling

__all__ = ['CrossPooling']


@register_pooling('cross')
class CrossPooling(PlainPooling):
    """Every level projected to `dim` channels, the products of every two levels pooled, signed square root, L2 norm.

    A single level is paired with itself by two projections. Pooled products of projections are those of the pooled
    outer product, P (X Y^T) Q, so no projected map is made.
    """

    max_streams = 4
    takes_levels = True

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        dim: Annotated[int, Bounds(1, 1_000_000)] = 8192,
        eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels of each level.
            dim: Channels that each is projected to; the descriptor has as many for every pair of levels.
            eps: Offset under the signed square root.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.sources = [0, 0] if len(in_features) == 1 else list(range(len(in_features)))
        self.pairs = list(combinations(range(len(self.sources)), 2))
        self.num_features = dim * len(self.pairs)
        self.eps = eps
        self.proj = nn.ModuleList(
            nn.Linear(in_features[i], dim, bias=False, device=device, dtype=dtype) for i in self.sources
        )
        for proj in self.proj:
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)

    def products(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[torch.Tensor]:
        """Pooled products of the projections of every two levels, (B, dim) each; levels concatenated in `a`, or two."""
        maps = [a, b] if b is not None else list(a.split(list(self.in_features), 1))
        weights = [proj.weight.to(a.dtype) for proj in self.proj]
        parts = []
        for i, j in self.pairs:
            z = mean_products(maps[self.sources[i]], maps[self.sources[j]])
            parts.append(project_products(z, weights[i], weights[j]))
        return parts

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        return torch.cat([root_and_norm(z, self.eps) for z in self.products(a, b)], 1)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        return [Terms(torch.cat(self.products(a, b), 1), (a,) if b is None else (a, b), 2)]

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, num_features={self.num_features}, eps={self.eps:g}'
