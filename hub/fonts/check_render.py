"""Compare text rendered smaller to the protocol's 1024 px: numbers, and a picture of both side by side.

python hub/fonts/check_render.py fonts --picture docs/fonts_render.png
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from render import find_fonts, render_text
from texts import random_text

HEIGHTS = (224, 320, 448, 640, 1024)  # the last is the protocol's


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('fonts', type=Path, help='folder of fonts')
    parser.add_argument('--images', type=int, default=378, help='number of texts (default: %(default)s)')
    parser.add_argument('--picture', type=Path, help='file for the picture')
    args = parser.parse_args()
    try:
        fonts = find_fonts(args.fonts)[0]
    except (OSError, ValueError) as e:
        sys.exit(f'check_render.py: error: {e}')
    names = sorted(fonts)
    errors = {height: [] for height in HEIGHTS[:-1]}
    seconds = dict.fromkeys(HEIGHTS, 0.0)
    shown = []
    for i in range(args.images):
        face = fonts[names[i % len(names)]][0]
        text = random_text('train', i, random.Random(i))
        rows = {}
        for height in HEIGHTS:
            start = time.perf_counter()
            # the same seed: line breaks, colours and alignment are the same
            rows[height] = render_text(face, text, random.Random(i), render=height, noise=0)
            seconds[height] += time.perf_counter() - start
        target = np.asarray(rows[HEIGHTS[-1]], dtype=np.float32)
        for height in errors:
            # widths may differ by a rounded pixel
            image = rows[height].resize(rows[HEIGHTS[-1]].size, Image.Resampling.BICUBIC)
            errors[height].append(np.abs(np.asarray(image, dtype=np.float32) - target).mean())
        if i % 97 == 0 and len(shown) < 4:
            shown.append((names[i % len(names)], rows))

    print('| rendered at | mean difference to 1024 px, of 255 | 95th percentile | rendering alone, one process |')
    print('| --- | --- | --- | --- |')
    for height in HEIGHTS:
        mean, high = (np.mean(errors[height]), np.percentile(errors[height], 95)) if height in errors else (0.0, 0.0)
        print(f'| {height} px | {mean:.2f} | {high:.2f} | {args.images / seconds[height]:.0f} images/s |')
    if args.picture:
        sheet = Image.new('RGB', (2 * 330, 250 * len(shown)), 'white')
        draw = ImageDraw.Draw(sheet)
        for row, (name, rows) in enumerate(shown):
            for column, height in enumerate((448, 1024)):
                draw.text((330 * column + 6, 250 * row + 4), f'{name}, {height} px', fill='black')
                crop = rows[height].crop((0, 0, min(rows[height].width, 318), 224))
                sheet.paste(crop, (330 * column + 6, 250 * row + 20))
        sheet.save(args.picture)


if __name__ == '__main__':
    main()
