"""Empty batches, of which many of timm's backbones cannot infer the shapes."""

from contextlib import contextmanager
from typing import Iterator

import torch
import torch.fx
import torch.nn as nn

__all__ = ['is_empty', 'one_image']


def is_empty(x: torch.Tensor) -> bool:
    """Whether a batch has no images; False while a graph is traced, which is for any number of them."""
    return not isinstance(x, torch.fx.Proxy) and not torch.jit.is_tracing() and x.shape[0] == 0


@contextmanager
def one_image(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A blank image in place of an empty batch, and the model in eval mode, so that no batch norm counts it.

    What the model makes of it, without its only row, is what it makes of the batch; it has gradients, all zero, for
    every parameter, as distributed training needs.

    Args:
        model: The model, whose modules are back in their modes afterwards.
        x: (0, C, H, W) images.

    Yields:
        (1, C, H, W) images.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    finally:
        for module in training:
            module.training = True
