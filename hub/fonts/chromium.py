"""Text as web pages show it: paragraphs in headless Chromium, light and dark, 12 to 48 CSS px; for tests only.

    python hub/fonts/chromium.py fonts images --count 2

Nothing here is shared with the renderer that the weights are trained on (render.py). Wants Chromium (Debian's package
`chromium`), which draws many paragraphs on a page of known places, from which each is cut.
"""

import argparse
import html
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from faces import Face, find_fonts
from PIL import Image
from protocol import prose
from tqdm import tqdm

__all__ = ['draw_pages']

_PAGE = (1400, 1200)  # CSS px
_BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
_LIGHT = (('#000', '#fff'), ('#222', '#fff'), ('#333', '#fafafa'), ('#24292f', '#f6f8fa'), ('#5c4b37', '#f4ecd8'))
_DARK = (('#fff', '#000'), ('#e6edf3', '#0d1117'), ('#ddd', '#222'), ('#cdd6f4', '#1e1e2e'), ('#bbb', '#333'))


@dataclass(frozen=True)
class _Paragraph:
    name: str
    number: int
    face: Face
    text: str
    size: int  # CSS px per em
    line_height: float
    colors: Tuple[str, str]
    width: int
    height: int


def _paragraph(name: str, number: int, face: Face, corpus: str, rng: random.Random) -> _Paragraph:
    size = rng.choice((12, 13, 14, 16, 18, 20, 24, 32, 40, 48))
    start = corpus.index('. ', rng.randrange(len(corpus) - 2000)) + 2  # at the beginning of a sentence
    width = round(size * rng.uniform(12, 30))
    line_height = rng.choice((1.2, 1.4, 1.5, 1.6, 1.8))
    lines = rng.randint(2, 6)
    return _Paragraph(
        name,
        number,
        face,
        corpus[start : start + 1000],
        size,
        line_height,
        rng.choice(_LIGHT if rng.random() < 0.6 else _DARK),
        min(width, _PAGE[0]),
        round(lines * line_height * size) + size,
    )


def _pages(paragraphs: List[_Paragraph]) -> List[List[Tuple[_Paragraph, int, int]]]:
    """Paragraphs with their places, in rows from left to right on as many pages as it takes."""
    pages, page, x, y, row = [], [], 0, 0, 0
    for paragraph in sorted(paragraphs, key=lambda p: p.height):
        if x + paragraph.width > _PAGE[0]:
            x, y, row = 0, y + row, 0
        if y + paragraph.height > _PAGE[1]:
            pages.append(page)
            page, x, y, row = [], 0, 0, 0
        page.append((paragraph, x, y))
        x, row = x + paragraph.width, max(row, paragraph.height)
    return [*pages, page]


def _html(page: List[Tuple[_Paragraph, int, int]]) -> str:
    styles, blocks = [], []
    for i, (p, x, y) in enumerate(page):
        source = Path(p.face.path).as_uri()
        styles.append(f'@font-face {{ font-family: f{i}; src: url("{source}"); font-display: block }}')
        style = (
            f'left: {x}px; top: {y}px; width: {p.width}px; height: {p.height}px; padding: {p.size // 2}px;'
            f' font: {p.size}px/{p.line_height} f{i}; color: {p.colors[0]}; background: {p.colors[1]}'
        )
        # the sentence is cut by its box, whole lines only
        lines = int((p.height - p.size) / (p.line_height * p.size))
        inner = f'height: {lines * p.line_height * p.size}px; overflow: hidden'
        blocks.append(f'<div style="{style}"><div style="{inner}">{html.escape(p.text)}</div></div>')
    rules = 'body { margin: 0 } body > div { position: absolute; box-sizing: border-box; overflow: hidden }'
    return f'<!doctype html><meta charset="utf-8"><style>{rules} {" ".join(styles)}</style>{"".join(blocks)}'


def draw_pages(fonts: Dict[str, List[Face]], folder: Path, count: int, scale: int = 1, seed: int = 0):
    """Write paragraphs of each font as PNG files.

    Args:
        fonts: Faces by class, of which the first is drawn; static fonts only.
        folder: Folder for the images, below test/FONT.
        count: Paragraphs of each font.
        scale: Pixels per CSS px.
        seed: Seed of texts, sizes and colours.

    Raises:
        RuntimeError: If there is no Chromium, or it fails.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise RuntimeError(f'There is no {_BROWSERS[0]} to draw pages with; install it.')
    corpus = prose()
    paragraphs = [
        _paragraph(name, number, fonts[name][0], corpus, random.Random(f'{seed}/{name}/{number}/{scale}'))
        for name in sorted(fonts)
        for number in range(count)
    ]
    for page in tqdm(_pages(paragraphs), desc=f'Pages in Chromium, scale {scale}', unit='page'):
        with tempfile.TemporaryDirectory() as scratch:
            source, picture = Path(scratch) / 'page.html', Path(scratch) / 'page.png'
            source.write_text(_html(page), encoding='utf-8')
            command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--hide-scrollbars']
            command += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
            command += ['--allow-file-access-from-files', f'--user-data-dir={scratch}/profile']
            command += [f'--force-device-scale-factor={scale}', f'--window-size={_PAGE[0]},{_PAGE[1]}']
            command += ['--virtual-time-budget=10000', f'--screenshot={picture}', source.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True)
            if not picture.is_file():
                raise RuntimeError(f'{browser} has drawn no page: {done.stderr.strip()[-300:]}')
            image = Image.open(picture).convert('RGB')
            for p, x, y in page:
                box = tuple(scale * v for v in (x, y, x + p.width, y + p.height))
                target = folder / 'test' / p.name / f'{p.size * scale}px_{scale}x_{p.number:03d}.png'
                target.parent.mkdir(parents=True, exist_ok=True)
                image.crop(box).save(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('fonts', type=Path, help='folder of fonts')
    parser.add_argument('images', type=Path, help='folder for the images, with test/FONT')
    parser.add_argument('--count', type=int, default=1, help='of each font and scale (default: %(default)s)')
    parser.add_argument('--scales', type=int, nargs='+', default=[1, 2], help='device pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    args = parser.parse_args()
    try:
        fonts = find_fonts(args.fonts)[0]
        for scale in args.scales:
            draw_pages(fonts, args.images, args.count, scale, args.seed)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'chromium.py: error: {e}')


if __name__ == '__main__':
    main()
