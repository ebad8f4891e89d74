"""Bilinear pooling of feature maps: argument checks, and dispatch to the fastest path for the device."""

import importlib.util
import logging
from contextlib import nullcontext
from typing import Optional, Tuple

import torch

from .._compat import is_wrapper_subclass, under_forward_ad, under_transform
from . import library, reference
from .packing import fold_symmetric_weight, pack_symmetric, packed_size, unfold_symmetric_weight, unpack_symmetric

__all__ = [
    'autocast_dtype',
    'bilinear_pool',
    'bilinear_classify',
    'check_maps',
    'descriptor_size',
    'pack_symmetric',
    'unpack_symmetric',
    'fold_symmetric_weight',
    'unfold_symmetric_weight',
    'POOL_TYPES',
    'without_autocast',
]

_logger = logging.getLogger(__name__)

POOL_TYPES = ('avg', 'sum', 'max')


def descriptor_size(channels: int, channels_b: Optional[int] = None) -> int:
    """Size D of a descriptor: packed C(C + 1) / 2 for one stream, Ca * Cb for two."""
    return packed_size(channels) if channels_b is None else channels * channels_b


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """Dtype that autocast casts to, None where it is off."""
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):  # of meta tensors there is none to ask for
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str):
    """Context in which autocast is off."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


def _check_features(name: str, x: torch.Tensor):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"'{name}' must be a tensor, got {type(x).__name__}.")
    if x.dim() not in (3, 4):
        raise ValueError(f"'{name}' must be (B, C, H, W) or (B, C, N), got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"'{name}' must be floating point, got {x.dtype}.")
    if 0 in x.shape[1:]:
        raise ValueError(f"'{name}' must have channels and locations, got shape {tuple(x.shape)}.")


def _check_same(what: str, name: str, got, expected):
    if got != expected:
        raise ValueError(f"'{name}' must have the {what} of 'a', {expected}, got {got}.")


def _check_dtype(name: str, x: torch.Tensor, a: torch.Tensor):
    if x.dtype != a.dtype and autocast_dtype(a.device.type) is None:
        raise TypeError(f"'{name}' must have the dtype of 'a', {a.dtype}, got {x.dtype}.")


def check_maps(a: torch.Tensor, b: Optional[torch.Tensor]):
    """Check the features of one stream or two.

    Args:
        a: (B, Ca, H, W) or (B, Ca, N) features.
        b: Features of a second stream on the same grid, or None.

    Raises:
        TypeError: If a tensor is not floating point, or dtypes differ outside autocast.
        ValueError: If shapes or devices are wrong.
    """
    _check_features('a', a)
    if b is not None:
        _check_features('b', b)
        _check_same('device', 'b', b.device, a.device)
        _check_dtype('b', b, a)
        _check_same('batch size', 'b', b.shape[0], a.shape[0])
        _check_same('locations', 'b', tuple(b.shape[2:]), tuple(a.shape[2:]))


def _check(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    pool: str,
    eps: float,
):
    check_maps(a, b)
    size, described = packed_size(a.shape[1]), f'{a.shape[1]} channels, packed'
    if b is not None:
        size, described = a.shape[1] * b.shape[1], f'{a.shape[1]} x {b.shape[1]} channels'
    if weight is not None:
        for name, x in (('weight', weight), ('bias', bias)):
            if x is not None and not isinstance(x, torch.Tensor):
                raise TypeError(f"'{name}' must be a tensor, got {type(x).__name__}.")
            if x is not None and not x.is_floating_point():
                raise TypeError(f"'{name}' must be floating point, got {x.dtype}.")
        if weight.dim() != 2 or weight.shape[1] != size:
            raise ValueError(f"'weight' must be (K, {size}) for {described}, got shape {tuple(weight.shape)}.")
        _check_same('device', 'weight', weight.device, a.device)
        _check_dtype('weight', weight, a)
        if bias is not None:
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"'bias' must be ({weight.shape[0]},), got shape {tuple(bias.shape)}.")
            _check_same('device', 'bias', bias.device, a.device)
            _check_dtype('bias', bias, a)
    if pool not in POOL_TYPES:
        raise ValueError(f"'pool' must be one of {', '.join(map(repr, POOL_TYPES))}, got {pool!r}.")
    if not 0.0 < eps < float('inf'):
        raise ValueError(f"'eps' must be positive and finite, got {eps}.")
    if eps > 1e30:
        raise ValueError(f"'eps' must be at most 1e+30, got {eps}.")


@torch.compiler.assume_constant_result
def _has_kernels(index: int) -> bool:
    """Whether the kernels run on this GPU; if not, a debug line says why."""
    why = None
    if importlib.util.find_spec('triton') is None:
        why = 'Triton is not installed'
    elif torch.version.hip is not None:
        why = 'the kernels are not tested on ROCm'
    else:
        try:
            if torch.cuda.get_device_capability(index) < (8, 0):
                why = f'{torch.cuda.get_device_name(index)} is older than compute capability 8.0'
        except (AssertionError, RuntimeError):
            why = 'there is no such GPU, the tensors are fake'
    if why is not None:
        _logger.debug(f'Bilinear pooling takes its reference path on cuda:{index}: {why}.')
    return why is None


def _is_fast(a: torch.Tensor) -> bool:
    """Whether a fast path takes this call.

    The reference, made of PyTorch's ops alone, takes graphs that leave PyTorch, tensors that are more than one
    (DTensor), and derivatives other than the gradient: forward mode and the transforms of `torch.func`.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if under_transform() or under_forward_ad() or is_wrapper_subclass(a):
        return False
    if a.device.type == 'cuda':
        return a.dtype in (torch.float32, torch.bfloat16, torch.float16) and _has_kernels(a.device.index)
    return a.device.type == 'cpu'


# Where autocast's dtype makes products faster; elsewhere they are of float32 whatever the features are.
_NARROW_PRODUCTS = ('cuda',)


def _streams(
    a: torch.Tensor, b: Optional[torch.Tensor], autocast: Optional[torch.dtype]
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """(B, C, N) features of one dtype, which autocast may not have given them: LayerNorm, for one, returns float32."""
    dtype = a.dtype if b is None else torch.promote_types(a.dtype, b.dtype)
    if autocast is not None and dtype == torch.float32 and a.device.type in _NARROW_PRODUCTS:
        dtype = autocast

    def cast(x: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float16 and x.dtype != dtype:
            x = x.clamp(-65504.0, 65504.0)  # finite features stay so
        return x.flatten(2).to(dtype)

    return cast(a), None if b is None else cast(b)


def bilinear_pool(
    a: torch.Tensor,
    b: Optional[torch.Tensor] = None,
    *,
    pool: str = 'avg',
    eps: float = 1e-10,
) -> torch.Tensor:
    """Bilinear descriptors: outer product per location, pooled over locations, signed square root, L2 norm.

    Products and everything after them are float32 (float64 for float64 features), under autocast too; finite features
    give finite descriptors and gradients in every dtype, and an image with a nan or inf has nan in its own row alone.

    Source: https://arxiv.org/abs/1504.07889; the signed root sign(z) (sqrt(|z| + eps) - sqrt(eps)) is that of the
    authors' PyTorch release (cvl-umass/bilinear-cnn, with eps = 1e-5).

    Args:
        a: (B, Ca, H, W) or (B, Ca, N) features, floating point, any strides.
        b: (B, Cb, H, W) or (B, Cb, N) features of a second stream on the same grid, or None to pair `a` with itself.
        pool: 'avg', 'sum' or 'max' over locations.
        eps: Offset under the square root, > 0 and at most 1e30.

    Returns:
        (B, D) with rows of unit length (zero for an all-zero image), in the dtype of `a` or of autocast. Two streams:
        D = Ca * Cb, row-major. One: D = Ca (Ca + 1) / 2, packed as by `pack_symmetric`.

    Raises:
        TypeError: If a tensor is not floating point, or dtypes differ outside autocast.
        ValueError: If shapes, devices, `pool` or `eps` are wrong.
    """
    _check(a, b, None, None, pool, eps)
    autocast = autocast_dtype(a.device.type)
    dtype = autocast or a.dtype
    with without_autocast(a.device.type):
        a, b = _streams(a, b, autocast)
        if _is_fast(a):
            y, norm, _ = library.pool(a, b, pool, eps)
            return (y.to(norm.dtype) / norm.unsqueeze(1)).to(dtype)
        return reference.bilinear_pool(a, b, pool, eps).to(dtype)


def bilinear_classify(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    *,
    pool: str = 'avg',
    eps: float = 1e-10,
    recompute: bool = False,
) -> torch.Tensor:
    """Logits of a linear classifier on bilinear descriptors, `F.linear(bilinear_pool(a, b), weight, bias)`, fused.

    The L2 norm divides the logits, so the normalised descriptor is never written; backward is formed from the
    unnormalised descriptor alone.

    Args:
        a: (B, Ca, H, W) or (B, Ca, N) features, floating point, any strides.
        b: Features of a second stream on the same grid, or None to pair `a` with itself.
        weight: (K, D), D as `bilinear_pool` has it; a full (K, Ca * Ca) weight folds to a packed one by
            `fold_symmetric_weight`.
        bias: (K,) or None.
        pool: 'avg', 'sum' or 'max' over locations.
        eps: Offset under the square root, > 0 and at most 1e30.
        recompute: Keep no descriptors for backward, (B, D), and make them again there.

    Returns:
        (B, K) in the dtype of `a` or of autocast.

    Raises:
        TypeError: If a tensor is not floating point, or dtypes differ outside autocast.
        ValueError: If shapes, devices, `pool` or `eps` are wrong.
    """
    if weight is None:
        raise TypeError("'weight' must be a tensor, got NoneType.")
    _check(a, b, weight, bias, pool, eps)
    autocast = autocast_dtype(a.device.type)
    dtype = autocast or a.dtype
    with without_autocast(a.device.type):
        a, b = _streams(a, b, autocast)
        if _is_fast(a):
            is_narrow = a.dtype != weight.dtype and a.device.type in _NARROW_PRODUCTS
            narrow = weight.detach().to(a.dtype) if is_narrow else None
            logits, *_ = library.classify(a, b, weight, bias, pool, eps, recompute, narrow)
            return logits.to(dtype)
        return reference.bilinear_classify(a, b, weight, bias, pool, eps).to(dtype)
