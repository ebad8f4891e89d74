"""A saved model asked for with another pooling: what is asked for is made, and the streams keep their weights."""

import json
import logging

import pytest
import timm
import torch
from small_models import images
from timm.models import _registry, build_model_with_cfg

from timm_bilinear import BilinearCNN
from timm_bilinear.hub import save_model

pytestmark = pytest.mark.usefixtures('clean_up')

SAVED = [
    ('bcnn', dict(pool_type='isqrt', iterations=3)),
    ('bcnn', dict(pool_type='sketch', dim=32)),
    ('bcnn', dict(global_pool='sum')),
    ('bcnn', dict(pool_type='lowrank', proj_dim=8)),
    ('hbp_resnet34', dict(backbone_a='test_resnet', dim=16)),
]


def _saved(tmp_path, name, kwargs, num_classes=4):
    model = timm.create_model(name, num_classes=num_classes, **dict(dict(backbone_a='test_resnet'), **kwargs))
    return model, f'local-dir:{save_model(model, tmp_path / "saved")}'


def _same_streams(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in ours.items() if k.startswith('stream_'))


@pytest.mark.parametrize('argument', ['pool_type', 'global_pool'])
@pytest.mark.parametrize('pooling', ['avg', 'sqrtm', 'maclaurin', 'moments', 'cross'])
@pytest.mark.parametrize('name, kwargs', SAVED, ids=[f'{n} {kw}' for n, kw in SAVED])
def test_another_pooling(tmp_path, caplog, name, kwargs, pooling, argument):
    model, source = _saved(tmp_path, name, kwargs)
    if pooling != 'cross' and name == 'hbp_resnet34':
        with pytest.raises(ValueError, match='does not take several levels'):
            timm.create_model(source, pretrained=True, num_classes=3, **{argument: pooling})
        return
    with caplog.at_level(logging.WARNING):
        loaded = timm.create_model(source, pretrained=True, num_classes=3, **{argument: pooling}).eval()
    assert loaded.head.pool_type == pooling and _same_streams(model, loaded)
    own = {k for k in loaded.state_dict() if k.startswith('head.pool.') and pooling != model.head.pool_type}
    assert all(key in caplog.text for key in own) and ('afresh' in caplog.text) == bool(own)
    assert ('its classifier' in caplog.text) == (pooling != model.head.pool_type)
    # what is saved of it is of its own pooling
    again = timm.create_model(f'local-dir:{save_model(loaded, tmp_path / "again")}', pretrained=True).eval()
    assert again.head.pool_type == pooling
    x = images()
    torch.testing.assert_close(again(x), loaded(x), rtol=0, atol=0)


@pytest.mark.parametrize('argument', ['pool_type', 'global_pool'])
def test_unknown_pooling(tmp_path, argument):
    _, source = _saved(tmp_path, 'bcnn', {})
    with pytest.raises(ValueError, match=r"'pool_type' must be one of .*got 'nonsense'"):
        timm.create_model(source, pretrained=True, **{argument: 'nonsense'})


@pytest.mark.parametrize('name, kwargs', SAVED, ids=[f'{n} {kw}' for n, kw in SAVED])
def test_the_pooling_it_was_saved_with(tmp_path, name, kwargs):
    """Given once more, of a model with another one since, and of a config that names the first one too, as ours did."""
    model, source = _saved(tmp_path, name, kwargs)
    pooling, x = model.head.pool_type, images()
    for given in ({}, dict(pool_type=pooling), dict(global_pool=pooling)):
        loaded = timm.create_model(source, pretrained=True, **given)
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=0)
    if name != 'bcnn' or 'proj_dim' in kwargs:
        return
    model.reset_classifier(4, 'avg')
    save_model(model, tmp_path / 'saved')
    assert timm.create_model(source, pretrained=True).head.pool_type == 'avg'
    file = tmp_path / 'saved' / 'config.json'
    config = json.loads(file.read_text())
    assert 'pool_type' not in config['model_args']
    config['model_args']['pool_type'] = pooling
    file.write_text(json.dumps(config))
    assert timm.create_model(source, pretrained=True).head.pool_type == 'avg'


@pytest.mark.parametrize('name', ['cbcnn_vgg16', 'ibcnn_vgg16', 'mpncov_vgg16', 'lrbp_vgg16'])
@pytest.mark.parametrize('given', [dict(pool_type='avg'), dict(global_pool='avg'), dict(pool_type='avg', eps=1e-5)])
def test_another_pooling_than_that_of_the_name(name, given):
    model = timm.create_model(name, backbone_a='test_resnet', num_classes=2, **given)
    assert model.head.pool_type == 'avg'


def test_a_pooling_takes_the_arguments_that_it_can_of_the_saved_one(tmp_path):
    _, source = _saved(tmp_path, 'bcnn', dict(pool_type='sketch', dim=32, seed=7, eps=1e-5))
    loaded = timm.create_model(source, pretrained=True, num_classes=3, pool_type='maclaurin')
    assert (loaded.head.pool.num_features, loaded.head.pool.eps) == (32, 1e-5)
    loaded = timm.create_model(source, pretrained=True, num_classes=3, pool_type='maclaurin', dim=16)
    assert loaded.head.pool.num_features == 16
    with pytest.raises(TypeError, match="'dim': pooling 'avg' takes"):
        timm.create_model(source, pretrained=True, num_classes=3, pool_type='avg', dim=16)


def test_what_the_new_pooling_cannot_take_of_the_saved_one(tmp_path):
    _, source = _saved(tmp_path, 'bcnn', dict(pool_type='democratic', iterations=500))
    assert timm.create_model(source, pretrained=True, num_classes=3, pool_type='isqrt').head.pool.iterations == 5


@pytest.mark.parametrize('pool_type', ['sketch', 'cross'])
def test_another_size_of_the_same_pooling(tmp_path, caplog, pool_type):
    """Hashes of fewer places have the same shape."""
    kwargs = dict(pool_type=pool_type, **(dict(out_indices_a=(2, 3, 4)) if pool_type == 'cross' else {}))
    _, source = _saved(tmp_path, 'bcnn', dict(kwargs, dim=32))
    given = dict(out_indices_a=(3, 4)) if pool_type == 'cross' else dict(dim=512)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        loaded = timm.create_model(source, pretrained=True, num_classes=3, **given)
    assert all(key in caplog.text for key in loaded.state_dict() if key.startswith('head.pool.'))
    if pool_type == 'sketch':
        assert loaded.head.pool.hash_a.max() > 64


def test_named_models_take_levels(tmp_path):
    """Of an entry point, or a saved model, that has one level."""
    kwargs = dict(backbone_a='test_resnet', out_indices_a=(2, 3, 4), pool_type='cross', dim=8)
    model, source = _saved(tmp_path, 'bcnn_resnet18', dict(kwargs, out_index_a=3))
    assert model.head.num_features == timm.create_model('bcnn_resnet18', **kwargs).head.num_features == 24
    assert timm.create_model(source, pretrained=True).head.num_features == 24


class _Tempered(BilinearCNN):
    """A model of the user's own, with an argument of its own."""

    def __init__(self, temperature: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature


def _tempered(pretrained=False, **kwargs):
    kwargs = dict(dict(backbone_a='test_resnet', pool_type='sketch'), **kwargs)
    return build_model_with_cfg(_Tempered, 'bcnn_tempered', pretrained, **kwargs)


def test_a_model_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setitem(_registry._model_entrypoints, 'bcnn_tempered', _tempered)
    cfg = timm.models.PretrainedCfg(architecture='bcnn_tempered', classifier='head.fc', num_classes=2)
    model = timm.create_model('bcnn_tempered', temperature=5.0, num_classes=2, pretrained_cfg=cfg)
    assert model.head.pool_type == 'sketch' and model.temperature == 5
    assert timm.create_model('bcnn_tempered', global_pool='avg', pretrained_cfg=cfg).head.pool_type == 'avg'
    model.reset_classifier(2, 'avg')
    loaded = timm.create_model(f'local-dir:{save_model(model, tmp_path / "own")}', pretrained=True)
    assert loaded.temperature == 5 and loaded.head.pool_type == 'avg'
    x = images()
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_with_as_many_classes_it_is_an_error(tmp_path):
    """The trained classifier would be lost."""
    _, source = _saved(tmp_path, 'bcnn', {})
    with pytest.raises(RuntimeError, match=r'head\.fc\.weight is .*num_classes=0'):
        timm.create_model(source, pretrained=True, pool_type='sketch')
    model = timm.create_model(source, pretrained=True, pool_type='sketch', num_classes=0)
    model.reset_classifier(4)
    assert model(images()).shape == (2, 4)


def test_a_projection_that_was_trained_is_not_lost(tmp_path):
    model, source = _saved(tmp_path, 'bcnn', dict(proj_dim=8))
    kept = timm.create_model(source, pretrained=True, num_classes=3, pool_type='isqrt')
    assert torch.equal(kept.head.proj_a.weight, model.head.proj_a.weight)
    with pytest.raises(RuntimeError, match=r'head\.proj_a'):
        timm.create_model(source, pretrained=True, num_classes=3, proj_dim=16)
