"""The command: help without torch, errors of one line with the right exit code."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

from timm_bilinear import cli
from timm_bilinear.tools.interrupt import Terminated

COMMANDS = ('finetune', 'evaluate', 'predict', 'export', 'push', 'prepare', 'benchmark')
# What the command does with its arguments, and what it has imported then.
SCRIPT = """
import sys
sys.argv = ['timm-bilinear', *sys.argv[1:]]
from timm_bilinear.cli import main
try:
    main()
finally:
    heavy = {'torch', 'timm', 'torchvision', 'huggingface_hub', 'numpy', 'PIL'} & set(sys.modules)
    print('imported', sorted(heavy))
"""


def _run(*argv, script=SCRIPT, **kwargs):
    return subprocess.run([sys.executable, '-c', script, *argv], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize('argv', [['--help'], ['--version'], *([command, '--help'] for command in COMMANDS)])
def test_help_imports_nothing_heavy(argv):
    done = _run(*argv)
    assert done.returncode == 0, done.stderr
    assert 'imported []' in done.stdout


@pytest.mark.parametrize('start', [['-m', 'timm_bilinear'], None])
def test_help_is_there_at_once(start):
    """As a user starts it: the quickest of some runs, since other processes run beside it."""
    program = os.path.join(os.path.dirname(sys.executable), 'timm-bilinear')
    command = [program] if start is None else [sys.executable, *start]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([*command, 'finetune', '--help'], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], 'COMMAND'),
        (['finetun'], 'finetun'),
        (['finetune'], '--output'),
        (['finetune', 'data'], '--output'),
        (['finetune', '--output', 'out'], 'DATA'),
        (['finetune', 'data', '--output', 'out', '--epochs', '0'], '--epochs.*at least 1.*got 0'),
        (['finetune', 'data', '--output', 'out', '--epochs', 'ten'], '--epochs.*whole number.*ten'),
        (['finetune', 'data', '--output', 'out', '--batch-size', '-3'], '--batch-size.*at least 1'),
        (['finetune', 'data', '--output', 'out', '--lr', 'nan'], '--lr.*nan'),
        (['finetune', 'data', '--output', 'out', '--lr', '0'], '--lr.*above 0'),
        (['finetune', 'data', '--output', 'out', '--hflip', '2'], '--hflip.*at most 1'),
        (['finetune', 'data', '--output', 'out', '--smoothing', '1'], '--smoothing.*below 1'),
        (['finetune', 'data', '--output', 'out', '--scale', '0.9', '0.1'], "'scale'.*ascending"),
        (['finetune', 'data', '--output', 'out', '--scale', '0', '1'], "'scale'.*above 0"),
        (['finetune', 'data', '--output', 'out', '--val-fraction', '1'], '--val-fraction.*below 1'),
        (['finetune', 'data', '--output', 'out', '--model-kwargs', 'foo'], "--model-kwargs.*'foo' is not NAME=VALUE"),
        (['finetune', 'data', '--output', 'out', '--amp', 'int8'], '--amp.*int8'),
        (['finetune', 'data', '--output', 'out', '--seed', '-1'], '--seed.*at least 0'),
        (['finetune', 'data', '--output', 'out', '--resume', '--overwrite'], "'resume'.*'overwrite'"),
        (['finetune', 'data', '--output', 'out', '--freeze', '--lr', '1'], "'lr'.*'freeze'"),
        (['predict', 'model'], 'IMAGE'),
        (['predict', 'model', 'a.jpg', '--topk', '0'], '--topk.*at least 1'),
        (['predict', 'model', 'a.jpg', '--tta', 'spin'], '--tta.*spin'),
        (['evaluate', 'model'], 'DATA'),
        (['benchmark', 'nothing'], 'nothing'),
    ],
)
def test_wrong_arguments(argv, message, tmp_path):
    """argparse's error and exit code 2, and torch is not imported for it."""
    done = _run(*argv, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=os.getcwd()))
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert 'Traceback' not in done.stderr and 'imported []' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_version():
    done = _run('--version')
    assert f' timm {timm.__version__}' in done.stdout and f'torch {torch.__version__.split("+")[0]}' in done.stdout


@pytest.mark.parametrize(
    'text, value',
    [
        ('a=1', {'a': 1}),
        ('a=1e-5', {'a': 1e-5}),
        ('a=resnet18', {'a': 'resnet18'}),
        ("a={'b':2}", {'a': {'b': 2}}),
        ('a=true', {'a': True}),
        ('a=None', {'a': None}),
        ('a=b=c', {'a': 'b=c'}),
        ('a=', {'a': ''}),
    ],
)
def test_model_arguments(text, value):
    args = cli._parser()[0].parse_args(['finetune', 'd', '--output', 'o', '--model-kwargs', text, 'z=0'])
    assert args.model_kwargs == dict(value, z=0)


def test_only_what_is_given():
    """Left out options take the run's values when it is resumed, so none has a default in the parser."""
    args = vars(cli._parser()[0].parse_args(['finetune', '--output', 'o', '--resume']))
    assert {k: v for k, v in args.items() if k != 'run'} == {'output': 'o', 'resume': True}


@pytest.mark.parametrize(
    'error, code, text',
    [
        (ValueError('two\nlines'), 'timm-bilinear: error: two lines', None),
        (
            OSError(28, 'No space left on device', 'x'),
            "timm-bilinear: error: [Errno 28] No space left on device: 'x'",
            None,
        ),
        (KeyboardInterrupt(), 130, 'Stopped.'),
        (Terminated(), 143, 'Stopped.'),
        (KeyboardInterrupt('kept: 3 epochs'), 130, 'kept: 3 epochs'),
    ],
)
def test_errors_while_running(monkeypatch, capsys, error, code, text):
    def fail(**kwargs):
        raise error

    monkeypatch.setattr(cli, '_function', lambda module, name: fail)
    with pytest.raises(SystemExit) as e:
        cli.main(['predict', 'model', 'image.jpg'])
    assert e.value.code == code
    if text:
        assert text in capsys.readouterr().err


def test_exit_code_of_a_command(monkeypatch):
    monkeypatch.setattr(cli, '_function', lambda module, name: lambda **kwargs: 1)
    with pytest.raises(SystemExit) as e:
        cli.main(['predict', 'model', 'image.jpg'])
    assert e.value.code == 1


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(number, code):
    """Any command, in the middle of what it does: one line, the exit code that shells expect."""
    script = """
import os, sys
from timm_bilinear import cli
cli._function = lambda module, name: lambda **kwargs: os.kill(os.getpid(), int(sys.argv[1]))
cli.main(['predict', 'model', 'image.jpg'])
"""
    done = _run(str(int(number)), script=script)
    assert (done.returncode, done.stderr) == (code, 'timm-bilinear: Stopped.\n')


def test_nobody_reads():
    """As in `timm-bilinear evaluate ... | true`."""
    script = """
import sys
from timm_bilinear import cli
cli._function = lambda module, name: lambda **kwargs: print('x' * 10**6)
cli.main(['export', 'model', 'model.onnx'])
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, '-c', script], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, '')
