"""Images as people see them beside what a network is shown of them, and where in the image that lies."""

from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.images import open_image
from ..data.scales import ScaleViews
from ..data.transforms import draft_size, make_transform, transform_settings
from ..models.image_modes import IMG_MODES
from .inference import resolve_tta, view_data_config, view_log_weights
from .prediction import Source, one_line

__all__ = [
    'NOT_FINITE',
    'Box',
    'ChosenViews',
    'ImageReader',
    'ShownImage',
    'choose_views',
    'read_batches',
    'read_views',
    'shown_box',
]

Box = Tuple[float, float, float, float]
ChosenViews = Tuple[torch.Tensor, List[Box], torch.Tensor]  # what `choose_views` gives

NOT_FINITE = 'The model gives probabilities that are not finite.'  # as `predict` says it

_SHOWN_EDGE = 2048  # pixels that are kept of an image for its picture


def shown_box(transform: Callable, size: Tuple[int, int], mode: str = 'RGB') -> Box:
    """Where the edges of the network's input lie in an image.

    The transform is shown ramps of grey, whose levels in what it gives tell which place went where; so it may resize,
    crop and pad as it likes, along the axes.

    Args:
        transform: Gives (C, H, W) uint8 of an image.
        size: Width and height of the image.
        mode: Mode of the images that the transform takes.

    Returns:
        Left, top, right and bottom as parts of the image's width and height; beyond 0 and 1 where it is padded.
    """
    width, height = size
    inside = _shown(transform, np.full((height, width), 255), mode) == 255
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    left, right = _ends(_shown(transform, across, mode), inside, 1, width)
    top, bottom = _ends(_shown(transform, down, mode), inside, 0, height)
    return left, top, right, bottom


def _shown(transform: Callable, grey: np.ndarray, mode: str) -> np.ndarray:
    image = Image.fromarray(grey.round().astype(np.uint8)).convert(mode)
    return np.asarray(transform(image))[0].astype(np.float64)


def _ends(ramp: np.ndarray, inside: np.ndarray, axis: int, length: int) -> Tuple[float, float]:
    """Where the first and the last edge along an axis lie on a ramp, as parts of its length."""
    count = ramp.shape[axis]
    kept = inside.any(1 - axis)
    if kept.sum() < 2 or length < 2:
        return 0.0, 1.0
    levels = np.ma.array(ramp, mask=~inside).mean(1 - axis).compressed()
    # centres of pixels, of the input and of the image
    slope, start = np.polyfit(np.flatnonzero(kept) + 0.5, levels / 255 * (length - 1) + 0.5, 1)
    return float(start / length), float((start + slope * count) / length)


def _within(outer: Box, inner: Box) -> Box:
    """A box that is told in parts of another one."""
    left, top, right, bottom = outer
    width, height = right - left, bottom - top
    return left + inner[0] * width, top + inner[1] * height, left + inner[2] * width, top + inner[3] * height


class ShownImage(NamedTuple):
    """An image to explain: its name, what it looks like, and the views (V, C, H, W) that `predict` shows the network of
    it, with the place of each.
    """

    name: str
    image: Image.Image
    views: torch.Tensor
    boxes: List[Box]


class ImageReader:
    """Images as a model wants them, beside what they look like."""

    def __init__(self, net: nn.Module, device: torch.device):
        self.config = view_data_config(net, 'auto')
        channels = self.config['input_size'][0]
        if channels not in IMG_MODES:
            raise ValueError(f'Images have 1 to {max(IMG_MODES)} channels, the model wants {channels}.')
        self.mode = IMG_MODES[channels]
        self.transform = make_transform(transform_settings(self.config), is_training=False, normalize=False)
        self.mean, self.std = (torch.tensor(self.config[k], device=device).view(-1, 1, 1) for k in ('mean', 'std'))
        self.device = device

    def __call__(self, source: Source) -> ShownImage:
        """
        Raises:
            Exception: What is wrong with the image.
        """
        if source.error is not None:
            raise ValueError(source.error)
        image = open_image(source.place, self.mode, min_size=draft_size(self.config))
        height = self.config['input_size'][1]
        views = torch.stack(self.transform(image).split(height, 1)).to(self.device)
        views = views.float().div(255).sub(self.mean).div(self.std)
        if isinstance(self.transform, ScaleViews):
            single = self.transform.transform
            boxes = [shown_box(single, image.size, self.mode)]
            of_part = shown_box(single, self.transform.window[::-1], self.mode)
            boxes += [_within(box, of_part) for box in self.transform.boxes(image)]
        else:
            boxes = [shown_box(self.transform, image.size, self.mode)]
        shown = image.convert('RGB')
        shown.thumbnail((_SHOWN_EDGE, _SHOWN_EDGE), Image.Resampling.BICUBIC)
        return ShownImage(source.name, shown, views, boxes)


def read_batches(
    sources: Sequence[Source], read: ImageReader, size: int = 8
) -> Iterator[Tuple[List[ShownImage], List[Dict[str, Any]]]]:
    """Images that can be read, a few at a time, and what is wrong with the others."""
    for start in range(0, len(sources), size):
        shown, failed = [], []
        for source in sources[start : start + size]:
            try:
                shown.append(read(source))
            except Exception as e:
                failed.append(dict(image=source.name, error=one_line(e)))
        yield shown, failed


@torch.no_grad()
def choose_views(net: nn.Module, batch: Sequence[ShownImage]) -> ChosenViews:
    """Of each image the view that counts most (B, C, H, W) and its place, and the probabilities of all views."""
    views = torch.stack([shown.views for shown in batch], 1)  # (V, B, C, H, W)
    views = views.to(next((p.dtype for p in net.parameters() if p.is_floating_point()), views.dtype))
    logits = torch.stack([net(view).float() for view in views])
    weights = view_log_weights(logits, resolve_tta(net, 'auto'))
    best = weights[:, :, 0].expand(logits.shape[:2]).argmax(0).tolist()
    probabilities = (logits.log_softmax(-1) + weights).logsumexp(0).exp()
    chosen = torch.stack([views[view, i] for i, view in enumerate(best)])
    return chosen, [shown.boxes[view] for view, shown in zip(best, batch)], probabilities


def read_views(
    net: nn.Module, sources: Sequence[Source], read: ImageReader
) -> Iterator[Tuple[List[ShownImage], Optional[ChosenViews], List[Dict[str, Any]]]]:
    """Images that the model has finite probabilities for, a few at a time, their views, and what is wrong with others.

    Without any such image the views are None.
    """
    for shown, failed in read_batches(sources, read):
        if not shown:
            yield [], None, failed
            continue
        pixels, boxes, probabilities = choose_views(net, shown)
        is_finite = probabilities.isfinite().all(1)
        places = is_finite.nonzero()[:, 0].tolist()
        failed += [dict(image=shown[i].name, error=NOT_FINITE) for i in (~is_finite).nonzero()[:, 0].tolist()]
        chosen = (pixels[places], [boxes[i] for i in places], probabilities[places]) if places else None
        yield [shown[i] for i in places], chosen, failed
