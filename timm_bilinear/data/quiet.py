"""Warnings of other libraries, which name no file, kept from the user while one of their functions runs."""

import re
import warnings
from contextlib import contextmanager
from typing import Iterator, Optional

__all__ = ['PILLOW', 'ignored']

# Modules of Pillow: images of many pixels, formats out of date, damaged EXIF data.
PILLOW = r'PIL\.'


@contextmanager
def ignored(message: Optional[str] = None, module: Optional[str] = None) -> Iterator[None]:
    """Ignores warnings by patterns of their text and of the module that gives them; for any number of threads.

    `warnings.catch_warnings` puts back the filters of all threads, and makes what was shown once be shown again. Here
    each thread takes out of the list of filters what it put in.
    """
    filters = warnings.filters  # this very list: others may exchange it meanwhile
    entry = ('ignore', message and re.compile(message), Warning, module and re.compile(module), 0)
    filters.insert(0, entry)
    try:
        yield
    finally:
        filters.remove(entry)
