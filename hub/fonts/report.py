"""Measure a model on images of fonts, by the renderer that drew them, and draw the fonts it confuses most.

    python hub/fonts/report.py hub/FOLDER fonts images/protocol images/chromium --picture confusions.png

Each folder of images has a folder `test` with a folder per font. Kinds of images are told apart by what stands before
the first `_` in the names of the files.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from faces import Face, find_fonts
from PIL import Image, ImageDraw, ImageFont

from timm_bilinear.data.folder import create_split
from timm_bilinear.tools.evaluate import evaluate_dataset
from timm_bilinear.tools.inference import load
from timm_bilinear.tools.metrics import confused_pairs

__all__ = ['Report', 'draw_confusions', 'measure', 'read_families']


@dataclass
class Report:
    """Measurements on the images of one renderer.

    Args:
        images: Number of images.
        fonts: Number of fonts they are set in.
        families: Number of these fonts' families.
        top1: Images whose font was named, in percent.
        top5: Images whose font was among the first five, in percent.
        family_top1: Images whose font's family was named, in percent.
        error: Standard error of `top1`, in percent.
        parameters: Number of the model's parameters.
        kinds: Number of images and `top1`, by kind.
        confusions: Pairs of fonts in alphabetical order, with the number of images of either taken for the other.
    """

    images: int
    fonts: int
    families: int
    top1: float
    top5: float
    family_top1: float
    error: float
    parameters: int
    kinds: Dict[str, Tuple[int, float]]
    confusions: List[Tuple[Tuple[str, str], int]]


def read_families(images: Path) -> Dict[str, str]:
    """Family of each class of a folder rendered by build.py: the folder its font lay in."""
    fonts = json.loads((images / 'fonts.json').read_text())['fonts']
    return {name: faces[0]['path'].split('/')[0] for name, faces in fonts.items()}


def measure(model_dir: Path, images: Path, families: Dict[str, str]) -> Report:
    """Measure a saved model with the views that `predict` takes, under bfloat16 autocast where the CPU has it.

    Args:
        model_dir: Folder with config.json and model.safetensors.
        images: Folder with a folder `test`, which has a folder per font.
        families: Family of each font.

    Raises:
        FileNotFoundError: If the images are not there.
        ValueError: If the model has no names of classes, or the images show a font that it does not know.
    """
    model = load(model_dir, device='cpu')
    names = list(model.pretrained_cfg.get('label_names') or ())
    if not names:
        raise ValueError(f"The config.json in '{model_dir}' has no label_names.")
    test = create_split(images, 'test', class_names=names).splits['test']
    # as `predict` does it by default
    result = evaluate_dataset(model, test, names, tta='auto', batch_size=32).images
    targets, guesses = result.targets.tolist(), result.predictions.tolist()
    fonts = {names[target] for target in targets}
    # the model may know fonts, and so families, that these images do not show
    is_family = [families[names[target]] == families.get(names[guess]) for target, guess in zip(targets, guesses)]
    by_kind: Dict[str, List[bool]] = {}
    for path, target, guess in zip(test.paths, targets, guesses):
        by_kind.setdefault(Path(path).stem.split('_')[0], []).append(target == guess)
    top1 = (result.targets == result.predictions).double().mean().item()
    return Report(
        len(targets),
        len(fonts),
        len({families[name] for name in fonts}),
        100 * top1,
        100 * (result.ranks <= 5).double().mean().item(),
        100 * sum(is_family) / len(is_family),
        100 * (top1 * (1 - top1) / len(targets)) ** 0.5,
        sum(p.numel() for p in model.parameters()),
        {kind: (len(right), 100 * sum(right) / len(right)) for kind, right in sorted(by_kind.items())},
        sorted(
            (
                (tuple(sorted((names[a], names[b]))), sum(errors))
                for (a, b), errors in confused_pairs(result.targets, result.predictions)
            ),
            key=lambda item: (-item[1], item[0]),
        ),
    )


def draw_confusions(report: Report, fonts: Dict[str, List[Face]], count: int = 10) -> Image.Image:
    """The worst pairs, each as one text in both fonts.

    Args:
        report: Measurements.
        fonts: Faces by class.
        count: Number of pairs.

    Raises:
        ValueError: If the faces of a font are not there.
    """
    small = ImageFont.load_default(13)
    image = Image.new('RGB', (980, 92 * count + 8), 'white')
    draw = ImageDraw.Draw(image)
    for row, (pair, errors) in enumerate(report.confusions[:count]):
        for i, name in enumerate(pair):
            if name not in fonts:
                raise ValueError(f"There is no font '{name}' to draw what it was confused with.")
            y = 92 * row + 10 + 40 * i
            draw.text((12, y + 8), name, fill='black', font=small)
            draw.text((330, y), 'Grumpy wizards: 375 & $9', fill='black', font=fonts[name][0].at(30))
        draw.text(
            (820, 92 * row + 38),
            f'{errors} of {2 * report.images // report.fonts} images',
            fill='firebrick',
            font=small,
        )
        draw.line((12, 92 * row + 96, 968, 92 * row + 96), fill='lightgrey')
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path, help='folder with config.json and model.safetensors')
    parser.add_argument('fonts', type=Path, help='folder of the fonts, one per family')
    parser.add_argument('images', type=Path, nargs='+', help='folders of images, one per renderer')
    parser.add_argument('--picture', type=Path, help='file for the picture of the fonts confused most in the first')
    args = parser.parse_args()
    try:
        fonts, families, _ = find_fonts(args.fonts)
        reports = [measure(args.model, images, families) for images in args.images]
        for images, report in zip(args.images, reports):
            print(f'{images}: {report.images} images of {report.fonts} fonts, {report.parameters:,} parameters')
            print(f'  top-1 {report.top1:.2f} +- {report.error:.2f} %, top-5 {report.top5:.2f} %,', end=' ')
            print(f'family top-1 {report.family_top1:.2f} %')
            for kind, (count, top1) in report.kinds.items():
                print(f'  {kind}: {top1:.2f} % of {count}')
        for (a, b), errors in reports[0].confusions[:10]:
            print(f'{errors:4d} {a} / {b}')
        if args.picture:
            draw_confusions(reports[0], fonts).save(args.picture)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'report.py: error: {e}')


if __name__ == '__main__':
    main()
