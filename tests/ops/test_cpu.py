"""What is the CPU path's own: groups of images, blocks of the maximum, memory."""

import mmap

import pytest
import torch
from op_cases import classifier, features, run

from timm_bilinear.ops import bilinear_classify, cpu, maximum, memory, reference


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ['avg', 'sum', 'max'])
def test_groups(pool, two, monkeypatch):
    a, b = torch.randn(5, 20, 7), torch.randn(5, 12, 7) if two else None
    a[2] *= 1e30  # of another scale, and so by itself
    weight, bias = classifier(20, 12 if two else None)
    grad = torch.randn(5, 4)
    whole = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), grad)
    monkeypatch.setattr(cpu, '_GROUP', 500)  # two images
    parts = run(lambda *x: bilinear_classify(*x, pool=pool), (a, b, weight, bias), grad)
    for x, y in zip(whole, parts):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize('channels_b', [None, 1, 9])
def test_maximum_blocks(channels_b, monkeypatch):
    a, b = torch.randn(3, 10, 6), None if channels_b is None else torch.randn(3, channels_b, 6)
    for columns, entries in ((128, 2**20), (4, 50), (4, 6), (3, 1000)):
        monkeypatch.setattr(maximum, '_COLUMNS', columns)
        monkeypatch.setattr(maximum, '_ENTRIES', entries)
        z, where = maximum.products(a, b)
        each = a.unsqueeze(2) * (a if b is None else b).unsqueeze(1)
        assert torch.equal(z, each.amax(3)) and torch.equal(where, each.argmax(3))
        values, nothing = maximum.products(a, b, need_places=False)
        assert torch.equal(values, z) and nothing is None


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_first_of_equal_products(two):
    a = torch.randint(1, 3, (2, 6, 20)).float()
    inputs = (a, torch.randint(1, 3, (2, 5, 20)).float() if two else None)
    weight, bias = classifier(6, 5 if two else None)
    grad = torch.randn(2, 4)
    got = run(lambda *x: bilinear_classify(*x, pool='max'), (*inputs, weight, bias), grad)
    want = run(lambda *x: reference.bilinear_classify(*x, 'max', 1e-10), (*inputs, weight, bias), grad)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


def test_nan_is_the_maximum():
    a = features(5, 8)
    a[0, 1, 3] = torch.nan
    for need_places in (False, True):
        z, _ = maximum.products(a, None, need_places)
        assert z[0, 1].isnan().all() and z[1].isfinite().all()


@pytest.fixture
def always_huge(monkeypatch):
    monkeypatch.setattr(memory, '_LARGE', 2**20)


def test_which_memory_is_mapped():
    """What malloc maps anew each time has a mapping of its own; the rest comes from malloc, to be used again."""
    # 28 and 36 MiB; taken out of the assertion, which else would print them
    small, large = (memory.empty((n, 2**20), torch.float32).untyped_storage().resizable() for n in (7, 9))
    assert small and large == (memory._ADVICE is None)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory(dtype, always_huge):
    large = memory.empty((64, 512, 128), dtype)
    assert large.shape == (64, 512, 128) and large.dtype == dtype and large.is_contiguous()
    assert large.fill_(3).eq(3).all() and large.data_ptr() % 64 == 0
    x = large.detach()
    for like in (x, x.transpose(1, 2), x.permute(2, 0, 1), x[:, ::2], x[:1].expand(64, 512, 128), x[:2, :3]):
        got, want = memory.empty_like(like), torch.empty_like(like)
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
        got.fill_(1)


def test_memory_without_huge_pages(monkeypatch, always_huge):
    def refuse(*_, **__):
        raise OSError

    for name, value in (('_ADVICE', None), ('mmap', type('mmap', (), {**vars(mmap), 'mmap': refuse}))):
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, value)
            assert memory.empty((64, 512, 128), torch.float32).shape == (64, 512, 128)


def test_gradients_can_be_used_as_any(always_huge):
    # Large ones lie in memory of another kind: saved, pickled, shared, and added to.
    a = torch.randn(16, 128, 14, 14, requires_grad=True)
    weight = torch.randn(200, 128 * 129 // 2, requires_grad=True)
    for _ in range(2):
        bilinear_classify(a, None, weight).sum().backward()
    assert weight.grad.nbytes > memory._LARGE
    once, *_ = torch.autograd.grad(bilinear_classify(a, None, weight).sum(), weight)
    torch.testing.assert_close(weight.grad, 2 * once)
    assert torch.equal(once.clone().share_memory_(), once)
    torch.optim.SGD([weight], lr=0.1, momentum=0.9).step()
    assert torch.equal(torch.frombuffer(once.numpy().tobytes(), dtype=torch.float32), once.flatten())
