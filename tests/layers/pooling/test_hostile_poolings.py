"""Every registered pooling on what features can be at worst, and under compilers when gradients are asked for."""

import onnxruntime
import pytest
import torch

from timm_bilinear.layers import create_pooling, list_poolings
from timm_bilinear.layers.pooling import most_streams

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')

EXACT = ('avg', 'sum', 'max')
FORMS = [
    *((name, {}) for name in list_poolings()),
    *((name, dict(power=power)) for name in EXACT for power in ('sigme', 'maxexp')),
    ('isqrt', dict(isometric=False)),
    ('lowrank', dict(norm=False)),
    ('sqrtm', dict(iterations=5)),
]
IDS = ['-'.join([name, *map(str, args.values())]) for name, args in FORMS]
SMALL = dict(sketch=dict(dim=16), maclaurin=dict(dim=16), cross=dict(dim=8), moments=dict(dim=8))


@pytest.fixture(params=FORMS, ids=IDS)
def form(request):
    return request.param


def create(form, in_features):
    name, args = form
    return create_pooling(name, in_features, **SMALL.get(name, {}), **args)


def gradients(pooling, *maps):
    z = pooling(*maps)
    return z, torch.autograd.grad(z, maps, torch.ones_like(z), materialize_grads=True)


@pytest.mark.parametrize('size', [2.0, 20.0, 1e4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_strong_channel(form, dtype, size):
    x = torch.randn(2, 320, 3, 3).relu_()
    x[:, 0] *= size
    z, (grad,) = gradients(create(form, 320), x.to(dtype).requires_grad_())
    assert z.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize('kind', ['nan', 'inf'])
def test_an_image_that_is_not_finite_keeps_to_its_row(form, kind):
    pooling = create(form, 6)
    x = torch.randn(3, 6, 3, 3)
    want, (want_grad,) = gradients(pooling, x.clone().requires_grad_())
    x[1, 2, 0, 0] = float(kind)
    z, (grad,) = gradients(pooling, x.requires_grad_())
    assert not z[1].isfinite().all() and not grad[1].isfinite().all()
    torch.testing.assert_close(z[::2], want[::2])
    torch.testing.assert_close(grad[::2], want_grad[::2])


@pytest.mark.parametrize(
    'dtype,size',
    [
        (torch.float16, 6e4),
        (torch.bfloat16, 3e38),
        (torch.float32, 1e19),
        (torch.float32, 1e25),
        (torch.float32, 3e38),
        (torch.float64, 1e308),
    ],
    ids=str,
)
def test_huge_features(form, dtype, size):
    x = torch.rand(2, 8, 3, 3).sub_(0.4).to(dtype)
    # On its way a gradient of isqrt's is multiplied by the size of the descriptor, which is that of the features.
    x[0] *= size / 30 if form[0] == 'isqrt' else size
    z, (grad,) = gradients(create(form, 8), x.requires_grad_())
    assert z.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_streams_far_apart(form, dtype):
    if most_streams(form[0]) == 1:
        pytest.skip('of one stream')
    a, b = (1e-40 * torch.randn(2, 6, 3, 3)).to(dtype), (3e38 * torch.rand(2, 6, 3, 3)).to(dtype)
    z, grads = gradients(create(form, (6, 6)), a.requires_grad_(), b.requires_grad_())
    assert z.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('eps', [1e-300, 1e-60, 1e30])
def test_any_eps(form, eps):
    try:
        pooling = create((form[0], dict(form[1], eps=eps)), 8)
    except TypeError:
        pytest.skip('has no eps')
    x = torch.randn(2, 8, 3, 3)
    x[0] = 0
    z, (grad,) = gradients(pooling, x.requires_grad_())
    assert z.isfinite().all() and grad.isfinite().all()
    with pytest.raises(ValueError, match=r"'eps' must be at most 1e\+30, got 1e\+300"):
        create((form[0], dict(form[1], eps=1e300)), 8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_compiled_with_gradients(form, dtype):
    pooling, x = create(form, 6), torch.randn(2, 6, 3, 4).to(dtype).requires_grad_()
    z, grads = gradients(pooling, x)
    torch.compiler.reset()
    got, got_grads = gradients(torch.compile(pooling, fullgraph=True, backend='aot_eager'), x)
    torch.testing.assert_close(got, z)
    torch.testing.assert_close(got_grads, grads)


def test_compiled_with_symbols_for_sizes(form):
    pooling = create(form, 6)
    torch.compiler.reset()
    compiled = torch.compile(pooling, fullgraph=True, backend='eager', dynamic=True)
    for shape in ((2, 6, 3, 4), (3, 6, 5, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), pooling(x))


def test_exported_graph_of_a_blank_image(form, tmp_path):
    # An optimiser of graphs may take an offset of 1e-10 for 0.
    pooling, x = create(form, 4).eval(), torch.randn(2, 4, 3, 2)
    torch.onnx.export(pooling, (x,), tmp_path / 'pooling.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'pooling.onnx')
    x[0] = 0
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    if form[0] == 'moments':  # of tokens that are all alike the covariance is rounding, of unit length
        assert torch.from_numpy(got).isfinite().all()
    else:
        torch.testing.assert_close(torch.from_numpy(got), pooling(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    'name,in_features,channels',
    [
        ('avg', 4, [5]),
        ('max', 4, [4, 4]),
        ('sum', (4, 5), [5, 4]),
        ('isqrt', 4, [4, 4]),
        ('democratic', 4, [3]),
        ('lowrank', 4, [5]),
        ('sketch', (4, 4), [4]),
        ('moments', (4, 6), [4, 5]),
        ('cross', (4, 5), [4]),
        ('cross', (4, 5, 6), [4, 11]),
    ],
)
def test_maps_of_other_channels_are_refused(name, in_features, channels):
    pooling = create((name, {}), in_features)
    with pytest.raises(ValueError, match=r'Pooling takes maps of \(.*\) channels, got maps of \(.*\)'):
        pooling(*(torch.randn(1, c, 2, 2) for c in channels))
