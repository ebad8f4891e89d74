"""The fast paths as `torch.library` ops: what autograd, autocast, torch.compile and the dispatcher see of them.

    timm_bilinear::bilinear_pool        features -> unnormalised descriptors
    timm_bilinear::bilinear_classify    features, weight, bias -> logits

Both run by `cpu.py` on the CPU and by `kernels` on the GPU. `pool` and `classify` are what callers take: the same, but
where nothing looks at operators they call the device's path at once, since the dispatcher takes longer than a small
image does. With u = W^T g for a gradient g of the logits and
r = 1 / ||Y||: z.u = (logits - b).g, so the gradient of the descriptor, dY = r (u - z (z.u)), needs no reduction over D.
"""

from typing import Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._compat import has_modes, is_batched, under_transform
from . import cpu, reference
from .packing import packed_size
from .reference import compute_dtype

__all__ = ['bilinear_classify', 'bilinear_pool', 'classify', 'pool']


def _path(x: Tensor):
    if x.device.type == 'cpu':
        return cpu
    from . import kernels  # Triton is not everywhere installed, nor needed

    return kernels


_ORDINARY = (Tensor, torch.nn.Parameter)


def _is_unobserved(*tensors: Optional[Tensor]) -> bool:
    """Whether a call is for autograd alone: no compiler, mode, transform, autocast or other tensor looks at it."""
    if torch.compiler.is_compiling() or has_modes() or under_transform():
        return False
    device_type = tensors[0].device.type
    if device_type not in ('cpu', 'cuda') or torch.is_autocast_enabled(device_type):
        return False
    return all(x is None or (type(x) in _ORDINARY and not is_batched(x)) for x in tensors)


def _needs_grad(*tensors: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fake_descriptors(a: Tensor, b: Optional[Tensor], gpu_dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:
    size = packed_size(a.shape[1]) if b is None else a.shape[1] * b.shape[1]
    dtype = compute_dtype(a.dtype)
    y = a.new_empty(a.shape[0], size, dtype=dtype if a.device.type == 'cpu' else gpu_dtype)
    return y, a.new_empty(a.shape[0], dtype=dtype), a.new_empty(a.shape[0], 2, dtype=dtype)


def _with_absent(like: Tensor, *grads: Optional[Tensor]) -> Tuple[Tensor, ...]:
    """Gradients, empty ones for those that are absent: an op has a fixed number of outputs that vmap can stack."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _fake_gradients(a: Tensor, b: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    return torch.empty_like(a), None if b is None else torch.empty_like(b)


def _reference_gradients(
    run: Callable[..., Tuple[Tensor, ...]],
    inputs: Sequence[Optional[Tensor]],
    needed: Sequence[bool],
    *grads: Optional[Tensor],
) -> List[Optional[Tensor]]:
    """Gradients of those inputs that need one, by the reference, so that they can be differentiated again."""
    with torch.enable_grad():
        # views, whose gradients are apart where one tensor is two inputs
        views = [None if x is None else x.view_as(x) for x in inputs]
        outs = [(out, grad.to(out.dtype)) for out, grad in zip(run(*views), grads) if grad is not None]
    wanted = [x for x, need in zip(views, needed) if need]
    computed = iter(torch.autograd.grad([x for x, _ in outs], wanted, [g for _, g in outs], create_graph=True))
    return [next(computed) if need else None for need in needed]


def _one_by_one(op):
    """vmap rule of an op: `jacobian(vectorize=True)` and `is_grads_batched` call backward so."""

    def run(info, in_dims, *args):
        batches = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        outputs = [torch.stack(tensors) for tensors in zip(*batches)]
        return outputs, [0] * len(outputs)

    op.register_vmap(run)


def _run_pool(a: Tensor, b: Optional[Tensor], pool: str, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """See `forward` of the device's path."""
    return _path(a).forward(a, b, pool, eps)


def _run_pool_backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    a: Tensor,
    b: Optional[Tensor],
    pool: str,
    eps: float,
) -> Tuple[Tensor, Tensor]:
    """Gradients of a and b, see `backward` of the device's path; empty if there is no b."""
    grads = _path(a).backward(grad, y, scale, a, b, pool, eps)
    return _with_absent(a, grads[0], None if b is None else grads[1])


def _run_classify(
    a: Tensor,
    b: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    pool: str,
    eps: float,
    recompute: bool,
    narrow: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `classify` of the device's path.

    `recompute` keeps no descriptors for backward, which makes them again. `narrow` is the weight in the dtype of the
    features, if that is another: cast once for both ways.
    """
    return _path(a).classify(a, b, weight if narrow is None else narrow, bias, pool, eps)


def _run_classify_backward(
    grad: Tensor,
    scores: Tensor,
    y: Tensor,
    norm: Tensor,
    scale: Tensor,
    a: Tensor,
    b: Optional[Tensor],
    weight: Tensor,
    pool: str,
    eps: float,
    need_features: bool,
    need_weight: bool,
    save_memory: bool,
    weight_dtype: torch.dtype,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and weight, see `classify_backward` of the device's path; empty if not needed."""
    grads = _path(a).classify_backward(
        grad, scores, y, norm, scale, a, b, weight, pool, eps, need_features, need_weight, save_memory, weight_dtype
    )
    grad_weight = grads.pop() if need_weight else None
    grad_a, grad_b, *_ = (*grads, None, None)
    return _with_absent(a, grad_a, grad_b, grad_weight)


def _op(name: str, run: Callable):
    return torch.library.custom_op(f'timm_bilinear::{name}', run, mutates_args=(), device_types=('cpu', 'cuda'))


bilinear_pool = _op('bilinear_pool', _run_pool)
bilinear_pool_backward = _op('bilinear_pool_backward', _run_pool_backward)
bilinear_classify = _op('bilinear_classify', _run_classify)
bilinear_classify_backward = _op('bilinear_classify_backward', _run_classify_backward)
_ops = torch.ops.timm_bilinear


@bilinear_pool.register_fake
def _(a, b, pool, eps):
    return _fake_descriptors(a, b, torch.float32 if a.dtype == torch.float16 else a.dtype)


@bilinear_pool_backward.register_fake
def _(grad, y, scale, a, b, pool, eps):
    return _with_absent(a, *_fake_gradients(a, b))


def _pool_setup(ctx, inputs, output):
    a, b, ctx.pool, ctx.eps = inputs
    y, norm, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, y, norm, scale)


def _pool_backward(ctx, grad, grad_norm, _scale):
    a, b, y, norm, scale = ctx.saved_tensors
    if grad is None and grad_norm is None:
        return None, None, None, None
    if torch.is_grad_enabled():  # create_graph

        def run(a, b):
            y = reference.descriptors(a, b, ctx.pool, ctx.eps, scale)
            return y, reference.norm(y).squeeze(1)

        return *_reference_gradients(run, (a, b), ctx.needs_input_grad[:2], grad, grad_norm), None, None
    if grad_norm is not None:
        along = torch.where(norm > 1e-12, grad_norm / norm, 0.0).unsqueeze(1) * y  # clamped, the norm is a constant
        grad = along if grad is None else along.add_(grad)
    run = _run_pool_backward if _is_unobserved(a, b, grad, y) else _ops.bilinear_pool_backward
    grads = run(grad, y, scale, a, b, ctx.pool, ctx.eps)
    return grads[0], None if b is None else grads[1], None, None


@bilinear_classify.register_fake
def _(a, b, weight, bias, pool, eps, recompute, narrow):
    y, norm, scale = _fake_descriptors(a, b, a.dtype)
    logits = a.new_empty(a.shape[0], weight.shape[0])
    return logits, logits.new_empty(logits.shape, dtype=norm.dtype), y, norm, scale


@bilinear_classify_backward.register_fake
def _(grad, scores, y, norm, scale, a, b, weight, pool, eps, need_features, need_weight, save_memory, weight_dtype):
    grads = _fake_gradients(a, b) if need_features else (None, None)
    return _with_absent(a, *grads, weight.new_empty(weight.shape, dtype=weight_dtype) if need_weight else None)


def _classify_setup(ctx, inputs, output):
    a, b, weight, bias, ctx.pool, ctx.eps, ctx.recompute, narrow = inputs
    _, scores, y, norm, scale = output
    ctx.y_dtype = y.dtype
    ctx.mark_non_differentiable(scores, y, norm, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, weight, narrow, bias, scores, *(() if ctx.recompute else (y, norm, scale)))


def _classify_backward(ctx, grad, *_):
    a, b, weight, narrow, bias, scores, *descriptors = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # create_graph
        needed = ctx.needs_input_grad[:4]

        def run(*inputs):
            return (reference.bilinear_classify(*inputs, ctx.pool, ctx.eps),)

        return *_reference_gradients(run, (a, b, weight, bias), needed, grad), None, None, None, None
    if ctx.recompute:
        with torch.no_grad():
            y, *descriptors = pool(a, b, ctx.pool, ctx.eps)
        descriptors = (y.to(ctx.y_dtype), *descriptors)
    need_features, need_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
    run = _run_classify_backward if _is_unobserved(a, b, grad, scores, weight) else _ops.bilinear_classify_backward
    grads = run(
        grad,
        scores,
        *descriptors,
        a,
        b,
        weight if narrow is None else narrow,
        ctx.pool,
        ctx.eps,
        need_features,
        need_weight,
        ctx.recompute,
        weight.dtype,
    )
    grad_bias = grad.sum(0, dtype=scores.dtype).to(bias.dtype) if ctx.needs_input_grad[3] else None
    grad_a = grads[0] if need_features else None
    grad_b = grads[1] if need_features and b is not None else None
    return grad_a, grad_b, grads[2] if need_weight else None, grad_bias, None, None, None, None


def _function(name: str, run: Callable, setup: Callable, backward: Callable):
    """What `register_autograd` makes of an op, without the dispatcher."""

    def forward(ctx, *inputs):
        output = run(*inputs)
        setup(ctx, inputs, output)
        return output

    return type(name, (torch.autograd.Function,), dict(forward=staticmethod(forward), backward=staticmethod(backward)))


_PoolFunction = _function('BilinearPool', _run_pool, _pool_setup, _pool_backward)
_ClassifyFunction = _function('BilinearClassify', _run_classify, _classify_setup, _classify_backward)


def pool(a: Tensor, b: Optional[Tensor], pool: str, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """See `forward` of the device's path."""
    if not _is_unobserved(a, b):
        return _ops.bilinear_pool(a, b, pool, eps)
    run = _PoolFunction.apply if _needs_grad(a, b) else _run_pool
    return run(a, b, pool, eps)


def classify(
    a: Tensor,
    b: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    pool: str,
    eps: float,
    recompute: bool,
    narrow: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `_run_classify`."""
    args = a, b, weight, bias, pool, eps, recompute, narrow
    if not _is_unobserved(a, b, weight, bias, narrow):
        return _ops.bilinear_classify(*args)
    run = _ClassifyFunction.apply if _needs_grad(a, b, weight, bias) else _run_classify
    return run(*args)


bilinear_pool.register_autograd(_pool_backward, setup_context=_pool_setup)
bilinear_classify.register_autograd(_classify_backward, setup_context=_classify_setup)
_one_by_one(bilinear_pool_backward)
_one_by_one(bilinear_classify_backward)

# Autocast changes nothing within the ops: half-precision features are multiplied as they are, all else is float32.
_autocast = torch.library.Library('timm_bilinear', 'FRAGMENT')


def _ignore_autocast(op, device_type: str):
    def run(*args):
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    _autocast.impl(op.name(), run, f'Autocast{device_type.upper()}')


for _device_type in ('cpu', 'cuda'):
    for _op in (
        _ops.bilinear_pool,
        _ops.bilinear_pool_backward,
        _ops.bilinear_classify,
        _ops.bilinear_classify_backward,
    ):
        _ignore_autocast(_op.default, _device_type)


def _pool_flops(a, b) -> int:
    batch, channels, locations = a
    return 2 * batch * locations * (packed_size(channels) if b is None else channels * b[1])


def _gradient_flops(a, b) -> int:
    """Of the features: (dZ + dZ^T) A, or two products."""
    batch, channels, locations = a
    return 2 * batch * locations * (channels**2 if b is None else 2 * channels * b[1])


# What FlopCounterMode counts: multiplications and additions of the products, as for PyTorch's own.
@register_flop_formula(_ops.bilinear_pool)
def _(a, b, *_, **__) -> int:
    return _pool_flops(a, b)


@register_flop_formula(_ops.bilinear_pool_backward)
def _(grad, y, scale, a, b, *_, **__) -> int:
    return _gradient_flops(a, b)


@register_flop_formula(_ops.bilinear_classify)
def _(a, b, weight, *_, **__) -> int:
    return _pool_flops(a, b) + 2 * a[0] * weight[0] * weight[1]


@register_flop_formula(_ops.bilinear_classify_backward)
def _(grad, scores, y, norm, scale, a, b, weight, pool, eps, need_features, need_weight, *_, **__) -> int:
    products = 2 * a[0] * weight[0] * weight[1] * (need_features + need_weight)
    return products + (_gradient_flops(a, b) if need_features else 0)
