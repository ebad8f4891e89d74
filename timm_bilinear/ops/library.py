"""The fast paths as `torch.library` ops: what autograd, torch.compile and AMP see of them.

    timm_bilinear::bilinear_pool        features -> unnormalised descriptors
    timm_bilinear::bilinear_classify    features, weight -> scores (logits before the bias)

With u = W^T g for a gradient g of the scores and r = 1 / ||Y||: z.u = scores.g, so the gradient of the descriptor,
dY = r (u - z (z.u)), needs no reduction over D.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from . import cpu
from .packing import packed_size
from .reference import compute_dtype

__all__ = ['bilinear_pool', 'bilinear_classify']


@torch.library.custom_op('timm_bilinear::bilinear_pool', mutates_args=(), device_types='cpu')
def bilinear_pool(a: Tensor, b: Optional[Tensor], average: bool, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """See `cpu.forward`."""
    return cpu.forward(a, b, average, eps)


@bilinear_pool.register_fake
def _(a, b, average, eps):
    size = packed_size(a.shape[1]) if b is None else a.shape[1] * b.shape[1]
    y = a.new_empty(a.shape[0], size, dtype=compute_dtype(a.dtype))
    return y, y.new_empty(a.shape[0]), y.new_empty(a.shape[0], 2)


@torch.library.custom_op('timm_bilinear::bilinear_pool_backward', mutates_args=(), device_types='cpu')
def bilinear_pool_backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    a: Tensor,
    b: Optional[Tensor],
    average: bool,
    eps: float,
) -> List[Tensor]:
    """See `cpu.backward`."""
    return cpu.backward(grad, y, scale, a, b, average, eps)


@bilinear_pool_backward.register_fake
def _(grad, y, scale, a, b, average, eps):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b) if x is not None]


def _pool_setup(ctx, inputs, output):
    a, b, ctx.average, ctx.eps = inputs
    y, norm, scale = output
    ctx.mark_non_differentiable(norm, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, y, scale)


def _pool_backward(ctx, grad, _norm, _scale):
    a, b, y, scale = ctx.saved_tensors
    if grad is None:
        return None, None, None, None
    grads = torch.ops.timm_bilinear.bilinear_pool_backward(grad, y, scale, a, b, ctx.average, ctx.eps)
    return grads[0], None if b is None else grads[1], None, None


bilinear_pool.register_autograd(_pool_backward, setup_context=_pool_setup)


@torch.library.custom_op('timm_bilinear::bilinear_classify', mutates_args=(), device_types='cpu')
def bilinear_classify(
    a: Tensor,
    b: Optional[Tensor],
    weight: Tensor,
    average: bool,
    eps: float,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (B, K) in the compute dtype, then what `cpu.forward` returns."""
    y, norm, scale = cpu.forward(a, b, average, eps)
    # The weight is by far the larger operand, and fastest where oneDNN takes it as the input.
    scores = cpu.linear(weight.to(y.dtype), y).t().div(norm.unsqueeze(1))
    return scores.contiguous(), y, norm, scale


@bilinear_classify.register_fake
def _(a, b, weight, average, eps):
    size = weight.shape[1]
    y = a.new_empty(a.shape[0], size, dtype=compute_dtype(a.dtype))
    return y.new_empty(a.shape[0], weight.shape[0]), y, y.new_empty(a.shape[0]), y.new_empty(a.shape[0], 2)


@torch.library.custom_op('timm_bilinear::bilinear_classify_backward', mutates_args=(), device_types='cpu')
def bilinear_classify_backward(
    grad: Tensor,
    scores: Tensor,
    y: Tensor,
    norm: Tensor,
    scale: Tensor,
    a: Tensor,
    b: Optional[Tensor],
    weight: Tensor,
    average: bool,
    eps: float,
    need_features: bool,
    need_weight: bool,
) -> List[Tensor]:
    """Gradients of the features (as many as there are) if needed, then of the weight if needed."""
    grads = []
    grad_by_norm = grad / norm.unsqueeze(1)
    if need_features:
        grad_y = cpu.linear(grad_by_norm, weight.to(y.dtype).t())
        # The norm's part; where the norm was clamped it is a constant.
        along = torch.where(norm > 1e-12, (grad_by_norm * scores).sum(1) / norm, 0.0)
        for i, alpha in enumerate(along.tolist()):
            grad_y[i].sub_(y[i], alpha=alpha)
        grads += cpu.backward(grad_y, y, scale, a, b, average, eps)
        del grad_y
    if need_weight:
        grads.append(torch.mm(grad_by_norm.t(), y).to(weight.dtype))
    return grads


@bilinear_classify_backward.register_fake
def _(grad, scores, y, norm, scale, a, b, weight, average, eps, need_features, need_weight):
    grads = [a, b] * need_features + [weight] * need_weight
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads if x is not None]


def _classify_setup(ctx, inputs, output):
    a, b, weight, ctx.average, ctx.eps = inputs
    scores, y, norm, scale = output
    ctx.mark_non_differentiable(y, norm, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, y, norm, scale, a, b, weight)


def _classify_backward(ctx, grad, _y, _norm, _scale):
    need_features, need_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
    if grad is None:
        return None, None, None, None, None
    grads = torch.ops.timm_bilinear.bilinear_classify_backward(
        grad, *ctx.saved_tensors, ctx.average, ctx.eps, need_features, need_weight
    )
    grad_weight = grads.pop() if need_weight else None
    grad_a = grads[0] if need_features else None
    grad_b = grads[1] if len(grads) > 1 else None
    return grad_a, grad_b, grad_weight, None, None


bilinear_classify.register_autograd(_classify_backward, setup_context=_classify_setup)
