"""Weights from the Hub: what is said when it is absent, and its cache. No network."""

from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from small_models import randomise_norms, stream_convs

from timm_bilinear.models import download as hub_client

pytestmark = pytest.mark.usefixtures('clean_up')


def put_in_cache(cache_dir, backbone, state_dict):
    """A repo as the Hub's client leaves it in its cache."""
    repo = cache_dir / ('models--' + timm.get_pretrained_cfg(backbone).hf_hub_id.replace('/', '--'))
    snapshot = repo / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0' * 40)
    safetensors.torch.save_file(state_dict, snapshot / 'model.safetensors')


def hub_response(status):
    request = SimpleNamespace(method='GET', url='https://example.invalid')
    return SimpleNamespace(headers={}, status_code=status, request=request, url=request.url)


@pytest.mark.parametrize(
    'name,kwargs,repo',
    [
        ('bcnn_resnet18', {}, 'timm/resnet18.a1_in1k'),
        ('bcnn', dict(backbone_a='resnet18.tv_in1k'), 'timm/resnet18.tv_in1k'),
        ('bcnn', dict(backbone_a='test_resnet', backbone_b='test_convnext'), 'timm/test_resnet.r160_in1k'),
    ],
)
@pytest.mark.parametrize(
    'error,cause',
    [
        (LocalEntryNotFoundError('cannot find the requested file in the local cache'), 'not in the cache'),
        (
            RepositoryNotFoundError('404 Client Error\n\nRequest ID', response=hub_response(404)),
            'there is no such repo',
        ),
        (ConnectionError('connection refused'), 'connection refused'),
    ],
    ids=['offline', 'no_repo', 'no_connection'],
)
def test_no_network_is_one_sentence(monkeypatch, name, kwargs, repo, error, cause):
    def hf_hub_download(*_, **__):
        raise error

    monkeypatch.setattr(hub_client, 'hf_hub_download', hf_hub_download)
    monkeypatch.setattr(hub_client, 'WAITS', ())
    with pytest.raises(RuntimeError) as e:
        timm.create_model(name, pretrained=True, num_classes=3, **kwargs)
    for part in (f"'{repo}'", 'model.safetensors', cause, 'HF_HUB_OFFLINE', 'HF_ENDPOINT', 'pretrained=False'):
        assert part in str(e.value)
    assert '\n' not in str(e.value)


def test_second_streams_repo_is_named(tmp_path):
    put_in_cache(tmp_path, 'test_resnet', timm.create_model('test_resnet').state_dict())
    with pytest.raises(RuntimeError, match=r"'timm/test_convnext\.r160_in1k'"):
        timm.create_model(
            'bcnn', pretrained=True, backbone_a='test_resnet', backbone_b='test_convnext', cache_dir=tmp_path
        )


def test_backbone_without_weights(tmp_path):
    with pytest.raises(RuntimeError, match=r"no pretrained weights for 'test_vit4'.*pretrained=False"):
        timm.create_model('bcnn', pretrained=True, backbone_a='test_vit4', cache_dir=tmp_path)


def test_offline_without_cache(tmp_path):
    # The client's own offline error, not a stand-in.
    with pytest.raises(RuntimeError, match=r"'timm/test_resnet\.r160_in1k'.*HF_HUB_OFFLINE"):
        timm.create_model('bcnn', pretrained=True, backbone_a='test_resnet', cache_dir=tmp_path)


@pytest.mark.parametrize('features_only', [False, True])
def test_offline_from_cache(tmp_path, features_only):
    backbone = randomise_norms(timm.create_model('test_resnet'))
    put_in_cache(tmp_path, 'test_resnet', backbone.state_dict())
    model = timm.create_model(
        'bcnn',
        pretrained=True,
        backbone_a='test_resnet',
        num_classes=3,
        cache_dir=tmp_path,
        features_only=features_only,
    ).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        features = model(x)[-1] if features_only else model.forward_features(x)
        torch.testing.assert_close(features, backbone.forward_features(x))


def test_offline_two_streams_get_their_own(tmp_path):
    backbones = [timm.create_model(name).eval() for name in ('test_resnet', 'test_convnext')]
    for name, backbone in zip(('test_resnet', 'test_convnext'), backbones):
        randomise_norms(backbone)
        put_in_cache(tmp_path, name, backbone.state_dict())
    model = timm.create_model(
        'bcnn', pretrained=True, backbone_a='test_resnet', backbone_b='test_convnext', num_classes=3, cache_dir=tmp_path
    ).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        a, b = model.forward_features(x).split([96, 64], 1)
        torch.testing.assert_close(a, backbones[0].forward_features(x))
        # convnext's feature extractor ends before the model's final norm
        torch.testing.assert_close(b, backbones[1].stages(backbones[1].stem(x)))


def test_offline_tags_are_kept_apart(tmp_path):
    # Two tags of one architecture are two sets of weights.
    backbones = {}
    for tag in ('tv_in1k', 'a1_in1k'):
        backbones[tag] = randomise_norms(timm.create_model('resnet18'))
        put_in_cache(tmp_path, f'resnet18.{tag}', backbones[tag].state_dict())
    model = timm.create_model(
        'bcnn',
        pretrained=True,
        backbone_a='resnet18.tv_in1k',
        backbone_b='resnet18.a1_in1k',
        num_classes=3,
        proj_dim=8,
        cache_dir=tmp_path,
    )
    for letter, tag in (('a', 'tv_in1k'), ('b', 'a1_in1k')):
        assert torch.equal(stream_convs(model, letter)[0], backbones[tag].conv1.weight)


def test_offline_named_model(tmp_path):
    # The classifier is fresh: the backbone's own fc must be neither needed nor taken.
    backbone = randomise_norms(timm.create_model('resnet18'))
    put_in_cache(tmp_path, 'resnet18', backbone.state_dict())
    model = timm.create_model('bcnn_resnet18', pretrained=True, num_classes=3, cache_dir=tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(x), backbone.forward_features(x))
    assert model.get_classifier().weight.shape == (3, 512 * 513 // 2)


def test_offline_in_chans(tmp_path):
    backbone = timm.create_model('test_resnet')
    put_in_cache(tmp_path, 'test_resnet', backbone.state_dict())
    model = timm.create_model(
        'bcnn', pretrained=True, backbone_a='test_resnet', num_classes=3, in_chans=1, cache_dir=tmp_path
    )
    first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(stream_convs(model, 'a')[0], first.weight.sum(1, keepdim=True))


def test_tag_comes_from_the_hub_or_says_where_it_lies(tmp_path, monkeypatch):
    name = 'bcnn_resnet18_c4.googlefonts378'
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(hub_client.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match=f'local-dir:hub/{name}'):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)

    model = timm.create_model(name)
    assert model.num_classes == 378 and model.head.channels == 256
    put_in_cache(tmp_path, name, model.state_dict())
    loaded = timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert timm.create_model(name, pretrained=True, cache_dir=tmp_path, num_classes=12).head.fc.out_features == 12
