"""What is believed of a config.json that comes from whoever made a repo on the Hub."""

import inspect
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg, is_model
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from .._compat import hf_split
from ..layers.arguments import Bounds, Internal, argument_problem, arguments_of, is_marked
from ..layers.pooling import list_poolings, pooling_arguments
from .bilinear_cnn import BilinearCNN

__all__ = ['check_hub_config']

# Keys of a pretrained_cfg by which weights would come from elsewhere than the repo.
_ELSEWHERE = ('url', 'file', 'state_dict', 'custom_load', 'hf_hub_filename')
# What timm reads of a pretrained_cfg besides.
_Size = Annotated[Optional[Tuple[int, int, int]], Bounds(1, 16384)]
_Grid = Annotated[Optional[Tuple[int, int]], Bounds(1, 16384)]
_Crop = Annotated[Optional[float], Bounds(above=0, most=10)]
_Names = Optional[Union[str, Tuple[str, ...]]]
_CFG = {
    **dict(input_size=_Size, test_input_size=_Size, min_input_size=_Size, pool_size=_Grid, test_pool_size=_Grid),
    **dict(crop_pct=_Crop, test_crop_pct=_Crop, crop_mode=Optional[str], interpolation=Optional[str]),
    **dict(mean=Optional[Tuple[float, ...]], std=Annotated[Optional[Tuple[float, ...]], Bounds(above=0)]),
    **dict(first_conv=_Names, classifier=_Names, label_offset=Annotated[Optional[int], Bounds(0, 1000)]),
    **dict(fixed_input_size=Optional[bool]),
}
_LARGEST_NUMBER = 10**9
_MOST_BYTES = 32 * 10**9  # timm's largest has 17
_MOST_MODULES = 12_000  # registered while two streams are built; timm's largest has 1757


class _TooLarge(Exception):
    """A model that is being built has grown past all bounds."""


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


@contextmanager
def _bounded_growth():
    """Context in which modules can be built up to a number, and to a size.

    Raises:
        _TooLarge: Beyond.
    """
    counts = dict(modules=0, bytes=0)

    def count(module: nn.Module, name: str, value: Any):
        if isinstance(value, torch.Tensor):
            counts['bytes'] += value.numel() * value.element_size()
        else:
            counts['modules'] += 1
        # streams are built twice, once to look at them
        if counts['modules'] > _MOST_MODULES or counts['bytes'] > 2 * _MOST_BYTES:
            raise _TooLarge(f'a model of more than {counts["modules"] - 1:,} modules or {counts["bytes"]:,} bytes')

    register = (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
        register_module_buffer_registration_hook,
    )
    handles = [f(count) for f in register]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _size_problem(args: Dict[str, Any]) -> Optional[str]:
    """What is wrong with the size of a model of such arguments, found without allocating it."""
    known = arguments_of(BilinearCNN)
    args = {k: v for k, v in args.items() if not is_marked(known.get(k, Any), Internal)}
    try:
        with torch.device('meta'), _bounded_growth():
            model = BilinearCNN(**args, device='meta')
    except (RuntimeError, TypeError, ValueError, _TooLarge) as e:
        return str(e)
    size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    return f'a model of {size:,} bytes' if size > _MOST_BYTES else None


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
    of_classes = arguments_of(BilinearCNN)['num_classes']
    for values, known in ((config, {}), (stored, _CFG)):
        for key, annotation in dict(known, num_classes=of_classes).items():
            if key in values and (problem := argument_problem(annotation, values[key])):
                problems.append(f'{key}={values[key]!r} {problem}')
    problems += [f'{key}={stored[key]!r} is not for a config to say' for key in _ELSEWHERE if stored.get(key)]
    problems += [
        f'{key}={value!r} is too large'
        for key, value in _numbers(config)
        if not abs(value) <= _LARGEST_NUMBER  # nor is nan
    ]
    if not problems and (problem := _size_problem(args)):
        problems.append(problem)
    if problems:
        listed = ', '.join(problem if len(problem) < 200 else f'{problem[:200]}...' for problem in problems)[:500]
        raise ValueError(f"config.json of the Hugging Face Hub repo '{cfg.hf_hub_id}' is not trusted: {listed}.")
