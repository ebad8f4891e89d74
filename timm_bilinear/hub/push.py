"""Publishing: a model or a folder on its way to the Hugging Face Hub."""

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union
from urllib.parse import unquote

import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from timm.data import resolve_input_data_config
from torch import nn

from .checkpoint import Trained, load_trained
from .client import upload
from .folder import find_model
from .labels import given_names, stored_label_names
from .licenses import check_license
from .model_card import METRICS, License, create_card
from .rename import rename_card
from .save import save_model, unwrap

__all__ = ['push_to_hub', 'save_model']


_logger = logging.getLogger(__name__)

_CARD = 'README.md'
# What a repo is made of. Other files are sent if the card mentions them: those of runs name paths of the machine.
_OF_A_REPO = re.compile(r'config\.json|pytorch_model\.bin|.*\.safetensors|(LICEN[CS]E|NOTICE)(\.\w+)?')


def _load(
    model_or_checkpoint: Any,
    label_names: Optional[Sequence[str]],
    data_config: Optional[Dict[str, Any]],
    metrics: Optional[Dict[str, float]],
) -> Trained:
    if isinstance(model_or_checkpoint, (str, os.PathLike)):
        trained = load_trained(model_or_checkpoint, label_names)
    else:
        model = unwrap(model_or_checkpoint)
        names = given_names(label_names, model.num_classes) or stored_label_names(model)
        trained = Trained(model, names, resolve_input_data_config(model))
    if trained.label_names and len(trained.label_names) != trained.model.num_classes:
        raise ValueError(
            f"'label_names' must name {trained.model.num_classes} classes, got {len(trained.label_names)} names."
        )
    trained.data_config = dict(trained.data_config or {}, **(data_config or {}))
    if metrics is not None:
        trained.metrics = dict(metrics)
    return trained


def _check_metrics(metrics: Optional[Dict[str, float]]):
    for name, value in (metrics or {}).items():
        if name not in METRICS:
            raise ValueError(f"'metrics' must have names of {', '.join(METRICS)}, got {name!r}.")
        if not 0 <= value <= 100:
            raise ValueError(f"'metrics' must be in percent, got {name}={value!r}.")


def _check_dataset(dataset: Optional[str]):
    """Refuse a path for the name of a dataset: the card is for others, who have no such folder."""
    if not dataset:
        return
    is_path = os.path.isabs(dataset) or dataset.startswith(('~', '.')) or '\\' in dataset or dataset.count('/') > 1
    if is_path or ('/' in dataset and Path(dataset).exists()):
        raise ValueError(f"'dataset' must be the name of a dataset, for the card, got the path {dataset!r}.")


def _build(
    trained: Trained, data_config: Optional[Dict[str, Any]], card: ModelCard, directory: Path, repo_id: str, half: bool
):
    """Write everything a repo gets, and check that it gives the model back."""
    save_model(trained.model, directory, trained.label_names, data_config, half)
    card.save(directory / _CARD)
    with torch.random.fork_rng(devices=[]):  # the caller may be in the middle of training
        loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).state_dict()
    stored = load_file(directory / 'model.safetensors')
    for key, value in trained.model.state_dict().items():
        value = value.cpu().to(stored[key].dtype).to(loaded[key].dtype)
        if not torch.allclose(loaded[key], value, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(f"The folder built for '{repo_id}' does not give the model back: {key} differs.")


def _copy(repo: Path, directory: Path, repo_id: str):
    """Copy the files of a folder that is a repo already, whose card then names the repo that it is pushed to.

    Raises:
        ValueError: If it gives no model, its card cannot be read, or names a licence that the Hub does not know.
    """
    load_trained(repo)
    try:
        text = (repo / _CARD).read_bytes().decode()
        data = ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
        raise ValueError(f"'{repo / _CARD}' cannot be read as a card ({reason}).") from e
    licenses = data.get('license')
    for license in licenses if isinstance(licenses, list) else [licenses]:  # a hand-written card may have several
        check_license(license, data.get('license_name'), data.get('license_link'), f"'{repo / _CARD}'")
    text = rename_card(text, repo_id)
    directory.mkdir(parents=True, exist_ok=True)
    left = []
    for path in sorted(repo.iterdir()):
        if not path.is_file() or path.name.startswith('.') or path.name == _CARD:
            continue
        mentioned = re.search(rf'(?<![\w-]){re.escape(path.name)}(?![\w-]|\.\w)', f'{text}\n{unquote(text)}')
        if _OF_A_REPO.fullmatch(path.name) or (mentioned and path.name != 'args.yaml'):
            shutil.copyfile(path, directory / path.name)
        else:
            left.append(path.name)
    if left:
        _logger.warning(f'Left out of what is sent, for the card does not mention it: {", ".join(left)}.')
    (directory / _CARD).write_bytes(text.encode())


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
    license_name: Optional[str] = None,
    license_link: Optional[str] = None,
    metrics: Optional[Dict[str, float]] = None,
) -> str:
    """Publish a model: safetensors weights, a config that rebuilds it, and a model card.

    Everything is built and checked before the first request; afterwards the files on the Hub are compared to what was
    sent, and a commit that landed is not repeated.

    Args:
        model_or_checkpoint: Model made by `timm.create_model`, maybe compiled or wrapped, or what `load_trained` takes:
            folder or checkpoint file of `finetune` or of timm's train script. A folder that has a config.json and a
            README.md is a repo already, maybe of a dry run with a card completed by hand: its config, weights, licence
            and what the card mentions are sent as they are, and `license` to `half` do not apply; a card of another
            repo is made to name this one.
        repo_id: Hub repo, 'owner/name'; created if it is not there.
        private: Create it private; one that is there and public is refused.
        license: The weights' licence, as the Hub abbreviates it ('apache-2.0'); left out of the card if None.
        dataset: Name of the dataset the model was trained on, for the card; not a path.
        label_names: Class names in the order of the logits, {index: name}, or a file of them; None for those of the
            model or checkpoint, or of the data that it was trained on, if they are certain.
        data_config: Preprocessing the weights were trained with; None for what the checkpoint or the model says.
        half: Store weight matrices in half precision; the loaded model has float32.
        commit_message: Message of the commit.
        token: Hub token; None for the one the Hub's client finds.
        dry_run: Write the repo's files into this new folder, and send nothing.
        license_name: Name of the licence, if `license` is 'other'.
        license_link: Where that licence is to be read, a URL or a file of the repo.
        metrics: Figures for the card in percent, measured on the weights as they are stored: 'eval_top1', 'eval_top5'
            (validation) or 'test_top1'; None for those of the run, which with `half` are called what they are, of the
            weights before.

    Returns:
        URL of the repo, or the folder of a dry run.

    Raises:
        FileExistsError: If the folder of a dry run is not empty.
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If the model was not made by timm, or `label_names` are no names.
        ValueError: If `repo_id`, checkpoint, licence, dataset, `label_names` or `metrics` are wrong, or a weight is too
            large for `half`.
        RuntimeError: If the Hub does not take it, or would show what is to be private: why, in one sentence.
    """
    validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise ValueError(f"'repo_id' must be 'owner/name', got {repo_id!r}.")
    if dry_run is not None and (not os.fspath(dry_run) or Path(dry_run).is_file()):
        raise ValueError(f"'dry_run' must name a folder, got '{dry_run}'.")
    if dry_run is not None and Path(dry_run).exists() and any(Path(dry_run).iterdir()):
        raise FileExistsError(f"The folder of a dry run must be new or empty, '{dry_run}' is not.")
    check_license(license, license_name, license_link)
    _check_dataset(dataset)
    _check_metrics(metrics)
    is_path = isinstance(model_or_checkpoint, (str, os.PathLike))
    if is_path:
        model_or_checkpoint = find_model(model_or_checkpoint)
    is_repo = is_path and (model_or_checkpoint / _CARD).is_file()
    if is_repo and (license or dataset or label_names or data_config or half or metrics):
        raise ValueError(
            f"'{model_or_checkpoint}' has a README.md, so its files are sent as they are, with no other licence,"
            ' dataset, names, preprocessing, precision or figures.'
        )
    if not is_repo:
        trained = _load(model_or_checkpoint, label_names, data_config, metrics)
        terms = License(license, license_name, license_link) if license else None
        card = create_card(trained, repo_id, dataset, terms, half=half, is_measured=metrics is not None)
        # a model's config has sizes for tests too, which hold unless the weights were trained with something else
        is_known = data_config is None and not (is_path and model_or_checkpoint.is_file())
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / 'repo' if dry_run is None else Path(dry_run)
        if is_repo:
            _copy(model_or_checkpoint, directory, repo_id)
        else:
            _build(trained, None if is_known else trained.data_config, card, directory, repo_id, half)
        if dry_run is not None:
            return str(dry_run)
        api = HfApi(token=token, library_name='timm_bilinear')
        return upload(api, repo_id, directory, private, commit_message)
