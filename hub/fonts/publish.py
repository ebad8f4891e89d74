"""Make the folder that `timm-bilinear push` sends, from a model of train.py: weights, config, card and picture.

python hub/fonts/publish.py run/model fonts hub/bcnn_resnet18_c4.googlefonts378 images/protocol images/chromium
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

from faces import find_fonts
from report import Report, draw_confusions, measure

from timm_bilinear import push_to_hub

_LICENSES = {'SIL OPEN FONT LICENSE': 'SIL Open Font License 1.1', 'APACHE LICENSE': 'Apache License 2.0'}

_TARGETS = {'protocol': (97.0, 99.0), 'chromium': (90.0, 97.0)}  # top-1 of fonts and of families, in percent

_CARD = """
## Fonts

Which of {first.fonts} fonts of {first.families} Google Fonts families a text is set in: the static fonts of
GoogleFontsBench ([arXiv 2602.13889](https://arxiv.org/abs/2602.13889)), whose variable ones are left out. Trained on
renderings of our own in random layouts (hub/fonts/render.py of timm_bilinear), in which line spacing, size, place,
colours and sharpness say nothing of the font. Tested on images of renderers that share no code with it:

| images | number | top-1, {first.fonts} fonts | top-5 | top-1, {first.families} families |
| --- | --- | --- | --- | --- |
{rows}

{kinds}

{targets}
{retrieval}
For comparison, on the benchmark's own images of its 394 fonts: DINOv2-B + LoRA 99.0 %, ResNet-50 from ImageNet 98.8 %,
as published. The fonts confused most in `{name}`:

![Text in the ten pairs of fonts confused most](confusions.png)

No font is part of this repo. The weights were trained on images of text in these families:

{licenses}
"""


_RETRIEVAL = """
Fonts that it has never seen, looked up by its descriptors (`hub/fonts/retrieval.py`): {queries:,} queries of one
renderer in a gallery of {gallery:,} images of another, {families} families that are in no training set.

| right is an image of | {names} |
| --- | {lines} |
{rows}
"""


def describe_retrieval(rows: List[Dict[str, Any]]) -> str:
    """The part of the card about look-up, from the scores that retrieval.py writes."""
    first = rows[0]
    return _RETRIEVAL.format(
        **{k: first[k] for k in ('queries', 'gallery')},
        families=rows[-1]['labels'],
        names=' | '.join(first['scores']),
        lines=' | '.join('---' for _ in first['scores']),
        rows='\n'.join(
            f'| the same {row["what"]} of {row["labels"]} | '
            + ' | '.join(f'{value:.1f} %' for value in row['scores'].values())
            + ' |'
            for row in rows
        ),
    )


def describe_targets(reports: Dict[str, Report]) -> str:
    """How far it is to the targets, which were set before training."""
    lines = []
    for name, targets in _TARGETS.items():
        if name not in reports:
            continue
        reached = (reports[name].top1, reports[name].family_top1)
        missed = [
            f'{what} missed by {target - got:.1f} points'
            for what, target, got in zip(('fonts', 'families'), targets, reached)
            if got < target
        ]
        lines.append(
            f'- {name}, {targets[0]:.0f} % of fonts and {targets[1]:.0f} % of families: {", ".join(missed) or "met"}'
        )
    why = 'Training ended with the time for it, on two CPU cores, and every run of it was still rising.'
    return '\n'.join(['What was to be reached:', '', *lines, '', why]) if lines else ''


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


def complete_card(reports: Dict[str, Report], licenses: Dict[str, List[str]], retrieval: str = '') -> str:
    """The part of the card that is about the fonts, from measurements by the name of the renderer."""
    name, first = next(iter(reports.items()))
    return _CARD.format(
        first=first,
        name=name,
        rows='\n'.join(
            f'| {name} | {r.images:,} | {r.top1:.1f} ± {r.error:.1f} % | {r.top5:.1f} % | {r.family_top1:.1f} % |'
            for name, r in reports.items()
        ),
        kinds='\n'.join(
            f'- {name}: ' + ', '.join(f'{kind} {top1:.1f} %' for kind, (_, top1) in r.kinds.items())
            for name, r in reports.items()
            if 1 < len(r.kinds) < r.images
        ),
        targets=describe_targets(reports),
        retrieval=retrieval,
        licenses='\n'.join(f'- {name}: {", ".join(families)}' for name, families in sorted(licenses.items())),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path, help='folder of the model')
    parser.add_argument('fonts', type=Path, help='folder of the fonts, one per family, each with its LICENSE')
    parser.add_argument('folder', type=Path, help='new folder')
    parser.add_argument('images', type=Path, nargs='+', help='folders of images, one per renderer, named after it')
    parser.add_argument('--retrieval', type=Path, help='file of scores that retrieval.py wrote')
    args = parser.parse_args()
    try:
        retrieval = describe_retrieval(json.loads(args.retrieval.read_text())) if args.retrieval else ''
        licenses = font_licenses(args.fonts)
        fonts, families, _ = find_fonts(args.fonts)
        if args.folder.exists() and any(args.folder.iterdir()):
            raise FileExistsError(f"'{args.folder}' is not empty.")
        push = partial(push_to_hub, args.model, f'timm-bilinear/{args.folder.name}', license='apache-2.0', half=True)
        with tempfile.TemporaryDirectory() as scratch:
            # what is measured is what is published, in half precision
            half = Path(push(dry_run=f'{scratch}/half'))
            reports = {images.name: measure(half, images, families) for images in args.images}
        name, first = next(iter(reports.items()))
        dataset = f'{first.fonts} static fonts of GoogleFontsBench, {name}'
        push(dry_run=args.folder, metrics=dict(test_top1=first.top1), dataset=dataset)
        draw_confusions(first, fonts).save(args.folder / 'confusions.png', optimize=True)
        card = args.folder / 'README.md'
        card.write_text(card.read_text() + complete_card(reports, licenses, retrieval))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'publish.py: error: {e}')
    for name, report in reports.items():
        print(f'{name}: {report.top1:.2f} % of {report.images} images')


if __name__ == '__main__':
    main()
