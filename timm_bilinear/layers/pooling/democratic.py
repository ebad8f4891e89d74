"""Democratic aggregation: locations weighted so that each contributes alike to the pooled outer product.

Source: Lin, Maji, Koniusz, 'Second-order Democratic Aggregation', https://arxiv.org/abs/1808.07503.
"""

from typing import Annotated, List, Optional, Tuple

import torch

from ...ops import descriptor_size, reference
from ..arguments import Bounds
from .plain import PlainPooling, root_and_norm
from .registry import Terms, register_pooling

__all__ = ['DemocraticPooling', 'democratic_weights']


def democratic_weights(
    kernel: torch.Tensor,
    gamma: float,
    iterations: int,
    damping: float = 0.5,
    eps: float = 1e-10,
) -> torch.Tensor:
    """Weights w of locations by damped Sinkhorn iterations: diag(w) K w is the power gamma of K's row sums.

    Args:
        kernel: (B, N, N) similarities of locations, not negative.
        gamma: 0 lets every location contribute alike, 1 leaves them as they are.
        iterations: Number of iterations.
        damping: Weight of the new weights in the geometric mean with those before.
        eps: Least sum of the kernel.

    Returns:
        (B, N, 1).
    """
    target = kernel.sum(2, keepdim=True).clamp_min(eps) ** gamma
    weights = torch.ones_like(target)
    for _ in range(iterations):
        new = target / torch.bmm(kernel, weights).clamp_min(eps)
        weights = new**damping * weights ** (1 - damping)
    return weights


@register_pooling('democratic')
class DemocraticPooling(PlainPooling):
    """Outer products summed with gamma-democratic weights, signed square root, L2 norm, packed.

    The gradient goes through the weights too; the authors' release holds the row sums in them constant.
    """

    max_streams = 1
    is_packed = True
    is_unit_length = True

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        gamma: Annotated[float, Bounds(0, 1)] = 0.5,
        iterations: Annotated[int, Bounds(1, 1000)] = 10,
        eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels.
            gamma: From 0, all locations contribute alike, to 1, sum pooling.
            iterations: Sinkhorn iterations.
            eps: Offset under the signed square root.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_features = descriptor_size(*in_features)
        self.gamma = gamma
        self.iterations = iterations
        self.eps = eps

    def weigh(self, a: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Features divided by their largest, which changes nothing but all weights alike, and weights (B, 1, N)."""
        largest = a.detach().abs().amax((1, 2), keepdim=True)
        a = a / torch.where(largest > 0, largest, 1.0)
        kernel = torch.bmm(a.transpose(1, 2), a).square()  # of outer products
        return a, democratic_weights(kernel, self.gamma, self.iterations).transpose(1, 2)

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        a, weights = self.weigh(a)
        return root_and_norm(reference.products(a * weights, a, 'avg'), self.eps)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        a, weights = self.weigh(a)
        return [Terms(reference.pack(reference.products(a * weights.detach(), a, 'avg')), (a,), 2)]

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, gamma={self.gamma:g}, iterations={self.iterations}, eps={self.eps:g}'
