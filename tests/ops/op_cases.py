"""Inputs of the ops, and the comparison of their results with those in float64."""

import torch

from timm_bilinear.ops import descriptor_size

# Largest deviation from float64, relative to the largest entry: output and weight gradients, feature gradients.
# Half precision is computed in float32, so what remains is one rounding of the result.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 2**-8),
    torch.float16: (2**-11, 2**-11),
    torch.float64: (1e-12, 1e-12),
}
DTYPES = list(TOLERANCES)


def features(channels, *rest, batch=2, dtype=torch.float32):
    """Features whose products have both signs and do not cancel over locations.

    The slope of the root is 1 / (2 sqrt(eps)) near Z = 0, so gradients of entries that cancel are ill-conditioned, in
    any implementation.
    """
    sign = torch.randint(0, 2, (channels,) + (1,) * len(rest)) * 2 - 1
    return (sign * (0.1 + torch.rand(batch, channels, *rest))).to(dtype)


def classifier(channels, channels_b=None, num_classes=4, dtype=torch.float32):
    return torch.randn(num_classes, descriptor_size(channels, channels_b)).to(dtype), torch.randn(num_classes).to(dtype)


def run(fn, inputs, grad):
    """Output, then gradients of the inputs that are there."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x is not None], grad.to(out.dtype))]


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def deviation(got, want, at_least=0.0):
    assert got.shape == want.shape
    assert got.isfinite().all()
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(at_least)).item()


def float32_errors(fn, inputs, grad, want, at_least, orders=8):
    """Largest deviations from float64 of fn's results and gradients when it runs in float32.

    Every order of the locations rounds the sums in another way, so that no lucky one decides.
    """
    a, b, *parameters = [None if x is None else x.float() for x in inputs]
    errors = [0.0] * len(want)
    for _ in range(orders):
        order = torch.randperm(a.shape[-1])

        def reordered(a, b, *parameters, order=order):
            return fn(a[..., order], None if b is None else b[..., order], *parameters)

        got = run(reordered, (a, b, *parameters), grad.float())
        errors = [max(error, deviation(*x)) for error, x in zip(errors, zip(got, want, at_least))]
    return errors


def rounding(dtype):
    """What storing in a dtype may add to a result, of which half precision is stored more than once on the way."""
    return (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps


def assert_near_float64(got, fn, inputs, grad, at_least=None):
    """The output of an op and gradients of its inputs, as `run` has them, against fn in float64.

    They may be twenty times as wrong as fn in float32, which holds on every processor, and rounded to their dtype; what
    gradients are made of, descriptors and products with the weight, is rounded to it too.
    """
    at_least = at_least or [0.0] * len(got)
    want = run(fn, double(*inputs), grad)
    errors = float32_errors(fn, inputs, grad, want, at_least)
    for i, (x, y, error, least) in enumerate(zip(got, want, errors, at_least)):
        limit = 20 * error + rounding(x.dtype) * (1 if i == 0 else 2)
        assert deviation(x, y, least) < limit, f'result {i}'
