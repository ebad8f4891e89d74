import errno

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_models import GRIDS, ONE, create, images
from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf

import timm_bilinear  # noqa: F401
from timm_bilinear.hub import push as hub


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


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(ONE, eps=1e-3),
        dict(GRIDS, proj_dim=16, pool_type='max', in_chans=1),
        dict(backbone_a='test_vit', num_classes=5, img_size=96),
        dict(backbone_a='test_resnet', num_classes=0),
    ],
    ids=['one', 'two', 'fixed', 'headless'],
)
def test_save_for_hf(tmp_path, kwargs):
    model = create(**kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    x = images(chans=kwargs.get('in_chans', 3))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    # Without this a saved model would be fed otherwise than it was trained.
    config, loaded_config = resolve_model_data_config(model), resolve_model_data_config(loaded)
    for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct') if 'in_chans' not in kwargs else ():
        assert loaded_config[key] == config[key] or tuple(loaded_config[key]) == config[key], key


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_save_for_hf_other_classes(tmp_path, kwargs):
    model = create(**kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=9).eval()
    x = images()
    with torch.inference_mode():
        assert loaded(x).shape == (2, 9)
        assert torch.equal(loaded.forward_features(x), model.forward_features(x))
        loaded.reset_classifier(0)
        assert torch.equal(loaded(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_save_for_hf_named_model(tmp_path):
    model = timm.create_model('bcnn_resnet18', num_classes=4).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_save_for_hf_after_reset(tmp_path):
    model = create(**ONE)
    model.reset_classifier(11)
    save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_push_half(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    full, half = (
        hub.push_to_hub(model, 'me/m', dry_run=tmp_path / name, half=name == 'half') for name in ('full', 'half')
    )
    stored = load_file(f'{half}/model.safetensors')
    loaded = timm.create_model(f'local-dir:{half}', pretrained=True).state_dict()
    for key, value in before.items():
        is_matrix = value.ndim > 1
        assert stored[key].dtype == (torch.float16 if is_matrix else value.dtype), key
        assert torch.equal(loaded[key], value.half().float() if is_matrix else value), key
        assert torch.equal(model.state_dict()[key], value), key
    assert all(torch.equal(value, before[key]) for key, value in load_file(f'{full}/model.safetensors').items())


def test_push_of_a_repo_sends_its_files(model, tmp_path):
    repo, copy = tmp_path / 'repo', tmp_path / 'copy'
    hub.push_to_hub(model, 'me/m', dry_run=repo, license='mit')
    (repo / 'README.md').write_text('my card')
    (repo / 'picture.png').write_bytes(b'png')
    hub.push_to_hub(repo, 'me/m', dry_run=copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in repo.iterdir()}
    assert len(list(copy.iterdir())) == 4
    with pytest.raises(ValueError, match=r'README\.md'):
        hub.push_to_hub(repo, 'me/m', dry_run=tmp_path / 'other', half=True)
    (repo / 'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match=r'model\.safetensors'):
        hub.push_to_hub(repo, 'me/m', dry_run=tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
