"""Text as desktop programs show it: blocks drawn by Pango and Cairo; for tests only.

    python hub/fonts/pango.py fonts images --count 2

Nothing here is shared with the renderer that the weights are trained on (render.py). Wants `pango-view` and, since
Pango reads no compressed fonts, `woff2_decompress` (Debian's packages `pango1.0-tools` and `woff2`). Pango is given one
font at a time, so that it cannot take another.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

from faces import Face, find_fonts
from protocol import prose
from tqdm import tqdm

__all__ = ['draw_blocks']

_PROGRAMS = {'pango-view': 'pango1.0-tools', 'woff2_decompress': 'woff2'}  # and Debian's packages of them
_FONTCONFIG = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}</dir><cachedir>{folder}/cache</cachedir></fontconfig>
"""


def _hex(grey: int, rng: random.Random) -> str:
    return '#' + ''.join(f'{min(255, max(0, grey + rng.randint(-25, 25))):02x}' for _ in range(3))


def _command(text: str, file: Path, rng: random.Random) -> List[str]:
    size = rng.choice((9, 10, 11, 12, 14, 16, 20, 24, 30, 36))
    dark, light = rng.randint(0, 90), rng.randint(180, 255)
    text_grey, page_grey = (dark, light) if rng.random() < 0.6 else (light, dark)
    command = ['pango-view', '-q', f'--output={file}', f'--text={text}', f'--font={size}', '--dpi=96']
    command += [f'--width={round(size * rng.uniform(12, 28))}', f'--align={rng.choice(("left", "center", "right"))}']
    command += [f'--line-spacing={rng.choice((0.9, 1.0, 1.2, 1.5, 1.8))}', f'--margin={rng.randint(2, 24)}']
    command += [f'--foreground={_hex(text_grey, rng)}', f'--background={_hex(page_grey, rng)}']
    command += [f'--hinting={rng.choice(("none", "slight", "auto"))}']
    return [*command, f'--antialias={rng.choice(("gray", "gray", "subpixel"))}']


def _draw_font(name: str, face: Face, folder: Path, count: int, corpus: str, seed: int):
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copy(face.path, scratch))
        if copy.suffix == '.woff2':
            subprocess.run(['woff2_decompress', copy], check=True, capture_output=True)
            copy.unlink()
        config = Path(scratch) / 'fonts.conf'
        config.write_text(_FONTCONFIG.format(folder=scratch))
        target = folder / 'test' / name
        target.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = random.Random(f'{seed}/{name}/{number}')
            start = rng.randrange(len(corpus) - 300)
            text = corpus[start : start + rng.randint(15, 200)].strip()
            command = _command(text, target / f'{number:03d}.png', rng)
            done = subprocess.run(
                command, capture_output=True, text=True, env=dict(os.environ, FONTCONFIG_FILE=str(config))
            )
            if done.returncode:
                raise RuntimeError(f'pango-view cannot draw {name}: {done.stderr.strip()[-300:]}')


def draw_blocks(fonts: Dict[str, List[Face]], folder: Path, count: int, seed: int = 0):
    """Write blocks of text of each font as PNG files.

    Args:
        fonts: Faces by class, of which the first is drawn; static fonts only.
        folder: Folder for the images, below test/FONT.
        count: Images of each font.
        seed: Seed of texts and layout.

    Raises:
        RuntimeError: If a program is not there, or fails.
    """
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise RuntimeError(f"There is no '{program}' to draw text with; install {package}.")
    corpus = prose()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_draw_font, name, fonts[name][0], folder, count, corpus, seed) for name in sorted(fonts)]
        for job in tqdm(jobs, desc='Blocks in Pango', unit='font'):
            job.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('fonts', type=Path, help='folder of fonts')
    parser.add_argument('images', type=Path, help='folder for the images, with test/FONT')
    parser.add_argument('--count', type=int, default=2, help='of each font (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    args = parser.parse_args()
    try:
        draw_blocks(find_fonts(args.fonts)[0], args.images, args.count, args.seed)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'pango.py: error: {e}')


if __name__ == '__main__':
    main()
