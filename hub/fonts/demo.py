"""The main job from end to end: images, fine-tuning from weights, a saved model, and what it says when loaded back.

python hub/fonts/demo.py --output .demo
"""

import argparse
import random
import sys
from pathlib import Path
from typing import List, Tuple, Union

from faces import demo_fonts
from folder import render_folder
from PIL import Image, ImageDraw

from timm_bilinear import predict
from timm_bilinear.tools.finetune import Stage, finetune

__all__ = ['demo']

_WEIGHTS = Path(__file__).parents[1] / 'bcnn_resnet18_c4.googlefonts378'


def _draw(predictions: List[Tuple[Path, str, float]]) -> Image.Image:
    """Images with what the model says of them, three to a row."""
    sheet = Image.new('RGB', (3 * 240, 256 * -(-len(predictions) // 3)), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (path, name, probability) in enumerate(predictions):
        x, y = 240 * (i % 3) + 8, 256 * (i // 3) + 6
        image = Image.open(path)
        image.thumbnail((224, 224))
        sheet.paste(image, (x, y))
        color = 'black' if name == path.parent.name else 'firebrick'
        draw.text((x, y + 230), f'{name}, {100 * probability:.0f} %', fill=color)
    return sheet


def demo(output: Union[str, Path] = '.demo', weights: Union[str, Path] = _WEIGHTS) -> float:
    """Fine-tune `bcnn_resnet18_c4.googlefonts378` to tell 12 font families apart, save, load back, test.

    Args:
        output: Folder for images and model.
        weights: Folder of the model to start from.

    Returns:
        Top-1 accuracy of the loaded model on the test split, in percent.

    Raises:
        FileNotFoundError: If the weights are not there.
    """
    output, weights = Path(output), Path(weights)
    if not (weights / 'config.json').is_file():
        raise FileNotFoundError(f"'{weights}' has no config.json; run the demo in a checkout of timm_bilinear.")
    fonts = demo_fonts()
    # the test is drawn by another renderer than what is trained on, from other texts
    data = render_folder(output / 'fonts', fonts, dict(train=160, val=20, test=40))
    folder = output / 'model'
    if (folder / 'config.json').is_file():
        print(f"Using the model in '{folder}'; remove it to train again.")
    else:
        finetune(
            data,
            folder,
            model=f'local-dir:{weights}',
            # the classifier is fresh: gradients through it would spoil the streams
            stages=[
                Stage(10, 'adamw', lr=0.0, head_lr=1e-2, weight_decay=0.0),
                Stage(1, 'adamw', lr=3e-4, head_lr=3e-3, weight_decay=0.05),
            ],
            train_aug=dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=None),
            amp_dtype='bfloat16',
            resume=True,
        )

    paths = sorted((data / 'test').glob('*/*.png'))
    best = [result['predictions'][0] for result in predict(folder, paths, topk=1)]
    predictions = [(path, each['name'], each['probability']) for path, each in zip(paths, best)]
    accuracy = 100 * sum(name == path.parent.name for path, name, _ in predictions) / len(paths)

    shown = random.Random(0).sample(predictions, 6)
    _draw(shown).save(output / 'predictions.png')
    print(f"\nLoaded from '{folder}'. Some test images, drawn by another renderer ({output}/predictions.png):")
    for path, name, probability in shown:
        print(f'  {path}: {name} {100 * probability:.0f} %')
    print(f'Top-1 on {len(paths)} test images of {len(fonts)} families: {accuracy:.1f} %')
    return accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', default='.demo', help='folder for images and model (default: %(default)s)')
    args = parser.parse_args()
    try:
        demo(args.output)
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'demo.py: error: {e}')
    except KeyboardInterrupt as e:
        print(f'demo.py: {e}', file=sys.stderr)
        sys.exit(getattr(e, 'exit_code', 130))


if __name__ == '__main__':  # the renderer's worker processes import this file too
    main()
