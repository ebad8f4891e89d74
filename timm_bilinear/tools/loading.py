"""A trained model by any name it goes by, and what its classes are called."""

import difflib
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import (
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    list_models,
    split_model_name_tag,
)
from timm.utils import unwrap_model
from torch import nn

from ..hub.checkpoint import load_trained
from ..hub.folder import best_checkpoint
from ..hub.labels import given_names, ordered_names
from ..models import BilinearCNN
from ..models.download import UnavailableError, describe

__all__ = ['label_descriptions', 'label_names', 'left_as_it_was', 'load', 'model_name', 'resolve_device']

_logger = logging.getLogger(__name__)

_SYNSET = re.compile(r'n\d{8}')


def _is_path(name: str) -> bool:
    """Whether a name is meant as a path, though nothing is there."""
    return name.startswith(('.', '~')) or Path(name).suffix in ('.tar', '.pth', '.pt', '.safetensors') or '\\' in name


def _check_registered(name: str):
    """Check that timm has a model of this name, with weights for every layer of it.

    Raises:
        ValueError: If not, naming what comes close.
    """
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        close = difflib.get_close_matches(architecture, list_models(), n=3, cutoff=0.7)
        hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
        if name.count('/') == 1 and not _is_path(name):
            hint = f" For a repo of the Hugging Face Hub, write 'hf-hub:{name}'."
        raise ValueError(f"'{name}' is no folder, no checkpoint file and no model that timm knows.{hint}")
    tags = [n.split('.', 1)[1] for n in list_models(f'{architecture}.*', pretrained=True) if '.' in n]
    if tag and tag not in tags:
        known = ', '.join(map(repr, tags))
        raise ValueError(f"'{architecture}' has no weights '{tag}'{f', but {known}' if tags else ''}.")
    if not tag and is_model_in_modules(architecture, ['bcnn']):
        known = ' or '.join(f"'{architecture}.{each}'" for each in tags)
        remedy = f'give {known}, or fine-tune it first' if tags else 'fine-tune it first'
        raise ValueError(f"'{name}' has weights for its streams, but none for its classifier: {remedy}.")
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(f"timm has no pretrained weights for '{name}'.")


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Context in which the Hub's client goes by its cache if nothing answers, which it tries for half a minute else."""
    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not was_offline:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _create(name: str) -> nn.Module:
    """Create a model of the Hub or of timm's registry with its weights."""
    try:
        with _offline_if_unreachable(), torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            return timm.create_model(name, pretrained=True)
    except UnavailableError as e:  # of a bilinear CNN, and one sentence already
        raise OSError(str(e).replace(', or create the model with pretrained=False', '')) from e
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as e:
        raise OSError(f"Could not get '{name}' from the Hugging Face Hub: {describe(e)}.") from e
    except SafetensorError as e:
        raise ValueError(f"The weights of '{name}' cannot be read ({e}).") from e
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        if isinstance(e, OSError) and e.errno is not None and not isinstance(e, ConnectionError):
            raise  # of the disk
        reason = lines[0].rstrip(' .:') if len(lines) == 1 else f'{lines[0].rstrip(" .:")}: {lines[1].strip()}'
        raise ValueError(f"Could not load '{name}': {reason}.") from e


def _load_path(path: str) -> Tuple[nn.Module, Optional[List[str]]]:
    """Model of a folder or of a checkpoint file, and its label names."""
    trained = load_trained(path)
    model = trained.model
    if trained.data_config:
        model.pretrained_cfg = dict(model.pretrained_cfg, **trained.data_config)
    return model, trained.label_names


def _set_imagenet_names(model: nn.Module):
    """Give one of timm's ImageNet models the names of its classes: synsets, which folders of ImageNet have too."""
    cfg = model.pretrained_cfg
    subset = None if cfg.get('label_names') or not getattr(model, 'num_classes', 0) else infer_imagenet_subset(model)
    if subset is not None and not isinstance(model, BilinearCNN):
        info = ImageNetInfo(subset)
        model.pretrained_cfg = dict(
            cfg, label_names=list(info.label_names()), label_descriptions=info.label_descriptions(as_dict=True)
        )


def resolve_device(device: Optional[Union[str, torch.device]] = None) -> torch.device:
    """Device by name; None for a GPU if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if device is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        reason = 'it must be a name' if isinstance(e, TypeError) else str(e).strip().splitlines()[0].rstrip('.')
        raise ValueError(f"'device': there is no device '{device}' here ({reason}).") from e
    return found


def load(
    model: Union[str, Path, nn.Module],
    device: Optional[Union[str, torch.device]] = None,
    label_names: Union[Sequence[str], Dict[Any, Any], str, Path, None] = None,
) -> nn.Module:
    """Load a trained model, ready for inference.

    A path that is there comes first, then timm's names. `pretrained_cfg` of the model has the preprocessing that its
    weights were trained with, and 'label_names' if they are known.

    Args:
        model: Folder of `finetune` or in the Hub's layout (of a run that has not ended, its best epoch so far is taken,
            with a warning), checkpoint file of `finetune` or of timm's train script, 'hf-hub:OWNER/NAME',
            'local-dir:DIR', name of a model with pretrained weights in timm, or a module, which is used as it is.
        device: Device to put it on; None for a GPU if there is one, and for where a given module is.
        label_names: Class names in the order of the logits, {index: name}, or a file of them, instead of its own.

    Returns:
        The model in eval mode, float32 if it was loaded, with channels-last weights.

    Raises:
        FileNotFoundError: If a path is not there, or there is no model in it.
        OSError: If files cannot be read, or the Hub does not give the weights.
        ValueError: If a name is unknown, weights are damaged or missing, or `label_names` are not as many as classes.
        TypeError: If `model` is something else, or `label_names` are.
    """
    target = None if device is None and isinstance(model, nn.Module) else resolve_device(device)
    names = given_names(label_names)
    if isinstance(model, nn.Module):
        net, found = model, None
    elif isinstance(model, (str, os.PathLike)):
        net, found = _load_name(os.fspath(model))
    else:
        raise TypeError(f"'model' must be a name, a path or a module, got {type(model).__name__}.")
    inner = unwrap_model(net)
    num_classes = getattr(inner, 'num_classes', None)
    names = None if names is None else given_names(names, len(names) if num_classes is None else num_classes)
    if names is not None or found:
        cfg = dict(getattr(inner, 'pretrained_cfg', None) or {}, label_names=found if names is None else names)
        if names is not None:
            cfg.pop('label_descriptions', None)
        inner.pretrained_cfg = cfg
    if target is not None:
        net = net.to(device=target, memory_format=torch.channels_last)
    return net.eval()


@contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Context after which a user's module has its modes, train or eval, and its label names as before."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    attributes = vars(unwrap_model(model)) if modules else {}
    cfg = {key: attributes[key] for key in ('pretrained_cfg',) if key in attributes}
    try:
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode
        attributes.pop('pretrained_cfg', None)
        attributes.update(cfg)


def _load_name(name: str) -> Tuple[nn.Module, Optional[List[str]]]:
    if not name.strip():
        raise ValueError("'model' must be a name or a path, got an empty one.")
    source, colon, place = name.partition(':')
    source = source.lower().replace('_', '-')
    if colon and source == 'local-dir':
        return _load_path(name)
    if colon and source == 'hf-hub':
        if not re.fullmatch(r'[^/@\s]+/[^/@\s]+(@[^@\s]+)?', place):
            raise ValueError(f"A model of the Hugging Face Hub is 'hf-hub:OWNER/NAME' or ...@REVISION, got '{name}'.")
        net = _create(f'hf-hub:{place}')
        if place.startswith('timm/'):
            _set_imagenet_names(net)
        return net, None
    path = Path(name).expanduser()
    is_registered = is_model(split_model_name_tag(name)[0]) and os.sep not in name
    if path.is_file() or (path.is_dir() and not (is_registered and not _holds_model(path))):
        return _load_path(name)
    if _is_path(name) or name.count('/') > 1 or name.startswith('/'):
        raise FileNotFoundError(f"There is no model '{name}': no such file or folder.")
    _check_registered(name)
    net = _create(name)
    _set_imagenet_names(net)
    return net, None


def _holds_model(folder: Path) -> bool:
    return (folder / 'config.json').is_file() or best_checkpoint(folder) is not None


def model_name(model: nn.Module) -> str:
    """timm's name of a model's architecture, with the tag of its weights; of other modules, the class."""
    inner = unwrap_model(model)
    cfg = getattr(inner, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture') or type(inner).__name__
    return f'{name}.{cfg["tag"]}' if cfg.get('tag') else name


def label_names(model: nn.Module) -> List[str]:
    """Names of a model's classes in the order of its logits: those of its `pretrained_cfg`, else '0', '1', ...

    Returns:
        As many names as the model has classes. Names for another number of classes than it has are not its own.
    """
    inner = unwrap_model(model)
    num_classes = getattr(inner, 'num_classes', None)
    names = (getattr(inner, 'pretrained_cfg', None) or {}).get('label_names')
    num_classes = num_classes if num_classes is not None else len(names or ())
    ordered = ordered_names(names, num_classes) if names else None
    if names and ordered is None:
        _logger.warning(f'The {len(names)} label names of the model are not those of its {num_classes} classes.')
    return ordered or [str(i) for i in range(num_classes)]


def label_descriptions(model: nn.Module) -> List[str]:
    """Names of a model's classes for people: the description of a class where it has one, else its label name."""
    names = label_names(model)
    described = (getattr(unwrap_model(model), 'pretrained_cfg', None) or {}).get('label_descriptions')
    if isinstance(described, dict):
        return [str(described.get(name) or name) for name in names]
    if isinstance(described, (list, tuple)) and len(described) == len(names):
        return [str(text or name) for text, name in zip(described, names)]
    if names and infer_imagenet_subset({'num_classes': len(names)}) and all(map(_SYNSET.fullmatch, names)):
        lemmas = ImageNetInfo(infer_imagenet_subset({'num_classes': len(names)})).label_descriptions(as_dict=True)
        return [lemmas.get(name, name) for name in names]
    return names
