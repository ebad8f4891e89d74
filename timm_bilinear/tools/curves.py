"""Learning curves, drawn with Pillow."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from PIL import Image, ImageDraw, ImageFont

__all__ = ['draw_curves']

# Drawn larger and reduced, for smooth lines.
_SCALE = 2
# Blue and vermilion of Okabe and Ito's palette: apart for every kind of colour vision, and in grey.
_TRAIN, _VAL = '#0072b2', '#d55e00'
_INK, _GREY, _GRID = '#222222', '#777777', '#dddddd'


@dataclass
class _Panel:
    """A coordinate system in a picture; `box` is left, top, right, bottom in pixels before scaling."""

    draw: ImageDraw.ImageDraw
    box: Tuple[float, float, float, float]
    x_range: Tuple[float, float]
    y_range: Tuple[float, float]

    def place(self, x: float, y: float) -> Tuple[float, float]:
        left, top, right, bottom = self.box
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return (
            _SCALE * (left + (x - x0) / (x1 - x0) * (right - left)),
            _SCALE * (bottom - (y - y0) / (y1 - y0) * (bottom - top)),
        )

    def text(self, xy: Tuple[float, float], text: str, fill: str = _INK, size: int = 13, anchor: str = 'la'):
        """Write at a place of the picture, not of the coordinate system."""
        font = ImageFont.load_default(_SCALE * size)
        self.draw.text((_SCALE * xy[0], _SCALE * xy[1]), text, fill=fill, font=font, anchor=anchor)

    def line(self, points: Sequence[Tuple[float, float]], fill: str, width: float):
        if len(points) > 1:
            self.draw.line(points, fill=fill, width=round(_SCALE * width), joint='curve')

    def dot(self, point: Tuple[float, float], radius: float, fill: str, outline: Optional[str] = None):
        (x, y), radius = point, _SCALE * radius
        box = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse(box, fill=fill, outline=outline, width=2 * _SCALE)


def _ticks(low: float, high: float, count: int, whole: bool = False) -> List[float]:
    """At most `count` + 1 round numbers between two."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(row: Dict[str, Any], key: str) -> float:
    """A finite number of a row, or nan: rows may come from a CSV file."""
    try:
        value = float(row.get(key))
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _best_row(history: Sequence[Dict[str, Any]]) -> Optional[int]:
    """The row with the highest accuracy in validation, of equal ones the lowest loss, of these the first."""
    rows = [i for i, row in enumerate(history) if not math.isnan(_number(row, 'eval_top1'))]

    def rank(i: int) -> Tuple[float, float]:
        loss = _number(history[i], 'eval_loss')
        return -_number(history[i], 'eval_top1'), math.inf if math.isnan(loss) else loss

    return min(rows, key=rank, default=None)


def _draw_frame(panel: _Panel, title: str, stages: Dict[float, str]):
    left, top, right, bottom = panel.box
    for y in _ticks(*panel.y_range, 7):
        at = panel.place(0, y)[1] / _SCALE
        panel.line([(_SCALE * left, _SCALE * at), (_SCALE * right, _SCALE * at)], _GRID, 1)
        panel.text((left - 8, at), f'{y:.10g}', _GREY, 12, 'rm')
    for x in _ticks(*panel.x_range, 8, whole=True):
        panel.text((panel.place(x, 0)[0] / _SCALE, bottom + 6), f'{x:.0f}', _GREY, 12, 'ma')
    for x, name in stages.items():
        at = panel.place(x, 0)[0] / _SCALE
        for y in range(round(top), round(bottom), 8):
            panel.line([(_SCALE * at, _SCALE * y), (_SCALE * at, _SCALE * min(y + 4, bottom))], _GREY, 1)
        panel.text((at + 5, bottom - 6), name, _GREY, 12, 'ls')
    panel.text((left, top - 14), title, _INK, 15, 'ls')
    panel.text(((left + right) / 2, bottom + 26), 'epoch', _GREY, 12, 'ma')


def _draw_legend(panel: _Panel, names: Sequence[Tuple[str, str]]):
    right, y = panel.box[2], panel.box[1] - 19
    for name, colour in reversed(names):
        width = ImageFont.load_default(_SCALE * 13).getlength(name) / _SCALE
        panel.text((right - width, y), name, _INK, 13, 'lm')
        panel.line([(_SCALE * (right - width - 26), _SCALE * y), (_SCALE * (right - width - 6), _SCALE * y)], colour, 3)
        right -= width + 42


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    box: Tuple[float, float, float, float],
    title: str,
    history: Sequence[Dict[str, Any]],
    epochs: Sequence[float],
    key: str,
    best: Optional[int],
    unit: str,
):
    values = {split: [_number(row, f'{split}_{key}') for row in history] for split in ('train', 'eval')}
    finite = [v for column in values.values() for v in column if not math.isnan(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    x_low, x_high = (min(epochs), max(epochs)) if epochs else (0.0, 1.0)
    x_margin = 0.02 * (x_high - x_low) or 0.5
    panel = _Panel(draw, box, (x_low - x_margin, x_high + x_margin), (low - margin, high + margin))
    starts = {
        epochs[i] - 0.5: f'stage {row["stage"]}'
        for i, row in enumerate(history)
        if i and row.get('stage') not in (None, history[i - 1].get('stage'))
    }
    _draw_frame(panel, title, starts)
    if not finite:
        panel.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), 'nothing measured yet', _GREY, 14, 'mm')
        return
    for split, colour in (('train', _TRAIN), ('eval', _VAL)):
        part: List[Tuple[float, float]] = []
        for epoch, value in zip(epochs, values[split]):
            if math.isnan(value):  # a gap, not a line across it
                panel.line(part, colour, 2)
                part = []
                continue
            part.append(panel.place(epoch, value))
            if len(epochs) <= 60:
                panel.dot(part[-1], 2.5, colour)
        panel.line(part, colour, 2)
    _draw_legend(panel, [('training', _TRAIN), ('validation', _VAL)])
    if best is not None and not math.isnan(values['eval'][best]):
        x, y = panel.place(epochs[best], values['eval'][best])
        panel.dot((x, y), 6, 'white', _VAL)
        panel.dot((x, y), 2.5, _VAL)
        font = ImageFont.load_default(_SCALE * 15)
        text = f'{values["eval"][best]:.4g}{unit} in the best epoch, {epochs[best]:.0f}'
        panel.text((box[0] + font.getlength(title) / _SCALE + 24, box[1] - 14), text, _GREY, 13, 'ls')


def draw_curves(history: Sequence[Dict[str, Any]], best: Optional[int] = None) -> Image.Image:
    """Loss and accuracy by epoch, of training and of validation, as one picture.

    Args:
        history: A row for each epoch: 'epoch', and where they are known 'stage', 'train_loss', 'train_top1',
            'eval_loss', 'eval_top1', accuracies in percent. Numbers may be text; what is no finite number is a gap.
        best: Value of 'epoch' to mark; the best in validation if None.

    Returns:
        RGB image of 1200 x 460 pixels.
    """
    epochs = [_number(row, 'epoch') for row in history]
    epochs = [i if math.isnan(epoch) else epoch for i, epoch in enumerate(epochs)]
    marked = _best_row(history) if best is None else next((i for i, e in enumerate(epochs) if e == best), None)
    image = Image.new('RGB', (_SCALE * 1200, _SCALE * 460), 'white')
    draw = ImageDraw.Draw(image)
    _draw_panel(draw, (70, 60, 580, 400), 'Loss', history, epochs, 'loss', marked, '')
    _draw_panel(draw, (670, 60, 1180, 400), 'Top-1 accuracy, %', history, epochs, 'top1', marked, ' %')
    return image.reduce(_SCALE)
