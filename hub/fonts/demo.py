"""The main job from end to end: images, fine-tuning from weights, a saved model, and what it says when loaded back.

python hub/fonts/demo.py --output .demo
"""

import argparse
import random
import sys
from pathlib import Path
from typing import List, Tuple, Union

import timm
import torch
from PIL import Image, ImageDraw
from render import demo_fonts, render_dataset
from timm.data import create_transform, resolve_model_data_config

from timm_bilinear.tools.finetune import Stage, finetune

__all__ = ['demo']

_WEIGHTS = Path(__file__).parents[1] / 'bcnn_resnet18_c4.googlefonts'


def _draw(predictions: List[Tuple[Path, str, float]]) -> Image.Image:
    """Images with what the model says of them, three to a row."""
    sheet = Image.new('RGB', (3 * 240, 256 * -(-len(predictions) // 3)), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (path, name, probability) in enumerate(predictions):
        x, y = 240 * (i % 3) + 8, 256 * (i // 3) + 6
        sheet.paste(Image.open(path).resize((224, 224)), (x, y))
        color = 'black' if name == path.parent.name else 'firebrick'
        draw.text((x, y + 230), f'{name}, {100 * probability:.0f} %', fill=color)
    return sheet


def demo(output: Union[str, Path] = '.demo', weights: Union[str, Path] = _WEIGHTS) -> float:
    """Fine-tune `bcnn_resnet18_c4.googlefonts` to tell 12 font families apart, save, load back, test.

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
    data = render_dataset(output / 'fonts', fonts, dict(train=200, val=20, test=40))
    folder = output / 'model'
    if (folder / 'config.json').is_file():
        print(f"Using the model in '{folder}'; remove it to train again.")
    else:
        finetune(
            data,
            folder,
            model=f'local-dir:{weights}',
            train_size=112,
            # the classifier is fresh: gradients through it would spoil the streams
            stages=[
                Stage(10, 'adamw', lr=0.0, head_lr=1e-2, weight_decay=0.0),
                Stage(1, 'adamw', lr=3e-4, head_lr=3e-3, weight_decay=0.05),
            ],
            train_aug=dict(scale=(0.2, 0.32), ratio=(0.95, 1.05), hflip=0.0, color_jitter=None),
            amp_dtype='bfloat16',
            resume=True,
        )

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    names = model.pretrained_cfg['label_names']
    paths = sorted((data / 'test').glob('*/*.png'))
    predictions = []
    for start in range(0, len(paths), 50):
        batch = paths[start : start + 50]
        with torch.inference_mode():
            probs = model(torch.stack([transform(Image.open(p).convert('RGB')) for p in batch])).softmax(1)
        best = probs.max(1)
        predictions += zip(batch, (names[i] for i in best.indices), best.values.tolist())
    accuracy = 100 * sum(name == path.parent.name for path, name, _ in predictions) / len(paths)

    shown = random.Random(0).sample(predictions, 6)
    _draw(shown).save(output / 'predictions.png')
    print(f"\nLoaded from '{folder}'. Some test images, whose texts were not in training ({output}/predictions.png):")
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
