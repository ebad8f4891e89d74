import errno

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import timm_bilinear  # noqa: F401
from timm_bilinear import hub


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = timm.create_model('bcnn', backbone_a='test_resnet', out_index_a=2, proj_dim=8, eps=1e-5, num_classes=3)
    return net.to(memory_format=torch.channels_last).eval()


def test_save_and_load(model, tmp_path):
    config = resolve_model_data_config(model, args=dict(input_size=(3, 96, 96)))
    hub.save_model(model, tmp_path / 'model', ['a', 'b', 'c'], config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model']
    assert sorted(p.name for p in (tmp_path / 'model').iterdir()) == ['config.json', 'model.safetensors']

    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.head.eps == 1e-5
    assert loaded.pretrained_cfg['input_size'] == (3, 96, 96)
    assert list(loaded.pretrained_cfg['label_names']) == ['a', 'b', 'c']


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('No space left')])
def test_full_disk_leaves_nothing(model, tmp_path, monkeypatch, error):
    def save(model, directory, **kwargs):
        (directory / 'model.safetensors').write_bytes(b'half')
        raise error

    monkeypatch.setattr(hub, 'save_for_hf', save)
    with pytest.raises(OSError, match='model'):
        hub.save_model(model, tmp_path / 'model')
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_model(model, tmp_path, monkeypatch):
    hub.save_model(model, tmp_path / 'model')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'model').iterdir()}
    monkeypatch.setattr(hub, 'save_for_hf', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        hub.save_model(model, tmp_path / 'model')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'model').iterdir()} == before
