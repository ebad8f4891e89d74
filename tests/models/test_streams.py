"""Streams: where they end, grids, layouts, input config."""

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import GRIDS, ONE, TWO, create, images
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, resolve_model_input_args

from timm_bilinear.models.streams import concat_streams

pytestmark = pytest.mark.usefixtures('clean_up')


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


def test_config_that_timms_train_script_hands_over():
    # It resolves the registered config first, which for any backbones says nothing of them.
    kwargs = dict(backbone_a='vit_tiny_patch16_224', num_classes=3, device='meta')
    expected = timm.create_model('bcnn', **kwargs).pretrained_cfg
    assert expected['mean'] == (0.5, 0.5, 0.5)
    assert timm.create_model(**resolve_model_input_args('bcnn', {}, **kwargs)).pretrained_cfg == expected
    overlay = dict(mean=(0.1, 0.2, 0.3))
    assert timm.create_model('bcnn', pretrained_cfg_overlay=overlay, **kwargs).pretrained_cfg['mean'] == (0.1, 0.2, 0.3)
