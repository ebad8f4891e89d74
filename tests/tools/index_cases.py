"""A small model, images of three classes and the commands: for the tests of indexes and of search."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import ONE

from timm_bilinear.cli import main
from timm_bilinear.hub import save_model
from timm_bilinear.tools import vectors

CLASSES = ('cat', 'dog', 'owl')


def save(folder, seed=0, **kwargs):
    """Folder of a model, of which those of a seed have the same weights."""
    torch.manual_seed(seed)
    save_model(timm.create_model('bcnn', **{**ONE, **kwargs}), folder, data_config=dict(input_size=(3, 96, 96)))
    return str(folder)


def draw(path, seed):
    """Coarse noise: of one seed alike, of others not."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).resize((120, 90)).save(path)


def draw_classes(folder):
    for i in range(12):
        draw(folder / CLASSES[i % 3] / f'{i}.png', i)
    return folder


def run(*args, code=0):
    """Call the command; an error's text is returned."""
    if code == 0:
        return main([*map(str, args)])
    with pytest.raises(SystemExit) as e:
        main([*map(str, args)])
    return e.value.code


def count_described(monkeypatch):
    """List that the sizes of the batches that are described are added to."""
    seen, describe = [], vectors.describe

    def counted(net, pixels, amp_dtype=None):
        seen.append(len(pixels))
        return describe(net, pixels, amp_dtype)

    monkeypatch.setattr(vectors, 'describe', counted)
    return seen
