"""Base of the poolings that are written in PyTorch's own operators, and what they have in common."""

from abc import abstractmethod
from typing import Callable, Optional

import torch
import torch.fx

from ...ops import autocast_dtype, check_maps, reference, without_autocast
from .registry import BilinearPooling

__all__ = ['PlainPooling', 'in_float32', 'mean_products', 'pooled_products', 'project_products', 'root_and_norm']


class PlainPooling(BilinearPooling):
    """Pooling whose `describe` is plain PyTorch; this class keeps autocast, tracers and wrong shapes away from it."""

    @abstractmethod
    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            a: (B, Ca, N) features, float32 or float64.
            b: (B, Cb, N) features of the second stream in the same dtype, or None.

        Returns:
            (B, D) descriptors in that dtype.
        """

    def forward(self, a: torch.Tensor, b: Optional[torch.Tensor] = None) -> torch.Tensor:
        if torch.jit.is_scripting():
            return _narrow(self.describe(reference.widen(a), b if b is None else reference.widen(b)), a.dtype)
        if isinstance(a, torch.fx.Proxy):  # a node of the graph: what depends on sizes ends a trace
            return a.tracer.create_proxy('call_module', a.tracer.path_of_module(self), (a, b), {})
        self.check_maps(a, b)
        return in_float32(self.describe, a, b)


def in_float32(
    describe: Callable[..., torch.Tensor], a: torch.Tensor, b: Optional[torch.Tensor], *args
) -> torch.Tensor:
    """Call a function of features in float32 or wider, whatever autocast says.

    Args:
        describe: Takes (B, Ca, N) features, those (B, Cb, N) of a second stream or None, and `args`; returns (B, D).
        a: (B, Ca, H, W) features.
        b: (B, Cb, H, W) features of a second stream on the same grid, or None.

    Returns:
        (B, D) in the dtype of `a` or of autocast.

    Raises:
        TypeError: If features are not floating point, or of different dtypes outside autocast.
        ValueError: If shapes or devices are wrong.
    """
    check_maps(a, b)
    dtype = autocast_dtype(a.device.type) or a.dtype
    with without_autocast(a.device.type):
        if b is not None:  # autocast may not have given them one dtype
            both = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(both), reference.widen(b.to(both), two=True)
        return _narrow(describe(reference.widen(a, two=b is not None), b, *args), dtype)


def _narrow(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Descriptors in the dtype of the features; float16 holds the largest it can where it cannot hold one."""
    return z.clamp(-65504.0, 65504.0).to(dtype) if dtype == torch.float16 else z.to(dtype)


def pooled_products(a: torch.Tensor, b: Optional[torch.Tensor], pool: str) -> torch.Tensor:
    """Outer products pooled over locations, (B, Ca, Cb), of one stream with itself or of two.

    Where they would overflow they are those of features divided by their largest, so this is for what a positive factor
    does not change.

    Args:
        a: (B, Ca, N) features.
        b: (B, Cb, N) features, or None.
        pool: 'avg', 'sum' or 'max'.
    """
    b_ = a if b is None else b
    scale_a, scale_b = reference.safe_scales(a, b_)
    return reference.products(a / scale_a, b_ / scale_b, pool)


def mean_products(a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
    """`pooled_products` of the mean."""
    return pooled_products(a, b, 'avg')


def project_products(z: torch.Tensor, w: torch.Tensor, v: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Products of projections of both sides, w_k^T Z v_k, a chunk of them at a time.

    Args:
        z: (B, Ca, Cb) outer products.
        w: (D, Ca) projections of their first side.
        v: (D, Cb) projections of their second side.
        chunk: Number of projections whose intermediate (B, chunk, Cb) is there at once.

    Returns:
        (B, D).
    """
    parts = [(torch.matmul(w_, z) * v_).sum(2) for w_, v_ in zip(w.split(chunk), v.split(chunk))]
    return torch.cat(parts, 1)


def root_and_norm(z: torch.Tensor, eps: float) -> torch.Tensor:
    """Signed square root and L2 norm, as `timm_bilinear.ops.bilinear_pool` has them.

    Args:
        z: (B, D), or symmetric (B, C, C), which are packed.
        eps: Offset under the root.

    Returns:
        (B, D).
    """
    offset = torch.full((), eps, dtype=z.dtype, device=z.device)
    if z.dim() == 3:
        entries, factor = reference.triangle(z)
        y = reference.signed_root(entries, offset) * factor
    else:
        y = reference.signed_root(z, offset)
    return y / reference.norm(y)
