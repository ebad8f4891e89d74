"""Speed and memory of the head against the article's, and of whole models against their backbones.

Rows are measured in one process, all contestants in turn within each repeat, and reported as medians.
"""

from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Union

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..layers import BilinearHead, list_poolings
from ..layers.pooling import most_streams
from ..ops import bilinear_classify, cpu, descriptor_size
from .measure import (
    describe_machine,
    find_device,
    format_time,
    markdown_table,
    measure_seconds,
    peak_memory,
    tf32,
    write,
)

__all__ = ['benchmark_head', 'benchmark_model', 'benchmark_poolings']


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

    def __str__(self) -> str:
        channels = f'{self.channels}' if self.channels_b is None else f'{self.channels} + {self.channels_b}'
        precision = str(self.dtype).removeprefix('torch.') + ' autocast' * self.amp + ' (TF32)' * self.tf32
        return f'{precision}, B={self.batch}, C={channels}, {self.side} x {self.side}, K={self.classes}'


CPU_CASES = [
    Case(16, 512, None, 28, 200),
    Case(1, 512, None, 28, 200),
    Case(16, 512, None, 28, 200, torch.bfloat16, amp=True),
]
CUDA_CASES = [
    Case(*shape, dtype, tf32=tf32)
    for shape in (
        (64, 512, None, 28, 200),
        (1, 512, None, 28, 200),
        (256, 512, None, 14, 1000),
        (32, 512, 512, 28, 200),
    )
    for dtype, tf32 in (
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
        (torch.float32, False),
    )
]

POOLING_CASES = [
    Case(16, 512, None, 28, 200),
    Case(16, 256, None, 14, 200),
    Case(16, 256, 256, 14, 200),
]
# Heads as the poolings' named models have them.
_POOLING_FORMS = {'isqrt': dict(proj_dim=256, proj_type='conv_bn_relu'), 'lowrank': dict(proj_dim=100)}

_HEAD_NOTES = """

The floor is, for each product, FLOPs over the machine's measured matrix rate in that dtype (float32 without TF32: a
third of TF32's), or the bytes it reads and writes over its measured copy bandwidth where those take longer. Forward:
the triangle product (two streams: the whole) and the classifier; backward adds the gradients of descriptor, features
and weight. Peak memory is what a step allocates above features and parameters; the gradients of features and parameters
are part of it, and in brackets it is given without them."""


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


def _head_rows(case: Case, repeats: int, device: torch.device) -> List[List[str]]:
    def parameter(*shape: int) -> Tensor:
        x = 0.01 * torch.randn(*shape, device=device)
        return (x if case.amp else x.to(case.dtype)).requires_grad_()

    def features(channels: int) -> Tensor:
        x = torch.randn(case.batch, channels, case.side, case.side, device=device).relu_()
        return x.to(case.dtype).requires_grad_()

    a, b = features(case.channels), None if case.channels_b is None else features(case.channels_b)
    bias = parameter(case.classes)
    full = parameter(case.classes, case.channels * (case.channels_b or case.channels))
    packed = full if b is not None else parameter(case.classes, descriptor_size(case.channels))
    grad = torch.randn(case.batch, case.classes, device=device)
    torch.compiler.reset()
    heads = {
        'eager': (article_head, full),
        'compiled': (torch.compile(article_head), full),
        'ours': (_our_head, packed),
    }

    def forward(head, weight):
        with torch.no_grad(), torch.autocast(device.type, case.dtype, enabled=case.amp):
            head(a, b, weight, bias)

    def both(head, weight):
        with torch.autocast(device.type, case.dtype, enabled=case.amp):
            logits = head(a, b, weight, bias)
        logits.backward(grad.to(logits.dtype))
        for x in (a, b, weight, bias):
            if x is not None:
                x.grad = None

    rows = []
    with tf32(case.tf32):
        floor = _floor(case, repeats, device)
        for name, run in (('forward', forward), ('forward + backward', both)):
            s = measure_seconds({k: lambda run=run, v=v: run(*v) for k, v in heads.items()}, repeats, device)
            rows.append(
                [str(case), name]
                + [format_time(s[k]) for k in heads]
                + [f'{s[k] / s["ours"]:.2f} x' for k in ('eager', 'compiled')]
                + [format_time(floor[name]), f'{floor[name] / s["ours"]:.2f}']
            )
        peaks = {k: peak_memory(lambda v=v: both(*v), device) / 2**20 for k, v in heads.items()}
    gradients = {k: sum(x.nbytes for x in (a, b, v[1], bias) if x is not None) / 2**20 for k, v in heads.items()}
    rows.append(
        [str(case), 'peak memory (without gradients)']
        + [f'{peaks[k]:.0f} MiB ({peaks[k] - gradients[k]:.0f})' for k in heads]
        + [f'{peaks["ours"] / peaks[k]:.2f}' for k in ('eager', 'compiled')]
        + ['', '']
    )
    return rows


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
        + _HEAD_NOTES,
        output,
    )


def benchmark_model(output: Optional[Union[str, Path]] = None, repeats: int = 15, device: str = 'cpu') -> str:
    """Inference and training (SGD with momentum) of bilinear CNNs at 448 px against timm's models of their backbones.

    Args:
        output: File for the table.
        repeats: Measurements behind each median.
        device: 'cpu', in float32, or 'cuda', under bfloat16 autocast.

    Returns:
        Markdown table with the command and versions.

    Raises:
        RuntimeError: If there is no such device.
        OSError: If `output` cannot be written.
    """
    torch_device = find_device(device)
    amp = torch_device.type == 'cuda'
    batch = 64 if amp else 16
    layout = dict(device=torch_device, memory_format=torch.channels_last if amp else torch.contiguous_format)
    images = torch.randn(batch, 3, 448, 448).to(**layout)
    targets = torch.randint(0, 200, (batch,), device=torch_device)

    def runs(name: str) -> Dict[str, Callable[[], None]]:
        model = timm.create_model(name, num_classes=200).to(**layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def inference():
            model.eval()
            with torch.inference_mode(), torch.autocast(torch_device.type, torch.bfloat16, enabled=amp):
                model(images)

        def training():
            model.train()
            optimizer.zero_grad()
            with torch.autocast(torch_device.type, torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()

        return {'inference': inference, 'training': training}

    rows = []
    for backbone in ('resnet18', 'vgg16') if amp else ('resnet18',):
        contestants = {name: runs(name) for name in (backbone, f'bcnn_{backbone}')}
        for mode in ('inference', 'training'):
            s = measure_seconds({name: run[mode] for name, run in contestants.items()}, repeats, torch_device)
            rows += [[n, mode, format_time(t), f'{batch / t:.1f}', f'{t / s[backbone]:.3f}'] for n, t in s.items()]
    precision = 'bfloat16 autocast, channels_last' if amp else 'float32'
    setting = f'448 px, batch {batch}, {precision}, 200 classes, SGD with momentum'
    return write(
        f'# Whole models: {torch_device.type}\n\n`timm-bilinear benchmark model --device {device}`: {setting};'
        f' medians of {repeats},\nin turn, in one process.\n\n{describe_machine(torch_device)}.\n\n'
        + markdown_table(['model', '', 'step', 'images/s', "against the backbone's"], rows),
        output,
    )


class _AverageHead(nn.Module):
    """Average pooling of both streams and a linear classifier."""

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.num_features = num_features
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor, x_b: Optional[Tensor] = None) -> Tensor:
        return self.fc((x if x_b is None else torch.cat([x, x_b], 1)).mean((2, 3)))


class _ArticleHead(nn.Module):
    """The article's head as a module."""

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.num_features = num_features
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor, x_b: Optional[Tensor] = None) -> Tensor:
        return article_head(x, x_b, self.fc.weight, self.fc.bias)


def pooling_heads(case: Case) -> Dict[str, nn.Module]:
    """Average pooling, the article's head and a head of every pooling that takes the case's streams."""
    channels_b = case.channels_b or 0
    heads: Dict[str, nn.Module] = {
        'average pooling': _AverageHead(case.channels + channels_b, case.classes),
        "article's head": _ArticleHead(case.channels * (channels_b or case.channels), case.classes),
    }
    for name in list_poolings():
        if most_streams(name) > 1 or case.channels_b is None:
            form = _POOLING_FORMS.get(name, {})
            heads[name] = BilinearHead(
                case.channels, case.classes, in_features_b=case.channels_b, pool_type=name, **form
            )
    return heads


def _step(head: nn.Module, features: List[Tensor], backward: bool):
    with torch.set_grad_enabled(backward):
        logits = head(features[0], x_b=features[1] if len(features) == 2 else None)
    if backward:
        torch.autograd.grad(logits.sum(), [*features, *head.parameters()])


def benchmark_poolings(output: Optional[Union[str, Path]] = None, repeats: int = 15, device: str = 'cpu') -> str:
    """Every registered pooling as the head of a model, beside average pooling and the article's head.

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
    rows = []
    for case in tqdm(POOLING_CASES, unit='case'):
        shapes = [(case.batch, c, case.side, case.side) for c in (case.channels, case.channels_b) if c]
        features = [torch.randn(shape, device=torch_device).relu_().requires_grad_() for shape in shapes]
        heads = {name: head.to(torch_device) for name, head in pooling_heads(case).items()}
        torch.compiler.reset()
        compiled = {name: torch.compile(head) for name, head in heads.items()}
        seconds = []
        for backward in (False, True):
            for contestants in (heads, compiled):
                runs = {name: partial(_step, head, features, backward) for name, head in contestants.items()}
                seconds.append(measure_seconds(runs, repeats, torch_device))
        for name, head in heads.items():
            memory = peak_memory(partial(_step, head, features, True), torch_device) / 2**20
            count = sum(p.numel() for p in head.parameters())
            rows.append(
                [str(case), name, f'{head.num_features:,}', f'{count / 1e6:.2f} M']
                + [format_time(s[name]) for s in seconds]
                + [f'{memory:.0f} MiB']
            )
    header = ['case', 'pooling', 'descriptor', 'parameters']
    header += ['forward', 'compiled', 'forward + backward', 'compiled', 'peak memory']
    return write(
        f'# Poolings: {torch_device.type}\n\n`timm-bilinear benchmark poolings --device {device}`: heads alone, in'
        f' training mode, medians of {repeats},\nin turn, in one process. `isqrt` with its projection to 256 channels,'
        f' `lowrank` with its to 100.\n\n{describe_machine(torch_device)}.\n\n' + markdown_table(header, rows),
        output,
    )
