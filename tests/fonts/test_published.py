"""The weights in hub/: that they load, are what push sends, and tell fonts apart that they were not rendered from."""

import json
from pathlib import Path

import pytest
import timm
import torch
from render import Face, FontDataset, demo_fonts
from timm.data import create_transform, resolve_model_data_config

from timm_bilinear import push_to_hub

NAME = 'bcnn_resnet18_c4.googlefonts'
FOLDER = Path(__file__).parents[2] / 'hub' / NAME


@pytest.fixture(scope='module')
def model():
    return timm.create_model(f'local-dir:{FOLDER}', pretrained=True).eval()


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
    assert json.dumps(resolve_model_data_config(model)) == json.dumps(resolve_model_data_config(of_tag))


def test_names_the_families_of_other_files(model):
    families = ['inter', 'montserrat', 'open-sans', 'playfair-display', 'roboto']
    faces = {name: [f for f in demo_fonts()[name] if f.weight in (None, 400)][:1] for name in families}
    assert all(isinstance(face, Face) for (face,) in faces.values())
    transform = create_transform(**resolve_model_data_config(model))
    images, labels = zip(*FontDataset(faces, 'test', 8, transform=transform))
    with torch.inference_mode():
        guesses = model(torch.stack(images)).argmax(1).tolist()
    names = model.pretrained_cfg['label_names']
    correct = [names[guess].startswith(f'{families[label]}-latin') for guess, label in zip(guesses, labels)]
    assert sum(correct) >= 32, [(families[label], names[guess]) for guess, label in zip(guesses, labels)]
