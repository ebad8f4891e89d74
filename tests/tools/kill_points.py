"""What a run leaves that is killed before any of the changes it makes to its folder, resumed: for test_resume.py.

python kill_points.py DATA FOLDER GB

GB of descriptors may be kept for the first stage; with 0 there is the second alone,
whose changes are among those of both.

Of states without a checkpoint, which start anew, and of the second stage alone every third is resumed.

Prints the numbers of changes, of different states of the folder between them, and of those that had a checkpoint.
"""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

import torch
from finetune_cases import SMALL, assert_same_checkpoints, digests

from timm_bilinear.tools.finetune import Stage, finetune
from timm_bilinear.tools.frozen import FrozenStage

CHANGES = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'shutil.rmtree')
STAGES = [Stage(1, 'sgd', 0.0, 1.0, 0.0), Stage(1, 'sgd', 1e-3, 1e-2, 1e-5)]


def is_change(event, args, folder):
    if event == 'open':
        path, mode, flags = args
        writes = (isinstance(mode, str) and set(mode) & set('wax+')) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and str(path).startswith(folder)
    return event in CHANGES and any(str(arg).startswith(folder) for arg in args)


def content(folder):
    files = sorted(p for p in folder.rglob('*') if p.name != '.lock')
    return tuple((str(p.relative_to(folder)), p.read_bytes() if p.is_file() else None) for p in files)


class Snapshots:
    """Copies of a folder from before each change to it: what a process leaves that is killed there."""

    def __init__(self, folder, target):
        self.folder, self.target = folder, target
        self.changes, self.states, self.is_copying = 0, {}, False
        sys.addaudithook(self.watch)

    def watch(self, event, args):
        if self.is_copying or not is_change(event, args, str(self.folder)):
            return
        self.is_copying = True
        self.changes += 1
        state = content(self.folder)
        if state not in self.states:
            copy = self.target / str(self.changes)
            self.states[state] = copy
            if self.folder.is_dir():
                shutil.copytree(self.folder, copy)
        self.is_copying = False


def main():
    torch.set_num_threads(1)
    data, base = Path(sys.argv[1]), Path(sys.argv[2])
    cache = float(sys.argv[3])
    whole, settings = base / 'whole', dict(SMALL, stages=STAGES if cache else STAGES[1:], head_cache=cache)
    FrozenStage.save_interval = 0.0  # after every epoch
    snapshots = Snapshots(whole, base)
    with contextlib.redirect_stdout(io.StringIO()):
        finetune(data, whole, **settings)
    snapshots.is_copying = True  # no more
    expected, resumed = digests(whole), 0
    names = {p.name for p in whole.rglob('*')}
    for number, folder in enumerate(snapshots.states.values()):
        has_checkpoint = (folder / 'checkpoints' / 'last.pth.tar').is_file()
        if number % 3 and not (cache and has_checkpoint):
            continue
        resumed += has_checkpoint
        with contextlib.redirect_stdout(io.StringIO()):
            finetune(data, folder, resume=True, **settings)  # as one who does not know how far it came
        found = digests(folder)
        assert found == expected, f'change {folder.name}: {[k for k in found if found[k] != expected[k]]} differ'
        assert_same_checkpoints(whole, folder)
        left = {p.name for p in folder.rglob('*')} - names
        assert not left, f'change {folder.name}: {left} left'
    print(f'{snapshots.changes} {len(snapshots.states)} {resumed}')


if __name__ == '__main__':
    main()
