"""A Space: the page of `timm-bilinear app` on the Hugging Face Hub, for a model that is there."""

import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from .client import upload
from .licenses import check_license

__all__ = ['push_space', 'write_space']

_APP = '''"""The page of {model}, which is loaded from the Hub when the Space starts."""

from timm_bilinear.tools.app import run_app

run_app('hf-hub:{model}', host='0.0.0.0', port=7860)
'''

_CARD = """---
title: {title}
emoji: 🔎
colorFrom: blue
colorTo: red
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
{license}models:
- {model}
---

Drop a picture: the classes that [{model}](https://huggingface.co/{model}) sees in it, where in the picture the evidence
for one of them lies, and for it rather than for another.

Made by `timm-bilinear push hf-hub:{model} --repo {repo} --space`.
"""


def _model_repo(model: str) -> str:
    name = model.removeprefix('hf-hub:')
    if not re.fullmatch(r'[^/\s:]+/[^/\s:]+', name) or Path(name).exists():
        raise ValueError(f'A Space shows a model that is on the Hub: give hf-hub:OWNER/NAME, got {model!r}.')
    validate_repo_id(name)
    return name


def write_space(model: str, repo_id: str, directory: Union[str, Path], license: Optional[str] = None):
    """Write the files of a Space: app.py, requirements.txt and the card.

    Args:
        model: 'hf-hub:OWNER/NAME' of a model on the Hub.
        repo_id: The Space, 'owner/name'.
        directory: New or empty folder.
        license: As the Hub abbreviates it; left out of the card if None.

    Raises:
        FileExistsError: If the folder has files.
        ModuleNotFoundError: If Gradio, whose version the card names, is not installed.
        ValueError: If a name or the licence is wrong.
    """
    name = _model_repo(model)
    validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise ValueError(f"'repo_id' must be 'owner/name', got {repo_id!r}.")
    check_license(license, None, None)
    try:
        gradio = version('gradio')
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Gradio is not installed: pip install 'timm_bilinear[app]'") from None
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"'{directory}' must be a new or empty folder.")
    directory.mkdir(parents=True, exist_ok=True)
    title = re.sub(r'[-_.]+', ' ', name.split('/')[1])
    told = f'license: {license}\n' if license else ''
    card = _CARD.format(title=title, gradio=gradio, license=told, model=name, repo=repo_id)
    (directory / 'README.md').write_text(card, encoding='utf-8')
    (directory / 'app.py').write_text(_APP.format(model=name), encoding='utf-8')
    (directory / 'requirements.txt').write_text(f'timm_bilinear[app]=={version("timm_bilinear")}\n')


def push_space(
    model: str,
    repo_id: str,
    private: bool = False,
    license: Optional[str] = None,
    commit_message: str = 'Add app',
    token: Optional[str] = None,
    dry_run: Optional[Union[str, Path]] = None,
) -> str:
    """Publish the page of a model as a Space.

    Args:
        model, repo_id, license: As for `write_space`.
        private: Create it private; one that is there and public is refused.
        commit_message: Message of the commit.
        token: Hub token; None for the one the Hub's client finds.
        dry_run: Write the files into this new folder, and send nothing.

    Returns:
        URL of the Space, or the folder of a dry run.

    Raises:
        As `write_space`, and RuntimeError if the Hub does not take it: why, in one sentence.
    """
    if dry_run is not None:
        write_space(model, repo_id, dry_run, license)
        return os.fspath(dry_run)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / 'space'
        write_space(model, repo_id, directory, license)
        api = HfApi(token=token, library_name='timm_bilinear')
        return upload(api, repo_id, directory, private, commit_message, is_space=True)
