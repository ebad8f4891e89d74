"""Bilinear pooling in plain PyTorch: the definition that every fast path is tested against.

Differentiable in both modes and any number of times, under the transforms of `torch.func` too; scriptable and
exportable. Source: Lin, RoyChowdhury, Maji, 'Bilinear CNNs for
Fine-grained Visual Recognition', https://arxiv.org/abs/1504.07889, sections 3 and 4.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from .packing import triangle_indices

__all__ = [
    'bilinear_classify',
    'bilinear_pool',
    'compute_dtype',
    'descriptors',
    'norm',
    'pack',
    'products',
    'safe_scales',
    'signed_root',
    'triangle',
    'widen',
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32, whatever autocast says; wider types in their own precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _CompiledWiden(torch.autograd.Function):
    """To the dtype of computation; where the dtype of features cannot hold the gradient it is the largest it can."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.dtype == torch.float16 else x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(ctx.dtype).max
        return grad.clamp(-largest, largest).to(ctx.dtype)


class _Widen(_CompiledWiden):
    """The same with a forward derivative, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor) -> torch.Tensor:
        return _CompiledWiden.forward(tangent)


def widen(x: torch.Tensor, two: bool = False) -> torch.Tensor:
    """Features (B, C, N) in the dtype they are multiplied in.

    No dtype has the gradients of one stream, if they are tiny and those of the other, of `two`, are huge.
    """
    if not torch.jit.is_scripting():
        if x.requires_grad and (two or x.dtype == torch.float16):
            x = (_CompiledWiden if torch.compiler.is_compiling() else _Widen).apply(x)
    return x.to(compute_dtype(x.dtype)).flatten(2)


def _max_locations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Location of the largest product of every channel pair, (B, Ca, Cb) int64, in blocks of a few of a's channels."""
    a, b = a.detach(), b.detach().unsqueeze(1)
    channels, rows = int(a.shape[1]), max(1, 4096 // int(b.shape[2]))  # no dynamic sizes: exporters unroll the blocks
    blocks = [(a[:, i : i + rows].unsqueeze(2) * b).argmax(3) for i in range(0, channels, rows)]
    return torch.cat(blocks, 1)


def products(a: torch.Tensor, b: torch.Tensor, pool: str) -> torch.Tensor:
    """Pooled outer products Z, (B, Ca, Cb)."""
    if pool == 'max':
        n = _max_locations(a, b)
        return a.gather(2, n) * b.gather(2, n.transpose(1, 2)).transpose(1, 2)
    z = torch.bmm(a, b.transpose(1, 2))
    return z / a.shape[2] if pool == 'avg' else z


def safe_scales(a: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Divisors of each image's features, (B, 1, 1): 1, but the largest of each where their products could overflow."""
    largest_a = a.detach().abs().amax((1, 2), keepdim=True)
    largest_b = b.detach().abs().amax((1, 2), keepdim=True)
    # room for the sum over locations, and for that of the squared descriptor
    most = (3e30 if a.dtype == torch.float32 else 1e300) / a.shape[2]
    huge = largest_a > most / largest_b.clamp_min(1.0)
    huge = huge | (largest_b > most / largest_a.clamp_min(1.0))
    return torch.where(huge, largest_a, 1.0), torch.where(huge, largest_b, 1.0)


def norm(y: torch.Tensor) -> torch.Tensor:
    """Lengths (..., 1) of vectors (..., D), at least 1e-12; all their derivatives are finite, at 0 too."""
    squares = y.square().sum(-1, keepdim=True)
    return torch.where(squares < 1e-24, 1e-24, squares).sqrt()


def signed_root(z: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """sign(z) (sqrt(|z| + eps) - sqrt(eps)), of any shape that eps > 0 broadcasts to."""
    eps = eps.clamp_min(1e-30)  # sqrt() has no gradient at 0, which smaller ones are in float32
    # The gradient at z = 0 is 0: sign() has none, and the |z| inside the root is taken with abs(), whose is 0 there.
    return z.sign() * ((z.abs() + eps).sqrt() - eps.sqrt())


def triangle(z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Upper triangle of (B, C, C), gathered by an index that is a constant of graphs, and what packing multiplies by.

    What changes each entry alone takes half the time between the two.

    Args:
        z: (B, C, C).

    Returns:
        Tuple: entries, (B, D); factors, (D,), 1 of the diagonal and sqrt(2) of the rest.
    """
    channels = int(z.shape[1])  # a tensor, for the tracer
    size = channels * (channels + 1) // 2
    if torch.jit.is_scripting():
        row, col = torch.triu_indices(channels, channels, device=z.device).unbind(0)
        flat, diagonal = row * channels + col, torch.nonzero(row == col).flatten()
    else:
        # An iterated number is a constant to torch.compile, also where sizes are symbols to it.
        flat, _, diagonal = triangle_indices(len(range(channels)), z.device)
    factor = torch.full((size,), 2.0**0.5, dtype=z.dtype, device=z.device)
    return z.flatten(1).index_select(1, flat), factor.index_fill(0, diagonal, 1.0)


def pack(z: torch.Tensor) -> torch.Tensor:
    """Upper triangle of (B, C, C), off-diagonals times sqrt(2), (B, D)."""
    entries, factor = triangle(z)
    return entries * factor


def _unnormalised(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
    scale: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Descriptors before the L2 norm, (B, D), and their norms, (B, 1), both in the compute dtype."""
    a = widen(a)
    symmetric = b is None
    b_ = a if b is None else widen(b)

    # After the L2 norm only eps tells that features were scaled down.
    if scale is None:
        scale_a, scale_b = safe_scales(a, b_)
    else:
        scale_a, scale_b = scale[:, :1].unsqueeze(2), scale[:, 1:].unsqueeze(2)
    a = a / scale_a
    b_ = a if symmetric else b_ / scale_b
    eps_ = eps / scale_a / scale_b

    z = products(a, b_, pool)
    y = signed_root(z, eps_)
    if symmetric:
        y = pack(y)
    else:
        y = y.flatten(1)
    return y, norm(y)


def descriptors(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Descriptors before the L2 norm, (B, D), of features divided by a `scale` (B, 2) that a fast path has chosen."""
    return _unnormalised(a, b, pool, eps, scale)[0]


def bilinear_pool(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, eps: float) -> torch.Tensor:
    """See `timm_bilinear.ops.bilinear_pool`; arguments are not checked here, autocast must be off."""
    y, length = _unnormalised(a, b, pool, eps)
    return (y / length).to(a.dtype)


def bilinear_classify(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> torch.Tensor:
    """See `timm_bilinear.ops.bilinear_classify`; arguments are not checked here, autocast must be off."""
    y, length = _unnormalised(a, b, pool, eps)
    logits = F.linear(y, weight.to(y.dtype)) / length
    if bias is not None:
        logits = logits + bias
    return logits.to(a.dtype)
