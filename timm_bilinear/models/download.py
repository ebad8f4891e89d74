"""Weights from the Hugging Face Hub, and what its client leaves out: a second try, a check of hashes, one sentence."""

import errno
import importlib
import logging
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Type, TypeVar, Union

import timm
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .._compat import CACHED_NO_EXIST, HF_WEIGHTS_NAME, get_safe_alternatives, hf_split, resolve_pretrained_source

__all__ = [
    'MissingFileError',
    'UnavailableError',
    'describe',
    'download',
    'is_transient',
    'prefetch',
    'retry',
]

_logger = logging.getLogger(__name__)
_http = importlib.import_module(HTTPError.__module__.partition('.')[0])  # httpx or its successor
_Result = TypeVar('_Result')

# Seconds between tries.
WAITS = (0.5, 1.0, 2.0, 4.0)

_ADVICE = (
    "check the repo's name and the network, set HF_ENDPOINT to a mirror or HF_HUB_OFFLINE=1 to use files cached"
    ' earlier, or create the model with pretrained=False'
)


class UnavailableError(RuntimeError):
    """The Hub does not give a file: which, why and what to do, in one sentence.

    What is raised derives from the client's own error too, so that `except LocalEntryNotFoundError` and the like catch
    it as they do for any timm model.
    """

    def __reduce_ex__(self, protocol):
        return UnavailableError, self.args  # the class that is raised has no name to be pickled by


class MissingFileError(UnavailableError, EntryNotFoundError):
    """The repo is there and lacks the file."""


class _CorruptFileError(OSError):
    """The bytes received are not those of the Hub."""


def _also(base: Type[UnavailableError], error: BaseException, message: str) -> UnavailableError:
    """Error of class `base` that is one of the client's class too, with what that holds (its response)."""
    both = type(type(error).__name__, (base, type(error)), {'__module__': __name__})(message)
    vars(both).update(vars(error.__cause__ or error))
    if isinstance(error, OSError) and isinstance(error.errno, int):
        both.errno = error.errno
    return both


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
    if type(error) is OSError and error.errno is None:  # the client's, of a file of another size than announced
        return True
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


def _cached(repo_id: str, cache_dir: Optional[Union[str, Path]]) -> Set[Path]:
    """What the cache holds of a repo."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    return {path.resolve() for path in (folder / repo_folder_name(repo_id=repo_id, repo_type='model')).rglob('*')}


def _commit(path: Path, filename: str) -> str:
    """Commit of a file in the cache, where it lies at snapshots/COMMIT/FILENAME."""
    return path.parents[filename.count('/')].name


def _check(path: Path, repo_id: str, filename: str):
    """Compare a file to the hash that the Hub's API tells; a damaged one is removed.

    A mirror need not have that API, nor ETags that are hashes: what cannot be checked is taken as it is.

    Raises:
        _CorruptFileError: If it is damaged.
    """
    try:
        what = f"Hash of {filename} in '{repo_id}'"
        ask = HfApi(library_name='timm', library_version=timm.__version__).get_paths_info
        (info,) = retry(what, lambda: ask(repo_id, [filename], revision=_commit(path, filename)))
        expected = info.lfs.sha256 if info.lfs else info.blob_id
    except Exception as e:  # whatever else may answer at this address
        _logger.debug(f"{filename} of '{repo_id}' is not checked, there is no hash of it: {describe(e)}.")
        return
    with path.open('rb') as f:
        received = sha_fileobj(f).hex() if info.lfs else git_hash(f.read())
    if received != expected:
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise _CorruptFileError('the bytes received are not those of the Hub (their hash differs); they were not kept')


def download(
    repo_id: str,
    filename: str,
    revision: Optional[str] = None,
    cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """`huggingface_hub.hf_hub_download` that survives a bad moment and checks what it received.

    Args:
        repo_id: Repo, 'owner/name'.
        filename: Path in it.
        revision: Branch, tag or commit.
        cache_dir: Cache folder, the client's default if None.

    Returns:
        Path of the file in the cache. What was there before is not checked.

    Raises:
        MissingFileError: If the repo has no such file.
        UnavailableError: If the Hub does not give it for another reason, or the disk is full.
    """
    where = f"{filename} of the Hugging Face Hub repo '{repo_id}'"
    before = _cached(repo_id, cache_dir)

    def run() -> Path:
        path = Path(
            hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                cache_dir=cache_dir,
                library_name='timm',
                library_version=timm.__version__,
            )
        )
        if path.resolve() not in before:
            _check(path, repo_id, filename)
        return path

    try:
        return retry(where, run)
    except (HTTPError, OSError, EntryNotFoundError) as e:
        is_local = isinstance(e, LocalEntryNotFoundError)
        if is_local and try_to_load_from_cache(repo_id, filename, cache_dir, revision) is CACHED_NO_EXIST:
            error = _also(MissingFileError, e, f'There is no {where}.')
        elif isinstance(e, EntryNotFoundError) and not is_local:
            hint = f'check its name and revision ({revision or "main"})'
            error = _also(MissingFileError, e, f'There is no {where}; {hint}.')
        elif isinstance(e, OSError) and e.errno == errno.ENOSPC:
            cache = cache_dir or constants.HF_HUB_CACHE
            hint = 'free some, or choose another by HF_HOME'
            error = _also(UnavailableError, e, f"No space left for {where} in the cache '{cache}'; {hint}.")
        elif isinstance(e, OSError) and e.errno is not None and not isinstance(e, (ConnectionError, TimeoutError)):
            raise  # of the file system
        else:
            error = _also(UnavailableError, e, f'Could not get {where}: {describe(e)}; {_ADVICE}.')
    raise error


def _download_first(
    repo_id: str,
    filenames: List[str],
    revision: Optional[str],
    cache_dir: Optional[Union[str, Path]],
) -> str:
    """Bring the first file that a repo has into the cache, and give its commit."""
    for i, filename in enumerate(filenames):
        try:
            return _commit(download(repo_id, filename, revision, cache_dir), filename)
        except MissingFileError as error:
            missing = error
        except LocalEntryNotFoundError as e:
            # Nobody can be asked, so what a repo without this file had left in the cache has to do. A Hub that denies
            # the file gets no other loaded in its place.
            for other in filenames[i + 1 :] if (_status(e) or 500) >= 500 else ():
                cached = try_to_load_from_cache(repo_id, other, cache_dir, revision)
                if isinstance(cached, str):
                    return _commit(Path(cached), other)
            raise
    names = ', nor '.join(filenames)
    hint = f'check its name and revision ({revision or "main"})'
    missing.args = (f"The Hugging Face Hub repo '{repo_id}' has no {names}; {hint}.",)
    raise missing


def prefetch(
    pretrained_cfg: Dict[str, Any],
    cache_dir: Optional[Union[str, Path]] = None,
) -> Dict[str, Any]:
    """Bring the file of weights that timm is about to load from the Hub into the cache.

    Args:
        pretrained_cfg: Config of the model that is about to be built, as in `model.pretrained_cfg`.
        cache_dir: Cache folder, the client's default if None.

    Returns:
        Overlay for the config, by which timm takes the very file, without asking again; empty if its weights come from
        elsewhere.

    Raises:
        MissingFileError: If the repo has no weights.
        UnavailableError: If the Hub does not give them for another reason, or the disk is full.
    """
    load_from, location = resolve_pretrained_source(pretrained_cfg)
    if load_from != 'hf-hub':
        return {}
    hub_id, filename = location if isinstance(location, tuple) else (location, HF_WEIGHTS_NAME)
    custom_load = pretrained_cfg.get('custom_load', False)
    is_custom = isinstance(location, tuple) and custom_load == 'hf'  # read by the model, which wants this file alone
    filenames = [filename] if is_custom else [*get_safe_alternatives(filename), filename]
    repo_id, revision = hf_split(hub_id)
    commit = _download_first(repo_id, filenames, revision, cache_dir)
    if not re.fullmatch('[0-9a-f]{40}', commit):
        return {}  # a mirror's own way to name commits, by which it need not be asked
    return dict(hf_hub_id=f'{repo_id}@{commit}', custom_load=custom_load)
