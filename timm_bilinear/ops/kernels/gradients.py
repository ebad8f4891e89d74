"""Triton kernels of the backward pass: slopes dZ from u and Y, written out for a GEMM or formed inside a product."""

from typing import List, Optional, Tuple

import torch
import triton
import triton.language as tl

from .maximum import CONFIG as MAX
from .maximum import max_backward_kernel, max_locations
from .slopes import write_slopes
from .tiles import Config, dot, fours, is_in_fours, is_wide, packed_place, precision, slope, widened

__all__ = ['feature_gradients', 'logit_gradients']

# Rows x channels per step, locations.
HALF = Config(128, 32, 128, num_warps=8, num_stages=2)
FLOAT = Config(64, 32, 64, num_warps=8, num_stages=2)
_DENSE_BYTES = 2**26  # of slopes that are there at a time


@triton.jit
def _logit_gradient_kernel(
    grad_ptr,
    scores_ptr,
    norm_ptr,
    scale_ptr,
    u_grad_ptr,
    w_grad_ptr,
    coefficients_ptr,
    classes,
    stride_gb,
    stride_gk,
    w_factor,
    z_factor,
    eps,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What backward needs of an image's gradient g of the logits.

    dY = r (u - z (z.u)) with r = 1 / ||Y||, u = W^T g and z.u = scores.g. u is computed for g divided by its largest
    entry, which no dtype overflows on: dY = c1 u - c2 Y. The weight's gradient takes r g, times `w_factor`.
    """
    image = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, classes, BLOCK):
        keep = k0 + k < classes
        g = tl.load(grad_ptr + image * stride_gb + (k0 + k) * stride_gk, mask=keep, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(g))
        along += g * tl.load(scores_ptr + image * classes + k0 + k, mask=keep, other=0.0)
    peak = tl.max(largest)
    peak = tl.where(peak == 0.0, 1.0, peak)
    norm = tl.load(norm_ptr + image)
    r = 1.0 / norm
    if HALF:
        r = tl.where(norm <= 1e-12, 0.0, r)  # all-zero images alone, which have no gradient
    for k0 in range(0, classes, BLOCK):
        keep = k0 + k < classes
        g = tl.load(grad_ptr + image * stride_gb + (k0 + k) * stride_gk, mask=keep, other=0.0).to(tl.float32)
        place = image * classes + k0 + k
        tl.store(u_grad_ptr + place, (g / peak).to(u_grad_ptr.dtype.element_ty), mask=keep)
        tl.store(w_grad_ptr + place, (g * (r * w_factor)).to(w_grad_ptr.dtype.element_ty), mask=keep)
    scale = tl.load(scale_ptr + 2 * image)
    eps = tl.maximum(eps / scale / tl.load(scale_ptr + 2 * image + 1), 1e-30)
    tl.store(coefficients_ptr + 3 * image, peak * r * z_factor)
    # where the norm was clamped it is a constant
    tl.store(coefficients_ptr + 3 * image + 1, tl.where(norm <= 1e-12, 0.0, tl.sum(along) * r * r * z_factor))
    tl.store(coefficients_ptr + 3 * image + 2, tl.sqrt(eps))


@triton.jit
def _is_good(scale_ptr, peak_ptr, out, tiles, HALF: tl.constexpr):
    """Whether an image's features were in range, and in HALF its slopes and a tile of its gradient, `out`."""
    good = (tl.load(scale_ptr) == 1.0) & (tl.load(scale_ptr + 1) == 1.0)
    if HALF:
        t = tl.arange(0, 128)
        peak = 0.0
        for t0 in range(0, tiles, 128):
            peak = tl.maximum(peak, tl.max(tl.load(peak_ptr + t0 + t, mask=t0 + t < tiles, other=0.0)))
        good = good & ((peak == 0.0) | (peak >= 0.00390625))  # below, float16 has few bits left for the others
        # neither inf nor nan: a slope that float16 cannot hold, or a sum
        good = good & (tl.max((tl.abs(out.to(tl.float32)) <= 65504.0).to(tl.int32) ^ 1) == 0)
    return good


@triton.jit
def _backward_kernel(
    u_ptr,
    y_ptr,
    coefficients_ptr,
    scale_ptr,
    x_ptr,
    out_ptr,
    peak_ptr,
    channels,
    channels_x,
    locations,
    size,
    row_blocks,
    n_blocks,
    tiles,
    stride_i,
    stride_j,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_ob,
    stride_oc,
    stride_on,
    STREAM: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    AGAIN: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    FOURS: tl.constexpr,
    DOT: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of one stream's features, rows i, from the other's features x: sum_j dZ_ij x_j.

    Packed tiles below the diagonal are read as what they are in the triangle, transposed. AGAIN leaves those gradients
    as they are that a GEMM could compute.
    """
    stride_xb = fours(stride_xb, FOURS)
    stride_xc = fours(stride_xc, FOURS)
    locations = fours(locations, FOURS)
    tile = tl.program_id(0) % (row_blocks * n_blocks)
    image = (tl.program_id(0) // (row_blocks * n_blocks)).to(tl.int64)
    i0 = (tile // n_blocks) * BLOCK_I
    i = widened(i0 + tl.arange(0, BLOCK_I), WIDE)
    n = widened((tile % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)
    j_ = widened(tl.arange(0, BLOCK_J), WIDE)
    if AGAIN:
        computed = 0.0
        if HALF:
            out = out_ptr + image * stride_ob + i[:, None] * stride_oc + n[None, :] * stride_on
            computed = tl.load(out, mask=(i < channels)[:, None] & (n < locations)[None, :], other=0.0)
        if _is_good(scale_ptr + 2 * image, peak_ptr + image * tiles, computed, tiles, HALF):
            return
    u_ptr += image * size
    y_ptr += image * size
    x_ptr += image * stride_xb
    # Products of x, over its scale, stay in float32's range; the scale of the rows' features follows at the end.
    # bfloat16 goes to the tensor cores as it was loaded, so there it is dZ that is divided.
    scale = tl.load(scale_ptr + 2 * image + (1 - STREAM))
    inverse = 1.0 / scale
    if DOT == tl.float32:
        scale = 1.0
    c1 = tl.load(coefficients_ptr + 3 * image) / scale
    c2 = tl.load(coefficients_ptr + 3 * image + 1) / scale
    root = tl.load(coefficients_ptr + 3 * image + 2)
    acc = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    start = 0
    if SYMMETRIC:
        start = i0
        for j0 in range(0, i0, BLOCK_J):
            j = j0 + j_
            keep = (j < channels)[:, None] & (i < channels)[None, :]
            place = packed_place(j[:, None], i[None, :], channels)
            u = tl.load(u_ptr + place, mask=keep, other=0.0)
            y = tl.load(y_ptr + place, mask=keep, other=0.0)
            dz = tl.trans(slope(u, y, j[:, None], i[None, :], c1, c2, root, SYMMETRIC).to(DOT))
            x_keep = (j < channels_x)[:, None] & (n < locations)[None, :]
            x = tl.load(x_ptr + j[:, None] * stride_xc + n[None, :] * stride_xn, mask=x_keep, other=0.0).to(DOT)
            if DOT == tl.float32:
                x = x * inverse
            acc = dot(dz, x, acc, PRECISION)
    for j0 in range(start, channels_x, BLOCK_J):
        j = j0 + j_
        keep = (i < channels)[:, None] & (j < channels_x)[None, :]
        if SYMMETRIC:
            low = tl.minimum(i[:, None], j[None, :])
            place = packed_place(low, tl.maximum(i[:, None], j[None, :]), channels)
        else:
            place = i[:, None] * stride_i + (j * stride_j)[None, :]
        u = tl.load(u_ptr + place, mask=keep, other=0.0)
        y = tl.load(y_ptr + place, mask=keep, other=0.0)
        dz = slope(u, y, i[:, None], j[None, :], c1, c2, root, SYMMETRIC).to(DOT)
        x_keep = (j < channels_x)[:, None] & (n < locations)[None, :]
        x = tl.load(x_ptr + j[:, None] * stride_xc + n[None, :] * stride_xn, mask=x_keep, other=0.0).to(DOT)
        if DOT == tl.float32:
            x = x * inverse
        acc = dot(dz, x, acc, PRECISION)
    acc = acc / tl.load(scale_ptr + 2 * image + STREAM)
    acc = tl.clamp(acc, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    out = out_ptr + image * stride_ob + i[:, None] * stride_oc + n[None, :] * stride_on
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(i < channels)[:, None] & (n < locations)[None, :])


def _launch(like: torch.Tensor, config: Config) -> Tuple[int, int, dict]:
    """Blocks of rows and of locations of a gradient, and the kernels' constants."""
    row_blocks, n_blocks = triton.cdiv(like.shape[1], config.block_i), triton.cdiv(like.shape[2], config.block_n)
    constants = dict(
        LIMIT=torch.finfo(like.dtype).max,
        BLOCK_I=config.block_i,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return row_blocks, n_blocks, constants


def _is_dense(like: torch.Tensor, config: Config) -> bool:
    """Whether slopes are formed several times inside the product, and a GEMM is as exact as that product."""
    return like.shape[2] > config.block_n and (like.dtype != torch.float32 or precision(like.dtype) == 'tf32')


def feature_gradients(
    u: torch.Tensor,
    y: torch.Tensor,
    coefficients: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    save_memory: bool = False,
) -> List[torch.Tensor]:
    """Gradients of the features.

    Args:
        u: (B, D), dY = c1 u - c2 Y.
        y: (B, D) descriptors, dtype of the features.
        coefficients: (B, 3) float32: c1, c2, both with the constant factor of dZ, and the root of eps.
        scale: (B, 2) float32, divisors of the features.
        a, b, pool: As in forward.
        save_memory: Form slopes inside the product, once for every block of locations, and write none.

    Returns:
        Gradients of a and, if there is one, of b, in their dtype and layout; float16's are held in its range.
    """
    config = MAX if pool == 'max' else FLOAT if a.dtype == torch.float32 else HALF
    grads = [torch.empty_like(x) for x in (a, b) if x is not None]
    if pool == 'max' or save_memory or not _is_dense(a, config):
        location = max_locations(a, b, y, scale) if pool == 'max' else None
        _fused_gradients(grads, u, y, coefficients, scale, a, b, config, location, None)
        return grads
    images = max(1, _DENSE_BYTES // (a.shape[1] * (a if b is None else b).shape[1] * a.element_size()))
    for start in range(0, len(a), images):
        part = slice(start, start + images)
        u_, y_, coefficients_, scale_, a_ = (x[part] for x in (u, y, coefficients, scale, a))
        b_ = None if b is None else b[part]
        outs = [x[part] for x in grads]
        dz, peaks = write_slopes(u_, y_, coefficients_, a_, b_)
        torch.bmm(dz, a_ if b_ is None else b_, out=outs[0])
        if b_ is not None:
            torch.bmm(dz.transpose(1, 2), a_, out=outs[1])
        _fused_gradients(outs, u_, y_, coefficients_, scale_, a_, b_, config, None, peaks)
    return grads


def _fused_gradients(
    grads: List[torch.Tensor],
    u: torch.Tensor,
    y: torch.Tensor,
    coefficients: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    config: Config,
    location: Optional[torch.Tensor],
    peaks: Optional[torch.Tensor],
):
    """Write gradients of the features, slopes formed inside the product.

    Args:
        grads: Where they go.
        u, y, coefficients, scale, a, b: As for `feature_gradients`.
        config: Tile.
        location: Of each pair's largest product, for 'max'.
        peaks: The largest slope of each tile, (B, tiles), if a GEMM has computed what it can; else None.
    """
    for stream, (like, x, out) in enumerate([(a, a, *grads)] if b is None else zip((a, b), (b, a), grads)):
        row_blocks, n_blocks, constants = _launch(like, config)
        shape = (like.shape[1], x.shape[1], like.shape[2], y.shape[1], row_blocks, n_blocks)
        strides = (*((x.shape[1], 1) if stream == 0 else (1, like.shape[1])), *x.stride(), *out.stride())
        constants.update(STREAM=stream, SYMMETRIC=b is None, WIDE=is_wide(like, x, out))
        grid = (like.shape[0] * row_blocks * n_blocks,)
        if location is not None:
            max_backward_kernel[grid](u, y, coefficients, scale, location, x, out, *shape, *strides, **constants)
            continue
        _backward_kernel[grid](
            u,
            y,
            coefficients,
            scale,
            x,
            out,
            scale if peaks is None else peaks,
            *shape,
            0 if peaks is None else peaks.shape[1],
            *strides,
            AGAIN=peaks is not None,
            HALF=like.dtype == torch.float16,
            FOURS=is_in_fours(x),
            DOT=tl.bfloat16 if like.dtype == torch.bfloat16 else tl.float32,
            PRECISION=precision(like.dtype),
            BLOCK_J=config.block_j,
            **constants,
        )


def logit_gradients(
    grad: torch.Tensor,
    scores: torch.Tensor,
    y: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    w_factor: float,
    z_factor: float,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the other products of backward take of the gradient of the logits.

    Args:
        grad: (B, K).
        scores: (B, K) float32 logits before the bias.
        y, norm, scale: As forward returned them.
        w_factor: Factor of the second result.
        z_factor: Constant factor of dZ.
        eps: Offset under the root.

    Returns:
        Tuple: gradients divided by their image's largest, for u, (B, K); by the norm and times `w_factor`, for the
        weight, (B, K), both in the dtype of y; coefficients (B, 3) for `feature_gradients`.
    """
    batch, classes = grad.shape
    u_grad, w_grad = y.new_empty(2, batch, classes)
    coefficients = norm.new_empty(batch, 3)
    _logit_gradient_kernel[(batch,)](
        grad,
        scores,
        norm,
        scale,
        u_grad,
        w_grad,
        coefficients,
        classes,
        *grad.stride(),
        w_factor,
        z_factor,
        eps,
        HALF=y.dtype == torch.float16,
        BLOCK=1024,
    )
    return u_grad, w_grad, coefficients
