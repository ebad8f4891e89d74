"""What a run says when it starts: of the machine, the data and the model."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Dict, Optional

import timm
import torch
from torch import nn

from .progress import RunLog

__all__ = ['count_images', 'describe_machine', 'say_start']

_SHOWN = 5  # skipped files that are named


def _own_version() -> str:
    try:
        return version('timm-bilinear')
    except PackageNotFoundError:  # a checkout on the path
        return 'not installed'


def describe_machine(device: torch.device, processes: int) -> Dict[str, Any]:
    """What beside the arguments decides the last digits of a result."""
    is_gpu = device.type == 'cuda'
    return dict(
        device_name=torch.cuda.get_device_name(device) if is_gpu else device.type,
        threads=torch.get_num_threads(),
        processes=processes,
        versions=dict(
            timm_bilinear=_own_version(),
            timm=str(timm.__version__),
            torch=str(torch.__version__),
            python=platform.python_version(),
        ),
    )


def count_images(data: Any) -> Dict[str, Optional[int]]:
    """Images by split, None for those of a stream that does not tell."""
    return {split: len(each) if hasattr(each, '__len__') else None for split, each in data.splits.items()}


def say_start(
    log: RunLog,
    machine: Dict[str, Any],
    amp_dtype: Optional[torch.dtype],
    data: Any,
    model: str,
    net: nn.Module,
) -> None:
    """Print the lines.

    Args:
        log: Where they go.
        machine: As of `describe_machine`.
        amp_dtype: Dtype of autocast, None for float32.
        data: Data sets, class names, skipped files and warnings.
        model: Name of the model.
        net: The model.
    """
    precision = 'float32' if amp_dtype is None else str(amp_dtype).removeprefix('torch.')
    threads, processes = machine['threads'], machine['processes']
    text = f'{machine["device_name"]}, {precision}, {threads} thread{"s" * (threads > 1)}'
    text += f', {processes} processes' if processes > 1 else ''
    facts = {name: machine[name] for name in ('threads', 'processes', 'versions')}
    log.say('start', text, device=machine['device_name'], precision=precision, **facts)
    counts, skipped = count_images(data), list(data.skipped)
    shown = ', '.join(f'{"?" if count is None else count} {split}' for split, count in counts.items())
    text = f'{len(data.class_names)} classes; images: {shown}'
    text += f'; {len(skipped)} files skipped' if skipped else ''
    log.say('data', text, classes=len(data.class_names), images=counts, skipped=skipped)
    if skipped and log.log_format != 'json':
        more = len(skipped) - _SHOWN
        listed = ' '.join(skipped[:_SHOWN]) + (f' And {more} more.' if more > 0 else '')
        log.say('skipped', f'Skipped: {listed}')
    for warning in data.warnings:
        log.say('warning', f'Warning: {warning}')
    parameters = sum(p.numel() for p in net.parameters())
    log.say('model', f'{model}: {parameters / 1e6:.2f} M parameters', model=model, parameters=parameters)
