"""What of the Hugging Face Hub a push uses: a folder is sent, again after faults, and compared to what arrived."""

import hashlib
import importlib.util
from pathlib import Path
from typing import List, Tuple, Union

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from ..models.download import describe, retry

__all__ = ['file_hashes', 'upload']


def file_hashes(path: Union[str, Path]) -> Tuple[str, str]:
    """Hashes by which the Hub names a file.

    Returns:
        Tuple of hex strings: sha256, of files in LFS, and git's blob id (sha1), of the others.
    """
    path = Path(path)
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(f'blob {path.stat().st_size}\0'.encode())
    with path.open('rb') as f:
        while chunk := f.read(1 << 20):
            sha256.update(chunk)
            sha1.update(chunk)
    return sha256.hexdigest(), sha1.hexdigest()


def _different(api: HfApi, repo_id: str, repo_type: str, directory: Path) -> List[str]:
    """Names of the files whose content on the Hub, by its hashes, is not that of the folder."""
    paths = sorted(directory.iterdir())
    there = {
        info.path: info for info in api.get_paths_info(repo_id, [path.name for path in paths], repo_type=repo_type)
    }
    different = []
    for path in paths:
        sha256, blob_id = file_hashes(path)
        info = there.get(path.name)
        if info is None or (info.lfs.sha256 != sha256 if info.lfs else info.blob_id != blob_id):
            different.append(path.name)
    return different


def upload(
    api: HfApi, repo_id: str, directory: Path, private: bool, commit_message: str, is_space: bool = False
) -> str:
    """Send a folder, in one commit, and compare what is on the Hub then to it.

    Args:
        api: The Hub's client.
        repo_id: Hub repo, 'owner/name'; created if it is not there.
        directory: Folder of files.
        private: Create it private.
        commit_message: Message of the commit.
        is_space: Whether it is a Space, by Gradio, instead of a model.

    Returns:
        URL of the repo.

    Raises:
        RuntimeError: If the Hub does not take it, or has a public repo where a private one is asked for: why, in one
            sentence.
    """

    repo_type, sdk = ('space', 'gradio') if is_space else ('model', None)

    def is_public() -> bool:
        try:
            return not api.repo_info(repo_id, repo_type=repo_type).private
        except RepositoryNotFoundError:
            return False

    def commit():
        # What is there already, maybe by a commit whose answer was lost, is not sent again.
        if _different(api, repo_id, repo_type, directory):
            api.upload_folder(
                repo_id=repo_id, folder_path=directory, commit_message=commit_message, repo_type=repo_type
            )

    what = f"Push to '{repo_id}'"
    try:
        is_exposed = private and retry(what, is_public)  # which creating it again would not change
        if not is_exposed:
            url = retry(
                what,
                lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk),
            )
            retry(what, commit)
            different = retry(what, lambda: _different(api, repo_id, repo_type, directory))
    except Exception as e:
        hint = ''
        if importlib.util.find_spec('hf_xet') is not None and not constants.HF_HUB_DISABLE_XET:
            hint = ' If this Hub has no Xet storage, set HF_HUB_DISABLE_XET=1.'
        raise RuntimeError(f"Could not push to the Hugging Face Hub repo '{repo_id}': {describe(e)}.{hint}") from e
    if is_exposed:
        hint = 'make it private on its page, or choose another name'
        raise RuntimeError(f"The Hugging Face Hub repo '{repo_id}' is there and public: nothing was sent; {hint}.")
    if different:
        raise RuntimeError(f"Not what was sent is on the Hub in '{repo_id}': {', '.join(different)}. Push again.")
    return str(url)
