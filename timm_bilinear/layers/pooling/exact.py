"""Exact bilinear pooling: products of all pairs of channels, over locations averaged, summed or their maximum.

Source: Lin, RoyChowdhury, Maji, 'Bilinear CNNs for Fine-grained Visual Recognition', https://arxiv.org/abs/1504.07889.
"""

from typing import Annotated, List, Literal, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn

from ...ops import bilinear_classify, bilinear_pool, descriptor_size, reference
from ..arguments import Bounds
from .plain import pooled_products
from .power import power_pool
from .registry import BilinearPooling, Terms, register_pooling

__all__ = ['AvgPooling', 'ExactPooling', 'MaxPooling', 'SumPooling']


def exact_pool(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, eps: float) -> torch.Tensor:
    """`timm_bilinear.ops.bilinear_pool`, as TorchScript takes it, which knows neither its keywords nor its checks."""
    if torch.jit.is_scripting():
        return reference.bilinear_pool(a, b, pool, eps)
    return bilinear_pool(a, b, pool=pool, eps=eps)


class ExactPooling(BilinearPooling):
    """Outer product per location, pooled, signed square root, L2 norm; packed if one stream is paired with itself."""

    is_packed = True
    is_unit_length = True
    reduction: str  # over locations

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10,
        power: Literal['root', 'sigme', 'maxexp'] = 'root',
        eta: Annotated[Optional[float], Bounds(1)] = None,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels of one stream or of two.
            eps: Offset under the signed square root; 1e-10 is the article's, 1e-5 that of the authors' release.
            power: 'root' for the signed square root; 'sigme' and 'maxexp' of the outer product divided by its trace.
            eta: How steep SigmE or MaxExp is; None for the number of channels.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_features = descriptor_size(*in_features)
        self.eps = eps
        self.power = power
        self.eta = float((in_features[0] * in_features[-1]) ** 0.5 if eta is None else eta)
        self.reduction = type(self).reduction  # an attribute of its own, for TorchScript

    def forward(self, a: torch.Tensor, b: Optional[torch.Tensor] = None) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self.check_maps(a, b)
        if self.power != 'root':
            return power_pool(a, b, self.reduction, self.power, self.eta)
        if not torch.jit.is_scripting():
            if isinstance(a, torch.fx.Proxy):  # a node of the graph: the op's checks and choice of a path end a trace
                return a.tracer.create_proxy('call_function', exact_pool, (a, b, self.reduction, self.eps), {})
        return exact_pool(a, b, self.reduction, self.eps)

    def classify(self, maps: Tuple[torch.Tensor, ...], fc: nn.Linear) -> Optional[torch.Tensor]:
        if self.power != 'root':
            return None
        a, b = maps if len(maps) == 2 else (maps[0], None)
        return bilinear_classify(
            a,
            b,
            fc.weight,
            fc.bias,
            pool=self.reduction,
            eps=self.eps,
            recompute=self.grad_checkpointing,
        )

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        z = pooled_products(a, b, self.reduction)
        return [Terms(reference.pack(z), (a,), 2) if b is None else Terms(z.flatten(1), (a, b), 2)]

    def extra_repr(self) -> str:
        power = f'eps={self.eps:g}' if self.power == 'root' else f'power={self.power!r}, eta={self.eta:g}'
        return f'in_features={self.in_features}, num_features={self.num_features}, {power}'


@register_pooling('avg')
class AvgPooling(ExactPooling):
    """Mean over locations."""

    reduction = 'avg'


@register_pooling('sum')
class SumPooling(ExactPooling):
    """Sum over locations."""

    reduction = 'sum'


@register_pooling('max')
class MaxPooling(ExactPooling):
    """Largest product over locations."""

    reduction = 'max'
