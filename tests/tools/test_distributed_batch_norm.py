"""Two processes of torchrun against one with the whole batch, whose batch norms are torch's own."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

import timm_bilinear  # noqa: F401
from timm_bilinear.tools.distributed import (
    Ranks,
    broadcast,
    init_distributed,
    reduce_sum,
    share_of_batch,
    shutdown,
    sync_batch_norm,
    wrap,
)

# Name: module, shape of the global batch, images of the first process.
LAYERS = {
    'equal': (lambda: nn.BatchNorm2d(3), (8, 3, 5, 4), 4),
    'uneven': (lambda: nn.BatchNorm2d(3), (8, 3, 5, 4), 5),
    'one process has nothing': (lambda: nn.BatchNorm2d(3), (8, 3, 5, 4), 8),
    'timm': (lambda: BatchNormAct2d(3), (8, 3, 5, 4), 5),
    'timm, other activation': (lambda: BatchNormAct2d(3, act_layer=nn.SiLU, inplace=False), (8, 3, 5, 4), 3),
    'vectors': (lambda: nn.BatchNorm1d(3), (8, 3), 3),
    'sequences': (lambda: nn.BatchNorm1d(3), (8, 3, 7), 3),
    'volumes': (lambda: nn.BatchNorm3d(3), (8, 3, 2, 3, 4), 3),
    'one value each': (lambda: nn.BatchNorm1d(3), (2, 3), 1),
    'cumulative': (lambda: nn.BatchNorm2d(3, momentum=None), (8, 3, 5, 4), 5),
    'no affine': (lambda: nn.BatchNorm2d(3, affine=False), (8, 3, 5, 4), 5),
    'no statistics': (lambda: nn.BatchNorm2d(3, track_running_stats=False), (8, 3, 5, 4), 5),
    'large eps': (lambda: nn.BatchNorm2d(3, eps=0.3, momentum=0.7), (8, 3, 5, 4), 5),
}
DTYPES = {'float64': torch.float64, 'float32': torch.float32, 'bfloat16': torch.bfloat16}
MODELS = {
    'plain': lambda: timm.create_model('test_resnet', num_classes=4),
    'bcnn': lambda: timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, eps=1e-3, num_classes=4),
}


def run_layer(name, dtype, share=slice(None), sync=False):
    """Two training passes of a layer over a share of the batch, the second of other features far from 0."""
    make, shape, _ = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    for param in layer.parameters():
        nn.init.normal_(param)
    layer.double() if dtype == torch.float64 else None
    if sync:
        sync_batch_norm(layer)
    results = {}
    for number in range(2):
        # features are the same numbers in every dtype, given as channels-last where that is a format
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 30 * number).bfloat16().to(dtype)
        grad = torch.randn(shape, dtype=torch.float64).bfloat16().to(dtype)[share]
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        x = x[share].detach().requires_grad_()
        y = layer(x * 1)
        y.backward(grad)
        results.update({f'y{number}': y.detach(), f'x{number}.grad': x.grad})
    results.update({f'{key}.grad': param.grad for key, param in layer.named_parameters()})
    results.update({f'buffer {key}': buffer for key, buffer in layer.named_buffers()})
    layer.eval()
    results['eval'] = layer(torch.ones(shape, dtype=dtype)).detach()
    return results


def run_model(name, ranks=None):
    """Two steps of SGD on this process's share of 7 images."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    images, targets = torch.randn(7, 3, 64, 64), torch.randint(4, (7,))
    share = slice(None) if ranks is None else (slice(0, 4), slice(4, 7))[ranks.rank]
    if ranks is not None:
        sync_batch_norm(model, ranks)
    wrapped = model if ranks is None else wrap(model, ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(images[share]), targets[share])
        (loss if ranks is None else loss * share_of_batch(len(targets[share]), ranks)).backward()
        optimizer.step()
    return model.state_dict()


def main(folder):
    """What each process of torchrun does."""
    ranks = init_distributed('cpu')
    results = {'ranks': vars(ranks)}
    for name, (_, shape, first) in LAYERS.items():
        share = slice(0, first) if ranks.rank == 0 else slice(first, shape[0])
        for dtype, value in DTYPES.items():
            results[name, dtype] = run_layer(name, value, share, sync=True)
    for name in MODELS:
        results[name] = run_model(name, ranks)
    count = torch.tensor([ranks.rank + 1, 10])
    results['sums'] = (reduce_sum(count, ranks), reduce_sum(dict(a=ranks.rank + 0.5, b=torch.tensor(2)), ranks), count)
    results['broadcast'] = broadcast({'rank': ranks.rank}, ranks)
    try:
        sync_batch_norm(layer := nn.BatchNorm1d(2))
        layer(torch.randn(1 - ranks.rank, 2))
    except ValueError as e:
        results['too few'] = str(e)
    torch.save(results, Path(folder) / f'{ranks.rank}.pt')
    shutdown(ranks)
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__]
    run = subprocess.run(
        [*command, folder], env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(2)]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', LAYERS)
def test_layers(processes, name, dtype):
    # bfloat16 is judged by what float64 makes of the same numbers: its own rounding, and no more
    is_low = dtype == 'bfloat16'
    want = run_layer(name, torch.float64 if is_low else DTYPES[dtype])
    got = [results[name, dtype] for results in processes]
    assert got[0].keys() == want.keys()
    tolerance = {'float64': dict(rtol=1e-9, atol=1e-9), 'float32': dict(rtol=1e-4, atol=1e-4)}.get(dtype)
    for key, expected in want.items():
        both = [each[key] for each in got]
        if key.startswith(('y', 'x')):
            actual = torch.cat(both)
            assert actual.dtype == DTYPES[dtype]
        elif key.endswith('.grad'):
            actual = both[0] + both[1]  # of a sum over the batch
        else:
            assert torch.equal(*both), key
            actual = both[0]
        if is_low:
            assert actual.dtype == torch.bfloat16 or not key.startswith(('y', 'x', 'eval'))
            torch.testing.assert_close(actual.double(), expected.double(), rtol=0.02, atol=0.05)
        else:
            torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize('name', MODELS)
def test_models_with_unequal_shares(processes, name):
    want = run_model(name)
    assert processes[0][name].keys() == want.keys()
    for key, expected in want.items():
        assert torch.equal(processes[0][name][key], processes[1][name][key]), key
        torch.testing.assert_close(processes[0][name][key], expected, rtol=1e-3, atol=1e-4)


def test_it_matters(processes):
    # without it, two processes are not one: the tolerances above can fail
    first = LAYERS['uneven'][2]
    want, halves = run_layer('uneven', torch.float64), [slice(0, first), slice(first, None)]
    alone = torch.cat([run_layer('uneven', torch.float64, half)['y0'] for half in halves])
    assert (alone - want['y0']).abs().max() > 0.01


def test_what_processes_tell_each_other(processes):
    for rank, results in enumerate(processes):
        assert results['ranks'] == dict(rank=rank, local_rank=rank, world_size=2, device=torch.device('cpu'))
        total, by_name, own = results['sums']
        assert total.tolist() == [3, 20] and total.dtype == torch.int64 and own.tolist() == [rank + 1, 10]
        assert by_name == dict(a=2.0, b=4.0)
        assert results['broadcast'] == {'rank': 0}
        assert 'more than 1 value per channel, got 1 in all' in results['too few']


def test_modules_stay_what_they_are():
    model = MODELS['bcnn']()
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    with sync_batch_norm(model) as handle:
        assert handle.modules and list(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == types
        twin = copy.deepcopy(model)
        for module, other in zip(handle.modules, (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d))):
            assert other.forward.args[0].__self__ is other and module.forward.args[0].__self__ is module
        sync_batch_norm(model)  # again changes nothing
        assert all(module.forward.args[0].__func__ is type(module).forward for module in handle.modules)
    assert not any('forward' in vars(module) for module in model.modules())
    assert not sync_batch_norm(model, Ranks()).modules
    assert wrap(model, Ranks()) is model


def test_alone(monkeypatch):
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    ranks = init_distributed('cpu')
    assert ranks == Ranks() and ranks.is_first and not torch.distributed.is_initialized()
    assert init_distributed().device.type == ('cuda' if torch.cuda.is_available() else 'cpu')
    values = torch.ones(2)
    assert reduce_sum(values, ranks).tolist() == [1, 1] and reduce_sum(values, ranks) is not values
    assert reduce_sum(dict(a=1), ranks) == dict(a=1.0) and broadcast('x', ranks) == 'x'
    assert share_of_batch(3, ranks) == 1.0
    shutdown(ranks)


@pytest.mark.parametrize(
    'changes,device,message',
    [
        (dict(LOCAL_WORLD_SIZE='2'), 'cpu', r"2 here, and torchrun started 4 on several: use timm's train script"),
        (dict(WORLD_SIZE='many'), 'cpu', r"WORLD_SIZE .* got 'many'"),
        (dict(WORLD_SIZE='0'), 'cpu', r"WORLD_SIZE .* got '0'"),
        (dict(RANK=None, MASTER_PORT=None), 'cpu', r'RANK, MASTER_PORT is not set: start by torchrun'),
        (dict(LOCAL_RANK='x'), 'cpu', r"LOCAL_RANK .* got 'x'"),
        ({}, 'meta', r"'cpu' or 'cuda', got 'meta'"),
        ({}, 'gpu', r"'device' must be a device of PyTorch.*'gpu'"),
        ({}, 'cuda:0', 'finds no GPU' if not torch.cuda.is_available() else r"got 'cuda:0'"),
    ],
)
def test_what_is_refused(monkeypatch, changes, device, message):
    environment = dict(WORLD_SIZE='4', LOCAL_WORLD_SIZE='4', RANK='0', LOCAL_RANK='0', MASTER_ADDR='localhost')
    environment['MASTER_PORT'] = '1'
    for name, value in dict(environment, **changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as e:
        init_distributed(device)
    assert '\n' not in str(e.value) and re.search(r'\.$', str(e.value))


if __name__ == '__main__':
    main(sys.argv[1])
