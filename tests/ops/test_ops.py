"""The public ops: every path against the definition in float64, gradients, errors."""

import math
from functools import partial

import pytest
import torch
from op_cases import DTYPES, TOLERANCES, assert_near_float64, classifier, deviation, double, features, run
from small_models import saved_shapes
from torch.autograd import gradcheck

from timm_bilinear import ops
from timm_bilinear.ops import bilinear_classify, bilinear_pool, cpu, descriptor_size, packing, reference

# Channels of a, of b (None: a with itself) and locations; around the 128 rows of a block of the triangle too.
SHAPES = [
    (1, None, 1),
    (1, None, 49),
    (3, None, 1),
    (3, None, 196),
    (65, None, 49),
    (128, None, 1),
    (130, None, 49),
    (300, None, 5),
    (512, None, 196),
    (1, 1, 49),
    (3, 5, 1),
    (65, 3, 196),
    (65, 65, 49),
    (130, 512, 49),
]


def test_pool_types():
    assert ops.POOL_TYPES == ('avg', 'sum', 'max')
    assert descriptor_size(512) == 131328 and descriptor_size(512, 256) == 131072


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('channels,channels_b,locations', SHAPES)
def test_against_float64(channels, channels_b, locations, pool, dtype):
    if pool == 'max' and channels * (channels_b or channels) * locations > 1e7:
        pytest.skip('the pool without a fast path, at its largest')
    a = features(channels, locations, dtype=dtype)
    b = None if channels_b is None else features(channels_b, locations, dtype=dtype)
    weight, bias = classifier(channels, channels_b, dtype=dtype)
    tolerance, feature_tolerance = TOLERANCES[dtype]

    grad = torch.randn(2, 4).to(dtype)
    got = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), grad)
    want = run(lambda *x: reference.bilinear_classify(*x, pool, 1e-10), double(a, b, weight, bias), grad)
    assert {x.dtype for x in got} == {dtype}
    out, *grad_features, grad_weight, grad_bias = zip(got, want)
    # A 1 x 1 descriptor is 1 or -1 and has no gradient: there, and in small ones, compare to gradients of order 1.
    assert deviation(*out) < tolerance
    assert deviation(*grad_weight) < tolerance and deviation(*grad_bias) < tolerance
    for x in grad_features:
        assert deviation(*x, at_least=1.0) < feature_tolerance

    grad = torch.randn(2, weight.shape[1]).to(dtype)
    got = run(lambda *x: bilinear_pool(*x, pool=pool), (a, b), grad)
    want = run(lambda *x: reference.bilinear_pool(*x, pool, 1e-10), double(a, b), grad)
    assert {x.dtype for x in got} == {dtype}
    out, *grad_features = zip(got, want)
    assert deviation(*out) < tolerance
    torch.testing.assert_close(out[0].double().norm(dim=1), torch.ones(2).double(), atol=10 * tolerance, rtol=0)
    for x in grad_features:
        assert deviation(*x, at_least=1.0) < feature_tolerance


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ['avg', 'sum'])
@pytest.mark.parametrize('eps', [1e-5, 1e-2])
def test_eps_against_float64(pool, eps, two):
    # Where eps matters: zero-mean features, with products of every size down to 0.
    a, b = torch.randn(3, 70, 4, 5), torch.randn(3, 66, 4, 5) if two else None
    weight, bias = classifier(70, 66 if two else None)
    grad = torch.randn(3, 4)
    got = run(lambda *x: bilinear_classify(*x, pool=pool, eps=eps), (a, b, weight, bias), grad)
    exact = partial(reference.bilinear_classify, pool=pool, eps=eps)
    assert_near_float64(got, exact, (a, b, weight, bias), grad)
    other = bilinear_classify(a, b, weight, bias, pool=pool, eps=3 * eps)
    assert (other - got[0]).abs().max() > 1e-4  # or the test would not see eps at all


def layouts(x):
    """The same (B, C, H, W) features in other shapes and strides."""
    yield 'contiguous', x.contiguous()
    yield 'channels_last', x.contiguous(memory_format=torch.channels_last)
    yield 'flat', x.flatten(2)
    yield 'flat_transposed', x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    yield 'every_other_channel', torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1, 2)[:, ::2]
    yield 'cropped', torch.nn.functional.pad(x, (1, 2, 3, 0), value=math.nan)[:, :, 3:, 1:-2]
    yield 'batch_last', x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    yield 'offset', torch.cat([torch.full((1,), math.nan), x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_layouts(pool, two):
    a, b = features(66, 3, 5), features(65, 3, 5) if two else None
    weight, bias = classifier(66, 65 if two else None)
    grad = torch.randn(2, 4)
    want = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), grad)
    z = bilinear_pool(a, b, pool=pool)
    for (layout, a_), (_, b_) in zip(layouts(a), layouts(a if b is None else b)):
        a_ = a_.detach().requires_grad_()  # clone() would lose the strides
        b_ = b_.detach().requires_grad_() if two else None
        assert torch.equal(bilinear_pool(a_, b_, pool=pool), z), layout
        out = bilinear_classify(a_, b_, weight, bias, pool=pool)
        torch.testing.assert_close(out, want[0])
        grads = torch.autograd.grad(out, [a_] + [b_] * two, grad)
        for x, got, expected in zip((a_, b_), grads, want[1:]):
            assert got.shape == x.shape, layout
            torch.testing.assert_close(got.reshape(expected.shape), expected, msg=layout)


def test_expanded_batch():
    # Stride 0: gradients must add up over the images.
    a = features(20, 3, 3, batch=1).requires_grad_()
    weight, _ = classifier(20)
    grad = torch.randn(3, 4)
    (got,) = torch.autograd.grad(bilinear_classify(a.expand(3, -1, -1, -1), None, weight), a, grad)
    (want,) = torch.autograd.grad(bilinear_classify(a, None, weight), a, grad.sum(0, keepdim=True))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_two_streams_of_one_map_is_symmetric_unpacked(pool):
    a = features(40, 7)
    full = bilinear_pool(a, a, pool=pool).unflatten(1, (40, 40))
    torch.testing.assert_close(full, full.transpose(1, 2))
    torch.testing.assert_close(ops.unpack_symmetric(bilinear_pool(a, pool=pool)), full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_classify_is_linear_on_pool(pool, two):
    a, b = features(33, 6, 6), features(29, 6, 6) if two else None
    weight, bias = classifier(33, 29 if two else None)
    z = bilinear_pool(a, b, pool=pool)
    for bias_ in (bias, None):
        torch.testing.assert_close(
            bilinear_classify(a, b, weight, bias_, pool=pool), torch.nn.functional.linear(z, weight, bias_)
        )


@pytest.mark.parametrize('eps', [1e-3, 1e-10])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_gradcheck(pool, two, eps):
    a = features(5, 2, 3, dtype=torch.float64).requires_grad_()
    b = features(4, 2, 3, dtype=torch.float64).requires_grad_() if two else None
    weight, bias = (x.requires_grad_() for x in classifier(5, 4 if two else None, 3, torch.float64))
    assert gradcheck(lambda *x: bilinear_classify(*x, pool=pool, eps=eps), (a, b, weight, bias))
    assert gradcheck(lambda *x: bilinear_pool(*x, pool=pool, eps=eps), (a, b))


def test_gradcheck_across_blocks():
    # More channels than a block of the triangle has rows; fast mode projects, or the Jacobian would be too large.
    a = features(131, 3, batch=1, dtype=torch.float64).requires_grad_()
    weight = classifier(131, dtype=torch.float64)[0].requires_grad_()
    assert gradcheck(lambda a, w: bilinear_classify(a, None, w), (a, weight), fast_mode=True)
    assert gradcheck(bilinear_pool, (a,), fast_mode=True)


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_recompute(two):
    inputs = features(12, 5), features(10, 5) if two else None, *classifier(12, 10 if two else None)
    grad = torch.randn(2, 4)
    results, kept = [], []
    for recompute in (False, True):
        with saved_shapes() as shapes:
            results.append(run(partial(bilinear_classify, recompute=recompute), inputs, grad))
        kept.append((2, descriptor_size(12, 10 if two else None)) in shapes)
    assert all(torch.equal(x, y) for x, y in zip(*results))
    assert kept == [True, False]


@pytest.mark.parametrize('needed', ['a', 'b', 'weight', 'bias'])
@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_gradients_as_needed(pool, needed):
    inputs = dict(zip(('a', 'b', 'weight', 'bias'), (features(9, 4), features(7, 4), *classifier(9, 7))))
    grad = torch.randn(2, 4)
    names = list(inputs)
    want = run(lambda *x: bilinear_classify(*x, pool=pool), inputs.values(), grad)[1 + names.index(needed)]
    inputs[needed].requires_grad_()
    bilinear_classify(*inputs.values(), pool=pool).backward(grad)
    torch.testing.assert_close(inputs[needed].grad, want)
    assert all(inputs[name].grad is None for name in names if name != needed)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_repeatable_and_without_side_effects(two, dtype):
    inputs = (
        features(66, 9, dtype=dtype),
        features(30, 9, dtype=dtype) if two else None,
        *classifier(66, 30 if two else None, dtype=dtype),
    )
    kept = [None if x is None else x.clone() for x in inputs]
    leaves = [x for x in inputs if x is not None]
    for x in leaves:
        x.requires_grad_()
    for fn in (bilinear_classify, lambda a, b, *_: bilinear_pool(a, b)):
        out = fn(*inputs)
        grad = torch.randn_like(out)
        grad_kept, out_kept = grad.clone(), out.detach().clone()
        grads = [torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True) for _ in range(2)]
        for first, second in zip(*grads):
            assert (first is None and second is None) or torch.equal(first, second)
        assert torch.equal(fn(*inputs), out_kept) and torch.equal(out, out_kept) and torch.equal(grad, grad_kept)
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(inputs, kept))


@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_images_do_not_meet(pool):
    a = features(20, 3, 3, batch=4)
    weight, bias = classifier(20)
    together = bilinear_classify(a, None, weight, bias, pool=pool)
    one_by_one = torch.cat([bilinear_classify(x[None], None, weight, bias, pool=pool) for x in a])
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize('shape', [(0, 6, 3, 3), (0, 6, 9)])
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_empty_batch(two, pool, shape):
    inputs = torch.ones(shape), torch.ones(shape) if two else None, *classifier(6, 6 if two else None)
    logits, *grads = run(lambda *x: bilinear_classify(*x, pool=pool), inputs, torch.ones(0, 4))
    assert logits.shape == (0, 4) and grads[0].shape == shape
    assert all(grad.eq(0).all() for grad in grads)
    z, *grads = run(lambda *x: bilinear_pool(*x, pool=pool), inputs[:2], torch.ones(0, inputs[2].shape[1]))
    assert z.shape == (0, inputs[2].shape[1]) and grads[0].shape == shape


def test_training_after_inference_mode():
    # Index tables live in caches; made under inference_mode they could not be saved for backward.
    packing._on_device.cache_clear()
    cpu._block_index.cache_clear()
    weight = classifier(37)[0]
    with torch.inference_mode():
        bilinear_classify(features(37, 4), None, weight)
        ops.unpack_symmetric(torch.randn(packing.packed_size(37)))
    a = features(37, 4).requires_grad_()
    bilinear_classify(a, None, weight).sum().backward()
    assert a.grad.isfinite().all()
    v = torch.randn(packing.packed_size(37), requires_grad=True)
    ops.unpack_symmetric(v).sum().backward()
    assert v.grad.isfinite().all()


# --- the choice of a path


@pytest.mark.parametrize(
    'setting,reason',
    [
        (dict(triton=None), 'Triton is not installed'),
        (dict(hip='6.0'), 'ROCm'),
        (dict(capability=(7, 5)), 'Tesla T4 is older than compute capability 8.0'),
        ({}, None),
    ],
)
def test_gpu_without_kernels_takes_the_reference(monkeypatch, caplog, setting, reason):
    if 'triton' in setting:
        monkeypatch.setattr(ops.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(torch.version, 'hip', setting.get('hip'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: setting.get('capability', (9, 0)))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'Tesla T4')
    with caplog.at_level('DEBUG', logger='timm_bilinear'):
        assert ops._has_kernels(3) == (reason is None)
    assert (f'cuda:3: {reason}' in caplog.text) or (reason == 'ROCm' and 'ROCm' in caplog.text) or reason is None
    assert bool(caplog.text) == (reason is not None)


# --- errors

A, B = torch.ones(2, 6, 3, 3), torch.ones(2, 4, 3, 3)
W, BIAS = torch.ones(5, 21), torch.ones(5)


@pytest.mark.parametrize(
    'args,error,message',
    [
        ((None,), TypeError, r"'a' must be a tensor, got NoneType"),
        (([[1.0]],), TypeError, r"'a' must be a tensor, got list"),
        ((A[0, 0],), ValueError, r"'a' must be .*got shape \(3, 3\)"),
        ((A[None],), ValueError, r"'a' must be .*got shape \(1, 2, 6, 3, 3\)"),
        ((A.long(),), TypeError, r"'a' must be floating point, got torch\.int64"),
        ((A.bool(),), TypeError, r"'a' must be floating point, got torch\.bool"),
        ((A.to(torch.complex64),), TypeError, r"'a' must be floating point, got torch\.complex64"),
        ((A[:, :0],), ValueError, r"'a' must .*got shape \(2, 0, 3, 3\)"),
        ((A[:, :, :0],), ValueError, r"'a' must .*got shape \(2, 6, 0, 3\)"),
        ((A.flatten(2)[:, :, :0],), ValueError, r"'a' must .*got shape \(2, 6, 0\)"),
        ((A, 3.0), TypeError, r"'b' must be a tensor, got float"),
        ((A, B[0, 0]), ValueError, r"'b' must be .*got shape \(3, 3\)"),
        ((A, B.int()), TypeError, r"'b' must be floating point, got torch\.int32"),
        ((A, B[:, :0]), ValueError, r"'b' must .*got shape \(2, 0, 3, 3\)"),
        ((A, B.double()), TypeError, r"'b' must have the dtype of 'a', torch\.float32, got torch\.float64"),
        ((A, B[:1]), ValueError, r"'b' must have the batch size of 'a', 2, got 1"),
        ((A, B[:, :, :2]), ValueError, r"'b' must have the locations of 'a', \(3, 3\), got \(2, 3\)"),
        ((A[:, :, :1], B[..., :1]), ValueError, r"'b' must have the locations of 'a', \(1, 3\), got \(3, 1\)"),
        ((A, B.to('meta')), ValueError, r"'b' must have the device of 'a', cpu, got meta"),
    ],
)
def test_feature_errors(args, error, message):
    with pytest.raises(error, match=message):
        bilinear_pool(*args)
    with pytest.raises(error, match=message):
        bilinear_classify(args[0], args[1] if len(args) > 1 else None, W, BIAS)


@pytest.mark.parametrize(
    'args,error,message',
    [
        ((A, None, W[:, :-1]), ValueError, r"'weight' must be \(K, 21\) for 6 channels, packed, got shape \(5, 20\)"),
        ((A, None, torch.ones(5, 36)), ValueError, r"'weight' must be \(K, 21\) .*got shape \(5, 36\)"),
        ((A, B, W), ValueError, r"'weight' must be \(K, 24\) for 6 x 4 channels, got shape \(5, 21\)"),
        ((A, None, W[0]), ValueError, r"'weight' must be \(K, 21\) .*got shape \(21,\)"),
        ((A, None, W.double()), TypeError, r"'weight' must have the dtype of 'a', torch\.float32, got torch\.float64"),
        ((A, None, W.to('meta')), ValueError, r"'weight' must have the device of 'a', cpu, got meta"),
        ((A, None, None), TypeError, r"'weight' must be a tensor, got NoneType"),
        ((A, None, W.long()), TypeError, r"'weight' must be floating point, got torch\.int64"),
        ((A, None, W, 3.0), TypeError, r"'bias' must be a tensor, got float"),
        ((A, None, W, BIAS.bool()), TypeError, r"'bias' must be floating point, got torch\.bool"),
        ((A, None, W, BIAS[:3]), ValueError, r"'bias' must be \(5,\), got shape \(3,\)"),
        ((A, None, W, BIAS[:1]), ValueError, r"'bias' must be \(5,\), got shape \(1,\)"),
        ((A, None, W, BIAS[None]), ValueError, r"'bias' must be \(5,\), got shape \(1, 5\)"),
        (
            (A, None, W, BIAS.double()),
            TypeError,
            r"'bias' must have the dtype of 'a', torch\.float32, got torch\.float64",
        ),
        ((A, None, W, BIAS.to('meta')), ValueError, r"'bias' must have the device of 'a', cpu, got meta"),
    ],
)
def test_classifier_errors(args, error, message):
    with pytest.raises(error, match=message):
        bilinear_classify(*args)


@pytest.mark.parametrize(
    'kwargs,message',
    [
        (dict(pool='mean'), r"'pool' must be one of 'avg', 'sum', 'max', got 'mean'"),
        (dict(pool=''), r"'pool' must be one of 'avg', 'sum', 'max', got ''"),
        (dict(pool=None), r"'pool' must be one of 'avg', 'sum', 'max', got None"),
        (dict(eps=0.0), r"'eps' must be positive and finite, got 0\.0"),
        (dict(eps=-1e-10), r"'eps' must be positive and finite, got -1e-10"),
        (dict(eps=math.inf), r"'eps' must be positive and finite, got inf"),
        (dict(eps=math.nan), r"'eps' must be positive and finite, got nan"),
        (dict(eps=1e300), r"'eps' must be at most 1e\+30, got 1e\+300"),
    ],
)
def test_option_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        bilinear_pool(A, **kwargs)
    with pytest.raises(ValueError, match=message):
        bilinear_classify(A, None, W, BIAS, **kwargs)


def test_autocast_still_checks():
    with torch.autocast('cpu', torch.bfloat16):
        for x in (A.long(), A[:, :0], A[0, 0]):
            with pytest.raises((TypeError, ValueError), match="'a' must"):
                bilinear_pool(x)
        with pytest.raises(ValueError, match="'weight' must be"):
            bilinear_classify(A, None, W[:, 1:])
