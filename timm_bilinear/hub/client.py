"""What the Hugging Face Hub's client leaves out: a second try, a check of what was received, one sentence."""

import errno
import hashlib
import importlib
import logging
import time
from pathlib import Path
from typing import Callable, Optional, TypeVar, Union

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import _hub as timm_hub

from .._compat import CACHED_NO_EXIST

__all__ = ['MissingFileError', 'UnavailableError', 'describe', 'download', 'file_hashes', 'is_transient', 'retry']

_logger = logging.getLogger(__name__)
_http = importlib.import_module(HTTPError.__module__.partition('.')[0])  # httpx or its successor
_Result = TypeVar('_Result')

# Seconds between tries.
WAITS = (0.5, 1.0, 2.0, 4.0)

_ADVICE = (
    "check the repo's name and the network, set HF_ENDPOINT to a mirror or HF_HUB_OFFLINE=1 to use files cached"
    ' earlier, or create the model with pretrained=False'
)


class MissingFileError(RuntimeError, EntryNotFoundError):
    """The repo is there and lacks the file. An `EntryNotFoundError` for timm, which then looks for other names."""


class UnavailableError(RuntimeError):
    """The Hub does not give the file, for a reason other than that the repo lacks it."""


class _CorruptFileError(OSError):
    pass


def _status(error: BaseException) -> Optional[int]:
    return getattr(getattr(error, 'response', None), 'status_code', None)


def is_transient(error: BaseException) -> bool:
    """Whether another try may get past an error: the server's bad moment, a broken connection, damaged bytes.

    Not so a connection that cannot be made at all: the client has tried that for long enough.
    """
    if isinstance(error, LocalEntryNotFoundError):  # the client's wrapper of what happened before
        return error.__cause__ is not None and is_transient(error.__cause__)
    if isinstance(error, (OfflineModeIsEnabled, _http.ConnectError)):
        return False
    if _status(error) is not None:
        return _status(error) == 429 or _status(error) >= 500
    return isinstance(error, (_CorruptFileError, HTTPError, ConnectionError, TimeoutError))


def retry(what: str, run: Callable[[], _Result]) -> _Result:
    """Run, and run again after transient errors, with growing waits; the last error is raised as it is."""
    for wait in WAITS:
        try:
            return run()
        except Exception as e:
            if not is_transient(e):
                raise
            _logger.warning(f'{what}: {describe(e)}; trying again in {wait:.1f} s.')
            time.sleep(wait)
    return run()


def describe(error: BaseException) -> str:
    """Cause of an error of the Hub's client in a few words."""
    if isinstance(error, GatedRepoError):
        return 'its owner grants access on request; ask for it on its page and log in (hf auth login)'
    if isinstance(error, RepositoryNotFoundError):
        return 'there is no such repo, or it is private and HF_TOKEN has no access'
    if isinstance(error, RevisionNotFoundError):
        return 'the repo has no such revision'
    if _status(error) == 401:
        return 'HF_TOKEN is missing or wrong (401)'
    if _status(error) == 403:
        return 'access is forbidden (403); HF_TOKEN may lack the permission'
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None and _status(error.__cause__):
        return describe(error.__cause__)
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return 'the Hub cannot be reached, or HF_HUB_OFFLINE is set, and the file is not in the cache'
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')


def file_hashes(path: Union[str, Path]) -> tuple:
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


def _check(path: Path):
    """Compare a file in the cache to the hash that names it there; a damaged one is removed.

    Raises:
        _CorruptFileError: If it is damaged.
    """
    blob = path.resolve()
    if blob == path.absolute() or len(blob.name) not in (40, 64):
        return  # a cache without links: the hash is not kept
    if blob.name not in file_hashes(blob):
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise _CorruptFileError('the bytes received are not those of the Hub (their hash differs); they were not kept')


def download(
    repo_id: str,
    filename: str,
    revision: Optional[str] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    **kwargs,
) -> str:
    """`huggingface_hub.hf_hub_download` that survives a bad moment and checks what it got.

    Args:
        repo_id: Repo, 'owner/name'.
        filename: Path in it.
        revision: Branch, tag or commit.
        cache_dir: Cache folder, the client's default if None.
        **kwargs: For `hf_hub_download`.

    Returns:
        Path of the file in the cache, whose hash is the Hub's.

    Raises:
        MissingFileError: If the repo has no such file.
        UnavailableError: If the Hub does not give it otherwise: which file, why and what to do, in one sentence.
        RuntimeError: If the disk is full.
    """
    kwargs = dict(library_name='timm', library_version=timm.__version__, **kwargs)
    where = f"{filename} of the Hugging Face Hub repo '{repo_id}'"

    def run() -> str:
        path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir, **kwargs)
        _check(Path(path))
        return path

    try:
        return retry(where, run)
    except LocalEntryNotFoundError as e:
        error: BaseException = e
        if try_to_load_from_cache(repo_id, filename, cache_dir, revision) is CACHED_NO_EXIST:
            raise MissingFileError(f'There is no {where}.') from None
    except EntryNotFoundError:
        raise MissingFileError(f'There is no {where}; check its name and revision ({revision or "main"}).') from None
    except (HTTPError, OSError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            cache = cache_dir or constants.HF_HUB_CACHE
            raise RuntimeError(
                f"No space left for {where} in the cache '{cache}'; free some, or choose another by HF_HOME."
            ) from None
        if not isinstance(e, (HTTPError, ConnectionError, TimeoutError, _CorruptFileError)):
            raise
        error = e
    raise UnavailableError(f'Could not get {where}: {describe(error)}; {_ADVICE}.') from None


# timm looks the client's function up here for every file it takes from the Hub. Without this, one 503 ends
# `create_model`, damaged weights load, and a 403 on model.safetensors makes it load pickled weights instead.
timm_hub.hf_hub_download = download
