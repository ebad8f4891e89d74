"""The whole model and timm's contract around it, on timm's small test models."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import ONE, TWO, create, images, saved_shapes
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2

from timm_bilinear import BilinearCNN
from timm_bilinear.models.bcnn import default_cfgs
from timm_bilinear.ops import bilinear_classify, bilinear_pool

pytestmark = pytest.mark.usefixtures('clean_up')

NAMED = sorted(set(default_cfgs) - {'bcnn'})


# --- the registry and the named models


def test_registry():
    names = timm.list_models(module='bcnn')
    assert set(NAMED) | {'bcnn'} == set(names)
    assert {'bcnn_vgg16', 'bcnn_resnet18', 'bcnn_vgg16_resnet18', 'mpncov_resnet50', 'hbp_vgg16'} <= set(names)


def test_pretrained_listing():
    # 'bcnn' has no weights of its own; the named models' streams have.
    listed = {name.split('.')[0] for name in timm.list_models(module='bcnn', pretrained=True)}
    assert listed == set(NAMED)


@pytest.mark.parametrize('name', NAMED)
def test_named_model(name):
    model = timm.create_model(name, num_classes=200, device='meta')
    assert isinstance(model, BilinearCNN)
    assert sum(p.numel() for p in model.get_classifier().parameters()) < 60e6
    # What the config promises about the feature map, checked without computing it.
    cfg = model.pretrained_cfg
    features = model.forward_features(torch.empty(1, *cfg['input_size'], device='meta'))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert model.get_classifier().in_features == model.head_hidden_size
    first_conv = cfg['first_conv']
    for conv in (first_conv,) if isinstance(first_conv, str) else first_conv:
        assert model.get_submodule(conv).weight.shape[1] == 3
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()


@pytest.mark.parametrize('name', NAMED)
def test_named_model_config_is_the_backbones(name):
    cfg = default_cfgs[name].default
    backbone = next(
        n for n in sorted(timm.list_models(), key=len, reverse=True) if name.partition('_')[2].startswith(n)
    )
    expected = get_pretrained_cfg(backbone)
    assert cfg.hf_hub_id == expected.hf_hub_id
    assert (cfg.mean, cfg.std, cfg.interpolation) == (expected.mean, expected.std, expected.interpolation)


# --- the model is its parts


@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
@pytest.mark.parametrize('kwargs', [ONE, TWO], ids=['one', 'two'])
def test_forward_is_ops_on_features(kwargs, pool_type):
    model = create(pool_type=pool_type, eps=1e-5, **kwargs)
    x = images()
    with torch.inference_mode():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 3, 3)
        a, b = features[:, :96], features[:, 96:] if model.stream_b is not None else None
        z = bilinear_pool(a, b, pool=pool_type, eps=1e-5)
        assert z.shape == (2, model.head_hidden_size)
        fc = model.get_classifier()
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), z)
        torch.testing.assert_close(model(x), bilinear_classify(a, b, fc.weight, fc.bias, pool=pool_type, eps=1e-5))
        torch.testing.assert_close(model(x), fc(z))


# --- features


def test_features_only():
    x = images(size=64)
    backbone = timm.create_model('test_resnet', features_only=True).eval()
    model = create(features_only=True, **ONE)
    assert model.feature_info.channels() == backbone.feature_info.channels()
    assert model.feature_info.reduction() == backbone.feature_info.reduction()
    with torch.inference_mode():
        assert [m.shape for m in model(x)] == [m.shape for m in backbone(x)]


@pytest.mark.parametrize('out_indices,picked', [((1, 3), [1, 3]), ((-1,), [4]), ((-2, -1), [3, 4]), (2, [3, 4])])
def test_features_only_out_indices(out_indices, picked):
    x = images(size=64)
    every = create(features_only=True, **ONE)
    model = create(features_only=True, out_indices=out_indices, **ONE)
    model.load_state_dict(every.state_dict(), strict=False)
    with torch.inference_mode():
        maps, expected = model(x), every(x)
        assert len(maps) == len(picked)
        for m, i in zip(maps, picked):
            torch.testing.assert_close(m, expected[i])
    assert model.feature_info.channels() == [every.feature_info.channels()[i] for i in picked]


def test_features_only_two_streams():
    # Levels of equal stride meet; the first of test_resnet has no partner.
    model = create(features_only=True, **TWO)
    x = images(size=64)
    with torch.inference_mode():
        maps = model(x)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for m, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert m.shape == (2, channels, 64 // reduction, 64 // reduction)


def test_forward_intermediates():
    model = create(all_levels=True, **ONE)
    x = images(size=64)
    with torch.inference_mode():
        maps = model.stream_a(x)
        features, intermediates = model.forward_intermediates(x)
        assert torch.equal(features, maps[-1]) and torch.equal(features, model.forward_features(x))
        assert len(intermediates) == 5 and all(map(torch.equal, intermediates, maps))
        assert all(map(torch.equal, model.forward_intermediates(x, indices=2, intermediates_only=True), maps[-2:]))
        assert all(map(torch.equal, model.forward_intermediates(x, indices=[0, 3])[1], [maps[0], maps[3]]))
    with pytest.raises(AssertionError, match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')


def test_prune_intermediate_layers():
    model = create(**TWO)
    x = images(size=64)
    with torch.inference_mode():
        expected = model.forward_features(x)
        assert model.prune_intermediate_layers() == [len(model.feature_info) - 1] == [3]
        assert not list(model.head.parameters())
        assert torch.equal(model(x), expected)


# --- freezing, groups, checkpointing


@pytest.mark.parametrize('kwargs', [ONE, dict(TWO, proj_dim=16)], ids=['one', 'two'])
def test_freeze_backbone(kwargs):
    model = timm.create_model('bcnn', freeze_backbone=True, **kwargs)
    assert model.train() is model and model.training and model.head.training
    streams = [s for s in (model.stream_a, model.stream_b) if s is not None]
    assert not any(m.training for s in streams for m in s.modules())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    assert all(p.grad is None and not p.requires_grad for s in streams for p in s.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    optimizer.step()
    for key, value in model.state_dict().items():
        # Weights and batch norm statistics alike stay, and the head moves.
        assert torch.equal(value, before[key]) == key.startswith('stream_'), key


@pytest.mark.parametrize('kwargs', [ONE, dict(TWO, proj_dim=16)], ids=['one', 'two'])
def test_freeze_backbone_saves_nothing_for_streams(kwargs):
    model = timm.create_model('bcnn', freeze_backbone=True, **kwargs).train()
    x = images()

    def saved(fn, arg):
        with saved_shapes() as shapes:
            fn(arg)
        return sorted(shapes)

    with torch.no_grad():
        features = model.forward_features(x)
    of_head = saved(model.head, features)
    assert of_head and saved(model, x) == of_head
    # The check sees what an unfrozen stream saves.
    assert len(saved(timm.create_model('bcnn', **kwargs), x)) > len(of_head)


def test_two_stage_training():
    # The recipe: the classifier alone, then all of it.
    model = timm.create_model('bcnn', freeze_backbone=True, **ONE).train()
    model.set_freeze_backbone(False)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().set_freeze_backbone()
    assert not any(m.training for m in model.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ['head.fc.weight', 'head.fc.bias']
    model.train()
    assert model.head.training and not any(m.training for m in model.stream_a.modules())


def test_not_frozen_by_default():
    model = timm.create_model('bcnn', **ONE).train()
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('kwargs', [ONE, TWO, dict(backbone_a='test_vit', num_classes=5)], ids=['one', 'two', 'vit'])
def test_layer_decay(kwargs):
    model = timm.create_model('bcnn', **kwargs)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=1.0, layer_decay=0.7)
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(scales) == len(list(model.parameters()))
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert by_name['head.fc.weight'] == by_name['head.fc.bias'] == 1.0
    for stream in ('stream_a', 'stream_b')[: 1 + (model.stream_b is not None)]:
        # Parameters come in the order of their depth, so scales must never fall, and must rise often.
        values = [scale for name, scale in by_name.items() if name.startswith(stream)]
        assert values == sorted(values) and values[-1] < 1.0
        assert len(set(values)) >= 4


def test_layer_decay_same_depth_in_both_streams():
    model = timm.create_model('bcnn', backbone_a='test_resnet', backbone_b='test_resnet', num_classes=5)
    match = model.group_matcher()
    for name, _ in model.named_parameters():
        if name.startswith('stream_a'):
            assert match(name) == match(name.replace('stream_a', 'stream_b'))
    coarse = model.group_matcher(coarse=True)
    assert len({coarse(n) for n, _ in model.named_parameters()}) < len({match(n) for n, _ in model.named_parameters()})


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_efficientnet'])
def test_grad_checkpointing(name):
    # One of each kind of timm's feature nets: by list, by getter, the model's own.
    model = create(backbone_a=name, num_classes=5, proj_dim=8)
    x = images(size=160)
    grads, counts = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()  # statistics are updated twice under checkpointing
        with saved_shapes() as saved:
            loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        counts.append(sum(map(math.prod, saved)))
        assert ((2, model.head_hidden_size) in saved) == (not enable)  # the head keeps no descriptors either
    assert len(grads[0]) > 10
    torch.testing.assert_close(grads[0], grads[1])
    assert counts[1] < counts[0]


# --- classifier


def test_reset_classifier():
    model = create(**ONE)
    x = images()
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x).norm(dim=1), torch.ones(2))
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(3, 'max')
    assert model.head.pool_type == 'max' and model(x).shape == (2, 3)


@pytest.mark.parametrize('proj_dim', [None, 16])
def test_reset_classifier_keeps_dtype_and_device(proj_dim):
    # Of a headless model too, where only the streams know them.
    model = create(dtype=torch.float64, device='meta', proj_dim=proj_dim, **ONE)
    model.reset_classifier(7)
    assert (model.head.fc.weight.dtype, model.head.fc.weight.device.type) == (torch.float64, 'meta')
    model.reset_classifier(0)
    model.reset_classifier(7)
    assert (model.head.fc.weight.dtype, model.head.fc.weight.device.type) == (torch.float64, 'meta')


def test_global_pool_is_pool_type():
    model = create(num_classes=0, global_pool='', backbone_a='test_resnet')
    x = images()
    assert torch.equal(model(x), model.forward_features(x))


# --- copies


@pytest.mark.parametrize('kwargs', [ONE, dict(TWO, proj_dim=16)], ids=['one', 'two'])
def test_deepcopy_and_pickle(kwargs):
    model = create(**kwargs)
    x = images()
    with torch.inference_mode():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
            assert next(twin.parameters()) is not next(model.parameters())
            assert twin.group_matcher()('head.fc.weight') == float('inf')


# --- errors


@pytest.mark.parametrize(
    'kwargs,error,message',
    [
        (dict(backbone_a='resnet81'), ValueError, r"'backbone_a'.*'resnet81'.*Did you mean.*'resnet18'"),
        (dict(backbone_b='vgg61'), ValueError, r"'backbone_b'.*'vgg61'.*Did you mean.*'vgg16'"),
        (dict(backbone_a='resnet18.no_such_tag'), ValueError, r"'backbone_a'.*no_such_tag"),
        (dict(backbone_a='bcnn_resnet18'), ValueError, r"'backbone_a'.*bilinear CNN 'bcnn_resnet18'"),
        (dict(backbone_a='bcnn'), ValueError, r"'backbone_a'.*bilinear CNN 'bcnn'"),
        (dict(backbone_b='bcnn'), ValueError, r"'backbone_b'.*bilinear CNN 'bcnn'"),
        (dict(backbone_a='test_resnet', out_index_a=5), ValueError, r"'out_index_a' must be in \[-5, 5\).*got 5"),
        (dict(backbone_a='test_resnet', out_index_a=-6), ValueError, r"'out_index_a'.*got -6"),
        (dict(backbone_b='test_convnext', out_index_b=4), ValueError, r"'out_index_b' must be in \[-4, 4\).*got 4"),
        (dict(backbone_a='test_resnet', pool_type='mean'), ValueError, r"'pool_type'.*'avg', .*'sum'.*'mean'"),
        (dict(backbone_a='test_resnet', eps=0.0), ValueError, r"'eps'.*0\.0"),
        (dict(backbone_a='test_resnet', proj_dim=0), ValueError, r"'proj_dim'.*0"),
        (dict(backbone_a='test_resnet', num_classes=-1), ValueError, r"'num_classes'.*-1"),
        (dict(backbone_a='test_resnet', no_such_arg=1), TypeError, r'no_such_arg'),
        (dict(no_such_arg=1), TypeError, r'no_such_arg'),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('bcnn', **kwargs)


def test_named_model_takes_bad_arguments_no_better():
    with pytest.raises(ValueError, match="'out_index_a'"):
        timm.create_model('bcnn_resnet18', out_index_a=9)
    with pytest.raises(TypeError, match='no_such_arg'):
        timm.create_model('bcnn_resnet18', no_such_arg=1)


def test_training_reduces_loss():
    # Few steps on four images: it learns, head and streams.
    model = timm.create_model('bcnn', **TWO).train()
    x, labels = images(batch=4, size=64), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
