"""What is left of processes that were killed goes, what another one is writing stays."""

import os
import subprocess
import sys

import pytest
from small_models import ONE, create

from timm_bilinear import save_model
from timm_bilinear.hub.partial import partial_path

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='elsewhere nothing is taken for dead')


@pytest.fixture(scope='module')
def dead():
    """Number of a process that is no more."""
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


@pytest.mark.parametrize('is_folder', [False, True])
def test_leftovers(tmp_path, dead, is_folder):
    def make(name):
        path = tmp_path / name
        if is_folder:
            path.mkdir()
            (path / 'inner').write_text('x')
        else:
            path.write_text('x')
        return path

    gone = [make(f'.a[1].{pid}.part{end}') for pid, end in ((dead, ''), (dead, '.data'), (f'{dead}-7', ''))]
    gone.append(make(f'.a[1].{os.getpid()}-999.part'))  # of one with this number, in another container
    others = (
        f'.a[1].{os.getppid()}.part',
        f'.a[1].{dead}.other',
        f'.a1.{dead}.part',
        f'a[1].{dead}.part',
        '.a[1].x.part',
    )
    kept = [make(name) for name in others]
    with partial_path(tmp_path, '.a[1].', '.part') as outer:
        make(outer.name)
        with partial_path(tmp_path, '.a[1].', '.part') as inner:
            assert inner != outer and outer.exists() and not inner.exists()
            make(inner.name)
            make(f'{inner.name}.data')
        assert outer.exists() and sorted(tmp_path.iterdir()) == sorted([*kept, outer])
    assert not any(path.exists() for path in gone) and sorted(tmp_path.iterdir()) == sorted(kept)


def test_saving_clears_up(tmp_path, dead):
    (tmp_path / f'.partial-{dead}').mkdir()
    save_model(create(**ONE), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
