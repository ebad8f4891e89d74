"""Predictions as lines, JSON or CSV, written as they come."""

import csv
import errno
import json
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, TextIO

__all__ = ['check_targets', 'open_writers', 'printable']

_CSV_HEADER = ('image', 'error', 'rank', 'name', 'index', 'probability')


def _plain(text: str) -> str:
    """Text that any encoding of Unicode takes: the bytes of a file name that are no characters are written out."""
    return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def printable(text: str) -> str:
    """Text on one line, for a terminal that may not have all of its characters."""
    text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in _plain(text))
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    return text.encode(encoding, 'backslashreplace').decode(encoding)


@contextmanager
def _full_disk_named(target: str) -> Iterator[None]:
    """Context in which the error of a full disk, which names no file, does."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT) and e.filename is None:
            raise OSError(f"Could not write '{target}': {os.strerror(e.errno)}.") from e
        raise


@contextmanager
def _opened(target: str) -> Iterator[TextIO]:
    """File to write, which gets its name once it is whole; '-' is stdout, and what is no file is written at once."""
    if target == '-':
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(target)
    if path.exists() and not path.is_file():  # a pipe, a device
        with path.open('w', encoding='utf-8', newline='') as f:
            yield f
        return
    path = path.resolve()  # a link stays one
    partial = path.with_name(f'.{path.name[:200]}.{os.getpid()}.partial')
    try:
        with partial.open('w', encoding='utf-8', newline='') as f:
            yield f
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _json_writer(target: str) -> Iterator[Callable[[Dict[str, Any]], None]]:
    with _opened(target) as f:
        is_unicode = (f.encoding or '').lower().replace('-', '').startswith('utf8')
        separator = '[\n'

        def write(result: Dict[str, Any]):
            nonlocal separator
            predictions = [dict(p, name=_plain(p['name'])) for p in result['predictions']]
            error = result['error'] and _plain(result['error'])
            plain = dict(image=_plain(result['image']), error=error, predictions=predictions)
            f.write(separator + json.dumps(plain, ensure_ascii=not is_unicode, allow_nan=False))
            separator = ',\n'

        yield write
        f.write(('[' if separator == '[\n' else '\n') + ']\n')


@contextmanager
def _csv_writer(target: str) -> Iterator[Callable[[Dict[str, Any]], None]]:
    with _opened(target) as f:
        rows = csv.writer(f, lineterminator='\n')
        rows.writerow(_CSV_HEADER)

        def write(result: Dict[str, Any]):
            image = _plain(result['image'])
            if result['error'] is not None:
                rows.writerow((image, _plain(result['error']), '', '', '', ''))
            for rank, p in enumerate(result['predictions'], 1):
                rows.writerow((image, '', rank, _plain(p['name']), p['index'], p['probability']))

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
    for name, target in targets.items():
        if target == '-':
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
        first, second = (t if t == '-' else str(Path(t).resolve()) for t in targets.values())
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
        for target, writer in ((json_file, _json_writer), (csv_file, _csv_writer)):
            if target is not None:
                stack.enter_context(_full_disk_named(os.fspath(target)))
                writers.append(stack.enter_context(writer(os.fspath(target))))
        yield writers or [_write_line]
