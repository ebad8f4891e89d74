"""finetune under torchrun: several processes on gloo do what one does with the same global batch."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_cases import MODEL, SMALL, make_images

from timm_bilinear.tools import session
from timm_bilinear.tools.distributed import Ranks
from timm_bilinear.tools.finetune import Stage, finetune
from timm_bilinear.tools.settings import Settings

HERE = Path(__file__).parent
STAGES = [
    dict(epochs=2, opt='sgd', lr=0.0, head_lr=1.0, weight_decay=0.0),
    dict(epochs=2, opt='sgd', lr=1e-2, head_lr=1e-1, weight_decay=1e-5),
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """21 images to train on and 9 to validate on, which two processes cannot share evenly."""
    root = make_images(tmp_path_factory.mktemp('data'), (12, 5))
    for name in ('train/rows/0', 'train/rows/1', 'train/rows/2', 'val/rows/0'):
        (root / f'{name}.png').unlink()
    return root


def _run(data, output, processes, **settings):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    script = [HERE / 'finetune_ranks.py', data, output, json.dumps(settings)]
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=str(HERE))
    command = [sys.executable, *torchrun, *map(str, script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def _rows(folder):
    with (folder / 'summary.csv').open() as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.mark.parametrize(
    'settings',
    [
        dict(head_cache=0),  # batch norm over the global batch
        # descriptors; then one step of 21 images
        dict(model_kwargs=dict(backbone_a='test_convnext'), class_weights=True, batch_size=64),
        # what all processes do alike they drop out alike
        dict(model_kwargs=dict(MODEL['model_kwargs'], drop_rate=0.5), stages=STAGES[:1]),
    ],
    ids=['batch norm', 'class weights', 'dropout'],
)
def test_two_processes_are_one(data, tmp_path, settings):
    # where the processor has bfloat16, its rounding is all that would be compared
    settings = dict(dict(stages=STAGES, amp_dtype='float32'), **settings)
    result = _run(data, tmp_path / '2', 2, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    stages = [Stage(**stage) for stage in settings['stages']]
    finetune(data, tmp_path / '1', **dict(SMALL, **dict(settings, stages=stages)))
    one, two = (_rows(tmp_path / name) for name in '12')
    for a, b in zip(one, two, strict=True):
        for key in ('train_loss', 'eval_loss', 'lr'):
            assert b[key] == pytest.approx(a[key], rel=5e-3), key
        assert abs(b['eval_top1'] - a['eval_top1']) <= 100 / 9 + 1e-6
    states = [
        torch.load(tmp_path / name / 'checkpoints' / 'last.pth.tar', weights_only=True)['state_dict'] for name in '12'
    ]
    for key, value in states[0].items():
        if value.is_floating_point():
            difference = (states[1][key] - value).norm() / value.norm().clamp(min=1e-6)
            assert difference < 2e-2, (key, difference)
    lines = result.stdout.splitlines()
    assert sum('epoch 2/2: loss' in line for line in lines) == len(stages)  # of the first process alone


def test_errors_are_those_of_all(data, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'notes.txt').write_text('mine')
    result = _run(data, tmp_path / 'notes', 2, stages=STAGES)
    assert result.returncode and result.stderr.count('is not empty') == 2


def test_batches_that_processes_cannot_share(data, tmp_path, monkeypatch):
    monkeypatch.setattr(session, 'broadcast', lambda value, ranks: value)
    settings = Settings.of(dict(SMALL, data_dir=data, output=tmp_path / 'out', batch_size=5))
    with pytest.raises(ValueError, match="'batch_size' must be a multiple of the 2 processes"):
        session.Session(settings, Ranks(world_size=2)).run()
    assert not (tmp_path / 'out').exists()


def test_the_first_process_decides(data, tmp_path, monkeypatch):
    """Last digits may differ from process to process, and so would the epoch that patience ends a stage after."""

    def of_first(value, ranks):
        return dict(value, eval_top1=50.0, eval_loss=1.0) if isinstance(value, dict) and 'eval_top1' in value else value

    monkeypatch.setattr(session, 'broadcast', of_first)
    stage = Stage(6, 'sgd', 1e-3, 1e-2, 0.0)
    finetune(data, tmp_path / 'out', **dict(SMALL, stages=[stage], patience=2))
    assert len(_rows(tmp_path / 'out')) == 3
