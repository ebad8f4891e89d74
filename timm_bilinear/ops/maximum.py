"""Max pooling of outer products on the CPU: Z_ij = max_n A_in Bf_jn, and the location of each.

A block of pairs at a time: their products at all locations, then the largest over the locations; with the places by
PyTorch's own max pooling, which is vectorised over the channels that lie side by side.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = ['gradients', 'products']

_ENTRIES = 2**18  # products in a block: 1 MiB in float32, which the second cache holds
_COLUMNS = 64  # channels of b in it


def products(
    a: torch.Tensor, b: Optional[torch.Tensor], need_places: bool = True
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The largest product of every channel pair, and its location, the first if there are several.

    Args:
        a: (G, Ca, N) features, contiguous.
        b: (G, Cb, N) features of a second stream, or None for those of `a`.
        need_places: Tell the locations too.

    Returns:
        Z and int64 locations or None, (G, Ca, Cb) each.
    """
    b_ = a if b is None else b
    images, channels, locations = a.shape
    z = a.new_empty(images, channels, b_.shape[1])
    where = torch.empty(z.shape, dtype=torch.int64) if need_places else None
    columns = min(_COLUMNS, b_.shape[1])
    rows = max(1, min(channels, _ENTRIES // (columns * locations)))
    group = max(1, _ENTRIES // (columns * locations * rows))
    buffer = a.new_empty(min(images, group) * rows * locations * columns)
    a, b_ = a.unsqueeze(3), b_.transpose(1, 2).contiguous().unsqueeze(1)
    for first in range(0, images, group):
        g = slice(first, first + group)
        for row in range(0, channels, rows):
            i = slice(row, row + rows)
            # of the symmetric matrix, the blocks on the diagonal and right of it
            for column in range(0 if b is not None else row // columns * columns, b_.shape[3], columns):
                j = slice(column, column + columns)
                left, right = a[g, i], b_[g, :, :, j]
                shape = (left.shape[0], left.shape[1], locations, right.shape[3])
                block = buffer[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
                torch.mul(left, right, out=block)
                if where is None:
                    torch.amax(block, 2, out=z[g, i, j])
                    continue
                # (images * rows, columns, locations, 1) in channels_last
                pooled = F.max_pool2d(
                    block.flatten(0, 1).unsqueeze(2).permute(0, 3, 1, 2), (locations, 1), return_indices=True
                )
                for out, x in zip((z, where), pooled):
                    out[g, i, j] = x.view(shape[0], shape[1], shape[3])
    if b is None:  # what was left out is the mirror image
        for x in (z,) if where is None else (z, where):
            x.copy_(x.triu() + x.triu(1).transpose(1, 2))
    return z, where


def gradients(dz: torch.Tensor, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[torch.Tensor]:
    """Gradients of the features from dz (G, Ca, Cb), that of Z; without b from dZ + dZ^T."""
    _, where = products(a, b)
    b_, back = (a, where) if b is None else (b, where.transpose(1, 2))
    # entry (i, j) of A and of B at the pair's location
    from_b = b_.gather(2, back).transpose(1, 2)
    grads = [torch.zeros_like(a).scatter_add_(2, where, dz * from_b)]
    if b is not None:
        grads.append(torch.zeros_like(b).scatter_add_(2, back, (dz * a.gather(2, where)).transpose(1, 2)))
    return grads
