"""A signal is not lost, whenever it comes."""

import os
import signal
import time

import pytest

from timm_bilinear.tools import interrupt


def kill():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):  # the handler runs in here
        pass


def test_terminated():
    with pytest.raises(interrupt.Terminated), interrupt.catch_sigterm():
        kill()


def test_around_a_fork_it_comes_again(monkeypatch):
    """What is raised in Python's hooks around a fork is printed and lost."""
    monkeypatch.setattr(interrupt, '_AROUND_FORK', {kill.__code__})
    returned = False
    with pytest.raises(interrupt.Terminated), interrupt.catch_sigterm():
        kill()
        returned = True  # nothing was raised in there
        time.sleep(5)
    assert returned
