"""Compact poolings against scikit-learn's Tensor Sketch, the paper's formulas by location, and their statistics."""

import os
import runpy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.kernel_approximation import PolynomialCountSketch

from timm_bilinear.layers import create_pooling

KINDS = ('sketch', 'maclaurin')


def sketch_of(pooling, x):
    """The projection before root and norm, of features (B, C, H, W)."""
    x = x.flatten(2)
    return pooling.sketch(torch.bmm(x, x.transpose(1, 2)) / x.shape[2])


def root_and_norm(z, eps=1e-10):
    return F.normalize(z.sign() * ((z.abs() + eps).sqrt() - eps**0.5))


def test_sketch_is_that_of_scikit_learn():
    x = torch.randn(3, 12, 4, 5, dtype=torch.float64)
    theirs = PolynomialCountSketch(gamma=1.0, degree=2, coef0=0, n_components=50, random_state=0).fit(np.zeros((1, 12)))
    pooling = create_pooling('sketch', 12, dim=50)
    for side, places, signs in zip('ab', theirs.indexHash_, theirs.bitHash_):
        pooling.get_buffer(f'hash_{side}').copy_(torch.from_numpy(places))
        pooling.get_buffer(f'sign_{side}').copy_(torch.from_numpy(signs))
    at_locations = theirs.transform(x.permute(0, 2, 3, 1).reshape(-1, 12).numpy()).reshape(3, 20, 50)
    want = torch.from_numpy(at_locations).mean(1)
    torch.testing.assert_close(sketch_of(pooling, x), want)
    torch.testing.assert_close(pooling(x), root_and_norm(want))


@pytest.mark.parametrize('channels', [(12,), (12, 7)], ids=str)
def test_sketch_by_fourier_transforms(channels):
    maps = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in channels]
    pooling = create_pooling('sketch', channels, dim=64)
    spectra = []
    for x, side in zip((maps[0], maps[-1]), 'ab'):
        places, signs = pooling.get_buffer(f'hash_{side}'), pooling.get_buffer(f'sign_{side}')
        counts = torch.zeros(2, 64, 3, 4, dtype=torch.float64)
        for c in range(x.shape[1]):
            counts[:, places[c]] += signs[c] * x[:, c]
        spectra.append(torch.fft.fft(counts, dim=1))
    want = torch.fft.ifft(spectra[0] * spectra[1], dim=1).real.mean((2, 3))
    torch.testing.assert_close(pooling(*maps), root_and_norm(want))


@pytest.mark.parametrize('channels', [(12,), (12, 7)], ids=str)
def test_maclaurin_at_every_location(channels):
    maps = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in channels]
    pooling = create_pooling('maclaurin', channels, dim=1500)
    w, v = (pooling.get_buffer(f'sign_{side}').double() for side in 'ab')
    a, b = (torch.einsum('dc,bchw->bdhw', m, x) for m, x in zip((w, v), (maps[0], maps[-1])))
    want = (a * b).mean((2, 3)) / 1500**0.5
    torch.testing.assert_close(pooling(*maps), root_and_norm(want))
    assert w.unique().tolist() == [-1, 1]


@pytest.mark.parametrize('kind', KINDS)
def test_kernel_is_that_of_outer_products_in_the_mean(kind):
    """Over seeds the inner product of two sketches has the exact kernel for its mean; its variance falls as 1 / D."""
    x = torch.randn(2, 10, 3, 3, dtype=torch.float64).relu()
    flat = x.flatten(2)
    z = torch.bmm(flat, flat.transpose(1, 2)) / 9
    want = (z[0] * z[1]).sum().item()
    variances = []
    for dim in (128, 512):
        kernels = []
        for seed in range(400):
            a, b = sketch_of(create_pooling(kind, 10, dim=dim, seed=seed), x)
            kernels.append((a * b).sum().item())
        kernels = np.array(kernels)
        assert abs(kernels.mean() - want) < 4 * kernels.std(ddof=1) / 400**0.5
        variances.append(kernels.var(ddof=1))
    assert 2.7 < variances[0] / variances[1] < 5.9  # 4, within 4 standard errors of a ratio of two variances of 400


@pytest.mark.parametrize('kind', KINDS)
def test_seeds(kind):
    x = torch.randn(2, 12, 4, 4)
    state = torch.get_rng_state()
    one, same, other = (create_pooling(kind, 12, dim=100, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert not list(one.parameters()) and set(one.state_dict()) >= {'sign_a', 'sign_b'}


@pytest.mark.skipif('HAWKEYE_REPO' not in os.environ, reason='HAWKEYE_REPO does not name a checkout of Hawkeye')
def test_hawkeyes_code(monkeypatch):
    """Of Hawkeye-FineGrained/Hawkeye, with its own hashes."""
    # the one file, without what its package imports beside it
    stubs = dict(backbone=dict(vgg16=None), registry=dict(MODEL=SimpleNamespace(register=lambda cls: cls)))
    stubs['utils'] = dict(initialize_weights=None)
    monkeypatch.setitem(sys.modules, 'model', ModuleType('model'))
    for name, content in stubs.items():
        monkeypatch.setitem(sys.modules, f'model.{name}', SimpleNamespace(**content))
    code = runpy.run_path(f'{os.environ["HAWKEYE_REPO"]}/model/methods/CBCNN.py')
    CompactBilinearPooling = code['CompactBilinearPooling']

    theirs = CompactBilinearPooling(32, 32, 512)
    pooling = create_pooling('sketch', 32, dim=512)
    for side, matrix in zip('ab', (theirs.sparse_sketch_matrix1, theirs.sparse_sketch_matrix2)):
        dense = matrix.to_dense()
        pooling.get_buffer(f'hash_{side}').copy_(dense.abs().argmax(1))
        pooling.get_buffer(f'sign_{side}').copy_(dense.sum(1))
    x = torch.randn(3, 32, 7, 7).relu()
    torch.testing.assert_close(pooling(x), theirs(x), atol=1e-4, rtol=0)
