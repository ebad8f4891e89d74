"""Bilinear CNNs for timm: importing the package registers the models, and changes nothing else."""

import importlib
import sys
from pathlib import PurePath
from typing import List

__all__ = [
    'BilinearCNN',
    'evaluate',
    'explain',
    'export_onnx',
    'finetune',
    'index_images',
    'layers',
    'load',
    'models',
    'ops',
    'predict',
    'push_to_hub',
    'retrieval_metrics',
    'save_model',
    'search',
]

# What is loaded when it is asked for: what training and inference need, and in the command all of it.
_HOMES = {
    'BilinearCNN': 'models',
    'evaluate': 'tools.evaluate',
    'explain': 'tools.evidence',
    'export_onnx': 'tools.export',
    'index_images': 'tools.index',
    'load': 'tools.inference',
    'predict': 'tools.predict',
    'push_to_hub': 'hub',
    'retrieval_metrics': 'tools.ranking',
    'save_model': 'hub',
    'search': 'tools.search',
}
_MODULES = ('data', 'finetune', 'hub', 'layers', 'models', 'ops', 'tools')


def _is_command(argv: List[str]) -> bool:
    """Whether this process runs the command, which imports torch and timm only when it has something to do."""
    if not argv or argv[0] != '-m':
        return bool(argv) and PurePath(argv[0]).stem == 'timm-bilinear'
    return any(pair == ('-m', __name__) for pair in zip(sys.orig_argv, sys.orig_argv[1:]))


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
    if name in _MODULES:
        return importlib.import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})


if not _is_command(sys.argv):
    from . import layers, models, ops
    from .hub import push_to_hub, save_model
    from .models import BilinearCNN
