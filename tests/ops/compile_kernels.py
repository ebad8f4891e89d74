"""Compile what the launchers launch, for GPUs that are not here, and print what the compiler made of it as JSON.

Run by test_kernels_compile.py in a process of its own, because the tests' own kernels are the interpreter's. After a
change to the kernels, run it with --everything too: it takes minutes and compiles all combinations.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_bilinear.ops.kernels import descriptors, gradients, maximum, path, slopes

ARCHS = (80, 90)
OTHERS = (86, 89, 100, 120)  # only what most models take is compiled for these
OPTIONS = ('num_warps', 'num_stages', 'maxnreg')
# rows of 784 locations; of channels (channels_last); of 196, a multiple of four; of 49, which are copied to longer ones
LAYOUTS = ('rows', 'columns', 'fours', 'unaligned')
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
kernels = {}


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        options = tuple((k, v) for k, v in ((k, kwargs.pop(k, None)) for k in OPTIONS) if v is not None)
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
                signature[param.name] = 'i32' if value < 2**31 else 'i64'
                aligned += [i] * (value % 16 == 0)
            else:
                signature[param.name] = 'fp32'
        self.launches[str((self.kernel.__name__, signature, constants, aligned, options))] = (
            self.kernel.__name__,
            signature,
            constants,
            aligned,
            options,
            self.launches['layout'],
        )


def cases(arch, everything):
    """Type, whether TF32 is allowed, pooling, two streams, small tiles, layout, and whether offsets have 64 bits.

    All of them take minutes to compile. Chosen are every type with either pooling and either tiles for each GPU, and of
    the rest another one in each, so that both GPUs together have it with every type.
    """
    if arch in OTHERS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if everything else (torch.bfloat16,):
            yield dtype, False, 'avg', False, False, 'fours', False
        return
    types = (torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)
    turn = ARCHS.index(arch)
    for (i, (dtype, tf32)), pool, small in itertools.product(enumerate(types), ('avg', 'max'), (False, True)):
        if pool == 'avg' or not (small or tf32):  # 'max' knows neither
            for two, layout, wide in itertools.product((False, True), LAYOUTS, (False, True)):
                chosen = (i + small + turn) % 2, LAYOUTS[(i + 2 * small + turn) % 4], False
                if everything or chosen == (two, layout, wide):
                    yield dtype, tf32, pool, two, small, layout, wide
    yield torch.bfloat16, False, 'avg', bool(turn), False, 'rows', True
    yield torch.float32, False, 'max', not turn, False, 'columns', True


def record(arch, everything=False):
    """Launches of all cases, from tensors that have no memory."""
    launches = {}
    for module in (descriptors, gradients, maximum, slopes):
        for name in [n for n in vars(module) if n.endswith('_kernel')]:
            setattr(module, name, Recorder(kernels.setdefault(name, getattr(module, name)), launches))
    for dtype, tf32, pool, two, small, layout, wide in cases(arch, everything):
        torch.backends.cuda.matmul.fp32_precision = 'tf32' if tf32 else 'ieee'
        descriptors._is_small = lambda programs, device, small=small: small
        launches['layout'] = layout
        locations = {'unaligned': 49, 'fours': 196}.get(layout, 784)
        stride_c, stride_n = (1, 512) if layout == 'columns' else (locations, 1)
        if wide:
            stride_c, stride_n = 2**26 * stride_c, 2**26 * stride_n
        strides = 512 * locations, stride_c, stride_n
        a = torch.empty_strided((2, 512, locations), strides, dtype=dtype, device='meta')
        b = a if two else None
        weight = torch.empty(3, 512 * 512 if two else 512 * 513 // 2, dtype=dtype, device='meta')
        path.forward(a, b, pool, 1e-10)
        logits, *kept = path.classify(a, b, weight, weight[:, 0].clone(), pool, 1e-10)
        for save_memory in (False, True):
            path.classify_backward(logits, *kept, a, b, weight, pool, 1e-10, True, True, save_memory, dtype)
    del launches['layout']
    return list(launches.values())


def disassemble(cubin):
    """Address and text of each machine instruction of a kernel, by the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(cubin)
        f.flush()
        listing = subprocess.run([TOOLS / 'cuobjdump', '-sass', f.name], capture_output=True, text=True, check=True)
    found = re.findall(r'^\s+/\*([0-9a-f]{4,})\*/\s*(.*?);', listing.stdout, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def copying_loops(instructions):
    """Of each loop that copies features to shared memory: its copies, and its spilled registers' loads and stores."""
    loops = []
    for end, text in instructions:
        start = re.search(r'\bBRA\b.*0x([0-9a-f]+)', text)
        if start and int(start.group(1), 16) < end:
            body = [t for address, t in instructions if int(start.group(1), 16) <= address <= end]
            copies, spills = (sum(any(n in t for n in names) for t in body) for names in (('LDGSTS',), ('LDL', 'STL')))
            loops += [(copies, spills)] * (copies > 0)
    return loops


def compile_launch(job):
    arch, (name, signature, constants, aligned, options, layout) = job
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
    is_listed = name == '_slope_kernel' or (name == '_forward_kernel' and not constants['MAX'])
    instructions = disassemble(kernel.asm['cubin']) if is_listed else []
    return dict(
        kernel=name,
        arch=arch,
        launch=f'{signature} {constants} {aligned} {options}',
        dtype=next(iter(signature.values()))[1:],
        spilled=int(re.search(r'(\d+) bytes spill stores', log.getvalue()).group(1)),
        registers=int(re.search(r'Used (\d+) registers', log.getvalue()).group(1)),
        shared=kernel.metadata.shared,
        wgmma=kernel.asm['ptx'].count('wgmma.mma_async'),
        mma=kernel.asm['ptx'].count('mma.sync') + kernel.asm['ptx'].count('tcgen05.mma'),
        copies=len(
            re.findall(r'cp\.async\.c[ag]|cp\.async\.bulk', kernel.asm['ptx'])
        ),  # to shared memory, asynchronous
        loads=len(re.findall(r'ld\.global', kernel.asm['ptx'])),
        layout=layout,
        instructions=len(instructions),
        loops=copying_loops(instructions),
        precise=len(re.findall(r'(?:sqrt|div|rcp)\.rn\.f32', kernel.asm['ptx'])),
        warps=dict(options).get('num_warps', 4),
    )


if __name__ == '__main__':
    jobs = [(arch, launch) for arch in ARCHS + OTHERS for launch in record(arch, everything='--everything' in sys.argv)]
    with multiprocessing.get_context('fork').Pool(2) as pool:
        json.dump(pool.map(compile_launch, jobs, chunksize=4), sys.stdout)
