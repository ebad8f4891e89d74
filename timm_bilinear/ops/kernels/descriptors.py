"""Triton kernels of the forward pass: descriptor tiles with their sums of squares, then norms and logits."""

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

__all__ = ['descriptors', 'norms']

# Channels x channels, locations per step. Small tiles are for batches too small to fill the GPU.
HALF = Config(128, 128, 64, num_warps=8, num_stages=3)
HALF_SMALL = Config(32, 32, 64, num_warps=4, num_stages=4)
FLOAT = Config(64, 64, 32, num_warps=8, num_stages=3)
FLOAT_SMALL = Config(32, 32, 32, num_warps=4, num_stages=3)


@triton.jit
def _forward_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    first_ptr,
    second_ptr,
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
    AGAIN: tl.constexpr,
    HALF: tl.constexpr,
    MAX: tl.constexpr,
    WIDE: tl.constexpr,
    FOURS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Descriptor tiles; sums of squares to the first table, or AGAIN, from the first, to the second."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    stride_ab = fours(stride_ab, FOURS)
    stride_ac = fours(stride_ac, FOURS)
    stride_bb = fours(stride_bb, FOURS)
    stride_bc = fours(stride_bc, FOURS)
    locations = fours(locations, FOURS)
    a_ptr += image * stride_ab
    b_ptr += image * stride_bb
    y_ptr += image * size
    first_ptr += image * tiles
    second_ptr += image * tiles
    scale_a = 1.0
    scale_b = 1.0
    if AGAIN:
        squares, good = in_range(first_ptr, tiles, size, HALF)
        if good:
            tl.store(second_ptr + tile, tl.load(first_ptr + tile))
            tl.store(scale_ptr + 2 * image, 1.0)
            tl.store(scale_ptr + 2 * image + 1, 1.0)
            return
        if HALF:
            scale_a = power_of_two(tl.sqrt(squares / size))
            scale_b = scale_a
        else:
            scale_a = power_of_two(largest(a_ptr, channels_a, locations, stride_ac, stride_an, WIDE, BLOCK_I, BLOCK_N))
            if SYMMETRIC:
                scale_b = scale_a
            else:
                scale_b = largest(b_ptr, channels_b, locations, stride_bc, stride_bn, WIDE, BLOCK_J, BLOCK_N)
                scale_b = power_of_two(scale_b)
        tl.store(scale_ptr + 2 * image, scale_a)
        tl.store(scale_ptr + 2 * image + 1, scale_b)
        eps = tl.maximum(eps / scale_a / scale_b, 1e-30)

    row, col = tile_of(tile, columns, SYMMETRIC)
    i = row * BLOCK_I + tl.arange(0, BLOCK_I)
    j = col * BLOCK_J + tl.arange(0, BLOCK_J)
    inverse_a = 1.0
    inverse_b = 1.0
    if AGAIN and not HALF:
        inverse_a = 1.0 / scale_a
        inverse_b = 1.0 / scale_b
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
        for n0 in range(0, locations, BLOCK_N):
            keep = n0 + n < locations
            if WIDE:  # pointers of 64-bit offsets, kept from step to step, would take too many registers
                n_ = widened(n0 + n, WIDE)
                a_ptrs = a_ptr + widened(i, WIDE)[:, None] * stride_ac + n_[None, :] * stride_an
                b_ptrs = b_ptr + n_[:, None] * stride_bn + widened(j, WIDE)[None, :] * stride_bc
            a = tl.load(a_ptrs, mask=(i < channels_a)[:, None] & keep[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=keep[:, None] & (j < channels_b)[None, :], other=0.0)
            if AGAIN and not HALF:
                a = (a * inverse_a).to(a.dtype)
                b = (b * inverse_b).to(b.dtype)
            z = dot(a, b, z, PRECISION)
            if not WIDE:
                a_ptrs += BLOCK_N * stride_an
                b_ptrs += BLOCK_N * stride_bn
    z = z * inverse_divisor
    if AGAIN and HALF:
        z = z / scale_a / scale_b
    if AGAIN:
        first_ptr = second_ptr
    store_descriptor(z, i, j, row * BLOCK_I, y_ptr, first_ptr + tile, channels_a, channels_b, eps, SYMMETRIC)


@triton.jit
def _norm_kernel(
    partial_ptr,
    norm_ptr,
    scores_ptr,
    bias_ptr,
    logits_ptr,
    tiles,
    classes,
    CLASSIFY: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm of an image's descriptor; its scores, divided by it in place, and logits = scores + bias."""
    image = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    squares = 0.0
    for t0 in range(0, tiles, BLOCK):
        squares += tl.sum(tl.load(partial_ptr + image * tiles + t0 + t, mask=t0 + t < tiles, other=0.0))
    norm = tl.sqrt(squares)
    norm = tl.where(norm < 1e-12, 1e-12, norm)  # tl.maximum would drop a nan
    tl.store(norm_ptr + image, norm)
    if CLASSIFY:
        for k0 in range(0, classes, BLOCK):
            keep = k0 + t < classes
            place = image * classes + k0 + t
            score = tl.load(scores_ptr + place, mask=keep) / norm
            tl.store(scores_ptr + place, score, mask=keep)
            if BIAS:
                score += tl.load(bias_ptr + k0 + t, mask=keep).to(tl.float32)
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
    """Unnormalised descriptors y (B, D) in a dtype, partial sums of their squares (B, tiles), scale (B, 2)."""
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
    first, second = a.new_empty(2, batch, tiles, dtype=torch.float32)
    scale = a.new_empty(batch, 2, dtype=torch.float32)
    for again in (False, True):
        _forward_kernel[(batch * tiles,)](
            a,
            x,
            y,
            first,
            second,
            scale,
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
            SYMMETRIC=b is None,
            AGAIN=again,
            HALF=a.dtype == torch.float16,
            MAX=pool == 'max',
            WIDE=wide,
            FOURS=in_fours,
            PRECISION=precision(a.dtype),
            BLOCK_I=config.block_i,
            BLOCK_J=config.block_j,
            BLOCK_N=config.block_n if aligned else config.block_n // 2,
            num_warps=config.num_warps,
            num_stages=1 if again else config.num_stages,
        )
    return y, second, scale


def norms(
    partial: torch.Tensor,
    scores: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    logits: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Norms (B,) from partial sums of squares (B, tiles); divides scores (B, K) by them and fills logits (B, K)."""
    batch, tiles = partial.shape
    norm = partial.new_empty(batch)
    _norm_kernel[(batch,)](
        partial,
        norm,
        scores,
        bias,
        logits,
        tiles,
        0 if scores is None else scores.shape[1],
        CLASSIFY=scores is not None,
        BIAS=bias is not None,
        BLOCK=1024,
    )
    return norm
