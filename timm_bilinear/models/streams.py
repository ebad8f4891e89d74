"""Streams of a bilinear CNN: any timm backbone as a feature extractor."""

import difflib
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.models import (
    PretrainedCfg,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    register_notrace_function,
)

from .._compat import ordinary_tensors
from .download import prefetch
from .levels import add_class_token, narrow_stream, set_last_stride
from .pretrained import check_backbone_weights

__all__ = [
    'concat_levels',
    'concat_streams',
    'create_stream',
    'create_streams',
    'first_convs',
    'input_config',
    'match_grid',
]

_logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BUILD_ERRORS = (TypeError, ValueError, LookupError, RuntimeError, AttributeError, AssertionError)
# What the model itself tells its backbones.
_SHARED_ARGS = {
    *('in_chans', 'img_size', 'device', 'dtype', 'features_only', 'out_indices', 'cache_dir'),
    *('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path'),
}
_UNEXPECTED_ARG = re.compile(r"unexpected keyword argument '(\w+)'")


def _resolve_backbone(arg: str, backbone: str) -> str:
    """Check that a backbone is a model of timm's registry.

    Args:
        arg: Name of the argument, for the error.
        backbone: timm model name, with or without tag.

    Returns:
        Its name, the current one if timm has renamed it.

    Raises:
        ValueError: If it is unknown, or a bilinear CNN itself.
    """
    arch, _, tag = backbone.partition('.')
    if not is_model(arch):
        close = difflib.get_close_matches(arch, timm.list_models(), 3)
        hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
        raise ValueError(f"'{arg}' must be the name of a timm model, got {backbone!r}.{hint}")
    if is_model_in_modules(arch, ['bcnn']):
        raise ValueError(f"'{arg}' must be a backbone, got the bilinear CNN {backbone!r}.")
    deprecated = get_deprecated_models()
    while arch in deprecated:
        if not deprecated[arch]:
            raise ValueError(f"'{arg}': timm has removed {backbone!r}.")
        arch, _, current_tag = deprecated[arch].partition('.')
        tag = tag or current_tag
    backbone = f'{arch}.{tag}' if tag else arch
    try:
        get_pretrained_cfg(backbone)
    except RuntimeError as e:  # unknown tag
        raise ValueError(f"'{arg}': {e}") from None
    return backbone


def _backbone_cfg(backbone: str) -> PretrainedCfg:
    """Config of a backbone; timm's defaults for one that is registered without."""
    return get_pretrained_cfg(backbone) or PretrainedCfg()


def _create_features(backbone: str, device=None, dtype=None, **kwargs) -> nn.Module:
    """Create a feature net of a timm model, also of one whose constructor knows neither device nor dtype."""
    try:
        return timm.create_model(backbone, features_only=True, device=device, dtype=dtype, **kwargs)
    except TypeError as e:
        unexpected = _UNEXPECTED_ARG.search(str(e))
        if unexpected is None or unexpected[1] not in ('device', 'dtype'):
            raise
    return timm.create_model(backbone, features_only=True, **kwargs).to(device=device, dtype=dtype)


def _probe(backbone: str, **kwargs) -> Union[nn.Module, Exception]:
    """A feature net on the meta device, or what keeps it from being built."""
    # It may be asked for while fake tensors are made; and one that knows no device draws its weights.
    with ordinary_tensors(), torch.random.fork_rng(devices=[]):
        try:
            probe = _create_features(backbone, **dict(kwargs, device='meta'))
            return probe if probe.feature_info.info else NotImplementedError('it has no feature levels')
        except _BUILD_ERRORS as e:
            return e


def _takes(backbone: str, name: str, value: Any, **kwargs) -> bool:
    """Whether a backbone can be built with an argument, or cannot be built anyway."""
    kwargs.pop(name, None)
    failed = isinstance(_probe(backbone, **kwargs, **{name: value}), Exception)
    return not failed or isinstance(_probe(backbone, **kwargs), Exception)


def _refused(arg: str, backbone: str, backbone_args: Dict[str, Any], names: Sequence[str]) -> ValueError:
    """Error that names arguments which a backbone does not take."""
    arg = arg.replace('backbone', 'backbone_args').removesuffix('_a')
    listed = ', '.join(f'{name}={backbone_args[name]!r}' for name in names)
    return ValueError(f"'{arg}': the backbone {backbone!r} does not take {listed}.")


def create_stream(
    arg: str,
    backbone: str,
    out_indices: Sequence[int] = (-1,),
    all_levels: bool = False,
    last_stride: Optional[int] = None,
    class_token: bool = False,
    pretrained: bool = False,
    cache_dir: Optional[Union[str, Path]] = None,
    img_size: Optional[Union[int, Tuple[int, int]]] = None,
    backbone_args: Optional[Dict[str, Any]] = None,
    **kwargs,
) -> nn.Module:
    """Create a backbone that ends at one of its feature levels.

    Args:
        arg: Name of the argument that `backbone` came by, for errors.
        backbone: timm model name, with or without tag.
        out_indices: Levels of timm's `feature_info` that the stream returns, at the last of which it ends; negative
            ones count from the last there is.
        all_levels: Return every level up to it, not these alone.
        last_stride: Stride of the last stage.
        class_token: Return the class token too, as a last map.
        pretrained: Load the backbone's own weights.
        cache_dir: Cache folder for them.
        img_size: Input size, for backbones built for one size; others ignore it.
        backbone_args: Arguments of the backbone's own.
        **kwargs: For `timm.create_model`.

    Returns:
        Module that takes images and returns a list of feature maps; its `feature_info` describes all levels up to its
        last.

    Raises:
        ValueError: If the backbone is unknown, has no spatial features, no such level or no such argument.
        RuntimeError: If pretrained weights cannot be had.
    """
    given, backbone = backbone, _resolve_backbone(arg, backbone)
    if backbone.split('.')[0] != given.split('.')[0]:
        warnings.warn(f'Mapping deprecated model name {given} to current {backbone}.', stacklevel=2)
    if _backbone_cfg(backbone).fixed_input_size and img_size is not None:
        kwargs['img_size'] = img_size
    backbone_args = backbone_args or {}
    if refused := [name for name in backbone_args if name in _SHARED_ARGS]:
        raise _refused(arg, backbone, backbone_args, refused)
    probe = _probe(backbone, **dict(kwargs, **backbone_args))
    if isinstance(probe, Exception):
        if refused := [name for name, value in backbone_args.items() if not _takes(backbone, name, value, **kwargs)]:
            raise _refused(arg, backbone, backbone_args, refused) from probe
        raise ValueError(f"'{arg}': {backbone!r} has no spatial features for a bilinear CNN ({probe}).") from probe
    levels = len(probe.feature_info.info)
    arg_of_levels = arg.replace('backbone', 'out_index' if len(out_indices) == 1 else 'out_indices')
    for index in out_indices:
        if not -levels <= index < levels:
            raise ValueError(f"'{arg_of_levels}' must be in [{-levels}, {levels}) for {backbone!r}, got {index}.")
    chosen = sorted({index % levels for index in out_indices})
    if len(chosen) < len(out_indices):
        raise ValueError(f"'{arg_of_levels}' must be different levels of {backbone!r}, got {tuple(out_indices)}.")
    if pretrained:
        check_backbone_weights(backbone)
        overlay = prefetch(getattr(probe, 'pretrained_cfg', {}), cache_dir)
        backbone_args = dict(backbone_args, pretrained_cfg_overlay=overlay)
    # Some of timm's networks describe levels that no layer of theirs gives.
    built = tuple(i for i in range(chosen[-1] + 1) if probe.feature_info[i]['module'] or i in chosen)
    stream = _create_features(
        backbone, pretrained=pretrained, cache_dir=cache_dir, out_indices=built, **dict(kwargs, **backbone_args)
    )
    if last_stride is not None and not set_last_stride(stream, chosen[-1], last_stride):
        raise ValueError(
            f"'last_stride': {backbone!r} has no strided convolutions in its last stage, or more that is strided."
        )
    if not all_levels:
        narrow_stream(stream, chosen)
    if class_token:
        stream = add_class_token(stream)
        if stream is None:
            raise ValueError(f"'class_token': {backbone!r} has none.")
    return stream


def create_streams(
    backbones: Sequence[Optional[str]],
    out_indices: Sequence[Sequence[int]],
    backbone_args: Sequence[Optional[Dict[str, Any]]],
    drop_args: Dict[str, Optional[float]],
    bn_args: Dict[str, Optional[float]],
    **kwargs,
) -> List[Optional[nn.Module]]:
    """Create the streams of a model, with what goes to those of them that have it.

    Args:
        backbones: timm model names of streams a and b, None for no stream.
        out_indices: Levels that each returns.
        backbone_args: Arguments of each backbone's own.
        drop_args: Drop rates, by the backbones' names of them; None leaves the backbones' defaults.
        bn_args: Attributes of batch norms; None leaves them.
        **kwargs: For `create_stream`, of both.

    Returns:
        The streams.

    Raises:
        ValueError: As `create_stream`, or if no stream has what an argument is for.
    """
    drop_args = {name: value for name, value in drop_args.items() if value is not None}
    bn_args = {name: value for name, value in bn_args.items() if value is not None}
    unused = {name for name, value in drop_args.items() if value}
    streams: List[Optional[nn.Module]] = []
    for arg, backbone, levels, args in zip(('backbone_a', 'backbone_b'), backbones, out_indices, backbone_args):
        if backbone is None:
            streams.append(None)
            continue
        resolved = _resolve_backbone(arg, backbone)
        taken = {name: value for name, value in drop_args.items() if _takes(resolved, name, value)}
        unused -= set(taken)
        streams.append(create_stream(arg, backbone, levels, backbone_args=args, **taken, **kwargs))
    norms = [m for stream in streams if stream is not None for m in stream.modules() if isinstance(m, _BATCH_NORMS)]
    listed = ' or '.join(repr(backbone) for backbone in backbones if backbone is not None)
    for name in sorted(unused):
        raise ValueError(f"'{name}' is not an argument of the backbone {listed}.")
    for name, value in bn_args.items():
        if not norms:
            raise ValueError(f"'{name}' has no batch norm to go to in the backbone {listed}.")
        for norm in norms:
            setattr(norm, name.removeprefix('bn_'), value)
    return streams


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
            cfgs.append(_backbone_cfg(_resolve_backbone(arg, backbone)))
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


def _averaging(size: int, bins: int) -> List[List[float]]:
    """Matrix (bins, size) of the means over the bins of adaptive average pooling."""
    edges = [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]
    return [[float(start <= k < end) / (end - start) for k in range(size)] for start, end in edges]


def _exportable_pool(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`F.adaptive_avg_pool2d` by operators that every ONNX exporter has, for any sizes that are known."""
    sizes, bins = (int(x.shape[2]), int(x.shape[3])), (height, width)
    if sizes[0] % height == 0 and sizes[1] % width == 0:
        return F.avg_pool2d(x, (sizes[0] // height, sizes[1] // width))
    rows, columns = (x.new_tensor(_averaging(size, n)) for size, n in zip(sizes, bins))
    return rows @ x @ columns.T


@register_notrace_function
def match_grid(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Average-pool a map adaptively where another map's grid is coarser.

    Args:
        x: (B, C, H, W) features.
        other: (B, Co, Ho, Wo) features.

    Returns:
        (B, C, min(H, Ho), min(W, Wo)); `x` itself if its grid is no finer.
    """
    if not torch.jit.is_scripting():
        if isinstance(x, torch.fx.Proxy):  # a node of the graph, which does not know sizes
            return x.tracer.create_proxy('call_function', match_grid, (x, other), {})
    height, width = min(x.shape[2], other.shape[2]), min(x.shape[3], other.shape[3])
    if x.shape[2] == height and x.shape[3] == width:
        return x
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
            if torch.jit.is_tracing() or all(isinstance(s, int) for s in (*x.shape[2:], height, width)):
                return _exportable_pool(x, int(height), int(width))
    return F.adaptive_avg_pool2d(x, (height, width))


@register_notrace_function
def concat_streams(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One map of two, channels of a then b, on the coarser of their grids.

    Args:
        a: (B, Ca, Ha, Wa) features.
        b: (B, Cb, Hb, Wb) features.

    Returns:
        (B, Ca + Cb, min(Ha, Hb), min(Wa, Wb)); a finer map is average-pooled adaptively.
    """
    return torch.cat([match_grid(a, b), match_grid(b, a)], dim=1)


def concat_levels(maps: List[torch.Tensor]) -> torch.Tensor:
    """One map of several levels of a stream, on the grid of the last, which is the coarsest.

    Args:
        maps: (B, C, H, W) features of levels in the order of their depth.

    Returns:
        (B, sum of C, H, W); finer maps are average-pooled adaptively.
    """
    return torch.cat([match_grid(m, maps[-1]) for m in maps], dim=1)
