"""First and second moments of tokens, as a classifier on a frozen transformer has them.

In the spirit of Gao, Wang, Lin, Zhu, Hu, Zhou, 'Tuning Pre-trained Model via Moment Probing',
https://arxiv.org/abs/2307.11342, and Xie, Zeng, Wang, Zhou, Li, 'SoT: Delving Deeper into Classification Head for
Transformer', https://arxiv.org/abs/2104.10935.
"""

from typing import Annotated, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...ops import reference
from ..arguments import Bounds
from .plain import PlainPooling
from .registry import Terms, register_pooling

__all__ = ['MomentsPooling']


@register_pooling('moments')
class MomentsPooling(PlainPooling):
    """The class token, or the mean of the tokens, beside cross-covariances of neighbouring heads of the tokens.

    The first part is normalised as by a layer norm, whose scale and shift a linear classifier has, and divided by the
    root of its channels: like each covariance, after a signed square root, it has unit length, so that one learning
    rate suits both. Tokens are projected, split into heads, layer-normalised and centred. A linear classifier on all
    parts is the sum of one on each.
    """

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        dim: Annotated[int, Bounds(2, 65536)] = 256,
        heads: Annotated[int, Bounds(2, 1024)] = 4,
        eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels of the tokens, and of the class token if there is one.
            dim: Channels that tokens are projected to, of all heads together.
            heads: Number of heads, each of which is paired with the next.
            eps: Offset under the signed square root.

        Raises:
            ValueError: If `dim` is no multiple of `heads`.
        """
        super().__init__()
        if dim % heads:
            raise ValueError(f"'dim' must be a multiple of 'heads', got {dim} and {heads}.")
        dd = {'device': device, 'dtype': dtype}
        self.in_features = tuple(in_features)
        self.heads, self.head_dim = heads, dim // heads
        self.eps = eps
        self.num_features = in_features[-1] + (heads - 1) * self.head_dim**2
        self.proj = nn.Linear(in_features[0], dim, **dd)
        self.norm = nn.LayerNorm(self.head_dim, **dd)

    def centred(self, a: torch.Tensor) -> torch.Tensor:
        """Heads of the projected tokens, layer-normalised and centred, (B, N, heads, d)."""
        scale, _ = reference.safe_scales(a, a)
        tokens = F.linear((a / scale).transpose(1, 2), self.proj.weight.to(a.dtype), self.proj.bias.to(a.dtype))
        x = tokens.unflatten(2, (self.heads, self.head_dim))  # (B, N, heads, d)
        x = F.layer_norm(x, (self.head_dim,), self.norm.weight.to(a.dtype), self.norm.bias.to(a.dtype), self.norm.eps)
        return x - x.mean(1, keepdim=True)

    def covariances(self, x: torch.Tensor) -> torch.Tensor:
        """Of every head and the next, (B, heads - 1, d * d)."""
        x = x.transpose(1, 2)
        return (torch.matmul(x[:, :-1].transpose(2, 3), x[:, 1:]) / x.shape[2]).flatten(2)

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        """Of tokens `a`; the class token is that at every location of `b`."""
        tokens = a if b is None else b
        scale, _ = reference.safe_scales(tokens, tokens)
        first = (tokens / scale).mean(2)
        first = first / torch.maximum(first.detach().abs().amax(1, keepdim=True), 1 / scale[:, 0])
        first = F.layer_norm(first, self.in_features[-1:]) * self.in_features[-1] ** -0.5
        z = self.covariances(self.centred(a))
        y = reference.signed_root(z, torch.full((), self.eps, dtype=z.dtype, device=z.device))
        return torch.cat([first, (y / reference.norm(y)).flatten(1)], 1)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        """The mean token's channels less their mean, of which the class token has no location; and the covariances."""
        tokens = a if b is None else b
        first = (tokens / reference.safe_scales(tokens, tokens)[0]).mean(2)
        is_class_token = b is not None and bool((b == b[:, :, :1]).all())  # the same at every location
        x = self.centred(a).flatten(2).transpose(1, 2)  # (B, dim, N)
        heads = x.transpose(1, 2).unflatten(2, (self.heads, self.head_dim))
        return [
            Terms(first - first.mean(1, keepdim=True), () if is_class_token else (tokens,), 1),
            Terms(self.covariances(heads).flatten(1), (x,), 2),
        ]

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, num_features={self.num_features}, heads={self.heads}'
