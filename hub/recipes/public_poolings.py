"""Seconds of poolings beside the code that their authors, or a toolkit, published, eager, on the same features.

python hub/recipes/public_poolings.py --mpncov fast-MPN-COV --hawkeye Hawkeye --umass bilinear-cnn --output table.md

The folders are checkouts of jiangtaoxie/fast-MPN-COV, Hawkeye-FineGrained/Hawkeye and cvl-umass/bilinear-cnn.
"""

import argparse
import runpy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_bilinear.layers import create_pooling
from timm_bilinear.tools.measure import describe_machine, format_time, markdown_table, measure_seconds, write

_SHAPES = ((16, 512, 28), (16, 256, 14))


def load_hawkeye(repo: Path) -> type:
    """Its compact bilinear pooling, of the one file, without what its package imports beside it."""
    stubs = dict(
        backbone=dict(vgg16=None),
        registry=dict(MODEL=SimpleNamespace(register=lambda cls: cls)),
        utils=dict(initialize_weights=None),
    )
    sys.modules['model'] = ModuleType('model')
    for name, content in stubs.items():
        sys.modules[f'model.{name}'] = SimpleNamespace(**content)
    return runpy.run_path(str(repo / 'model' / 'methods' / 'CBCNN.py'))['CompactBilinearPooling']


class _Release(nn.Module):
    """The authors' pooling, matrix root if there is one, signed root and norm, as their module has them in a row."""

    def __init__(self, pool: nn.Module, root: Optional[nn.Module], two_maps: bool):
        super().__init__()
        self.pool, self.root, self.two_maps = pool, root, two_maps

    def forward(self, x: Tensor) -> Tensor:
        z = self.pool(x, x) if self.two_maps else self.pool(x)
        z = z if self.root is None else self.root(z)
        z = z.view(x.shape[0], -1)
        return F.normalize(torch.sqrt(F.relu(z) + 1e-5) - torch.sqrt(F.relu(-z) + 1e-5))


def pairs(channels: int, args: argparse.Namespace) -> List[Tuple[str, str, nn.Module, nn.Module]]:
    """Poolings, whose code it is, theirs and ours."""
    found = []
    if args.mpncov:
        sys.path.insert(0, str(args.mpncov))
        from src.representation.MPNCOV import MPNCOV

        theirs = MPNCOV(iterNum=5, input_dim=channels)
        found.append(('isqrt', 'fast-MPN-COV', theirs, create_pooling('isqrt', channels, isometric=False)))
    if args.hawkeye:
        theirs = load_hawkeye(args.hawkeye)(channels, channels, 8192)
        found.append(('sketch', 'Hawkeye', theirs, create_pooling('sketch', channels)))
    if args.umass:
        sys.path.insert(0, str(args.umass))
        from BCNN import SecondOrderGammaDemocratic, TensorProduct
        from matrixSquareRoot import MatrixSquareRoot

        product = TensorProduct([channels] * 2)
        found.append(('avg', 'cvl-umass', _Release(product, None, True), create_pooling('avg', channels, eps=1e-5)))
        for iterations in (5, None):
            theirs = _Release(product, MatrixSquareRoot(5, channels, backwardIter=5), True)
            ours = create_pooling('sqrtm', channels, iterations=iterations, eps=1e-5)
            found.append((f'sqrtm, iterations={iterations}', 'cvl-umass, 5 iterations', theirs, ours))
        theirs = _Release(SecondOrderGammaDemocratic(channels**2, gamma=0.5), None, False)
        found.append(('democratic', 'cvl-umass', theirs, create_pooling('democratic', channels, eps=1e-5)))
    return found


def _run(pooling: nn.Module, x: Tensor, weights: Optional[Tensor]):
    with torch.set_grad_enabled(weights is not None):
        z = pooling(x).flatten(1)
    if weights is not None:
        torch.autograd.grad(z, x, weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--mpncov', type=Path, help='checkout of jiangtaoxie/fast-MPN-COV')
    parser.add_argument('--hawkeye', type=Path, help='checkout of Hawkeye-FineGrained/Hawkeye')
    parser.add_argument('--umass', type=Path, help='checkout of cvl-umass/bilinear-cnn')
    parser.add_argument('--repeats', type=int, default=7, help='behind each median (default: %(default)s)')
    parser.add_argument('--output', type=Path, help='file for the table')
    args = parser.parse_args()
    rows = []
    try:
        for batch, channels, side in _SHAPES:
            x = torch.randn(batch, channels, side, side).relu_().requires_grad_()
            for name, source, theirs, ours in pairs(channels, args):
                seconds = []
                for backward in (False, True):
                    runs: Dict[str, Callable[[], None]] = {}
                    for whose, pooling in (('theirs', theirs), ('ours', ours)):
                        with torch.no_grad():
                            z = pooling(x).flatten(1)
                        runs[whose] = partial(_run, pooling, x, torch.randn_like(z) if backward else None)
                    measured = measure_seconds(runs, args.repeats, torch.device('cpu'))
                    seconds += [*measured.values(), measured['theirs'] / measured['ours']]
                row = [f'{batch}, {channels}, {side} x {side}', name, source]
                for theirs_s, ours_s, ratio in (seconds[:3], seconds[3:]):
                    row += [format_time(theirs_s), format_time(ours_s), f'{ratio:.2f} x']
                rows.append(row)
                print(*row, flush=True)
        header = ['features', 'pooling', 'code', 'forward, theirs', 'ours', '', 'with backward, theirs', 'ours', '']
        write(describe_machine(torch.device('cpu')) + '.\n\n' + markdown_table(header, rows), args.output)
    except (ImportError, OSError, RuntimeError) as e:
        sys.exit(f'public_poolings.py: error: {e}')


if __name__ == '__main__':
    main()
