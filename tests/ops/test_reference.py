"""The definition, against loops over its formulas in float64, written here anew."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_bilinear.ops import POOL_TYPES, reference

EPS = [1e-10, 1e-5, 1e-2]


def naive_image(a, b, pool, eps):
    """Descriptor of one image by loops; a (Ca, N) and b (Cb, N) lists of lists, b None for a with itself."""
    symmetric, b = b is None, a if b is None else b
    y = []
    for i in range(len(a)):
        for j in range(i if symmetric else 0, len(b)):
            products = [x * x_ for x, x_ in zip(a[i], b[j])]
            z = max(products) if pool == 'max' else math.fsum(products) / (len(products) if pool == 'avg' else 1)
            root = math.copysign(math.sqrt(abs(z) + eps) - math.sqrt(eps), z)
            y.append(root * math.sqrt(2) if symmetric and i != j else root)
    norm = max(math.sqrt(math.fsum(x * x for x in y)), 1e-12)
    return [x / norm for x in y]


def naive(a, b, pool, eps):
    images = zip(a.double().flatten(2).tolist(), [None] * len(a) if b is None else b.double().flatten(2).tolist())
    return torch.tensor([naive_image(*image, pool, eps) for image in images], dtype=torch.float64)


@pytest.mark.parametrize('eps', EPS)
@pytest.mark.parametrize('pool', POOL_TYPES)
@pytest.mark.parametrize('channels,channels_b', [(1, None), (2, None), (7, None), (1, 1), (1, 6), (7, 5)])
@pytest.mark.parametrize('grid', [(1, 1), (3, 5)])
def test_against_loops(grid, channels, channels_b, pool, eps):
    a = torch.randn(3, channels, *grid, dtype=torch.float64)
    b = None if channels_b is None else torch.randn(3, channels_b, *grid, dtype=torch.float64)
    want = naive(a, b, pool, eps)
    torch.testing.assert_close(reference.bilinear_pool(a, b, pool, eps), want, atol=1e-12, rtol=1e-9)
    weight = torch.randn(4, want.shape[1], dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(reference.bilinear_classify(a, b, weight, bias, pool, eps), F.linear(want, weight, bias))
    torch.testing.assert_close(reference.bilinear_classify(a, b, weight, None, pool, eps), F.linear(want, weight))


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize('pool', POOL_TYPES)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_dtypes_against_loops(two, pool, dtype, tolerance):
    # float32 inside: half precision costs one rounding of the result.
    a, b = torch.rand(2, 6, 4, 4).to(dtype), torch.rand(2, 5, 4, 4).to(dtype) if two else None
    z = reference.bilinear_pool(a, b, pool, 1e-10)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), naive(a, b, pool, 1e-10), atol=tolerance, rtol=tolerance)


def test_articles_formula():
    # bmm over N, sign(x) sqrt(|x| + 1e-10), L2: the article's code, on the full matrix.
    x = torch.randn(2, 9, 4, 4, dtype=torch.float64)
    m = x.flatten(2)
    y = torch.bmm(m, m.transpose(1, 2)) / 16
    y = y.view(2, 81)
    y = F.normalize(torch.sign(y) * torch.sqrt(torch.abs(y) + 1e-10))
    got = reference.bilinear_pool(x, x, 'avg', 1e-10)
    torch.testing.assert_close(got, y, atol=1e-5, rtol=0)
    packed = reference.bilinear_pool(x, None, 'avg', 1e-10)
    torch.testing.assert_close(packed[0] @ packed[1], y[0] @ y[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize('scale', [1.0, 1e-3])
def test_authors_formula(scale):
    # sqrt(relu(z) + eps) - sqrt(relu(-z) + eps) is the same function, not a similar one.
    a, b = (scale * torch.randn(2, c, 4, 4, dtype=torch.float64) for c in (9, 5))
    z = torch.einsum('bihw,bjhw->bij', a, b).flatten(1) / 16
    want = F.normalize((F.relu(z) + 1e-5).sqrt() - (F.relu(-z) + 1e-5).sqrt())
    torch.testing.assert_close(reference.bilinear_pool(a, b, 'avg', 1e-5), want, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', POOL_TYPES)
def test_rows_are_unit_and_odd(pool, two):
    a, b = torch.randn(3, 6, 10), torch.randn(3, 5, 10)
    z = reference.bilinear_pool(a, b if two else None, pool, 1e-10)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    if two and pool != 'max':
        assert torch.equal(reference.bilinear_pool(-a, b, pool, 1e-10), -z)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('eps', [1e-10, 1e-5])
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', POOL_TYPES)
def test_zero_image(pool, two, eps, dtype):
    a = torch.randn(2, 6, 9).to(dtype)
    b = torch.randn(2, 5, 9).to(dtype) if two else None
    a[0] = 0
    a.requires_grad_()
    z = reference.bilinear_pool(a, b, pool, eps)
    assert z[0].eq(0).all() and z[1].ne(0).any()
    z.sum().backward()
    assert a.grad.isfinite().all() and a.grad[0].eq(0).all() and a.grad[1].ne(0).any()


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', POOL_TYPES)
def test_differentiable_twice(pool, two):
    a = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True) if two else None
    inputs = (a, b) if two else (a,)

    def fn(a, b=None):
        return reference.bilinear_pool(a, b, pool, 1e-2)

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


def test_max_gradient_goes_to_the_largest():
    # One location wins each pair; the others get nothing.
    a = torch.tensor([[[1.0, 3.0, 2.0]]], requires_grad=True)
    b = torch.tensor([[[1.0, 1.0, 5.0], [1.0, -4.0, 0.0]]], requires_grad=True)
    z, _ = reference._unnormalised(a, b, 'max', 1e-10)
    torch.testing.assert_close(z, torch.tensor([[10.0**0.5, 1.0]]), atol=1e-4, rtol=0)
    z.square().sum().backward()  # 10 + 1 = a_2 b_02 + a_0 b_10
    torch.testing.assert_close(a.grad, torch.tensor([[[1.0, 0.0, 5.0]]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(b.grad, torch.tensor([[[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]]), atol=1e-3, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor any operator returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # What is really there: an expanded view has the elements of its storage.
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_max_never_holds_all_products(two):
    batch, channels, locations = 4, 256, 49
    everything = batch * channels * channels * locations
    a = torch.randn(batch, channels, locations, requires_grad=True)
    b = torch.randn(batch, channels, locations, requires_grad=True) if two else None
    with LargestTensor() as largest:
        reference.bilinear_pool(a, b, 'max', 1e-10).square().sum().backward()
        # A block of products is bounded (16 MiB in float32), whatever the size.
        assert largest.numel <= 4_194_304 < everything / 3
    # The meter does see a tensor of all products.
    with LargestTensor() as largest:
        (a.unsqueeze(2) * a.unsqueeze(1)).amax(3)
        assert largest.numel == everything


def test_max_in_blocks():
    # More products than a block holds: rows must come out in their order.
    a, b = torch.randn(2, 300, 64), torch.randn(2, 150, 64)
    assert a.shape[1] > 4_194_304 // (2 * 150 * 64)
    got = reference.products(a, b, 'max')
    want = torch.stack([(a[:, i, None] * b).amax(2) for i in range(300)], 1)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_scriptable():
    fn = torch.jit.script(reference.bilinear_pool)
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)
    for pool in POOL_TYPES:
        for b_ in (b, None):
            torch.testing.assert_close(fn(a, b_, pool, 1e-5), reference.bilinear_pool(a, b_, pool, 1e-5))


@pytest.mark.parametrize(
    'dtype,compute',
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_compute_dtype(dtype, compute):
    assert reference.compute_dtype(dtype) == compute
