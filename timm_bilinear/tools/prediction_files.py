"""Predictions as lines, JSON or CSV, written as they come."""

import csv
import errno
import json
import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, TextIO

from ..hub.partial import partial_path
from .interrupt import Interrupted, Terminated

__all__ = ['check_targets', 'json_writer', 'open_writers', 'printable']

_CSV_HEADER = ('image', 'error', 'rank', 'name', 'index', 'probability')


def _plain(text: str) -> str:
    """Text that any encoding of Unicode takes: the bytes of a file name that are no characters are written out."""
    return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def _plain_values(value: Any) -> Any:
    """What `json` writes, with the texts in it as `_plain` has them."""
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, dict):
        return {_plain_values(k): _plain_values(v) for k, v in value.items()}
    return [_plain_values(v) for v in value] if isinstance(value, (list, tuple)) else value


def printable(text: str) -> str:
    """Text on one line, for a terminal that may not have all of its characters."""
    text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in _plain(text))
    return _encodable(text, sys.stdout)


def _encodable(text: str, f: Optional[TextIO]) -> str:
    """Text with all characters that a file's encoding lacks written out."""
    encoding = getattr(f, 'encoding', None) or 'utf-8'
    return _plain(text).encode(encoding, 'backslashreplace').decode(encoding)


@contextmanager
def _full_disk_named(target: str) -> Iterator[None]:
    """Context in which the error of a full disk, which names no file, does."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT) and e.filename is None:
            raise OSError(f"Could not write '{target}': {os.strerror(e.errno)}.") from e
        raise


def _descriptor(target: str) -> Optional[int]:
    """Open descriptor of this process that a target is, as '/dev/stdout' may be; '-' is stdout."""
    if target == '-':
        return 1
    name = Path(target).name
    standard = [fd for fd, stream in ((1, sys.stdout), (2, sys.stderr)) if stream is not None]
    for fd in (*standard, *([int(name)] if name.isdecimal() and len(name) < 5 else [])):
        with suppress(OSError):
            if os.path.samestat(os.stat(target), os.fstat(fd)):
                return fd
    return None


def _is_file(target: str) -> bool:
    """Whether a target is a file that gets its name once it is whole, not what is written at once."""
    return _descriptor(target) is None and (not Path(target).exists() or Path(target).is_file())


@contextmanager
def _opened(target: str) -> Iterator[TextIO]:
    """File to write, which gets its name once it is whole; '-' is stdout, and what is no file is written at once."""
    descriptor = _descriptor(target)
    if descriptor == 1:
        yield sys.stdout
        sys.stdout.flush()
        return
    if descriptor is not None:
        with open(os.dup(descriptor), 'w', encoding='utf-8', newline='') as f:
            yield f
        return
    path = Path(target)
    if path.exists() and not path.is_file():  # a pipe, a device
        with path.open('w', encoding='utf-8', newline='') as f:
            yield f
        return
    path = path.resolve()  # a link stays one
    with partial_path(path.parent, f'.{path.name[:50]}.', '.partial') as partial:
        with partial.open('w', encoding='utf-8', newline='') as f:
            yield f
        partial.replace(path)


@contextmanager
def json_writer(target: str) -> Iterator[Callable[[Dict[str, Any]], None]]:
    """Function that adds a dict to a JSON list in a file, which gets its name at the end; '-' is stdout."""
    with _opened(target) as f:
        is_unicode = (f.encoding or '').lower().replace('-', '').startswith('utf8')
        separator = '[\n'

        def write(result: Dict[str, Any]):
            nonlocal separator
            f.write(separator + json.dumps(_plain_values(result), ensure_ascii=not is_unicode, allow_nan=False))
            separator = ',\n'

        yield write
        f.write(('[' if separator == '[\n' else '\n') + ']\n')


@contextmanager
def _csv_writer(target: str) -> Iterator[Callable[[Dict[str, Any]], None]]:
    with _opened(target) as f:
        rows = csv.writer(f, lineterminator='\n')
        rows.writerow(_CSV_HEADER)

        def write(result: Dict[str, Any]):
            image = _encodable(result['image'], f)
            if result['error'] is not None:
                rows.writerow((image, _encodable(result['error'], f), '', '', '', ''))
            for rank, p in enumerate(result['predictions'], 1):
                rows.writerow((image, '', rank, _encodable(p['name'], f), p['index'], p['probability']))

        yield write


def _write_line(result: Dict[str, Any]):
    if result['error'] is None:
        said = ', '.join(f'{printable(p["name"])} {100 * p["probability"]:.1f} %' for p in result['predictions'])
        print(f'{printable(result["image"])}: {said}')


def check_targets(json_file: Optional[str], csv_file: Optional[str]):
    """Check that files can be written, before a model is loaded.

    Raises:
        OSError, ValueError: If one cannot be, or both are the same.
    """
    targets = {'json': json_file, 'csv': csv_file}
    targets = {name: os.fspath(target) for name, target in targets.items() if target is not None}
    descriptors = {name: _descriptor(target) for name, target in targets.items()}
    if sys.stdout is None and (not targets or '-' in targets.values()):
        raise OSError('Standard output is closed: name a file (--json FILE or --csv FILE).')
    for name, target in targets.items():
        if descriptors[name] is not None:
            continue
        path = Path(target)
        if not target or path.is_dir():
            raise ValueError(
                f"'{name}' must name a file, or '-' for stdout, got {'a folder ' if target else ''}{target!r}."
            )
        if not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"The folder of '{target}' does not exist.")
        if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            raise PermissionError(f"'{target}' cannot be written.")
    if len(targets) == 2:
        first, second = (
            str(Path(t).resolve()) if descriptors[name] is None else descriptors[name] for name, t in targets.items()
        )
        if first == second:
            raise ValueError(f"'json' and 'csv' must not both be written to '{json_file}'.")


@contextmanager
def open_writers(json_file: Optional[str], csv_file: Optional[str]) -> Iterator[List[Callable[[Dict[str, Any]], None]]]:
    """Functions that write a result of `predict`, to files that get their names at the end; without any, to stdout.

    Args:
        json_file, csv_file: File, '-' for stdout, or None.
    """
    with ExitStack() as stack:
        writers = []
        for target, writer in ((json_file, json_writer), (csv_file, _csv_writer)):
            if target is not None:
                stack.enter_context(_full_disk_named(os.fspath(target)))
                writers.append(stack.enter_context(writer(os.fspath(target))))
        try:
            yield writers or [_write_line]
        except KeyboardInterrupt as e:
            files = [os.fspath(t) for t in (json_file, csv_file) if t is not None and _is_file(os.fspath(t))]
            kept = f': {" and ".join(map(repr, files))} {"are as they were" if files[1:] else "is as it was"}'
            raise Interrupted(f'Stopped{kept if files else ""}.', 143 if isinstance(e, Terminated) else 130) from e
