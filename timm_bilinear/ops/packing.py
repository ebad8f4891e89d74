"""Upper-triangle packing of symmetric matrices.

A symmetric (C, C) matrix is kept as its upper triangle, row-major, with the off-diagonal entries times sqrt(2). The
factor makes packing an isometry: Frobenius norms and inner products of matrices are those of their packed vectors, so
an L2-normalised descriptor and a linear classifier lose nothing by it.
"""

import math
from functools import lru_cache
from typing import Tuple

import numpy as np
import torch

from .._compat import makes_other_tensors, ordinary_tensors

__all__ = [
    'packed_size',
    'matrix_size',
    'triangle_indices',
    'pack_symmetric',
    'unpack_symmetric',
    'fold_symmetric_weight',
    'unfold_symmetric_weight',
]


def packed_size(channels: int) -> int:
    """Entries of a packed (channels, channels) symmetric matrix."""
    return channels * (channels + 1) // 2


def matrix_size(packed: int) -> int:
    """Channels whose packed size is `packed`.

    Raises:
        ValueError: If `packed` is not C(C + 1) / 2 for an integer C.
    """
    channels = (math.isqrt(8 * packed + 1) - 1) // 2
    if packed < 1 or packed_size(channels) != packed:
        raise ValueError(f'Packed size must be C(C + 1) / 2 for some C >= 1, got {packed}.')
    return channels


@lru_cache(maxsize=16)
def _triangle(channels: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index tables of the packed layout, see `triangle_indices`, as arrays: these no mode or transform touches."""
    row, col = np.triu_indices(channels)
    place = np.empty((channels, channels), dtype=np.int64)
    place[row, col] = place[col, row] = np.arange(len(row))
    return row * channels + col, place.ravel(), place.diagonal().copy()


@lru_cache(maxsize=16)
def _on_device(channels: int, device: torch.device) -> Tuple[torch.Tensor, ...]:
    # The cache is the process's, so it must hold ordinary tensors, whoever asks for them first.
    with torch.inference_mode(False), ordinary_tensors():
        return tuple(torch.from_numpy(x).to(device) for x in _triangle(channels))


@torch.compiler.assume_constant_result
def triangle_indices(channels: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index tables of the packed layout, made once per size and device.

    They are constants, in graphs that are traced or exported too.

    Returns:
        Tuple of int64 tensors: place of each packed entry in the flat (C * C) matrix, (D,); place of each matrix
        entry in the packed vector, (C * C,); places of the diagonal in the packed vector, (C,).
    """
    if makes_other_tensors(device):  # not to be kept, nor to meet those that were
        return tuple(torch.from_numpy(x).to(device) for x in _triangle(channels))
    return _on_device(channels, device)


def _scale(channels: int, diagonal: float, off_diagonal: float, like: torch.Tensor) -> torch.Tensor:
    _, _, places = triangle_indices(channels, like.device)
    return like.new_full((packed_size(channels),), off_diagonal).index_fill(0, places, diagonal)


def _check_square(name: str, shape: torch.Size):
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"'{name}' must be (..., C, C), got shape {tuple(shape)}.")


def pack_symmetric(m: torch.Tensor) -> torch.Tensor:
    """Pack symmetric matrices; only the upper triangle is read.

    Args:
        m: (..., C, C), floating point.

    Returns:
        (..., C(C + 1) / 2), same dtype.

    Raises:
        ValueError: If the last two sizes differ.
    """
    _check_square('m', m.shape)
    channels = m.shape[-1]
    flat, _, _ = triangle_indices(channels, m.device)
    return m.flatten(-2)[..., flat] * _scale(channels, 1.0, math.sqrt(2), m)


def unpack_symmetric(v: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_symmetric`: full symmetric matrices.

    Args:
        v: (..., C(C + 1) / 2), floating point.

    Returns:
        (..., C, C), same dtype.

    Raises:
        ValueError: If the last size is not a packed size.
    """
    channels = matrix_size(v.shape[-1])
    _, place, _ = triangle_indices(channels, v.device)
    v = v * _scale(channels, 1.0, math.sqrt(0.5), v)
    return v[..., place].unflatten(-1, (channels, channels))


def fold_symmetric_weight(w: torch.Tensor) -> torch.Tensor:
    """Classifier weight over full C * C descriptors to one over packed descriptors, with the same logits.

    Args:
        w: (..., C * C), row-major over (C, C).

    Returns:
        (..., C(C + 1) / 2) with W_ii on the diagonal and (W_ij + W_ji) / sqrt(2) for i < j.

    Raises:
        ValueError: If the last size is not a square number.
    """
    channels = math.isqrt(w.shape[-1])
    if channels < 1 or channels**2 != w.shape[-1]:
        raise ValueError(f"Last size of 'w' must be C * C for some C >= 1, got shape {tuple(w.shape)}.")
    flat, _, _ = triangle_indices(channels, w.device)
    transposed = flat % channels * channels + flat // channels
    return (w[..., flat] + w[..., transposed]) * _scale(channels, 0.5, math.sqrt(0.5), w)


def unfold_symmetric_weight(w: torch.Tensor) -> torch.Tensor:
    """Classifier weight over packed descriptors to one over full C * C descriptors, half to each side.

    Args:
        w: (..., C(C + 1) / 2).

    Returns:
        (..., C * C), symmetric in its two channels; `fold_symmetric_weight` takes it back.

    Raises:
        ValueError: If the last size is not a packed size.
    """
    return unpack_symmetric(w).flatten(-2)
