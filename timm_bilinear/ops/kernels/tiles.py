"""What the Triton kernels share: packed places, tiles, scales that keep products in range, slopes."""

import os
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    'Config',
    'dot',
    'in_range',
    'largest',
    'on_device_of',
    'packed_place',
    'power_of_two',
    'precision',
    'slope',
    'store_descriptor',
    'tile_of',
]

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers (3.9): there the product is of float32.
_WIDEN = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


class Config(NamedTuple):
    """Tile of a kernel: rows and columns of its product, depth of a step, and how Triton runs it."""

    block_i: int
    block_j: int
    block_n: int
    num_warps: int
    num_stages: int


def precision(dtype: torch.dtype) -> str:
    """Products of float32: TF32 where the user has allowed it, else three of them, which are as good as float32."""
    if dtype != torch.float32:
        return 'tf32'  # what float16 gradients take: its mantissa with the range of float32
    # not allow_tf32, which raises once the user has set this
    return 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'tf32x3'


def on_device_of(x: torch.Tensor):
    """Context in which kernels start on the device of x, not on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def packed_place(i, j, channels):
    """Place of (i, j), i <= j, in the packed triangle."""
    return i * (2 * channels - 1 - i) // 2 + j


@triton.jit
def tile_of(tile, columns, SYMMETRIC: tl.constexpr):
    """Row and column of a tile, counted along rows; symmetric: of tiles on or above the diagonal."""
    if SYMMETRIC:
        row = 0
        width = columns
        while tile >= width:
            tile -= width
            width -= 1
            row += 1
        col = row + tile
    else:
        row = tile // columns
        col = tile % columns
    return row, col


@triton.jit
def power_of_two(x):
    """Largest power of two that is not above x >= 0; within 2^-126 and 2^126, whose inverses are normal numbers too."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 0x00800000), 0x7E800000).to(tl.float32, bitcast=True)


@triton.jit
def largest(x_ptr, channels, locations, stride_c, stride_n, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Largest magnitude of one image's features."""
    c = tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    magnitude = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        for n0 in range(0, locations, BLOCK_N):
            keep = (c0 + c < channels)[:, None] & (n0 + n < locations)[None, :]
            x = tl.load(x_ptr + (c0 + c)[:, None] * stride_c + (n0 + n)[None, :] * stride_n, mask=keep, other=0.0)
            magnitude = tl.maximum(magnitude, tl.abs(x.to(tl.float32)))
    return tl.max(magnitude)


@triton.jit
def in_range(partial_ptr, tiles, size, HALF: tl.constexpr):
    """Sum of an image's partial sums of squares, and whether its descriptor was computed, and can be stored, safely."""
    t = tl.arange(0, 128)
    squares = 0.0
    for t0 in range(0, tiles, 128):
        squares += tl.sum(tl.load(partial_ptr + t0 + t, mask=t0 + t < tiles, other=0.0))
    if HALF:
        # Entries of root mean square 1/64 and more leave room for far smaller ones; none exceeds the norm.
        good = (squares == 0.0) | ((squares >= size / 4096.0) & (squares <= 1073741824.0))
    else:
        good = squares < 3.0e38  # neither inf nor nan
    return squares, good


@triton.jit
def store_descriptor(
    z,
    i,
    j,
    y_ptr,
    partial_ptr,
    channels_a,
    channels_b,
    eps,
    SYMMETRIC: tl.constexpr,
):
    """Signed square root of a tile of Z, packed and stored, and its sum of squares.

    Packed off-diagonals sqrt(2) Y are the same formula with 2 Z and 2 eps for Z and eps.
    """
    i = i[:, None]
    j = j[None, :]
    if SYMMETRIC:
        keep = (i <= j) & (j < channels_a)
        place = packed_place(i, j, channels_a)
        factor = tl.where(i == j, 1.0, 2.0)
    else:
        keep = (i < channels_a) & (j < channels_b)
        place = i * channels_b + j
        factor = 1.0
    z = z * factor
    eps = eps * factor
    y = z / (tl.sqrt(tl.abs(z) + eps) + tl.sqrt(eps))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(partial_ptr, tl.sum(tl.where(keep, y * y, 0.0)))


@triton.jit
def slope(u, y, i, j, c1, c2, root, SYMMETRIC: tl.constexpr):
    """Tile of dZ + dZ^T (symmetric) or dZ, 0 where Y is; the constants of both are in c1 and c2."""
    u = u.to(tl.float32)
    y = y.to(tl.float32)
    if SYMMETRIC:
        root = tl.where(i == j, root, root * 1.4142135623730951)
    dz = (c1 * u - c2 * y) / (tl.abs(y) + root)
    # eps can be so small against a huge image that slopes overflow
    dz = tl.clamp(dz, -1e30, 1e30, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(y == 0.0, 0.0, dz)
