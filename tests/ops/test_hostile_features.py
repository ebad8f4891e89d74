"""Features that are finite and hostile: huge, tiny, dead; and those that are not finite."""

import math

import pytest
import torch
from op_cases import DTYPES, TOLERANCES, classifier, deviation, double, features, run

from timm_bilinear import ops
from timm_bilinear.ops import bilinear_classify, bilinear_pool, cpu, reference


def exact(a, b, weight, pool):
    """Logits in float64 with none of the package's care for overflow, which float64 does not need here."""
    a = a.double()
    b_ = a if b is None else b.double()
    if pool == 'max':
        products = a.unsqueeze(2) * b_.unsqueeze(1)
        z = products.gather(3, products.argmax(3, keepdim=True)).squeeze(3)  # amax() would split gradients of ties
    else:
        z = a @ b_.transpose(1, 2) / (a.shape[2] if pool == 'avg' else 1)
    y = z.sign() * ((z.abs() + 1e-10).sqrt() - 1e-10**0.5)
    y = ops.pack_symmetric(y) if b is None else y.flatten(1)
    return y @ weight.double().t() / y.norm(dim=1, keepdim=True).clamp_min(1e-12)


HUGE = [
    (torch.float16, 6e4),
    (torch.float32, 3e38),
    (torch.float32, 1e14),
    (torch.bfloat16, 3e38),
    (torch.float64, 1e150),
]


@pytest.mark.parametrize('dtype,huge', HUGE, ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_huge_features(two, pool, dtype, huge):
    kinds = ['huge', 'ordinary', 'huge in a', 'huge in b', 'huge with dead channels', 'dead', 'huge in some channels']
    a, b = features(24, 49, batch=7, dtype=torch.float64), features(20, 49, batch=7, dtype=torch.float64)
    a[[0, 2, 4]] *= huge / 1.1
    b[[0, 3, 4]] *= huge / 1.1
    a[4, 1:9] = 0
    a[5] = 0
    a[6, ::2] *= huge / 1.1
    a, b = a.to(dtype), b.to(dtype) if two else None
    weight, _ = classifier(24, 20 if two else None, dtype=dtype)
    want = run(lambda a, b: exact(a, b, weight, pool), double(a, b), torch.ones(7, 4))
    got = run(lambda a, b: bilinear_classify(a, b, weight, pool=pool), (a, b), torch.ones(7, 4))
    tolerance = TOLERANCES[dtype][0]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for i, kind in enumerate(kinds):
        assert deviation(got[0][i], want[0][i], at_least=1e-3) < 4 * tolerance, kind
        for x, y in zip(got[1:], want[1:]):
            assert x[i].isfinite().all(), kind
            # Gradients of huge features are tiny: of subnormals only their spacing can be asked. In an image with
            # channels 38 orders apart no more can be asked than that they are finite.
            largest = y[i].abs().max().item()
            error = (x[i].double() - y[i]).abs().max().item()
            assert kind == 'huge in some channels' or error <= 10 * tolerance * largest + smallest, kind
    assert got[0][5].eq(0).all()

    z = run(lambda a, b: bilinear_pool(a, b, pool=pool), (a, b), torch.ones(7, weight.shape[1]))
    assert all(x.isfinite().all() for x in z)
    norms = torch.tensor([1.0, 1, 1, 1, 1, 0, 1]).double()
    torch.testing.assert_close(z[0].double().norm(dim=1), norms, atol=1e-2, rtol=0)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_dead_channels_and_images(two, pool, dtype):
    a, b = features(12, 49, dtype=dtype), features(10, 49, dtype=dtype) if two else None
    a[0, ::2] = 0
    a[1] = 0
    weight, bias = classifier(12, 10 if two else None, dtype=dtype)
    out, *grads = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), torch.ones(2, 4))
    assert torch.equal(out[1], bias)
    assert all(x.isfinite().all() for x in grads)
    # No gradient reaches a dead image, nor a dead channel: dZ is 0 where Z is.
    assert grads[0][1].eq(0).all() and grads[0][0, ::2].eq(0).all()
    assert not two or grads[1][1].eq(0).all()
    assert grads[0][0, 1::2].ne(0).any()
    z, *grads = run(lambda *x: bilinear_pool(*x, pool=pool), (a, b), torch.ones(2, weight.shape[1]))
    assert z[1].eq(0).all() and all(x.isfinite().all() for x in grads)
    assert grads[0][1].eq(0).all()


@pytest.mark.parametrize('value', [1e-4, 1e-6, 1e-20, 1e-38, 1e-45])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_tiny_features(pool, dtype, value):
    a = (features(12, 49) * value).to(dtype)
    weight, _ = classifier(12, dtype=dtype)
    for x in run(lambda a, w: bilinear_classify(a, None, w, pool=pool), (a, weight), torch.ones(2, 4)):
        assert x.isfinite().all()


@pytest.mark.parametrize('value', [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_tiny_half_precision_features(pool, value):
    # The gradient is of order 1 / |a|, which float16 cannot hold for the smallest: finite all the same.
    a = (features(12, 49) * value).half()
    weight, _ = classifier(12, dtype=torch.float16)
    for x in run(lambda a, w: bilinear_classify(a, None, w, pool=pool), (a, weight), torch.ones(2, 4)):
        assert x.isfinite().all()


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
@pytest.mark.parametrize('stream', [0, 1])
def test_not_finite_features_show_in_their_row(stream, pool, dtype, bad):
    # As on the GPU, and as in every model of timm: whoever looks at the loss sees it, the other images are served.
    a, b = features(6, 5, batch=3, dtype=dtype), features(4, 5, batch=3, dtype=dtype)
    whole = a.clone(), b.clone()
    (a, b)[stream][1, 2, 3] = bad
    for b_, of_whole in ((b, whole), (None, (whole[0], None))):
        if b_ is None and stream == 1:
            continue
        weight, bias = classifier(6, None if b_ is None else 4, dtype=dtype)
        pairs = [(bilinear_pool(a, b_, pool=pool), bilinear_pool(*of_whole, pool=pool))]
        logits = [bilinear_classify(*x, weight, bias, pool=pool) for x in ((a, b_), of_whole)]
        for got, want in (*pairs, logits):
            assert torch.equal(got[[0, 2]], want[[0, 2]]) and want.isfinite().all()
            assert got[1].isnan().any()
        assert logits[0][1].isnan().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_streams_far_apart(pool, dtype):
    # Each alone is out of the range of squares, their products are ordinary.
    a, b = features(12, 49, dtype=torch.float64), features(10, 49, dtype=torch.float64)
    weight, _ = classifier(12, 10, dtype=dtype)
    a, b = (a * 1e30).to(dtype), (b * 1e-30).to(dtype)
    assert deviation(bilinear_classify(a, b, weight, pool=pool), exact(a, b, weight, pool)) < 1e-5
    assert deviation(reference.bilinear_classify(a, b, weight, None, pool, 1e-10), exact(a, b, weight, pool)) < 1e-5


@pytest.mark.parametrize('huge,tiny', [(1e38, 1e-39), (3e38, 1e-42), (3e38, 3e-45), (1e30, 1e-44)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_gradients_beyond_the_dtype(pool, dtype, huge, tiny):
    # Those of the tiny stream are huge or beyond what the dtype holds, and then as large as it holds.
    a, b = features(12, 49, dtype=torch.float64), features(10, 49, dtype=torch.float64)
    a, b = (a * huge / 1.1).to(dtype), (b * tiny).to(dtype)
    weight, _ = classifier(12, 10, dtype=dtype)
    want = run(lambda *x: exact(*x, pool), double(a, b, weight), torch.ones(2, 4))
    got = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight), torch.ones(2, 4))
    # Near eps the root less that of eps has few digits in float32.
    tolerance = 4 * TOLERANCES[dtype][1] if huge * tiny > 1e-2 else 0.01
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for x, y in zip(got, want):
        assert deviation(x, y.clamp(-largest, largest), at_least=smallest) < tolerance


@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_infinite_gradients_are_told_on(pool):
    """Loss scaling looks for them."""
    a, b = features(12, 49), features(10, 49)
    grad = torch.ones(2, 120)
    grad[0, 7] = math.inf
    y, _, scale = cpu.forward(a, b, pool, 1e-10)
    grads = cpu.backward(grad, y, scale, a, b, pool, 1e-10)
    assert all(not x[0].isfinite().all() and x[1].isfinite().all() for x in grads)
