"""What is being written, under a hidden name beside its place, and what processes that were killed left of it."""

import glob
import itertools
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Set

__all__ = ['partial_path']

_own: Set[Path] = set()  # of this process, whose number a dead one may have had in another container
_numbers = itertools.count()


def _is_alive(pid: int) -> bool:
    if os.name != 'posix':  # there the signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def partial_path(folder: Path, prefix: str, suffix: str = '') -> Iterator[Path]:
    """Context with a name, of nothing yet, for a file or folder that is to be moved once it is whole.

    What has the name at the end is removed, as are, at the start, such files and folders of processes that are dead.

    Args:
        folder: Where it is to be.
        prefix: Start of the name, before the number of the process.
        suffix: End of the name.
    """
    pattern = re.compile(rf'{re.escape(prefix)}(\d+)(-\d+)?{re.escape(suffix)}')
    for path in folder.glob(f'{glob.escape(prefix)}*'):
        match = pattern.match(path.name)
        if match and path not in _own and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            _remove(path)
    partial = folder / f'{prefix}{os.getpid()}-{next(_numbers)}{suffix}'
    _own.add(partial)
    try:
        yield partial
    finally:
        for path in folder.glob(f'{glob.escape(partial.name)}*'):
            _remove(path)
        _own.discard(partial)
