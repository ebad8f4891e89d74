"""Bilinear pooling in plain PyTorch: the definition that every fast path is tested against.

Differentiable by autograd (twice), scriptable and exportable. Source: Lin, RoyChowdhury, Maji, 'Bilinear CNNs for
Fine-grained Visual Recognition', https://arxiv.org/abs/1504.07889, sections 3 and 4.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = ['bilinear_pool', 'bilinear_classify', 'compute_dtype']


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32, whatever autocast says; wider types in their own precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _max_locations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Location of the largest product of every channel pair, (B, Ca, Cb) int64, in bounded memory."""
    rows = max(1, 4_194_304 // (b.shape[0] * b.shape[1] * b.shape[2]))  # a block holds 16 MiB of float32 products
    blocks = [(r.unsqueeze(2) * b.unsqueeze(1)).argmax(3) for r in a.detach().split(rows, 1)]
    return torch.cat(blocks, 1)


def _products(a: torch.Tensor, b: torch.Tensor, pool: str) -> torch.Tensor:
    """Pooled outer products Z, (B, Ca, Cb)."""
    if pool == 'max':
        n = _max_locations(a, b.detach())
        return a.gather(2, n) * b.gather(2, n.transpose(1, 2)).transpose(1, 2)
    z = torch.bmm(a, b.transpose(1, 2))
    return z / a.shape[2] if pool == 'avg' else z


def _scales(a: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Divisors of each image's features, (B, 1, 1): 1, but the largest of each where their products could overflow."""
    largest_a = a.detach().abs().amax((1, 2), keepdim=True)
    largest_b = b.detach().abs().amax((1, 2), keepdim=True)
    # room for the sum over locations, and for that of the squared descriptor
    most = (3e30 if a.dtype == torch.float32 else 1e300) / a.shape[2]
    huge = largest_a > most / largest_b.clamp_min(1.0)
    huge = huge | (largest_b > most / largest_a.clamp_min(1.0))
    return torch.where(huge, largest_a, 1.0), torch.where(huge, largest_b, 1.0)


def _unnormalised(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Descriptors before the L2 norm, (B, D), and their norms, (B, 1), both in the compute dtype."""
    dtype = compute_dtype(a.dtype)
    a = a.to(dtype).flatten(2)
    symmetric = b is None
    b_ = a if b is None else b.to(dtype).flatten(2)

    # After the L2 norm only eps tells that features were scaled down.
    scale_a, scale_b = _scales(a, b_)
    a = a / scale_a
    b_ = a if symmetric else b_ / scale_b
    eps_ = (eps / scale_a / scale_b).clamp_min(1e-30)  # sqrt() has no gradient at 0

    z = _products(a, b_, pool)
    # The gradient at Z = 0 is 0: sign() has none, and the |Z| inside the root is taken with abs(), whose is 0 there.
    y = z.sign() * ((z.abs() + eps_).sqrt() - eps_.sqrt())
    if symmetric:
        row, col = torch.triu_indices(y.shape[1], y.shape[1], device=y.device).unbind(0)
        y = y[:, row, col] * (1.0 + (row != col).to(dtype) * (2.0**0.5 - 1.0))
    else:
        y = y.flatten(1)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(1e-12)
    return y, norm


def bilinear_pool(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, eps: float) -> torch.Tensor:
    """See `timm_bilinear.ops.bilinear_pool`; arguments are not checked here, autocast must be off."""
    y, norm = _unnormalised(a, b, pool, eps)
    return (y / norm).to(a.dtype)


def bilinear_classify(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> torch.Tensor:
    """See `timm_bilinear.ops.bilinear_classify`; arguments are not checked here, autocast must be off."""
    y, norm = _unnormalised(a, b, pool, eps)
    logits = F.linear(y, weight.to(y.dtype)) / norm
    if bias is not None:
        logits = logits + bias
    return logits.to(a.dtype)
