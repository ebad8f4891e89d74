"""Make the folder that `timm-bilinear push` sends, from a run of train.py: weights, config, card and picture.

python hub/fonts/publish.py run images fonts hub/bcnn_resnet18_c4.googlefonts
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Dict, List

from render import find_fonts
from report import Report, draw_confusions, measure

from timm_bilinear import push_to_hub

_LICENSES = {'SIL OPEN FONT LICENSE': 'SIL Open Font License 1.1', 'APACHE LICENSE': 'Apache License 2.0'}

_CARD = """
## GoogleFontsBench

Which of {half.fonts} fonts of {half.families} Google Fonts families a text is set in
([arXiv 2602.13889](https://arxiv.org/abs/2602.13889)). The texts are our own, those of the test split in no other
split, rendered at 1024 px by the published protocol: {images} images, {per_font} of each font. Trained from nothing.

| | top-1, {half.fonts} fonts | top-1, {half.families} families | parameters |
| --- | --- | --- | --- |
| these weights, matrices in half precision | {half.top1:.2f} % | {half.family_top1:.2f} % | {parameters:.1f} M |
| the same in float32, as trained | {full.top1:.2f} % | {full.family_top1:.2f} % | {parameters:.1f} M |
| DINOv2-B + LoRA, as published on its authors' texts | 99.0 % | | 87.2 M |
| ResNet-50 from ImageNet, as published on its authors' texts | 98.8 % | | |

{errors} of {wrong} errors stay within the family. The pairs confused most:

![Text in the ten pairs of fonts confused most](confusions.png)

## Fonts

No font is part of this repo. The weights were trained on images of text in these families:

{licenses}
"""


def font_licenses(fonts: Path) -> Dict[str, List[str]]:
    """Families by licence, of the LICENSE file in each family's folder.

    Raises:
        ValueError: If a family has none, or one that is not known here.
    """
    families: Dict[str, List[str]] = {}
    for folder in sorted(p for p in fonts.iterdir() if p.is_dir() and not p.name.startswith('.')):
        file = folder / 'LICENSE'
        text = file.read_text().upper() if file.is_file() else ''
        name = next((name for mark, name in _LICENSES.items() if mark in text), None)
        if name is None:
            raise ValueError(f"'{file}' is not there or none of {', '.join(_LICENSES.values())}.")
        families.setdefault(name, []).append(folder.name)
    return families


def complete_card(full: Report, half: Report, licenses: Dict[str, List[str]]) -> str:
    """The part of the card that is about the fonts."""
    wrong = half.images - round(half.images * half.top1 / 100)
    return _CARD.format(
        images=f'{half.images:,}',
        per_font=half.images // half.fonts,
        full=full,
        half=half,
        parameters=half.parameters / 1e6,
        errors=wrong - (half.images - round(half.images * half.family_top1 / 100)),
        wrong=wrong,
        licenses='\n'.join(f'- {name}: {", ".join(families)}' for name, families in sorted(licenses.items())),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of train.py')
    parser.add_argument('images', type=Path, help='folder rendered by build.py')
    parser.add_argument('fonts', type=Path, help='folder of the fonts, one per family, each with its LICENSE')
    parser.add_argument('folder', type=Path, help='new folder')
    args = parser.parse_args()
    try:
        licenses, fonts = font_licenses(args.fonts), find_fonts(args.fonts)[0]
        if args.folder.exists() and any(args.folder.iterdir()):
            raise FileExistsError(f"'{args.folder}' is not empty.")
        full = measure(args.run, args.images)
        push = partial(
            push_to_hub,
            repo_id='timm-bilinear/bcnn_resnet18_c4.googlefonts',
            license='apache-2.0',
            dataset='GoogleFontsBench',
            half=True,
        )
        with tempfile.TemporaryDirectory() as scratch:
            half = measure(Path(push(args.run, dry_run=f'{scratch}/half')), args.images)
            picture = draw_confusions(half, fonts)
            # the card tells the results of the weights it lies with, not those of the run in float32
            push(args.run, dry_run=args.folder, metrics=dict(test_top1=half.top1))
        picture.save(args.folder / 'confusions.png', optimize=True)
        card = args.folder / 'README.md'
        card.write_text(card.read_text() + complete_card(full, half, licenses))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'publish.py: error: {e}')
    print(f'float32 {full.top1:.2f} %, half {half.top1:.2f} % of {half.images} images: {args.folder}')


if __name__ == '__main__':
    main()
