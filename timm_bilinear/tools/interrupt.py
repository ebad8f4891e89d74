"""Ctrl-C and SIGTERM: a run that is asked to stop says what is kept and how to go on."""

import logging
import os
import signal
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Iterator, Optional

__all__ = ['Interrupted', 'Terminated', 'catch_sigterm']


# Called around every fork, as when a loader starts its processes; what is raised in them is lost. Newer Pythons have
# none of them.
_AROUND_FORK = {
    f.__code__ for name in ('_acquireLock', '_releaseLock') if hasattr(f := getattr(logging, name, None), '__code__')
}


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the message says what is kept and how to go on.

    Args:
        message: The message.
        exit_code: Exit code that shells expect: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def catch_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = os.getpid()

    def stop(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != main:  # a loader's process, which inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if frame is not None and frame.f_code in _AROUND_FORK:
            again = threading.Timer(0.1, os.kill, (main, number))
            again.daemon = True
            again.start()
            return
        raise Terminated()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
