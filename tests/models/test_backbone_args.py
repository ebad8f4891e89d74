"""What reaches the backbones: their own arguments, timm's script's, and names and networks that timm itself builds."""

import json
import math
import re
import sys
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from small_models import ONE, TWO, create, images
from timm.layers import DropBlock2d, DropPath
from timm.models import _registry, build_model_with_cfg, get_deprecated_models, get_pretrained_cfg, register_model
from timm.utils import ParseKwargs

from timm_bilinear import save_model
from timm_bilinear.models.streams import create_stream, input_config

pytestmark = pytest.mark.usefixtures('clean_up')

STRIDE = dict(output_stride=16)


def grid(stream, size=64):
    return stream(torch.randn(1, 3, size, size))[-1].shape[2:]


# --- backbone_args


def test_backbone_args_reach_both_streams():
    model = create(backbone_args=STRIDE, **TWO)
    assert grid(model.stream_a) == grid(model.stream_b) == (4, 4)
    assert model.forward_features(images(size=64)).shape[2:] == (4, 4)
    assert create(**TWO).forward_features(images(size=64)).shape[2:] == (2, 2)


@pytest.mark.parametrize('args_b,stride_b', [({}, 32), (dict(output_stride=8), 8), (None, 16)])
def test_backbone_args_of_stream_b(args_b, stride_b):
    model = create(backbone_args=STRIDE, backbone_args_b=args_b, **TWO)
    assert grid(model.stream_a) == (4, 4) and grid(model.stream_b) == (64 // stride_b,) * 2


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(ONE, backbone_args=STRIDE),
        dict(ONE, backbone_args=dict(output_stride=8, act_layer='gelu')),
        dict(TWO, backbone_args=STRIDE, backbone_args_b=dict(kernel_sizes=5)),
        dict(backbone_a='test_vit', num_classes=3, backbone_args=dict(num_heads=4, dynamic_img_size=True)),
    ],
    ids=str,
)
def test_backbone_args_are_saved_and_loaded(tmp_path, kwargs):
    model = create(**kwargs)
    save_model(model, tmp_path / 'model')
    args = json.loads((tmp_path / 'model' / 'config.json').read_text())['model_args']
    assert args['backbone_args'] == kwargs['backbone_args']
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    assert repr(loaded) == repr(model)
    x = images(size=160)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_backbone_args_from_the_command_line():
    # As timm's scripts and our own command line read them.
    given = {}
    namespace = type('Namespace', (), dict(model_kwargs={}))()
    ParseKwargs(['--model-kwargs'], 'model_kwargs', nargs='*')(
        None, namespace, ['backbone_args={"output_stride":16}', "backbone_args_b={'output_stride':8}"]
    )
    given.update(namespace.model_kwargs)
    model = create(**TWO, **given)
    assert grid(model.stream_a) == (4, 4) and grid(model.stream_b) == (8, 8)


@pytest.mark.parametrize(
    'kwargs,message',
    [
        (dict(backbone_args=dict(no_such=1)), r"'backbone_args': .*'test_resnet' does not take no_such=1"),
        (
            dict(backbone_args=dict(output_stride=16, nope='x')),
            r"'backbone_args': .*'test_resnet' does not take nope='x'",
        ),
        (dict(backbone_args=dict(output_stride=7)), r"'backbone_args': .*'test_resnet' does not take output_stride=7"),
        (dict(backbone_a='vgg11', backbone_args=STRIDE), r"'backbone_args': .*'vgg11' does not take output_stride=16"),
        (dict(backbone_b='vgg11', backbone_args=STRIDE), r"'backbone_args_b': .*'vgg11' does not take output_stride"),
        (dict(backbone_b='vgg11', backbone_args_b=dict(a=1)), r"'backbone_args_b': .*'vgg11' does not take a=1"),
        (dict(backbone_args=dict(in_chans=1)), r"'backbone_args': .*'test_resnet' does not take in_chans=1"),
        (dict(backbone_args=dict(features_only=False)), r'does not take features_only=False'),
        (dict(backbone_args=dict(checkpoint_path='/a.pth')), r"does not take checkpoint_path='/a.pth'"),
        (dict(backbone_args_b=dict(pretrained_cfg_overlay={}), backbone_b='vgg11'), r'_b.*pretrained_cfg_overlay'),
        (dict(backbone_args=dict(block_args=3)), r'does not take block_args=3'),
    ],
    ids=str,
)
def test_refused_backbone_args(kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        create(**dict(ONE, **kwargs))
    assert '\n' not in str(e.value) and str(e.value).count('does not take') == 1


# --- what timm's train script passes


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'vgg11_bn'])
def test_batch_norm_arguments(tmp_path, name):
    model = create(backbone_a=name, num_classes=3, proj_dim=8, bn_momentum=0.25, bn_eps=3e-3)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and {(m.momentum, m.eps) for m in norms} == {(0.25, 3e-3)}
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    assert {(m.momentum, m.eps) for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.25, 3e-3)}


def test_batch_norm_arguments_leave_the_rest():
    default = {(m.momentum, m.eps) for m in create(**ONE).modules() if isinstance(m, nn.BatchNorm2d)}
    assert default == {(0.1, 1e-5)}
    model = create(bn_eps=1e-2, **TWO)  # ConvNeXt has none
    assert {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.1, 1e-2)}


@pytest.mark.parametrize('name,cls', [('drop_block_rate', DropBlock2d), ('drop_path_rate', DropPath)])
def test_drop_rates(name, cls):
    def count(stream):
        return sum(isinstance(m, cls) for m in stream.modules())

    model = create(backbone_a='resnet18', num_classes=3, proj_dim=8, device='meta', **{name: 0.1})
    assert count(model.stream_a) > 0
    # To the stream that has it, and not a word about the other.
    model = create(backbone_a='vgg11', backbone_b='resnet18', num_classes=3, proj_dim=8, device='meta', **{name: 0.1})
    assert count(model.stream_a) == 0 < count(model.stream_b)
    assert count(create(backbone_a='resnet18', num_classes=3, proj_dim=8, device='meta')) == 0


@pytest.mark.parametrize('name', ['drop_block_rate', 'drop_path_rate', 'bn_eps', 'bn_momentum'])
def test_arguments_that_no_stream_has(name):
    with pytest.raises(ValueError, match=f"'{name}'.*'vgg11'") as e:
        create(backbone_a='vgg11', num_classes=3, proj_dim=8, device='meta', **{name: 0.1})
    assert '\n' not in str(e.value)


def test_train_script_arguments():
    # Those of timm's train.py, which are None unless they are set.
    model = timm.create_model(
        'bcnn_resnet18_c4',
        pretrained=False,
        in_chans=None,
        num_classes=3,
        drop_rate=0.1,
        drop_path_rate=None,
        drop_block_rate=0.1,
        global_pool='sum',
        bn_momentum=0.2,
        bn_eps=1e-3,
        scriptable=True,
        checkpoint_path=None,
    )
    assert {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.2, 1e-3)}
    assert model.head.pool_type == 'sum' and model.head.drop.p == 0.1


# --- names that timm has given up


def test_deprecated_names():
    deprecated = get_deprecated_models()
    assert len(deprecated) > 100
    for name, current in deprecated.items():
        try:
            get_pretrained_cfg(current)
        except RuntimeError as e:  # timm maps some to tags that it does not have, and does not build them either
            with pytest.raises(ValueError, match=re.escape(str(e))):
                input_config(name)
            continue
        assert input_config(name) == input_config(current), name
        tag = current.partition('.')[2]
        if tag:
            assert input_config(f'{name}.{tag}') == input_config(current)


@pytest.mark.parametrize('name', ['xception', 'tv_resnet34', 'vit_small_patch16_224_in21k', 'tf_efficientnet_b0_ns'])
def test_deprecated_backbone_is_its_replacement(name):
    current = get_deprecated_models()[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        stream = create_stream('backbone_a', name, in_chans=3, device='meta')
    assert any(name in str(w.message) and current in str(w.message) for w in caught)
    expected = create_stream('backbone_a', current, in_chans=3, device='meta')
    assert repr(stream) == repr(expected)
    assert stream.pretrained_cfg == expected.pretrained_cfg  # and with it the weights that it names
    cfg = get_pretrained_cfg(current)
    assert (stream.pretrained_cfg.get('hf_hub_id'), stream.pretrained_cfg.get('url')) == (cfg.hf_hub_id, cfg.url)


# --- backbones of one's own


class PlainNet(nn.Module):
    """A network as users write them: no device or dtype, drop path rates by linspace."""

    has_levels = True

    def __init__(self, num_classes=10, in_chans=3, width=8, drop_path_rate=0.0):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, drop_path_rate, 3)]
        self.num_classes = num_classes
        self.num_features = 4 * width
        self.stem = nn.Conv2d(in_chans, width, 3, stride=2, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), DropPath(rates[1]), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU())
        self.feature_info = [
            dict(num_chs=width * 2**i, reduction=2 ** (i + 1), module=name)
            for i, name in enumerate(('stem', 'stage1', 'stage2') if self.has_levels else ())
        ]
        self.head = nn.Linear(4 * width, num_classes)


def plain_net(pretrained=False, **kwargs):
    feature_cfg = dict(out_indices=(0, 1, 2))
    return build_model_with_cfg(PlainNet, 'plain_net', pretrained, feature_cfg=feature_cfg, **kwargs)


@pytest.fixture
def plain_backbone():
    plain_net.__module__ = __name__
    added = list(getattr(sys.modules[__name__], '__all__', []))
    register_model(plain_net)
    yield 'plain_net'
    _registry._clear_model_entries('plain_net')
    _registry._model_entrypoints.pop('plain_net')
    sys.modules[__name__].__all__ = added


@pytest.mark.parametrize('index,channels', [(-1, 32), (0, 8), (1, 16)])
def test_own_backbone(plain_backbone, index, channels):
    model = create(backbone_a=plain_backbone, num_classes=5, out_index_a=index)
    assert model.num_features == channels
    x = images()
    with torch.inference_mode():
        (features,) = model.stream_a(x)
        assert torch.equal(model.forward_features(x), features)
        assert model(x).shape == (2, 5)
        assert len(model.forward_intermediates(x, intermediates_only=True)) == index % 3 + 1


@pytest.mark.parametrize('device,dtype', [('cpu', torch.float64), ('meta', None), ('meta', torch.bfloat16)])
def test_own_backbone_on_a_device(plain_backbone, device, dtype):
    model = create(backbone_a='test_resnet', backbone_b=plain_backbone, num_classes=5, device=device, dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype or torch.float32)}


def test_own_backbone_takes_arguments(plain_backbone, tmp_path):
    model = create(
        backbone_a=plain_backbone, num_classes=5, in_chans=1, backbone_args=dict(width=4), drop_path_rate=0.2
    )
    assert model.num_features == 16 and model.stream_a.stage1[1].drop_prob == pytest.approx(0.1)
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = images(chans=1)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="'plain_net' does not take depth=3"):
        create(backbone_a=plain_backbone, num_classes=5, backbone_args=dict(width=4, depth=3))


def test_backbone_without_levels(plain_backbone, monkeypatch):
    # Whatever else is wrong with what it is given.
    monkeypatch.setattr(PlainNet, 'has_levels', False)
    for args in ({}, dict(depth=3)):
        with pytest.raises(ValueError, match="'backbone_b': 'plain_net' has no spatial features"):
            create(backbone_a='test_resnet', backbone_b=plain_backbone, num_classes=5, backbone_args_b=args)


def test_probing_draws_no_random_numbers(plain_backbone):
    torch.manual_seed(1)
    model = create(backbone_a=plain_backbone, num_classes=5)
    torch.manual_seed(1)
    expected = timm.create_model(plain_backbone, features_only=True)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.stream_a.state_dict()[key], value)


def test_own_backbone_has_no_weights(plain_backbone):
    with pytest.raises(RuntimeError, match="no pretrained weights for 'plain_net'"):
        timm.create_model('bcnn', pretrained=True, backbone_a=plain_backbone)


def test_huge_classifier_warns_before_it_is_made(caplog):
    # 2048 channels unprojected: descriptors of 2.1 million entries.
    model = timm.create_model('bcnn', backbone_a='resnet50', num_classes=500, device='meta')
    assert len(caplog.records) == 1
    (record,) = caplog.records
    assert record.name.startswith('timm_bilinear') and record.levelname == 'WARNING'
    assert "'proj_dim'" in record.message and '1.0 billion' in record.message and '500 classes' in record.message
    assert math.isclose(sum(p.numel() for p in model.head.parameters()), 500 * (2048 * 2049 / 2 + 1))
    caplog.clear()
    model.reset_classifier(1000)
    assert len(caplog.records) == 1 and '2.1 billion' in caplog.records[0].message
    caplog.clear()
    model.reset_classifier(400)
    timm.create_model('bcnn', backbone_a='resnet50', num_classes=5000, proj_dim=512, device='meta')
    timm.create_model('bcnn', backbone_a='resnet50', num_classes=0, device='meta')
    assert not caplog.records
