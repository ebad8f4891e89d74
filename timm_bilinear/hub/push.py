"""Model folders in the Hugging Face Hub's layout, config.json and model.safetensors, and their way to the Hub."""

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from timm.data import resolve_input_data_config
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import nn

from ..layers.arguments import runtime_arguments
from ..models import BilinearCNN
from .checkpoint import Trained, load_trained
from .client import upload
from .model_card import create_card

__all__ = ['push_to_hub', 'save_model']


def _unwrap(model: Any) -> nn.Module:
    """The model made by timm, out of what compiles, parallelises or averages it."""
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


def save_model(
    model: nn.Module,
    directory: Union[str, Path],
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    half: bool = False,
) -> Path:
    """Save a timm model so that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` gives it back.

    The files are written beside `directory` and moved into it once whole. The model is left as it is.

    Args:
        model: Model made by `timm.create_model`, maybe compiled, or in a wrapper that parallelises or averages it.
        directory: Folder for config.json and model.safetensors; files of these names are replaced.
        label_names: Class names in the order of the logits.
        data_config: Preprocessing used with the weights, as of `timm.data.resolve_input_data_config`.
        half: Store weight matrices in half precision; the loaded model has float32.

    Returns:
        The folder.

    Raises:
        OSError: If the files cannot be written; nothing half-written is left.
        TypeError: If the model was not made by timm.
        ValueError: If a weight is too large for half precision.
    """
    model = _unwrap(model)
    tensors = _stored_tensors(model, half)
    # What timm writes is what it is given: not the model itself, but one that says of it what is to be stored.
    stored = copy.copy(model)
    stored.state_dict = lambda: tensors
    runtime = runtime_arguments(type(model)) if isinstance(model, BilinearCNN) else ()
    stored._model_args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k not in runtime}
    model_config = dict(label_names=list(label_names)) if label_names else None
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent))
    try:
        save_for_hf(stored, partial, model_config=model_config, safe_serialization=True, data_config=data_config)
        directory.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir(), reverse=True):  # weights first, config.json makes the folder a model
            os.replace(file, directory / file.name)
    except Exception as e:
        if isinstance(e, OSError) or 'No space left' in str(e):  # safetensors raises its own error for a full disk
            raise OSError(f"Could not save the model to '{directory}': {e}") from e
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _load(
    model_or_checkpoint: Any,
    label_names: Optional[Sequence[str]],
    data_config: Optional[Dict[str, Any]],
) -> Trained:
    if isinstance(model_or_checkpoint, (str, os.PathLike)):
        trained = load_trained(model_or_checkpoint, label_names)
    else:
        model = _unwrap(model_or_checkpoint)
        trained = Trained(model, data_config=resolve_input_data_config(model))
        trained.label_names = list(label_names) if label_names else None
    if trained.label_names and len(trained.label_names) != trained.model.num_classes:
        raise ValueError(
            f"'label_names' must name {trained.model.num_classes} classes, got {len(trained.label_names)} names."
        )
    trained.data_config = dict(trained.data_config or {}, **(data_config or {}))
    return trained


def _build(trained: Trained, directory: Path, repo_id: str, dataset: Optional[str], license: Optional[str], half: bool):
    """Write everything a repo gets, and check that it gives the model back."""
    save_model(trained.model, directory, trained.label_names, trained.data_config, half)
    create_card(trained, repo_id, dataset, license).save(directory / 'README.md')
    with torch.random.fork_rng(devices=[]):  # the caller may be in the middle of training
        loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).state_dict()
    stored = load_file(directory / 'model.safetensors')
    for key, value in trained.model.state_dict().items():
        value = value.cpu().to(stored[key].dtype).to(loaded[key].dtype)
        if not torch.allclose(loaded[key], value, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(f"The folder built for '{repo_id}' does not give the model back: {key} differs.")


def _copy(repo: Path, directory: Path):
    """Copy the files of a folder that is a repo already, and check that they give a model."""
    with torch.random.fork_rng(devices=[]):
        load_trained(repo)
    directory.mkdir(parents=True, exist_ok=True)
    for path in repo.iterdir():
        if path.is_file() and not path.name.startswith('.'):
            shutil.copyfile(path, directory / path.name)


def push_to_hub(
    model_or_checkpoint: Union[nn.Module, str, Path],
    repo_id: str,
    *,
    private: bool = False,
    license: Optional[str] = None,
    dataset: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    half: bool = False,
    commit_message: str = 'Add model',
    token: Optional[str] = None,
    dry_run: Optional[Union[str, Path]] = None,
) -> str:
    """Publish a model: safetensors weights, a config that rebuilds it, and a model card.

    Everything is built and checked before the first request; afterwards the files on the Hub are compared to what was
    sent, and a commit that landed is not repeated.

    Args:
        model_or_checkpoint: Model made by `timm.create_model`, maybe compiled or wrapped, folder of `finetune`, or
            checkpoint file of timm's train script. A folder that has a README.md is a repo already, maybe of a dry run
            with a card completed by hand: its files are sent as they are, and `license` to `half` do not apply.
        repo_id: Hub repo, 'owner/name'; created if it is not there.
        private: Create it private; one that is there and public is refused.
        license: The weights' licence, as the Hub abbreviates it ('apache-2.0'); left out of the card if None.
        dataset: Name of the dataset the model was trained on, for the card.
        label_names: Class names in the order of the logits; None for those of the checkpoint, or of the data that it
            was trained on, if they are certain.
        data_config: Preprocessing the weights were trained with; None for what the checkpoint or the model says.
        half: Store weight matrices in half precision; the loaded model has float32.
        commit_message: Message of the commit.
        token: Hub token; None for the one the Hub's client finds.
        dry_run: Write the repo's files into this new folder, and send nothing.

    Returns:
        URL of the repo, or the folder of a dry run.

    Raises:
        FileExistsError: If the folder of a dry run is not empty.
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If the model was not made by timm.
        ValueError: If `repo_id`, checkpoint or `label_names` are wrong, or a weight is too large for `half`.
        RuntimeError: If the Hub does not take it, or would show what is to be private: why, in one sentence.
    """
    validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise ValueError(f"'repo_id' must be 'owner/name', got {repo_id!r}.")
    if dry_run is not None and Path(dry_run).exists() and any(Path(dry_run).iterdir()):
        raise FileExistsError(f"The folder of a dry run must be new or empty, '{dry_run}' is not.")
    is_path = isinstance(model_or_checkpoint, (str, os.PathLike))
    is_repo = is_path and Path(model_or_checkpoint, 'README.md').is_file()
    if is_repo and (license or dataset or label_names or data_config or half):
        raise ValueError(
            f"'{model_or_checkpoint}' has a README.md, so its files are sent as they are, with no other licence,"
            ' dataset, names, preprocessing or precision.'
        )
    trained = None if is_repo else _load(model_or_checkpoint, label_names, data_config)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / 'repo' if dry_run is None else Path(dry_run)
        if trained is None:
            _copy(Path(model_or_checkpoint), directory)
        else:
            _build(trained, directory, repo_id, dataset, license, half)
        if dry_run is not None:
            return str(dry_run)
        api = HfApi(token=token, library_name='timm_bilinear')
        return upload(api, repo_id, directory, private, commit_message)
