"""What the Triton kernels share: packed places, tiles, scales that keep products in range, slopes."""

import os
from contextlib import nullcontext
from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from ..packing import packed_size

__all__ = [
    'Config',
    'count_tiles',
    'dot',
    'fours',
    'in_range',
    'is_in_fours',
    'is_wide',
    'largest',
    'on_device_of',
    'packed_place',
    'places',
    'power_of_two',
    'precision',
    'slope',
    'store_descriptor',
    'tile_of',
    'widened',
]

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers (3.9): there the product is of float32.
_WIDEN = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


class Config(NamedTuple):
    """Tile of a kernel: rows and columns of its product, depth of a step, and how Triton runs it.

    `maxnreg` is the number of registers that a thread has at most.
    """

    block_i: int
    block_j: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: Optional[int] = None


def count_tiles(channels_a: int, channels_b: Optional[int], config: Config) -> Tuple[int, int]:
    """Number of tiles of an image's descriptor, and of columns of tiles."""
    rows = triton.cdiv(channels_a, config.block_i)
    columns = rows if channels_b is None else triton.cdiv(channels_b, config.block_j)
    return (packed_size(rows) if channels_b is None else rows * columns), columns


def precision(dtype: torch.dtype) -> str:
    """Products of float32: TF32 where the user has allowed it, else three of them, which are as good as float32."""
    if dtype != torch.float32:
        return 'tf32'  # what float16 gradients take: its mantissa with the range of float32
    # not allow_tf32, which raises once the user has set this
    return 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'tf32x3'


def is_in_fours(x: torch.Tensor) -> bool:
    """Whether features (B, C, N) lie in rows of locations whose starts and lengths are multiples of four.

    Then four of them are loaded at a time. Triton sees by itself that a number is a multiple of 16 alone.
    """
    return x.stride(2) == 1 and all(number % 4 == 0 for number in (x.stride(0), x.stride(1), x.shape[2]))


def is_wide(a: torch.Tensor, b: Optional[torch.Tensor], *gradients: torch.Tensor) -> bool:
    """Whether offsets within an image need 64 bits: those of its features, (B, C, N), or of its channel pairs."""
    x = a if b is None else b
    offsets = [(t.shape[1] - 1) * t.stride(1) + (t.shape[2] - 1) * t.stride(2) for t in (a, x, *gradients)]
    return max(a.shape[1] * x.shape[1], *offsets) >= 2**31


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
def fours(number, FOURS: tl.constexpr):
    """A number that is a multiple of four, so that the compiler knows it."""
    return number // 4 * 4 if FOURS else number


@triton.jit
def widened(index, WIDE: tl.constexpr):
    """An index, of 64 bits where its product with a stride may not fit in 32."""
    return tl.cast(index, tl.int64) if WIDE else index


@triton.jit
def packed_place(i, j, channels):
    """Place of (i, j), i <= j, in the packed triangle."""
    return i * (2 * channels - 1 - i) // 2 + j


@triton.jit
def places(i, j, row, channels_a, channels_b, SYMMETRIC: tl.constexpr):
    """Place of the first pair of channel `row`, of 64 bits, and from there those of (i, j), a few rows on, of 32."""
    row_ = tl.cast(row, tl.int64)
    if SYMMETRIC:
        first = packed_place(row_, row_, channels_a)
        place = packed_place(i - row, j - row, channels_a - row)  # what is below a row is a triangle too
    else:
        first = row_ * channels_b
        place = (i - row) * channels_b + j
    return first, place


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
def largest(
    x_ptr,
    channels,
    locations,
    stride_c,
    stride_n,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Largest magnitude of one image's features."""
    c = widened(tl.arange(0, BLOCK_C), WIDE)
    n = widened(tl.arange(0, BLOCK_N), WIDE)
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
    row,
    y_ptr,
    channels_a,
    channels_b,
    eps,
    SYMMETRIC: tl.constexpr,
):
    """Store the signed square root of a tile of Z whose first row is `row`, packed; gives its sum of squares.

    Packed off-diagonals sqrt(2) Y are the same formula with 2 Z and 2 eps for Z and eps.
    """
    i = i[:, None]
    j = j[None, :]
    first, place = places(i, j, row, channels_a, channels_b, SYMMETRIC)
    if SYMMETRIC:
        keep = (i <= j) & (j < channels_a)
        factor = tl.where(i == j, 1.0, 2.0)
    else:
        keep = (i < channels_a) & (j < channels_b)
        factor = 1.0
    z = z * factor
    eps = eps * factor
    y = z / (tl.sqrt(tl.abs(z) + eps) + tl.sqrt(eps))
    tl.store(y_ptr + first + place, y.to(y_ptr.dtype.element_ty), mask=keep)
    return tl.sum(tl.where(keep, y * y, 0.0))


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
