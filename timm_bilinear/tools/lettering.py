"""Text in pictures: a font that has the characters, shortened to a width, with nothing that a drawing trips over."""

import unicodedata
from functools import lru_cache
from typing import Optional, Tuple

from PIL import Image, ImageDraw, ImageFont

__all__ = ['class_label', 'clean_text', 'draw_upward', 'find_font', 'fit_text']

# Looked for among the system's fonts when Pillow's own lacks a character; None is Pillow's own.
_FONTS = (None, 'DejaVuSans.ttf', 'NotoSansCJK-Regular.ttc', 'Arial Unicode.ttf', 'msyh.ttc', 'malgun.ttf', 'arial.ttf')
# A noncharacter: every font draws it as what it lacks.
_LACKING = '\ufffe'


@lru_cache(maxsize=256)
def _load(name: Optional[str], size: int) -> Optional[ImageFont.FreeTypeFont]:
    try:
        return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=65536)
def _has(name: Optional[str], char: str) -> bool:
    font = _load(name, 20)
    if font is None:
        return False
    if char.isspace() or unicodedata.combining(char):
        return True
    mask, lacking = font.getmask(char), font.getmask(_LACKING)
    return (mask.size, bytes(mask)) != (lacking.size, bytes(lacking))


def clean_text(text: str) -> str:
    """One line that any font can be asked to draw: blanks for control characters, '?' for bytes that are no text."""
    text = str(text).encode('utf-8', 'replace').decode('utf-8')
    return ''.join(' ' if unicodedata.category(c) in ('Cc', 'Zl', 'Zp') else c for c in text)


def _covering(text: str) -> Tuple[Optional[str], bool]:
    """Name of the first font that has every character, and whether there is one."""
    for name in _FONTS:
        if all(_has(name, char) for char in set(text)):
            return name, True
    return None, False


def find_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or one of the system's if only that has all characters of a text.

    Args:
        text: What will be drawn.
        size: Height of the font in pixels.
    """
    return _load(_covering(text)[0], size)


def class_label(name: str, index: int) -> str:
    """Text for a class in a picture: its name, or 'class 7' where there is no font with all its characters."""
    text = clean_text(name).strip()
    return text if text and _covering(text)[1] else f'class {index}'


def fit_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text to a width in pixels, in its middle: the ends of file and class names tell them apart."""
    if font.getlength(text) <= width:
        return text
    shortest, longest = 0, len(text)
    while shortest < longest:
        kept = (shortest + longest + 1) // 2
        if font.getlength(_shorten(text, kept)) <= width:
            shortest = kept
        else:
            longest = kept - 1
    return _shorten(text, shortest)


def _shorten(text: str, kept: int) -> str:
    end = kept // 2
    return text[: kept - end] + '...' + (text[-end:] if end else '')


def draw_upward(image: Image.Image, xy: Tuple[int, int], text: str, font: ImageFont.FreeTypeFont, fill: str):
    """Draw a line of text that runs upward.

    Args:
        image: RGB image drawn on.
        xy: Middle of the text's height, and where it begins at the bottom, in pixels.
        text: One line.
        font: Font.
        fill: Colour.
    """
    ascent, descent = font.getmetrics()
    mask = Image.new('L', (int(font.getlength(text)) + 2, ascent + descent))
    ImageDraw.Draw(mask).text((1, 0), text, fill=255, font=font)
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    image.paste(Image.new('RGB', mask.size, fill), (xy[0] - mask.width // 2, xy[1] - mask.height), mask)
