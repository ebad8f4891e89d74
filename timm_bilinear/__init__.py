"""Bilinear CNNs for timm: importing the package registers the models, and changes nothing else."""

import importlib

from . import layers, models, ops
from .hub import push_to_hub, save_model
from .models import BilinearCNN

__all__ = ['BilinearCNN', 'finetune', 'layers', 'models', 'ops', 'push_to_hub', 'save_model']


def __getattr__(name: str):
    if name in ('finetune', 'tools'):  # what training needs is loaded when it is asked for
        return importlib.import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
