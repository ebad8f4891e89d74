import pytest
import torch
from fake_hub import fake_hub
from small_models import create

from timm_bilinear.models import download


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(download, 'WAITS', (0.0, 0.0, 0.0))
    with fake_hub(monkeypatch, tmp_path / 'cache') as server:
        yield server


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create(backbone_a='test_resnet', backbone_b='test_vit', proj_dim=8, eps=1e-3, num_classes=3)
