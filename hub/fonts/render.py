"""Images of text that give nothing away but the letters: whatever else an image shows is drawn without the font.

A `Layout` holds all that is not the letters. Letters are drawn as coverage, at the network's scale or larger and
reduced, then coloured, photographed and compressed.
"""

import io
import math
import random
from dataclasses import dataclass, replace
from typing import List, Optional, Tuple

import numpy as np
from faces import Face
from PIL import Image, ImageDraw, ImageFilter
from texts import NUMBERS, random_kind, random_text

__all__ = ['Layout', 'random_image', 'random_layout', 'render_text']

Color = Tuple[float, float, float]

_LUMA = (0.299, 0.587, 0.114)
_KERNELS = ('LANCZOS', 'BICUBIC', 'BILINEAR', 'HAMMING', 'BOX')
_MAX_NOISE = 25.5  # standard deviation per channel, of 255, as in GoogleFontsBench (arXiv 2602.13889)


@dataclass(frozen=True)
class Layout:
    """All of an image that is not its letters.

    Args:
        x_height: Height of the ink of 'x' in the image, in pixels.
        pitch: Distance of lines, in heights of the ink of 'Ay'.
        by_ink: If each line is placed by the top of its own ink instead of its baseline, as GoogleFontsBench does.
        wrap: Width that lines are broken at, as a share of the image.
        lines: Lines at most.
        break_chance: Chance of a line break after each word.
        align: 0 left, 0.5 centred, 1 right.
        kerning: If the font's kerning is applied.
        tracking: Space added between letters, in em.
        oversampling: Scale that letters are drawn at before they are resized to the image; 1 is drawn at once, hinted.
        mono: If letters are drawn without antialiasing before resizing.
        subpixel: If red, green and blue are a third of a pixel apart, as on a flat screen; for oversampling 3.
        kernel: Name of the filter that resizes, of Pillow's.
        blur: Standard deviation of a Gaussian blur, in pixels.
        degrees: Rotation.
        perspective: Shift of the corners at most, as a share of the image.
        fit: If the image shows a whole block of text, else a part of one.
        fill: If a block shown whole is enlarged until it reaches two borders.
        anchor: Where in the image the block is, or the letter that it is hung on, as a share of width and height.
        margin: Space around a block shown whole, in heights of the ink of 'Ay'.
        padding: Colour beyond the margin, None for the background's.
        ink: Colour of the letters, 0 to 255.
        background: Colour behind them.
        linear: If colours are mixed in linear light.
        gradient: Change of the background's colours from one side to the other, of 255.
        texture: Amplitude of an uneven background, of 255.
        noise: Standard deviation of the noise of each channel, of 255.
        jpeg: JPEG quality, None for no compression.
    """

    x_height: float = 14.0
    pitch: float = 1.2
    by_ink: bool = False
    wrap: float = 1.0
    lines: int = 12
    break_chance: float = 0.0
    align: float = 0.0
    kerning: bool = True
    tracking: float = 0.0
    oversampling: float = 2.0
    mono: bool = False
    subpixel: bool = False
    kernel: str = 'LANCZOS'
    blur: float = 0.0
    degrees: float = 0.0
    perspective: float = 0.0
    fit: bool = True
    fill: bool = True
    anchor: Tuple[float, float] = (0.5, 0.5)
    margin: float = 0.2
    padding: Optional[Color] = (0.0, 0.0, 0.0)
    ink: Color = (0.0, 0.0, 0.0)
    background: Color = (255.0, 255.0, 255.0)
    linear: bool = False
    gradient: float = 0.0
    texture: float = 0.0
    noise: float = 0.0
    jpeg: Optional[int] = None


def _luminance(color: Color) -> float:
    return sum(c * w for c, w in zip(color, _LUMA))


def _random_colors(rng: random.Random, least: float) -> Tuple[Color, Color]:
    """Colours of letters and background: of pages, or any whose luminances are `least` apart."""
    style = rng.random()
    if style < 0.3:  # near black and white, either way
        grey = rng.choice((0, 0, rng.uniform(0, 70)))
        tint = tuple(rng.uniform(-8, 8) * (grey > 0) for _ in range(3))
        dark = tuple(min(255.0, max(0.0, grey + t)) for t in tint)
        light = tuple(rng.choice((255.0, rng.uniform(225, 255))) for _ in range(3))
        return (dark, light) if rng.random() < 0.6 else (light, dark)
    while True:
        a, b = (tuple(rng.uniform(0, 255) for _ in range(3)) for _ in range(2))
        if abs(_luminance(a) - _luminance(b)) >= least:
            return a, b


def random_layout(rng: random.Random, size: int = 224) -> Layout:
    """A layout, nothing of which depends on the font.

    Args:
        rng: Source of everything.
        size: Height and width of the image in pixels, which large letters and many lines must fit into.
    """
    is_plain = rng.random() < 0.55  # nothing but letters on a page of one colour, perhaps with noise
    is_marred = not is_plain
    ink, background = _random_colors(rng, least=60 if is_plain else 30)
    # the whole range, most of it where letters can be read and fit into the image
    smallest, largest = (6, 0.32) if rng.random() < 0.4 else (8, 0.25)
    x_height = math.exp(rng.uniform(math.log(smallest), math.log(min(70, largest * size))))
    sharpness = rng.random()  # drawn at once, reduced, or enlarged, as small letters on a screen are for the network
    oversampling = 1.0 if sharpness < 0.25 else rng.choice((2.0, 2.0, 3.0, rng.uniform(1.2, 4)))
    if sharpness > 0.65 and x_height > 8:
        oversampling = math.exp(rng.uniform(math.log(max(0.4, 6 / x_height)), math.log(0.95)))
    oversampling = min(oversampling, max(1.0, 120 / x_height))
    is_tilted = is_marred and rng.random() < 0.5
    fit = rng.random() < 0.45
    grey = rng.uniform(0, 255)
    contrast = abs(_luminance(ink) - _luminance(background))
    return Layout(
        x_height=x_height,
        pitch=rng.uniform(0.9, 2.0) if rng.random() < 0.8 else rng.uniform(1.1, 1.4),
        by_ink=rng.random() < 0.3,
        wrap=rng.uniform(0.5, 1.0) if fit else math.exp(rng.uniform(math.log(0.6), math.log(3.0))),
        lines=rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 12, 12, 12, 12)),
        break_chance=rng.choice((0.0, 0.0, 0.2, 0.5)),
        align=rng.choice((0.0, 0.0, 0.5, 1.0)),
        kerning=rng.random() < 0.7,
        tracking=rng.uniform(-0.03, 0.12) if rng.random() < 0.15 else 0.0,
        oversampling=oversampling,
        mono=is_marred and oversampling > 1 and rng.random() < 0.2,
        subpixel=oversampling == 3 and rng.random() < 0.5,
        kernel=rng.choice(_KERNELS),
        blur=rng.uniform(0, 0.12) * min(x_height, 12) if is_marred and rng.random() < 0.5 else 0.0,
        degrees=rng.gauss(0, 2.5) if is_tilted else 0.0,
        perspective=rng.uniform(0, 0.06) if is_tilted else 0.0,
        fit=fit,
        fill=rng.random() < 0.7,
        anchor=(rng.random(), rng.random()) if rng.random() < 0.7 else (0.5, 0.5),
        margin=rng.uniform(0.0, 1.0),
        padding=rng.choice((None, None, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), (grey, grey, grey))),
        ink=ink,
        background=background,
        linear=rng.random() < 0.2,
        gradient=rng.uniform(0, 60) if is_marred and rng.random() < 0.5 else 0.0,
        texture=rng.uniform(0, min(25, contrast / 3)) if is_marred and rng.random() < 0.5 else 0.0,
        noise=rng.uniform(0, min(_MAX_NOISE, contrast / 3)) if rng.random() < 0.5 else 0.0,
        jpeg=rng.randrange(35, 96) if is_marred and rng.random() < 0.6 else None,
    )


class _Letters:
    """Text set in a font at a size, with tracking or without."""

    def __init__(self, face: Face, size: float, layout: Layout):
        self.font = face.at(size, layout.kerning)  # with kerning come ligatures, as in a browser
        self.tracking = layout.tracking * size

    def length(self, text: str) -> float:
        return self.font.getlength(text) + self.tracking * len(text)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, text: str):
        """Draw with the baseline at y."""
        if not self.tracking:
            draw.text((x, y), text, fill=255, font=self.font, anchor='ls')
            return
        for character in text:
            draw.text((x, y), character, fill=255, font=self.font, anchor='ls')
            x += self.length(character)


def _wrap(text: str, letters: _Letters, width: float, layout: Layout, rng: random.Random) -> List[str]:
    """Lines of a text: broken by chance, and where they would be wider than the width."""
    lines = ['']
    for word in text.split(' '):
        longer = f'{lines[-1]} {word}'.lstrip()
        if lines[-1] and (rng.random() < layout.break_chance or letters.length(longer) > width):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _transform(mask: Image.Image, layout: Layout, rng: random.Random) -> Image.Image:
    """Rotate a mask about its centre and move its corners."""
    width, height = mask.size
    angle = math.radians(layout.degrees)
    source, target = [], []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        dx, dy = x - width / 2, y - height / 2
        source.append(
            (
                width / 2
                + math.cos(angle) * dx
                - math.sin(angle) * dy
                + layout.perspective * width * rng.uniform(-1, 1),
                height / 2
                + math.sin(angle) * dx
                + math.cos(angle) * dy
                + layout.perspective * height * rng.uniform(-1, 1),
            )
        )
        target.append((x, y))
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source):  # u = (a x + b y + c) / (g x + h y + 1), v likewise
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    coefficients = np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values))
    return mask.transform(mask.size, Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BICUBIC)


def _block(
    face: Face, text: str, layout: Layout, size: int, rng: random.Random
) -> Tuple[Image.Image, Optional[Tuple[float, float, float, float]]]:
    """Coverage of the letters on a canvas of the image's size times oversampling; the box of a block shown whole."""
    scale = layout.oversampling
    edge = round(size * scale)
    em = layout.x_height * scale / face.x_height
    letters = _Letters(face, em, layout)
    line_height = face.line_height * em
    pitch = layout.pitch * line_height
    margin = layout.margin * line_height if layout.fit else 0.0
    lines = _wrap(text, letters, layout.wrap * edge - 2 * margin, layout, rng)[: layout.lines]
    if layout.fit:
        lines = lines[: max(1, int((edge - 2 * margin - line_height) / pitch) + 1)]
    lengths = [letters.length(line) for line in lines]
    width, height = max(lengths), (len(lines) - 1) * pitch + line_height
    if layout.fit and layout.fill:
        zoom = min(edge / (max(width, height) + 2 * margin), 0.35 * edge / (em * face.x_height))
        letters = _Letters(face, em * zoom, layout)
        lengths = [letters.length(line) for line in lines]
        width, height, pitch, margin, line_height = (
            max(lengths),
            *(zoom * v for v in (height, pitch, margin, line_height)),
        )
    box = None
    if layout.fit and max(width, height) + 2 * margin <= edge + 1:
        left = margin + layout.anchor[0] * (edge - 2 * margin - width)
        top = margin + layout.anchor[1] * (edge - 2 * margin - height)
        box = (left - margin, top - margin, left + width + margin, top + height + margin)
    else:  # some letter of some line comes to lie at the anchor, which is kept off the border
        line = rng.randrange(len(lines))
        x = layout.align * (width - lengths[line]) + rng.random() * lengths[line]
        left = edge * (0.2 + 0.6 * layout.anchor[0]) - x
        top = edge * (0.2 + 0.6 * layout.anchor[1]) - line * pitch - 0.5 * line_height
        if width < edge:  # no letter is cut that need not be
            left = min(max(left, 0), edge - width)
    canvas = Image.new('L', (edge, edge))
    draw = ImageDraw.Draw(canvas)
    draw.fontmode = '1' if layout.mono else 'L'
    for i, (line, length) in enumerate(zip(lines, lengths)):
        x, y = left + layout.align * (width - length), top + i * pitch
        if y > edge or y + 1.5 * pitch + line_height < 0:
            continue
        if layout.by_ink:
            baseline = y - letters.font.getbbox(line, anchor='ls')[1]
        else:
            baseline = y - letters.font.getbbox('A', anchor='ls')[1]
        letters.draw(draw, x, baseline, line)
    return canvas, box


def _coverage(canvas: Image.Image, layout: Layout, size: int) -> np.ndarray:
    """Coverage at the image's size, (size, size, 1 or 3), 0 to 1."""
    if layout.subpixel and canvas.width == 3 * size:
        fine = np.asarray(canvas, dtype=np.float32).reshape(size, 3, 3 * size).mean(1)
        # FreeType's default filter across five subpixels, which keeps colour fringes faint
        fine = np.pad(fine, ((0, 0), (2, 2)))
        weights = (0x08, 0x4D, 0x56, 0x4D, 0x08)
        fine = sum(w / 256 * fine[:, i : i + 3 * size] for i, w in enumerate(weights))
        mask = fine.reshape(size, size, 3)
    else:
        if canvas.width != size:
            canvas = canvas.resize((size, size), Image.Resampling[layout.kernel])
        if layout.blur:
            canvas = canvas.filter(ImageFilter.GaussianBlur(layout.blur))
        mask = np.asarray(canvas, dtype=np.float32)[..., None]
    return mask / 255


def _background(layout: Layout, size: int, rng: random.Random) -> np.ndarray:
    """(size, size, 3), or (1, 1, 3) if it is plain."""
    pixels = np.array(layout.background, dtype=np.float32).reshape(1, 1, 3)
    if layout.gradient:
        angle = rng.uniform(0, 2 * math.pi)
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        ramp = math.cos(angle) * ramp[None, :, None] + math.sin(angle) * ramp[:, None, None]
        change = np.array([rng.uniform(-1, 1) for _ in range(3)], dtype=np.float32)
        pixels = pixels + layout.gradient * ramp * change
    if layout.texture:
        cells = rng.choice((3, 8, size // 4, size))
        generator = np.random.default_rng(rng.getrandbits(64))
        grain = Image.fromarray(generator.integers(0, 256, (cells, cells), dtype=np.uint8))
        grain = np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = pixels + layout.texture * (grain[..., None] / 127.5 - 1)
    return pixels


def render_text(
    face: Face, text: str, layout: Layout, size: int = 224, rng: Optional[random.Random] = None
) -> Image.Image:
    """A square image of a text.

    Args:
        face: Font.
        text: Text; what the font lacks is left out, and what the image does not hold is cut off.
        layout: All that is not the letters.
        size: Height and width in pixels.
        rng: Source of line breaks, places and noise; None for one of seed 0.

    Returns:
        RGB image.
    """
    rng = rng or random.Random(0)
    canvas, box = _block(face, face.keep(text) or 'x', layout, size, rng)
    if layout.degrees or layout.perspective:
        canvas = _transform(canvas, layout, rng)
    mask = _coverage(canvas, layout, size)
    background = _background(layout, size, rng)
    ink = np.array(layout.ink, dtype=np.float32)
    if layout.linear:
        background, ink = background.clip(0, 255) ** 2.2, ink**2.2
        pixels = (background + mask * (ink - background)).clip(0) ** (1 / 2.2)
    else:
        pixels = background + mask * (ink - background)
    if layout.noise:
        generator = np.random.default_rng(rng.getrandbits(64))
        pixels = pixels + layout.noise * generator.standard_normal(pixels.shape, dtype=np.float32)
    if box is not None and layout.padding is not None:
        left, top, right, bottom = (round(min(max(v / layout.oversampling, 0), size)) for v in box)
        padded = np.empty_like(pixels)
        padded[:] = layout.padding
        padded[top:bottom, left:right] = pixels[top:bottom, left:right]
        pixels = padded
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if layout.jpeg is not None:
        file = io.BytesIO()
        image.save(file, 'JPEG', quality=layout.jpeg, subsampling=rng.choice((0, 2)))
        image = Image.open(file).convert('RGB')
    return image


def random_image(face: Face, split: str, rng: random.Random, size: int = 224) -> Image.Image:
    """A text of the split in a random layout.

    Args:
        face: Font.
        split: 'train' or 'val', of texts.
        rng: Source of everything.
        size: Height and width in pixels.
    """
    layout = random_layout(rng, size)
    kind = random_kind(rng)
    # as many letters as the image holds, and half as many again; a word may stand alone, a number often does
    columns = size * layout.wrap / layout.x_height
    rows = min(layout.lines, 1.5 + size / (1.4 * layout.pitch * layout.x_height))
    length = math.ceil(1.2 * columns * rows)
    if rng.random() < (0.65 if kind in NUMBERS else 0.15):
        length = 1
        layout = replace(layout, fit=layout.fit or rng.random() < 0.5)
    if kind in ('prose', 'made-up words', 'capitals'):
        length = max(length, rng.randrange(4, 12))
    return render_text(face, random_text(split, kind, min(length, 2000), rng), layout, size, rng)
