"""A lock on a folder, which says who holds it and dies with the process that does."""

import json
import os
import platform
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Optional, Set, Union

__all__ = ['LOCK_FILE', 'FolderLock', 'only_run']

LOCK_FILE = '.lock'
_FAR = 1 << 30  # Windows lets nobody read the bytes that are locked: those beyond the end are
_held: Set[str] = set()  # the system's locks are between processes, not within one
_guard = threading.Lock()
_run = threading.Lock()


@contextmanager
def only_run() -> Iterator[None]:
    """Within, no other thread of this process has a run: they would take numbers from the same random states.

    Raises:
        RuntimeError: If another has one.
    """
    if not _run.acquire(blocking=False):
        raise RuntimeError('Another run goes on in this process, whose random states it needs: start a new process.')
    try:
        yield
    finally:
        _run.release()


def _try_lock(fd: int) -> bool:
    """Lock an open file for this process, not for those that it forks; False if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(fd, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either, as POSIX has it
        return False
    return True


class FolderLock:
    """Held from when it is made until `release`, or the end of the process, however it ends.

    Args:
        folder: Folder to lock, by a file in it.
        name: Of a file in it, there or not, to lock that alone.

    Raises:
        RuntimeError: If it is locked; the message says by whom.
        OSError: If the file system does not lock, or the file cannot be written.
    """

    def __init__(self, folder: Union[str, Path], name: Optional[str] = None):
        self.path = Path(folder).resolve() / (LOCK_FILE if name is None else f'.{name}{LOCK_FILE}')
        folder = folder if name is None else Path(folder) / name
        with _guard:
            if str(self.path) in _held:
                raise self._refused(folder, dict(pid=os.getpid(), host=platform.node()))
            _held.add(str(self.path))
        try:
            self._acquire(folder)
        except BaseException:
            _held.discard(str(self.path))
            raise

    def _acquire(self, folder: Union[str, Path]) -> None:
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _try_lock(self._fd):
                    raise self._refused(folder, self._holder())
                if self._is_there():
                    break
                os.close(self._fd)  # its holder removed it in the meantime
            except BaseException:
                os.close(self._fd)
                raise
        holder = dict(pid=os.getpid(), host=platform.node(), since=time.strftime('%Y-%m-%d %H:%M:%S'))
        os.lseek(self._fd, 0, os.SEEK_SET)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, json.dumps(holder).encode())

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _holder(self) -> Dict[str, str]:
        os.lseek(self._fd, 0, os.SEEK_SET)
        try:
            return dict(json.loads(os.read(self._fd, 1000)))
        except ValueError:  # nothing is written yet
            return {}

    @staticmethod
    def _refused(folder: Union[str, Path], holder: Dict[str, str]) -> RuntimeError:
        who = f'process {holder.get("pid", "?")} on {holder.get("host", "?")}'
        since = f', since {holder["since"]}' if 'since' in holder else ''
        return RuntimeError(f"Another run writes to '{folder}': {who}{since}.")

    def release(self) -> None:
        """Let the next one have it; again does nothing."""
        if str(self.path) in _held:
            self.path.unlink(missing_ok=True)  # while it is held: nobody locks what is gone
            os.close(self._fd)
            _held.discard(str(self.path))
