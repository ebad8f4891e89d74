"""An image folder of every font below a folder: train and val by render.py, test by GoogleFontsBench's protocol.

    python hub/fonts/build.py fonts --npm                       # only get the benchmark's 32 families, 378 fonts
    python hub/fonts/build.py fonts images --npm lora inter     # these families
    python hub/fonts/build.py fonts images --select '*-700-*'   # only fonts of such names
    python hub/fonts/build.py my_fonts images                   # a folder per family with .woff2, .woff, .ttf or .otf

Run again with the same arguments it renders what is missing.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from faces import find_fonts
from folder import render_folder
from tqdm import tqdm

FAMILIES = (
    'big-shoulders-text bricolage-grotesque crimson-pro dm-sans geist hedvig-letters-serif instrument-sans '
    'instrument-serif inter jetbrains-mono lexend-deca lora merriweather montserrat newsreader nunito-sans onest '
    'open-sans petrona playfair-display plus-jakarta-sans poppins pt-serif-caption rethink-sans roboto roboto-serif '
    'shippori-mincho sora space-grotesk ultra urbanist work-sans'
).split()


def fetch_family(family: str, root: Path):
    """Get the latin fonts of a family and their licence from npm into a folder of its name, if it is not there yet.

    Raises:
        RuntimeError: If npm is absent or cannot pack the family, with npm's reason, or the package has no latin font.
    """
    folder = root / family
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=f'.{family}.', dir=root) as work:
        try:
            command = ['npm', 'pack', '--loglevel=error', f'@fontsource/{family}', '--pack-destination', work]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as e:
            raise RuntimeError("There is no 'npm' to get fonts with; install it or give a folder of fonts.") from e
        except subprocess.CalledProcessError as e:
            reason = next(iter(e.stderr.strip().splitlines()[1:]), f'exit code {e.returncode}')
            raise RuntimeError(f"npm could not get the font family '{family}': {reason}") from e
        partial = Path(work) / family
        partial.mkdir()
        with tarfile.open(next(Path(work).glob('*.tgz'))) as tar:
            for member in tar:
                name = Path(member.name).name
                if name == 'LICENSE' or re.fullmatch(rf'{family}-latin-\d+-\w+\.woff2', name):
                    (partial / name).write_bytes(tar.extractfile(member).read())
        if not any(partial.glob('*.woff2')):
            raise RuntimeError(f"The npm package of the font family '{family}' has no latin fonts.")
        partial.rename(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('fonts', type=Path, help='folder of fonts')
    parser.add_argument('images', type=Path, nargs='?', help='folder for train, val and test, with a folder per font')
    parser.add_argument('--npm', nargs='*', metavar='FAMILY', help='first get families from npm (none named: all 32)')
    parser.add_argument('--select', default='*', metavar='PATTERN', help='only fonts whose file name matches')
    parser.add_argument(
        '--train', type=int, default=100, help='training images per font, 0 for none (default: %(default)s)'
    )
    parser.add_argument(
        '--val', type=int, default=10, help='validation images per font, 0 for none (default: %(default)s)'
    )
    parser.add_argument('--test', type=int, default=40, help='test images per font, 0 for none (default: %(default)s)')
    parser.add_argument('--size', type=int, default=224, help='height and width of images (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, help='processes (default: one per core)')
    args = parser.parse_args()
    try:
        if args.npm is not None:
            args.fonts.mkdir(parents=True, exist_ok=True)
            for family in tqdm(args.npm or FAMILIES, desc='Getting fonts', unit='family'):
                fetch_family(family, args.fonts)
        fonts, families, skipped = find_fonts(args.fonts)
        for sentence in skipped:
            print(f'Skipped: {sentence}', file=sys.stderr)
        if args.npm is not None:
            fonts = {name: faces for name, faces in fonts.items() if families[name] in (args.npm or FAMILIES)}
        fonts = {name: faces for name, faces in fonts.items() if fnmatchcase(name, args.select)}
        if not fonts:
            raise ValueError(f"No font of '{args.fonts}' matches '{args.select}'.")
        print(f'{len(fonts)} fonts of {len({families[name] for name in fonts})} families, {len(skipped)} skipped')
        counts = dict(train=args.train, val=args.val, test=args.test)
        counts = {split: count for split, count in counts.items() if count != 0}
        if args.images is not None:
            render_folder(args.images, fonts, counts, args.size, args.seed, args.workers)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'build.py: error: {e}')


if __name__ == '__main__':
    main()
