"""Model folders in the Hugging Face Hub's layout: config.json and model.safetensors."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import torch
from timm.models import save_for_hf
from torch import nn

__all__ = ['save_model']


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
