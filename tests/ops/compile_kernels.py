"""Compile what the launchers launch, for GPUs that are not here, and print what the compiler made of it as JSON.

Run by test_kernels_compile.py in a process of its own, because the tests' own kernels are the interpreter's.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_bilinear.ops.kernels import descriptors, gradients, maximum, path

ARCHS = (80, 90)
OPTIONS = ('num_warps', 'num_stages')
launches = {}


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        options = tuple((k, kwargs.pop(k)) for k in OPTIONS if k in kwargs)
        arguments = dict(zip(self.kernel.arg_names, args), **kwargs)
        signature, constants, aligned = {}, {}, []
        for i, param in enumerate(self.kernel.params):
            value = arguments[param.name]
            if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[param.name], constants[param.name] = 'constexpr', value
            elif isinstance(value, torch.Tensor):
                name = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.int32: 'i32'}
                signature[param.name] = f'*{name[value.dtype]}'
                aligned.append(i)
            elif isinstance(value, int):
                signature[param.name] = 'i32'
                aligned += [i] * (value % 16 == 0)
            else:
                signature[param.name] = 'fp32'
        launches[str((self.kernel.__name__, signature, constants, aligned, options))] = (
            self.kernel.__name__,
            signature,
            constants,
            aligned,
            options,
        )


def record():
    """Launch everything once on the CPU, into recorders."""
    for module in (descriptors, gradients, maximum):
        for name in [n for n in vars(module) if n.endswith('_kernel')]:
            kernels[name] = getattr(module, name)
            setattr(module, name, Recorder(kernels[name]))
    for small, pool, two, dtype, tf32, (locations, last) in itertools.product(
        (False, True),
        ('avg', 'max'),
        (False, True),
        (torch.float32, torch.bfloat16, torch.float16),
        (False, True),
        ((784, False), (784, True), (49, False)),  # 49 locations are unaligned only where they are innermost
    ):
        torch.backends.cuda.matmul.fp32_precision = 'tf32' if tf32 else 'ieee'
        descriptors._is_small = lambda programs, device, small=small: small
        a = torch.zeros(2, 512, locations, dtype=dtype)
        if last:
            a = a.transpose(1, 2).contiguous().transpose(1, 2)
        b = a if two else None
        weight = torch.zeros(3, 512 * 512 if two else 512 * 513 // 2, dtype=dtype)
        path.forward(a, b, pool, 1e-10)
        logits, *kept = path.classify(a, b, weight, weight[:, 0].clone(), pool, 1e-10)
        path.classify_backward(logits, *kept, a, b, weight, pool, 1e-10, True, True)


def compile_launch(job):
    arch, (name, signature, constants, aligned, options) = job
    source = ASTSource(
        kernels[name],
        signature=signature,
        constexprs=constants,
        attrs={(i,): [['tt.divisibility', 16]] for i in aligned},
    )
    triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=GPUTarget('cuda', arch, 32), options=dict(options))
    return dict(
        kernel=name,
        arch=arch,
        launch=f'{signature} {constants} {aligned} {options}',
        dtype=next(iter(signature.values()))[1:],
        spilled=int(re.search(r'(\d+) bytes spill stores', log.getvalue()).group(1)),
        registers=int(re.search(r'Used (\d+) registers', log.getvalue()).group(1)),
        shared=kernel.metadata.shared,
        wgmma=kernel.asm['ptx'].count('wgmma.mma_async'),
        mma=kernel.asm['ptx'].count('mma.sync'),
    )


kernels = {}

if __name__ == '__main__':
    record()
    jobs = list(itertools.product(ARCHS, launches.values()))
    with multiprocessing.get_context('fork').Pool(2) as pool:
        json.dump(pool.map(compile_launch, jobs, chunksize=4), sys.stdout)
