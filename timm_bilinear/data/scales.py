"""Views of an image at several scales, for models whose images may show their subject at any size."""

import math
from typing import Callable, List, NamedTuple, Tuple

import numpy as np
import torch
from PIL import Image

__all__ = ['VIEWS', 'ScaleViews']

_SCALES = 4  # finer than that of the whole image
_PARTS = 2  # of each of them
VIEWS = 2 + _SCALES * _PARTS
_COARSEST = 0.5  # of the scale of the whole image
_FINEST = 2.0  # pixels of a view for one of the image, beyond which there is only blur
_OVERLAP = 0.3  # of an edge, at most, that two parts share
_MAX_STARTS = 100  # of windows along an edge
_DETAIL_SIZE = 512  # longer edge, in pixels, of the image that detail is looked for in


class ScaleViews:
    """The whole image as a transform gives it and at half of that, and the parts with most detail at finer scales.

    The finer scales are a geometric series from that of the whole image to twice the image's own: a photo is looked at
    closer and closer, a small picture is enlarged; at half the scale a subject that fills the image is as small as
    those that a model has learnt. Every image has `VIEWS` views; where there are fewer, some come twice.

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
        # what a part shows beyond the image is the image's most frequent colour, as the margin of a page is
        fill = max(image.resize((64, 64), Image.Resampling.NEAREST).getcolors(64 * 64))[1]
        parts = [self.transform(self._cut(image, part, fill)) for part in self._parts(image)]
        return torch.cat([self.transform(image), *parts], dim=1)

    def boxes(self, image: Image.Image) -> List[Tuple[float, float, float, float]]:
        """Left, top, right and bottom of the parts that the views after the first are made of, as parts of the image's
        width and height; beyond 0 and 1 where they are filled.
        """
        boxes = []
        for part in self._parts(image):
            # the window around what it shows of the image
            width, height = (edge / part.scale for edge in self.window[::-1])
            left, top = part.left - (width - part.width) / 2, part.top - (height - part.height) / 2
            box = (left / image.width, top / image.height)
            boxes.append((*box, box[0] + width / image.width, box[1] + height / image.height))
        return boxes

    def _parts(self, image: Image.Image) -> List['_Part']:
        whole = min(self.window[0] / image.height, self.window[1] / image.width)
        step = max(_FINEST / whole, 1.0) ** (1 / _SCALES)
        sums = _detail(image)
        coarse = _Part(0, 0, image.width, image.height, whole * _COARSEST)
        return [coarse] + [part for i in range(1, _SCALES + 1) for part in self._best(image, sums, whole * step**i)]

    def _best(self, image: Image.Image, sums: np.ndarray, scale: float) -> List['_Part']:
        """Parts of the image at a scale, those with most detail first."""
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
        return [_Part(left, top, width, height, scale) for top, left in (chosen * _PARTS)[:_PARTS]]

    def _cut(self, image: Image.Image, part: '_Part', fill) -> Image.Image:
        """A part of the image at its scale, in the middle of a window of the fill's colour."""
        size = tuple(max(1, round(edge * part.scale)) for edge in (part.width, part.height))
        box = (part.left, part.top, part.left + part.width, part.top + part.height)
        piece = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        window = Image.new(image.mode, self.window[::-1], fill)
        window.paste(piece, ((window.width - piece.width) // 2, (window.height - piece.height) // 2))
        return window


class _Part(NamedTuple):
    """A part of an image, in its pixels, and the scale that it is shown at."""

    left: float
    top: float
    width: float
    height: float
    scale: float


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
