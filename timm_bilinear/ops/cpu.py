"""The CPU path: from features to unnormalised packed descriptors, to logits, and back.

    forward     Z = A Bf^T / N, or the largest product of each pair for 'max'
                Y = sign(Z) (sqrt(|Z| + eps) - sqrt(eps))
    backward    dZ = dY / (2 (|Y| + sqrt(eps))), 0 where Y = 0
                dA = (dZ + dZ^T) A / N       symmetric
                dA = dZ Bf / N, dBf = dZ^T A / N

Packed off-diagonals are sqrt(2) Y = sqrt(2 |Z| + 2 eps) - sqrt(2 eps): the same formulas with 2 Z and 2 eps for Z and
eps. So the whole packed vector is treated as off-diagonal, and constants put the C entries of the diagonal right.

Images are taken in groups that the cache holds, and each operator takes a group: few of them, since at the end of each
the threads wait for the one that the operating system has stopped, and that is often where the cores are shared.
"""

import math
from functools import lru_cache
from typing import Iterator, List, Optional, Tuple

import torch

from .._compat import mkldnn_linear
from . import maximum, memory
from .packing import packed_size, triangle_indices
from .reference import compute_dtype

__all__ = ['backward', 'classify', 'classify_backward', 'forward', 'linear']

_GROUP = 2**21  # entries of the descriptors of a group: 8 MiB in float32
# Rows of a block of the triangle: smaller ones skip more of the product, larger ones are fewer.
_BLOCK = 256
# ReLU's derivative, the first where the second is above 0: one pass, for which a mask takes two that are slower.
_where_positive = torch.ops.aten.threshold_backward.grad_input
_LARGE = 2**20  # entries of an operand from which on oneDNN's products take less time than it takes to call them


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for 2-D tensors.

    Large ones in float32 by oneDNN, which uses AVX-512 on every vendor's cores; the BLAS behind torch.mm does not, and
    takes more than twice as long on AMD's.
    """
    is_large = max(x.numel(), weight.numel()) >= _LARGE
    if is_large and x.dtype == torch.float32 and mkldnn_linear is not None and torch.backends.mkldnn.enabled:
        return mkldnn_linear(x, weight, None, 'none', [], '')
    return torch.mm(x, weight.t())


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype)


@lru_cache(maxsize=256)
def _root(eps: float, dtype: torch.dtype) -> float:
    """sqrt(eps) exactly as the vectorised root gives it, so that sqrt(0 + eps) - sqrt(eps) is 0."""
    with torch.inference_mode(False):
        return torch.full((16,), eps, dtype=dtype).sqrt_()[0].item()


@lru_cache(maxsize=64)
def _block_index(channels: int, row: int) -> torch.Tensor:
    """Places, in the flat product of a block of rows with all channels from `row` on, of its upper triangle."""
    with torch.inference_mode(False):
        height, width = min(_BLOCK, channels - row), channels - row
        i, j = torch.triu_indices(height, width)
        return i * width + j


@lru_cache(maxsize=16)
def _diagonal_row(channels: int, diagonal: float, off_diagonal: float, dtype: torch.dtype) -> torch.Tensor:
    """Constants of a packed descriptor, (D,)."""
    with torch.inference_mode(False):
        _, _, places = triangle_indices(channels, torch.device('cpu'))
        return torch.full((packed_size(channels),), off_diagonal, dtype=dtype).index_fill_(0, places, diagonal)


def _multiply_triangle(a: torch.Tensor, y: torch.Tensor):
    """Upper triangle of A A^T, packed, written to y (G, D); a (G, C, N)."""
    channels, start = a.shape[1], 0
    if channels <= _BLOCK:
        z = torch.bmm(a, a.transpose(1, 2)).flatten(1)
        torch.index_select(z, 1, _block_index(channels, 0), out=y)
        return
    for row in range(0, channels, _BLOCK):
        z = torch.bmm(a[:, row : row + _BLOCK], a[:, row:].transpose(1, 2))
        places = _block_index(channels, row)
        end = start + len(places)
        torch.gather(z.flatten(1), 1, places.expand(len(a), -1), out=y[:, start:end])
        start = end


def _multiply(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, y: torch.Tensor):
    """Sums, or maxima, of products, packed if there is no b, written to y (G, D); a (G, Ca, N), b (G, Cb, N)."""
    if pool == 'max':
        z, _ = maximum.products(a, b, need_places=False)
        z = z.flatten(1)
        if b is None:
            torch.gather(z, 1, triangle_indices(a.shape[1], a.device)[0].expand(len(a), -1), out=y)
        else:
            y.copy_(z)
    elif b is None:
        _multiply_triangle(a, y)
    else:
        torch.bmm(a, b.transpose(1, 2), out=y.unflatten(1, (a.shape[1], b.shape[1])))


def _describe(a: torch.Tensor, b: Optional[torch.Tensor], pool: str, eps: float, y: torch.Tensor):
    """Descriptors of a group, written to y (G, D); a (G, Ca, N), b (G, Cb, N), contiguous, in the compute dtype."""
    pairs = 2.0 if b is None else 1.0
    _multiply(a, b, pool, y)
    root = y.abs()
    torch.add(_constant(pairs * eps, y.dtype), root, alpha=pairs / _divisor(a, pool), out=root)
    root.sqrt_().sub_(_root(pairs * eps, y.dtype))
    torch.copysign(root, y, out=y)
    if b is None:
        # sqrt(z + eps) - sqrt(eps) is sqrt(2z + 2eps) - sqrt(2eps) over sqrt(2)
        y.mul_(_diagonal_row(a.shape[1], 0.5**0.5, 1.0, y.dtype))


def _divisor(a: torch.Tensor, pool: str) -> int:
    return a.shape[2] if pool == 'avg' else 1


def _gradients(
    grad: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
    outs: List[torch.Tensor],
):
    """Gradients of a group's features, written to outs, from those of its descriptors, grad (G, D)."""
    divisor, magnitude = _divisor(a, pool), y.abs()
    if b is None:
        # (dZ + dZ^T)_ii = 2 dY / (2 (|Y| + sqrt(eps)))
        slope = magnitude + _diagonal_row(a.shape[1], _root(eps, y.dtype), _root(2 * eps, y.dtype), y.dtype)
        alpha = 1.0 / divisor
    else:
        # Divided by N before they are summed: of two streams far apart the sums alone can be out of range.
        roots = _constant(2 * divisor * _root(eps, y.dtype), y.dtype)
        slope = torch.add(roots, magnitude, alpha=2 * divisor)
        alpha = 1.0
    dz = torch.div(grad, slope, out=slope)
    _where_positive(dz, magnitude, 0.0, grad_input=dz)
    if b is None:
        _, place, _ = triangle_indices(a.shape[1], a.device)
        dz = dz.gather(1, place.expand(len(a), -1))
    dz = dz.unflatten(1, (a.shape[1], -1))
    if pool == 'max':
        for out, x in zip(outs, maximum.gradients(dz, a, b)):
            torch.mul(x, alpha, out=out)
        return
    torch.baddbmm(outs[0], dz, a if b is None else b, beta=0, alpha=alpha, out=outs[0])
    if b is not None:
        torch.baddbmm(outs[1], dz.transpose(1, 2), a, beta=0, alpha=alpha, out=outs[1])


def _groups(batch: int, size: int) -> Iterator[slice]:
    """The images of a batch in groups, of descriptors of `size` entries."""
    images = max(1, _GROUP // size)
    return (slice(start, min(start + images, batch)) for start in range(0, batch, images))


def _take(x: torch.Tensor, images: slice) -> torch.Tensor:
    return x if images.stop - images.start == len(x) else x[images]


def _load(x: Optional[torch.Tensor], images: slice, scale: float = 1.0) -> Optional[torch.Tensor]:
    """Features of some images, contiguous and in the compute dtype."""
    if x is None:
        return None
    x = _take(x, images).to(compute_dtype(x.dtype)).contiguous()
    return x if scale == 1.0 else x / scale


def _largest(x: torch.Tensor, i: int) -> float:
    return x[i].abs().amax().item() or 1.0


def forward(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised descriptors.

    Args:
        a: (B, Ca, N) features, any strides, any floating-point dtype.
        b: (B, Cb, N) features of the second stream, or None for the symmetric, packed case.
        pool: 'avg', 'sum' or 'max'.
        eps: Offset under the root.

    Returns:
        Tuple, in the compute dtype: y (B, D); its norms (B,), at least 1e-12; scale (B, 2), 1 but where features are
        too large to be multiplied: those of a and b were divided by it, and so y by the root of its product.
    """
    batch, channels, _ = a.shape
    size = packed_size(channels) if b is None else channels * b.shape[1]
    y = memory.empty((batch, size), compute_dtype(a.dtype))
    scale = y.new_ones(batch, 2)
    for images in _groups(batch, size):
        _describe(_load(a, images), _load(b, images), pool, eps, _take(y, images))
    norm = torch.linalg.vector_norm(y, dim=1)
    for i in [] if math.isfinite(norm.sum().item()) else torch.nonzero(~norm.isfinite()).flatten().tolist():
        largest = [_largest(x, i) for x in (a, b) if x is not None]
        if not all(map(math.isfinite, largest)):
            y[i] = norm[i] = math.nan
            continue
        scale[i, 0], scale[i, 1] = largest[0], largest[-1]
        (s, t), image = scale[i].tolist(), slice(i, i + 1)
        _describe(_load(a, image, s), _load(b, image, t), pool, eps / s / t, y[image])
        norm[i] = torch.linalg.vector_norm(y[i])
    return y, norm.clamp_min_(1e-12), scale


def _divide(x: torch.Tensor, scale: float, out: torch.Tensor):
    """Write x / scale to out, as large as its dtype holds.

    Of tiny features float16 cannot hold the gradient, nor any dtype if those of the other stream are huge.
    """
    largest = torch.finfo(out.dtype).max
    out.copy_((x / scale).clamp_(-largest, largest))


def _rescale_gradients(
    grad: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    pool: str,
    eps: float,
    outs: List[torch.Tensor],
):
    """What `_gradients` does, for two streams so far apart that it overflows on the way: each is divided first."""
    for i in range(len(a)):
        s, t = _largest(a, i), _largest(b, i)
        if not (math.isfinite(s) and math.isfinite(t) and grad[i].isfinite().all()):
            continue  # what is not finite from the start is told on
        image, root = slice(i, i + 1), (s * t) ** 0.5
        scaled = [torch.empty_like(x[image]) for x in (a, b)]
        features = (_load(a, image, s), _load(b, image, t))
        _gradients(grad[image] * root, y[image] / root, *features, pool, eps / s / t, scaled)
        for out, x, r in zip(outs, scaled, (s, t)):
            _divide(x, r, out[image])


def backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> List[torch.Tensor]:
    """Gradients of the features from that of the unnormalised descriptors.

    Args:
        grad: (B, D), compute dtype.
        y, scale: As `forward` returned them.
        a, b, pool, eps: As `forward` took them.

    Returns:
        Gradients of a and, if there is one, of b, in their dtype and layout.
    """
    features = [x for x in (a, b) if x is not None]
    grads = [memory.empty_like(x) for x in features]
    is_scaled = bool((scale != 1).any())
    dtype = compute_dtype(a.dtype)
    for images in _groups(len(a), _GROUP if is_scaled else y.shape[1]):  # those of other scales one by one
        s, t = scale[images.start].tolist() if is_scaled else (1.0, 1.0)
        a_, b_ = _load(a, images, s), _load(b, images, t)
        outs = [_take(x, images) for x in grads]
        direct = not is_scaled and all(x.dtype == dtype and x.is_contiguous() for x in outs)
        computed = outs if direct else [torch.empty_like(x) for x in (a_, b_) if x is not None]
        _gradients(_take(grad, images), _take(y, images), a_, b_, pool, eps / s / t, computed)
        if b is not None and not is_scaled and not all(math.isfinite(x.sum().item()) for x in computed):
            _rescale_gradients(grad[images], y[images], a_, b_, pool, eps, computed)
        if not direct:
            for out, x, r in zip(outs, computed, (s, t)):
                _divide(x, r, out)
    return grads


def classify(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, K) in the dtype of a; scores, which are logits before the bias; then what `forward` returns."""
    y, norm, scale = forward(a, b, pool, eps)
    weight = weight.to(y.dtype)
    if max(weight.numel(), y.numel()) < _LARGE:
        scores = torch.mm(y, weight.t()).div_(norm.unsqueeze(1))
    else:  # the weight is by far the larger operand, and fastest where oneDNN takes it as the input
        scores = linear(weight, y).t().div(norm.unsqueeze(1)).contiguous()
    logits = scores.clone() if bias is None else scores + bias
    return logits.to(a.dtype), scores, y, norm, scale


def classify_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    y: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    pool: str,
    eps: float,
    need_features: bool,
    need_weight: bool,
    save_memory: bool,
    weight_dtype: torch.dtype,
) -> List[torch.Tensor]:
    """Gradients of a and b, if needed, then of the weight, if needed, from that of the logits, grad (B, K).

    The weight's is in `weight_dtype`. `save_memory` changes nothing: there is no more than a group of images takes.
    """
    grads = []
    grad_by_norm = grad / norm.unsqueeze(1)
    if need_features:
        grad_y = linear(grad_by_norm, weight.to(y.dtype).t())
        # The norm's part; where the norm was clamped it is a constant.
        along = torch.where(norm > 1e-12, (grad_by_norm * scores).sum(1) / norm, 0.0)
        grad_y.addcmul_(y, along.unsqueeze(1), value=-1)
        grads += backward(grad_y, y, scale, a, b, pool, eps)
        del grad_y
    if need_weight:
        grad_weight = memory.empty(weight.shape, y.dtype)
        grads.append(torch.mm(grad_by_norm.t(), y, out=grad_weight).to(weight_dtype))
    return grads
