"""The whole model and timm's contract around it, on timm's small test models."""

import copy
import gc
import math
import pickle
from contextlib import contextmanager

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2

from timm_bilinear import BilinearCNN
from timm_bilinear.bcnn import default_cfgs
from timm_bilinear.ops import bilinear_classify, bilinear_pool
from timm_bilinear.streams import concat_streams

NAMED = sorted(set(default_cfgs) - {'bcnn'})
ONE = dict(backbone_a='test_resnet', num_classes=5)
TWO = dict(ONE, backbone_b='test_convnext')
# Streams of strides 16 and 32.
GRIDS = dict(TWO, out_index_a=3)


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    gc.collect()


def create(**kwargs) -> BilinearCNN:
    return timm.create_model('bcnn', **kwargs).eval()


def images(batch=2, chans=3, size=96, **kwargs):
    return torch.randn(batch, chans, size, size, **kwargs)


@contextmanager
def saved_shapes():
    """Shapes of what autograd saves for backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        yield shapes


# --- the registry and the named models


def test_registry():
    names = timm.list_models('bcnn*')
    assert set(NAMED) | {'bcnn'} == set(names)
    assert timm.list_models(module='bcnn') == names
    assert {'bcnn_vgg16', 'bcnn_resnet18', 'bcnn_vgg16_resnet18'} <= set(names)


def test_pretrained_listing():
    # 'bcnn' has no weights of its own; the named models' streams have.
    listed = {name.split('.')[0] for name in timm.list_models('bcnn*', pretrained=True)}
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
        n for n in sorted(timm.list_models(), key=len, reverse=True) if name.removeprefix('bcnn_').startswith(n)
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


def test_streams_end_at_their_index():
    x = images()
    backbone = timm.create_model('test_resnet', features_only=True).eval()
    with torch.inference_mode():
        maps = backbone(x)
        for index in (-1, -3, 0, 2, 4):
            model = create(out_index_a=index, **ONE)
            model.stream_a.load_state_dict(backbone.state_dict(), strict=False)
            torch.testing.assert_close(model.forward_features(x), maps[index])
            assert model.num_features == maps[index].shape[1]


def test_streams_on_different_grids():
    model = create(**GRIDS)
    x = images()
    with torch.inference_mode():
        fine, coarse = model.stream_a(x)[-1], model.stream_b(x)[-1]
        assert fine.shape[2:] == (6, 6) and coarse.shape[2:] == (3, 3)
        features = model.forward_features(x)
        torch.testing.assert_close(features[:, :192], F.avg_pool2d(fine, 2))
        torch.testing.assert_close(features[:, 192:], coarse)
        assert model(x).shape == (2, 5)
        swapped = create(backbone_a='test_convnext', backbone_b='test_resnet', out_index_b=3, num_classes=5)
        assert swapped.forward_features(x).shape == (2, 64 + 192, 3, 3)


@pytest.mark.parametrize('grid_a,grid_b', [((6, 6), (4, 4)), ((5, 8), (7, 3)), ((4, 4), (4, 4)), ((1, 9), (3, 3))])
def test_concat_streams(grid_a, grid_b):
    a, b = torch.randn(2, 3, *grid_a), torch.randn(2, 4, *grid_b)
    grid = [min(s) for s in zip(grid_a, grid_b)]
    x = concat_streams(a, b)
    assert x.shape == (2, 7, *grid)
    torch.testing.assert_close(x, torch.cat([F.adaptive_avg_pool2d(m, grid) for m in (a, b)], 1))
    if grid_a == grid_b:
        assert torch.equal(x, torch.cat([a, b], 1))


def test_two_streams_do_not_share_weights():
    model = create(backbone_a='test_resnet', backbone_b='test_resnet', num_classes=5, proj_dim=8)
    a, b = (next(s.parameters()) for s in (model.stream_a, model.stream_b))
    assert a is not b and not torch.equal(a, b)


@pytest.mark.parametrize('chans', [1, 4])
@pytest.mark.parametrize('kwargs', [ONE, TWO], ids=['one', 'two'])
def test_in_chans(kwargs, chans):
    model = create(in_chans=chans, **kwargs)
    assert model(images(chans=chans)).shape == (2, 5)


@pytest.mark.parametrize('name,grid', [('test_mambaout', 3), ('swin_tiny_patch4_window7_224', 7)])
def test_nhwc_backbone(name, grid):
    size = grid * 32
    model = create(backbone_a=name, num_classes=3, proj_dim=8)
    x = images(size=size)
    with torch.inference_mode():
        nhwc = model.stream_a(x)[-1]
        assert nhwc.shape == (2, grid, grid, model.num_features)
        assert torch.equal(model.forward_features(x), nhwc.permute(0, 3, 1, 2))
        assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[-1], nhwc.permute(0, 3, 1, 2))
        torch.testing.assert_close(model(x), model.head(nhwc.permute(0, 3, 1, 2).contiguous()))


def test_nhwc_second_stream():
    model = create(backbone_a='test_resnet', backbone_b='test_mambaout', num_classes=3)
    x = images()
    with torch.inference_mode():
        features = model.forward_features(x)
        torch.testing.assert_close(features[:, :96], model.stream_a(x)[-1])
        torch.testing.assert_close(features[:, 96:], model.stream_b(x)[-1].permute(0, 3, 1, 2))


def test_token_backbone():
    model = create(backbone_a='test_vit', num_classes=3)
    backbone = timm.create_model('test_vit').eval()
    model.stream_a.model.load_state_dict(backbone.state_dict(), strict=False)
    x = images(size=160)
    with torch.inference_mode():
        _, maps = backbone.forward_intermediates(x, indices=1)
        assert maps[-1].shape == (2, 64, 10, 10)
        torch.testing.assert_close(model.forward_features(x), maps[-1])
        assert model(x).shape == (2, 3)


# --- input config


def test_fixed_size_backbone_config():
    model = create(backbone_a='test_vit', num_classes=3)
    expected = get_pretrained_cfg('test_vit')
    config = resolve_model_data_config(model)
    assert config['input_size'] == (3, 160, 160)
    assert (config['mean'], config['std']) == (expected.mean, expected.std)
    assert config['interpolation'] == expected.interpolation


@pytest.mark.parametrize('img_size,grid', [(96, (6, 6)), ((64, 128), (4, 8))])
def test_img_size(img_size, grid):
    model = create(backbone_a='test_vit', num_classes=3, img_size=img_size)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert resolve_model_data_config(model)['input_size'] == (3, *size)
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert model.forward_features(x).shape == (2, 64, *grid)
        assert model(x).shape == (2, 3)


def test_free_backbone_config():
    # Any size will do, so the paper's it is, with the backbone's normalisation.
    config = resolve_model_data_config(create(**ONE))
    expected = get_pretrained_cfg('test_resnet')
    assert config['input_size'] == (3, 448, 448)
    assert (config['mean'], config['std']) == (expected.mean, expected.std)


def test_fixed_and_free_backbones():
    model = create(backbone_a='test_resnet', backbone_b='test_vit', num_classes=3)
    assert resolve_model_data_config(model)['input_size'] == (3, 160, 160)
    with torch.inference_mode():
        assert model.forward_features(images(size=160)).shape == (2, 96 + 64, 5, 5)


def test_different_fixed_sizes_need_img_size():
    kwargs = dict(backbone_a='test_vit', backbone_b='deit_tiny_patch16_224', num_classes=3)
    with pytest.raises(ValueError, match="'img_size'"):
        create(**kwargs)
    assert create(img_size=64, **kwargs)(images(size=64)).shape == (2, 3)


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
        assert model.prune_intermediate_layers() == [0]
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


# --- saving and loading


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
        (dict(backbone_a='test_resnet', pool_type='mean'), ValueError, r"'pool_type'.*'avg', 'sum', 'max'.*'mean'"),
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


# --- compilers, exporters, numerics


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_compile(kwargs):
    # The graph is what is at stake, and takes a fraction of inductor's time; the ops' own tests go through inductor.
    model = create(**kwargs)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    labels = torch.tensor([0, 1])
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    grads = []
    for f in (model, compiled):
        model.zero_grad()
        F.cross_entropy(f(x), labels).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-3)


def test_compile_inductor():
    model = create(**ONE)
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_export(kwargs):
    model = create(**kwargs)
    x = images(size=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    assert not [n for n in program.graph.nodes if 'timm_bilinear' in str(n.target)]
    x = images(batch=3, size=64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16, pool_type='max')], ids=['one', 'two'])
def test_onnx(tmp_path, kwargs):
    model = create(**kwargs)
    x = images(size=64)
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (x,), path, dynamo=True, input_names=['image'], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {'image': x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_torchscript(kwargs):
    model = create(scriptable=True, **kwargs)
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_autocast(kwargs):
    model = create(**kwargs)
    x = images()
    with torch.no_grad():
        expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max().clamp_min(0.1)
    F.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtype(dtype):
    model = create(dtype=dtype, **dict(TWO, proj_dim=16))
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = model(images(dtype=dtype))
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_channels_last(kwargs):
    model = create(**kwargs)
    x = images()
    labels = torch.tensor([0, 1])

    def run(model, x):
        model.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, labels).backward()
        return logits.detach().clone(), [p.grad.clone().contiguous() for p in model.parameters()]

    expected = run(model, x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert not model.forward_features(x).is_contiguous() or model.stream_b is not None
    logits, grads = run(model, x)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads, expected[1], atol=1e-4, rtol=1e-2)


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
