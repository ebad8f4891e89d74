"""Pretrained weights: the one checkpoint filter, and what is believed of a config from the Hub."""

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, List, Optional, Union

import torch
from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model
from torch import nn

from .._compat import hf_split
from ..hub.client import MissingFileError, UnavailableError
from ..ops import fold_symmetric_weight

__all__ = ['HUB_OWNER', 'check_backbone_weights', 'check_hub_config', 'checkpoint_filter_fn', 'hub_errors']

HUB_OWNER = 'timm-bilinear'  # of this project's repos on the Hub, whose files are in hub/ too

# The article's Net: nn.Sequential of torchvision's resnet18 up to layer4, by position.
_ARTICLE_LAYERS = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
_ARTICLE_STREAM = re.compile(r'features\.(\d)\.')
# The authors' PyTorch release (cvl-umass/bilinear-cnn): an extractor per stream, in a Sequential if projected.
_UMASS_STREAM = re.compile(r'feature_extractors\.feature_extractors\.([01])\.(?:0\.)?model\.')
_UMASS_PROJ = re.compile(r'feature_extractors\.feature_extractors\.([01])\.1\.weight$')
# What their torchvision backbones hold and do not use.
_UMASS_UNUSED = re.compile(r'stream_[ab]\.(?:classifier|fc|AuxLogits)\.')


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
                f' pretrained_cfg_overlay=dict(num_classes=...) and its classifier is replaced.)'
            )
        raise RuntimeError(f'The checkpoint does not fit this {type(model).__name__}: {shown}.{hint}')


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take every checkpoint of a bilinear CNN to this package's names and packed classifier.

    Accepts our own and timm train script's, those of the article's `Net` (`features.0.weight`, `classifiers.0.weight`)
    and those of the authors' PyTorch release (`feature_extractors.feature_extractors.0.model.0.weight`, `fc.weight`),
    with or without 'module.', with a full C * C or a packed classifier.

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
    weight = state_dict.get('head.fc.weight')
    head = model.head
    if weight is not None and head.in_features_b is None and weight.shape[1] == head.channels**2 != head.num_features:
        state_dict['head.fc.weight'] = fold_symmetric_weight(weight)
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


# What a config from the Hub may say of a model; numbers within bounds that any real model keeps.
_HUB_NAMES = ('backbone_a', 'backbone_b')
_HUB_NUMBERS = {
    'num_classes': 1_000_000,
    'in_chans': 1024,
    'img_size': 8192,
    'out_index_a': 100,
    'out_index_b': 100,
    'proj_dim': 8192,
}
_HUB_FORBIDDEN = ('url', 'file', 'custom_load', 'hf_hub_filename')
_HUB_VALUES = ('pool_type', 'global_pool', 'eps', 'drop_rate', 'drop_path_rate', 'freeze_backbone')


def check_hub_config(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None):
    """Check the config.json that a model is about to be built from, if it comes from whoever made a Hub repo.

    Args:
        cfg: The model's config; of the Hub if its source says so, and then config.json is in the cache.
        cache_dir: The cache.

    Raises:
        ValueError: If it has arguments, names or numbers that no model pushed from here has.
    """
    if cfg.source != 'hf-hub':
        return
    repo_id, revision = hf_split(cfg.hf_hub_id)
    path = hf_hub_download(repo_id, 'config.json', revision=revision, cache_dir=cache_dir, local_files_only=True)
    config = json.loads(Path(path).read_text())
    problems = []
    args = dict(config.get('model_args') or {}, num_classes=config.get('num_classes', 0))
    for key, value in args.items():
        if key in _HUB_NAMES:
            bad = value is not None and (not isinstance(value, str) or not is_model(value.split('.')[0]))
        elif key in _HUB_NUMBERS:
            numbers = value if isinstance(value, list) else [value]
            bad = not all(
                x is None or (isinstance(x, int) and -_HUB_NUMBERS['out_index_a'] <= x <= _HUB_NUMBERS[key])
                for x in numbers
            )
        else:
            bad = key not in _HUB_VALUES or not isinstance(value, (str, int, float, type(None)))
        if bad:
            problems.append(f'{key}={value!r}')
    stored = config.get('pretrained_cfg') or {}
    problems += [f'{key}={stored[key]!r}' for key in _HUB_FORBIDDEN if stored.get(key)]
    if problems:
        listed = ', '.join(problems)[:500]
        raise ValueError(f"config.json of the Hugging Face Hub repo '{cfg.hf_hub_id}' is not trusted: {listed}.")


@contextmanager
def hub_errors(repo: Optional[str]):
    """Name the weights that a repo should have, not the last file that timm looked for in their place.

    For this project's own repos, say also where else their files lie.
    """
    try:
        yield
    except UnavailableError as e:
        owner, _, name = (repo or '').partition('/')
        if owner != HUB_OWNER:
            raise
        raise UnavailableError(
            f"{e} The same files lie in this project's repository: in a checkout of it,"
            f" timm.create_model('local-dir:hub/{name}', pretrained=True)."
        ) from None
    except MissingFileError as e:
        raise RuntimeError(
            f"The Hugging Face Hub repo '{repo}' has no model.safetensors, nor weights of another name: {e}"
        ) from None
