import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import report as report_script
import timm
import torch
from faces import demo_fonts
from PIL import Image
from safetensors.torch import load_file

from timm_bilinear.hub import save_model

SCRIPTS = Path(__file__).parents[2] / 'hub' / 'fonts'
PUBLISHED = SCRIPTS.parent / 'bcnn_resnet18_c4.googlefonts378'


def _run(script, *args, **kwargs):
    return subprocess.run([sys.executable, SCRIPTS / script, *map(str, args)], capture_output=True, text=True, **kwargs)


def _build(*args, **kwargs):
    return _run('build.py', *args, **kwargs)


@pytest.fixture
def call(call_main):
    return lambda script, *args: call_main(importlib.import_module(script).main, *args)


@pytest.fixture
def npm(tmp_path):
    """An npm that packs one family."""
    package = tmp_path / 'package'
    package.mkdir()
    font = Path(demo_fonts()['anton'][0].path).read_bytes()
    for name in ('anton-latin-400-normal.woff2', 'anton-latin-ext-400-normal.woff2', 'LICENSE', 'index.css'):
        (package / name).write_bytes(font)
    with tarfile.open(tmp_path / 'anton.tgz', 'w:gz') as tar:
        tar.add(package, 'package')
    script = tmp_path / 'bin' / 'npm'
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *"@fontsource/anton "*) cp {tmp_path}/anton.tgz "$5";;\n'
        '*) echo "npm error code E404" >&2; echo "npm error not found" >&2; exit 1;; esac\n'
    )
    script.chmod(0o755)
    return dict(os.environ, PATH=f'{script.parent}:/usr/bin:/bin')


def test_npm_families(tmp_path, npm):
    lobster = Path(demo_fonts()['lobster'][0].path)
    (tmp_path / 'fonts' / 'lobster').mkdir(parents=True)
    shutil.copy(lobster, tmp_path / 'fonts' / 'lobster')  # of another family than those asked for
    small = ('--train', 2, '--val', 1, '--test', 1, '--size', 32)
    done = _build(tmp_path / 'fonts', tmp_path / 'images', '--npm', 'anton', *small, env=npm)
    assert done.returncode == 0 and done.stdout.startswith('1 fonts of 1 families'), done.stderr
    kept = sorted(p.name for p in (tmp_path / 'fonts' / 'anton').iterdir())
    assert kept == ['LICENSE', 'anton-latin-400-normal.woff2']
    assert len(list((tmp_path / 'images').rglob('*.png'))) == 4

    done = _build(tmp_path / 'fonts', tmp_path / 'images', '--npm', 'antonn', *small, env=npm)
    assert done.returncode == 1 and "the font family 'antonn': npm error not found" in done.stderr
    assert sorted(p.name for p in (tmp_path / 'fonts').iterdir()) == ['anton', 'lobster']


def test_broken_font_is_reported(tmp_path):
    (tmp_path / 'fonts').mkdir()
    (tmp_path / 'fonts' / 'broken.ttf').write_bytes(b'no font')
    done = _build(tmp_path / 'fonts', tmp_path / 'images')
    assert done.returncode == 1 and 'no usable font' in done.stderr and 'broken.ttf' in done.stderr
    assert not (tmp_path / 'images').exists()


@pytest.fixture
def images(tmp_path, call):
    """Images of two fonts."""
    for name in ('anton', 'lobster'):
        (tmp_path / 'fonts' / name).mkdir(parents=True)
        path = Path(demo_fonts()[name][0].path)
        shutil.copy(path, tmp_path / 'fonts' / name / f'{name}-latin-400-normal{path.suffix}')
    args = ('--train', 4, '--val', 1, '--test', 3, '--size', 64)
    assert call('build', tmp_path / 'fonts', tmp_path / 'images', *args).returncode == 0
    return tmp_path / 'images'


def test_select(tmp_path, images):
    args = (tmp_path / 'fonts', tmp_path / 'selected', '--train', 1, '--val', 1, '--test', 1, '--size', 32, '--select')
    done = _build(*args, '*bster-*-[47]00-normal')
    assert done.returncode == 0 and done.stdout.startswith('1 fonts of 1 families')
    assert [p.name for p in (tmp_path / 'selected' / 'test').iterdir()] == ['lobster-latin-400-normal']
    done = _build(*args, '*italic')
    assert done.returncode == 1 and f"No font of '{tmp_path}/fonts' matches '*italic'" in done.stderr


def test_confusions_of_fonts_that_are_not_there():
    report = report_script.Report(8, 2, 2, 50.0, 75.0, 50.0, 17.7, 1, {}, [(('anton', 'sigmar'), 3)])
    with pytest.raises(ValueError, match="no font 'sigmar'"):
        report_script.draw_confusions(report, demo_fonts())


def test_compare_and_report(tmp_path, images, monkeypatch, call):
    compare = importlib.import_module('compare')
    for name, value in (('EPOCHS', 1), ('FROZEN_EPOCHS', 1), ('HEAD_LRS', (1e-3, 1e-2)), ('FROZEN_LRS', (1, 10))):
        monkeypatch.setattr(compare, name, value)
    file, table = tmp_path / 'runs.json', tmp_path / 'table.md'
    options = ('resnet18', '--start', PUBLISHED, '--seeds', 1, '--table', table)
    args, rows = (images, file, *options), ('--rows', 'average pooling', 'sketch')
    frozen_args = (images, tmp_path / 'frozen.json', *options, '--frozen')
    for run_args, parameters in ((args, ['2,783,298', '2,799,170']), (frozen_args, ['514', '16,386'])):
        done = call('compare', *run_args, *rows)
        assert done.returncode == 0, done.stderr
        lines = [line.split(' | ') for line in table.read_text().splitlines()[2:]]
        assert [line[2] for line in lines] == parameters
        assert len(json.loads(run_args[1].read_text())['runs']) == 2 * 2
    done = call('compare', *args, *rows, '--frozen')
    assert done.returncode == 1 and 'made with other settings' in done.stderr
    before = file.read_bytes()
    assert call('compare', *args, *rows).returncode == 0 and file.read_bytes() == before
    monkeypatch.setattr(compare, 'EPOCHS', 2)
    done = call('compare', *args, *rows)
    assert done.returncode == 1 and 'made with other settings' in done.stderr
    assert call('compare', *args[:-3], 0).returncode == 2

    names = sorted(p.name for p in (images / 'test').iterdir())
    net = timm.create_model('bcnn_resnet18_c4', num_classes=len(names))
    save_model(net, tmp_path / 'run', label_names=names)
    shutil.copy(demo_fonts()['inter'][0].path, tmp_path / 'fonts')  # not among the images
    picture = tmp_path / 'confusions.png'
    done = call('report', tmp_path / 'run', tmp_path / 'fonts', images, '--picture', picture)
    # ResNet-18 up to stage 3 has 2,782,784 parameters, the descriptor 256 * 257 / 2 numbers
    assert f'6 images of 2 fonts, {2_782_784 + 2 * 32_896 + 2:,} parameters' in done.stdout, done.stderr
    assert '  sentence: ' in done.stdout and Image.open(picture).getbbox()


@pytest.fixture
def small_run(tmp_path, images):
    """Arguments of a run of four steps."""
    args = ('--steps', 4, '--batch-size', 1, '--sizes', 48, 64, '--workers', 1, '--val-batches', 1)
    return (tmp_path / 'fonts', tmp_path / 'run', *args, '--save-minutes', 0)


def test_a_run_goes_on_exactly(tmp_path, small_run):
    """Killed after any step, continued with the same command: the same weights as in one go."""
    fonts, run, *args = small_run
    done = _run('train.py', *small_run)
    assert done.returncode == 0 and 'step 3/4, loss ' in done.stdout, done.stderr
    expected = (run / 'model' / 'model.safetensors').read_bytes()
    again = tmp_path / 'again'
    command = [sys.executable, '-u', SCRIPTS / 'train.py', *map(str, (fonts, again, *args))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith('step 1/4')
        process.kill()
    assert (again / 'last.pth.tar').is_file()
    assert (again / 'model' / 'model.safetensors').read_bytes() != expected
    done = _run('train.py', fonts, again, *args)
    assert done.returncode == 0 and 'step 1/4' not in done.stdout, done.stderr
    assert (again / 'model' / 'model.safetensors').read_bytes() == expected
    done = _run('train.py', fonts, again, *args)
    assert done.returncode == 0 and 'step' not in done.stdout, done.stderr


def test_a_run_of_no_rate_leaves_the_classifier(tmp_path, small_run, call):
    """Trained on descriptors less their mean it is published for descriptors as they are."""
    fonts, run, *args = small_run
    assert call('train', *small_run).returncode == 0
    again = ('--start', run / 'model', *args, '--lr', 0, '--head-lr', 0)
    done = call('train', fonts, tmp_path / 'again', *again)
    assert done.returncode == 0, done.stderr
    state, mean = (torch.load(tmp_path / 'again' / 'last.pth.tar')[k] for k in ('net', 'mean'))
    start, end = (load_file(folder / 'model' / 'model.safetensors') for folder in (run, tmp_path / 'again'))
    torch.testing.assert_close(end['head.fc.weight'], start['head.fc.weight'])
    torch.testing.assert_close(end['head.fc.bias'], start['head.fc.bias'])
    assert mean.norm() > 0.5  # most of a descriptor, whose length is 1
    torch.testing.assert_close(state['head.fc.bias'], start['head.fc.bias'] + start['head.fc.weight'] @ mean)


def test_publish(tmp_path, images, small_run, call):
    assert call('train', *small_run).returncode == 0
    args = (tmp_path / 'run' / 'model', tmp_path / 'fonts', tmp_path / 'repo', images)
    (tmp_path / 'fonts' / 'anton' / 'LICENSE').write_text('SIL Open Font License')
    done = call('publish', *args)
    assert done.returncode == 1 and f"'{tmp_path}/fonts/lobster/LICENSE' is not there" in done.stderr
    assert not (tmp_path / 'repo').exists()
    (tmp_path / 'fonts' / 'lobster' / 'LICENSE').write_text('Apache License')
    done = call('publish', *args)
    assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / 'repo').iterdir())
    assert files == ['README.md', 'config.json', 'confusions.png', 'model.safetensors']
    card = (tmp_path / 'repo' / 'README.md').read_text()
    assert '- Apache License 2.0: lobster\n- SIL Open Font License 1.1: anton\n' in card
    assert 'Which of 2 fonts of 2 Google' in card
    top1 = float(done.stdout.split('images: ')[1].split(' %')[0])
    assert f'| images | 6 | {top1:.1f} ± ' in card and f'| top-1, test | {top1:.2f} % |' in card
    sizes = [os.path.getsize(folder / 'model.safetensors') for folder in (tmp_path / 'repo', args[0])]
    assert sizes[0] < 0.6 * sizes[1]


def test_head_that_diverges_at_once():
    frozen = importlib.import_module('frozen_features')
    head = timm.create_model('bcnn', backbone_a='test_resnet', num_classes=3).head
    maps = torch.full((1, 6, head.in_features, 2, 2), torch.nan)
    features = dict.fromkeys(('train', 'val', 'test'), frozen.Features(maps, torch.arange(6) % 3))
    result = frozen.train_head(head, features, lr=1.0, epochs=2, batch_size=3, seed=0)
    assert result.val_top1 == 0 and result.predictions.shape == (6,)
