"""Every kernel as every launcher launches it, compiled for GPUs that are not here, within a budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes a block can have (CUDA C++ Programming Guide, technical specifications per compute capability)
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
KERNELS = {
    '_forward_kernel',
    '_norm_kernel',
    '_logit_kernel',
    '_logit_gradient_kernel',
    '_backward_kernel',
    '_slope_kernel',
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
    for arch in (80, 90):
        assert {k['kernel'] for k in compiled if k['arch'] == arch} == KERNELS
        for dtype in ('fp32', 'bf16', 'fp16'):
            for kernel in ('_forward_kernel', '_backward_kernel', 'max_backward_kernel'):
                assert any((k['kernel'], k['dtype'], k['arch']) == (kernel, dtype, arch) for k in compiled)


# Most bytes of registers that a kernel may spill, and why.
SPILLS = [
    # what images out of range take: others leave before, so it costs ordinary ones nothing
    (lambda k: k['kernel'] == '_norm_kernel' or "'AGAIN': True" in k['launch'], 512),
    # 128 registers let two blocks share a processor; what is spilled is before and after the loops, see below
    (lambda k: "'maxnreg', 128" in k['launch'], 256),
    # one register is what ptxas gives up at times so that one block more fits a processor
    (lambda k: True, 4),
]


def test_registers(compiled):
    for k in compiled:
        assert k['spilled'] <= next(most for applies, most in SPILLS if applies(k)), k


def is_product(k):
    """Whether a kernel is the product of an ordinary launch."""
    return k['kernel'] == '_forward_kernel' and not any(f"'{x}': True" in k['launch'] for x in ('WIDE', 'MAX'))


def test_features_are_copied_asynchronously(compiled):
    # In every layout, of 49, 196 and 784 locations: no load that waits stands in the way.
    products = [k for k in compiled if is_product(k)]
    assert {k['layout'] for k in products} == {'rows', 'columns', 'fours', 'unaligned'}
    for k in products:
        assert k['copies'] >= 8 and k['loads'] == 0, k


def test_loops(compiled):
    # No register is spilled in them; and of tiles on the diagonal one of two features is copied.
    for k in filter(is_product, compiled):
        assert all(spills == 0 for _, spills in k['loops']), k
        if k['arch'] != 100:  # whose copies ptxas unrolls
            once, *rest = sorted(copies for copies, _ in k['loops'])
            assert rest == ([2 * once] if "'ONCE': True" in k['launch'] else []), k


def test_roots_and_divisions(compiled):
    # By the hardware's approximations, two units in the last place: an instruction or two where exact ones are ten.
    for k in filter(is_product, compiled):
        assert k['precise'] == 0, k


def test_blocks_per_processor(compiled):
    # By registers (of 65,536, given by eights) and shared memory (1 KiB of each block is the system's).
    for k in compiled:
        registers = -(-k['registers'] // 8) * 8 * 32 * k['warps']
        blocks = min(65536 // registers, (SHARED[k['arch']] + 1024) // (k['shared'] + 1024))
        if k['kernel'] == '_slope_kernel':
            assert blocks >= 3, k
        elif "'maxnreg', 128" in k['launch'] and k['arch'] in (80, 90, 100):  # the others have memory for one
            assert blocks >= 2, k
        else:
            assert blocks >= 1, k


def test_instructions_of_a_slope(compiled):
    # 32 entries a thread. The floor of the kernel is its traffic, 8 bytes an entry in half precision: at 3.35 TB/s and
    # 132 processors of 128 lanes at 1.7 GHz that is the time of 68 instructions.
    symmetric = [k for k in compiled if k['kernel'] == '_slope_kernel' and "'SYMMETRIC': True" in k['launch']]
    assert symmetric
    for k in symmetric:
        assert k['instructions'] / 32 < 68, k


def test_shared_memory(compiled):
    over = [k for k in compiled if k['shared'] > SHARED[k['arch']]]
    assert not over, over


def test_tensor_cores(compiled):
    for k in compiled:
        if k['kernel'] in ('_forward_kernel', '_norm_kernel', '_backward_kernel') and "'MAX': True" not in k['launch']:
            assert k['wgmma'] or k['mma'], k
            if k['arch'] == 90 and "'BLOCK_I': 128" in k['launch']:
                assert k['wgmma'], k
        else:
            assert not k['wgmma'] and not k['mma'], k
