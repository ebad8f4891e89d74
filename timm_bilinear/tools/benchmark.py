"""Speed and memory of the head against the article's, and of whole models against their backbones.

Rows are measured in one process, all contestants in turn within each repeat, and reported as medians.
"""

import platform
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Union

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .._compat import cuda_sleep
from ..ops import bilinear_classify, cpu, descriptor_size

__all__ = ['benchmark_head', 'benchmark_model']


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


def _seconds(
    contestants: Dict[str, Callable[[], None]],
    repeats: int,
    device: torch.device,
    statistic: Callable[[List[float]], float] = statistics.median,
) -> Dict[str, float]:
    """Median (or other statistic of the) seconds of each contestant, taken in turn, after three rounds of warm-up.

    On a GPU each run starts with a cold cache, and behind work that hides the time it takes to launch.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in contestants}
    cache = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == 'cuda' else None
    for repeat in range(repeats + 3):
        for name, run in contestants.items():
            if cache is not None:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                cache.zero_()
                cuda_sleep(4_000_000)  # 2 ms, in which all that follows is launched
                start.record()
                run()
                end.record()
                torch.cuda.synchronize(device)
                took = 1e-3 * start.elapsed_time(end)
            else:
                began = time.perf_counter()
                run()
                took = time.perf_counter() - began
            if repeat >= 3:
                seconds[name].append(took)
    return {name: statistic(s) for name, s in seconds.items()}


def _peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes allocated at one time during `run`, above what was allocated before."""
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    peak = current = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


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
    with _tf32(True):
        measured = _seconds(
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


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise RuntimeError(f"No GPU for '{name}': torch.cuda.is_available() is False.")
    return device


def _versions(device: torch.device) -> str:
    name = f'{_cpu_name()}, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    return f'{name}; torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}'


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _table(header: List[str], rows: List[List[str]]) -> str:
    return '\n'.join(f'| {" | ".join(row)} |' for row in [header, ['---'] * len(header), *rows])


def _write(text: str, output: Optional[Union[str, Path]]) -> str:
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text + '\n')
    return text


@contextmanager
def _tf32(enabled: bool):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = 'tf32' if enabled else 'ieee'
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _time(seconds: float) -> str:
    return f'{1e3 * seconds:.1f} ms' if seconds > 1e-3 else f'{1e6 * seconds:.0f} us'


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
    with _tf32(case.tf32):
        floor = _floor(case, repeats, device)
        for name, run in (('forward', forward), ('forward + backward', both)):
            s = _seconds({k: lambda run=run, v=v: run(*v) for k, v in heads.items()}, repeats, device)
            rows.append(
                [str(case), name]
                + [_time(s[k]) for k in heads]
                + [f'{s[k] / s["ours"]:.2f} x' for k in ('eager', 'compiled')]
                + [_time(floor[name]), f'{floor[name] / s["ours"]:.2f}']
            )
        peaks = {k: _peak_memory(lambda v=v: both(*v), device) / 2**20 for k, v in heads.items()}
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
    torch_device = _device(device)
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
    return _write(
        f'# The head: {torch_device.type}\n\n`timm-bilinear benchmark head --device {device}`: medians of {repeats}, in'
        f' turn, in one process.\n\n{_versions(torch_device)}.\n\n'
        + _table([*header, 'floor', 'floor / ours'], rows)
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
    torch_device = _device(device)
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
            s = _seconds({name: run[mode] for name, run in contestants.items()}, repeats, torch_device)
            rows += [[n, mode, _time(t), f'{batch / t:.1f}', f'{t / s[backbone]:.3f}'] for n, t in s.items()]
    precision = 'bfloat16 autocast, channels_last' if amp else 'float32'
    setting = f'448 px, batch {batch}, {precision}, 200 classes, SGD with momentum'
    return _write(
        f'# Whole models: {torch_device.type}\n\n`timm-bilinear benchmark model --device {device}`: {setting};'
        f' medians of {repeats},\nin turn, in one process.\n\n{_versions(torch_device)}.\n\n'
        + _table(['model', '', 'step', 'images/s', "against the backbone's"], rows),
        output,
    )
