"""Model folders in the Hugging Face Hub's layout, config.json and model.safetensors, and their way to the Hub."""

import importlib.util
import os
import shutil
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import validate_repo_id
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from .checkpoint import Trained, load_trained
from .client import describe, file_hashes, retry
from .model_card import create_card

__all__ = ['push_to_hub', 'save_model']


def save_model(
    model: nn.Module,
    directory: Union[str, Path],
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
) -> Path:
    """Save a timm model so that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` gives it back.

    The files are written beside `directory` and moved into it once whole.

    Args:
        model: Model made by `timm.create_model`.
        directory: Folder for config.json and model.safetensors; files of these names are replaced.
        label_names: Class names in the order of the logits.
        data_config: Preprocessing used with the weights, as of `timm.data.resolve_model_data_config`.

    Returns:
        The folder.

    Raises:
        OSError: If the files cannot be written; nothing half-written is left.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent))
    try:
        model = model.to(memory_format=torch.contiguous_format)  # safetensors takes no other
        getattr(model, '_model_args', {}).pop('freeze_backbone', None)  # how it was trained, not what it is
        model_config = dict(label_names=list(label_names)) if label_names else None
        save_for_hf(model, partial, model_config=model_config, safe_serialization=True, data_config=data_config)
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
    model_or_checkpoint: Union[nn.Module, str, Path],
    label_names: Optional[Sequence[str]],
    data_config: Optional[Dict[str, Any]],
) -> Trained:
    if isinstance(model_or_checkpoint, nn.Module):
        trained = Trained(model_or_checkpoint, data_config=resolve_model_data_config(model_or_checkpoint))
    else:
        trained = load_trained(model_or_checkpoint)
    if label_names is not None:
        trained.label_names = list(label_names)
    if trained.label_names and len(trained.label_names) != trained.model.num_classes:
        raise ValueError(
            f"'label_names' must name {trained.model.num_classes} classes, got {len(trained.label_names)} names."
        )
    trained.data_config = dict(trained.data_config or {}, **(data_config or {}))
    return trained


def _build(trained: Trained, directory: Path, repo_id: str, dataset: Optional[str], license: Optional[str], half: bool):
    """Write everything a repo gets, and check that it gives the model back."""
    if half:
        trained.model = deepcopy(trained.model)
        for param in trained.model.parameters():
            if param.ndim > 1:  # nearly all of the bytes, and no variances, which may be too small for it
                param.data = param.data.half()
    save_model(trained.model, directory, trained.label_names, trained.data_config)
    create_card(trained, repo_id, dataset, license).save(directory / 'README.md')
    loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).state_dict()
    own = trained.model.state_dict()
    different = [key for key in own if not torch.equal(loaded[key], own[key].cpu().to(loaded[key].dtype))]
    if different:
        raise RuntimeError(f"The folder built for '{repo_id}' does not give the model back: {different[0]} differs.")


def _copy(repo: Path, directory: Path):
    """Copy the files of a folder that is a repo already, and check that they give a model."""
    load_trained(repo)
    directory.mkdir(parents=True, exist_ok=True)
    for path in repo.iterdir():
        if path.is_file() and not path.name.startswith('.'):
            shutil.copyfile(path, directory / path.name)


def _different(api: HfApi, repo_id: str, directory: Path) -> List[str]:
    """Names of the files whose content on the Hub, by its hashes, is not that of the folder."""
    paths = sorted(directory.iterdir())
    there = {info.path: info for info in api.get_paths_info(repo_id, [path.name for path in paths])}
    different = []
    for path in paths:
        sha256, blob_id = file_hashes(path)
        info = there.get(path.name)
        if info is None or (info.lfs.sha256 != sha256 if info.lfs else info.blob_id != blob_id):
            different.append(path.name)
    return different


def _upload(api: HfApi, repo_id: str, directory: Path, private: bool, commit_message: str) -> str:
    def commit():
        # What is there already, maybe by a commit whose answer was lost, is not sent again.
        if _different(api, repo_id, directory):
            api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message)

    what = f"Push to '{repo_id}'"
    try:
        url = retry(what, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        retry(what, commit)
        different = retry(what, lambda: _different(api, repo_id, directory))
    except Exception as e:
        hint = ''
        if importlib.util.find_spec('hf_xet') is not None and not constants.HF_HUB_DISABLE_XET:
            hint = ' If this Hub has no Xet storage, set HF_HUB_DISABLE_XET=1.'
        raise RuntimeError(f"Could not push to the Hugging Face Hub repo '{repo_id}': {describe(e)}.{hint}") from e
    if different:
        raise RuntimeError(f"Not what was sent is on the Hub in '{repo_id}': {', '.join(different)}. Push again.")
    return str(url)


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
        model_or_checkpoint: Model made by `timm.create_model`, folder of `finetune`, or checkpoint file of timm's train
            script. A folder that has a README.md is a repo already, maybe of a dry run with a card completed by hand:
            its files are sent as they are, and `license` to `half` do not apply.
        repo_id: Hub repo, 'owner/name'; created if it is not there.
        private: Create it private.
        license: The weights' licence, as the Hub abbreviates it ('apache-2.0'); left out of the card if None.
        dataset: Name of the dataset the model was trained on, for the card.
        label_names: Class names in the order of the logits; None for those the checkpoint knows.
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
        ValueError: If `repo_id`, checkpoint or `label_names` are wrong.
        RuntimeError: If the Hub does not take it: why, in one sentence.
    """
    validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise ValueError(f"'repo_id' must be 'owner/name', got {repo_id!r}.")
    if dry_run is not None and Path(dry_run).exists() and any(Path(dry_run).iterdir()):
        raise FileExistsError(f"The folder of a dry run must be new or empty, '{dry_run}' is not.")
    is_repo = not isinstance(model_or_checkpoint, nn.Module) and Path(model_or_checkpoint, 'README.md').is_file()
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
        return _upload(api, repo_id, directory, private, commit_message)
