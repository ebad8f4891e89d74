"""Measure a model on the test split of rendered fonts, and draw the fonts it confuses most.

python hub/fonts/report.py hub/bcnn_resnet18_c4.googlefonts images fonts --picture confusions.png
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from PIL import Image, ImageDraw, ImageFont
from render import Face, find_fonts

from timm_bilinear.data.folder import create_split
from timm_bilinear.tools.evaluate import evaluate_dataset
from timm_bilinear.tools.inference import load
from timm_bilinear.tools.metrics import confused_pairs


@dataclass
class Report:
    """Measurements on a test split.

    Args:
        images: Number of images.
        fonts: Number of fonts they are set in.
        families: Number of these fonts' families.
        top1: Images whose font was named, in percent.
        family_top1: Images whose font's family was named, in percent.
        parameters: Number of the model's parameters.
        confusions: Pairs of fonts in alphabetical order, with the number of images of either taken for the other.
    """

    images: int
    fonts: int
    families: int
    top1: float
    family_top1: float
    parameters: int
    confusions: List[Tuple[Tuple[str, str], int]]


def read_families(images: Path) -> Dict[str, str]:
    """Family of each class of a folder rendered by build.py: the folder its font lay in."""
    fonts = json.loads((images / 'fonts.json').read_text())['fonts']
    return {name: faces[0]['path'].split('/')[0] for name, faces in fonts.items()}


def measure(model_dir: Path, images: Path) -> Report:
    """Measure a saved model, under bfloat16 autocast where the CPU has it, as it was trained.

    Args:
        model_dir: Folder with config.json and model.safetensors.
        images: Folder rendered by build.py.

    Raises:
        FileNotFoundError: If the images are not there.
        ValueError: If the model has no names of classes, or the images show a font that it does not know.
    """
    model = load(model_dir, device='cpu')
    names = list(model.pretrained_cfg.get('label_names') or ())
    if not names:
        raise ValueError(f"The config.json in '{model_dir}' has no label_names.")
    families = read_families(images)
    test = create_split(images, 'test', class_names=names).splits['test']
    result = evaluate_dataset(model, test, names, batch_size=64)
    targets, guesses = result.images.targets.tolist(), result.images.predictions.tolist()
    fonts = {names[target] for target in targets}
    # the model may know fonts, and so families, that these images do not show
    right = [families[names[target]] == families.get(names[guess]) for target, guess in zip(targets, guesses)]
    return Report(
        len(targets),
        len(fonts),
        len({families[name] for name in fonts}),
        result.metrics['top1'],
        100 * sum(right) / len(right),
        sum(p.numel() for p in model.parameters()),
        sorted(
            (
                (tuple(sorted((names[a], names[b]))), sum(errors))
                for (a, b), errors in confused_pairs(result.images.targets, result.images.predictions)
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
    parser.add_argument('images', type=Path, help='folder rendered by build.py')
    parser.add_argument('fonts', type=Path, help='folder of the fonts')
    parser.add_argument('--picture', type=Path, help='file for the picture of the most confused fonts')
    args = parser.parse_args()
    try:
        fonts = find_fonts(args.fonts)[0]
        report = measure(args.model, args.images)
        print(f'{report.images} images of {report.fonts} fonts, {report.parameters:,} parameters')
        print(f'top-1 {report.top1:.2f} %, family top-1 {report.family_top1:.2f} %')
        for (a, b), errors in report.confusions[:10]:
            print(f'{errors:4d} {a} / {b}')
        if args.picture:
            draw_confusions(report, fonts).save(args.picture)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'report.py: error: {e}')


if __name__ == '__main__':
    main()
