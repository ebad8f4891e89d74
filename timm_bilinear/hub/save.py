"""Model folders in the Hugging Face Hub's layout: config.json and model.safetensors, written whole."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import nn

from ..layers.arguments import runtime_arguments
from ..models import BilinearCNN
from .labels import given_names, stored_label_names
from .partial import partial_path

__all__ = ['save_model', 'unwrap']


def unwrap(model: Any) -> nn.Module:
    """The model made by timm, out of what compiles, parallelises or averages it.

    Raises:
        TypeError: If there is none.
    """
    inner = unwrap_model(model)
    is_made_by_timm = isinstance(inner, nn.Module) and 'architecture' in (getattr(inner, 'pretrained_cfg', None) or ())
    if not is_made_by_timm or not hasattr(inner, 'num_classes'):
        hint = 'without features_only, or a wrapper of one'
        raise TypeError(f"'model' must be made by timm.create_model, {hint}, got {type(inner).__name__}.")
    return inner


def _stored_tensors(model: nn.Module, half: bool) -> Dict[str, torch.Tensor]:
    """State dict as it is stored: every tensor contiguous and by itself, as safetensors wants them.

    Raises:
        ValueError: If a weight is too large for half precision.
    """
    # Matrices are nearly all of the bytes, and no variances, which may be too small for it.
    params = model.named_parameters(remove_duplicate=False) if half else ()
    matrices = {name for name, param in params if param.ndim > 1 and param.is_floating_point()}
    tensors, storages = {}, set()
    for name, value in model.state_dict().items():
        if name in matrices:
            stored = value.half()
            if not stored.isfinite().all():
                largest, limit = value.abs().max().item(), torch.finfo(torch.float16).max
                raise ValueError(f"Half precision ends at {limit:g}: the largest value of '{name}' is {largest:g}.")
        else:
            stored = value
        is_tied = stored.untyped_storage().data_ptr() in storages and stored.numel() > 0
        tensors[name] = stored.clone(memory_format=torch.contiguous_format) if is_tied else stored.contiguous()
        storages.add(tensors[name].untyped_storage().data_ptr())
    return tensors


def _labels(model: nn.Module, label_names: Optional[Sequence[str]]) -> Dict[str, Any]:
    """Names of the classes, given or the model's own, and what the model has to say of them."""
    names = given_names(label_names, model.num_classes) or stored_label_names(model)
    if not names:
        return {}
    described = (getattr(model, 'pretrained_cfg', None) or {}).get('label_descriptions')
    if not isinstance(described, dict):
        return dict(label_names=names)
    described = {name: described[name] for name in names if name in described}
    return dict(label_names=names, **(dict(label_descriptions=described) if described else {}))


@contextlib.contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """Context with a new hidden folder in a folder, which is made if it is not there; a failure leaves neither."""
    if directory.is_symlink() and not directory.exists():
        raise OSError('it is a link to nothing')
    if directory.exists() and not directory.is_dir():
        raise OSError('it is a file, not a folder')
    made: List[Path] = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        if made:
            directory.mkdir(parents=True, exist_ok=True)
        with partial_path(directory, '.partial-') as partial:
            partial.mkdir()
            yield partial
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, so that it is not only ours
            for path in made:
                path.rmdir()
        raise


def save_model(
    model: nn.Module,
    directory: Union[str, Path],
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    half: bool = False,
) -> Path:
    """Save a timm model so that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` gives it back.

    The files are written into a hidden folder in `directory` and get their names once whole: nothing else of the disk
    is touched, so that `directory` may be a mount point, a link, or in a folder that cannot be written to. The model is
    left as it is.

    Args:
        model: Model made by `timm.create_model`, maybe compiled, or in a wrapper that parallelises or averages it.
        directory: Folder for config.json and model.safetensors; files of these names are replaced.
        label_names: Class names in the order of the logits, {index: name}, or a file of them; None for those in the
            model's `pretrained_cfg`, if any.
        data_config: Preprocessing used with the weights, as of `timm.data.resolve_input_data_config`.
        half: Store weight matrices in half precision; the loaded model has float32.

    Returns:
        The folder.

    Raises:
        OSError: If the files cannot be written; nothing half-written is left.
        TypeError: If the model was not made by timm.
        ValueError: If a weight is too large for half precision, or `label_names` are not as many as classes.
    """
    if not os.fspath(directory):
        raise ValueError("'directory' must name a folder, got ''.")
    model = unwrap(model)
    tensors = _stored_tensors(model, half)
    # What timm writes is what it is given: not the model itself, but one that says of it what is to be stored.
    stored = copy.copy(model)
    stored.state_dict = lambda: tensors
    runtime = runtime_arguments(type(model)) if isinstance(model, BilinearCNN) else ()
    stored._model_args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k not in runtime}
    # names are said once, above the config of the preprocessing
    of_labels = ('label_names', 'label_descriptions')
    stored.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in of_labels}
    labels = _labels(model, label_names)
    directory = Path(directory)
    try:
        with _folder(directory) as partial:
            save_for_hf(stored, partial, model_config=labels, safe_serialization=True, data_config=data_config)
            config, weights = partial / 'config.json', partial / 'model.safetensors'
            with contextlib.suppress(OSError):  # safetensors lets nobody else read; the umask, or the folder, decides
                weights.chmod(config.stat().st_mode & 0o7777)
            for file in (weights, config):  # weights first, config.json makes the folder a model
                os.replace(file, directory / file.name)
    except Exception as e:
        # safetensors and torch raise errors of their own for a full disk
        if isinstance(e, (OSError, SafetensorError)) or 'No space left' in str(e):
            reason = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).splitlines()[0].rstrip('.')
            raise OSError(f"Could not save the model to '{directory}': {reason}.") from e
        raise
    return directory
