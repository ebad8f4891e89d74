"""Every kernel as every launcher launches it, compiled for GPUs that are not here, within a budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have
KERNELS = {
    '_forward_kernel',
    '_norm_kernel',
    '_logit_gradient_kernel',
    '_backward_kernel',
    '_max_location_kernel',
    'max_backward_kernel',
}


@pytest.fixture(scope='module')
def compiled():
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    script = Path(__file__).with_name('compile_kernels.py')
    run = subprocess.run([sys.executable, '-W', 'ignore', script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_all_kernels_are_there(compiled):
    for arch in SHARED:
        assert {k['kernel'] for k in compiled if k['arch'] == arch} == KERNELS
        for dtype in ('fp32', 'bf16', 'fp16'):
            for kernel in ('_forward_kernel', '_backward_kernel', 'max_backward_kernel'):
                assert any((k['kernel'], k['dtype'], k['arch']) == (kernel, dtype, arch) for k in compiled)


def test_registers(compiled):
    # One register is what ptxas gives up at times so that one block more fits a processor.
    spilled = [k for k in compiled if k['spilled'] > 4]
    assert not spilled, spilled
    assert sum(k['spilled'] > 0 for k in compiled) < 0.02 * len(compiled)


def test_shared_memory(compiled):
    over = [k for k in compiled if k['shared'] > SHARED[k['arch']]]
    assert not over, over


def test_tensor_cores(compiled):
    for k in compiled:
        if k['kernel'] in ('_forward_kernel', '_backward_kernel') and "'MAX': True" not in k['launch']:
            assert k['wgmma'] or k['mma'], k
            if k['arch'] == 90 and "'BLOCK_I': 128" in k['launch']:
                assert k['wgmma'], k
        else:
            assert not k['wgmma'] and not k['mma'], k
