"""A signal is not lost, whenever it comes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from timm_bilinear.tools import interrupt

ERRORS = {signal.SIGTERM: interrupt.Terminated, signal.SIGINT: KeyboardInterrupt}


def kill(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # the handler runs in here
        pass


@pytest.mark.parametrize('number', ERRORS)
def test_raised(number):
    before = {n: signal.getsignal(n) for n in ERRORS}
    with pytest.raises(KeyboardInterrupt) as e, interrupt.catch_signals():
        kill(number)
    assert e.type is ERRORS[number]
    assert {n: signal.getsignal(n) for n in ERRORS} == before


# A process is started, and the signal comes in a hook before or after the fork.
FORK = """
import multiprocessing, os, sys, time
from timm_bilinear.tools.interrupt import catch_signals
number = int(sys.argv[1])
asked = []
def hook():
    if asked:
        os.kill(os.getpid(), asked.pop())
        for _ in range(1000):
            pass
os.register_at_fork(**{sys.argv[2]: hook})
process = multiprocessing.get_context('fork').Process(target=time.sleep, args=(0.01,))
try:
    with catch_signals():
        asked.append(number)
        process.start()
        asked.clear()
        time.sleep(20)
except KeyboardInterrupt as e:
    process.join()
    print(type(e).__name__, process.exitcode)
"""


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='there is no fork here')
@pytest.mark.parametrize('hook', ['before', 'after_in_parent'])
@pytest.mark.parametrize('number', ERRORS)
def test_around_a_fork_it_comes_again(number, hook):
    """What is raised in hooks around a fork, which any library may have, is printed and lost."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, '-c', FORK, str(int(number)), hook], capture_output=True, text=True)
    assert done.stdout.split() == [ERRORS[number].__name__, '0'] and not done.stderr, done.stderr
    assert time.monotonic() - began < 20


def test_another_handler_is_left():
    def handler(number, frame):
        calls.append(number)

    calls, before = [], signal.signal(signal.SIGINT, handler)
    try:
        with interrupt.catch_signals():
            kill(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [signal.SIGINT]
