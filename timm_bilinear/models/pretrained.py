"""Pretrained weights: the one checkpoint filter, and where complete weights come from."""

import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from .._compat import hf_split
from ..layers.pooling import ISqrtPooling
from .download import UnavailableError, prefetch

__all__ = ['HUB_OWNER', 'check_backbone_weights', 'checkpoint_filter_fn', 'fetch_weights']

_logger = logging.getLogger(__name__)

HUB_OWNER = 'timm-bilinear'  # of this project's repos on the Hub, whose files are in hub/ too

# The article's Net: nn.Sequential of torchvision's resnet18 up to layer4, by position.
_ARTICLE_LAYERS = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
_ARTICLE_STREAM = re.compile(r'features\.(\d)\.')
# The authors' PyTorch release (cvl-umass/bilinear-cnn): an extractor per stream, in a Sequential if projected.
_UMASS_STREAM = re.compile(r'feature_extractors\.feature_extractors\.([01])\.(?:0\.)?model\.')
_UMASS_PROJ = re.compile(r'feature_extractors\.feature_extractors\.([01])\.1\.weight$')
# What their torchvision backbones hold and do not use; an identity matrix.
_UMASS_UNUSED = re.compile(r'stream_[ab]\.(?:classifier|fc|AuxLogits)\.|m_sqrt\.I$')
# fast-MPN-COV: an ImageNet model with its projection as layers, or one made for fine-tuning, a Sequential with the
# projection in it or in the representation.
_MPNCOV_PROJ = re.compile(r'(?:layer_reduce(_bn)?|features\.([89])|representation\.conv_dr_block\.([01]))\.')


def _rename_article(key: str) -> str:
    key = _ARTICLE_STREAM.sub(lambda m: f'stream_a.{_ARTICLE_LAYERS.get(m[1], m[1])}.', key)
    return key.replace('classifiers.0.', 'head.fc.')


def _rename_umass(key: str) -> str:
    if m := _UMASS_PROJ.match(key):
        return f'head.proj_{"ab"[int(m[1])]}.weight'
    if m := _UMASS_STREAM.match(key):
        # VGG is a bare Sequential there, DenseNet a model with `features`; both are flattened in timm's feature nets.
        layer = re.sub(
            r'^(?:features\.)?(?=\d|(?:conv0|norm0|denseblock\d|transition\d|norm5)\.)', 'features_', key[m.end() :]
        )
        return f'stream_{"ab"[int(m[1])]}.{layer}'
    return f'head.{key}' if key.startswith('fc.') else key


def _is_mpncov(state_dict: Dict[str, torch.Tensor]) -> bool:
    if 'layer_reduce.weight' in state_dict or 'representation.conv_dr_block.0.weight' in state_dict:
        return True
    return 'features.8.weight' in state_dict and 'features.4.0.conv1.weight' in state_dict


def _rename_mpncov(key: str, is_vgg: bool) -> str:
    if (m := _MPNCOV_PROJ.match(key)) and not (is_vgg and key.startswith('features.')):
        is_norm = m[1] is not None or m[2] == '9' or m[3] == '1'
        return f'head.proj_a.{"bn" if is_norm else "conv"}.{key[m.end() :]}'
    if key.startswith(('fc.', 'classifier.')):
        return f'head.fc.{key.split(".", 1)[1]}'
    if is_vgg:
        return key.replace('features.', 'stream_a.features_', 1)
    if key.startswith('features.'):
        return _rename_article(key)
    return f'stream_a.{key}'


def _from_mpncov(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights of fast-MPN-COV, whose classifier is on the bare triangle; its ImageNet VGG has three more layers there,
    which are left out."""
    is_vgg = 'features.0.bias' in state_dict
    state_dict = {_rename_mpncov(k, is_vgg): v for k, v in state_dict.items()}
    state_dict = {k: v for k, v in state_dict.items() if not re.match(r'head\.fc\.\d', k)}
    weight = state_dict.get('head.fc.weight')
    if weight is not None and isinstance(model.head.pool, ISqrtPooling):
        state_dict['head.fc.weight'] = model.head.pool.fold_triangle(weight)
    return state_dict


def _check_fit(state_dict: Dict[str, torch.Tensor], model: nn.Module):
    """Raise if `state_dict` does not fit, but for what timm adapts: another number of classes or input channels."""
    own = model.state_dict()
    num_classes = model.pretrained_cfg['num_classes']
    adapted = [f'{name}.weight' for name in model._traits.get('first_conv') or ()]
    if num_classes != model.num_classes:
        adapted += ['head.fc.weight', 'head.fc.bias']
    problems: List[str] = []
    for key, value in own.items():
        if key in adapted or key.endswith('num_batches_tracked'):
            continue
        if key not in state_dict:
            problems.append(f'{key} is missing')
        elif state_dict[key].shape != value.shape:
            problems.append(f'{key} is {tuple(state_dict[key].shape)}, the model has {tuple(value.shape)}')
    problems += [f'{key} is not in the model' for key in state_dict if key not in own and key not in adapted]
    if problems:
        shown = '; '.join(problems[:8]) + (f'; and {len(problems) - 8} more' if len(problems) > 8 else '')
        hint = ''
        if any(p.startswith('head.fc.') for p in problems):
            hint = (
                f' (The checkpoint was taken to have {num_classes} classes; if it has another number, give'
                ' pretrained_cfg_overlay=dict(num_classes=...) and its classifier is replaced.)'
            )
        if all(p.startswith(('head.fc.', 'head.pool.')) for p in problems):
            hint += ' With num_classes=0 the model takes what is before the pooling alone.'
        raise RuntimeError(f'The checkpoint does not fit this {type(model).__name__}: {shown}.{hint}')


def _adopt_pooling(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights with the model's own where they are of another pooling, or have no projection.

    For a model whose classifier, which comes behind them, is replaced too. A projection that was trained is not lost.
    """
    own = {k: v for k, v in model.state_dict().items() if k.startswith(('head.pool.', 'head.proj_'))}
    weight = state_dict.get('head.fc.weight')
    # of another `dim` hashes have the same shapes
    is_other = weight is not None and weight.dim() == 2 and weight.shape[1] != model.head.num_features
    fresh = {k: v for k, v in own.items() if k not in state_dict}
    for key, value in own.items():
        if key.startswith('head.pool.') and (is_other or value.shape != state_dict.get(key, value).shape):
            fresh[key] = value
    kept = {k: v for k, v in state_dict.items() if k in own or not k.startswith('head.pool.')}
    adopted = {**kept, **fresh}
    _check_fit(adopted, model)
    if told := sorted(k for k in fresh if not k.endswith('num_batches_tracked')):
        _logger.warning(f'The checkpoint has another head: {", ".join(told)} start afresh.')
    return adopted


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take every checkpoint of a bilinear CNN to this package's names and packed classifier.

    Accepts our own and timm train script's, those of the article's `Net` (`features.0.weight`, `classifiers.0.weight`)
    those of the authors' PyTorch release (`feature_extractors.feature_extractors.0.model.0.weight`, `fc.weight`) and
    those of fast-MPN-COV (`layer_reduce.weight` or `representation.conv_dr_block.0.weight`), with or without 'module.',
    with a full C * C or a packed classifier.

    Args:
        state_dict: Checkpoint weights.
        model: The `BilinearCNN` they are for, with `pretrained_cfg['num_classes']` the checkpoint's classes.

    Returns:
        State dict of `model`.

    Raises:
        RuntimeError: If keys or shapes do not fit, naming them.
    """
    state_dict = {k.removeprefix('module.'): v for k, v in state_dict.items()}
    if 'classifiers.0.weight' in state_dict:
        state_dict = {_rename_article(k): v for k, v in state_dict.items()}
    elif any(_UMASS_STREAM.match(k) for k in state_dict):
        state_dict = {_rename_umass(k): v for k, v in state_dict.items()}
        state_dict = {k: v for k, v in state_dict.items() if not _UMASS_UNUSED.match(k)}
    elif _is_mpncov(state_dict):
        state_dict = _from_mpncov(state_dict, model)
    weight = state_dict.get('head.fc.weight')
    head = model.head
    if weight is not None and head.pool is not None:
        state_dict['head.fc.weight'] = head.pool.fold_classifier(weight)
    if model.pretrained_cfg['num_classes'] != model.num_classes:
        return _adopt_pooling(state_dict, model)
    _check_fit(state_dict, model)
    return state_dict


def check_backbone_weights(backbone: str):
    """Check that timm has weights of a backbone, which it would only warn of.

    Args:
        backbone: timm model name, with or without tag.

    Raises:
        RuntimeError: If it has none.
    """
    cfg = get_pretrained_cfg(backbone)
    if cfg is None or not cfg.has_weights:
        raise RuntimeError(f"timm has no pretrained weights for '{backbone}'. Use pretrained=False.")


def fetch_weights(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> Dict[str, Any]:
    """Bring complete weights from the Hub into the cache, as `prefetch` does.

    For this project's own repos, an error says also where else their files lie.
    """
    try:
        return prefetch(cfg.to_dict(), cache_dir)
    except UnavailableError as e:
        owner, _, name = hf_split(cfg.hf_hub_id)[0].partition('/')
        if owner == HUB_OWNER:
            hint = f"timm.create_model('local-dir:hub/{name}', pretrained=True)"
            e.args = (f"{e} The same files lie in this project's repository: in a checkout of it, {hint}.",)
        raise
