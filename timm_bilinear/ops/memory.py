"""New memory for large results on the CPU."""

import math
import mmap
from contextlib import contextmanager
from typing import Sequence

import torch

__all__ = ['counted', 'empty', 'empty_like']

_LARGE = 32 * 2**20  # bytes: below, glibc's malloc has memory at hand that it was given back; from there it maps anew
_ADVICE = getattr(mmap, 'MADV_HUGEPAGE', None)  # of Linux


@contextmanager
def counted():
    """All memory comes from PyTorch's allocator, whose profiler sees what comes from there alone."""
    global _ADVICE
    before, _ADVICE = _ADVICE, None
    try:
        yield
    finally:
        _ADVICE = before


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty for the CPU, in huge pages if it is large.

    Memory that was not used before is given by the kernel page by page at the first write, which for the 105 MB
    gradient of a classifier's weight takes longer than to compute it. PyTorch leaves the pages at 4 KB where the
    kernel's setting is 'madvise', as most distributions have it; NumPy asks for huge ones as here.

    Smaller results come from PyTorch's allocator: once used, their memory is used again, where even huge pages would be
    cleared each time.

    Args:
        shape: Sizes.
        dtype: Its dtype.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or _ADVICE is None:
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_ADVICE)
    except OSError:  # a kernel without them; or no memory, which PyTorch then says in its own words
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """`empty` with the shape, dtype and strides that torch.empty_like gives."""
    if x.numel() * x.element_size() < _LARGE:
        return torch.empty_like(x)
    like = torch.empty_like(x, device='meta')
    if like.is_contiguous():
        return empty(x.shape, x.dtype)
    if like.untyped_storage().nbytes() != x.numel() * x.element_size():
        return torch.empty_like(x)
    return empty((x.numel(),), x.dtype).as_strided(x.shape, like.stride())
