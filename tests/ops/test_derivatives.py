"""Every kind of derivative of the ops: by finite differences, and from one way of asking to another."""

import warnings

import pytest
import torch
from op_cases import classifier, features
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian, jvp, vjp
from torch.utils.flop_counter import FlopCounterMode

from timm_bilinear import ops
from timm_bilinear.ops import bilinear_classify, bilinear_pool, reference

pytestmark = pytest.mark.usefixtures('clean_up')


@pytest.fixture(params=ops.POOL_TYPES)
def pool(request):
    return request.param


@pytest.fixture(params=[False, True], ids=['one', 'two'])
def two(request):
    return request.param


@pytest.fixture(params=['pool', 'classify'])
def op(request, two, pool):
    """The op as a function of all its tensors, and these."""
    a, b = features(4, 3, dtype=torch.float64), features(5, 3, dtype=torch.float64)
    weight, bias = classifier(4, 5 if two else None, 3, torch.float64)
    streams = (a, b) if two else (a,)
    inputs = streams if request.param == 'pool' else (*streams, weight, bias)

    def run(*x):
        if request.param == 'pool':
            return bilinear_pool(*x, pool=pool, eps=1e-2)
        return bilinear_classify(*(x if two else (x[0], None, *x[1:])), pool=pool, eps=1e-2)

    return run, tuple(x.requires_grad_() for x in inputs)


def test_finite_differences(op):
    run, inputs = op
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


def test_jacobians_agree(op):
    run, inputs = op
    want = jacobian(run, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # vectorize is called experimental
        others = [
            jacobian(run, inputs, vectorize=True),
            jacobian(run, inputs, vectorize=True, strategy='forward-mode'),
        ]
    every = tuple(range(len(inputs)))
    others += [f(run, argnums=every)(*inputs) for f in (torch.func.jacrev, torch.func.jacfwd)]
    for got in others:
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y)


def test_directions(op):
    run, inputs = op
    tangents = tuple(map(torch.randn_like, inputs))
    want = sum((j.flatten(2) @ t.flatten() for j, t in zip(jacobian(run, inputs), tangents)))
    assert want.abs().max() > 1e-3
    out, got = torch.func.jvp(run, inputs, tangents)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(out, run(*inputs))
    torch.testing.assert_close(jvp(run, inputs, tangents)[1], want)  # by reverse mode twice
    with forward_ad.dual_level():
        dual = run(*map(forward_ad.make_dual, inputs, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want)
    cotangent = torch.randn_like(out)
    for x, y in zip(torch.func.vjp(run, *inputs)[1](cotangent), vjp(run, inputs, cotangent)[1]):
        torch.testing.assert_close(x, y)


def test_batched_gradients(op):
    run, inputs = op
    out = run(*inputs)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype)
    got = torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for x, y in zip(got, torch.autograd.grad(out, inputs, cotangent, retain_graph=True)):
            torch.testing.assert_close(x[i], y)


def test_per_image_gradients(pool):
    # As in differentially private training: of each image's loss.
    a, (weight, bias) = features(4, 3, dtype=torch.float64), classifier(4, None, 3, torch.float64)

    def loss(weight, bias, x):
        return bilinear_classify(x[None], None, weight, bias, pool=pool).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, a)
    for i, x in enumerate(a):
        want = torch.func.grad(loss, argnums=(0, 1))(weight, bias, x)
        torch.testing.assert_close([g[i] for g in got], list(want))
    weight.requires_grad_()
    want = torch.autograd.grad(sum(loss(weight, bias, x) for x in a), weight)[0]
    torch.testing.assert_close(got[0].sum(0), want)


def test_hessians_agree(two, pool):
    a, b = features(4, 3, dtype=torch.float64), features(5, 3, dtype=torch.float64) if two else None
    weight, _ = classifier(4, 5 if two else None, 3, torch.float64)

    def loss(a):
        return bilinear_classify(a, b, weight, pool=pool, eps=1e-2).square().sum()

    want = hessian(loss, a)
    torch.testing.assert_close(torch.func.hessian(loss)(a), want)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(a), want)
    torch.testing.assert_close(
        hessian(loss, a, vectorize=True, outer_jacobian_strategy='forward-mode'),
        want,
    )


def test_one_tensor_as_both_streams():
    a, weight = features(4, 3, dtype=torch.float64).requires_grad_(), classifier(4, 4, 3, torch.float64)[0]
    assert gradgradcheck(lambda a: bilinear_classify(a, a, weight, eps=1e-2), (a,))


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_penalty(dtype, recompute, pool):
    # With an image that is all zero, a dead channel, and a frozen classifier or a trained one.
    a = features(6, 5, batch=3)
    a[1] = 0
    a[2, 3] = 0
    weight, bias = classifier(6)

    def penalty(dtype, classify):
        x, w = (t.detach().clone().to(dtype).requires_grad_() for t in (a, weight))
        (grad,) = torch.autograd.grad(classify(x, w, bias.to(dtype)).sum(), x, create_graph=True)
        grad.to(torch.promote_types(dtype, torch.float32)).square().mean().backward()
        return x.grad, w.grad

    got = penalty(dtype, lambda x, w, b: bilinear_classify(x, None, w, b, pool=pool, recompute=recompute))
    want = penalty(torch.float64, lambda x, w, b: reference.bilinear_classify(x, None, w, b, pool, 1e-10))
    for x, y in zip(got, want):
        assert x.isfinite().all() and x.ne(0).any()
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.1)


def test_huge_features_twice():
    # The fast path has divided the features by a scale that the second derivative must know of.
    a = features(6, 5, dtype=torch.float64)
    scaled = (a * 2.0**65).float().requires_grad_()
    for x, pooled in ((scaled, bilinear_pool(scaled)), (a.requires_grad_(), bilinear_pool(a))):
        (grad,) = torch.autograd.grad(pooled.pow(3).sum(), x, create_graph=True)
        grad.sum().backward()
    torch.testing.assert_close(
        scaled.grad.double() * 2.0**130, a.grad, rtol=1e-3, atol=1e-3 * a.grad.abs().max().item()
    )


@pytest.mark.parametrize('transform', ['jvp', 'grad', 'vmap'])
def test_compiled_transforms(transform, pool):
    a, (weight, _) = features(4, 3), classifier(4)

    def run(x):
        return bilinear_classify(x, None, weight, pool=pool)

    def transformed(x):
        if transform == 'jvp':
            return torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]
        if transform == 'grad':
            return torch.func.grad(lambda x: run(x).square().sum())(x)
        return torch.func.vmap(lambda x: run(x[None])[0])(x)

    got = torch.compile(transformed, fullgraph=True, backend='aot_eager')(a)
    torch.testing.assert_close(got, transformed(a))


def test_transforms_leave_the_fast_path_whole(monkeypatch):
    a, (weight, _) = features(4, 3), classifier(4)
    torch.func.jvp(lambda x: bilinear_classify(x, None, weight), (a,), (a,))
    monkeypatch.setattr(reference, 'bilinear_classify', None)
    bilinear_classify(a, None, weight)


@pytest.mark.parametrize('backward', [False, True])
def test_flops(two, backward):
    a, b = features(8, 5), features(6, 5) if two else None
    weight, bias = classifier(8, 6 if two else None)
    size = weight.shape[1]
    leaves = [x.requires_grad_(backward) for x in (a, b, weight) if x is not None]
    with FlopCounterMode(display=False) as counter:
        logits = bilinear_classify(a, b, weight, bias)
        if backward:
            torch.autograd.grad(logits.sum(), leaves)
    products = 2 * 2 * 5 * size + 2 * 2 * 4 * size
    gradients = 2 * 2 * 5 * (2 * 8 * 6 if two else 8 * 8) + 2 * (2 * 2 * 4 * size)
    assert counter.get_total_flops() == products + backward * gradients
    with FlopCounterMode(display=False) as counter:
        bilinear_pool(a, b)
    assert counter.get_total_flops() == 2 * 2 * 5 * size
