from contextlib import nullcontext

import pytest
import torch

from timm_bilinear import ops
from timm_bilinear.ops import library, reference


@pytest.fixture
def take_kernels(monkeypatch):
    """The public ops take the GPU's kernels, on the CPU too, where Triton's interpreter runs them."""
    from triton.language.semantic import TritonSemantic

    from timm_bilinear.ops import kernels

    if not torch.cuda.is_available():
        # a quarter of the interpreter's time, for checks whose outcome it drops
        monkeypatch.setattr(TritonSemantic, 'binary_op_sanitize_overflow_impl', lambda *args: None)
        monkeypatch.setattr(library, '_path', lambda x: kernels)
        monkeypatch.setattr(ops, '_is_fast', lambda a: True)
    monkeypatch.setattr(reference, 'bilinear_pool', None)
    with torch.device('cuda') if torch.cuda.is_available() else nullcontext():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a few channels and locations cross: each step of each takes the interpreter a millisecond."""
    from timm_bilinear.ops.kernels import descriptors, gradients, maximum, slopes, tiles

    square = tiles.Config(4, 4, 4, num_warps=1, num_stages=1)
    tall = square._replace(block_i=8)  # as in backward
    if not torch.cuda.is_available():
        for module, config, names in (
            (descriptors, square, ['HALF', 'FLOAT', 'MAX']),
            (gradients, tall, ['HALF', 'FLOAT']),
            (gradients, square, ['MAX']),
            (maximum, square, ['CONFIG']),
            (slopes, square, ['CONFIG']),
        ):
            for name in names:
                monkeypatch.setattr(module, name, config)
