"""Pictures of evidence: maps on the images they were made of, in blue and vermilion with white for nothing."""

from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .lettering import clean_text, find_font, fit_text
from .pictures import GREY, GRID, INK, fit_image

__all__ = ['Panel', 'crop_to_box', 'draw_evidence', 'draw_map', 'draw_panels']

Box = Tuple[float, float, float, float]

# Against, nothing, for: Okabe and Ito's blue and vermilion, which are apart for every kind of colour vision.
_AGAINST, _FOR = (0, 114, 178), (192, 78, 0)
_EDGE = 384
_GAP, _MARGIN, _LINE = 20, 24, 19


@dataclass
class Panel:
    """An image or a map on it, and what is said above it.

    Args:
        lines: Lines of text.
        values: (h, w) evidence, None for the image alone.
    """

    lines: Sequence[str]
    values: Optional[np.ndarray] = None


def draw_map(image: Image.Image, values: np.ndarray, box: Box, limit: float) -> Image.Image:
    """A map laid over an image: in grey where there is no evidence, coloured the stronger the more there is.

    Args:
        image: RGB image.
        values: (h, w) evidence of a grid that covers the box.
        box: Left, top, right and bottom of the grid as parts of the image's width and height.
        limit: Evidence that is drawn in full colour.
    """
    width, height = image.size
    left, top, right, bottom = (v * edge for v, edge in zip(box, (width, height) * 2))
    rows, columns = values.shape
    # from pixels of the image to places of the grid; beyond its border it is not known, and nothing is drawn
    scale_x, scale_y = columns / (right - left), rows / (bottom - top)
    grid = Image.fromarray(np.pad(values.astype(np.float32), 1, mode='edge'))
    places = (scale_x, 0, 1 - left * scale_x, 0, scale_y, 1 - top * scale_y)
    fine = np.asarray(grid.transform((width, height), Image.Transform.AFFINE, places, Image.Resampling.BILINEAR))
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    is_seen = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
    strength = np.where(is_seen, fine / max(limit, 1e-30), 0).clip(-1, 1)[..., None]
    grey = 255 - 0.55 * (255 - np.asarray(image.convert('L'), dtype=np.float32))[..., None]
    colour = np.where(strength > 0, np.array(_FOR, np.float32), np.array(_AGAINST, np.float32))
    shade = np.abs(strength)
    return Image.fromarray((grey * (1 - shade) + colour * (0.35 * grey / 255 + 0.65) * shade).round().astype(np.uint8))


def _draw_scale(draw: ImageDraw.ImageDraw, sheet: Image.Image, x: int, y: int, width: int, limit: float):
    ramp = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None].repeat(12, 0)
    colour = np.where(ramp > 0, np.array(_FOR, np.float32), np.array(_AGAINST, np.float32))
    sheet.paste(Image.fromarray((255 * (1 - abs(ramp)) + colour * abs(ramp)).round().astype(np.uint8)), (x, y))
    draw.rectangle((x, y, x + width - 1, y + 11), outline=GRID)
    font = ImageFont.load_default(12)
    for at, text, anchor in ((0, f'{-limit:.2g} against', 'la'), (0.5, '0', 'ma'), (1, f'{limit:.2g} for it', 'ra')):
        draw.text((x + at * (width - 1), y + 16), text, fill=GREY, font=font, anchor=anchor)


def crop_to_box(image: Image.Image, box: Box) -> Tuple[Image.Image, Box]:
    """What an image shows within a box, and the box in parts of that; the whole image if that is most of it."""
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in box)
    if (right - left) * (bottom - top) > 0.5 or min(right - left, bottom - top) <= 0:
        return image, box
    edges = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    left, top, right, bottom = (round(v) for v in edges)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    width, height = right - left, bottom - top
    places = [v * edge for v, edge in zip(box, (image.width, image.height) * 2)]
    inner = tuple((v - start) / edge for v, start, edge in zip(places, (left, top) * 2, (width, height) * 2))
    return image.crop((left, top, right, bottom)), inner


def draw_panels(image: Image.Image, title: str, panels: Sequence[Panel], box: Box) -> Image.Image:
    """An image and maps on it in a row, on one scale of colours, which is drawn below.

    Args:
        image: RGB image.
        title: Line above all.
        panels: What is drawn, from the left.
        box: Of the maps, as for `draw_map`.
    """
    part, part_box = crop_to_box(image, box)
    whole, part = fit_image(image, _EDGE), fit_image(part, _EDGE)
    if part.size != whole.size or part_box != box:  # where the part is
        edges = [v * edge for v, edge in zip(box, whole.size * 2)]
        ImageDraw.Draw(whole).rectangle(edges, outline=_FOR, width=2)
    maps = [panel.values for panel in panels if panel.values is not None]
    limit = max((float(np.abs(values).max()) for values in maps), default=0.0)
    room = max(len(panel.lines) for panel in panels)
    top = _MARGIN + 34 + _LINE * room
    height = max(whole.height, part.height)
    sheet = Image.new('RGB', (2 * _MARGIN + len(panels) * (_EDGE + _GAP) - _GAP, top + height + 56), 'white')
    draw = ImageDraw.Draw(sheet)
    _draw_text(draw, (_MARGIN, _MARGIN - 4), title, 18, INK, sheet.width - 2 * _MARGIN)
    for i, panel in enumerate(panels):
        x = _MARGIN + i * (_EDGE + _GAP)
        for line, text in enumerate(panel.lines):
            _draw_text(draw, (x, _MARGIN + 28 + _LINE * line), text, 14, INK if line == 0 else GREY, _EDGE)
        picture = whole if panel.values is None else draw_map(part, panel.values, part_box, limit)
        sheet.paste(picture, (x + (_EDGE - picture.width) // 2, top))
    if maps:
        _draw_scale(draw, sheet, _MARGIN + _EDGE + _GAP, top + height + 12, _EDGE, limit)
    return sheet


def draw_evidence(image: Image.Image, values: np.ndarray, box: Box) -> Image.Image:
    """A small picture for a sheet: the map on the part of its image, its strongest evidence in full colour."""
    part, box = crop_to_box(image, box)
    return draw_map(fit_image(part, _EDGE), values, box, float(np.abs(values).max()))


def _draw_text(draw: ImageDraw.ImageDraw, xy: Tuple[float, float], text: str, size: int, colour: str, width: float):
    text = clean_text(text)
    font = find_font(text, size)
    draw.text(xy, fit_text(text, font, width), fill=colour, font=font)
