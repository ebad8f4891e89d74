"""Speed and memory of the head against the article's, eager and compiled.

Rows are measured in one process, all contestants in turn within each repeat, and reported as medians.
"""

import math
import statistics
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..ops import bilinear_classify, cpu, descriptor_size
from .measure import (
    busy_cores,
    describe_machine,
    find_device,
    format_time,
    markdown_table,
    measure_seconds,
    peak_memory,
    tf32,
    threads,
    write,
)

__all__ = ['Case', 'article_head', 'benchmark_head']


class Case(NamedTuple):
    """Features (batch, channels, side, side), of two streams if `channels_b`, and what they are multiplied in."""

    batch: int
    channels: int
    channels_b: Optional[int]
    side: int
    classes: int
    dtype: torch.dtype = torch.float32
    amp: bool = False  # float32 parameters under autocast, as a mixed precision step has them
    tf32: bool = False
    threads: Optional[int] = None  # of the CPU, None for all
    shared: bool = False  # with as many busy processes as threads beside it

    def __str__(self) -> str:
        channels = f'{self.channels}' if self.channels_b is None else f'{self.channels} + {self.channels_b}'
        precision = str(self.dtype).removeprefix('torch.') + ' autocast' * self.amp + ' (TF32)' * self.tf32
        where = f', {self.threads} thread' * (self.threads is not None) + ', shared' * self.shared
        return f'{precision}, B={self.batch}, C={channels}, {self.side} x {self.side}, K={self.classes}{where}'


CPU_CASES = [
    Case(16, 512, None, 28, 200),
    Case(1, 512, None, 28, 200),
    Case(16, 512, None, 28, 200, torch.bfloat16, amp=True),
]
# Narrow and wide, few locations and many, one image and many.
CPU_GRID = [
    Case(b, c, None, n, 200) for c, n, b in product((32, 64, 128, 256, 512, 1024), (7, 14, 28), (1, 16, 64, 256))
]
_SOME = ((1, 512, 28), (16, 512, 28), (16, 256, 14), (64, 64, 7), (256, 32, 7))
CPU_GRID += [
    *(Case(b, c, None, n, 200, threads=1) for b, c, n in _SOME),
    *(Case(b, c, None, n, 200, shared=True) for b, c, n in _SOME),
    *(Case(b, c, None, n, 200, torch.bfloat16, amp=True) for b, c, n in _SOME),
    *(Case(b, c, c, n, 200) for b, c, n in _SOME),
]
_BUDGET = 3.0  # seconds for a figure of the grid
CUDA_CASES = [
    Case(*shape, dtype, amp, tf32)
    for shape in (
        (64, 512, None, 28, 200),
        (1, 512, None, 28, 200),
        (256, 512, None, 14, 1000),
        (32, 512, 512, 28, 200),
    )
    for dtype, amp, tf32 in (
        (torch.bfloat16, False, False),
        (torch.float16, False, False),
        (torch.bfloat16, True, False),
        (torch.float16, True, False),
        (torch.float32, False, True),
        (torch.float32, False, False),
    )
]

_HEAD_NOTES = """

The floor is, for each product, FLOPs over the machine's measured matrix rate in that dtype (float32 without TF32: a
third of TF32's), or the bytes it reads and writes over its measured copy bandwidth where those take longer. Forward:
the triangle product (two streams: the whole) and the classifier; backward adds the gradients of descriptor, features
and weight. Peak memory is what a step allocates above features and parameters; the gradients of features and parameters
are part of it, and in brackets it is given without them. Shared: with as many busy processes beside it as threads."""


def article_head(a: Tensor, b: Optional[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The article's head: full C * C descriptors of (B, C, H, W) features, normalised, then classified."""
    batch, _, height, width = a.shape
    a = a.view(batch, -1, height * width)
    b = a if b is None else b.view(batch, -1, height * width)
    x = torch.bmm(a, b.transpose(1, 2)) / (height * width)
    x = x.view(batch, -1)
    x = F.normalize(torch.sign(x) * torch.sqrt(torch.abs(x) + 1e-10))
    return F.linear(x, weight, bias)


def _our_head(a: Tensor, b: Optional[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return bilinear_classify(a, b, weight, bias)


def _floor(case: Case, repeats: int, device: torch.device) -> Dict[str, float]:
    """Seconds below which this machine cannot go, forward and with backward."""
    size, locations = descriptor_size(case.channels, case.channels_b), case.side**2
    # the CPU multiplies in float32, whatever it is given
    dtype = case.dtype if device.type == 'cuda' else torch.float32
    side, entries = (8192, 2**29) if device.type == 'cuda' else (1536, case.classes * size)
    x = torch.randn(side, side, device=device).to(dtype)
    kept = torch.zeros(entries, device=device, dtype=dtype)
    copied = torch.empty_like(kept)
    multiply = torch.mm if device.type == 'cuda' else cpu.linear
    with tf32(True):
        measured = measure_seconds(
            {'product': lambda: multiply(x, x), 'copy': lambda: copied.copy_(kept)}, repeats, device, statistic=min
        )
    rate = 2 * side**3 / measured['product']
    if device.type == 'cuda' and dtype == torch.float32 and not case.tf32:
        rate /= 3  # as good as float32 is had from three TF32 products
    bandwidth = 2 * kept.nbytes / measured['copy']

    def product(multiplications: int, entries: int) -> float:
        return max(2 * multiplications / rate, entries * kept.element_size() / bandwidth)

    batch = case.batch
    features = batch * locations * (case.channels + (case.channels_b or 0))
    full = batch * locations * case.channels * (case.channels_b or case.channels)
    triangle = batch * locations * size
    classifier = product(batch * size * case.classes, (batch + case.classes) * size)
    forward = product(triangle, features + batch * size) + classifier
    backward = 2 * classifier + product(full * (1 if case.channels_b is None else 2), 2 * batch * size + 2 * features)
    return {'forward': forward, 'forward + backward': forward + backward}


@contextmanager
def _surroundings(case: Case, device: torch.device):
    """The cores and the precision that a case asks for."""
    count = case.threads or torch.get_num_threads()
    with threads(count), busy_cores(count if case.shared and device.type == 'cpu' else 0), tf32(case.tf32):
        yield


class _Contest:
    """The article's head, eager and compiled, and ours, on the same features.

    Args:
        case: Features.
        device: Where they are.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device

        def parameter(*shape: int) -> Tensor:
            x = 0.01 * torch.randn(*shape, device=device)
            return (x if case.amp else x.to(case.dtype)).requires_grad_()

        def features(channels: int) -> Tensor:
            x = torch.randn(case.batch, channels, case.side, case.side, device=device).relu_()
            return x.to(case.dtype).requires_grad_()

        self.a, self.b = features(case.channels), None if case.channels_b is None else features(case.channels_b)
        self.bias = parameter(case.classes)
        full = parameter(case.classes, case.channels * (case.channels_b or case.channels))
        packed = full if self.b is not None else parameter(case.classes, descriptor_size(case.channels))
        self.grad = torch.randn(case.batch, case.classes, device=device)
        torch.compiler.reset()
        self.heads = {
            'eager': (article_head, full),
            'compiled': (torch.compile(article_head), full),
            'ours': (_our_head, packed),
        }

    def forward(self, name: str):
        head, weight = self.heads[name]
        with torch.no_grad(), torch.autocast(self.device.type, self.case.dtype, enabled=self.case.amp):
            head(self.a, self.b, weight, self.bias)

    def step(self, name: str):
        head, weight = self.heads[name]
        with torch.autocast(self.device.type, self.case.dtype, enabled=self.case.amp):
            logits = head(self.a, self.b, weight, self.bias)
        logits.backward(self.grad.to(logits.dtype))
        for x in (self.a, self.b, weight, self.bias):
            if x is not None:
                x.grad = None

    def seconds(self, repeats: int, budget: float = math.inf) -> Dict[str, Dict[str, float]]:
        """Seconds of each head, forward and with backward."""
        return {
            what: measure_seconds({k: partial(run, k) for k in self.heads}, repeats, self.device, budget=budget)
            for what, run in (('forward', self.forward), ('forward + backward', self.step))
        }

    def gradient_bytes(self, name: str) -> int:
        return sum(x.nbytes for x in (self.a, self.b, self.heads[name][1], self.bias) if x is not None)


def _head_rows(case: Case, repeats: int, device: torch.device) -> List[List[str]]:
    """Rows of a case in full: seconds, floors, memory."""
    contest, rows = _Contest(case, device), []
    with _surroundings(case, device):
        floor = _floor(case, repeats, device)
        for what, s in contest.seconds(repeats).items():
            rows.append(
                [str(case), what]
                + [format_time(s[k]) for k in s]
                + [f'{s[k] / s["ours"]:.2f} x' for k in ('eager', 'compiled')]
                + [format_time(floor[what]), f'{floor[what] / s["ours"]:.2f}']
            )
        peaks = {k: peak_memory(partial(contest.step, k), device) / 2**20 for k in contest.heads}
    gradients = {k: contest.gradient_bytes(k) / 2**20 for k in contest.heads}
    rows.append(
        [str(case), 'peak memory (without gradients)']
        + [f'{peaks[k]:.0f} MiB ({peaks[k] - gradients[k]:.0f})' for k in contest.heads]
        + [f'{peaks["ours"] / peaks[k]:.2f}' for k in ('eager', 'compiled')]
        + ['', '']
    )
    return rows


def _summary(ratios: List[Tuple[Case, str, float]]) -> str:
    """How we do by number of channels: figures, those where we are slower, the median, the worst."""
    rows = []
    for channels in sorted({case.channels for case, _, _ in ratios}):
        found = [r for r in ratios if r[0].channels == channels]
        case, what, worst = min(found, key=lambda r: r[2])
        slower = sum(ratio < 1 for _, _, ratio in found)
        median = statistics.median(ratio for _, _, ratio in found)
        rows.append([str(channels), str(len(found)), str(slower), f'{median:.2f} x', f'{worst:.2f} x: {case}, {what}'])
    return markdown_table(['channels', 'figures', 'slower', 'median', 'worst'], rows)


def _grid(repeats: int, device: torch.device) -> str:
    """A row for each case of the grid, and where we are slower than the better of the others."""
    rows, ratios = [], []
    for case in tqdm(CPU_GRID, unit='case'):
        with _surroundings(case, device):
            seconds = _Contest(case, device).seconds(repeats, _BUDGET)
        row = [str(case)]
        for what, s in seconds.items():
            ratio = round(min(s['eager'], s['compiled']) / s['ours'], 2)
            row += [format_time(s[k]) for k in s] + [f'{ratio:.2f} x']
            ratios.append((case, what, ratio))
        rows.append(row)
    slower = sum(ratio < 1 for _, _, ratio in ratios)
    times = ["article's", 'compiled', 'ours', 'against the better']
    return (
        f'\n\n## Shapes\n\nSlower than the better of the two in {slower} of {len(ratios)} figures:\n\n'
        + _summary(ratios)
        + '\n\n'
        + markdown_table(['case', *(f'{what}: {t}' for what in ('forward', 'with backward') for t in times)], rows)
    )


def benchmark_head(output: Optional[Union[str, Path]] = None, repeats: int = 15, device: str = 'cpu') -> str:
    """The fused head against the article's, eager and under torch.compile.

    Args:
        output: File for the table.
        repeats: Measurements behind each median.
        device: 'cpu' or 'cuda'.

    Returns:
        Markdown table with the command and versions.

    Raises:
        RuntimeError: If there is no such device.
        OSError: If `output` cannot be written.
    """
    torch_device = find_device(device)
    is_cpu = torch_device.type == 'cpu'
    cases = CUDA_CASES if torch_device.type == 'cuda' else CPU_CASES
    rows = []
    for case in tqdm(cases, unit='case'):
        rows += _head_rows(case, repeats, torch_device)
    header = [
        'case',
        'measured',
        "article's, eager",
        "article's, compiled",
        'ours',
        'against eager',
        'against compiled',
    ]
    return write(
        f'# The head: {torch_device.type}\n\n`timm-bilinear benchmark head --device {device}`: medians of {repeats}, in'
        f' turn, in one process.\n\n{describe_machine(torch_device)}.\n\n'
        + markdown_table([*header, 'floor', 'floor / ours'], rows)
        + _HEAD_NOTES
        + (_grid(repeats, torch_device) if is_cpu else ''),
        output,
    )
