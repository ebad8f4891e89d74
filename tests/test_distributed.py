import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import WRAPPERS, steps


@pytest.mark.parametrize('wrap', WRAPPERS)
def test_two_processes_are_one(wrap, tmp_path):
    script = Path(__file__).with_name('distributed_steps.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    env = dict(os.environ, OMP_NUM_THREADS='1')
    run = subprocess.run([*command, script, wrap, tmp_path / 'w.pt'], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    got, want = torch.load(tmp_path / 'w.pt'), steps(lambda model: model).state_dict()
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=1e-5, rtol=1e-4)
