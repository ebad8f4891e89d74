"""All that waits for a GPU in one call of at most nine minutes: tests, tables, a search for tiles. Writes pages.

    python tests/ops/gpu_day.py [--output docs]

Each part has its share of the time, in seconds; one that takes longer is cut off, said to be so, and the next begins.
"""

import argparse
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import torch

from timm_bilinear.ops.kernels import descriptors, gradients, path, slopes, tiles
from timm_bilinear.tools.measure import describe_machine, markdown_table, measure_seconds, write

ROOT = Path(__file__).parents[2]
CUDA = torch.device('cuda')
# images, channels, locations: of a whole model at 448 px, and of one with another stage
SHAPES = ((64, 512, 784), (64, 512, 196), (1, 512, 784))
CANDIDATES: Dict[str, List[tiles.Config]] = {
    'descriptors.HALF': [
        tiles.Config(i, j, n, warps, stages, maxnreg)
        for (i, j), n, (warps, maxnreg), stages in product(
            ((128, 128), (64, 128), (64, 64)), (32, 64), ((4, None), (8, None), (8, 128)), (2, 3, 4)
        )
    ],
    'slopes.CONFIG': [
        tiles.Config(i, j, 0, num_warps=warps, num_stages=1) for i, j, warps in product((32, 64), (32, 64, 128), (4, 8))
    ],
    'gradients.HALF': [
        tiles.Config(i, j, n, num_warps=8, num_stages=stages)
        for i, j, n, stages in product((64, 128), (32, 64), (64, 128), (2, 3))
    ],
}


def _runs(shape: Tuple[int, int, int]) -> Dict[str, Callable[[], None]]:
    """What each constant is the tile of, by the constant's name."""
    batch, channels, locations = shape
    a = torch.randn(batch, channels, locations, device=CUDA, dtype=torch.bfloat16).relu_()
    y, _, scale = path.forward(a, None, 'avg', 1e-10)
    coefficients = torch.ones(batch, 3, device=CUDA)
    gradient = torch.randn_like(y)

    def backward(save_memory: bool):
        gradients.feature_gradients(gradient, y, coefficients, scale, a, None, 'avg', save_memory)

    return {
        'descriptors.HALF': lambda: path.forward(a, None, 'avg', 1e-10),
        'slopes.CONFIG': lambda: backward(False),
        'gradients.HALF': lambda: backward(True),
    }


def _tune_rows(until: float) -> Iterator[List[str]]:
    """The fastest tiles of each kernel at each shape, in bfloat16, beside those that are set."""
    for shape, (name, candidates) in product(SHAPES, CANDIDATES.items()):
        module, constant = (
            {'descriptors': descriptors, 'gradients': gradients, 'slopes': slopes}[name.split('.')[0]],
            name.split('.')[1],
        )
        run, current, seconds = _runs(shape)[name], getattr(module, constant), {}
        for config in [current, *candidates]:
            if time.monotonic() > until:
                break
            setattr(module, constant, config)
            try:
                seconds[config] = measure_seconds({name: run}, 10, CUDA)[name]
            except Exception as e:  # out of shared memory, or not a tile that Triton takes
                print(f'{name} {tuple(config)}: {type(e).__name__}', file=sys.stderr)
        setattr(module, constant, current)
        for config in [*sorted(seconds, key=seconds.get)[:3], current]:
            if config in seconds:
                label = ', as it is set' * (config == current)
                yield [name, f'{shape}', f'{tuple(config)}{label}', f'{1e6 * seconds[config]:.0f} us']


def tune(output: Path, limit: int):
    """Write the page of tiles."""
    rows = list(_tune_rows(time.monotonic() + limit))
    header = ['tile', 'images, channels, locations', 'rows, columns, depth, warps, stages, registers', 'median']
    write(
        f'# Tiles\n\n`python tests/ops/gpu_day.py`, bfloat16, {describe_machine(CUDA)}.\n\n'
        + markdown_table(header, rows),
        output,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=ROOT / 'docs', help='folder for the pages (default: docs)')
    parser.add_argument('--tune', type=int, metavar='SECONDS', help='only search for tiles, for so long')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('gpu_day.py: error: There is no GPU: torch.cuda.is_available() is False.')
    if args.tune is not None:
        tune(args.output / 'gpu_tiles.md', args.tune)
        return
    benchmark = ['-m', 'timm_bilinear', 'benchmark']

    def table(what: str, repeats: int) -> List[str]:
        page = args.output / f'benchmark_{what}_cuda.md'
        return [*benchmark, what, '--device', 'cuda', '--repeats', str(repeats), '--output', str(page)]

    parts = {
        'tests': (150, ['-m', 'pytest', '-q', '-x', 'tests/ops', '--deselect', 'tests/ops/test_kernels_compile.py']),
        'head': (120, table('head', 15)),
        'model': (90, table('model', 10)),
        'poolings': (60, table('poolings', 5)),
        'tiles': (110, [__file__, '--output', str(args.output), '--tune', '90']),
    }
    failed = []
    for name, (limit, command) in parts.items():
        began = time.monotonic()
        try:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=limit).returncode
            outcome = 'done' if code == 0 else f'exit code {code}'
        except subprocess.TimeoutExpired:
            outcome = f'cut off after {limit} s'
        print(f'{name}: {outcome}, {time.monotonic() - began:.0f} s', flush=True)
        failed += [name] * (outcome != 'done')
    if failed:
        sys.exit(f'gpu_day.py: error: not whole: {", ".join(failed)}')


if __name__ == '__main__':
    main()
