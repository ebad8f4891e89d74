"""Private names of timm, torch and huggingface_hub that this package uses, each with what it is needed for.

Nothing else of the package reaches for a name with an underscore, so a release of theirs that moves one breaks this
file alone, and its test says which.
"""

import torch
from huggingface_hub import _CACHED_NO_EXIST as CACHED_NO_EXIST  # the cache's note that a repo lacks a file
from timm.models._features import (
    FeatureGetterNet,  # features_only of a model by its forward_intermediates
    feature_take_indices,  # what `indices` of forward_intermediates means
)
from timm.models._hub import hf_split  # 'owner/name@revision', as timm reads it

__all__ = [
    'CACHED_NO_EXIST',
    'FeatureGetterNet',
    'cuda_sleep',
    'feature_take_indices',
    'hf_split',
    'mkldnn_has_bfloat16',
    'mkldnn_linear',
]

# oneDNN's product without an epilogue; absent from builds without oneDNN.
mkldnn_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None)


def mkldnn_has_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 convolutions on this CPU, rather than emulating them."""
    supported = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
    return supported is not None and supported()


def cuda_sleep(cycles: int) -> None:
    """Keep the GPU busy, so that what a benchmark launches next waits in its queue."""
    torch.cuda._sleep(cycles)
