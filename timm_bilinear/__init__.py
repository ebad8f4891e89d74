"""Bilinear CNNs for timm: importing the package registers the models."""

from . import layers, ops
from .bcnn import BilinearCNN
from .hub import push_to_hub

__all__ = ['BilinearCNN', 'layers', 'ops', 'push_to_hub']
