"""Poolings against the formulas of their papers, written out location by location."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_bilinear.layers import BilinearHead, create_pooling
from timm_bilinear.layers.pooling import LowRankClassifier
from timm_bilinear.layers.pooling.democratic import democratic_weights
from timm_bilinear.ops import unpack_symmetric


def signed_root(z, eps=1e-10):
    return z.sign() * ((z.abs() + eps).sqrt() - eps**0.5)


@pytest.mark.parametrize('channels', [(6,), (6, 5), (6, 5, 4)], ids=str)
def test_cross_is_products_of_projections(channels):
    maps = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in channels]
    pooling = create_pooling('cross', channels, dim=20, dtype=torch.float64)
    sources = [maps[0]] * 2 if len(maps) == 1 else maps
    projected = [F.conv2d(x, proj.weight[:, :, None, None]) for x, proj in zip(sources, pooling.proj)]
    want = []
    for i in range(len(projected)):
        for j in range(i + 1, len(projected)):
            want.append(F.normalize(signed_root((projected[i] * projected[j]).mean((2, 3)))))
    torch.testing.assert_close(pooling(torch.cat(maps, 1)), torch.cat(want, 1))
    if len(maps) == 2:
        assert torch.equal(pooling(*maps), pooling(torch.cat(maps, 1)))
    assert pooling.num_features == 20 * len(want)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('rank', [1, 2, 5])
def test_lowrank_is_a_difference_of_squares(norm, rank):
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    head = BilinearHead(6, 3, pool_type='lowrank', rank=rank, norm=norm, dtype=torch.float64)
    assert isinstance(head.fc, LowRankClassifier) and head.fc.weight.shape == (3, 6, rank)
    torch.nn.init.normal_(head.fc.bias)
    u, v = head.fc.weight[..., : (rank + 1) // 2], head.fc.weight[..., (rank + 1) // 2 :]
    want = torch.empty(2, 3, dtype=torch.float64)
    for image in range(2):
        features = x[image].flatten(1)
        length = (features @ features.T / 12).norm() if norm else 1.0
        for k in range(3):
            squares = (u[k].T @ features).square().sum() - (v[k].T @ features).square().sum()
            want[image, k] = squares / 12 / length + head.fc.bias[k]
    torch.testing.assert_close(head(x), want)
    # it is a linear classifier, whose matrices have that rank
    torch.testing.assert_close(F.linear(head(x, pre_logits=True), head.fc.packed_weight(), head.fc.bias), want)
    assert torch.linalg.matrix_rank(unpack_symmetric(head.fc.packed_weight())).tolist() == [rank] * 3


def test_lowrank_starts_as_long_as_a_linear_classifier():
    ours, linear = LowRankClassifier(100, 50, 8).packed_weight(), torch.nn.Linear(5050, 50).weight
    assert 0.8 < ours.norm(dim=1).mean() / linear.norm(dim=1).mean() < 1.25


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0])
def test_democratic_weights_balance(gamma):
    """What Sinkhorn iterations converge to: weighted similarities of a location sum to its own sum to the gamma."""
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    kernel = (x.mT @ x).square()
    weights = democratic_weights(kernel, gamma, 300)
    torch.testing.assert_close((weights * (kernel @ weights)), kernel.sum(2, keepdim=True) ** gamma)


def test_democratic_is_the_weighted_sum():
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    flat = x.flatten(2)
    kernel = (flat.mT @ flat).square()
    weights = torch.ones(2, 12, dtype=torch.float64)
    for _ in range(10):
        weights = (kernel.sum(2).sqrt() / torch.einsum('bnm,bm->bn', kernel, weights) * weights).sqrt()
    z = torch.einsum('bn,bcn,bdn->bcd', weights, flat, flat)
    row, col = torch.triu_indices(6, 6)
    want = F.normalize(signed_root(z, 1e-14)[:, row, col] * torch.where(row == col, 1.0, 2.0**0.5))
    torch.testing.assert_close(create_pooling('democratic', 6, eps=1e-14)(x), want, atol=1e-6, rtol=1e-6)


def test_democratic_of_gamma_one_is_the_sum():
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    democratic = create_pooling('democratic', 6, gamma=1.0, iterations=300)
    torch.testing.assert_close(democratic(x), create_pooling('sum', 6)(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize('channels', [(6, 8), (6,)], ids=str)
def test_moments_are_cross_covariances_of_heads(channels):
    maps = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in channels]
    pooling = create_pooling('moments', channels, dim=15, heads=3, dtype=torch.float64)
    torch.nn.init.normal_(pooling.norm.weight)
    torch.nn.init.normal_(pooling.norm.bias)
    tokens = pooling.proj(maps[0].flatten(2).mT)
    heads = [pooling.norm(tokens[..., 5 * i : 5 * i + 5]) for i in range(3)]
    first = maps[-1].mean((2, 3))
    # scikit-learn's, NumPy's and everybody's covariance: products less the product of the means, of every channel
    first = (first - first.mean(1, keepdim=True)) / (first.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    parts = [first / channels[-1] ** 0.5]  # of unit length, as those that follow
    for a, b in pairwise(heads):
        covariances = [np.cov(x.T.detach(), y.T.detach(), bias=True)[:5, 5:] for x, y in zip(a, b)]
        parts.append(F.normalize(signed_root(torch.from_numpy(np.stack(covariances))).flatten(1)))
    torch.testing.assert_close(pooling(*maps), torch.cat(parts, 1))


def test_moments_of_a_shift():
    """Centred: what is the same at every location tells nothing; the public code subtracts one number per matrix."""
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    pooling = create_pooling('moments', 6, dim=8, heads=2, dtype=torch.float64)
    pooling.norm = torch.nn.Identity()
    pooling.norm.weight, pooling.norm.bias, pooling.norm.eps = torch.ones(4), torch.zeros(4), 1e-5
    constant = x[..., :1, :1].expand_as(x)
    assert pooling(constant)[:, 6:].abs().max() < 1e-4


@pytest.mark.parametrize('pool', ['avg', 'sum', 'max'])
@pytest.mark.parametrize('power', ['sigme', 'maxexp'])
@pytest.mark.parametrize('eta', [None, 1.0, 20.0])
def test_power_normalisations(pool, power, eta):
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    flat = x.flatten(2)
    products = torch.einsum('bcn,bdn->bcdn', flat, flat)
    z = {'avg': products.mean(3), 'sum': products.sum(3), 'max': products.amax(3)}[pool]
    trace = flat.square().sum(1).amax(1) if pool == 'max' else z.diagonal(0, 1, 2).sum(1)
    p, steepness = z / trace[:, None, None], 6.0 if eta is None else eta
    if power == 'sigme':
        y = 2 / (1 + torch.exp(-steepness * p)) - 1
    else:
        y = p.sign() * (1 - (1 - p.abs()) ** steepness)
    row, col = torch.triu_indices(6, 6)
    want = F.normalize(y[:, row, col] * torch.where(row == col, 1.0, 2.0**0.5))
    pooling = create_pooling(pool, 6, power=power, eta=eta)
    torch.testing.assert_close(pooling(x), want)
    head = BilinearHead(6, 3, pool_type=pool, power=power, eta=eta, dtype=torch.float64).eval()
    torch.testing.assert_close(head(x), head.fc(want))
    torch.testing.assert_close(torch.jit.script(head)(x), head(x))
    torch.testing.assert_close(
        torch.fx.symbolic_trace(head, concrete_args=dict(pre_logits=False, x_b=None))(x, False, None), head(x)
    )
    two = create_pooling(pool, (6, 6), power=power, eta=eta)
    row, col = torch.triu_indices(6, 6)
    torch.testing.assert_close(F.normalize(y.flatten(1)), two(x, x))
    hostile = torch.cat([torch.zeros_like(x[:1]), 1e160 * x]).requires_grad_()
    pooling(hostile).sum().backward()
    assert hostile.grad.isfinite().all()
