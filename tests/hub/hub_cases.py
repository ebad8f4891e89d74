"""A repo on the Hub of the tests: what is pushed into it and pulled out of it."""

import timm
import torch

import timm_bilinear
from timm_bilinear.hub import save_model

NAME = 'me/insects'
LABELS = ['ant', 'bee', 'cat']


def pull(name=NAME, **kwargs):
    return timm.create_model(f'hf-hub:{name}', pretrained=True, **kwargs).eval()


def push(model, **kwargs):
    return timm_bilinear.push_to_hub(model, NAME, label_names=LABELS, license='mit', **kwargs)


def files_of(model, tmp_path):
    folder = save_model(model, tmp_path / 'files', LABELS)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(loaded, model):
    x = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
