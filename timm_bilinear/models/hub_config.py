"""What is believed of a config.json that comes from whoever made a repo on the Hub."""

import inspect
import json
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg, is_model

from .._compat import hf_split
from ..layers.arguments import Internal, argument_problem, arguments_of, is_marked
from ..layers.pooling import list_poolings, pooling_arguments
from .bilinear_cnn import BilinearCNN

__all__ = ['check_hub_config']

# Keys of a pretrained_cfg by which weights would come from elsewhere than the repo.
_ELSEWHERE = ('url', 'file', 'custom_load', 'hf_hub_filename')
_LARGEST_NUMBER = 10**9
_MOST_PARAMETERS = 4 * 10**9  # 16 GB in float32


def _numbers(value: Any, place: str = '') -> Iterator[Tuple[str, Union[int, float]]]:
    """Every number within JSON data, and the key that it is under."""
    if isinstance(value, (int, float)):
        yield place, value
    elif isinstance(value, (list, dict)):
        for key, item in value.items() if isinstance(value, dict) else ((place, item) for item in value):
            yield from _numbers(item, key)


def _argument_problems(args: Dict[str, Any]) -> List[str]:
    """What in saved model arguments no model could have been saved with."""
    known = arguments_of(BilinearCNN)
    poolings = {name: args[name] for name in ('pool_type', 'global_pool') if args.get(name) not in ('', None)}
    for name, pooling in poolings.items():
        if pooling not in list_poolings():
            return [f'{name}={pooling!r} must be one of {", ".join(map(repr, list_poolings()))}']
    pooling = poolings.get('global_pool', poolings.get('pool_type', 'avg'))
    known.update(pooling_arguments(pooling))
    defaults = {p.name: p.default for p in inspect.signature(BilinearCNN).parameters.values()}
    problems = []
    for name, value in args.items():
        if name not in known:
            problem = 'is no argument'
        elif is_marked(known[name], Internal):
            problem = None if value == defaults[name] else 'is not for a config to say'
        else:
            problem = argument_problem(known[name], value)
        if name.startswith('backbone_') and isinstance(value, str) and not is_model(value.split('.')[0]):
            problem = 'is no timm model'
        if problem:
            problems.append(f'{name}={value!r} {problem}')
    return problems


def _count_parameters(args: Dict[str, Any]) -> int:
    """Parameters that a model of such arguments has, counted without making them."""
    known = arguments_of(BilinearCNN)
    args = {k: v for k, v in args.items() if not is_marked(known.get(k, Any), Internal)}
    with torch.device('meta'):
        model = BilinearCNN(**args, device='meta')
    return sum(p.numel() for p in model.parameters())


def check_hub_config(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None):
    """Check the config.json that a model is about to be built from, if it comes from a Hub repo.

    Types and bounds are those of the signatures of model and pooling.

    Args:
        cfg: The model's config; of the Hub if its source says so, and then config.json is in the cache.
        cache_dir: The cache.

    Raises:
        ValueError: If it has arguments, names or numbers that no model has, or a model of it would be too large.
    """
    if cfg.source != 'hf-hub':
        return
    repo_id, revision = hf_split(cfg.hf_hub_id)
    path = hf_hub_download(repo_id, 'config.json', revision=revision, cache_dir=cache_dir, local_files_only=True)
    config = json.loads(Path(path).read_text())
    args, stored = config.get('model_args') or {}, config.get('pretrained_cfg') or {}
    problems = _argument_problems(args)
    for values in (config, stored):
        if problem := argument_problem(arguments_of(BilinearCNN)['num_classes'], values.get('num_classes', 0)):
            problems.append(f'num_classes={values["num_classes"]!r} {problem}')
    problems += [f'{key}={stored[key]!r} is not for a config to say' for key in _ELSEWHERE if stored.get(key)]
    problems += [
        f'{key}={value!r} is too large'
        for key, value in _numbers(config)
        if not math.isfinite(value) or abs(value) > _LARGEST_NUMBER
    ]
    if not problems:
        try:
            count = _count_parameters(args)
        except (RuntimeError, TypeError, ValueError) as e:
            problems.append(str(e))
        else:
            if count > _MOST_PARAMETERS:
                problems.append(f'a model of {count:,} parameters')
    if problems:
        listed = ', '.join(problems)[:500]
        raise ValueError(f"config.json of the Hugging Face Hub repo '{cfg.hf_hub_id}' is not trusted: {listed}.")
