"""What predict, evaluate, explain and index share: a model by any name, its precision, its logits."""

import logging
import math
import operator
import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.utils import unwrap_model
from torch import nn

from .._compat import mkldnn_has_bfloat16
from .loading import label_descriptions, label_names, left_as_it_was, load, model_name, resolve_device
from .settings import AMP_DTYPES

__all__ = [
    'AMP_DTYPES',
    'TTA',
    'autocast',
    'batch_logits',
    'bfloat16_pays',
    'check_choice',
    'label_descriptions',
    'label_names',
    'left_as_it_was',
    'load',
    'model_name',
    'precision',
    'predict_logits',
    'resolve_amp_dtype',
    'resolve_device',
    'resolve_tta',
    'view_data_config',
    'view_log_weights',
    'views',
    'whole_number',
]

_logger = logging.getLogger(__name__)

TTA = ('auto', 'none', 'flip', 'crops', 'scales')
# 'crops' cuts from images whose edges are this much longer than the model's input, as 256 pixels for crops of 224.
_CROP_SCALE = 8 / 7
# How much less a view of 'scales' counts whose probabilities have an entropy higher by 1: exp(-2).
_CERTAINTY = 2.0


def whole_number(name: str, value: Any, least: int, most: Optional[int] = None) -> int:
    """Check a number that a user gives, of Python or numpy.

    Raises:
        TypeError: If it is no whole number, by name.
        ValueError: If it is too small or too large, by name.
    """
    bounds = f'at least {least}' if most is None else f'{least} to {most}'
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"'{name}' must be a whole number of {bounds}, got {value!r}.")
    if number < least or (most is not None and number > most):
        raise ValueError(f"'{name}' must be {bounds}, got {number}.")
    return number


def check_choice(name: str, word: Optional[str], words: Sequence[str]) -> None:
    """Check a word that a user gives, or None.

    Raises:
        ValueError: If it is none of those possible, by name.
    """
    if word is not None and word not in words:
        raise ValueError(f"'{name}' must be one of {', '.join(map(repr, words))}, got {word!r}.")


@lru_cache(maxsize=1)
@torch.inference_mode()
def bfloat16_pays() -> bool:
    """Whether a convolution takes clearly less time in bfloat16 than in float32 on this CPU, measured once, in 50 ms.

    That it has the instructions does not tell: processors made to multiply in AMX tiles take twice float32's time where
    a virtual machine hides those.
    """
    seconds = {}
    with torch.autocast('cpu', enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (torch.ones(n, 64, side, side, dtype=dtype) for n, side in ((8, 28), (64, 3)))
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
            times = [time.perf_counter()]
            for _ in range(5):
                F.conv2d(x, weight, padding=1)
                times.append(time.perf_counter())
            seconds[dtype] = min(end - start for start, end in pairwise(times))
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def resolve_amp_dtype(name: Optional[str], device: torch.device) -> Optional[torch.dtype]:
    """Dtype to autocast to, from its name.

    Args:
        name: 'auto' for bfloat16 where the hardware is faster in it, 'bfloat16', 'float16', or 'float32' and None for
            none.
        device: Device to compute on.

    Returns:
        None for float32: if it is asked for, and where a CPU does not support the dtype. It would be emulated there,
        at a thirteenth of float32's speed (bcnn_resnet18 to stage 3 with AVX2: 4 against 51 images/s).

    Raises:
        ValueError: If there is no such name.
    """
    check_choice('amp', name, AMP_DTYPES)
    if name in (None, 'float32'):
        return None
    if device.type == 'cpu' and (name == 'float16' or not mkldnn_has_bfloat16()):
        if name != 'auto':
            _logger.warning(f'This CPU has no {name} convolutions: going on in float32.')
        return None
    if name == 'auto':
        if device.type == 'cpu':
            is_fast = bfloat16_pays()
        else:
            is_fast = device.type == 'cuda' and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
        return torch.bfloat16 if is_fast else None
    return getattr(torch, name)


def autocast(device: torch.device, amp_dtype: Optional[torch.dtype]) -> AbstractContextManager:
    """Context of autocast to a dtype of `resolve_amp_dtype`; of nothing for None."""
    return nullcontext() if amp_dtype is None else torch.autocast(device.type, dtype=amp_dtype)


def precision(model: nn.Module, amp_dtype: Optional[torch.dtype]) -> str:
    """Name of the dtype that a model computes in: of autocast, or of its weights."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(amp_dtype or next(dtypes, torch.float32)).removeprefix('torch.')


def resolve_tta(model: nn.Module, tta: Optional[str]) -> Optional[str]:
    """Views to take the mean of, from a name.

    Args:
        model: The model.
        tta: 'flip', 'crops', 'scales'; 'none' and None for the image alone; 'auto' for 'scales' with a model that wants
            images padded whole (`crop_mode` 'border'), whose subject may then have any size, else for none.

    Raises:
        ValueError: If there is no such name.
    """
    check_choice('tta', tta, TTA)
    if tta == 'auto':
        config = resolve_input_data_config(unwrap_model(model))
        return 'scales' if config.get('crop_mode') == 'border' else None
    return None if tta == 'none' else tta


def view_data_config(model: nn.Module, tta: Optional[str] = None) -> Dict[str, Any]:
    """Preprocessing of the images that `predict_logits` is to be given.

    Args:
        model: The model.
        tta: As for `predict_logits`; for 'crops' images are larger than the model's input.

    Returns:
        Arguments for `create_loader`, or of `make_transform`; those of `timm.data.create_transform` but for 'scales'.

    Raises:
        ValueError: If there is no such `tta`.
    """
    tta = resolve_tta(model, tta)
    config = resolve_input_data_config(unwrap_model(model))
    if tta == 'scales':
        config['scales'] = True
    if tta == 'crops':
        channels, *size = config['input_size']
        scale = max(_CROP_SCALE, 1 / config['crop_pct'])
        config.update(input_size=(channels, *(math.floor(edge * scale) for edge in size)), crop_pct=1.0)
    return config


def views(images: torch.Tensor, tta: Optional[str], size: Optional[Tuple[int, int]] = None) -> Iterator[torch.Tensor]:
    """Views of a batch of images: itself and its mirror image ('flip'), corners and centre ('crops'), or the views that
    lie one below another in it ('scales').

    Args:
        images: (B, C, H, W), as `view_data_config` of the model and `tta` gives them.
        tta: 'flip', 'crops', 'scales' or None for the images alone.
        size: Height and width of the model's input, for 'crops' and 'scales'.
    """
    if tta == 'scales':
        yield from images.split(size[0], dim=-2)
        return
    if tta != 'crops':
        yield images
        if tta == 'flip':
            yield images.flip(-1)
        return
    down, right = images.shape[-2] - size[0], images.shape[-1] - size[1]
    if down < 0 or right < 0:
        raise ValueError(f"Images of {tuple(images.shape[-2:])} are too small for 'crops' of {tuple(size)}.")
    for top, left in ((0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))):
        yield images[..., top : top + size[0], left : left + size[1]]


@torch.inference_mode()
def batch_logits(
    model: nn.Module,
    images: torch.Tensor,
    amp_dtype: Optional[torch.dtype] = None,
    tta: Optional[str] = None,
) -> torch.Tensor:
    """Logits of a batch of images.

    Args:
        model: The model, in eval mode.
        images: (B, C, H, W) on the model's device, preprocessed by `view_data_config(model, tta)`.
        amp_dtype: Dtype to autocast to, None for the model's own.
        tta: 'flip', 'crops' or 'scales' for the mean of the probabilities of several views; see `resolve_tta`. Of views
            at several scales those count more that the model is certain about: some show too little.

    Returns:
        (B, K) float32; with several views, logarithms of the mean probabilities.
    """
    tta = resolve_tta(model, tta)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    size = view_data_config(model)['input_size'][1:] if tta in ('crops', 'scales') else None
    logits = []
    for view in views(images, tta, size):
        with autocast(images.device, amp_dtype):
            out = model(view.to(dtype, memory_format=torch.channels_last))
        if not isinstance(out, torch.Tensor):
            raise ValueError(f"'model' must give a tensor of logits, got {type(out).__name__}.")
        logits.append(out.float())
    if len(logits) == 1:
        return logits[0]
    logits = torch.stack(logits)
    return (logits.log_softmax(-1) + view_log_weights(logits, tta)).logsumexp(0)


def view_log_weights(logits: torch.Tensor, tta: Optional[str]) -> torch.Tensor:
    """Logarithms of the weights (V, B, 1) of views in the mean of their probabilities, from their logits (V, B, K)."""
    if tta != 'scales':
        return logits.new_full((len(logits), 1, 1), -math.log(len(logits)))
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)
    return (-_CERTAINTY * entropy).log_softmax(0)


def predict_logits(
    model: nn.Module,
    loader: Iterable[Tuple[torch.Tensor, Any]],
    device: torch.device,
    amp_dtype: Optional[torch.dtype] = None,
    tta: Optional[str] = None,
) -> Iterator[Tuple[torch.Tensor, Any]]:
    """Logits of a model, batch by batch.

    Args:
        model: The model, in eval mode on `device`.
        loader: Gives (images (B, C, H, W), anything), preprocessed by `view_data_config(model, tta)`.
        device: Device to compute on.
        amp_dtype: Dtype to autocast to, None for float32.
        tta: As for `batch_logits`.

    Yields:
        Logits (B, K), float32 on `device`, as of `batch_logits`, and what the loader gave beside the images.
    """
    for images, targets in loader:
        yield batch_logits(model, images.to(device), amp_dtype, tta), targets
