"""Batch norm over the batches of all processes, of what each has alone."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = ['global_batch_norm', 'is_local_batch_norm']


def is_local_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm over the batch of one process."""
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _global_statistics(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and biased variance of each channel (C), and the number of values it has, over all processes.

    What each process has is put together by deviations from the common mean, as Chan, Golub and LeVeque do: a
    difference of sums of squares would lose the variance of channels far from 0.
    """
    channels, count = x.shape[1], x.numel() // max(x.shape[1], 1)
    dtype = _statistics_dtype(x)
    local = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)
    if count:
        # several times as fast as var_mean on channels-last features; weights of this dtype make it that of the results
        ones = torch.ones(channels, dtype=dtype, device=x.device)
        _, mean, inverse = torch.native_batch_norm(x, ones, ones, None, None, True, 0.0, 0.0)
        variance = inverse.reciprocal().square().where(inverse > 0, inverse)  # it gives 0 for that of a constant
        local = torch.cat([mean, variance, mean.new_full((1,), count)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    of_ranks = torch.stack(gathered)
    means, variances, counts = of_ranks[:, :channels], of_ranks[:, channels:-1], of_ranks[:, -1:]
    total = int(counts.double().sum().item())
    if total <= 1:
        raise ValueError(f'A batch norm that trains wants more than 1 value per channel, got {total} in all processes.')
    shares = counts / total
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return mean, variance, total


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalisation by the statistics of all processes; gradients of weight and bias are of this process alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        mean: torch.Tensor,
        variance: torch.Tensor,
        total: int,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.total, ctx.eps = total, eps
        if not x.numel():
            return torch.empty_like(x)
        # with given statistics that is what a batch norm does in eval mode
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, weight, mean, variance = ctx.saved_tensors
        dtype = mean.dtype
        inverse = (variance + ctx.eps).rsqrt()
        shape = [1, -1] + [1] * (x.ndim - 2)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        normalised = (x.to(dtype) - mean.view(shape)).mul_(inverse.view(shape))
        grad = grad.to(dtype)
        sums = torch.stack([grad.sum(dims), (grad * normalised).sum(dims)])  # over nothing of an empty share: 0
        grad_bias, grad_weight = sums.clone()
        dist.all_reduce(sums)  # each process takes part, whatever of its own it needs
        grad_x = None
        if ctx.needs_input_grad[0]:
            mean_grad, mean_product = (sums / ctx.total).unbind()
            scale = inverse if weight is None else inverse * weight.to(dtype)
            centred = grad - mean_grad.view(shape)
            grad_x = centred.sub_(normalised.mul_(mean_product.view(shape))).mul_(scale.view(shape)).to(x.dtype)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias.to(weight.dtype if weight is not None else dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


def _batch_norm(
    input: torch.Tensor,
    running_mean: Optional[torch.Tensor],
    running_var: Optional[torch.Tensor],
    weight: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.batch_norm`, in training over the batches of all processes."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        mean, variance, total = _global_statistics(input)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance * (total / (total - 1))).to(running_var.dtype), momentum)
    return _GlobalBatchNorm.apply(input, weight, bias, mean, variance, total, eps)


class global_batch_norm(TorchFunctionMode):
    """Context in which `torch.nn.functional.batch_norm` is over the batches of all processes."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: Tuple = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        return (_batch_norm if function is F.batch_norm else function)(*args, **(kwargs or {}))
