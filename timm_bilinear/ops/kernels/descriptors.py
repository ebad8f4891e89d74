"""Triton kernels of the forward pass: descriptor tiles with their sums of squares, norms, and logits."""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from ..packing import packed_size
from .maximum import CONFIG as MAX
from .maximum import max_tile
from .tiles import (
    Config,
    count_tiles,
    dot,
    fours,
    in_range,
    is_in_fours,
    is_wide,
    largest,
    power_of_two,
    precision,
    store_descriptor,
    tile_of,
    widened,
)

__all__ = ['descriptors', 'fill_logits']

# Channels x channels, locations per step. Small tiles are for batches too small to fill the GPU.
# Two blocks of 128 registers a thread fit a processor, so that one multiplies while the other takes roots and stores.
HALF = Config(128, 128, 64, num_warps=8, num_stages=3, maxnreg=128)
HALF_SMALL = Config(32, 32, 64, num_warps=4, num_stages=4)
FLOAT = Config(64, 64, 32, num_warps=8, num_stages=3)
FLOAT_SMALL = Config(32, 32, 32, num_warps=4, num_stages=3)


@triton.jit
def _product_tile(
    a_ptr,
    b_ptr,
    row,
    col,
    channels_a,
    channels_b,
    locations,
    stride_ac,
    stride_an,
    stride_bc,
    stride_bn,
    inverse_a,
    inverse_b,
    ONCE: tl.constexpr,
    SCALED: tl.constexpr,
    MAX: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tile (row, col) of an image's A B^T, or its largest products.

    ONCE: on the diagonal b is a, and loaded once. SCALED: of features times their inverses.
    """
    i = row * BLOCK_I + tl.arange(0, BLOCK_I)
    j = col * BLOCK_J + tl.arange(0, BLOCK_J)
    if MAX:
        z, _ = max_tile(
            a_ptr,
            b_ptr,
            widened(i, WIDE),
            widened(j, WIDE),
            channels_a,
            channels_b,
            locations,
            stride_ac,
            stride_an,
            stride_bc,
            stride_bn,
            inverse_a,
            inverse_b,
            BLOCK_I,
            BLOCK_J,
        )
    else:
        n = tl.arange(0, BLOCK_N)
        if not WIDE:
            a_ptrs = a_ptr + i[:, None] * stride_ac + n[None, :] * stride_an
            b_ptrs = b_ptr + n[:, None] * stride_bn + j[None, :] * stride_bc
        z = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        if ONCE and row == col:
            for n0 in range(0, locations, BLOCK_N):  # on the diagonal both are the same channels, loaded once
                a = tl.load(a_ptrs, mask=(i < channels_a)[:, None] & (n0 + n < locations)[None, :], other=0.0)
                z = dot(a, tl.trans(a), z, PRECISION)
                a_ptrs += BLOCK_N * stride_an
        else:
            for n0 in range(0, locations, BLOCK_N):
                keep = n0 + n < locations
                if WIDE:  # pointers of 64-bit offsets, kept from step to step, would take too many registers
                    n_ = widened(n0 + n, WIDE)
                    a_ptrs = a_ptr + widened(i, WIDE)[:, None] * stride_ac + n_[None, :] * stride_an
                    b_ptrs = b_ptr + n_[:, None] * stride_bn + widened(j, WIDE)[None, :] * stride_bc
                a = tl.load(a_ptrs, mask=(i < channels_a)[:, None] & keep[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=keep[:, None] & (j < channels_b)[None, :], other=0.0)
                if SCALED:
                    a = (a * inverse_a).to(a.dtype)
                    b = (b * inverse_b).to(b.dtype)
                z = dot(a, b, z, PRECISION)
                if not WIDE:
                    a_ptrs += BLOCK_N * stride_an
                    b_ptrs += BLOCK_N * stride_bn
    return z, i, j


@triton.jit
def _forward_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    partial_ptr,
    channels_a,
    channels_b,
    locations,
    size,
    tiles,
    columns,
    stride_ab,
    stride_ac,
    stride_an,
    stride_bb,
    stride_bc,
    stride_bn,
    inverse_divisor,
    eps,
    SYMMETRIC: tl.constexpr,
    ONCE: tl.constexpr,
    MAX: tl.constexpr,
    WIDE: tl.constexpr,
    FOURS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of an image's descriptor, and the sum of its squares."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    stride_ab = fours(stride_ab, FOURS)
    stride_ac = fours(stride_ac, FOURS)
    stride_bb = fours(stride_bb, FOURS)
    stride_bc = fours(stride_bc, FOURS)
    locations = fours(locations, FOURS)
    row, col = tile_of(tile, columns, SYMMETRIC)
    z, i, j = _product_tile(
        a_ptr + image * stride_ab,
        b_ptr + image * stride_bb,
        row,
        col,
        channels_a,
        channels_b,
        locations,
        stride_ac,
        stride_an,
        stride_bc,
        stride_bn,
        1.0,
        1.0,
        ONCE,
        False,
        MAX,
        WIDE,
        PRECISION,
        BLOCK_I,
        BLOCK_J,
        BLOCK_N,
    )
    z = z * inverse_divisor
    squares = store_descriptor(z, i, j, row * BLOCK_I, y_ptr + image * size, channels_a, channels_b, eps, SYMMETRIC)
    tl.store(partial_ptr + image * tiles + tile, squares)


@triton.jit
def _norm_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    partial_ptr,
    norm_ptr,
    scale_ptr,
    channels_a,
    channels_b,
    locations,
    size,
    tiles,
    columns,
    stride_ab,
    stride_ac,
    stride_an,
    stride_bb,
    stride_bc,
    stride_bn,
    inverse_divisor,
    eps,
    SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr,
    MAX: tl.constexpr,
    WIDE: tl.constexpr,
    FOURS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Norm of an image's descriptor; where the first pass left the range, all of it again, of scaled features."""
    image = tl.program_id(0).to(tl.int64)
    stride_ab = fours(stride_ab, FOURS)
    stride_ac = fours(stride_ac, FOURS)
    stride_bb = fours(stride_bb, FOURS)
    stride_bc = fours(stride_bc, FOURS)
    locations = fours(locations, FOURS)
    a_ptr += image * stride_ab
    b_ptr += image * stride_bb
    y_ptr += image * size
    scale_a = 1.0
    scale_b = 1.0
    squares, good = in_range(partial_ptr + image * tiles, tiles, size, HALF)
    if not good:
        inverse_a = 1.0
        inverse_b = 1.0
        factor = inverse_divisor
        if HALF:
            scale_a = power_of_two(tl.sqrt(squares / size))
            scale_b = scale_a
            factor = factor / scale_a / scale_b
        else:
            scale_a = power_of_two(largest(a_ptr, channels_a, locations, stride_ac, stride_an, WIDE, BLOCK_I, BLOCK_N))
            if SYMMETRIC:
                scale_b = scale_a
            else:
                scale_b = largest(b_ptr, channels_b, locations, stride_bc, stride_bn, WIDE, BLOCK_J, BLOCK_N)
                scale_b = power_of_two(scale_b)
            inverse_a = 1.0 / scale_a
            inverse_b = 1.0 / scale_b
        eps = tl.maximum(eps / scale_a / scale_b, 1e-30)
        squares = 0.0
        for tile in range(0, tiles):
            row, col = tile_of(tile, columns, SYMMETRIC)
            z, i, j = _product_tile(
                a_ptr,
                b_ptr,
                row,
                col,
                channels_a,
                channels_b,
                locations,
                stride_ac,
                stride_an,
                stride_bc,
                stride_bn,
                inverse_a,
                inverse_b,
                False,
                not HALF,
                MAX,
                WIDE,
                PRECISION,
                BLOCK_I,
                BLOCK_J,
                BLOCK_N,
            )
            squares += store_descriptor(z * factor, i, j, row * BLOCK_I, y_ptr, channels_a, channels_b, eps, SYMMETRIC)
    tl.store(scale_ptr + 2 * image, scale_a)
    tl.store(scale_ptr + 2 * image + 1, scale_b)
    norm = tl.sqrt(squares)
    tl.store(norm_ptr + image, tl.where(norm < 1e-12, 1e-12, norm))  # tl.maximum would drop a nan


@triton.jit
def _logit_kernel(
    norm_ptr,
    scores_ptr,
    bias_ptr,
    logits_ptr,
    classes,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of an image, divided by its norm in place, and logits = scores + bias."""
    image = tl.program_id(0).to(tl.int64)
    norm = tl.load(norm_ptr + image)
    k = tl.arange(0, BLOCK)
    for k0 in range(0, classes, BLOCK):
        keep = k0 + k < classes
        place = image * classes + k0 + k
        score = tl.load(scores_ptr + place, mask=keep) / norm
        tl.store(scores_ptr + place, score, mask=keep)
        if BIAS:
            score += tl.load(bias_ptr + k0 + k, mask=keep).to(tl.float32)
        tl.store(logits_ptr + place, score.to(logits_ptr.dtype.element_ty), mask=keep)


def _is_small(programs: int, device: torch.device) -> bool:
    """Whether so few programs leave processors of the GPU idle."""
    return programs < (torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 0)


def _long_rows(x: torch.Tensor) -> torch.Tensor:
    """Features (B, C, N) in rows of a multiple of 16 locations, of which those that are new are 0 and add nothing.

    What does not start at a multiple of four is loaded one by one, which takes longer than to copy it.
    """
    rows = x.new_zeros(*x.shape[:2], -(-x.shape[2] // 16) * 16)
    rows[:, :, : x.shape[2]] = x
    return rows


def descriptors(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
    dtype: torch.dtype,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised descriptors y (B, D) in a dtype, their norms (B,), scale (B, 2)."""
    batch, channels, locations = a.shape
    channels_b = None if b is None else b.shape[1]
    config, small = (FLOAT, FLOAT_SMALL) if a.dtype == torch.float32 else (HALF, HALF_SMALL)
    if pool == 'max':
        config = small = MAX
    tiles, columns = count_tiles(channels, channels_b, config)
    if _is_small(batch * tiles, a.device):
        config = small
        tiles, columns = count_tiles(channels, channels_b, config)
    size = packed_size(channels) if b is None else channels * channels_b
    x = a if b is None else b
    divisor = locations if pool == 'avg' else 1
    wide = is_wide(a, b)
    in_fours = is_in_fours(a) and is_in_fours(x)
    aligned = in_fours or all(stride == 1 or stride % 16 == 0 for stride in (*a.stride(), *x.stride()))
    if not aligned and not wide and pool != 'max':
        a = _long_rows(a)
        x = a if b is None else _long_rows(b)
        locations, aligned = a.shape[2], True
    y = a.new_empty(batch, size, dtype=dtype)
    partial = a.new_empty(batch, tiles, dtype=torch.float32)
    norm, scale = (a.new_empty(*shape, dtype=torch.float32) for shape in ((batch,), (batch, 2)))
    arguments = (
        channels,
        x.shape[1],
        locations,
        size,
        tiles,
        columns,
        *a.stride(),
        *x.stride(),
        1 / divisor,
        max(eps, 1e-30),
    )
    options = dict(
        SYMMETRIC=b is None,
        MAX=pool == 'max',
        WIDE=wide,
        FOURS=in_fours,
        PRECISION=precision(a.dtype),
        BLOCK_I=config.block_i,
        BLOCK_J=config.block_j,
        BLOCK_N=config.block_n if aligned else config.block_n // 2,
        num_warps=config.num_warps,
    )
    # read by channel, in channels_last, the one copy would not be asynchronous
    once = b is None and not wide and a.stride(2) == 1
    _forward_kernel[(batch * tiles,)](a, x, y, partial, *arguments, **options, ONCE=once, num_stages=config.num_stages)
    _norm_kernel[(batch,)](
        a, x, y, partial, norm, scale, *arguments, **options, HALF=a.dtype == torch.float16, num_stages=1
    )
    return y, norm, scale


def fill_logits(norm: torch.Tensor, scores: torch.Tensor, bias: Optional[torch.Tensor], logits: torch.Tensor):
    """Divide scores (B, K) by norms (B,) and fill logits (B, K)."""
    batch, classes = scores.shape
    _logit_kernel[(batch,)](norm, scores, bias, logits, classes, BIAS=bias is not None, BLOCK=1024)
