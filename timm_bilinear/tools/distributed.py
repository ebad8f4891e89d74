"""Data-parallel training under torchrun, on the processes of one machine: what several do together is what one does.

ranks = init_distributed(device)
handle = sync_batch_norm(model, ranks)
wrapped = wrap(model, ranks)
loss = F.cross_entropy(wrapped(images), targets) * share_of_batch(len(targets), ranks)
totals = reduce_sum({'correct': correct, 'images': len(targets)}, ranks)
shutdown(ranks)
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Callable, Dict, List, Optional, TypeVar, Union

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .batch_norm import global_batch_norm, is_local_batch_norm

__all__ = [
    'BatchNormHandle',
    'Ranks',
    'broadcast',
    'init_distributed',
    'reduce_sum',
    'share_of_batch',
    'shutdown',
    'sync_batch_norm',
    'wrap',
]

_Value = TypeVar('_Value')
_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
# The first rank saves and evaluates alone while the others wait; torchrun ends them all if one of them dies.
_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them.

    Args:
        rank: Number of this process, from 0.
        local_rank: Its number on this machine.
        world_size: Number of processes; 1 where nothing is distributed.
        device: Device that this process computes on.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0


def _environment() -> Dict[str, int]:
    """What torchrun says of the processes, all as numbers; only one without it."""
    world_size = os.environ.get('WORLD_SIZE') or '1'
    if not world_size.isdecimal() or int(world_size) < 1:
        raise ValueError(f"WORLD_SIZE of the environment must be a number of processes, got '{world_size}'.")
    if int(world_size) == 1:
        return dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f'WORLD_SIZE of the environment is {world_size}, and {", ".join(missing)} is not set: start by torchrun.'
        )
    texts = {name: os.environ[name] for name in _VARIABLES if name != 'MASTER_ADDR'}
    for name, text in texts.items():
        if not text.isdecimal():
            raise ValueError(f"{name} of the environment must be a number, got '{text}'.")
    numbers = {name: int(text) for name, text in texts.items()}
    if numbers['WORLD_SIZE'] != numbers['LOCAL_WORLD_SIZE']:
        raise ValueError(
            f'finetune takes the processes of one machine, {numbers["LOCAL_WORLD_SIZE"]} here, and torchrun started'
            f" {numbers['WORLD_SIZE']} on several: use timm's train script (train.py), which takes these models too."
        )
    return numbers


def _device(name: Optional[str], local_rank: int, world_size: int) -> torch.device:
    """Device of a process: the one named, with a GPU for each of several processes."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError:
        raise ValueError(f"'device' must be a device of PyTorch, such as 'cpu' or 'cuda', got {name!r}.") from None
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f"'device' is {name!r}, and PyTorch finds no GPU here.")
    if world_size == 1:
        return device
    if device.type not in ('cpu', 'cuda'):
        raise ValueError(f"Several processes train on 'cpu' or 'cuda', got {name!r}; start one without torchrun.")
    if device.type == 'cpu':
        return device
    if device.index is not None:
        raise ValueError(f"Each of several processes takes a GPU of its own: give 'cuda', got {name!r}.")
    if torch.cuda.device_count() < world_size:
        raise ValueError(
            f'{world_size} processes want a GPU each, and there are {torch.cuda.device_count()}:'
            " start fewer by torchrun, or give the device 'cpu'."
        )
    return torch.device('cuda', local_rank)


def init_distributed(device: Optional[str] = None) -> Ranks:
    """Join the processes that torchrun has started on this machine: over gloo on the CPU, over nccl on GPUs.

    torchrun gives each process one thread unless OMP_NUM_THREADS says otherwise.

    Args:
        device: 'cpu' or 'cuda', where each process takes the GPU of its number; None for GPUs if there are any. Alone,
            a process takes any device.

    Returns:
        This process and the others; `world_size` 1 where torchrun did not start it, or started it alone.

    Raises:
        ValueError: If the environment is not torchrun's, names several machines, or there is no such device.
        RuntimeError: If the processes do not find each other.
    """
    numbers = _environment()
    rank, local_rank, world_size = (numbers[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
    torch_device = _device(device, local_rank, world_size)
    if world_size > 1 and not dist.is_initialized():
        is_gpu = torch_device.type == 'cuda'
        if is_gpu:
            torch.cuda.set_device(torch_device)
        try:
            # torchrun's processes meet as its environment says
            dist.init_process_group(
                'nccl' if is_gpu else 'gloo', timeout=_TIMEOUT, **(dict(device_id=torch_device) if is_gpu else {})
            )
        except (RuntimeError, ValueError) as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
            raise RuntimeError(f'The {world_size} processes of torchrun do not find each other: {reason}.') from e
    return Ranks(rank, local_rank, world_size, torch_device)


def shutdown(ranks: Ranks) -> None:
    """Leave the other processes; nothing happens where there are none."""
    if ranks.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def reduce_sum(values: Union[Dict[str, Any], torch.Tensor], ranks: Ranks) -> Union[Dict[str, float], torch.Tensor]:
    """Sum of what each process has.

    Args:
        values: Tensor, of the same shape on each; or numbers and tensors of one number by name, of the same names.
        ranks: The processes.

    Returns:
        A new tensor of the same dtype on the same device; or floats by name, summed in float64.
    """
    if isinstance(values, torch.Tensor):
        total = values.detach().to(ranks.device, copy=True) if ranks.world_size > 1 else values.detach().clone()
        if ranks.world_size > 1:
            dist.all_reduce(total)
        return total.to(values.device)
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    return dict(zip(values, reduce_sum(numbers, ranks).tolist()))


def broadcast(value: _Value, ranks: Ranks) -> _Value:
    """What the first process has, on all of them: a decision, a path, an exception to raise everywhere.

    Args:
        value: Anything that can be pickled; of the other processes it is not looked at.
        ranks: The processes.
    """
    if ranks.world_size == 1:
        return value
    values: List[Any] = [value if ranks.is_first else None]
    dist.broadcast_object_list(values, src=0, device=ranks.device)
    return values[0]


def share_of_batch(weight: float, ranks: Ranks) -> float:
    """What a process multiplies its mean loss by, so that the mean over processes is the mean over the global batch.

    Args:
        weight: What its mean is over: its number of images, or the sum of their class weights.
        ranks: The processes.

    Returns:
        `weight` over the mean weight of the processes: 1 where shares are equal.
    """
    if ranks.world_size == 1:
        return 1.0
    total = reduce_sum({'weight': weight}, ranks)['weight']
    return float(weight) * ranks.world_size / total if total else 0.0


class BatchNormHandle:
    """Batch norms that were made to work over the global batch, and how to undo it.

    Args:
        modules: The batch norms.
    """

    def __init__(self, modules: List[nn.Module]) -> None:
        self.modules = modules

    def remove(self) -> None:
        """Make each batch norm see only its own process again."""
        for module in self.modules:
            vars(module).pop('forward', None)
        self.modules = []

    def __enter__(self) -> 'BatchNormHandle':
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def _forward(local_forward: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
    """What a batch norm computes, with its statistics over all processes while it trains."""
    module = local_forward.__self__
    if not module.training or not dist.is_initialized() or dist.get_world_size() == 1:
        return local_forward(*args, **kwargs)
    with global_batch_norm():
        return local_forward(*args, **kwargs)


def sync_batch_norm(model: nn.Module, ranks: Optional[Ranks] = None) -> BatchNormHandle:
    """Make batch norms that train take their statistics from the global batch, on the CPU and on GPUs.

    torch's `SyncBatchNorm` refuses the CPU and is another class of module. Here modules, names of parameters and the
    state dict stay as they are, and so does what timm's BatchNormAct2d does after its norm. In eval mode, as frozen
    streams are, nothing changes. Each process must run the same batch norms in the same order, as it does of the same
    model; its share of the batch may have any size, even 0.

    Statistics are float32 whatever the dtype of the features, float64 for that of float64.

    Args:
        model: The model, before or after it is wrapped.
        ranks: The processes; nothing is done where there is only one. None to ask torch when the model runs.

    Returns:
        Handle with `remove()`, also a context manager.
    """
    if ranks is not None and ranks.world_size == 1:
        return BatchNormHandle([])
    modules = [module for module in model.modules() if is_local_batch_norm(module)]
    for module in modules:
        if 'forward' not in vars(module):
            module.forward = partial(_forward, module.forward)
    return BatchNormHandle(modules)


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Make a model's gradients those of the global batch: the mean over processes, on each of them.

    If each process takes the mean loss of an equal share, that is the gradient of the mean over the global batch; of
    unequal shares, multiply the loss by `share_of_batch`. A change of what is trained, as from one stage to the next,
    wants wrapping anew; weights are made those of the first process.

    Args:
        model: The model, on the device of this process.
        ranks: The processes.

    Returns:
        `DistributedDataParallel`, or the model itself where there is only one process or nothing to train.
    """
    if ranks.world_size == 1 or not any(param.requires_grad for param in model.parameters()):
        return model
    device_ids = [ranks.device.index] if ranks.device.type == 'cuda' else None
    return DistributedDataParallel(model, device_ids=device_ids)
