"""Bilinear CNNs for timm: importing the package registers the models, and changes nothing else."""

from . import layers, models, ops
from .hub import push_to_hub, save_model
from .models import BilinearCNN

__all__ = ['BilinearCNN', 'layers', 'models', 'ops', 'push_to_hub', 'save_model']
