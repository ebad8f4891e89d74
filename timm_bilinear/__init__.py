"""Bilinear CNNs for timm: importing the package registers the models."""

from . import layers, ops
from .bcnn import BilinearCNN

__all__ = ['BilinearCNN', 'layers', 'ops']
