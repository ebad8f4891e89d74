"""Pictures of results, drawn with Pillow: learning curves, confusion matrices, sheets of images."""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .curves import draw_curves
from .lettering import class_label, clean_text, draw_upward, find_font, fit_text

__all__ = ['ConfusedPair', 'Tile', 'draw_confused_pairs', 'draw_confusion_matrix', 'draw_curves', 'draw_sheet']

INK, GREY, GRID = '#222222', '#6b6b6b', '#d8d8d8'
# Right and wrong in blue and vermilion of Okabe and Ito's palette, which are apart for every kind of colour vision.
RIGHT, WRONG = '#0072b2', '#c04e00'
# White to dark blue, ever darker, so that it reads in grey too.
_SHADES = np.array([(255, 255, 255), (222, 235, 247), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 40, 100)])
_EMPTY = (238, 238, 238)
# Names of so many classes are written on the axes of a matrix; more would be too many to read.
_MAX_NAMED = 200
_MAX_CELLS = 2000
_MARGIN = 24


def _shade(shares: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of shares in [0, 1]; by their square root, which shows one error in fifty."""
    at = np.sqrt(np.clip(shares, 0, 1)) * (len(_SHADES) - 1)
    channels = [np.interp(at, np.arange(len(_SHADES)), _SHADES[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _merge_classes(counts: np.ndarray, size: int) -> np.ndarray:
    """Sum of blocks of `size` x `size` classes."""
    starts = np.arange(0, len(counts), size)
    return np.add.reduceat(np.add.reduceat(counts, starts, 0), starts, 1)


def _axis_step(classes: int, cell: float) -> int:
    return next(s * 10**p for p in range(9) for s in (1, 2, 5) if s * 10**p * cell >= 44 or s * 10**p >= classes)


def _draw_names(image: Image.Image, names: Sequence[str], left: int, top: int, cell: int, size: int):
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        font = find_font(name, size)
        middle = i * cell + cell // 2
        draw.text((left - 6, top + middle), fit_text(name, font, 240), fill=INK, font=font, anchor='rm')
        draw_upward(image, (left + middle, top - 6), fit_text(name, font, 240), font, INK)


def _draw_counts(draw: ImageDraw.ImageDraw, counts: np.ndarray, shares: np.ndarray, left: int, top: int, cell: int):
    for row, column in zip(*np.nonzero(counts)):
        text = str(counts[row, column])
        font = ImageFont.load_default(min(15, cell // 2, int(1.5 * cell / len(text))))
        at = (left + column * cell + cell / 2, top + row * cell + cell / 2)
        draw.text(at, text, fill='white' if shares[row, column] > 0.3 else INK, font=font, anchor='mm')


def _draw_scale(image: Image.Image, left: int, top: int, height: int):
    """The colours' meaning, to the right of a matrix."""
    colours = _shade(np.linspace(1, 0, height) ** 2)[:, None].repeat(16, 1)
    image.paste(Image.fromarray(colours), (left, top))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, left + 15, top + height - 1), outline=GREY)
    for percent in (0, 5, 25, 50, 100):
        y = top + (height - 1) * (1 - (percent / 100) ** 0.5)
        draw.text((left + 22, y), f'{percent} %', fill=GREY, font=ImageFont.load_default(12), anchor='lm')
    draw.text((left, top + height + 8), "of the row's images", fill=GREY, font=ImageFont.load_default(12))


def draw_confusion_matrix(
    counts: np.ndarray, class_names: Sequence[str], num_classes: Optional[int] = None
) -> Image.Image:
    """Which class (rows) was taken for which (columns): the darker, the larger the part of the row's images.

    Up to 200 classes have their names on the axes, more their indices, with every confusion at least as dark as 10 %.
    Above 2000 neighbouring classes share a cell. Rows of classes without images are grey.

    Args:
        counts: (K, K) numbers of images of class `row` predicted as `column`.
        class_names: K names.
        num_classes: Number of all classes, if these are but a part of them.

    Returns:
        RGB image whose size depends on the number of classes and the length of their names.

    Raises:
        ValueError: If there are no classes, or not as many names as classes.
    """
    counts = np.asarray(counts)
    classes = len(class_names)
    if not classes or counts.shape != (classes, classes):
        raise ValueError(f'A confusion matrix of {classes} names must be {classes} x {classes}, got {counts.shape}.')
    named = classes <= _MAX_NAMED
    block = -(-classes // _MAX_CELLS)
    merged = _merge_classes(counts, block) if block > 1 else counts
    cell = max(12, min(64, 800 // classes)) if named else max(1, _MAX_CELLS // classes)
    totals = merged.sum(1, keepdims=True)
    shares = merged / np.maximum(totals, 1)
    # a dot of few pixels is seen only if it is not too light
    seen = shares if cell >= 12 else np.where(merged > 0, np.maximum(shares, 0.1), 0)
    colours = np.where(totals[:, :, None] > 0, _shade(seen), np.uint8(_EMPTY)).astype(np.uint8)

    labels = [class_label(name, i) for i, name in enumerate(class_names)] if named else []
    size = min(15, max(10, cell - 2))
    widths = [min(240, find_font(label, size).getlength(label)) for label in labels]
    room = int(max(widths, default=40)) + 12
    left, top = _MARGIN + 26 + room, _MARGIN + 60 + room
    side = cell * len(merged)
    image = Image.new('RGB', (left + side + 160, max(top + side, top + 120) + _MARGIN + 24), 'white')
    draw = ImageDraw.Draw(image)
    image.paste(Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1)), (left, top))
    if cell >= 8:
        for i in range(len(merged) + 1):
            draw.line((left + i * cell, top, left + i * cell, top + side), fill=GRID)
            draw.line((left, top + i * cell, left + side, top + i * cell), fill=GRID)
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=GREY)
    if named:
        _draw_names(image, labels, left, top, cell, size)
    else:
        step = _axis_step(classes, cell / block)
        for i in range(0, classes, step):
            at = (i // block) * cell + cell // 2
            draw.text((left - 6, top + at), str(i), fill=GREY, font=ImageFont.load_default(12), anchor='rm')
            draw.text((left + at, top - 6), str(i), fill=GREY, font=ImageFont.load_default(12), anchor='ms')
    if named and cell >= 22:
        _draw_counts(draw, counts, shares, left, top, cell)
    correct, images = int(np.trace(counts)), int(counts.sum())
    part = f'{classes:,} of ' if num_classes and num_classes > classes else ''
    title = f'{correct:,} of {images:,} images right, {part}{num_classes or classes:,} classes'
    if block > 1:
        title += f', {block} in a cell'
    draw.text((_MARGIN, _MARGIN), title, fill=INK, font=ImageFont.load_default(18))
    axis = ImageFont.load_default(14)
    draw.text((left + side / 2, _MARGIN + 40), 'predicted', fill=GREY, font=axis, anchor='mm')
    width = int(axis.getlength('true'))
    draw_upward(image, (_MARGIN + 4, top + side // 2 + width // 2), 'true', axis, GREY)
    _draw_scale(image, left + side + 24, top, max(100, min(side, 300)))
    return image


@dataclass
class Tile:
    """An image of a sheet with text below it.

    Args:
        image: Image, or None where it cannot be shown.
        lines: Lines of text, each with its colour.
        frame: Colour of the frame.
    """

    image: Optional[Image.Image]
    lines: Sequence[Tuple[str, str]] = ()
    frame: str = GRID


_TILE = 224
_STEP = 244
_LINE = 18


def fit_image(image: Image.Image, edge: int) -> Image.Image:
    """An image scaled to a longer side of `edge` pixels; `ImageOps.contain` rounds the shorter one to 0 if narrow."""
    size = (max(1, round(side * edge / max(image.size))) for side in image.size)
    return image.resize(tuple(size), Image.Resampling.BICUBIC)


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy of the size that it has in a sheet."""
    return fit_image(image.convert('RGB'), _TILE)


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int):
    draw.rectangle((x - 3, y - 3, x + _TILE + 2, y + _TILE + 2), fill='#f4f4f4', outline=tile.frame, width=2)
    if tile.image is None:
        font = ImageFont.load_default(13)
        draw.text((x + _TILE / 2, y + _TILE / 2), 'no picture', fill=GREY, font=font, anchor='mm')
    else:
        small = thumbnail(tile.image)
        sheet.paste(small, (x + (_TILE - small.width) // 2, y + (_TILE - small.height) // 2))
    for i, (text, colour) in enumerate(tile.lines):
        _draw_line(draw, (x - 2, y + _TILE + 8 + _LINE * i), text, 13, colour, _TILE + 4)


def _draw_line(draw: ImageDraw.ImageDraw, xy: Tuple[float, float], text: str, size: int, colour: str, width: float):
    text = clean_text(text)
    font = find_font(text, size)
    draw.text(xy, fit_text(text, font, width), fill=colour, font=font)


def draw_sheet(tiles: Sequence[Tile], title: str, columns: int = 5) -> Image.Image:
    """Images in rows, each with its text.

    Args:
        tiles: Images in reading order.
        title: Line above them.
        columns: Images in a row.
    """
    height = _TILE + 24 + _LINE * max((len(tile.lines) for tile in tiles), default=0)
    rows = max(1, -(-len(tiles) // columns))
    sheet = Image.new('RGB', (2 * _MARGIN + columns * _STEP - 20, 76 + rows * height), 'white')
    draw = ImageDraw.Draw(sheet)
    _draw_line(draw, (_MARGIN - 3, _MARGIN), title, 18, INK, sheet.width - 2 * _MARGIN)
    for i, tile in enumerate(tiles):
        _draw_tile(sheet, draw, tile, _MARGIN + i % columns * _STEP, 64 + i // columns * height)
    return sheet


@dataclass
class ConfusedPair:
    """Two classes of which images of either were taken for the other.

    Args:
        names: Their names.
        errors: Images of the first taken for the second, and of the second taken for the first.
        images: Images of the first, and of the second.
        tiles: Up to three examples of the first, and of the second.
    """

    names: Tuple[str, str]
    errors: Tuple[int, int]
    images: Tuple[int, int]
    tiles: Tuple[List[Tile], List[Tile]]


def draw_confused_pairs(pairs: Sequence[ConfusedPair], title: str) -> Image.Image:
    """A row for each pair: images of the one class at the left, of the other at the right.

    Args:
        pairs: Pairs from the top down.
        title: Line above them.
    """
    lines = max((len(tile.lines) for pair in pairs for part in pair.tiles for tile in part), default=0)
    height = _TILE + 74 + _LINE * lines
    right = 3 * _STEP + 20
    sheet = Image.new('RGB', (2 * _MARGIN + 2 * right - 40, 76 + max(1, len(pairs)) * height), 'white')
    draw = ImageDraw.Draw(sheet)
    _draw_line(draw, (_MARGIN - 3, _MARGIN), title, 18, INK, sheet.width - 2 * _MARGIN)
    for row, pair in enumerate(pairs):
        top = 64 + row * height
        if row:
            draw.line((_MARGIN - 3, top - 6, sheet.width - _MARGIN, top - 6), fill=GRID)
        for side in (0, 1):
            left = _MARGIN + side * right
            told = f'{pair.errors[side]:,} of {pair.images[side]:,} images taken for the other'
            told = told if pair.images[side] else 'no images'
            _draw_line(draw, (left - 3, top + 4), pair.names[side], 15, INK, 3 * _STEP - 20)
            _draw_line(draw, (left - 3, top + 24), told, 13, WRONG if pair.errors[side] else GREY, 3 * _STEP - 20)
            for i, tile in enumerate(pair.tiles[side][:3]):
                _draw_tile(sheet, draw, tile, left + i * _STEP, top + 52)
    return sheet
