"""The folder of a run: its lock, files that are written as a whole, what it may hold at the start."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch

from timm_bilinear.tools import run as module
from timm_bilinear.tools.lock import FolderLock
from timm_bilinear.tools.run import RunFolder, best_epoch, check_place, write_whole

HOLD = """
import sys, time
from timm_bilinear.tools.lock import FolderLock
lock = FolderLock(sys.argv[1])
print('held', flush=True)
time.sleep(600)
"""


def _row(epoch, top1, loss, stage=1):
    return dict(epoch=epoch, train_loss=1.0, train_top1=50.0, eval_loss=loss, eval_top1=top1, lr=0.1, stage=stage)


def _checkpoint(*rows):
    history = [_row(i, *row) for i, row in enumerate(rows)]
    best, last = best_epoch(history), len(history) - 1
    state = {'weight': torch.full((2,), float(last))}
    best_state = None if best == last else {'weight': torch.full((2,), float(best))}
    return dict(
        epoch=last,
        state_dict=state,
        optimizer={},
        history=history,
        best=dict(epoch=best, metrics={}, state_dict=best_state),
        args=dict(model='x', given=[]),
    )


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_lock_names_its_holder_and_dies_with_it(tmp_path, number):
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(RuntimeError, match=rf"writes to '{tmp_path}': process {holder.pid} on \S+, since 20") as e:
            RunFolder(tmp_path)
        assert '\n' not in str(e.value)
    finally:
        holder.send_signal(number)
        holder.wait()
    with RunFolder(tmp_path) as folder:  # what is left of the lock counts as nothing
        folder.start(dict(model='x'))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['args.yaml', 'checkpoints']


def test_lock_within_a_process(tmp_path):
    with RunFolder(tmp_path / 'out'):
        with pytest.raises(RuntimeError, match=f'process {os.getpid()} '):
            RunFolder(tmp_path / 'out')
        (tmp_path / 'link').symlink_to(tmp_path / 'out')
        with pytest.raises(RuntimeError, match='Another run'):
            RunFolder(tmp_path / 'link')
        RunFolder(tmp_path / 'other').close()
    RunFolder(tmp_path / 'out').close()
    assert not (tmp_path / 'out').exists()


def test_lock_is_not_that_of_a_forked_process(tmp_path):
    """Loader processes outlive a killed run for a while."""
    lock = FolderLock(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    try:
        lock.release()
        code = 'import sys; from timm_bilinear.tools.lock import FolderLock; FolderLock(sys.argv[1])'
        subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, timeout=120)
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_one_of_many_gets_the_lock(tmp_path):
    got, refused = [], []

    def work():
        try:
            got.append(FolderLock(tmp_path))
        except RuntimeError:
            refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(got) == 1 and len(refused) == 7
    got[0].release()


@pytest.mark.parametrize('fails', ['fsync', 'replace', 'write'])
def test_written_whole_or_not_at_all(tmp_path, monkeypatch, fails):
    path = tmp_path / 'file'
    write_whole(path, lambda f: f.write(b'old'))

    def full(*_):
        raise OSError(28, 'No space left on device')

    if fails != 'write':
        monkeypatch.setattr(module.os, fails, full)
    with pytest.raises(OSError, match=rf"Cannot write '{path}': No space left on device\.$"):
        write_whole(path, full if fails == 'write' else lambda f: f.write(b'new'))
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_full_disk_under_torch_save(tmp_path):
    """torch's writer hides the system's error behind one of its own."""

    class Full:
        def write(self, data):
            raise OSError(28, 'No space left on device')

        def flush(self):
            pass

    with pytest.raises(OSError, match='No space left'):
        write_whole(tmp_path / 'file', lambda f: torch.save({'a': torch.zeros(9999)}, Full()))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_full_device(tmp_path):
    (tmp_path / '.file.partial').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r"'.*file': No space left on device"):
        write_whole(tmp_path / 'file', lambda f: torch.save({'a': torch.zeros(9999)}, f))


@pytest.mark.parametrize('mask,mode', [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with RunFolder(tmp_path / 'out') as folder:
            folder.start(dict(model='x'))
            folder.save(_checkpoint((50.0, 1.0)))
            folder.write_results({})
            folder.write_curves([_row(0, 50.0, 1.0)])
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / 'out').rglob('*') if p.is_file()]
    assert len(files) == 6 and {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


@pytest.mark.parametrize(
    'rows, best',
    [
        ([(50, 1.0), (60, 1.0), (55, 0.5)], 1),
        ([(50, 1.0), (50, 0.9), (50, 0.95)], 1),  # a small validation set: the loss decides
        ([(50, 1.0), (50, 1.0)], 0),
        ([(50, float('nan')), (50, 3.0)], 1),
        ([(50, 3.0), (50, float('nan'))], 0),
        ([(50, float('nan')), (50, float('nan'))], 0),
        ([(40, float('nan')), (50, float('nan'))], 1),
        ([(50, float('inf')), (50, 3.0)], 1),
    ],
)
def test_best_epoch(rows, best):
    assert best_epoch([_row(i, *row) for i, row in enumerate(rows)]) == best


def test_derived_from_the_checkpoint(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(dict(model='x', given=[]))
        folder.save(_checkpoint((50, 1.0)))
        folder.save(_checkpoint((50, 1.0), (40, 1.0)))
    lines = (tmp_path / 'summary.csv').read_text().splitlines()
    assert lines[0] == 'epoch,train_loss,train_top1,eval_loss,eval_top1,lr,stage' and len(lines) == 3
    best = torch.load(tmp_path / 'checkpoints' / 'model_best.pth.tar', weights_only=True)
    assert best['epoch'] == 0 and best['state_dict']['weight'][0] == 0 and len(best['history']) == 1
    assert 'optimizer' not in best and best['best']['epoch'] == 0
    for name in ('summary.csv', 'checkpoints/model_best.pth.tar', 'args.yaml'):
        (tmp_path / name).unlink()
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.saved_epochs == 2
        folder.restore(folder.checkpoint)
    assert (tmp_path / 'summary.csv').read_text().splitlines() == lines
    assert torch.load(tmp_path / 'checkpoints' / 'model_best.pth.tar', weights_only=True)['epoch'] == 0
    assert 'model: x' in (tmp_path / 'args.yaml').read_text()


@pytest.mark.parametrize('name', ['.DS_Store', '.gitkeep', 'lost+found', 'Thumbs.db', '.lock'])
def test_counts_as_empty(tmp_path, name):
    (tmp_path / name).mkdir() if name == 'lost+found' else (tmp_path / name).write_text('x')
    with RunFolder(tmp_path) as folder:
        folder.start(dict(model='x'))


@pytest.mark.parametrize('flags', [{}, dict(resume=True), dict(overwrite=True)])
def test_other_files_are_left_alone(tmp_path, flags):
    (tmp_path / 'config.json').write_text(json.dumps({}))
    (tmp_path / 'model.safetensors').write_text('weights of another')
    with pytest.raises(FileNotFoundError if flags == dict(resume=True) else FileExistsError, match=str(tmp_path)):
        RunFolder(tmp_path, **flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']


def _cut_off(folder):
    """What a run leaves before its first checkpoint."""
    with RunFolder(folder) as run:
        run.start(dict(model='x', fingerprint='y', given=[]))
    for name in ('features/descriptors.bin', 'features/descriptors.0.json', 'tensorboard/events.out.tfevents.1.host.2'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('x')


@pytest.mark.parametrize('flags', [{}, dict(resume=True), dict(overwrite=True)])
def test_a_run_that_was_cut_off_is_begun_again(tmp_path, flags):
    _cut_off(tmp_path)
    with RunFolder(tmp_path, **flags) as folder:
        assert folder.checkpoint is None and folder.has_features
        folder.start(dict(model='z', fingerprint='y', given=[]))
        assert folder.has_features == (flags != dict(overwrite=True))
    assert 'model: z' in (tmp_path / 'args.yaml').read_text() and not (tmp_path / 'tensorboard').exists()


@pytest.mark.parametrize('flags', [{}, dict(resume=True), dict(overwrite=True)])
@pytest.mark.parametrize(
    'name',
    [
        'features/notes.txt',
        'features/descriptors.old/notes.txt',
        'tensorboard/notes.txt',
        'tensorboard/run1/events.out.tfevents.1',
        'checkpoints/model.pt',
        'checkpoints/tmp.pth.tar',
        'checkpoints/mine/notes.txt',
    ],
)
@pytest.mark.parametrize('beside', [False, True])
def test_folders_of_others_are_left_alone(tmp_path, name, flags, beside):
    """By the names of ours, with or without a run that was cut off beside them."""
    if beside:
        _cut_off(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('mine')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(FileNotFoundError if flags == dict(resume=True) else FileExistsError, match=str(tmp_path)):
        RunFolder(tmp_path, **flags)
    assert sorted(tmp_path.rglob('*')) == before and path.read_text() == 'mine'


@pytest.mark.parametrize('args', ['', 'mine', '- 1', 'model: x\nlr: 0.1', 'a: [', None])
@pytest.mark.parametrize('name', ['features/descriptors.bin', 'tensorboard/events.out.tfevents.1', 'args.yaml'])
def test_only_our_arguments_make_a_run(tmp_path, args, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('mine')
    if args is not None:
        (tmp_path / 'args.yaml').write_text(args)
    before = {p: p.read_text() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(FileExistsError, match='is not empty'):
        RunFolder(tmp_path)
    assert {p: p.read_text() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_hidden_files_of_others_are_left_alone(tmp_path):
    for name in ('.trial/notes', '.partial-mine/notes', '.notes.partial', 'checkpoints/.notes.partial'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('mine')
    before = set(tmp_path.rglob('*'))
    with RunFolder(tmp_path) as folder:
        folder.start(dict(model='x', fingerprint='y', given=[]))
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.start(dict(model='x', fingerprint='y', given=[]))
    assert set(tmp_path.rglob('*')) == before | {tmp_path / 'args.yaml'}


@pytest.mark.parametrize(
    'number, told',
    [
        (errno.EROFS, 'read-only file system; take another --output'),
        (errno.EACCES, 'permission denied; take another --output'),
        (errno.ENOSPC, 'no space left; make room or take another --output'),
    ],
)
@pytest.mark.parametrize('call', ['mkdir', 'open'])
def test_output_that_cannot_be_written_to(tmp_path, monkeypatch, number, told, call):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), 'x')

    (tmp_path / 'made').mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError) as e:
            RunFolder(tmp_path / ('made' if call == 'open' else 'out') / 'a')
    assert re.fullmatch(rf"'{tmp_path}/\w+/a' cannot be written to: {told}\.", str(e.value)), str(e.value)
    assert [p.name for p in tmp_path.rglob('*')] == ['made']


def test_output_within_the_data(tmp_path):
    for name in ('data/train/a', 'data/val/a', 'classes/a', 'classes/b'):
        (tmp_path / name).mkdir(parents=True)
    data, classes = str(tmp_path / 'data'), str(tmp_path / 'classes')
    (tmp_path / 'link').symlink_to(tmp_path / 'data' / 'train')
    for output in (
        'data/train/out',
        'data/val/out/a',
        'data/train/a/out',
        'link/out',
        'data/test',
        'data/../data/val/x',
    ):
        with pytest.raises(
            ValueError, match=r"output '.*' must not lie inside the data '.*': it would be taken for a"
        ) as e:
            check_place(str(tmp_path / output), data, of_classes=False)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='taken for a class'):
        check_place(str(tmp_path / 'classes' / 'out'), classes, of_classes=True)
    for output in ('data/out', 'data/runs/1', 'data/train/.runs/1', 'out', 'training', 'data2/train/out'):
        check_place(str(tmp_path / output), data, of_classes=True)
    check_place('torch/cifar10/out', 'torch/cifar10', of_classes=True)
    check_place(str(tmp_path / 'out'), None, of_classes=False)


def test_no_folder(tmp_path):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(FileExistsError, match='is a file, not a folder'):
        RunFolder(tmp_path / 'file')
    with pytest.raises(FileExistsError, match='is a link to nothing'):
        RunFolder(tmp_path / 'link')
    with pytest.raises(OSError):
        RunFolder(tmp_path / 'file' / 'below')


def test_overwrite_takes_what_a_run_has_written(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start(dict(model='x'))
        folder.save(_checkpoint((50, 1.0)))
        folder.write_results({})
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='--resume continues it, --overwrite replaces it'):
        RunFolder(tmp_path)
    with RunFolder(tmp_path, overwrite=True) as folder:
        assert (tmp_path / 'results.json').exists() and folder.checkpoint is None  # nothing goes before the start
        folder.start(dict(model='y'))
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['args.yaml', 'checkpoints', 'notes.txt']


@pytest.mark.parametrize('damage', ['cut', 'empty', 'text', 'other', 'flipped'])
def test_damaged_checkpoint(tmp_path, damage):
    with RunFolder(tmp_path) as folder:
        folder.start(dict(model='x', given=[]))
        folder.save(_checkpoint((50, 1.0)))
    path = tmp_path / 'checkpoints' / 'last.pth.tar'
    content = path.read_bytes()
    if damage == 'other':
        torch.save({'state_dict': {}}, path)
    else:
        flipped = content[: len(content) // 3] + bytes(b ^ 255 for b in content[len(content) // 3 :])
        path.write_bytes(
            {'cut': content[: len(content) // 2], 'empty': b'', 'text': b'hello', 'flipped': flipped}[damage]
        )
    with pytest.raises(ValueError, match=r"'.*last\.pth\.tar'.*overwrite starts anew") as e:
        RunFolder(tmp_path, resume=True)
    assert '\n' not in str(e.value)
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.start(dict(model='x'))
