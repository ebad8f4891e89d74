"""The GPU path: Triton kernels from features to unnormalised packed descriptors, and back.

    forward     one program per (image, tile of channel pairs), symmetric: tiles on or above the diagonal alone
                Z = A Bf^T / N on tensor cores, or the running maximum of 'max' pooling
                Y = Z / (sqrt(|Z| + eps) + sqrt(eps)), which is sign(Z) (sqrt(|Z| + eps) - sqrt(eps)) without its
                cancellation; packed; the tile's sum of squares goes to a table that another kernel, one program per
                image, adds up
    classify    scores = W Y by the vendor's GEMM, divided by the norm by a third kernel
    backward    dZ from u = W^T g and Y, unpacked; dA = dZ Bf / N by the vendor's batched GEMM. Or, to save memory, in
                float32 without TF32, and where a GEMM's range is not enough: one program per (image, rows of the
                gradient, locations), which forms tiles of dZ inside the product and writes none

There are no atomics, so results repeat bit for bit. Everything between load and store is float32.

Range. Products of bfloat16 or float32 features can overflow float32, and the roots of float16 products can overflow, or
fade in, float16. Neither happens to ordinary features, so the first pass takes no care. The kernel of the norms
looks at each image's sum of squares, and where that is out of range computes the image again, with features divided by
a power of two, `scale`, and eps by its square: after the L2 norm that changes nothing.
"""

from typing import List, Optional, Tuple

import torch

from .descriptors import descriptors, fill_logits
from .gradients import feature_gradients, logit_gradients
from .tiles import on_device_of

__all__ = ['backward', 'classify', 'classify_backward', 'forward']


def _matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y in float32."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return x.float() @ y.float()
    return torch.mm(x, y, out_dtype=torch.float32)


def _z_factor(a: torch.Tensor, b: Optional[torch.Tensor], pool: str) -> float:
    """Constant factor of dZ: of the pooling, and the 1/2 of the root's slope that dZ + dZ^T makes up for."""
    return (1 / a.shape[2] if pool == 'avg' else 1.0) * (1.0 if b is None else 0.5)


def forward(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised descriptors.

    Args:
        a: (B, Ca, N) features, any strides, float32, bfloat16 or float16.
        b: (B, Cb, N) features of the second stream in the same dtype, or None for the symmetric, packed case.
        pool: 'avg', 'sum' or 'max'.
        eps: Offset under the root.

    Returns:
        Tuple: y (B, D) in the dtype of a, but float32 for float16; its norms (B,), float32, at least 1e-12; scale
        (B, 2), float32, 1 but where features were out of range: those of a and b were divided by it, and so y by the
        root of its product.
    """
    with on_device_of(a):
        # float16 cannot hold every gradient of an unnormalised descriptor, which comes in the dtype of y
        dtype = torch.float32 if a.dtype == torch.float16 else a.dtype
        return descriptors(a, b, pool, eps, dtype)


def classify(
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, K) in the dtype of a; scores, which are logits before the bias, in float32; what `forward` returns."""
    with on_device_of(a):
        y, norm, scale = descriptors(a, b, pool, eps, a.dtype)
        scores = _matmul(y, weight.to(y.dtype).t())
        logits = torch.empty_like(scores, dtype=a.dtype)
        fill_logits(norm, scores, None if bias is None else bias.contiguous(), logits)
    return logits, scores, y, norm, scale


def backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    pool: str,
    eps: float,
) -> List[torch.Tensor]:
    """Gradients of a and, if there is one, b from that of the unnormalised descriptors, grad (B, D)."""
    with on_device_of(a):
        coefficients = scale.new_zeros(a.shape[0], 3)
        coefficients[:, 0] = _z_factor(a, b, pool)
        coefficients[:, 2] = (eps / scale[:, 0] / scale[:, 1]).clamp_min(1e-30).sqrt()
        return feature_gradients(grad.contiguous(), y, coefficients, scale, a, b, pool)


def classify_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    y: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: Optional[torch.Tensor],
    weight: torch.Tensor,
    pool: str,
    eps: float,
    need_features: bool,
    need_weight: bool,
    save_memory: bool,
    weight_dtype: torch.dtype,
) -> List[torch.Tensor]:
    """Gradients of a and b, if needed, then of the weight, if needed, from that of the logits, grad (B, K).

    The weight is in the dtype of the features, its gradient in `weight_dtype`.
    """
    # In float16 the norm is at least the root of D over 64: what is divided by it does not overflow.
    w_factor = y.shape[1] ** 0.5 / 64 if y.dtype == torch.float16 else 1.0
    grads = []
    with on_device_of(a):
        u_grad, w_grad, coefficients = logit_gradients(
            grad, scores, y, norm, scale, w_factor, _z_factor(a, b, pool), eps
        )
        if need_features:
            u = u_grad @ weight.to(y.dtype)
            grads += feature_gradients(u, y, coefficients, scale, a, b, pool, save_memory)
        if need_weight:
            if weight_dtype == y.dtype:  # alpha is applied in float32, before rounding
                grad_weight = y.new_empty(weight.shape)
                torch.addmm(grad_weight, w_grad.t(), y, beta=0, alpha=1 / w_factor, out=grad_weight)
            else:
                grad_weight = _matmul(w_grad.t(), y)
                if w_factor != 1.0:
                    grad_weight /= w_factor
            grads.append(grad_weight.to(weight_dtype))
    return grads
