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
