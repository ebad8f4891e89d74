"""Views of an image at several scales, for models whose images may show their subject at any size."""

import math
from typing import Callable, List, Tuple

import numpy as np
import torch
from PIL import Image

__all__ = ['VIEWS', 'ScaleViews']

_SCALES = 4  # beside that of the whole image
_PARTS = 2  # of each scale
VIEWS = 1 + _SCALES * _PARTS
_FINEST = 2.0  # pixels of a view for one of the image, beyond which there is only blur
_OVERLAP = 0.3  # of an edge, at most, that two parts share
_MAX_STARTS = 100  # of windows along an edge
_DETAIL_SIZE = 512  # longer edge, in pixels, of the image that detail is looked for in


class ScaleViews:
    """The whole image as a transform gives it, and the parts of it with most detail at finer scales.

    The scales are a geometric series from that of the whole image to twice the image's own: a photo is looked at closer
    and closer, a small picture is enlarged. Every image has `VIEWS` views; where there are fewer, some come twice.

    Args:
        transform: timm's transform for evaluation, which gives (C, H, W).
        size: Height and width that it gives.
        crop_pct: The part of an image's edge that it shows.
    """

    def __init__(self, transform: Callable, size: Tuple[int, int], crop_pct: float = 1.0):
        self.transform = transform
        self.window = tuple(math.floor(edge / crop_pct) for edge in size)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Views one below another, (C, VIEWS * H, W), of an image of any size."""
        views = [self.transform(image)]
        whole = min(self.window[0] / image.height, self.window[1] / image.width)
        step = max(_FINEST / whole, 1.0) ** (1 / _SCALES)
        sums = _detail(image)
        # what a part shows beyond the image is the image's most frequent colour, as the margin of a page is
        fill = max(image.resize((64, 64), Image.Resampling.NEAREST).getcolors(64 * 64))[1]
        for i in range(1, _SCALES + 1):
            views += [self.transform(part) for part in self._parts(image, sums, whole * step**i, fill)]
        return torch.cat(views, dim=1)

    def _parts(self, image: Image.Image, sums: np.ndarray, scale: float, fill) -> List[Image.Image]:
        """Windows of the image at a scale, those with most detail first."""
        height, width = (min(edge / scale, limit) for edge, limit in zip(self.window, (image.height, image.width)))
        rows, columns = (sums.shape[0] - 1) / image.height, (sums.shape[1] - 1) / image.width

        def detail(corner: Tuple[float, float]) -> float:
            top, bottom = (round(y * rows) for y in (corner[0], corner[0] + height))
            left, right = (round(x * columns) for x in (corner[1], corner[1] + width))
            return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]

        corners = [(top, left) for top in _starts(image.height, height) for left in _starts(image.width, width)]
        chosen: List[Tuple[float, float]] = []
        for top, left in sorted(corners, key=detail, reverse=True):
            is_apart = [
                abs(top - t) >= (1 - _OVERLAP) * height or abs(left - x) >= (1 - _OVERLAP) * width for t, x in chosen
            ]
            if all(is_apart) and len(chosen) < _PARTS:
                chosen.append((top, left))
        parts = []
        for top, left in (chosen * _PARTS)[:_PARTS]:
            size = tuple(max(1, round(edge * scale)) for edge in (width, height))
            box = (left, top, left + width, top + height)
            piece = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
            part = Image.new(image.mode, self.window[::-1], fill)
            part.paste(piece, ((part.width - piece.width) // 2, (part.height - piece.height) // 2))
            parts.append(part)
        return parts


def _starts(length: int, window: float) -> List[float]:
    """Starts of windows along an edge, half a window apart, further where they would be too many."""
    count = math.ceil(2 * (length - window) / window) + 1
    return list(np.linspace(0, length - window, min(max(count, 1), _MAX_STARTS)))


def _detail(image: Image.Image) -> np.ndarray:
    """Sums of the differences of neighbouring pixels above and left of each place, of the image made small."""
    small = image.convert('L')
    small.thumbnail((_DETAIL_SIZE, _DETAIL_SIZE))
    grey = np.asarray(small, dtype=np.float64)
    differences = np.zeros_like(grey)
    differences[:, 1:] += np.abs(np.diff(grey, axis=1))
    differences[1:] += np.abs(np.diff(grey, axis=0))
    return np.pad(differences.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
