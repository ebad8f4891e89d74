"""The finetune command, as users give it."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from finetune_cases import make_images

from timm_bilinear.cli import main
from timm_bilinear.tools.training import ImageStage

SMALL = '--model bcnn --no-pretrained --img-size 32 --batch-size 8 --workers 0 --model-kwargs backbone_a=test_resnet'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data'), (8, 4, 4))


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nowhere', '--output', 'out'], "Data folder 'nowhere' does not exist"),
        (['DATA', '--output', 'out', '--model', 'bcnn_resnet99', '--no-pretrained'], 'bcnn_resnet99'),
        (
            ['DATA', '--output', 'out', '--model', 'bcnn', '--no-pretrained', '--model-kwargs', 'backbone_a=resnet19'],
            "'backbone_a'.*resnet18",
        ),
        (
            ['DATA', '--output', 'out', '--model', 'bcnn', '--no-pretrained', '--model-kwargs', 'proj_dim=abc'],
            'proj_dim',
        ),
        (['--output', 'out', '--resume'], 'no run to resume'),
        (['DATA', '--output', 'DATA/train/out'], 'must not lie inside the data .*taken for a class'),
        (
            ['DATA', '--output', 'out', '--no-pretrained', '--auto-augment', 'foo'],
            "'auto_augment': timm takes no 'foo'",
        ),
    ],
)
def test_errors(data, tmp_path, monkeypatch, argv, message):
    """One line that names the thing, exit code not 0, nothing written."""
    monkeypatch.chdir(tmp_path)
    before = set(data.rglob('*'))
    with pytest.raises(SystemExit) as e:
        main(['finetune', *[arg.replace('DATA', str(data)) for arg in argv]])
    assert re.search(message, str(e.value.code)) and '\n' not in str(e.value.code)
    assert list(tmp_path.iterdir()) == [] and set(data.rglob('*')) == before


@pytest.mark.parametrize(
    'options, name',
    [
        ('--epochs 0', 'epochs'),
        ('--epochs x', 'epochs'),
        ('--lr nan', 'lr'),
        ('--smoothing 1', 'smoothing'),
        ('--scale 0.5', 'scale'),
        ('--scale 1 0.5', 'scale'),
        ('--head-lr 1 2 3', 'head_lr|head-lr'),
        ('--model-kwargs foo', 'model-kwargs'),
        ('--freeze --epochs 3', 'epochs'),
        ('--resume --overwrite', 'resume'),
        ('--amp half', 'amp'),
        ('--weights=', 'weights'),
        ('--head-cache nan', 'head-cache'),
    ],
)
def test_out_of_range(data, tmp_path, capsys, options, name):
    """As argparse has it: usage, one line that names the option, exit code 2."""
    with pytest.raises(SystemExit) as e:
        main(['finetune', str(data), '--output', str(tmp_path / 'out'), *options.split()])
    assert e.value.code == 2 and not (tmp_path / 'out').exists()
    assert re.search(name, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize('is_class', [False, True])
def test_output_within_a_folder_of_classes(data, tmp_path, is_class):
    """Beside the splits is fine; where each folder is a class it would be one."""
    root = tmp_path / 'data'
    shutil.copytree(data / 'train' if is_class else data, root)
    argv = ['finetune', str(root), '--output', str(root / 'out'), '--epochs', '1', *SMALL.split()]
    if not is_class:
        return main(argv)
    with pytest.raises(SystemExit, match='must not lie inside the data'):
        main([*argv, '--val-fraction', '0.25'])
    assert not (root / 'out').exists()


def test_who_reads_may_stop(data, tmp_path):
    """As `finetune ... | head -1` does."""
    argv = ['finetune', str(data), '--output', str(tmp_path / 'out'), '--epochs', '2', *SMALL.split()]
    command = f'{sys.executable} -m timm_bilinear {shlex.join(argv)} | head -1'
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    result = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, timeout=300)
    assert len(result.stdout.splitlines()) == 1 and 'Traceback' not in result.stderr, result.stderr
    assert (tmp_path / 'out' / 'results.json').is_file()


def test_run_and_resume(data, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / 'out')
    train_epoch = ImageStage.train_epoch

    def cut(self, epoch, *args):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(self, epoch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStage, 'train_epoch', cut)
        with pytest.raises(SystemExit) as e:
            main(['finetune', str(data), '--output', out, '--epochs', '2', *SMALL.split()])
    told = capsys.readouterr().err
    assert e.value.code == 130 and f'timm-bilinear finetune --output {out} --resume' in told
    main(['finetune', '--output', out, '--resume'])
    assert 'test_top1' in capsys.readouterr().out and (tmp_path / 'out' / 'config.json').is_file()
