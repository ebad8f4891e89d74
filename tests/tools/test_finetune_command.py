"""The finetune command, as users give it."""

import re

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
    ],
)
def test_errors(data, tmp_path, monkeypatch, argv, message):
    """One line that names the thing, exit code not 0, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(['finetune', *[str(data) if arg == 'DATA' else arg for arg in argv]])
    assert re.search(message, str(e.value.code)) and '\n' not in str(e.value.code)
    assert list(tmp_path.iterdir()) == []


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
    ],
)
def test_out_of_range(data, tmp_path, capsys, options, name):
    """As argparse has it: usage, one line that names the option, exit code 2."""
    with pytest.raises(SystemExit) as e:
        main(['finetune', str(data), '--output', str(tmp_path / 'out'), *options.split()])
    assert e.value.code == 2 and not (tmp_path / 'out').exists()
    assert re.search(name, capsys.readouterr().err.splitlines()[-1])


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
