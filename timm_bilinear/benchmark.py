"""Speed and memory of the head against the article's, and of the whole model against timm's backbone, on the CPU.

Rows are measured in one process, all contestants in turn within each repeat, and reported as medians.
"""

import platform
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Union

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import bilinear_classify, cpu
from .ops.packing import packed_size

__all__ = ['benchmark_head', 'benchmark_model']

_HEAD_NOTES = """

The floor is FLOPs over this machine's measured matrix rate (oneDNN, float32), or bytes over its measured copy bandwidth
where those take longer: the triangle product and one pass over the packed classifier forward; backward, the full
product and two more passes. Peak memory is what a step allocates above features and parameters; the gradients of
features and parameters are part of it, and in brackets it is given without them."""


def article_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The article's head: full C * C descriptors of (B, C, H, W) features, normalised, then classified."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height * width)
    x = torch.bmm(x, x.transpose(1, 2)) / (height * width)
    x = x.view(batch, channels * channels)
    x = F.normalize(torch.sign(x) * torch.sqrt(torch.abs(x) + 1e-10))
    return F.linear(x, weight, bias)


def _seconds(
    contestants: Dict[str, Callable[[], None]],
    repeats: int,
    statistic: Callable[[List[float]], float] = statistics.median,
) -> Dict[str, float]:
    """Median (or other statistic of the) seconds of each contestant, taken in turn, after two rounds of warm-up."""
    seconds: Dict[str, List[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistic(s) for name, s in seconds.items()}


def _peak_memory(run: Callable[[], None]) -> int:
    """Most bytes allocated at one time during `run`, above what was allocated before."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    peak = current = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def _floor(batch: int, channels: int, locations: int, classes: int, repeats: int) -> Dict[str, float]:
    """Seconds that FLOPs at the measured matrix rate, or bytes at the measured bandwidth if those take longer, need."""
    size = packed_size(channels)
    a, w = torch.randn(channels, locations), torch.randn(classes, size)
    copy = torch.empty_like(w)

    def products():
        for _ in range(16):
            cpu.linear(a, a)

    measured = _seconds({'matrix': products, 'copy': lambda: copy.copy_(w)}, repeats, statistic=min)
    rate = 16 * 2 * channels * channels * locations / measured['matrix']
    bandwidth = 2 * w.nbytes / measured['copy']
    triangle = 2 * batch * locations * size / rate
    classifier = max(2 * batch * classes * size / rate, w.nbytes / bandwidth)
    forward = triangle + classifier
    # backward: the full product, the gradient of the descriptor and that of the weight
    return {'forward': forward, 'both': forward + 2 * batch * locations * channels**2 / rate + 2 * classifier}


def _versions() -> str:
    return (
        f'{_cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}, timm {timm.__version__},'
        f' Python {platform.python_version()}'
    )


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


def _head_rows(batch: int, amp: bool, repeats: int) -> List[List[str]]:
    channels, side, classes = 512, 28, 200
    x = torch.randn(batch, channels, side, side).relu_().requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    full = (0.01 * torch.randn(classes, channels**2)).requires_grad_()
    packed = (0.01 * torch.randn(classes, packed_size(channels))).requires_grad_()
    grad = torch.randn(batch, classes)
    torch._dynamo.reset()
    heads = {
        'eager': (article_head, full),
        'compiled': (torch.compile(article_head), full),
        'ours': (lambda x, weight, bias: bilinear_classify(x, None, weight, bias), packed),
    }

    def forward(head, weight):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=amp):
            head(features, weight, bias)

    def both(head, weight):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            logits = head(features, weight, bias)
        logits.backward(grad.to(logits.dtype))
        features.grad = weight.grad = bias.grad = None

    # under autocast a backbone hands over bfloat16 features
    features = x.detach().bfloat16().requires_grad_() if amp else x
    floor = _floor(batch, channels, side**2, classes, repeats)
    rows = []
    for name, run, floor_s in (('forward', forward, floor['forward']), ('forward + backward', both, floor['both'])):
        s = _seconds({k: lambda run=run, v=v: run(*v) for k, v in heads.items()}, repeats)
        best = min(s['eager'], s['compiled'])
        rows.append(
            [f'{"bfloat16 autocast" if amp else "float32"}, B={batch}', name]
            + [f'{1e3 * s[k]:.1f} ms' for k in heads]
            + [f'{best / s["ours"]:.2f} x']
            + (['', ''] if amp else [f'{1e3 * floor_s:.1f} ms', f'{s["ours"] / floor_s:.2f}'])
        )
    peaks = {k: _peak_memory(lambda v=v: both(*v)) / 2**20 for k, v in heads.items()}
    gradients = {k: (features.nbytes + v[1].nbytes + bias.nbytes) / 2**20 for k, v in heads.items()}
    rows.append(
        [rows[0][0], 'peak memory of a step, (without its gradients)']
        + [f'{peaks[k]:.0f} MiB ({peaks[k] - gradients[k]:.0f})' for k in heads]
        + [f'{peaks["ours"] / peaks["eager"]:.2f} of eager', '', '']
    )
    return rows


def benchmark_head(output: Optional[Union[str, Path]] = None, repeats: int = 15) -> str:
    """The fused head against the article's, eager and under torch.compile: 512 channels, 28 x 28, 200 classes.

    Args:
        output: File for the table.
        repeats: Measurements behind each median.

    Returns:
        Markdown table with the command and versions.

    Raises:
        OSError: If `output` cannot be written.
    """
    rows = [row for batch, amp in ((16, False), (1, False), (16, True)) for row in _head_rows(batch, amp, repeats)]
    header = ['case', 'measured', "article's, eager", "article's, compiled", 'ours', 'ours against the better of them']
    return _write(
        '# The head on the CPU\n\n`timm-bilinear benchmark head`: 512 channels, 28 x 28 locations, 200 classes; medians'
        f' of {repeats}, in turn, in one process.\n\n{_versions()}.\n\n'
        + _table([*header, 'floor', 'ours / floor'], rows)
        + _HEAD_NOTES,
        output,
    )


def benchmark_model(output: Optional[Union[str, Path]] = None, repeats: int = 7) -> str:
    """A training step (SGD with momentum) of `bcnn_resnet18` at 448 px against timm's `resnet18` there.

    Args:
        output: File for the table.
        repeats: Measurements behind each median.

    Returns:
        Markdown table with the command and versions.

    Raises:
        OSError: If `output` cannot be written.
    """
    batch = 16
    images, targets = torch.randn(batch, 3, 448, 448), torch.randint(0, 200, (batch,))

    def step(name: str) -> Callable[[], None]:
        model = timm.create_model(name, num_classes=200).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def run():
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()

        return run

    s = _seconds({name: step(name) for name in ('resnet18', 'bcnn_resnet18')}, repeats)
    ratio = s['bcnn_resnet18'] / s['resnet18']
    rows = [[name, f'{t:.2f} s', f'{batch / t:.2f}', f'{t / s["resnet18"]:.3f}'] for name, t in s.items()]
    return _write(
        f'# Training a whole model on the CPU\n\n`timm-bilinear benchmark model`: 448 px, batch {batch}, float32, 200'
        f' classes, SGD with momentum; medians of {repeats}, in turn, in\none process.\n\n{_versions()}.\n\n'
        + _table(['model', 'step', 'images/s', 'against resnet18'], rows)
        + f'\n\nThe bilinear head costs {100 * (ratio - 1):.1f} % of the step.',
        output,
    )
