"""A few training steps on all ranks together; rank 0 saves the weights. Run under torchrun by test_distributed.py."""

import sys

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import timm_bilinear  # noqa: F401


def steps(wrap, rank: int = 0, ranks: int = 1) -> torch.nn.Module:
    """Three steps on this rank's share of one batch, of a model without batch statistics."""
    torch.manual_seed(0)
    model = timm.create_model(
        'bcnn', backbone_a='test_convnext', backbone_b='test_vit', eps=1e-3, proj_dim=8, num_classes=4
    )
    images, targets = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 3])
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(images[rank::ranks]), targets[rank::ranks]).backward()
        optimizer.step()
    return model


def shard(model):
    fully_shard(model.head)
    return fully_shard(model)


def shard_classifier(model):
    fully_shard(model.get_classifier())
    return fully_shard(model)


def shard_columns(model):
    """Tensor parallelism: each rank has some of the classes."""
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    parallelize_module(model.get_classifier(), mesh, ColwiseParallel(output_layouts=Replicate()))
    return model


WRAPPERS = {
    'ddp': DistributedDataParallel,
    'fsdp2': shard,
    'fsdp2_classifier': shard_classifier,
    'colwise': shard_columns,
}

if __name__ == '__main__':
    dist.init_process_group('gloo')
    # ranks of tensor parallelism see the same images
    rank, ranks = (0, 1) if sys.argv[1] == 'colwise' else (dist.get_rank(), dist.get_world_size())
    model = steps(WRAPPERS[sys.argv[1]], rank, ranks)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save(weights, sys.argv[2])
    dist.destroy_process_group()
