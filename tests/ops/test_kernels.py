"""The GPU's kernels, through the public ops, against the definition in float64: on the GPU or, where there is none, in
Triton's interpreter.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from op_cases import classifier, deviation, double, features, run
from torch._subclasses import FakeTensorMode

from timm_bilinear import ops
from timm_bilinear.ops import bilinear_classify, bilinear_pool, kernels, library, reference
from timm_bilinear.ops.kernels import descriptors, tiles

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason='no GPU')
# Channels of a, of b (None: a with itself) and locations: none a multiple of a tile, but for 512.
SHAPES = [
    (1, None, 1),
    (1, None, 49),
    (3, None, 1),
    (3, None, 784),
    (65, None, 1),
    (65, None, 49),
    (65, None, 196),
    (130, None, 70),
    (512, None, 1),
    (512, None, 49),
    (1, 1, 49),
    (1, 65, 1),
    (3, 5, 49),
    (65, 3, 196),
    (65, 130, 49),
]
# Largest deviation from float64, relative to the largest entry: logits, then gradients. Descriptors and u are rounded
# to half precision on the way, and the interpreter cuts bfloat16 off where the GPU rounds it.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-6, 2**-5), torch.float16: (2**-9, 2**-8)}
DTYPES = list(TOLERANCES)
LAYOUTS = {
    'NCHW': lambda x: x,
    'channels_last': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'slice': lambda x: torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], 1)[
        :, x.shape[1] : -x.shape[1]
    ],
}


@pytest.fixture(autouse=True)
def take_kernels(monkeypatch):
    """The public ops take the kernels, on the CPU too."""
    if not GPU:
        monkeypatch.setattr(library, '_path', lambda x: kernels)
        monkeypatch.setattr(ops, '_is_fast', lambda a, pool: True)
    monkeypatch.setattr(reference, 'bilinear_pool', None)
    with torch.device('cuda') if GPU else nullcontext():
        yield


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


def compare(inputs, pool, dtype, eps=1e-10, factor=1.0):
    a, _, weight, _ = inputs
    tolerance, grad_tolerance = TOLERANCES[dtype]
    grad = torch.randn(a.shape[0], len(weight)).to(dtype)
    got = run(lambda *x: bilinear_classify(*x, pool=pool, eps=eps), inputs, grad)
    want = run(lambda *x: reference.bilinear_classify(*x, pool, eps), double(*inputs), grad)
    assert {x.dtype for x in got} == {dtype}
    out, *grad_features, grad_weight, grad_bias = zip(got, want)
    assert deviation(*out) < tolerance
    assert deviation(*grad_weight) < grad_tolerance and deviation(*grad_bias) < grad_tolerance
    u = (grad.double() @ weight.double()).abs().max().item()
    for x in grad_features:
        # After the L2 norm little of u - z (z.u), or nothing, is left to one channel: compare to u / |a|, |a| >= 0.1.
        assert deviation(*x, at_least=10 * u if x[0].shape[1] == 1 else 0.0) < factor * grad_tolerance


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('channels,channels_b,locations', SHAPES)
def test_against_float64(channels, channels_b, locations, pool, dtype):
    if not GPU and pool == 'max' and channels * (channels_b or channels) * locations > 2e5:
        pytest.skip('a minute each in the interpreter')
    a = features(channels, locations, dtype=dtype)
    b = None if channels_b is None else features(channels_b, locations, dtype=dtype)
    compare((a, b, *classifier(channels, channels_b, dtype=dtype)), pool, dtype)


def test_against_float64_at_full_size():
    compare((features(512, 784, batch=1), None, *classifier(512)), 'avg', torch.float32)


@pytest.mark.parametrize('small', [descriptors.HALF_SMALL, descriptors.FLOAT_SMALL], ids=['half', 'float'])
@pytest.mark.parametrize('channels_b', [None, 40])
def test_small_tiles(monkeypatch, small, channels_b):
    monkeypatch.setattr(descriptors, '_is_small', lambda programs, device: True)
    dtype = torch.bfloat16 if small is descriptors.HALF_SMALL else torch.float32
    a, b = features(65, 49, dtype=dtype), None if channels_b is None else features(channels_b, 49, dtype=dtype)
    compare((a, b, *classifier(65, channels_b, dtype=dtype)), 'avg', dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_layouts(two, pool, dtype, layout):
    a, b = features(20, 30, dtype=dtype), features(35, 30, dtype=dtype) if two else None
    weight, bias = classifier(20, 35 if two else None, dtype=dtype)
    grad = torch.randn(2, 4)
    want = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), grad)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (a, b)]
    laid_out = [None if x is None else layout(x) for x in leaves]
    for x in laid_out:
        assert x is None or x.stride() != a.stride() or layout is LAYOUTS['NCHW']
    got = bilinear_classify(*laid_out, weight, bias, pool=pool)
    assert torch.equal(got, want[0])
    for x, y in zip(torch.autograd.grad(got, [x for x in leaves if x is not None], grad.to(dtype)), want[1:]):
        assert torch.equal(x, y)


@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_pool(dtype, two, pool):
    a, b = features(20, 30, dtype=dtype), features(35, 30, dtype=dtype) if two else None
    grad = torch.randn(2, ops.descriptor_size(20, 35 if two else None)).to(dtype)
    got = run(lambda *x: bilinear_pool(*x, pool=pool), (a, b), grad)
    want = run(
        lambda *x: reference.bilinear_classify(*x, torch.eye(grad.shape[1], dtype=torch.float64), None, pool, 1e-10),
        double(a, b),
        grad,
    )
    tolerance, grad_tolerance = TOLERANCES[dtype]
    assert deviation(got[0], want[0]) < tolerance
    torch.testing.assert_close(got[0].double().norm(dim=1), torch.ones(2).double(), atol=tolerance, rtol=0)
    for x, y in zip(got[1:], want[1:]):
        assert deviation(x, y) < grad_tolerance


@pytest.mark.parametrize('eps', [1e-5, 1e-2])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_eps(two, eps):
    # Where eps matters: zero-mean features, with products of every size down to 0, and slopes to match.
    a, b = torch.randn(2, 20, 30), torch.randn(2, 35, 30) if two else None
    compare((a, b, *classifier(20, 35 if two else None)), 'avg', torch.float32, eps, factor=10)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_repeatable(dtype):
    inputs = features(65, 49, dtype=dtype), None, *classifier(65, dtype=dtype)
    first, second = (run(bilinear_classify, inputs, torch.ones(2, 4)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize('layout', [lambda x: x.repeat_interleave(2)[::2], lambda x: x[:1].expand(4)])
def test_bias_of_any_stride(layout):
    a, (weight, bias) = features(20, 30), classifier(20)
    bias = layout(bias)
    assert not bias.is_contiguous() or bias.stride() != (1,)
    compare((a, None, weight, bias), 'avg', torch.float32)


def test_small_half_precision_descriptors_under_a_scaled_loss():
    # Gradients of unnormalised descriptors of small norm leave float16, those of the features do not.
    a = features(4, 49).mul(0.03).half()
    grad = 3e3 * torch.randn(2, 10)
    got = run(bilinear_pool, (a,), grad)
    want = run(
        lambda a: reference.bilinear_classify(a, None, torch.eye(10).double(), None, 'avg', 1e-10),
        double(a),
        grad.half(),
    )
    assert deviation(got[1], want[1]) < 2**-8


@pytest.mark.parametrize('setting', ['tf32', 'ieee', 'none'])
def test_precision_set_by_the_new_api(setting):
    # PyTorch raises where its old and new settings meet.
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert tiles.precision(torch.float32) == ('tf32' if setting == 'tf32' else 'tf32x3')
        bilinear_classify(features(20, 30), None, *classifier(20))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('eps', [1e-46, 1e-38, 1.0])
def test_any_eps_is_finite(eps, dtype):
    a = torch.zeros(2, 65, 49, dtype=dtype)
    a[1, 3, 5] = 6e-8
    out = run(lambda *x: bilinear_classify(*x, eps=eps), (a, None, *classifier(65, dtype=dtype)), torch.ones(2, 4))
    assert all(x.isfinite().all() for x in out)


def test_no_bias_and_frozen_parts():
    a, (weight, _) = features(20, 30).requires_grad_(), classifier(20)
    want = run(
        lambda a, w: reference.bilinear_classify(a, None, w, None, 'avg', 1e-10),
        double(a, weight),
        torch.ones(2, 4),
    )
    logits = bilinear_classify(a, None, weight)
    (grad,) = torch.autograd.grad(logits.sum(), a)
    assert deviation(logits.detach(), want[0]) < 1e-5 and deviation(grad, want[1]) < 1e-5
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(bilinear_classify(a.detach(), None, weight).sum(), weight)
    assert deviation(grad, want[2]) < 1e-5


def test_many_classes():
    compare((features(6, 10), None, *classifier(6, num_classes=2500)), 'avg', torch.float32)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_fake_tensors_of_the_gpu(two, dtype):
    inputs = features(20, 30, dtype=dtype), features(35, 30, dtype=dtype) if two else None
    inputs += classifier(20, 35 if two else None, dtype=dtype)
    real = kernels.classify(*inputs, 'avg', 1e-10)
    with FakeTensorMode():
        fake = [x if x is None else torch.empty(x.shape, dtype=x.dtype, device='cuda') for x in inputs]
        fake = library.bilinear_classify(*fake, 'avg', 1e-10, False)
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


# --- hostile but finite features


@pytest.mark.parametrize(
    'dtype,huge',
    [
        (torch.float16, 6e4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 3e38),
        (torch.float32, 1e30),
        (torch.float32, 3e38),
    ],
    ids=str,
)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_out_of_range_features(two, pool, dtype, huge):
    a, b = features(24, 49, batch=6, dtype=torch.float64), features(20, 49, batch=6, dtype=torch.float64)
    a[[0, 2, 4]] *= huge / 1.1
    b[[0, 3, 4]] *= huge / 1.1
    a[4, 1:9] = 0
    a[5] = 0
    a, b = a.to(dtype), b.to(dtype) if two else None
    weight, bias = classifier(24, 20 if two else None, dtype=dtype)
    want = run(
        lambda *x: reference.bilinear_classify(*x, pool, 1e-10),
        double(a, b, weight, bias),
        torch.ones(6, 4),
    )
    got = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), torch.ones(6, 4))
    tolerance, grad_tolerance = TOLERANCES[dtype]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert all(x.isfinite().all() for x in got)
    assert deviation(got[0], want[0]) < tolerance and deviation(got[-2], want[-2]) < 2 * grad_tolerance
    assert torch.equal(got[0][5], bias) and got[1][5].eq(0).all() and got[1][4, 1:9].eq(0).all()
    for x, y in zip(got[1:-2], want[1:-2]):
        y = y.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)  # those of the tiniest are beyond float16
        for i in range(5 if huge < 3e38 else 0):  # those of the largest features are subnormal
            error = (x[i].double() - y[i]).abs().max()
            assert error <= 2 * grad_tolerance * y[i].abs().max() + 2 * smallest


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_not_finite_features_show(pool, bad, dtype):
    # Nothing on the GPU can raise without waiting for it; a GradScaler, or whoever looks at the loss, must see it.
    a = features(20, 30, dtype=dtype)
    a[1, 3, 7] = bad
    z = bilinear_pool(a, pool=pool)
    logits = bilinear_classify(a, None, *classifier(20, dtype=dtype), pool=pool)
    assert z[0].isfinite().all() and logits[0].isfinite().all()
    assert z[1].isnan().any() and logits[1].isnan().all()


def test_grad_scaler():
    # Half precision training with one dead channel and one saturated: the scaled step is the unscaled one.
    a = features(24, 49, batch=4).half()
    a[:, 3] = 0
    a[:, 4] = 6e4
    weight = torch.nn.Parameter(classifier(24)[0] * 0.01)
    scaler = torch.amp.GradScaler('cuda' if GPU else 'cpu', init_scale=2.0**14)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    a.requires_grad_()
    targets = torch.zeros(4, dtype=torch.int64)
    logits = bilinear_classify(a, None, weight.half())
    scaler.scale(F.cross_entropy(logits.float(), targets)).backward()
    assert a.grad.isfinite().all() and a.grad.ne(0).any()
    scaler.unscale_(optimizer)
    exact = weight.detach().double().requires_grad_()
    logits = reference.bilinear_classify(a.detach().double(), None, exact, None, 'avg', 1e-10)
    F.cross_entropy(logits, targets).backward()
    assert deviation(weight.grad, exact.grad) < 2**-8
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14  # no overflow was found


# --- on a real GPU only


@needs_gpu
def test_on_the_device_of_the_tensor():
    if torch.cuda.device_count() < 2:
        pytest.skip('one GPU')
    a, (weight, bias) = features(65, 49), classifier(65)
    want = run(bilinear_classify, (a, None, weight, bias), torch.ones(2, 4))
    inputs = [None if x is None else x.to('cuda:1') for x in (a, None, weight, bias)]
    got = run(bilinear_classify, inputs, torch.ones(2, 4, device='cuda:1'))
    assert all(torch.equal(x, y.to(x.device)) for x, y in zip(want, got))


@needs_gpu
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_cuda_graph(two):
    a, b = features(64, 49, dtype=torch.bfloat16), features(32, 49, dtype=torch.bfloat16) if two else None
    weight, bias = classifier(64, 32 if two else None, dtype=torch.bfloat16)
    a.requires_grad_()

    def step():
        return torch.autograd.grad(bilinear_classify(a, b, weight, bias).float().sum(), a)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    with torch.no_grad():
        a.copy_(features(64, 49, dtype=torch.bfloat16))
    graph.replay()
    assert torch.equal(grad, step())


@needs_gpu
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_compile(two):
    a, b = features(64, 7, 7, dtype=torch.bfloat16), features(32, 7, 7, dtype=torch.bfloat16) if two else None
    weight, bias = classifier(64, 32 if two else None, dtype=torch.bfloat16)
    grad = torch.ones(2, 4)
    want = run(bilinear_classify, (a, b, weight, bias), grad)
    got = run(torch.compile(bilinear_classify, fullgraph=True), (a, b, weight, bias), grad)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)


@needs_gpu
def test_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    try:
        inputs = features(512, 196, batch=8, dtype=torch.bfloat16), None, *classifier(512, dtype=torch.bfloat16)
        first, second = (run(bilinear_classify, inputs, torch.ones(8, 4)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second))
