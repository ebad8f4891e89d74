"""timm's own scripts, run as a user does. TIMM_REPO names a checkout of timm; without it `run` alone is tested."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import timm_bilinear
from timm_bilinear.hub.checkpoint import load_trained

REPO = os.environ.get('TIMM_REPO')
needs_repo = pytest.mark.skipif(not REPO, reason='TIMM_REPO does not name a checkout of timm')
CLASSES = ['checks', 'dots', 'stripes']
MODEL = ['--model', 'bcnn', '--num-classes', '3', '--img-size', '64', '--device', 'cpu']
RESNET = ['--model-kwargs', 'backbone_a=test_resnet', 'out_index_a=3']
CONVNEXT = ['--model-kwargs', 'backbone_a=test_convnext', 'proj_dim=16']  # no batch statistics
TRAIN = (
    '--opt sgd --warmup-epochs 0 --workers 1 --hflip 0 --color-jitter 0 --scale 0.8 1 --smoothing 0 --seed 1'.split()
)


def python(*args, check=True):
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    env.update(OMP_NUM_THREADS='2', HF_HUB_OFFLINE='1')
    result = subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def run(script, *args, **kwargs):
    return python('-m', 'timm_bilinear', 'run', Path(REPO) / script, *args, **kwargs)


def losses(folder):
    with (folder / 'summary.csv').open() as f:
        return [float(row['train_loss']) for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Three textures that a few steps tell apart."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for split, count in (('train', 16), ('validation', 8)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                a, b = rng.integers(0, 16, 2)
                pattern = {
                    'checks': ((x + a) // 8 + (y + b) // 8) % 2,
                    'dots': ((x + a) % 8 < 3) & ((y + b) % 8 < 3),
                    'stripes': (x + a) // 4 % 2,
                }[name]
                image = np.clip(200 * pattern[..., None] + rng.normal(30, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / name / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """The two stages of B-CNN's training, by timm's train script."""
    out = tmp_path_factory.mktemp('out')
    common = ['--data-dir', data, *MODEL, *TRAIN, '--batch-size', '8', '--output', out]
    run('train.py', *common, '--experiment', 'one', *RESNET, 'freeze_backbone=True', '--epochs', '3', '--lr', '1.0')
    stage_1 = out / 'one' / 'model_best.pth.tar'
    run(
        'train.py', *common, '--experiment', 'two', *RESNET, '--epochs', '12', '--lr', '0.1', '--model-ema',
        '--model-ema-decay', '0.5', '--initial-checkpoint', stage_1,
    )  # fmt: skip
    return out


def test_run_is_python(tmp_path):
    (tmp_path / 'beside.py').write_text('WORD = "beside"')
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm\nfrom beside import WORD\nprint(__name__, WORD, sys.argv[1:], timm.is_model("bcnn_vgg16"))'
    )
    result = python('-m', 'timm_bilinear', 'run', script, '--flag', 'x')
    assert result.stdout.split('\n')[0] == "__main__ beside ['--flag', 'x'] True"
    script.write_text('raise SystemExit(7)')
    assert python('-m', 'timm_bilinear', 'run', script, check=False).returncode == 7


@pytest.mark.parametrize('args', [(), ('--flag',), ('missing.py',)])
def test_run_nothing(args):
    result = python('-m', 'timm_bilinear', 'run', *args, check=False)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1


@needs_repo
def test_two_stages(trained):
    first, second = losses(trained / 'one'), losses(trained / 'two')
    assert first[-1] < first[0] and second[-1] < 0.5 * first[0]
    stage_1, stage_2 = (load_trained(trained / name / 'model_best.pth.tar') for name in ('one', 'two'))
    fresh = timm.create_model('bcnn', backbone_a='test_resnet', out_index_a=3).state_dict()
    assert stage_1.label_names == stage_2.label_names == CLASSES
    assert stage_1.data_config['input_size'] == (3, 64, 64)
    streams = [k for k in fresh if k.startswith('stream_a') and k.endswith('weight')]
    a, b = stage_1.model.state_dict(), stage_2.model.state_dict()
    assert not any(torch.equal(a[k], b[k]) for k in streams)
    assert stage_2.metrics['eval_top1'] > 90


@needs_repo
def test_ema_weights_are_taken(trained):
    path = trained / 'two' / 'last.pth.tar'
    checkpoint = torch.load(path, weights_only=False)
    weight = load_trained(path).model.head.fc.weight
    assert torch.equal(weight, checkpoint['state_dict_ema']['head.fc.weight'])
    assert not torch.equal(weight, checkpoint['state_dict']['head.fc.weight'])


@needs_repo
def test_push_of_a_train_script_checkpoint(trained, tmp_path):
    url = timm_bilinear.push_to_hub(trained / 'two' / 'model_best.pth.tar', 'me/textures', dry_run=tmp_path / 'repo')
    model = timm.create_model(f'local-dir:{url}', pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == CLASSES
    card = (tmp_path / 'repo' / 'README.md').read_text()
    assert 'hf-hub:me/textures' in card and '| opt | sgd |' in card and 'top-1, validation' in card


@needs_repo
@pytest.mark.parametrize(
    'option', [['--amp', '--amp-dtype', 'bfloat16'], ['--grad-checkpointing'], ['--torchcompile', 'aot_eager']]
)
def test_options(data, tmp_path, option):
    out = ['--output', tmp_path, '--experiment', 'x', '--epochs', '2', '--lr', '0.05', '--batch-size', '16']
    run('train.py', '--data-dir', data, *MODEL, *TRAIN, *out, *RESNET, *option)
    assert all(np.isfinite(losses(tmp_path / 'x'))) and len(losses(tmp_path / 'x')) == 2


@needs_repo
def test_resume(data, tmp_path):
    common = ['--data-dir', data, *MODEL, *TRAIN, '--lr', '0.05', '--batch-size', '16', '--output', tmp_path]
    run('train.py', *common, *RESNET, '--epochs', '2', '--experiment', 'x')
    last = tmp_path / 'x' / 'last.pth.tar'
    run('train.py', *common, *RESNET, '--epochs', '4', '--experiment', 'y', '--resume', last)
    assert len(losses(tmp_path / 'y')) == 2
    assert losses(tmp_path / 'y')[-1] < losses(tmp_path / 'x')[0]


@needs_repo
def test_two_processes_are_one(data, tmp_path):
    # One step an epoch on everything, so that the order of the images does not matter.
    common = ['--data-dir', data, *MODEL, *TRAIN, '--no-aug', '--lr', '0.5', '--epochs', '4', '--output', tmp_path]
    script = Path(REPO) / 'train.py'
    run('train.py', *common, *CONVNEXT, '--batch-size', '48', '--experiment', 'one')
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'timm_bilinear', 'run']
    # The script gives DDP a device_ids that modules on the CPU cannot have.
    shim = Path(__file__).with_name('cpu_ddp.py')
    python(*torchrun, shim, script, *common, *CONVNEXT, '--batch-size', '24', '--experiment', 'two')
    one, two = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert one[-1] < one[0] - 1e-3
    np.testing.assert_allclose(two, one, rtol=1e-3)


@needs_repo
def test_validate_and_inference(data, trained, tmp_path):
    pytest.importorskip('pandas', reason="timm's inference script needs pandas")
    checkpoint = ['--checkpoint', trained / 'two' / 'model_best.pth.tar', '--use-ema']
    result = run('validate.py', '--data-dir', data, *MODEL, *RESNET, *checkpoint, '--workers', '1')
    top1 = float(result.stdout.split('"top1": ')[1].split(',')[0])
    assert top1 > 90
    names = tmp_path / 'classes.txt'
    names.write_text('\n'.join(CLASSES))
    repo = timm_bilinear.push_to_hub(trained / 'two' / 'model_best.pth.tar', 'me/textures', dry_run=tmp_path / 'repo')
    run(
        'inference.py', '--data-dir', data / 'validation' / 'dots', '--model', f'local-dir:{repo}', '--pretrained',
        '--device', 'cpu', '--workers', '1', '--results-dir', tmp_path / 'r', '--results-file', 'out',
        '--results-format', 'csv', '--topk', '1', '--label-type', 'name', '--include-index',
    )  # fmt: skip
    (table,) = (tmp_path / 'r').glob('*.csv')
    with table.open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 8 and sum(row['label'] == 'dots' for row in rows) >= 7, rows


@needs_repo
def test_onnx_export(trained, tmp_path):
    repo = timm_bilinear.push_to_hub(trained / 'two' / 'model_best.pth.tar', 'me/textures', dry_run=tmp_path / 'repo')
    out = tmp_path / 'x.onnx'
    run('onnx_export.py', out, '--model', f'local-dir:{repo}', '--img-size', '64', '--batch-size', '2', '--dynamo')
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    x = torch.randn(2, 3, 64, 64)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    model = timm.create_model(f'local-dir:{repo}', pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-3)
