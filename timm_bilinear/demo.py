"""The main job from end to end: images, fine-tuning, a saved model, and what it says when loaded back."""

import random
from pathlib import Path
from typing import Union

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from .finetune import finetune
from .fonts import demo_fonts, render_dataset

__all__ = ['demo']


def demo(output: Union[str, Path] = '.demo') -> float:
    """Fine-tune `bcnn_resnet18` from nothing to tell 12 font families apart, save, load back, test.

    The stream ends at stage 3, where 112 px give a 7 x 7 grid.

    Args:
        output: Folder for images and model.

    Returns:
        Top-1 accuracy of the loaded model on the test split, in percent.
    """
    output = Path(output)
    fonts = demo_fonts()
    data = render_dataset(output / 'fonts', fonts, dict(train=400, val=40, test=40), size=128, train_render=256)
    folder = output / 'model'
    if (folder / 'config.json').is_file():
        print(f"Using the model in '{folder}'; remove it to train again.")
    else:
        finetune(
            data,
            folder,
            model='bcnn_resnet18',
            pretrained=False,
            model_kwargs=dict(out_index_a=3),
            img_size=112,
            batch_size=32,
            epochs=12,
            train_aug=dict(scale=(0.6, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=None),
            amp_dtype='bfloat16',
            resume=(folder / 'checkpoints' / 'last.pth.tar').is_file(),
        )

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    names = model.pretrained_cfg['label_names']
    paths = sorted((data / 'test').glob('*/*.png'))
    correct = 0
    for start in range(0, len(paths), 50):
        batch = paths[start : start + 50]
        with torch.inference_mode():
            top1 = model(torch.stack([transform(Image.open(p).convert('RGB')) for p in batch])).argmax(1)
        correct += sum(names[i] == p.parent.name for i, p in zip(top1.tolist(), batch))
    accuracy = 100 * correct / len(paths)

    print(f'\nLoaded from {folder}. Predictions for some test images (none of their texts were seen in training):')
    for path in random.Random(0).sample(paths, 6):
        with torch.inference_mode():
            probs = model(transform(Image.open(path).convert('RGB')).unsqueeze(0)).softmax(1)[0]
        best = probs.topk(2)
        guesses = ', '.join(f'{names[i]} {100 * p:.0f} %' for p, i in zip(best.values.tolist(), best.indices.tolist()))
        print(f'  {path}: {guesses}')
    print(f'Top-1 on {len(paths)} test images of {len(fonts)} families: {accuracy:.1f} %')
    return accuracy
