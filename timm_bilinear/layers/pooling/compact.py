"""Compact bilinear pooling: random projections of the outer product whose inner products are its own in expectation.

Source: Gao, Beijbom, Zhang, Darrell, 'Compact Bilinear Pooling', https://arxiv.org/abs/1511.06062.
"""

from abc import abstractmethod
from typing import Annotated, Dict, List, Optional, Tuple

import torch

from ..arguments import Bounds
from .plain import PlainPooling, mean_products, project_products, root_and_norm
from .registry import Terms, register_pooling

__all__ = ['MaclaurinPooling', 'SketchPooling']


class _CompactPooling(PlainPooling):
    """A random projection of the pooled outer product, signed square root, L2 norm."""

    is_unit_length = True

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        dim: Annotated[int, Bounds(1, 1_000_000)] = 8192,
        seed: Annotated[int, Bounds(0, 1_000_000_000)] = 0,
        eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels of one stream or of two.
            dim: Descriptor size D.
            seed: Seed of what is random in the projection, which is saved with the model.
            eps: Offset under the signed square root.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_features = dim
        self.eps = eps
        generator = torch.Generator('cpu').manual_seed(seed)
        for side, channels in zip('ab', (in_features[0], in_features[-1])):  # independent, of one stream too
            for name, value in self.draw(channels, generator).items():
                self.register_buffer(f'{name}_{side}', value.to(device or torch.get_default_device()))

    @abstractmethod
    def draw(self, channels: int, generator: torch.Generator) -> Dict[str, torch.Tensor]:
        """Buffers by name, on the CPU, for one side of the outer product."""

    @abstractmethod
    def sketch(self, z: torch.Tensor) -> torch.Tensor:
        """Projection (B, D) of pooled outer products (B, Ca, Cb), linear in them."""

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        return root_and_norm(self.sketch(mean_products(a, b)), self.eps)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        return [Terms(self.sketch(mean_products(a, b)), (a,) if b is None else (a, b), 2)]

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, num_features={self.num_features}, eps={self.eps:g}'


def _random_signs(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    return (2 * torch.randint(2, (count, size), generator=generator, device='cpu') - 1).to(torch.int8)


@register_pooling('sketch')
class SketchPooling(_CompactPooling):
    """Tensor Sketch: the circular convolution of the count sketches of both sides.

    Summed over locations it is a count sketch of the pooled outer product, whose entry (i, j) goes to place
    h_a(i) + h_b(j) modulo D with sign s_a(i) s_b(j). It is computed so, without Fourier transforms at every location.
    """

    def draw(self, channels: int, generator: torch.Generator) -> Dict[str, torch.Tensor]:
        places = torch.randint(self.num_features, (channels,), generator=generator, device='cpu')
        return dict(hash=places, sign=_random_signs(1, channels, generator)[0])

    def sketch(self, z: torch.Tensor) -> torch.Tensor:
        places = (self.hash_a[:, None] + self.hash_b[None, :]).remainder(self.num_features)
        signs = (self.sign_a[:, None] * self.sign_b[None, :]).to(z.dtype)
        out = torch.zeros((z.shape[0], self.num_features), dtype=z.dtype, device=z.device)
        return out.scatter_add(1, places.flatten().expand(z.shape[0], -1), (z * signs).flatten(1))


@register_pooling('maclaurin')
class MaclaurinPooling(_CompactPooling):
    """Random Maclaurin projection: entry k is (w_k . a) (v_k . b) / sqrt(D), summed over locations, of random signs.

    The factor 1 / sqrt(D) makes inner products those of the outer products in expectation.
    """

    def draw(self, channels: int, generator: torch.Generator) -> Dict[str, torch.Tensor]:
        return dict(sign=_random_signs(self.num_features, channels, generator))

    def sketch(self, z: torch.Tensor) -> torch.Tensor:
        w, v = self.sign_a.to(z.dtype), self.sign_b.to(z.dtype)
        return project_products(z, w, v) * self.num_features**-0.5
