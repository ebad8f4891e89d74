"""The comparison of ways through the first stage: each trains, on the same images."""

import first_stage
import pytest
import timm
import torch
from finetune_cases import make_images

from timm_bilinear.hub import save_model


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'), counts=(8, 4), size=96)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model') / 'start'
    torch.manual_seed(0)
    save_model(timm.create_model('bcnn', backbone_a='test_resnet', out_index_a=1, num_classes=3), folder)
    return f'local-dir:{folder}'


def test_features_once(images, model):
    net = timm.create_model(model, pretrained=True).eval()
    seconds, accuracy = first_stage.features_once(net, images, 2, epochs=5)
    assert seconds > 0 and accuracy == 100


def test_ours(images, model):
    seconds, accuracy = first_stage.ours(model, images, epochs=5, workers=0)
    assert seconds > 0 and accuracy == 100
