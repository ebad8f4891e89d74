"""The GPU's kernels, through the public ops, against the definition in float64: on the GPU or, where there is none, in
Triton's interpreter.
"""

from functools import partial
from itertools import product

import pytest
import torch
from op_cases import assert_near_float64, classifier, features, rounding, run
from torch._subclasses import FakeTensorMode

from timm_bilinear import ops
from timm_bilinear.ops import bilinear_classify, bilinear_pool, kernels, library, reference
from timm_bilinear.ops.kernels import descriptors, gradients, tiles

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason='no GPU')
pytestmark = pytest.mark.usefixtures('take_kernels')
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Channels of a, of b (None: a with itself) and locations: one, a part of a tile of 4 x 4, a whole one, and more.
SHAPES = [
    (1, None, 1),
    (1, None, 5),
    (3, None, 1),
    (3, None, 10),
    (4, None, 4),
    (5, None, 1),
    (10, None, 5),
    (1, 1, 5),
    (1, 5, 1),
    (2, 3, 5),
    (5, 3, 9),
    (5, 6, 4),
]
# The same for the tiles of the GPU.
GPU_SHAPES = [
    (3, None, 784),
    (65, None, 1),
    (65, None, 196),
    (130, None, 70),
    (512, None, 1),
    (512, None, 784),
    (1, 65, 1),
    (65, 3, 196),
    (65, 130, 49),
]
# The interpreter runs every two of shape, pooling and dtype, not all three.
PAIRS = [
    (*shape, ops.POOL_TYPES[(i + k) % 3], dtype) for i, shape in enumerate(SHAPES) for k, dtype in enumerate(DTYPES)
]
LAYOUTS = {
    'NCHW': lambda x: x,
    'channels_last': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'slice': lambda x: torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], 1)[
        :, x.shape[1] : -x.shape[1]
    ],
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


def compare(a, b, weight, bias, pool='avg', eps=1e-10):
    grad = torch.randn(a.shape[0], len(weight)).to(a.dtype)
    inputs = a, b, weight, bias
    got = run(lambda *x: bilinear_classify(*x, pool=pool, eps=eps), inputs, grad)
    assert {x.dtype for x in got} == {a.dtype}
    # After the L2 norm little of u - z (z.u), or nothing, is left to one channel: compare to u / |a|, |a| >= 0.1.
    u = (grad.double() @ weight.double()).abs().max().item()
    at_least = [10 * u if x.dim() == 3 and x.shape[1] == 1 else 0.0 for x in got]
    assert_near_float64(got, partial(reference.bilinear_classify, pool=pool, eps=eps), inputs, grad, at_least)


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize('channels,channels_b,locations,pool,dtype', PAIRS, ids=str)
def test_against_float64(channels, channels_b, locations, pool, dtype):
    a = features(channels, locations, dtype=dtype)
    b = None if channels_b is None else features(channels_b, locations, dtype=dtype)
    compare(a, b, *classifier(channels, channels_b, dtype=dtype), pool)


@needs_gpu
@pytest.mark.parametrize('channels,channels_b,locations', SHAPES + GPU_SHAPES)
def test_full_size(channels, channels_b, locations):
    for pool, dtype in product(ops.POOL_TYPES, DTYPES):
        test_against_float64(channels, channels_b, locations, pool, dtype)


@pytest.mark.parametrize('small', [False, True], ids=['large', 'small'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_tiles_of_the_gpu(dtype, small, monkeypatch):
    monkeypatch.setattr(descriptors, '_is_small', lambda programs, device: small)
    channels = 40 if small else 130
    a, b = features(channels, 70, dtype=dtype), features(35, 70, dtype=dtype)
    compare(a, None, *classifier(channels, dtype=dtype))
    compare(a, b, *classifier(channels, 35, dtype=dtype))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_tiles_of_the_gpu_max(dtype):
    compare(features(40, 3, dtype=dtype), None, *classifier(40, dtype=dtype), 'max')


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_layouts(two, pool, dtype, layout):
    a, b = features(3, 5, dtype=dtype), features(4, 5, dtype=dtype) if two else None
    weight, bias = classifier(3, 4 if two else None, dtype=dtype)
    grad = torch.randn(2, 4)
    want = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), grad)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (a, b)]
    laid_out = [None if x is None else layout(x) for x in leaves]
    for x in laid_out:
        assert x is None or x.stride() != a.stride() or layout is LAYOUTS['NCHW']
    got = bilinear_classify(*laid_out, weight, bias, pool=pool)
    assert torch.equal(got, want[0])
    for x, y in zip(torch.autograd.grad(got, [x for x in leaves if x is not None], grad.to(dtype)), want[1:]):
        torch.testing.assert_close(x, y)  # the GEMM behind it may be another for each layout


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_pool(dtype, two, pool):
    a, b = features(3, 5, dtype=dtype), features(4, 5, dtype=dtype) if two else None
    grad = torch.randn(2, ops.descriptor_size(3, 4 if two else None)).to(dtype)
    got = run(lambda *x: bilinear_pool(*x, pool=pool), (a, b), grad)
    eye = torch.eye(grad.shape[1])
    assert_near_float64(got, lambda *x: reference.bilinear_classify(*x, eye, None, pool, 1e-10), (a, b), grad)
    torch.testing.assert_close(got[0].double().norm(dim=1), torch.ones(2).double(), atol=rounding(dtype), rtol=0)


@pytest.mark.parametrize('eps', [1e-5, 1e-2])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_eps(two, eps):
    # Where eps matters: zero-mean features, with products of every size down to 0, and slopes to match.
    a, b = torch.randn(2, 20, 30), torch.randn(2, 35, 30) if two else None
    compare(a, b, *classifier(20, 35 if two else None), eps=eps)


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize('dtype', ['tf32', torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_slopes_written_or_not(two, dtype, monkeypatch):
    if dtype == 'tf32':
        dtype = torch.float32
        monkeypatch.setattr(gradients, 'precision', lambda dtype: 'tf32')
    written, write_slopes = [], gradients.write_slopes

    def counted(*args):
        written.append(len(args[0]))
        return write_slopes(*args)

    monkeypatch.setattr(gradients, 'write_slopes', counted)
    # two images at a time, and one of which a GEMM would leave the range
    monkeypatch.setattr(gradients, '_DENSE_BYTES', 2 * 11 * (9 if two else 11) * dtype.itemsize)
    a, b = features(11, 10, batch=3, dtype=dtype), features(9, 10, batch=3, dtype=dtype) if two else None
    a[1] *= 1e4 if dtype == torch.float16 else 1e25
    inputs = a, b, *classifier(11, 9 if two else None, dtype=dtype)
    grad = torch.randn(3, 4)
    for recompute in (False, True):
        got = run(partial(bilinear_classify, recompute=recompute), inputs, grad)
        assert_near_float64(got, partial(reference.bilinear_classify, pool='avg', eps=1e-10), inputs, grad)
        assert written == [2, 1]  # with recompute none


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
    compare(a, None, weight, bias)


def test_small_half_precision_descriptors_under_a_scaled_loss():
    # Gradients of unnormalised descriptors of small norm leave float16, those of the features do not.
    a = features(4, 49).mul(0.03).half()
    grad = (3e3 * torch.randn(2, 10)).half()
    got = run(bilinear_pool, (a, None), grad)
    eye = torch.eye(10)
    assert_near_float64(got, lambda *x: reference.bilinear_classify(*x, eye, None, 'avg', 1e-10), (a, None), grad)


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
    a = torch.zeros(2, 5, 9, dtype=dtype)
    a[1, 3, 5] = 6e-8
    out = run(lambda *x: bilinear_classify(*x, eps=eps), (a, None, *classifier(5, dtype=dtype)), torch.ones(2, 4))
    assert all(x.isfinite().all() for x in out)


def test_no_bias_and_frozen_parts():
    a, (weight, _) = features(20, 30), classifier(20)
    compare(a, None, weight, None)
    grad = torch.randn(2, 4)
    _, grad_a, grad_weight = run(bilinear_classify, (a, None, weight), grad)
    assert torch.equal(run(lambda a: bilinear_classify(a, None, weight), (a,), grad)[1], grad_a)
    assert torch.equal(run(lambda weight: bilinear_classify(a, None, weight), (weight,), grad)[1], grad_weight)


def test_many_classes():
    compare(features(6, 10), None, *classifier(6, num_classes=2500))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_empty_batch(two, pool, dtype):
    a, b = features(3, 5, batch=0, dtype=dtype), features(4, 5, batch=0, dtype=dtype) if two else None
    weight, bias = classifier(3, 4 if two else None, dtype=dtype)
    logits, *grads = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), torch.ones(0, 4))
    z, *more_grads = run(lambda *x: bilinear_pool(*x, pool=pool), (a, b), torch.ones(0, weight.shape[1]))
    assert logits.shape == (0, 4) and z.shape == (0, weight.shape[1])
    inputs = [x for x in (a, b, weight, bias, a, b) if x is not None]
    assert [x.shape for x in grads + more_grads] == [x.shape for x in inputs]
    assert all(x.eq(0).all() for x in grads)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_fake_tensors_of_the_gpu(two, dtype):
    inputs = features(3, 5, dtype=dtype), features(4, 5, dtype=dtype) if two else None
    inputs += classifier(3, 4 if two else None, dtype=dtype)
    real = kernels.classify(*inputs, 'avg', 1e-10)
    with FakeTensorMode():
        fake = [x if x is None else torch.empty(x.shape, dtype=x.dtype, device='cuda') for x in inputs]
        fake = library.bilinear_classify(*fake, 'avg', 1e-10, False, None)
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_float32_under_autocast(two, dtype, monkeypatch):
    # LayerNorm gives float32 under autocast: multiplied as autocast multiplies; the weight is cast once, for both ways.
    a, b = features(5, 9), features(4, 9) if two else None
    weight, bias = classifier(5, 4 if two else None)
    grad = torch.randn(2, 4)
    device = a.device.type
    monkeypatch.setattr(ops, '_NARROW_PRODUCTS', (device,))
    casts, classify = [], kernels.classify
    monkeypatch.setattr(kernels, 'classify', lambda *x: casts.append((x[0].dtype, x[2].dtype)) or classify(*x))

    def with_autocast(*x):
        with torch.autocast(device, dtype):
            return bilinear_classify(*x)

    got = run(with_autocast, (a, b, weight, bias), grad)
    assert casts == [(dtype, dtype)]
    assert [x.dtype for x in got] == [dtype] + [torch.float32] * (len(got) - 1)
    narrow = [None if x is None else x.to(dtype) for x in (a, b, weight)]
    want = run(bilinear_classify, (*narrow, bias.to(dtype)), grad)
    for x, y in zip(got, want):
        torch.testing.assert_close(x.to(dtype), y, atol=4 * rounding(dtype), rtol=4 * rounding(dtype))
    assert with_autocast(1e6 * a, b, weight, bias).isfinite().all()


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
