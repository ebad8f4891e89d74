"""Runs that are cut off: resumed they give, bit for bit, what they would have given in one go."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_cases import SMALL, assert_same_checkpoints, digests, make_images

from timm_bilinear.tools.finetune import Interrupted, Stage, finetune
from timm_bilinear.tools.frozen import FrozenStage
from timm_bilinear.tools.training import ImageStage

HERE = Path(__file__).parent
STAGES = [Stage(2, 'sgd', 0.0, 1.0, 0.0), Stage(2, 'sgd', 1e-3, 1e-2, 1e-5)]
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from finetune_cases import SMALL
from timm_bilinear.tools.finetune import Interrupted, finetune
try:
    finetune(sys.argv[2], sys.argv[3], **{**SMALL, **json.loads(sys.argv[4])})
except Interrupted as e:
    sys.exit(f'{e.exit_code} {e}')
"""


def _python(*args, **kwargs):
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=str(HERE))
    return subprocess.Popen(
        [sys.executable, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data'), (8, 4, 4))


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'out'
    finetune(data, folder, **dict(SMALL, stages=STAGES))
    return folder


def _cut(monkeypatch, epoch, error=KeyboardInterrupt):
    """Cut a run off within an epoch, from 0."""
    calls = []
    monkeypatch.setattr(FrozenStage, 'save_interval', 0.0)
    for stage in (ImageStage, FrozenStage):

        def cut(self, *args, train_epoch=stage.train_epoch):
            calls.append(1)
            if len(calls) == epoch + 1:
                raise error
            return train_epoch(self, *args)

        monkeypatch.setattr(stage, 'train_epoch', cut)


@pytest.mark.parametrize('cache, least', [(0, (20, 14, 2)), (1, (30, 20, 10))])
def test_killed_before_every_change(data, tmp_path, cache, least):
    """At each of the changes that a run makes to its folder, from the first file to the last."""
    process = _python(HERE / 'kill_points.py', data, tmp_path, cache)
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err[-2000:]
    changes, states, resumed = found = tuple(map(int, out.split()))
    assert changes > least[0] and states > least[1] and resumed > least[2], found


def _send(process, number, after):
    """Send a signal some seconds after the first line on an epoch; what the process says on standard error."""
    while process.poll() is None and 'epoch 1' not in (process.stdout.readline() or 'epoch 1'):
        pass
    time.sleep(after)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


def test_killed_at_any_time(data, tmp_path):
    """With loader processes at work, which are killed with it or find that it is gone."""
    settings = dict(epochs=4, workers=2, resume=True)
    folder, whole = tmp_path / 'out', tmp_path / 'whole'
    _send(_python('-c', RUN, HERE, data, folder, json.dumps(settings)), signal.SIGKILL, random.uniform(0, 0.2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as there
        for path in (folder, whole):
            finetune(data, path, **dict(SMALL, **settings))
    finally:
        torch.set_num_threads(threads)
    assert digests(folder) == digests(whole)
    assert_same_checkpoints(folder, whole)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(data, tmp_path, number, code):
    """One sentence, which names what to do, and the folder free for who does it."""
    process = _python('-c', RUN, HERE, data, tmp_path / 'out', '{"epochs": 500, "workers": 2}')
    err = _send(process, number, 1)
    # torch's loader complains of itself if it is cut off while it starts its processes
    assert err.count('Traceback') == err.count('_MultiProcessingDataLoaderIter.__del__ '), err
    assert err.splitlines()[-1].startswith(f'{code} Stopped'), err
    assert re.search(r'[1-9]\d* epochs? (is|are) kept in .*`timm-bilinear finetune --output \S+ --resume`', err), err
    left = {p.name for p in (tmp_path / 'out').iterdir()}
    assert {'args.yaml', 'checkpoints'} <= left <= {'args.yaml', 'checkpoints', 'summary.csv'}


@pytest.mark.parametrize('epoch', [0, 1, 2, 3])
def test_resumed_with_nothing_but_the_folder(data, whole, tmp_path, monkeypatch, epoch):
    with monkeypatch.context() as patch:
        _cut(patch, epoch)
        with pytest.raises(Interrupted) as e:
            finetune(data, tmp_path, **dict(SMALL, stages=STAGES))
    kept = 'before the first epoch' if epoch == 0 else rf'{epoch} epochs? (is|are) kept in .* --resume`'
    assert re.search(kept, str(e.value)) and e.value.exit_code == 130
    assert not (tmp_path / 'model.safetensors').exists()
    if epoch == 0:
        with pytest.raises(ValueError, match=r"no run to resume.*'data_dir' is missing"):
            finetune(output=tmp_path, resume=True)
        finetune(data, tmp_path, **dict(SMALL, stages=STAGES))  # there is nothing to lose
    else:
        with pytest.raises(FileExistsError, match='resume'):
            finetune(data, tmp_path, **dict(SMALL, stages=STAGES))
        finetune(output=tmp_path, resume=True)
    assert digests(tmp_path) == digests(whole)
    assert_same_checkpoints(tmp_path, whole)


def _frozen_features(monkeypatch):
    """Names of the images whose features are computed."""
    seen, compute = [], FrozenStage._compute

    def record(self, split):
        seen.append((split, len(self.datasets[split]) - self.file.done.get(split, 0)))
        return compute(self, split)

    monkeypatch.setattr(FrozenStage, '_compute', record)
    return seen


@pytest.mark.parametrize('again', ['same', 'resume', 'overwrite'])
def test_features_are_kept_before_the_first_checkpoint(data, whole, tmp_path, monkeypatch, again):
    """What took longest is not computed again, unless the run is to be replaced."""
    settings = dict(SMALL, stages=STAGES)

    def cut(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FrozenStage, '_after_preparing', cut)
        patch.setattr('timm_bilinear.tools.frozen_stages.GramStage._after_preparing', cut)
        with pytest.raises(
            Interrupted, match='features computed so far are kept; go on with the same command, or'
        ) as e:
            finetune(data, tmp_path, **settings)
    assert 'DATA and --resume' in str(e.value) and (tmp_path / 'features').is_dir()
    seen = _frozen_features(monkeypatch)
    finetune(data, tmp_path, **dict(settings, **({} if again == 'same' else {again: True})))
    assert seen == ([('train', 16), ('val', 8)] if again == 'overwrite' else [('train', 0), ('val', 0)])
    assert digests(tmp_path) == digests(whole) and not (tmp_path / 'features').exists()


def test_features_that_no_stage_takes_are_removed(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _cut(patch, 0)
        with pytest.raises(Interrupted):
            finetune(data, tmp_path, **dict(SMALL, stages=STAGES))
    (tmp_path / 'features' / 'descriptors.bin').touch()
    finetune(data, tmp_path, **dict(SMALL, stages=STAGES[1:]))
    assert not (tmp_path / 'features').exists()


def test_resumed_after_the_end(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'out')
    before = digests(whole)
    for name in ('model.safetensors', 'results.json', 'curves.png', 'summary.csv'):
        (tmp_path / 'out' / name).write_text('damaged')
    metrics = finetune(output=tmp_path / 'out', resume=True)
    assert digests(tmp_path / 'out') == before and metrics['test_top1'] >= 0


@pytest.mark.parametrize(
    'given, names',
    [
        (dict(seed=43), ('seed', 43, 42)),
        (dict(batch_size=4), ('batch_size', 4, 8)),
        (dict(img_size=64), ('img_size', 64, 32)),
        (dict(train_size=24), ('train_size', 24, 32)),
        (dict(stages=None, epochs=5), ('epochs', 5, 2)),
        (dict(stages=None, lr=0.5), ('lr', 0.5, 1e-3)),
        (dict(stages=None, lr=1e-3, head_lr=0.5), ('head_lr', 0.5, [1.0, 1e-2])),
        (dict(stages=None, opt='adamw'), ('opt', 'adamw', 'sgd')),
        (dict(stages=[Stage(3, 'sgd', 0.0, 1.0, 0.0), STAGES[1]]), ('stages',)),
        (dict(smoothing=0.2), ('smoothing', 0.2, 0.1)),
        (dict(train_aug=dict(hflip=0.0)), ('hflip', 0.0, 0.5)),
        (dict(model='test_resnet'), ('model', 'test_resnet', 'bcnn')),
        (dict(model_kwargs=dict(backbone_a='test_resnet')), ('model_kwargs',)),
        (dict(pretrained=True), ('pretrained', True, False)),
        (dict(amp_dtype='bfloat16'), ('amp_dtype', 'bfloat16', 'float32')),
        (dict(class_weights=True), ('class_weights', True, False)),
        (dict(patience=1), ('patience', 1, None)),
    ],
)
def test_other_arguments_are_refused(data, whole, tmp_path, monkeypatch, given, names):
    monkeypatch.setattr('timm_bilinear.tools.inference.mkldnn_has_bfloat16', lambda: True)
    if 'amp_dtype' in given and torch.load(whole / 'checkpoints' / 'last.pth.tar')['args']['amp_dtype']:
        given, names = dict(amp_dtype='float32'), ('amp_dtype', 'float32', 'bfloat16')
    folder = tmp_path / 'out'
    shutil.copytree(whole, folder)
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    given = dict(given)
    if given.get('stages', 1) is None:
        del given['stages']
    with pytest.raises(ValueError) as e:
        finetune(data, folder, resume=True, **given)
    assert f"'{names[0]}'" in str(e.value) and '\n' not in str(e.value)
    assert all(repr(value) in str(e.value) for value in names[1:]), str(e.value)
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before


def test_the_same_arguments_and_free_ones_are_taken(data, whole, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(whole, folder)
    shutil.copytree(data, tmp_path / 'moved')
    free = dict(workers=1, device='cpu', log_format='json')
    finetune(tmp_path / 'moved', folder, resume=True, **dict(SMALL, stages=STAGES, seed=42, train_size=32, **free))
    assert digests(folder) == digests(whole)


@pytest.mark.parametrize('change', ['class', 'renamed', 'fewer', 'other'])
def test_other_data_are_refused(data, whole, tmp_path, change):
    folder, images = tmp_path / 'out', tmp_path / 'data'
    shutil.copytree(whole, folder)
    shutil.copytree(data, images)
    for split in ('train', 'val', 'test'):
        if change == 'class':
            shutil.copytree(images / split / 'rows', images / split / 'dots')
        elif change == 'renamed':
            (images / split / 'rows').rename(images / split / 'zebra')
    if change == 'fewer':
        (images / 'train' / 'rows' / '3.png').unlink()
    elif change == 'other':
        (images / 'train' / 'rows' / '3.png').rename(images / 'train' / 'rows' / 'new.png')
    message = {
        'class': r"classes of .*'dots' new",
        'renamed': r"classes of .*'zebra' new; 'rows' gone",
    }.get(change, r'images of .* are not those of the run')
    with pytest.raises(ValueError, match=message):
        finetune(images, folder, resume=True)
    assert digests(folder) == digests(whole)


def test_data_that_are_gone(data, whole, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(whole, folder)
    checkpoint = torch.load(folder / 'checkpoints' / 'last.pth.tar', weights_only=True)
    checkpoint['args']['data_dir'] = str(tmp_path / 'gone')
    torch.save(checkpoint, folder / 'checkpoints' / 'last.pth.tar')
    with pytest.raises(FileNotFoundError, match=r"'.*gone', are not there"):
        finetune(output=folder, resume=True)
    finetune(data, folder, resume=True)


def test_what_it_started_from_may_be_gone(data, tmp_path, monkeypatch):
    """A model, and a file of weights, are read once: the checkpoint has all of them."""
    finetune(data, tmp_path / 'start', **dict(SMALL, epochs=1))
    weights = tmp_path / 'weights.safetensors'
    shutil.copy(tmp_path / 'start' / 'model.safetensors', weights)
    kwargs = dict(SMALL, stages=STAGES, model=f'local-dir:{tmp_path / "start"}', model_kwargs=None, weights=weights)
    finetune(data, tmp_path / 'whole', **kwargs)
    _cut(monkeypatch, 1)
    with pytest.raises(Interrupted):
        finetune(data, tmp_path / 'cut', **kwargs)
    shutil.rmtree(tmp_path / 'start')
    weights.unlink()
    finetune(output=tmp_path / 'cut', resume=True)
    assert digests(tmp_path / 'cut') == digests(tmp_path / 'whole')


def test_workers_do_not_change_the_result(data, whole, tmp_path):
    finetune(data, tmp_path, **dict(SMALL, stages=STAGES, workers=3))
    ours, theirs = digests(tmp_path), digests(whole)
    assert {k for k in ours if ours[k] != theirs[k]} <= {'args.yaml'}


def test_checkpoint_of_an_older_version(data, tmp_path):
    """By timm's saver, which pickles the arguments."""
    import argparse

    checkpoints = tmp_path / 'checkpoints'
    checkpoints.mkdir()
    torch.save(dict(epoch=1, state_dict={}, args=argparse.Namespace(model='x')), checkpoints / 'last.pth.tar')
    with pytest.raises(ValueError, match='older version'):
        finetune(data, tmp_path, resume=True, **SMALL)
