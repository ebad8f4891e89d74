"""Microseconds that the host spends on the GPU path at one image: all but what Triton and CUDA take for a launch.

    PYTHONPATH=. python tests/ops/host_time.py

No GPU is needed: the kernels are left out, and PyTorch's operators run on the CPU, on so few numbers that it is their
call that takes the time.
"""

import timeit
from typing import Dict, Tuple
from unittest import mock

import torch

from timm_bilinear.ops import bilinear_classify, kernels, library
from timm_bilinear.ops.kernels import descriptors

_CALLS = 200


def host_microseconds(repeats: int = 25) -> Dict[str, Tuple[float, int]]:
    """Median time of a call in microseconds, and its launches of our kernels, by name."""
    a, weight = torch.rand(1, 32, 64, dtype=torch.bfloat16), torch.rand(8, 32 * 33 // 2, dtype=torch.bfloat16)
    launches = []

    def launch(kernel, grid):
        launches.append(kernel)
        return lambda *args, **kwargs: None

    @torch.inference_mode()
    def forward():
        bilinear_classify(a, None, weight)

    inputs = [x.clone().requires_grad_() for x in (a, weight)]
    grad = torch.ones(1, 8, dtype=torch.bfloat16)

    def step():
        torch.autograd.grad(bilinear_classify(inputs[0], None, inputs[1]), inputs, grad)

    results = {}
    function = type(descriptors._forward_kernel)  # Triton's, or that of its interpreter
    with mock.patch.object(function, '__getitem__', launch), mock.patch.object(library, '_path', lambda x: kernels):
        for name, call in (('forward', forward), ('step', step)):
            call()
            launches.clear()
            call()
            count = len(launches)
            times = sorted(timeit.repeat(call, number=_CALLS, repeat=repeats))
            results[name] = (1e6 * times[repeats // 2] / _CALLS, count)
    return results


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name, (microseconds, count) in host_microseconds().items():
        print(f'{name}: {microseconds:.0f} microseconds, {count} launches of our kernels')
