"""Models whose every answer is known, and images to ask them about: for the tests of evaluation."""

import csv
import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from timm_bilinear.tools.evaluate import evaluate

NAMES = ['ant', 'bee', 'cat, wild', 'dog', 'eel', 'fox', 'gnu']
CENTRES = [20, 55, 90, 125, 160, 195, 230]
# Grey levels of images by class: most are next to their class's centre.
LEVELS = {'ant': [20, 25, 54], 'bee': [55, 50, 60, 91], 'cat, wild': [90, 88], 'dog': [125, 92, 93], 'fox': [194]}
FILES = [
    'classes.csv',
    'confused_pairs.png',
    'confusion_matrix.csv',
    'confusion_matrix.png',
    'metrics.json',
    'predictions.csv',
    'worst_images.png',
]


class Nearest(nn.Module):
    """Takes the class whose grey level is nearest to the image's."""

    def __init__(self, centres=CENTRES, names=NAMES, poison=None):
        super().__init__()
        self.num_classes = len(centres)
        self.centres = nn.Parameter(torch.tensor(centres, dtype=torch.float32))
        self.poison = poison
        self.pretrained_cfg = dict(
            architecture='nearest',
            input_size=(3, 16, 16),
            interpolation='bilinear',
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            crop_pct=1.0,
            label_names=names,
        )

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            level = 255 * x.float().mean((1, 2, 3))[:, None]
            logits = -((level - self.centres) ** 2) / 300
            if self.poison is not None:
                logits = torch.where((level - self.poison).abs() < 0.5, math.nan, logits)
            return logits


def expected(levels=LEVELS, names=NAMES, centres=CENTRES):
    """(name, target, prediction, softmax of the logits) in the order of the files."""
    rows = []
    for name in sorted(levels):
        for i, level in enumerate(levels[name]):
            logits = -((level - np.array(centres, float)) ** 2) / 300
            probs = np.exp(logits - logits.max())
            rows.append((f'{name}/{i}.png', names.index(name), int(logits.argmax()), probs / probs.sum()))
    return rows


def write(folder, levels=LEVELS):
    for name, values in levels.items():
        (folder / name).mkdir(parents=True)
        for i, level in enumerate(values):
            Image.new('RGB', (24, 18), (level,) * 3).save(folder / name / f'{i}.png')
    return folder


def run(*args, **kwargs):
    return evaluate(*args, **dict(dict(workers=0, device='cpu', progress=False), **kwargs))


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))
