"""Bilinear CNNs on timm's small test models, and what the tests of several files ask of them."""

from contextlib import contextmanager

import timm
import torch
import torch.nn as nn

from timm_bilinear import BilinearCNN

ONE = dict(backbone_a='test_resnet', num_classes=5)
TWO = dict(ONE, backbone_b='test_convnext')
# Streams of strides 16 and 32.
GRIDS = dict(TWO, out_index_a=3)


def create(**kwargs) -> BilinearCNN:
    return timm.create_model('bcnn', **kwargs).eval()


def images(batch=2, chans=3, size=96, **kwargs):
    return torch.randn(batch, chans, size, size, **kwargs)


@contextmanager
def saved_shapes():
    """Shapes of what autograd saves for backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        yield shapes


def randomise_norms(net: nn.Module) -> nn.Module:
    """Statistics and affine parameters that tell one batch norm from another, so that a mixed-up key shows."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


def stream_convs(model, letter):
    """Conv weights of a stream in order; timm's feature nets rename, but keep the order."""
    stream = getattr(model, f'stream_{letter}')
    return [m.weight for m in stream.modules() if isinstance(m, nn.Conv2d)]
