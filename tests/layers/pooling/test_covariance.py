"""Matrix square roots against SciPy's, the papers' iterations, fast-MPN-COV's and the authors' code."""

import os

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from timm_bilinear.layers import create_pooling
from timm_bilinear.layers.pooling.covariance import matrix_root, newton_schulz


def covariance(x):
    x = x.flatten(2)
    x = x - x.mean(2, keepdim=True)
    return x @ x.mT / x.shape[2]


def bare_triangle(z):
    row, col = torch.triu_indices(z.shape[1], z.shape[1])
    return z[:, row, col]


def packed(z):
    row, col = torch.triu_indices(z.shape[1], z.shape[1])
    return z[:, row, col] * torch.where(row == col, 1.0, 2.0**0.5)


def isqrt_reference(x, iterations):
    """Algorithm 1 of the paper, image by image."""
    roots = []
    for sigma in covariance(x):
        trace, eye = sigma.trace(), torch.eye(len(sigma), dtype=sigma.dtype)
        y, z = sigma / trace, eye
        for _ in range(iterations):
            y, z = 0.5 * y @ (3 * eye - z @ y), 0.5 * (3 * eye - z @ y) @ z
        roots.append(trace.sqrt() * y)
    return torch.stack(roots)


@pytest.mark.parametrize('iterations', [1, 2, 3, 5, 9])
@pytest.mark.parametrize('locations', [4, 30])
def test_isqrt_is_the_papers(iterations, locations):
    x = torch.randn(3, 12, locations, 1, dtype=torch.float64).relu()
    want = isqrt_reference(x, iterations)
    torch.testing.assert_close(create_pooling('isqrt', 12, iterations=iterations)(x), packed(want))
    torch.testing.assert_close(
        create_pooling('isqrt', 12, iterations=iterations, isometric=False)(x), bare_triangle(want)
    )


def test_isqrt_converges_to_scipys_root():
    x = torch.randn(2, 12, 50, 1, dtype=torch.float64)
    want = torch.stack([torch.from_numpy(scipy.linalg.sqrtm(z.numpy())) for z in covariance(x)])
    errors = {}
    for iterations in (5, 7, 30):
        got = create_pooling('isqrt', 12, iterations=iterations)(x)
        errors[iterations] = ((got - packed(want)).norm() / packed(want).norm()).item()
    # what docs/poolings.md says: few iterations are a regulariser
    assert errors[5] > errors[7] > errors[30] and errors[30] < 1e-7


def test_isqrt_descriptor_is_isometric():
    x = torch.randn(2, 12, 50, 1, dtype=torch.float64)
    a, b = create_pooling('isqrt', 12)(x)
    za, zb = isqrt_reference(x, 5)
    torch.testing.assert_close((a * b).sum(), (za * zb).sum())


@pytest.mark.parametrize('locations', [5, 50])
def test_sqrtm_is_scipys(locations):
    x = torch.randn(3, 12, locations, 1, dtype=torch.float64).relu()
    flat = x.flatten(2)
    z = flat @ flat.mT / locations
    root = torch.stack([torch.from_numpy(scipy.linalg.sqrtm(m.numpy()).real) for m in z])
    torch.testing.assert_close(matrix_root(z), root, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix_root(z) @ matrix_root(z), z)
    y = packed(root.sign() * root.abs().sqrt())  # of the root of the root, the off-diagonal entries times sqrt(2)
    # SciPy's root of a singular matrix is good to 1e-8, of which the signed root makes 1e-4
    tolerance = 1e-4 if locations == 50 else 2e-3
    torch.testing.assert_close(create_pooling('sqrtm', 12)(x), F.normalize(y), atol=tolerance, rtol=0)


@pytest.mark.parametrize('locations', [5, 50])
def test_sqrtm_derivative_solves_the_lyapunov_equation(locations):
    """SciPy's solution of S X + X S = G, for full rank; singular, the gradient of features by finite differences."""
    x = torch.randn(12, locations, dtype=torch.float64)
    z = (x @ x.T / locations).requires_grad_()
    grad = torch.randn(12, 12, dtype=torch.float64)
    grad = grad + grad.T
    root = matrix_root(z[None])[0]
    (got,) = torch.autograd.grad(root, z, grad)
    if locations > 12:
        root = root.detach().numpy()
        want = scipy.linalg.solve_sylvester(root, root, grad.numpy())
        torch.testing.assert_close(got, torch.from_numpy(want))
    # steps that the root of rounding, 1e-8, is small against
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matrix_root((x @ x.T)[None]), x, eps=1e-4, atol=2e-3)


@pytest.mark.parametrize('locations', [1, 5, 11])
@pytest.mark.parametrize('live', [2, 12])
def test_sqrtm_of_few_locations(locations, live):
    """Eigenvectors of the smaller Gram matrix give the root and the derivative that those of Z give."""
    x = torch.randn(3, 12, locations, dtype=torch.float64)
    x[:, live:] = 0
    x[0, :, 1:] = x[0, :, :1]  # blank
    z = (x @ x.mT / locations).requires_grad_()
    grad = torch.randn_like(z)
    roots = [matrix_root(z, factor) for factor in (x, None)]
    torch.testing.assert_close(*roots, rtol=0, atol=1e-7)
    grads = [torch.autograd.grad(root, z, grad)[0] for root in roots]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[0].mT)


def test_sqrtm_of_images_with_few_live_channels():
    """Of three in a hundred of these MKL finds no eigenvectors: training on pictures with blank ones ended so."""
    generator = torch.Generator().manual_seed(0)
    for grid in ((7, 7), (16, 17)):
        x = torch.randn(96, 256, *grid, generator=generator).relu()
        x *= torch.rand(96, 256, 1, 1, generator=generator) ** 6 * (torch.rand(96, 1, *grid, generator=generator) < 0.4)
        live = torch.randint(5, 40, (96, 1), generator=generator)
        x *= (torch.rand(96, 256, generator=generator).argsort(1) < live)[..., None, None]
        z = create_pooling('sqrtm', 256)(x)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(96))


def test_sqrtm_of_iterations_is_the_exact_one_in_the_end():
    x = torch.randn(2, 12, 6, 6, dtype=torch.float64)
    exact = create_pooling('sqrtm', 12)
    torch.testing.assert_close(create_pooling('sqrtm', 12, iterations=40)(x), exact(x), atol=1e-6, rtol=0)
    few = create_pooling('sqrtm', 12, iterations=5)(x)
    assert (few - exact(x)).abs().max() > 1e-3


def test_second_derivatives():
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    for pooling in (create_pooling('isqrt', 6), create_pooling('sqrtm', 6, iterations=8)):
        assert torch.autograd.gradgradcheck(pooling, x, atol=1e-3)
    sqrtm = create_pooling('sqrtm', 6)
    (grad,) = torch.autograd.grad(sqrtm(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='no second derivative'):
        grad.square().sum().backward()
    x = x.detach()
    for second in (
        lambda x: torch.func.jvp(lambda y: torch.func.jvp(sqrtm, (y,), (x.detach(),))[1], (x,), (x,)),
        torch.func.hessian(lambda x: sqrtm(x).cumsum(1).sum()),
        torch.func.jacfwd(torch.func.jacfwd(lambda x: sqrtm(x).cumsum(1).sum())),
    ):
        with pytest.raises(NotImplementedError, match='no second derivative'):
            second(x)


def test_newton_schulz_of_one_iteration():
    z = torch.eye(3)[None] / 2
    torch.testing.assert_close(newton_schulz(z, 1), 1.25 * z)


@pytest.mark.skipif('MPNCOV_REPO' not in os.environ, reason='MPNCOV_REPO does not name a checkout of fast-MPN-COV')
@pytest.mark.parametrize('iterations', [1, 2, 3, 5])
def test_fast_mpncovs_code(monkeypatch, iterations):
    monkeypatch.syspath_prepend(os.environ['MPNCOV_REPO'])
    from src.representation.MPNCOV import MPNCOV

    x = torch.randn(3, 32, 7, 7, dtype=torch.float64).relu().requires_grad_()
    theirs = MPNCOV(iterNum=iterations, input_dim=32)(x).flatten(1)
    ours = create_pooling('isqrt', 32, iterations=iterations, isometric=False)(x)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    want, got = (torch.autograd.grad((z * weights).sum(), x)[0] for z in (theirs, ours))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif('UMASS_REPO' not in os.environ, reason='UMASS_REPO does not name a checkout of the authors release')
def test_the_authors_matrix_root(monkeypatch):
    monkeypatch.syspath_prepend(os.environ['UMASS_REPO'])
    from matrixSquareRoot import MatrixSquareRootFun

    x = torch.randn(3, 32, 7, 7).relu()
    flat = x.flatten(2)
    root = MatrixSquareRootFun.apply(flat @ flat.mT / 49, 7, torch.eye(32), 5)
    y = root.flatten(1)
    want = F.normalize(torch.sqrt(F.relu(y) + 1e-5) - torch.sqrt(F.relu(-y) + 1e-5)).view(3, 32, 32)
    ours = create_pooling('sqrtm', 32, iterations=7, eps=1e-5)(x)
    torch.testing.assert_close(ours, packed(want), atol=1e-4, rtol=0)
