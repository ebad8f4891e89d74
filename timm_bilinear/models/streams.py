"""Streams of a bilinear CNN: any timm backbone as a feature extractor."""

import difflib
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Format
from timm.models import get_pretrained_cfg, is_model, is_model_in_modules, register_notrace_function

from .pretrained import check_backbone_weights

__all__ = ['concat_streams', 'create_stream', 'first_convs', 'input_config', 'is_nhwc', 'layer_ids', 'pair_levels']

_logger = logging.getLogger(__name__)


def _check_backbone(arg: str, backbone: str):
    """Check that a backbone is a model of timm's registry.

    Args:
        arg: Name of the argument, for the error.
        backbone: timm model name, with or without tag.

    Raises:
        ValueError: If it is unknown, or a bilinear CNN itself.
    """
    arch = backbone.split('.')[0]
    if not is_model(arch):
        close = difflib.get_close_matches(arch, timm.list_models(), 3)
        hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
        raise ValueError(f"'{arg}' must be the name of a timm model, got {backbone!r}.{hint}")
    if is_model_in_modules(arch, ['bcnn']):
        raise ValueError(f"'{arg}' must be a backbone, got the bilinear CNN {backbone!r}.")
    try:
        get_pretrained_cfg(backbone)
    except RuntimeError as e:  # unknown tag
        raise ValueError(f"'{arg}': {e}") from None


def create_stream(
    arg: str,
    backbone: str,
    out_index: int = -1,
    all_levels: bool = False,
    pretrained: bool = False,
    cache_dir: Optional[Union[str, Path]] = None,
    img_size: Optional[Union[int, Tuple[int, int]]] = None,
    **kwargs,
) -> nn.Module:
    """Create a backbone that ends at one of its feature levels.

    Args:
        arg: Name of the argument that `backbone` came by, for errors.
        backbone: timm model name, with or without tag.
        out_index: Level of timm's `feature_info` at which the stream ends; negative ones count from the last.
        all_levels: Return every level up to it, not it alone.
        pretrained: Load the backbone's own weights.
        cache_dir: Cache folder for them.
        img_size: Input size, for backbones built for one size; others ignore it.
        **kwargs: For `timm.create_model`.

    Returns:
        Module that takes images and returns a list of feature maps; its `feature_info` describes them.

    Raises:
        ValueError: If the backbone is unknown, has no spatial features or no such level.
        RuntimeError: If pretrained weights cannot be had.
    """
    _check_backbone(arg, backbone)
    if get_pretrained_cfg(backbone).fixed_input_size and img_size is not None:
        kwargs['img_size'] = img_size
    try:
        probe = timm.create_model(backbone, features_only=True, **dict(kwargs, device='meta'))
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"'{arg}': {backbone!r} has no spatial features for a bilinear CNN ({e}).") from e
    levels = len(probe.feature_info.info)
    if not -levels <= out_index < levels:
        arg = arg.replace('backbone', 'out_index')
        raise ValueError(f"'{arg}' must be in [{-levels}, {levels}) for {backbone!r}, got {out_index}.")
    out_index %= levels
    if pretrained:
        check_backbone_weights(backbone)
    out_indices = tuple(range(out_index + 1)) if all_levels else (out_index,)
    return timm.create_model(
        backbone, pretrained=pretrained, cache_dir=cache_dir, features_only=True, out_indices=out_indices, **kwargs
    )


def input_config(
    backbone_a: str,
    backbone_b: Optional[str] = None,
    img_size: Optional[Union[int, Tuple[int, int]]] = None,
    **_,
) -> Dict[str, Any]:
    """Input config of a pair of backbones: normalisation as the first was trained, the size of those that fix one.

    Args:
        backbone_a: timm model name of stream a.
        backbone_b: timm model name of stream b, or None.
        img_size: Size asked for, for backbones that are built for one size.

    Returns:
        Entries for a `pretrained_cfg_overlay`.

    Raises:
        ValueError: If a backbone is unknown, or the two are built for different sizes.
    """
    cfgs = []
    for arg, backbone in (('backbone_a', backbone_a), ('backbone_b', backbone_b)):
        if backbone is not None:
            _check_backbone(arg, backbone)
            cfgs.append(get_pretrained_cfg(backbone))
    overlay = {k: getattr(cfgs[0], k) for k in ('mean', 'std', 'interpolation')}
    if any((cfg.mean, cfg.std) != (cfgs[0].mean, cfgs[0].std) for cfg in cfgs):
        _logger.warning(f'Streams differ in mean and std of their pretraining, using those of {backbone_a}.')
    sizes = {cfg.input_size[1:] for cfg in cfgs if cfg.fixed_input_size}
    if sizes:
        if img_size is not None:
            sizes = {(img_size, img_size) if isinstance(img_size, int) else tuple(img_size)}
        if len(sizes) > 1:
            raise ValueError(
                f'Backbones {backbone_a!r} and {backbone_b!r} are built for different sizes {sorted(sizes)};'
                f" choose one by 'img_size'."
            )
        overlay.update(input_size=(3, *sizes.pop()), fixed_input_size=True)
    if (backbone_a, backbone_b) != ('resnet18', None):  # what the registered config describes
        overlay.update(pool_size=None, first_conv=None)
    return overlay


def is_nhwc(stream: nn.Module) -> bool:
    """Whether a stream's maps are (B, H, W, C)."""
    return Format(getattr(stream, 'output_fmt', 'NCHW')) == Format.NHWC


def first_convs(prefix: str, stream: nn.Module) -> List[str]:
    """Names, in the model, of a stream's layers that take the image."""
    convs = getattr(stream, '_traits', {}).get('first_conv') or ()
    names = dict(stream.named_modules())
    found = []
    for conv in (convs,) if isinstance(convs, str) else convs:
        # timm's feature nets flatten Sequentials (features.0 -> features_0) or hold the whole model
        candidates = (conv, conv.replace('.', '_', 1), f'model.{conv}', f'body.{conv}')
        found += [f'{prefix}.{c}' for c in candidates if c in names][:1]
    return found


def pair_levels(
    stream_a: nn.Module, stream_b: Optional[nn.Module]
) -> Tuple[List[Tuple[int, int]], List[Dict[str, Any]]]:
    """Levels of two streams that belong together: those of equal reduction, and the last ones.

    Returns:
        Pairs of level indices, and `feature_info` of the pairs, in the order of reduction.
    """
    info_a = stream_a.feature_info.get_dicts()
    info_b = info_a if stream_b is None else stream_b.feature_info.get_dicts()
    if stream_b is None:
        levels = [(i, i) for i in range(len(info_a))]
    else:
        at_a = {info['reduction']: i for i, info in enumerate(info_a)}
        at_b = {info['reduction']: i for i, info in enumerate(info_b)}
        last = (len(info_a) - 1, len(info_b) - 1)
        levels = [(at_a[r], at_b[r]) for r in sorted(set(at_a) & set(at_b))]
        levels = [level for level in levels if level != last] + [last]
    info = []
    for i, j in levels:
        num_chs = info_a[i]['num_chs'] + (0 if stream_b is None else info_b[j]['num_chs'])
        reduction = max(info_a[i]['reduction'], info_b[j]['reduction'])
        info.append(dict(num_chs=num_chs, reduction=reduction, module='stream_a'))
    return levels, info


def layer_ids(prefix: str, stream: nn.Module, coarse: bool) -> dict:
    """Depth of each parameter of a stream, by name: the place of its block (or stage, if `coarse`) in the stream."""
    ids, places = {}, {}
    for name, _ in stream.named_parameters():
        parts = [p for p in name.split('.') if p not in ('model', 'body')][:-1]
        depth = 1 if coarse or len(parts) < 2 or not parts[1].isdigit() else 2
        place = places.setdefault(tuple(parts[:depth]), len(places))
        ids[f'{prefix}.{name}'] = place
    return ids


@register_notrace_function
def concat_streams(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One map of two streams, channels of a then b, on the coarser of their grids.

    Args:
        a: (B, Ca, Ha, Wa) features.
        b: (B, Cb, Hb, Wb) features.

    Returns:
        (B, Ca + Cb, min(Ha, Hb), min(Wa, Wb)); a finer map is average-pooled adaptively.
    """
    height, width = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    if a.shape[2] != height or a.shape[3] != width:
        a = F.adaptive_avg_pool2d(a, (height, width))
    if b.shape[2] != height or b.shape[3] != width:
        b = F.adaptive_avg_pool2d(b, (height, width))
    return torch.cat([a, b], dim=1)
