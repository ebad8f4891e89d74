"""Feature levels: all of any model by forward_intermediates, and what pruning leaves of it."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import GRIDS, ONE, TWO, create, images

pytestmark = pytest.mark.usefixtures('clean_up')

# One of each of timm's feature nets: by list, by getter, by hooks, three of the models' own, channels last, one that
# describes a level which no layer gives, and one whose levels are inside a Sequential.
BACKBONES = {
    'test_resnet': 96,
    'test_vit': 160,
    'xception41p': 96,
    'test_efficientnet': 96,
    'mobilenetv3_small_050': 96,
    'hrnet_w18_small': 96,
    'test_mambaout': 96,
    'tresnet_m': 96,
    'vgg11': 64,
}


def expected_maps(model, name, x):
    """Maps of timm's own feature net with the stream's weights, all NCHW, by level."""
    levels = [i for i, _ in model.levels]
    backbone = timm.create_model(name, features_only=True, out_indices=levels).eval()
    backbone.load_state_dict(model.stream_a.state_dict(), strict=True)
    with torch.inference_mode():
        maps = backbone(x)
    return [m.permute(0, 3, 1, 2) if model.nhwc_a else m for m in maps]


def same(maps, expected):
    assert len(maps) == len(expected)
    for m, e in zip(maps, expected):
        torch.testing.assert_close(m, e)


@pytest.mark.parametrize('name', BACKBONES)
def test_all_levels_of_any_backbone(name):
    model = create(backbone_a=name, num_classes=3, proj_dim=8)
    x = images(size=BACKBONES[name])
    expected = expected_maps(model, name, x)
    assert len(expected) >= 4 and [m.shape[1] for m in expected] == [info['num_chs'] for info in model.feature_info]
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        same(maps, expected)
        same([features, model.forward_features(x)], [expected[-1]] * 2)
        same(model.forward_intermediates(x, indices=2, intermediates_only=True), expected[-2:])
        # In the order asked for, with negative ones and repeats.
        same(model.forward_intermediates(x, indices=[-1, 0, 1, 0])[1], [expected[i] for i in (-1, 0, 1, 0)])
        features, maps = model.forward_intermediates(x, indices=[1], stop_early=True)
        same([features, *maps], [expected[1]] * 2)
        features, maps = model.forward_intermediates(x, indices=[1])
        same([features, *maps], [expected[-1], expected[1]])
        nhwc = model.forward_intermediates(x, output_fmt='NHWC', intermediates_only=True)
        same(nhwc, [m.permute(0, 2, 3, 1) for m in expected])
        assert torch.equal(model(x), model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize('index', [0, 2, -2])
def test_levels_up_to_the_streams_last(index):
    model = create(out_index_a=index, **ONE)
    x = images()
    expected = expected_maps(model, 'test_resnet', x)
    assert len(expected) == index % 5 + 1
    with torch.inference_mode():
        same(model.forward_intermediates(x)[1], expected)


@pytest.mark.parametrize(
    'kwargs,levels',
    [
        (TWO, [(1, 0), (2, 1), (3, 2), (4, 3)]),
        (GRIDS, [(1, 0), (2, 1), (3, 2), (3, 3)]),
        (dict(ONE, backbone_b='test_vit'), [(3, 5), (4, 5)]),
        (dict(ONE, backbone_b='test_mambaout'), [(1, 0), (2, 1), (3, 2), (4, 3)]),
    ],
    ids=['two', 'grids', 'vit', 'nhwc'],
)
def test_two_streams(kwargs, levels):
    model = create(**kwargs)
    x = images(size=160)
    a, b = (copy.deepcopy(s) for s in (model.stream_a, model.stream_b))
    assert model.levels == levels
    with torch.inference_mode():
        maps_a = timm.create_model('test_resnet', features_only=True, out_indices=range(max(levels)[0] + 1)).eval()
        maps_a.load_state_dict(a.state_dict())
        maps_a = maps_a(x)
        maps_b = timm.create_model(
            kwargs['backbone_b'], features_only=True, out_indices=range(levels[-1][1] + 1)
        ).eval()
        maps_b.load_state_dict(b.state_dict())
        maps_b = [m.permute(0, 3, 1, 2) if model.nhwc_b else m for m in maps_b(x)]
        features, maps = model.forward_intermediates(x)
        for m, (i, j), info in zip(maps, levels, model.feature_info):
            grid = min(maps_a[i].shape[2], maps_b[j].shape[2])
            pooled = [F.adaptive_avg_pool2d(n, grid) for n in (maps_a[i], maps_b[j])]
            torch.testing.assert_close(m, torch.cat(pooled, 1))
            assert (m.shape[1], 160 // m.shape[2]) == (info['num_chs'], info['reduction'])
        same([features, model.forward_features(x)], [maps[-1]] * 2)
        early = model.forward_intermediates(x, indices=[0], stop_early=True)
        same([early[0], *early[1]], [maps[0]] * 2)


def test_output_format_is_checked():
    with pytest.raises(AssertionError, match='NCHW or NHWC'):
        create(**ONE).forward_intermediates(images(), output_fmt='NLC')
    for indices in (6, 0, [5], [-6]):
        with pytest.raises(AssertionError, match='range'):
            create(**ONE).forward_intermediates(images(), indices=indices)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_mambaout'])
def test_stream_ends_early_and_is_unchanged(name):
    model = create(backbone_a=name, num_classes=3)
    x = images(size=BACKBONES[name])
    calls = []
    for layer, module in model.stream_a.named_modules():
        module.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    with torch.inference_mode():
        expected = model(x)
        ordinary = list(calls)
        calls.clear()
        model.forward_intermediates(x, indices=[0], stop_early=True)
        assert 0 < len(calls) < 0.7 * len(ordinary)
        calls.clear()
        model.forward_intermediates(x)
        assert set(ordinary) - {'', 'model'} <= set(calls)
        calls.clear()
        assert torch.equal(model(x), expected) and calls == ordinary


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_mambaout'])
def test_ordinary_forward_holds_no_earlier_levels(name):
    stream = create(backbone_a=name, num_classes=3).stream_a
    assert len(stream(images(size=BACKBONES[name]))) == 1


def test_gradients_and_checkpointing():
    model = create(**TWO)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        _, maps = model.forward_intermediates(images(size=64, generator=torch.Generator().manual_seed(3)))
        sum(m.square().sum() for m in maps).backward()
        grads.append([p.grad.clone() for p in model.stream_a.parameters()])
    torch.testing.assert_close(*grads)
    assert sum(bool(g.any()) for g in grads[0]) > 10


# --- pruning


@pytest.mark.parametrize(
    'kwargs', [ONE, TWO, GRIDS, dict(ONE, backbone_a='test_vit')], ids=['one', 'two', 'grids', 'vit']
)
@pytest.mark.parametrize('indices,index', [([1], 1), ([0, 1], 1), (1, None), ([-2], None)])
def test_prune(kwargs, indices, index):
    model = create(**kwargs)
    x = images(size=160)
    last = (len(model.levels) - (2 if indices == [-2] else 1)) if index is None else index
    with torch.inference_mode():
        expected = model.forward_intermediates(x, intermediates_only=True)
        taken = model.prune_intermediate_layers(indices)
        assert taken[-1] == last
        assert not list(model.head.parameters())
        assert len(model.levels) == len(model.feature_info) == last + 1
        same(model.forward_intermediates(x, intermediates_only=True), expected[: last + 1])
        same([model(x), model.forward_features(x)], [expected[last]] * 2)
        assert model.num_features == expected[last].shape[1]
        same(model.forward_intermediates(x, indices=taken)[1], [expected[i] for i in taken])


def test_prune_removes_layers():
    model = create(**TWO)
    count = sum(p.numel() for p in model.parameters())
    model.prune_intermediate_layers([1])
    assert sum(p.numel() for p in model.parameters()) < 0.5 * count
    model.prune_intermediate_layers([0])  # once more
    assert len(model.levels) == 1 and model(images()).shape == (2, 32 + 24, 24, 24)


def test_prune_what_cannot_be_cut():
    # Such a stream runs to its end, and still gives the levels asked for.
    model = create(backbone_a='test_efficientnet', backbone_b='test_resnet', num_classes=3, proj_dim=8)
    x = images()
    with torch.inference_mode():
        expected = model.forward_intermediates(x, intermediates_only=True)
        taken = model.prune_intermediate_layers([1, 2])
        same(model.forward_intermediates(x, indices=taken, intermediates_only=True), expected[1:3])


def test_prune_keeps_the_head():
    model = create(**ONE)
    x = images()
    with torch.inference_mode():
        expected = model(x)
        model.prune_intermediate_layers(2, prune_head=False)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize('name', BACKBONES)
def test_features_only(name):
    model = create(backbone_a=name, features_only=True, out_indices=(0, 2))
    x = images(size=BACKBONES[name])
    backbone = timm.create_model(
        name, features_only=True, out_indices=[model.model.levels[i][0] for i in (0, 2)]
    ).eval()
    backbone.load_state_dict(model.model.stream_a.state_dict(), strict=False)
    with torch.inference_mode():
        nhwc = model.model.nhwc_a
        same(model(x), [m.permute(0, 3, 1, 2) if nhwc else m for m in backbone(x)])


def test_features_only_builds_no_classifier():
    model = timm.create_model('bcnn_resnet18', features_only=True, device='meta')
    assert not list(model.model.head.parameters())


def test_features_only_compiles():
    model = create(features_only=True, **TWO)
    x = images(size=64)
    with torch.no_grad():
        same(torch.compile(model, fullgraph=True, backend='eager')(x), model(x))
    assert isinstance(model, nn.Module) and len(model(x)) == 4
