"""Speed and memory of whole models against their backbones, and of all poolings.

Rows are measured in one process, all contestants in turn within each repeat, and reported as medians.
"""

from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Union

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..layers import BilinearHead, list_poolings
from ..layers.pooling import most_streams
from .benchmark_head import Case, article_head, benchmark_head
from .measure import (
    describe_machine,
    find_device,
    format_time,
    markdown_table,
    measure_seconds,
    peak_memory,
    write,
)

__all__ = ['benchmark_head', 'benchmark_model', 'benchmark_poolings']


POOLING_CASES = [
    Case(16, 512, None, 28, 200),
    Case(16, 256, None, 14, 200),
    Case(16, 256, 256, 14, 200),
]
# Heads as the poolings' named models have them.
_POOLING_FORMS = {'isqrt': dict(proj_dim=256, proj_type='conv_bn_relu'), 'lowrank': dict(proj_dim=100)}


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
