"""Private names of timm, torch and huggingface_hub that this package uses, each with what it is needed for.

Nothing else of the package reaches for a name with an underscore, so a release of theirs that moves one breaks this
file alone, and its test says which.
"""

import torch
from huggingface_hub import _CACHED_NO_EXIST as CACHED_NO_EXIST  # the cache's note that a repo lacks a file
from timm.data.dataset_factory import _search_split as search_split  # folder of a split, as training finds it
from timm.models._builder import _resolve_pretrained_source as resolve_pretrained_source  # where weights come from
from timm.models._features import (
    FeatureGetterNet,  # features_only of a model by its forward_intermediates
    feature_take_indices,  # what `indices` of forward_intermediates means
)
from timm.models._hub import (
    HF_WEIGHTS_NAME,  # file of weights that timm loads if a config names none
    hf_split,  # 'owner/name@revision', as timm reads it
)
from timm.models._hub import _get_safe_alternatives as get_safe_alternatives  # what timm prefers to a pickle
from torch._C._functorch import is_legacy_batchedtensor as is_batched  # what autograd.grad(is_grads_batched=True) has
from torch._subclasses import FakeTensor  # what a tensor is while a graph is traced
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks  # hooks on every module's calls
from torch.utils._python_dispatch import _disable_current_modes as ordinary_tensors  # no fake ones while exporting
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper_subclass  # DTensor and its like

__all__ = [
    'CACHED_NO_EXIST',
    'FakeTensor',
    'FeatureGetterNet',
    'HF_WEIGHTS_NAME',
    'cuda_sleep',
    'feature_take_indices',
    'get_safe_alternatives',
    'has_global_hooks',
    'has_modes',
    'hf_split',
    'is_batched',
    'is_wrapper_subclass',
    'makes_other_tensors',
    'mkldnn_has_bfloat16',
    'mkldnn_linear',
    'ordinary_tensors',
    'resolve_pretrained_source',
    'search_split',
    'under_forward_ad',
    'under_transform',
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


def makes_other_tensors(device: torch.device) -> bool:
    """Whether tensors made now are not ordinary ones: fake, or a transform's. Exporters take ordinary constants."""
    if torch.compiler.is_exporting():
        return False
    return under_transform() or type(torch.empty(0, device=device)) is not torch.Tensor


def under_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp ...) is active."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0  # which torch.compile traces as it is


def has_modes() -> bool:
    """Whether a mode looks at calls: of operators (fake tensors, FLOP counters, tracers), or of PyTorch's functions."""
    return torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() > 0


def under_forward_ad() -> bool:
    """Whether forward-mode derivatives may be asked for."""
    return forward_ad._current_level >= 0
