"""Measuring: seconds and memory of contestants, and the tables that tell them."""

import math
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, List, Optional, Union

import timm
import torch

from .._compat import cuda_sleep
from ..ops import memory

__all__ = [
    'busy_cores',
    'describe_machine',
    'find_device',
    'format_time',
    'markdown_table',
    'measure_seconds',
    'peak_memory',
    'tf32',
    'threads',
    'write',
]


def measure_seconds(
    contestants: Dict[str, Callable[[], None]],
    repeats: int,
    device: torch.device,
    statistic: Callable[[List[float]], float] = statistics.median,
    budget: float = math.inf,
) -> Dict[str, float]:
    """Median (or other statistic of the) seconds of each contestant, taken in turn, after three rounds of warm-up.

    On a GPU each run starts with a cold cache, and behind work that hides the time it takes to launch.

    Args:
        contestants: What to run, by name.
        repeats: Rounds that are measured.
        device: Where they run.
        statistic: What is made of the seconds of a contestant.
        budget: Seconds that all rounds may take; where they would take more there are fewer, but one for warm-up and
            three.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in contestants}
    cache = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == 'cuda' else None
    warm_up, began = 3, time.perf_counter()
    for repeat in range(repeats + 3):
        elapsed = time.perf_counter() - began
        if repeat == 1 and 4 * elapsed > budget:  # the first round has compiled, too
            warm_up = 1
        if repeat >= warm_up + 3 and elapsed > budget:
            break
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
                before = time.perf_counter()
                run()
                took = time.perf_counter() - before
            if repeat >= warm_up:
                seconds[name].append(took)
    return {name: statistic(s) for name, s in seconds.items()}


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes allocated at one time during `run`, above what was allocated before."""
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with memory.counted(), torch.profiler.profile(activities=cpu, profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    peak = current = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def find_device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise RuntimeError(f"No GPU for '{name}': torch.cuda.is_available() is False.")
    return device


def describe_machine(device: torch.device) -> str:
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


def markdown_table(header: List[str], rows: List[List[str]]) -> str:
    return '\n'.join(f'| {" | ".join(row)} |' for row in [header, ['---'] * len(header), *rows])


def write(text: str, output: Optional[Union[str, Path]]) -> str:
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text + '\n')
    return text


@contextmanager
def busy_cores(count: int):
    """So many processes that never rest, as the workers of a data loader or other users' work."""
    processes = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(count)]
    try:
        if processes:
            time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(enabled: bool):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = 'tf32' if enabled else 'ieee'
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def format_time(seconds: float) -> str:
    return f'{1e3 * seconds:.1f} ms' if seconds > 1e-3 else f'{1e6 * seconds:.0f} us'
