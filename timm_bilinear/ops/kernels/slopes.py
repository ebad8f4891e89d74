"""Triton kernel of the backward pass that writes slopes dZ out, for a GEMM with the features."""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .tiles import Config, count_tiles, places, slope, tile_of

__all__ = ['write_slopes']

CONFIG = Config(64, 64, 0, num_warps=4, num_stages=1)


@triton.jit
def _slope_kernel(
    u_ptr,
    y_ptr,
    coefficients_ptr,
    dz_ptr,
    peak_ptr,
    channels_a,
    channels_b,
    size,
    tiles,
    columns,
    SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A tile of dZ, unpacked, and of what mirrors it if it is symmetric; in HALF its largest magnitude too."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row, col = tile_of(tile, columns, SYMMETRIC)
    i = (row * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    j = (col * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    first, place = places(i, j, row * BLOCK_I, channels_a, channels_b, SYMMETRIC)
    keep = (i < channels_a) & (j < channels_b)
    if SYMMETRIC:
        keep = keep & (i <= j)
    u = tl.load(u_ptr + image * size + first + place, mask=keep, other=0.0)
    y = tl.load(y_ptr + image * size + first + place, mask=keep, other=0.0)
    c1 = tl.load(coefficients_ptr + 3 * image)
    c2 = tl.load(coefficients_ptr + 3 * image + 1)
    root = tl.load(coefficients_ptr + 3 * image + 2)
    dz = slope(u, y, i, j, c1, c2, root, SYMMETRIC)
    if HALF:
        tl.store(peak_ptr + image * tiles + tile, tl.max(tl.abs(dz)))
    dz = dz.to(dz_ptr.dtype.element_ty)
    dz_ptr += image * channels_a * channels_b
    tl.store(dz_ptr + tl.cast(i, tl.int64) * channels_b + j, dz, mask=keep)
    if SYMMETRIC:
        mirror = tl.trans(keep.to(tl.int8)) != 0
        tl.store(dz_ptr + tl.cast(tl.trans(j), tl.int64) * channels_b + tl.trans(i), tl.trans(dz), mask=mirror)


def write_slopes(
    u: torch.Tensor, y: torch.Tensor, coefficients: torch.Tensor, a: torch.Tensor, b: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """dZ + dZ^T or dZ, (B, Ca, Cb) in the dtype of the features, and the largest of each tile, (B, tiles)."""
    channels_a, channels_b = a.shape[1], (a if b is None else b).shape[1]
    tiles, columns = count_tiles(channels_a, None if b is None else channels_b, CONFIG)
    dz = torch.empty(len(a), channels_a, channels_b, dtype=a.dtype, device=a.device)
    peaks = coefficients.new_empty(len(a), tiles)
    _slope_kernel[(len(a) * tiles,)](
        u,
        y,
        coefficients,
        dz,
        peaks,
        channels_a,
        channels_b,
        y.shape[1],
        tiles,
        columns,
        SYMMETRIC=b is None,
        HALF=a.dtype == torch.float16,
        BLOCK_I=CONFIG.block_i,
        BLOCK_J=CONFIG.block_j,
        num_warps=CONFIG.num_warps,
        num_stages=CONFIG.num_stages,
    )
    return dz, peaks
