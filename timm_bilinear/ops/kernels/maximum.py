"""Triton kernels of 'max' pooling: the largest product over the locations, no tensor cores, nothing of size C^2 N."""

from typing import Optional

import torch
import triton
import triton.language as tl

from ..packing import packed_size
from .tiles import Config, is_wide, packed_place, places, slope, tile_of, widened

__all__ = ['CONFIG', 'max_backward_kernel', 'max_locations', 'max_tile']

CONFIG = Config(32, 32, 64, num_warps=4, num_stages=1)


@triton.jit
def max_tile(
    a_ptr,
    b_ptr,
    i,
    j,
    channels_a,
    channels_b,
    locations,
    stride_ac,
    stride_an,
    stride_bc,
    stride_bn,
    inverse_a,
    inverse_b,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Largest product over the locations of one image's channels i and j, and the first location that has it."""
    a_ptrs = a_ptr + i * stride_ac
    b_ptrs = b_ptr + j * stride_bc
    best = tl.full((BLOCK_I, BLOCK_J), float('-inf'), tl.float32)
    location = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for n in range(0, locations):
        a = tl.load(a_ptrs, mask=i < channels_a, other=0.0).to(tl.float32) * inverse_a
        b = tl.load(b_ptrs, mask=j < channels_b, other=0.0).to(tl.float32) * inverse_b
        product = a[:, None] * b[None, :]
        better = (product > best) | (product != product)  # nan wins, and stays
        best = tl.where(better, product, best)
        location = tl.where(better, n, location)
        a_ptrs += stride_an
        b_ptrs += stride_bn
    return best, location


@triton.jit
def _max_location_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    location_ptr,
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
    SYMMETRIC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Location of the largest product of every channel pair, in the layout of the descriptor."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row, col = tile_of(tl.program_id(0) % tiles, columns, SYMMETRIC)
    i = row * BLOCK_I + tl.arange(0, BLOCK_I)
    j = col * BLOCK_J + tl.arange(0, BLOCK_J)
    _, location = max_tile(
        a_ptr + image * stride_ab,
        b_ptr + image * stride_bb,
        widened(i, WIDE),
        widened(j, WIDE),
        channels_a,
        channels_b,
        locations,
        stride_ac,
        stride_an,
        stride_bc,
        stride_bn,
        1.0 / tl.load(scale_ptr + 2 * image),
        1.0 / tl.load(scale_ptr + 2 * image + 1),
        BLOCK_I,
        BLOCK_J,
    )
    i = i[:, None]
    j = j[None, :]
    first, place = places(i, j, row * BLOCK_I, channels_a, channels_b, SYMMETRIC)
    if SYMMETRIC:
        keep = (i <= j) & (j < channels_a)
    else:
        keep = (i < channels_a) & (j < channels_b)
    tl.store(location_ptr + image * size + first + place, location, mask=keep)


def max_locations(a: torch.Tensor, b: Optional[torch.Tensor], y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Location of the largest product of every channel pair, (B, D) int32."""
    x = a if b is None else b
    rows, columns = triton.cdiv(a.shape[1], CONFIG.block_i), triton.cdiv(x.shape[1], CONFIG.block_j)
    tiles = packed_size(rows) if b is None else rows * columns
    location = torch.empty_like(y, dtype=torch.int32)
    _max_location_kernel[(a.shape[0] * tiles,)](
        a,
        x,
        scale,
        location,
        a.shape[1],
        x.shape[1],
        a.shape[2],
        y.shape[1],
        tiles,
        columns,
        *a.stride(),
        *x.stride(),
        SYMMETRIC=b is None,
        WIDE=is_wide(a, b),
        BLOCK_I=CONFIG.block_i,
        BLOCK_J=CONFIG.block_j,
        num_warps=CONFIG.num_warps,
    )
    return location


@triton.jit
def max_backward_kernel(
    u_ptr,
    y_ptr,
    coefficients_ptr,
    scale_ptr,
    location_ptr,
    x_ptr,
    out_ptr,
    channels,
    channels_x,
    locations,
    size,
    row_blocks,
    n_blocks,
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
    WIDE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`_backward_kernel` of 'max' pooling: each dZ_ij reaches the features at its location alone.

    Every program looks at all pairs of its rows and keeps what falls on its locations, so nothing is scattered.
    """
    tile = tl.program_id(0) % (row_blocks * n_blocks)
    image = (tl.program_id(0) // (row_blocks * n_blocks)).to(tl.int64)
    i = widened((tile // n_blocks) * BLOCK_I + tl.arange(0, BLOCK_I), WIDE)
    n = widened((tile % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)
    x_ptrs = x_ptr + image * stride_xb + n * stride_xn
    inverse = 1.0 / tl.load(scale_ptr + 2 * image + (1 - STREAM))
    c1 = tl.load(coefficients_ptr + 3 * image)
    c2 = tl.load(coefficients_ptr + 3 * image + 1)
    root = tl.load(coefficients_ptr + 3 * image + 2)
    acc = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for channel in range(0, channels_x):
        j = widened(channel, WIDE)
        if SYMMETRIC:
            place = packed_place(tl.minimum(i, j), tl.maximum(i, j), channels)
        else:
            place = i * stride_i + j * stride_j
        place += image * size
        u = tl.load(u_ptr + place, mask=i < channels, other=0.0)
        y = tl.load(y_ptr + place, mask=i < channels, other=0.0)
        location = tl.load(location_ptr + place, mask=i < channels, other=-1)
        dz = slope(u, y, i, j, c1, c2, root, SYMMETRIC)
        x = tl.load(x_ptrs, mask=n < locations, other=0.0).to(tl.float32) * inverse
        acc += tl.where(location[:, None] == n[None, :], dz[:, None] * x[None, :], 0.0)
        x_ptrs += stride_xc
    acc = acc / tl.load(scale_ptr + 2 * image + STREAM)
    acc = tl.clamp(acc, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    out = out_ptr + image * stride_ob + i[:, None] * stride_oc + n[None, :] * stride_on
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(i < channels)[:, None] & (n < locations)[None, :])
