"""Power normalisations in place of the signed square root: SigmE and MaxExp.

Source: Koniusz, Zhang, Porikli, 'A Deeper Look at Power Normalizations', CVPR 2018; there of one stream, divided by the
trace, which of two streams is what the entries are bounded by.
"""

from typing import Optional

import torch
import torch.fx

from ...ops import reference
from .plain import in_float32

__all__ = ['power_pool']


def _bound(a: torch.Tensor, b: torch.Tensor, pool: str) -> torch.Tensor:
    """What entries of the pooled outer product are divided by, (B, 1, 1), and at most as large as.

    Of one stream with itself the trace of the mean or sum; of 'max' the largest |a_n|^2, which is less than the trace.
    """
    squares_a, squares_b = a.square().sum(1), b.square().sum(1)
    if pool == 'max':
        bound = squares_a.amax(1) * squares_b.amax(1)
    elif pool == 'avg':
        bound = squares_a.mean(1) * squares_b.mean(1)
    else:
        bound = squares_a.sum(1) * squares_b.sum(1)
    # the root has no gradient at 0
    return torch.where(bound > 0, bound, 1.0).sqrt()[:, None, None]


def _describe(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, power: str, eta: float) -> torch.Tensor:
    b_ = a if b is None else b
    largest_a, largest_b = (x.detach().abs().amax((1, 2), keepdim=True) for x in (a, b_))
    a = a / torch.where(largest_a > 0, largest_a, 1.0)
    b_ = a if b is None else b_ / torch.where(largest_b > 0, largest_b, 1.0)
    p = reference.products(a, b_, pool) / _bound(a, b_, pool)
    factor = torch.ones((), dtype=p.dtype, device=p.device)
    if b is None:
        p, factor = reference.triangle(p)
    if power == 'sigme':
        y = torch.tanh(0.5 * eta * p)  # 2 / (1 + exp(-eta p)) - 1
    else:
        # Beyond 1 there is but rounding. The power is of numbers up to 1 alone: what overflows has no derivative.
        size = 1 - (1 - torch.where(p >= 0, p, -p).clamp(max=1.0)) ** eta
        y = torch.where(p >= 0, size, -size)
    y = y.flatten(1) * factor
    return y / reference.norm(y)


def power_pool(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, power: str, eta: float) -> torch.Tensor:
    """Pooled outer products divided by their trace, a power normalisation of each entry, L2 norm.

    Args:
        a: (B, Ca, H, W) features.
        b: (B, Cb, H, W) features of a second stream on the same grid, or None to pair `a` with itself.
        pool: 'avg', 'sum' or 'max' over locations.
        power: 'sigme' for 2 / (1 + exp(-eta p)) - 1, 'maxexp' for sign(p) (1 - (1 - |p|)^eta).
        eta: How steep it is.

    Returns:
        (B, D) in the dtype of `a` or of autocast, packed for one stream.
    """
    if torch.jit.is_scripting():
        b_ = b if b is None else reference.widen(b)
        return _describe(reference.widen(a), b_, pool, power, eta).to(a.dtype)
    if isinstance(a, torch.fx.Proxy):
        return a.tracer.create_proxy('call_function', power_pool, (a, b, pool, power, eta), {})
    return in_float32(_describe, a, b, pool, power, eta)
