"""What every registered pooling has to do, and the registry: a pooling of a user's own goes through everything too."""

import json
import re
import warnings
from pathlib import Path
from typing import Annotated, Tuple

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from small_models import create, images
from torch.autograd import gradcheck

import timm_bilinear
from timm_bilinear.cli import main
from timm_bilinear.hub import save_model
from timm_bilinear.layers import BilinearHead, BilinearPooling, create_pooling, list_poolings, register_pooling
from timm_bilinear.layers.arguments import Bounds, describe_argument
from timm_bilinear.layers.pooling import ExactPooling, most_streams, pooling_arguments
from timm_bilinear.layers.pooling import registry as pooling_registry

pytestmark = [pytest.mark.usefixtures('clean_up'), pytest.mark.filterwarnings('ignore::FutureWarning')]

# Slices of a batch of one were another graph for torch.export then.
OLD_EXPORT = torch.__version__ < (2, 10)
CHANNELS = {'one': (12,), 'two': (12, 10)}
STREAMS = [(name, n) for name in list_poolings() for n in CHANNELS if n == 'one' or most_streams(name) > 1]


@pytest.fixture(params=list_poolings())
def pooling_name(request):
    return request.param


@pytest.fixture(params=STREAMS, ids='-'.join)
def pooled(request):
    """A pooling and the channels of the streams that it is to take."""
    name, streams = request.param
    return name, CHANNELS[streams]


@pytest.fixture
def name(pooled):
    return pooled[0]


@pytest.fixture
def channels(pooled):
    return pooled[1]


def maps(channels, batch=3, **kwargs):
    return [torch.randn(batch, c, 4, 5, **kwargs) for c in channels]


def head(name, channels, num_classes=5):
    return BilinearHead(channels[0], num_classes, *channels[1:], pool_type=name).eval()


def test_listed():
    assert {'avg', 'sum', 'max'} <= set(list_poolings())
    assert list_poolings() == sorted(list_poolings())
    assert timm_bilinear.layers.create_pooling is create_pooling


def test_shapes(name, channels):
    pooling = create_pooling(name, channels)
    assert isinstance(pooling, BilinearPooling)
    z = pooling(*maps(channels))
    assert z.shape == (3, pooling.num_features) and z.dtype == torch.float32
    assert pooling(*maps(channels, batch=0)).shape == (0, pooling.num_features)
    assert pooling(*maps(channels, dtype=torch.float64)).dtype == torch.float64
    if len(channels) == 1:
        assert create_pooling(name, channels[0]).num_features == pooling.num_features


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_maps_are_safe(name, channels, dtype):
    # An image that is all zero, dead channels, all locations alike (rank one), large and small values.
    x = [m.to(dtype) for m in maps(channels, batch=6)]
    for m in x:
        m[0] = 0
        m[1, 2:5] = 0
        m[2] = m[2, :, :1, :1]
        m[3] *= 1e3
        m[4] *= 1e-4
        m.requires_grad_()
    z = create_pooling(name, channels).to(dtype)(*x)
    z.float().sum().backward()
    assert z.isfinite().all() and all(m.grad.isfinite().all() for m in x)


def test_float32_inside_autocast(name, channels):
    pooling, x = create_pooling(name, channels), [m.bfloat16() for m in maps(channels)]
    want = pooling.double()(*(m.double() for m in x))
    with torch.autocast('cpu', torch.bfloat16):
        z = pooling.float()(*x)
    assert (z.double() - want).abs().max() <= 2**-8 * want.abs().max()


def test_gradients(name, channels):
    pooling, x = create_pooling(name, channels, dtype=torch.float64), maps(channels, batch=2, dtype=torch.float64)
    for m in x:
        m.requires_grad_()
    assert gradcheck(pooling, x, fast_mode=True)
    # fewer locations than channels: matrices are singular
    few = [m[..., :2, :2].detach().requires_grad_() for m in x]
    assert gradcheck(pooling, few, fast_mode=True)


def test_too_many_streams(pooling_name):
    most = most_streams(pooling_name)
    with pytest.raises(ValueError, match=f"'{pooling_name}' is of .*, got {most + 1}"):
        create_pooling(pooling_name, (4,) * (most + 1))


def test_wrong_maps(name, channels):
    pooling, x = create_pooling(name, channels), maps(channels)
    with pytest.raises(ValueError, match="'a' must be"):
        pooling(x[0][:, :, 0, 0], *x[1:])
    with pytest.raises(TypeError, match="'a' must be floating point"):
        pooling(x[0].long(), *x[1:])
    if len(channels) == 2:
        with pytest.raises(ValueError, match="'b' must have the locations"):
            pooling(x[0], x[1][..., 1:])


def test_traced_by_fx(name, channels):
    model, x = head(name, channels), torch.cat(maps(channels), 1)
    traced = torch.fx.symbolic_trace(model, concrete_args=dict(pre_logits=False, x_b=None))
    torch.testing.assert_close(traced(x, False, None), model(x))


def test_fused_and_unfused_agree(name, channels):
    model, x = head(name, channels), maps(channels)
    want = model.fc(model.pool(*x))
    torch.testing.assert_close(model(torch.cat(x, 1)), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x[0], x_b=x[1] if len(x) > 1 else None), want, atol=1e-5, rtol=1e-4)


def test_compilers(name, channels):
    model, x = head(name, channels), torch.cat(maps(channels), 1)
    want = model(x)
    got = [
        torch.jit.script(model)(x),
        torch.compile(model, fullgraph=True, backend='aot_eager')(x),
        torch.export.export(model, (x,), dynamic_shapes={'x': {0: torch.export.Dim.AUTO}}).module()(x),
    ]
    for logits in got:
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-4)


# 18 is the new exporter's least
@pytest.mark.parametrize('dynamo,opset', [(False, 17), (False, 20), (True, 18)])
def test_onnx(name, channels, dynamo, opset, tmp_path):
    model, path = head(name, channels), tmp_path / 'head.onnx'
    least = 2 if dynamo and OLD_EXPORT and len(channels) == 2 else 1
    x = [torch.cat(maps(channels, batch=batch), 1) for batch in (2, 5, least)]
    batch = {0: torch.export.Dim('batch', min=least, max=64)} if dynamo else {0: 'batch'}
    options = dict(dynamic_shapes=dict(x=batch)) if dynamo else dict(dynamic_axes=dict(x=batch))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (x[0],), path, dynamo=dynamo, opset_version=opset, input_names=['x'], verbose=False, **options
        )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for features in x:
        (logits,) = session.run(None, {'x': features.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(features).detach(), atol=1e-5, rtol=1e-4)
    if len(channels) == 1 and isinstance(model.pool, ExactPooling):
        # the triangle is gathered, and not cut out by masks of the size of the matrix
        constants = onnx.load(path).graph
        sizes = [np.prod(t.dims) for t in constants.initializer]
        sizes += [np.prod(a.t.dims) for n in constants.node for a in n.attribute if n.op_type == 'Constant']
        assert channels[0] ** 2 not in sizes


def test_transforms(name, channels):
    pooling, x = create_pooling(name, channels, dtype=torch.float64), maps(channels, dtype=torch.float64)
    tangents = tuple(map(torch.randn_like, x))
    z, got = torch.func.jvp(pooling, tuple(x), tangents)
    # the two modes of differentiation are adjoint; backward mode is checked by finite differences above
    weights = torch.randn_like(z)
    _, backward = torch.func.vjp(pooling, *x)
    grads = backward(weights)
    torch.testing.assert_close((got * weights).sum(), sum((g * t).sum() for g, t in zip(grads, tangents)))
    per_image = torch.func.vmap(lambda *m: pooling(*(t[None] for t in m))[0])(*x)
    torch.testing.assert_close(per_image, pooling(*x))


def test_saved_and_loaded(name, channels, tmp_path):
    backbone_b = 'test_convnext' if len(channels) == 2 else None
    model = create(backbone_a='test_resnet', backbone_b=backbone_b, proj_dim=8, num_classes=3, pool_type=name)
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    x = images(size=64)
    assert type(loaded.head.pool) is type(model.head.pool) and torch.equal(loaded(x), model(x))


def test_arguments_have_bounds(pooling_name):
    # What a signature leaves open, command line and Hub configs would not check.
    for argument, annotation in pooling_arguments(pooling_name).items():
        kind, *metadata = getattr(annotation, '__args__', (annotation,))[0], *getattr(annotation, '__metadata__', ())
        assert kind not in (int, float) or any(isinstance(m, Bounds) for m in metadata), argument


def test_documented(pooling_name):
    text = Path(__file__).parents[3].joinpath('docs', 'poolings.md').read_text()
    pooling = pooling_registry._poolings[pooling_name]
    described = ', '.join(describe_argument(pooling, argument) for argument in pooling_arguments(pooling_name))
    assert f'| `{pooling_name}` |' in text and described in text, described


# --- a pooling of a user's own


@pytest.fixture
def power(monkeypatch):
    """A registered pooling: mean powers of a stream's channels, with a parameter and arguments of its own."""
    monkeypatch.setattr(pooling_registry, '_poolings', dict(pooling_registry._poolings))

    @register_pooling('power')
    class PowerPooling(BilinearPooling):
        def __init__(
            self,
            in_features: Tuple[int, ...],
            *,
            power: Annotated[int, Bounds(1, 9)] = 2,
            centred: bool = False,
            device=None,
            dtype=None,
        ):
            super().__init__()
            self.num_features = sum(in_features)
            self.power, self.centred = power, centred
            self.gain = nn.Parameter(torch.ones(self.num_features, device=device, dtype=dtype))

        def forward(self, *maps):
            return torch.cat([m.float().pow(self.power).mean((2, 3)) for m in maps], 1) * self.gain

    return PowerPooling


def test_own_pooling(power, tmp_path):
    model = create(backbone_a='test_resnet', num_classes=3, pool_type='power', power=3)
    assert 'power' in list_poolings() and isinstance(model.head.pool, power)
    assert model.head_hidden_size == model.get_classifier().in_features == 96
    x = images(size=64)
    a = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head.fc(a.pow(3).mean((2, 3))))
    nn.init.uniform_(model.head.pool.gain)
    save_model(model, tmp_path / 'model')
    assert json.loads((tmp_path / 'model' / 'config.json').read_text())['model_args']['power'] == 3
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    assert loaded.head.pool.power == 3 and torch.equal(loaded(x), model(x))
    model.reset_classifier(4, 'avg')
    assert model(x).shape == (2, 4) and model.head_hidden_size == 96 * 97 // 2
    model.reset_classifier(2, 'power')
    assert model.head.pool.power == 2 and model(x).shape == (2, 2)


@pytest.mark.parametrize(
    'kwargs,error,message',
    [
        (dict(pool_type='powr'), ValueError, r"'pool_type' must be one of .* or '', got 'powr'\. Did .* 'power'"),
        (dict(pool_type='power', power=0), ValueError, r"'power' must be positive, got 0"),
        (dict(pool_type='power', power=10), ValueError, r"'power' must be at most 9, got 10"),
        (dict(pool_type='power', power=2.5), TypeError, r"'power' must be an integer, got 2\.5"),
        (dict(pool_type='power', power=True), TypeError, r"'power' must be an integer, got True"),
        (dict(pool_type='power', centred='yes'), TypeError, r"'centred' must be True or False, got 'yes'"),
        (dict(pool_type='power', eps=1e-3), TypeError, r"'eps': pooling 'power' takes power, centred"),
        (dict(global_pool='', no_such=2), TypeError, r"'no_such': no pooling takes it"),
        (dict(pool_type='avg', centred=True), TypeError, r"'centred': pooling 'avg' takes eps"),
        (dict(pool_type='avg', eps='tiny'), TypeError, r"'eps' must be a number, got 'tiny'"),
        (dict(proj_dim=2.0), TypeError, r"'proj_dim' must be an integer or None, got 2\.0"),
        (dict(img_size='big'), TypeError, r"'img_size' must be an integer or a tuple of 2 integers or None, got 'big'"),
        (dict(drop_rate=1.5), ValueError, r"'drop_rate' must be at most 1, got 1\.5"),
    ],
    ids=str,
)  # fmt: skip
def test_argument_errors(power, kwargs, error, message):
    with pytest.raises(error, match=message):
        create(backbone_a='test_resnet', num_classes=3, **kwargs)


def test_reset_to_another_pooling_is_saved_as_it_is(power, tmp_path):
    model = create(backbone_a='test_resnet', proj_dim=8, num_classes=3, pool_type='power', power=3)
    model.reset_classifier(3, 'max')
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    x = images(size=64)
    assert torch.equal(loaded(x), model(x))


def test_arguments_arrive_as_annotated(power, tmp_path):
    # JSON has no tuples, and numbers come from numpy too.
    @register_pooling('levels')
    class Levels(power):
        def __init__(self, in_features, *, levels: Tuple[int, ...] = (1, 2), device=None, dtype=None):
            super().__init__(in_features, device=device, dtype=dtype)
            self.levels = (*levels, 3)

    model = create(backbone_a='test_resnet', num_classes=np.int64(3), pool_type='levels', levels=(4, 5))
    assert model.num_classes == 3 and model.head.pool.levels == (4, 5, 3)
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True)
    assert loaded.head.pool.levels == (4, 5, 3)
    model.reset_classifier(np.int64(7))
    assert model.num_classes == 7 and type(model.num_classes) is int
    assert type(create_pooling('avg', np.int64(8), eps=np.float32(1e-5)).eps) is float


@pytest.mark.parametrize('in_features', [0, -3, True, 2.5, None, 'x', (8, 0), (8, 2.5), ('x',)], ids=str)
def test_in_features_are_checked(in_features):
    with pytest.raises((TypeError, ValueError), match="'in_features' must be"):
        create_pooling('avg', in_features)


def test_what_cannot_be_registered(power):
    class Named(power):
        def __init__(self, in_features, *, drop_rate: float = 0.5, device=None, dtype=None):
            super().__init__(in_features)

    class Bare(power):
        def __init__(self, in_features):
            super().__init__(in_features)

    class Required(power):
        def __init__(self, in_features, *, rank: int, device=None, dtype=None):
            super().__init__(in_features)

    for cls, message in ((nn.ReLU, 'subclass'), (len, 'subclass'), (Bare, "'device'"), (Required, "'rank'.*default")):
        with pytest.raises(TypeError, match=message):
            register_pooling('other')(cls)
    for name in (power, 3, None):
        with pytest.raises(TypeError, match='must be a string'):
            register_pooling(name)
    assert 'other' not in list_poolings()
    register_pooling('named')(Named)
    with pytest.raises(TypeError, match=r"'drop_rate' of pooling 'named' is one of Bilinear\w+ too"):
        create(backbone_a='test_resnet', num_classes=3, pool_type='named')


def test_names_are_taken_once(power):
    with pytest.raises(ValueError, match="'avg' is taken"):
        register_pooling('avg')(power)
    with pytest.raises(ValueError, match='empty'):
        register_pooling('')(power)


@pytest.mark.parametrize(
    'argument,named', [('eps=tiny', 'eps'), ('eps=0', 'eps'), ('foo=1', 'foo'), ('proj_dim=-1', 'proj_dim')]
)
def test_command_line(tmp_path, argument, named):
    for split in ('train', 'val'):
        for label in ('a', 'b'):
            folder = tmp_path / 'data' / split / label
            folder.mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(folder / '0.png')
    run = tmp_path / 'run'
    with pytest.raises(SystemExit) as e:
        main(['finetune', str(tmp_path / 'data'), '--output', str(run), '--model', 'bcnn', '--no-pretrained',
              '--model-kwargs', 'backbone_a=test_resnet', argument])  # fmt: skip
    assert re.search(f"error: .*'{named}'", str(e.value.code)) and '\n' not in str(e.value.code)
    assert not run.exists()
