"""The CPU path of average and sum pooling: from features to unnormalised packed descriptors, to logits, and back.

Image by image, so that everything between the features and the packed descriptor stays in the core's cache:

    forward     Z = A Bf^T / N               symmetric: blocks of rows right of the diagonal, gathered into place
                Y = sign(Z) (sqrt(|Z| + eps) - sqrt(eps))
    backward    dZ = dY / (2 (|Y| + sqrt(eps))), 0 where Y = 0
                dA = (dZ + dZ^T) A / N       symmetric
                dA = dZ Bf / N, dBf = dZ^T A / N

Packed off-diagonals are sqrt(2) Y = sqrt(2 |Z| + 2 eps) - sqrt(2 eps): the same formulas with 2 Z and 2 eps for Z and
eps. So the whole packed vector is treated as off-diagonal and the C entries of the diagonal are put right.
"""

import math
from functools import lru_cache
from typing import List, Optional, Tuple

import torch

from .._compat import mkldnn_linear
from .packing import packed_size, triangle_indices
from .reference import compute_dtype

__all__ = ['backward', 'classify', 'classify_backward', 'forward', 'linear']

# Rows of a block of the triangle: smaller ones skip more of the product, larger ones multiply faster.
_BLOCK = 128


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for 2-D tensors.

    In float32 by oneDNN, which uses AVX-512 on every vendor's cores; the BLAS behind torch.mm does not, and takes more
    than twice as long on AMD's.
    """
    if x.dtype == torch.float32 and mkldnn_linear is not None and torch.backends.mkldnn.enabled:
        return mkldnn_linear(x, weight, None, 'none', [], '')
    return x @ weight.t()


def _image(x: torch.Tensor, i: int, scale: float) -> torch.Tensor:
    """Features of image i as a contiguous (C, N) matrix in the compute dtype."""
    x = x[i].to(compute_dtype(x.dtype)).contiguous()
    return x / scale if scale != 1.0 else x


def _root(eps: float, dtype: torch.dtype) -> float:
    """sqrt(eps) exactly as the vectorised root gives it, so that sqrt(0 + eps) - sqrt(eps) is 0."""
    return torch.full((16,), eps, dtype=dtype).sqrt_()[0].item()


def _forward_image(a: torch.Tensor, b: Optional[torch.Tensor], y: torch.Tensor, divisor: float, eps: float):
    """Descriptor of one image, written to y (D,); a (Ca, N), b (Cb, N)."""
    if b is None:
        channels = a.shape[0]
        _, _, diagonal = triangle_indices(channels, a.device)
        start = 0
        for row in range(0, channels, _BLOCK):
            z = linear(a[row : row + _BLOCK], a[row:])
            end = start + packed_size(channels - row) - packed_size(max(0, channels - row - _BLOCK))
            torch.index_select(z.view(-1), 0, _block_index(channels, row, a.device), out=y[start:end])
            start = end
        factor = 2.0
    else:
        diagonal = None
        y.copy_(linear(a, b).view(-1))
        factor = 1.0
    root = _root(factor * eps, y.dtype)
    magnitude = y.abs().mul_(factor / divisor).add_(factor * eps).sqrt_().sub_(root)
    torch.copysign(magnitude, y, out=y)
    if diagonal is not None:
        # sqrt(z + eps) - sqrt(eps) is sqrt(2z + 2eps) - sqrt(2eps) over sqrt(2)
        y.index_copy_(0, diagonal, y[diagonal] * 0.5**0.5)


def _backward_image(
    grad: torch.Tensor,
    y: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    divisor: float,
    eps: float,
) -> Tuple[torch.Tensor, ...]:
    """Gradients of one image's features, (Ca, N) and (Cb, N), from that of its descriptor, grad (D,)."""
    if b is None:
        _, place, diagonal = triangle_indices(a.shape[0], a.device)
        slope = y.abs().add_(_root(2 * eps, y.dtype))
        # (dZ + dZ^T)_ii = 2 dY / (2 (Y + sqrt(eps)))
        slope.index_copy_(0, diagonal, y[diagonal].abs_().add_(_root(eps, y.dtype)))
        dz = torch.div(grad, slope, out=slope).masked_fill_(y == 0, 0).div_(divisor)
        dz = dz.index_select(0, place).view(a.shape[0], a.shape[0])
        return (linear(dz, a.t()),)
    slope = y.abs().add_(_root(eps, y.dtype)).mul_(2 * divisor)
    dz = torch.div(grad, slope, out=slope).masked_fill_(y == 0, 0).view(a.shape[0], b.shape[0])
    return linear(dz, b.t()), linear(dz.t(), a.t())


@lru_cache(maxsize=64)
def _block_index(channels: int, row: int, device: torch.device) -> torch.Tensor:
    """Places, in the flat product of a block of rows with all channels from `row` on, of its upper triangle."""
    with torch.inference_mode(False):
        height, width = min(_BLOCK, channels - row), channels - row
        i, j = torch.triu_indices(height, width, device=device)
        return i * width + j


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
        pool: 'avg' or 'sum'.
        eps: Offset under the root.

    Returns:
        Tuple, in the compute dtype: y (B, D); its norms (B,), at least 1e-12; scale (B, 2), 1 but where features are
        too large to be multiplied: those of a and b were divided by it, and so y by the root of its product.
    """
    batch, channels, locations = a.shape
    size = packed_size(channels) if b is None else channels * b.shape[1]
    y = a.new_empty(batch, size, dtype=compute_dtype(a.dtype))
    scale = y.new_ones(batch, 2)
    divisor = locations if pool == 'avg' else 1

    def one(i: int):
        s, t = scale[i].tolist()
        b_i = None if b is None else _image(b, i, t)
        _forward_image(_image(a, i, s), b_i, y[i], divisor, eps / s / t)

    for i in range(batch):
        one(i)
    norm = torch.linalg.vector_norm(y, dim=1)
    for i in torch.nonzero(~norm.isfinite()).flatten().tolist():
        largest = [_largest(x, i) for x in (a, b) if x is not None]
        if not all(map(math.isfinite, largest)):
            y[i] = norm[i] = math.nan
            continue
        scale[i, 0], scale[i, 1] = largest[0], largest[-1]
        one(i)
        norm[i] = torch.linalg.vector_norm(y[i])
    return y, norm.clamp_min_(1e-12), scale


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
    grads = [torch.empty_like(x) for x in (a, b) if x is not None]
    divisor = a.shape[2] if pool == 'avg' else 1
    for i, (s, t) in enumerate(scale.tolist()):
        b_i = None if b is None else _image(b, i, t)
        image_grads = _backward_image(grad[i], y[i], _image(a, i, s), b_i, divisor, eps / s / t)
        for out, image_grad, r in zip(grads, image_grads, (s, t)):
            if r != 1.0:
                image_grad = image_grad / r
            # of tiny features float16 cannot hold the gradient, nor any dtype if the other stream's are huge
            largest = torch.finfo(out.dtype).max
            out[i] = image_grad.clamp_(-largest, largest)
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
    # The weight is by far the larger operand, and fastest where oneDNN takes it as the input.
    scores = linear(weight.to(y.dtype), y).t().div(norm.unsqueeze(1)).contiguous()
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
) -> List[torch.Tensor]:
    """Gradients of a and b, if needed, then of the weight, if needed, from that of the logits, grad (B, K)."""
    grads = []
    grad_by_norm = grad / norm.unsqueeze(1)
    if need_features:
        grad_y = linear(grad_by_norm, weight.to(y.dtype).t())
        # The norm's part; where the norm was clamped it is a constant.
        along = torch.where(norm > 1e-12, (grad_by_norm * scores).sum(1) / norm, 0.0)
        for i, alpha in enumerate(along.tolist()):
            grad_y[i].sub_(y[i], alpha=alpha)
        grads += backward(grad_y, y, scale, a, b, pool, eps)
        del grad_y
    if need_weight:
        grads.append(torch.mm(grad_by_norm.t(), y).to(weight.dtype))
    return grads
