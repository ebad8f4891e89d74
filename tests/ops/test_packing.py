"""Packing is an isometry, and folding a classifier changes nothing, not even training."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from timm_bilinear.ops import fold_symmetric_weight, pack_symmetric, unfold_symmetric_weight, unpack_symmetric
from timm_bilinear.ops.packing import matrix_size, packed_size, triangle_indices

CHANNELS = [1, 2, 3, 17, 130]
SHAPES = [(), (1,), (4,), (2, 3)]
# One rounding by sqrt(2) each way.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def symmetric(*shape, dtype=torch.float64):
    m = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return (m + m.transpose(-1, -2)).to(dtype)


@pytest.mark.parametrize('channels,size', [(1, 1), (2, 3), (3, 6), (512, 131328), (2048, 2098176)])
def test_sizes(channels, size):
    assert packed_size(channels) == size
    assert matrix_size(size) == channels


@pytest.mark.parametrize('size', [0, 2, 4, 5, 131327, 131329])
def test_matrix_size_error(size):
    with pytest.raises(ValueError, match=rf'C\(C \+ 1\) / 2.*got {size}'):
        matrix_size(size)


def test_matrix_size_of_all():
    sizes = {packed_size(c) for c in range(1, 60)}
    for size in range(1, max(sizes) + 1):
        if size in sizes:
            assert packed_size(matrix_size(size)) == size
        else:
            with pytest.raises(ValueError):
                matrix_size(size)


@pytest.mark.parametrize('channels', CHANNELS)
def test_triangle_indices(channels):
    flat, place, diagonal = triangle_indices(channels, torch.device('cpu'))
    k = 0
    for i in range(channels):  # row-major upper triangle
        for j in range(i, channels):
            assert flat[k] == i * channels + j
            assert place[i * channels + j] == place[j * channels + i] == k
            k += 1
        assert flat[diagonal[i]] == i * channels + i
    assert flat.numel() == k == packed_size(channels)


def test_fake_tensors_are_not_kept():
    # A model that is first traced with fake tensors must still run with real ones, and the other way round.
    m, w = symmetric(2, 23), torch.randn(3, 23 * 23)
    with FakeTensorMode():
        fake = torch.empty(2, 23, 23)
        assert unpack_symmetric(pack_symmetric(fake)).shape == (2, 23, 23)
        assert fold_symmetric_weight(torch.empty(3, 23 * 23)).shape == (3, packed_size(23))
    torch.testing.assert_close(unpack_symmetric(pack_symmetric(m)), m)
    assert type(fold_symmetric_weight(w)) is torch.Tensor
    with FakeTensorMode():
        assert unfold_symmetric_weight(torch.empty(3, packed_size(23))).shape == (3, 23 * 23)


def test_transforms():
    m = symmetric(2, 24)
    torch.testing.assert_close(torch.func.vmap(pack_symmetric)(m), pack_symmetric(m))
    torch.testing.assert_close(torch.func.grad(lambda m: pack_symmetric(m).square().sum() / 2)(m[0]).triu(1),
                               2 * m[0].triu(1))  # fmt: skip
    torch.testing.assert_close(unpack_symmetric(pack_symmetric(m)), m)


def test_pack_by_hand():
    m = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    r = 2**0.5
    torch.testing.assert_close(pack_symmetric(m), torch.tensor([1.0, 2 * r, 3 * r, 4.0, 5 * r, 6.0]))
    # Only the upper triangle is read.
    assert torch.equal(pack_symmetric(m.triu()), pack_symmetric(m))


def test_fold_by_hand():
    w = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).flatten()
    torch.testing.assert_close(fold_symmetric_weight(w), torch.tensor([1.0, 6 / 2**0.5, 8.0]))
    torch.testing.assert_close(unfold_symmetric_weight(fold_symmetric_weight(w)), torch.tensor([1.0, 3.0, 3.0, 8.0]))


@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('shape', SHAPES)
def test_isometry(shape, channels):
    m, n = symmetric(*shape, channels), symmetric(*shape, channels)
    p, q = pack_symmetric(m), pack_symmetric(n)
    assert p.shape == (*shape, packed_size(channels))
    torch.testing.assert_close((p * q).sum(-1), (m * n).sum((-1, -2)))
    torch.testing.assert_close(p.norm(dim=-1), torch.linalg.matrix_norm(m))


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('shape', SHAPES)
def test_inverse(shape, channels, dtype):
    tolerance = dict(atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    m = symmetric(*shape, channels, dtype=dtype)
    v = pack_symmetric(m)
    back = unpack_symmetric(v)
    assert v.dtype == back.dtype == dtype and back.shape == m.shape
    assert torch.equal(back, back.transpose(-1, -2))
    torch.testing.assert_close(back, m, **tolerance)
    torch.testing.assert_close(pack_symmetric(back), v, **tolerance)
    # A packed weight survives the way to a full one and back.
    full = unfold_symmetric_weight(v)
    assert full.shape == (*shape, channels**2) and full.dtype == dtype
    torch.testing.assert_close(fold_symmetric_weight(full), v, **tolerance)


@pytest.mark.parametrize('channels', CHANNELS)
def test_fold_keeps_logits(channels):
    # Of any full weight: its antisymmetric part never met the descriptor.
    m = symmetric(4, channels)
    full = torch.randn(5, channels**2, dtype=torch.float64)
    want = F.linear(m.flatten(1), full)
    folded = fold_symmetric_weight(full)
    assert folded.shape == (5, packed_size(channels))
    torch.testing.assert_close(F.linear(pack_symmetric(m), folded), want)
    torch.testing.assert_close(F.linear(m.flatten(1), unfold_symmetric_weight(folded)), want)


def test_gradients():
    m, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3), (2, 6)))
    w = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    for fn, x in ((pack_symmetric, m), (unpack_symmetric, v), (fold_symmetric_weight, w), (unfold_symmetric_weight, v)):
        assert torch.autograd.gradcheck(fn, (x,))


@pytest.mark.parametrize('momentum,weight_decay', [(0.0, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_sgd_takes_the_same_path(momentum, weight_decay):
    # Where a full classifier and its packed one are trained alike they stay the same classifier.
    channels, classes = 6, 4
    full = torch.randn(classes, channels**2, dtype=torch.float64, requires_grad=True)
    packed = fold_symmetric_weight(full.detach()).requires_grad_()
    optimizers = [torch.optim.SGD([w], lr=0.5, momentum=momentum, weight_decay=weight_decay) for w in (full, packed)]
    start = packed.detach().clone()
    for _ in range(20):
        m = symmetric(8, channels)
        m = m / torch.linalg.matrix_norm(m, keepdim=True)
        labels = torch.randint(classes, (8,))
        logits = F.linear(m.flatten(1), full), F.linear(pack_symmetric(m), packed)
        torch.testing.assert_close(*logits)
        for x, optimizer in zip(logits, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(x, labels).backward()
            optimizer.step()
    torch.testing.assert_close(fold_symmetric_weight(full.detach()), packed.detach())
    assert (packed - start).norm() > 0.1 * start.norm()


@pytest.mark.parametrize(
    'fn,shape,message',
    [
        (pack_symmetric, (3,), r"'m' must be \(\.\.\., C, C\), got shape \(3,\)"),
        (pack_symmetric, (2, 3), r"'m' must be .*got shape \(2, 3\)"),
        (pack_symmetric, (4, 3, 2), r"'m' must be .*got shape \(4, 3, 2\)"),
        (unpack_symmetric, (2, 4), r'C\(C \+ 1\) / 2.*got 4'),
        (unpack_symmetric, (2, 0), r'C\(C \+ 1\) / 2.*got 0'),
        (unfold_symmetric_weight, (5, 9), r'C\(C \+ 1\) / 2.*got 9'),
        (fold_symmetric_weight, (5, 6), r"'w' must be C \* C.*got shape \(5, 6\)"),
        (fold_symmetric_weight, (5, 0), r"'w' must be C \* C.*got shape \(5, 0\)"),
    ],
)
def test_errors(fn, shape, message):
    with pytest.raises(ValueError, match=message):
        fn(torch.zeros(shape))
