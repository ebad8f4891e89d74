"""timm's transforms of a data config, tried out before any image is read."""

import inspect
import math
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import create_transform

from .images import IMG_MODES
from .samples import reason, seeded
from .scales import VIEWS, ScaleViews

__all__ = ['draft_size', 'make_transform', 'transform_settings']

_CONFIG_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode', 'crop_border_pixels')
_ARGUMENTS = tuple(inspect.signature(create_transform).parameters)
# Arguments of create_transform that are the loader's, or make something else than one image of a size.
_LOADERS = (
    'is_training',
    'normalize',
    'use_prefetcher',
    'tf_preprocessing',
    'separate',
    *(name for name in _ARGUMENTS if name.startswith(('naflex', 'patch', 'max_seq_len'))),
)
# How many times the pixels that a transform asks for a draft of a JPEG file keeps: it is the transform's filter that
# reduces the image in the end. Three keep evaluation within one of 255 levels of what whole images give.
_TRAIN_MARGIN, _EVAL_MARGIN = 2, 3


def draft_size(settings: Dict[str, Any], is_training: bool = False) -> Optional[int]:
    """Shorter edge, in pixels, that a JPEG file must keep when it is decoded; `min_size` of `open_image`.

    Args:
        settings: Data config, and for training the arguments of `timm.data.create_transform` too.
        is_training: Whether the transform is the one for training.

    Returns:
        The size, or None where images have to be decoded whole.
    """
    if settings.get('crop_border_pixels') or settings.get('scales'):
        return None  # a border in pixels of the whole image, or parts of it at its own scale
    needed = max(settings['input_size'][-2:])
    if not is_training:
        return math.ceil(_EVAL_MARGIN * needed / (settings.get('crop_pct') or 0.875))
    if not settings.get('no_aug'):
        of_crop = settings.get('train_crop_mode') in (None, 'rrc')
        needed /= math.sqrt((settings.get('scale') or ((0.08,) if of_crop else (0.8,)))[0])
    return math.ceil(_TRAIN_MARGIN * needed)


def _per_channel(values: Sequence[float], channels: int) -> Tuple[float, ...]:
    """As timm's loader does, one average for all if a model takes other channels than the figures are for."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def transform_settings(
    data_config: Dict[str, Any],
    is_training: bool = False,
    train_size: Optional[int] = None,
    train_aug: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Arguments of `timm.data.create_transform`, of those of `create_loader`.

    A data config may also have 'scales', for the views of `ScaleViews` in evaluation.

    Raises:
        TypeError: If `train_aug` or the data config has a key that nothing takes.
        ValueError: If the model takes other images than there are.
    """
    unknown = sorted(set(data_config) - {*_CONFIG_KEYS, 'scales'})
    if unknown:
        raise TypeError(f'Nothing takes {", ".join(map(repr, unknown))} of the data config.')
    channels = data_config['input_size'][0]
    if channels not in IMG_MODES:
        raise ValueError(f'Images have 1 to {max(IMG_MODES)} channels, the model wants {channels}.')
    settings = dict(data_config)
    for key in ('mean', 'std'):
        settings[key] = _per_channel(data_config[key], channels)
    if is_training:
        if train_size:
            settings['input_size'] = (channels, train_size, train_size)
        unknown = sorted(key for key in train_aug or {} if key not in _ARGUMENTS or key in _LOADERS)
        if unknown:
            raise TypeError(f'No augmentation is called {", ".join(map(repr, unknown))}.')
        settings.update(train_aug or {})
    return settings


def _try(settings: Dict[str, Any], is_training: bool, normalize: bool) -> Callable:
    settings = dict(settings)
    has_scales = settings.pop('scales', False)
    transform = create_transform(**settings, is_training=is_training, normalize=normalize)
    channels, height, width = settings['input_size']
    if has_scales:
        transform = ScaleViews(transform, (height, width), settings.get('crop_pct') or 0.875)
        height *= VIEWS
    border = 2 * (settings.get('crop_border_pixels') or 0)
    with seeded(0):
        image = transform(Image.new(IMG_MODES[channels], (width + border, height + border)))
    if not isinstance(image, torch.Tensor) or tuple(image.shape) != (channels, height, width):
        raise ValueError(f'it does not give images of {channels} x {height} x {width}')
    return transform


def make_transform(settings: Dict[str, Any], is_training: bool, normalize: bool) -> Callable:
    """timm's transform, which has made a tensor of one image.

    Raises:
        ValueError: If it cannot be made or does not work; the message names the setting that it fails for.
    """
    try:
        return _try(settings, is_training, normalize)
    except Exception as e:  # timm's parsers raise what their values lead them to, assertions too
        common = {key: settings[key] for key in ('input_size', 'mean', 'std')}
        others = [key for key in settings if key not in common]
        blamed, why = others, reason(e)
        for keys in (['input_size'], *([key] for key in others)):
            try:
                _try({**common, keys[0]: settings[keys[0]]}, is_training, normalize)
            except Exception as own:
                blamed, why = keys, reason(own)
                break
        named = ', '.join(f'{key}={settings[key]!r}' for key in blamed)
        what = 'training' if is_training else 'evaluation'
        raise ValueError(f"timm's transform for {what} fails for {named}: {why}.") from e
