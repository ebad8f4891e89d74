"""A saved model asked for with another pooling: what is asked for is made, and the streams keep their weights."""

import json
import logging

import pytest
import timm
import torch
from small_models import images

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
