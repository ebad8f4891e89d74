"""What each part of a layout costs: a model on one text per font, all else equal but that part.

    python hub/fonts/shifts.py hub/FOLDER fonts --output shifts.md

The base is sentences in six lines of 14 px of x-height, black on white, kerned, reduced from twice the size. Texts are
of the validation split; images are square already, as the network wants them.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from faces import Face, find_fonts
from render import Layout, render_text
from texts import random_text
from torch import nn

from timm_bilinear import predict
from timm_bilinear.tools.inference import load
from timm_bilinear.tools.measure import markdown_table, write

__all__ = ['BASE', 'SHIFTS', 'measure_shift']

BASE = Layout(x_height=14.0, pitch=1.3, wrap=0.95, lines=6, fill=False, padding=None, margin=0.2, oversampling=2.0)
SHIFTS: Tuple[Tuple[str, Dict[str, Any]], ...] = (
    ('base', {}),
    ('lines 0.9 of the ink apart', dict(pitch=0.9)),
    ('lines 1.6 of the ink apart', dict(pitch=1.6)),
    ('lines 2.0 of the ink apart', dict(pitch=2.0)),
    ('lines placed by their own ink', dict(by_ink=True)),
    ('x-height of 8 px', dict(x_height=8.0)),
    ('x-height of 24 px', dict(x_height=24.0)),
    ('x-height of 40 px', dict(x_height=40.0)),
    ('one line', dict(lines=1)),
    ('narrow column', dict(wrap=0.5)),
    ('centred', dict(align=0.5)),
    ('flush right', dict(align=1.0)),
    ('a part of a larger text', dict(fit=False, wrap=2.0, lines=12)),
    ('in the lower right corner', dict(anchor=(1.0, 1.0), wrap=0.6)),
    ('no kerning', dict(kerning=False)),
    ('5 % of an em between letters', dict(tracking=0.05)),
    ('drawn at once, hinted', dict(oversampling=1.0)),
    ('subpixels', dict(oversampling=3.0, subpixel=True)),
    ('reduced by a box', dict(kernel='BOX')),
    ('blurred by 0.8 px', dict(blur=0.8)),
    ('rotated by 3 degrees', dict(degrees=3.0)),
    ('corners moved by 4 %', dict(perspective=0.04)),
    ('padded with black', dict(padding=(0.0, 0.0, 0.0))),
    ('padded with white, on grey', dict(background=(190.0, 190.0, 190.0), padding=(255.0, 255.0, 255.0))),
    ('white on black', dict(ink=(255.0, 255.0, 255.0), background=(0.0, 0.0, 0.0))),
    ('colours', dict(ink=(160.0, 20.0, 60.0), background=(240.0, 220.0, 130.0))),
    ('a contrast of 50', dict(ink=(120.0, 120.0, 120.0), background=(170.0, 170.0, 170.0))),
    ('gradient of 60', dict(gradient=60.0)),
    ('texture of 25', dict(texture=25.0)),
    ('noise of 12', dict(noise=12.0)),
    ("noise of 25.5, the protocol's", dict(noise=25.5)),
    ('JPEG of quality 40', dict(jpeg=40)),
)


def _images(faces: List[Face], layout: Layout, size: int) -> Iterator[Any]:
    for i, face in enumerate(faces):
        rng = random.Random(i)
        yield render_text(face, random_text('val', 'prose', 160, rng), layout, size, rng)


def measure_shift(model: nn.Module, faces: List[Face], layout: Layout, tta: str = 'none') -> float:
    """Top-1 in percent of a model whose classes are the faces, on an image of each; `tta` as `predict` has it."""
    images = list(_images(faces, layout, model.pretrained_cfg['input_size'][-1]))
    guesses = [result['predictions'][0]['index'] for result in predict(model, images, topk=1, tta=tta)]
    return 100 * sum(guess == i for i, guess in enumerate(guesses)) / len(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path, help='folder with config.json and model.safetensors')
    parser.add_argument('fonts', type=Path, help='folder of the fonts')
    layouts = [name for name, _ in SHIFTS]
    parser.add_argument(
        '--layouts', nargs='+', choices=layouts, default=layouts, metavar='NAME', help='beside the base (default: all)'
    )
    parser.add_argument(
        '--tta', nargs='+', default=['none'], help='views, as `predict` has them (default: %(default)s)'
    )
    parser.add_argument('--output', type=Path, help='file for the table')
    args = parser.parse_args()
    try:
        model, fonts = load(args.model, device='cpu'), find_fonts(args.fonts)[0]
        names = list(model.pretrained_cfg.get('label_names') or ())
        if missing := [name for name in names if name not in fonts]:
            raise ValueError(f"There is no font '{missing[0]}' in '{args.fonts}'.")
        faces = [fonts[name][0] for name in names]
        rows, base = [], {}
        for name, change in SHIFTS:
            if name != 'base' and name not in args.layouts:
                continue
            row = [name]
            for tta in args.tta:
                top1 = measure_shift(model, faces, replace(BASE, **change), tta)
                row += [f'{top1:.1f} %', f'{top1 - base.setdefault(tta, top1):+.1f}']
            rows.append(row)
            print(*row, flush=True)
        columns = [column for tta in args.tta for column in (f'top-1, `--tta {tta}`', 'change')]
        write(markdown_table(['layout', *columns], rows), args.output)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'shifts.py: error: {e}')


if __name__ == '__main__':
    main()
