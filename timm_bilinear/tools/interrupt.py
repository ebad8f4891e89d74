"""Ctrl-C and SIGTERM: a run that is asked to stop says what is kept and how to go on."""

import os
import signal
import threading
from contextlib import contextmanager
from multiprocessing import popen_fork
from types import FrameType
from typing import Iterator, Optional

__all__ = ['Interrupted', 'Terminated', 'catch_signals']

# Starts a loader's process. What is raised in the hooks around its fork, which are others' (logging's, filelock's), is
# printed and lost, and right behind the fork it would leave a process that nobody knows of.
_AROUND_FORK = popen_fork.Popen._launch.__code__
_AGAIN = 0.1  # seconds after which a signal around a fork is sent again


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


def _is_around_fork(frame: Optional[FrameType]) -> bool:
    while frame is not None and frame.f_code is not _AROUND_FORK:
        frame = frame.f_back
    return frame is not None


@contextmanager
def catch_signals() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt, and neither is lost around a fork.

    In the main thread only; a handler of SIGINT that is not Python's own is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = os.getpid()

    def stop(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != main:  # a loader's process, which inherits the handler
            signal.signal(number, before[number] or signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _is_around_fork(frame):
            again = threading.Timer(_AGAIN, os.kill, (main, number))
            again.daemon = True
            again.start()
            return
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {}
    try:
        for number in numbers:
            before[number] = signal.getsignal(number)
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
