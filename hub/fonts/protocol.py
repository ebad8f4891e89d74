"""The test of GoogleFontsBench (https://arxiv.org/abs/2602.13889), drawn anew from its description; for tests only.

Nothing here is shared with the renderer that the weights are trained on (render.py): not the drawing, not the layout,
not the texts, which are prose of Python's own documentation.
"""

import random
import re
from typing import List, Tuple

import numpy as np
from faces import Face
from PIL import Image, ImageDraw

__all__ = ['KINDS', 'draw_protocol', 'prose']

KINDS = ('sentence',) * 25 + ('number',) * 5 + ('dollar',) * 5 + ('percent',) * 5  # of a font, in the test split
_EM = 1024  # pixels
_MARGIN = 128
_WRAP = 8  # heights of the ink of 'Ay'
_PITCH = 1.2
_BREAKS = 0.2  # of the spaces
_HEIGHT = 224
_NOISE = 25.5
_LOW, _HIGH = 28, 228  # of coverage, of 255


def prose() -> str:
    """Running prose of Python's documentation, without its lists of syntax and its marks of code."""
    from pydoc_data.topics import topics

    paragraphs = []
    for topic in sorted(topics):
        for paragraph in re.split(r'\n\s*\n', topics[topic]):
            text = re.sub(r'\s+', ' ', re.sub(r'["*`_]', '', paragraph)).strip()
            letters = sum(c.isalpha() or c == ' ' for c in text)
            if len(text) > 150 and letters > 0.93 * len(text) and text.isascii() and text.endswith('.'):
                paragraphs.append(text)
    return ' '.join(paragraphs)


def _text(kind: str, corpus: str, rng: random.Random) -> str:
    if kind == 'sentence':
        length = rng.randint(20, 100)
        start = rng.randrange(len(corpus) - length)
        return corpus[start : start + length].strip()
    if kind == 'percent':
        return f'{rng.randint(0, 100)}%'
    return ('$' if kind == 'dollar' else '') + str(rng.randint(1, 1_000_000))


def _two_colors(rng: random.Random) -> List[Tuple[int, int, int]]:
    while True:
        colors = [(rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)) for _ in range(2)]
        text, background = (0.299 * r + 0.587 * g + 0.114 * b for r, g, b in colors)
        if abs(text - background) >= 80:
            return colors


def draw_protocol(
    face: Face, kind: str, corpus: str, rng: random.Random, pitch: float = _PITCH, noise: float = _NOISE
) -> Image.Image:
    """A block of text, 224 px high and as wide as it comes.

    Args:
        face: Font.
        kind: 'sentence', 'number', 'dollar' or 'percent'.
        corpus: Prose that sentences are cut from, anywhere.
        rng: Source of text, breaks, alignment, colours and noise.
        pitch: Distance of lines in heights of the ink of 'Ay'; the protocol's is 1.2.
        noise: Standard deviation of each channel's noise, of 255.
    """
    font = face.at(_EM, kerning=False)
    _, top, _, bottom = font.getbbox('Ay')
    unit = bottom - top
    words = _text(kind, corpus, rng).split(' ')
    text = words[0] + ''.join(('\n' if rng.random() < _BREAKS else ' ') + word for word in words[1:])
    lines: List[str] = []
    for piece in text.split('\n'):
        line = ''
        for word in piece.split():
            if line and font.getlength(f'{line} {word}') > _WRAP * unit:
                lines.append(line)
                line = word
            else:
                line = f'{line} {word}' if line else word
        if line:
            lines.append(line)
    boxes = [font.getbbox(line) for line in lines]
    widths = [box[2] - box[0] for box in boxes]
    ink, background = _two_colors(rng)
    size = (max(widths) + 2 * _MARGIN, round(pitch * unit * len(lines)) + 2 * _MARGIN)
    # Coverage alone, coloured after it is reduced, which is linear; the levels leave room for what Lanczos overshoots.
    mask = Image.new('L', size, _LOW)
    draw = ImageDraw.Draw(mask)
    align = rng.choice((0, 0.5, 1))
    for i, (line, box, width) in enumerate(zip(lines, boxes, widths)):
        x = _MARGIN + align * (max(widths) - width) - box[0]
        draw.text((x, _MARGIN + i * pitch * unit - box[1]), line, fill=_HIGH, font=font)
    mask = mask.resize((max(1, round(size[0] * _HEIGHT / size[1])), _HEIGHT), Image.Resampling.LANCZOS)
    coverage = (np.asarray(mask, dtype=np.float64)[..., None] - _LOW) / (_HIGH - _LOW)
    pixels = (np.array(background) + coverage * np.subtract(ink, background)).round().clip(0, 255)
    pixels += np.random.default_rng(rng.getrandbits(32)).normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
