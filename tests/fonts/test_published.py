"""The weights in hub/: that they load, are what push sends, and tell fonts apart that they were not rendered from."""

import json
import random
from pathlib import Path

import pytest
import timm
import torch
from faces import demo_fonts
from protocol import draw_protocol, prose

from timm_bilinear import load, predict, push_to_hub

NAME = 'bcnn_resnet18_c4.googlefonts378'
FOLDER = Path(__file__).parents[2] / 'hub' / NAME


@pytest.fixture(scope='module')
def model():
    return load(FOLDER)


def test_is_what_push_sends(tmp_path):
    push_to_hub(FOLDER, f'timm-bilinear/{NAME}', dry_run=tmp_path / 'repo')
    files = {p.name: p.read_bytes() for p in FOLDER.iterdir()}
    assert sorted(files) == ['README.md', 'config.json', 'confusions.png', 'model.safetensors']
    assert {p.name: p.read_bytes() for p in (tmp_path / 'repo').iterdir()} == files
    assert len(files['model.safetensors']) <= 40e6


def test_fits_the_tag(model):
    of_tag = timm.create_model(NAME)
    of_tag.load_state_dict(model.state_dict())
    assert all(param.dtype == torch.float32 for param in model.parameters())
    # tuples are lists in config.json
    configs = [json.dumps(timm.data.resolve_model_data_config(net)) for net in (model, of_tag)]
    assert configs[0] == configs[1] and '"crop_mode": "border"' in configs[0]


@pytest.mark.parametrize('pitch', [1.0, 1.2, 1.6])
def test_names_the_families_of_other_files(model, pitch):
    """Of images of another renderer, of files that are not those trained on, whatever the distance of lines."""
    families = ['inter', 'montserrat', 'open-sans', 'playfair-display', 'roboto']
    corpus = prose()
    names, images = [], []
    for name in families:
        face = next(f for f in demo_fonts()[name] if f.weight in (None, 400))
        for i in range(6):
            names.append(name)
            images.append(draw_protocol(face, 'sentence', corpus, random.Random(f'{name}{i}'), pitch=pitch))
    guesses = [result['predictions'][0]['name'] for result in predict(model, images, topk=1)]
    correct = [guess.startswith(f'{name}-latin') for name, guess in zip(names, guesses)]
    assert sum(correct) >= 27, list(zip(names, guesses))
