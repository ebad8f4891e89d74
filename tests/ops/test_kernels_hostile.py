"""The GPU's kernels on features that are hostile: out of the range of products, not finite, far apart in memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from op_cases import classifier, deviation, features, rounding, run

from timm_bilinear import ops
from timm_bilinear.ops import bilinear_classify, bilinear_pool, kernels, reference
from timm_bilinear.ops.kernels.tiles import is_wide, packed_place, places, widened

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures('take_kernels')
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    (torch.float16, 6e4),
    (torch.float16, 1e-6),
    (torch.bfloat16, 1e30),
    (torch.bfloat16, 3e38),
    (torch.float32, 1e30),
    (torch.float32, 3e38),
]


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize(
    'two,pool,dtype,huge',
    [(bool((i + k) % 2), pool, *size) for i, size in enumerate(SIZES) for k, pool in enumerate(ops.POOL_TYPES)],
    ids=str,
)
def test_out_of_range_features(two, pool, dtype, huge):
    a, b = features(5, 5, batch=6, dtype=torch.float64), features(3, 5, batch=6, dtype=torch.float64)
    a[[0, 2, 4]] *= huge / 1.1
    b[[0, 3, 4]] *= huge / 1.1
    a[4, 1:3] = 0
    a[5] = 0
    a, b = a.to(dtype), b.to(dtype) if two else None
    weight, bias = classifier(5, 3 if two else None, dtype=dtype)
    inputs, grad = (a, b, weight, bias), torch.ones(6, 4)
    got = run(lambda *x: bilinear_classify(*x, pool=pool), inputs, grad)
    want, rough = (
        run(
            partial(reference.bilinear_classify, pool=pool, eps=1e-10),
            [None if x is None else x.to(t) for x in inputs],
            grad,
        )
        for t in (torch.float64, torch.float32)
    )
    assert all(x.isfinite().all() for x in got)
    for i in (0, -2):
        assert deviation(got[i], want[i]) < 20 * deviation(rough[i], want[i]) + 4 * rounding(dtype)
    assert torch.equal(got[0][5], bias) and got[1][5].eq(0).all() and got[1][4, 1:3].eq(0).all()
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for i in range(1, len(got) - 2 if huge < 3e38 else 0):  # those of the largest features are subnormal
        # gradients of the tiniest are beyond float16
        exact, *others = (x[i][:5].double().clamp(-most, most) for x in (want, got, rough))
        error, rough_error = ((x - exact).abs().amax((1, 2)) for x in others)
        largest = exact.abs().amax((1, 2))
        assert (error <= (20 * (rough_error / largest).max() + 4 * rounding(dtype)) * largest + 2 * least).all()


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_not_finite_features_show(pool, bad, dtype):
    # Nothing on the GPU can raise without waiting for it; a GradScaler, or whoever looks at the loss, must see it.
    a = features(3, 5, dtype=dtype)
    a[1, 2, 3] = bad
    z = bilinear_pool(a, pool=pool)
    logits = bilinear_classify(a, None, *classifier(3, dtype=dtype), pool=pool)
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
    assert deviation(weight.grad, exact.grad) < 2 * rounding(torch.float16)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14  # no overflow was found


# --- offsets beyond 32 bits


@pytest.fixture(scope='module')
def memory():
    """9 GiB, of which the CPU backs only what is written; places 2^32 too low are in it too, and are not the values."""
    return torch.empty(2**32 + 2**29, dtype=torch.float16, device='cuda' if GPU else 'cpu')


def spread(x, memory, strides, start):
    """x in memory, from a place in its second half, in steps of other strides."""
    out = memory.view(x.dtype).as_strided(x.shape, strides, 2**31 + start)
    return out.copy_(x)


def results(a, b, weight, grad, pool):
    logits, *kept = kernels.classify(a, b, weight, None, pool, 1e-10)
    grads = [
        kernels.classify_backward(grad, *kept, a, b, weight, pool, 1e-10, True, True, save_memory, weight.dtype)
        for save_memory in (False, True)
    ]
    return [logits, *kept, *grads[0], *grads[1]]


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize(
    'locations,strides',
    [(5, (8, 2**30, 1)), (3, (8, 1, 2**30)), (5, (2**30 + 8, 8, 1))],
    ids=['channels', 'locations', 'images'],
)
@pytest.mark.parametrize('dtype,size', [(torch.float16, 1.0), (torch.bfloat16, 1e30)], ids=['float16', 'out of range'])
@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_strides_beyond_32_bits(two, pool, dtype, size, locations, strides, memory):
    a, b = features(3, locations, batch=3), features(3, locations, batch=3)
    a[:, -1, -1], b[:, -1, -1] = 8, 16  # the largest, which scales are made of, are farthest away
    a, b = (size * a).to(dtype), (size * b).to(dtype) if two else None
    weight, _ = classifier(3, 3 if two else None, num_classes=3, dtype=dtype)
    grad = torch.randn(3, 3).to(dtype)
    want = results(a, b, weight, grad, pool)
    a, b = spread(a, memory, strides, 0), spread(b, memory, strides, 2**16) if two else None
    grad = spread(grad, memory, (8, 2**30), 2**17)
    assert all(torch.equal(x, y) for x, y in zip(results(a, b, weight, grad, pool), want))


def test_which_offsets_are_wide():
    def empty(*shape, strides=None):
        x = torch.empty(shape, device='meta')
        return x if strides is None else torch.empty_strided(shape, strides, device='meta')

    assert not is_wide(empty(512, 2048, 784), None)
    assert not is_wide(empty(1, 46340, 49), None) and is_wide(empty(1, 46341, 49), None)
    assert not is_wide(empty(1, 2**15, 1), empty(1, 2**16 - 1, 1)) and is_wide(empty(1, 2**15, 1), empty(1, 2**16, 1))
    assert is_wide(empty(1, 64, 2**25 + 1), None)
    a = empty(2, 3, 5, strides=(2**40, 2**30, 1))
    assert is_wide(a, None) and is_wide(empty(2, 3, 5), a) and is_wide(empty(2, 3, 5), None, a)
    assert not is_wide(empty(2, 3, 5, strides=(2**40, 2**30 - 3, 1)), None)


@triton.jit
def _last_places(packed_ptr, narrow_ptr, full_ptr, channels, WIDE: tl.constexpr):
    k = tl.arange(0, 16)
    row = channels - 16
    i = widened(row + k, WIDE)
    tl.store(packed_ptr + k, packed_place(i, i, channels))
    first, place = places(row + k, row + k, row, channels, channels, True)
    tl.store(narrow_ptr + k, first + place)
    first, place = places(row + k, row + k, row, channels, channels, False)
    tl.store(full_ptr + k, first + place)


@pytest.mark.parametrize('channels,wide', [(46340, False), (46341, True), (100_000, True)])
def test_places_beyond_32_bits(channels, wide):
    packed, narrow, full = torch.empty(3, 16, dtype=torch.int64)
    _last_places[(1,)](packed, narrow, full, channels, WIDE=wide)
    rows = torch.arange(channels - 16, channels)
    rest = channels - rows  # of the triangle, this row and what follows
    assert torch.equal(packed, channels * (channels + 1) // 2 - rest * (rest + 1) // 2)
    assert torch.equal(narrow, packed) and torch.equal(full, rows * (channels + 1))
