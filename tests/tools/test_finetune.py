import re

import pytest
import timm
import torch
import yaml
from PIL import Image

from timm_bilinear.cli import main
from timm_bilinear.hub import save_model
from timm_bilinear.tools import finetune as module
from timm_bilinear.tools.finetune import Stage, finetune

SMALL = dict(model='bcnn', model_kwargs=dict(backbone_a='test_resnet', out_index_a=2), img_size=32, batch_size=8)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two textures that colour does not tell apart: horizontal and vertical stripes."""
    root = tmp_path_factory.mktemp('data')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 16), ('val', 8), ('test', 8)):
        for name, axis in (('rows', 0), ('columns', 1)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                stripes = (0.5 + 0.5 * torch.rand(3, generator=generator))[:, None] * (torch.arange(48) // 4 % 2)
                image = stripes.unsqueeze(2 - axis).expand(3, 48, 48)
                array = (255 * image).byte().permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(array).save(folder / f'{i}.png')
    return root


def _weights(folder):
    return timm.models.load_state_dict(str(folder / 'model.safetensors'))


def _assert_same(a, b):
    a, b = _weights(a), _weights(b)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_from_nothing(data, tmp_path):
    metrics = finetune(data, tmp_path / 'out', pretrained=False, epochs=6, workers=0, **SMALL)
    assert metrics['val_top1'] > 90 and metrics['test_top1'] > 90
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == ['columns', 'rows']
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)
    assert len((tmp_path / 'out' / 'summary.csv').read_text().splitlines()) == 7


def test_same_seed_same_weights_and_resume(data, tmp_path, monkeypatch):
    kwargs = dict(SMALL, pretrained=False, epochs=3, workers=2)
    finetune(data, tmp_path / 'a', **kwargs)
    finetune(data, tmp_path / 'b', **dict(kwargs, seed=1))
    with pytest.raises(AssertionError):
        _assert_same(tmp_path / 'a', tmp_path / 'b')

    # the run is cut in its second epoch, then resumed
    train_epoch = module._train_epoch

    def cut(*args):
        if 'epoch 2/3' in args[-1]:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(module, '_train_epoch', cut)
    with pytest.raises(KeyboardInterrupt):
        finetune(data, tmp_path / 'c', **kwargs)
    assert not (tmp_path / 'c' / 'model.safetensors').exists()
    monkeypatch.setattr(module, '_train_epoch', train_epoch)
    finetune(data, tmp_path / 'c', resume=True, **kwargs)
    _assert_same(tmp_path / 'a', tmp_path / 'c')


@pytest.mark.parametrize('resume', [False, True])
def test_cut_in_the_first_epoch(data, tmp_path, monkeypatch, resume):
    kwargs = dict(SMALL, pretrained=False, epochs=1, workers=0)

    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, '_train_epoch', cut)
        with pytest.raises(KeyboardInterrupt):
            finetune(data, tmp_path / 'out', **kwargs)
    assert (tmp_path / 'out' / 'args.yaml').is_file()
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    with pytest.raises(FileNotFoundError if resume else FileExistsError):
        finetune(data, tmp_path / 'out', resume=resume, **kwargs)
    (tmp_path / 'out' / 'notes.txt').unlink()
    assert 'test_top1' in finetune(data, tmp_path / 'out', resume=resume, **kwargs)


def _stages():
    return [Stage(2, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0), Stage(2, 'sgd', 1e-3, 1e-2, 1e-5)]


def test_two_stages(data, tmp_path, monkeypatch):
    """The first stage leaves the streams, batch norm statistics included, as they were; the second trains them."""
    torch.manual_seed(0)
    start = timm.create_model('bcnn', num_classes=5, **SMALL['model_kwargs'])
    save_model(start, tmp_path / 'start')
    kwargs = dict(SMALL, model=f'local-dir:{tmp_path / "start"}', model_kwargs=None, workers=0, stages=_stages())
    states = []
    save_checkpoint = module.CheckpointSaver.save_checkpoint

    def record(self, epoch, metric):
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return save_checkpoint(self, epoch, metric)

    monkeypatch.setattr(module.CheckpointSaver, 'save_checkpoint', record)
    finetune(data, tmp_path / 'out', **kwargs)
    streams = [k for k in states[0] if k.startswith('stream_a.')]
    assert all(torch.equal(states[1][k], start.state_dict()[k]) for k in streams)
    assert not torch.equal(states[0]['head.fc.weight'], states[1]['head.fc.weight'])
    assert not torch.equal(states[3]['stream_a.conv1.0.weight'], states[1]['stream_a.conv1.0.weight'])

    # cut between the stages
    def cut(self, epoch, metric):
        save_checkpoint(self, epoch, metric)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.CheckpointSaver, 'save_checkpoint', cut)
    with pytest.raises(KeyboardInterrupt):
        finetune(data, tmp_path / 'cut', **kwargs)
    monkeypatch.setattr(module.CheckpointSaver, 'save_checkpoint', save_checkpoint)
    finetune(data, tmp_path / 'cut', resume=True, **kwargs)
    _assert_same(tmp_path / 'out', tmp_path / 'cut')


def test_default_recipe():
    assert [stage.lr > 0 for stage in module.default_stages(True, 3, 2)] == [False, True]
    assert [stage.epochs for stage in module.default_stages(True, 3, 2)] == [2, 3]
    assert len(module.default_stages(False, 3, 2)) == 1
    assert len(module.default_stages(True, 3, 0)) == 1


@pytest.mark.parametrize('fast', [False, True])
def test_no_emulated_bfloat16(monkeypatch, caplog, fast):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: fast, raising=False)
    cpu = torch.device('cpu')
    assert module.resolve_amp_dtype('bfloat16', cpu) is (torch.bfloat16 if fast else None)
    assert ('no bfloat16' in caplog.text) != fast
    assert module.resolve_amp_dtype('bfloat16', torch.device('cuda')) is torch.bfloat16
    assert module.resolve_amp_dtype(None, cpu) is None


@pytest.mark.parametrize('fast', [False, True])
def test_tells_the_precision_it_trained_in(data, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: fast, raising=False)
    finetune(data, tmp_path / 'out', pretrained=False, epochs=1, workers=0, amp_dtype='bfloat16', **SMALL)
    told = yaml.safe_load((tmp_path / 'out' / 'args.yaml').read_text())
    assert told['amp_dtype'] == ('bfloat16' if fast else None)


def test_does_not_overwrite(data, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not empty'):
        finetune(data, tmp_path, pretrained=False, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(FileNotFoundError, match='Nothing to resume'):
        finetune(data, tmp_path, pretrained=False, resume=True, **SMALL)


def test_other_models_for_comparison(data, tmp_path):
    frozen = [Stage(1, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0)]
    with pytest.raises(ValueError, match=r"'model'.*frozen.*test_resnet"):
        finetune(data, tmp_path / 'out', model='test_resnet', pretrained=False, stages=frozen)
    assert not (tmp_path / 'out').exists()

    kwargs = dict(SMALL, model='test_resnet', model_kwargs=None, pretrained=False, epochs=1, workers=0)
    finetune(data, tmp_path / 'out', train_size=24, **kwargs)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.get_classifier().out_features == 2 and model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('in_chans,mode', [(1, 'L'), (2, 'LA'), (4, 'RGBA')])
@pytest.mark.parametrize('model', ['bcnn', 'test_resnet'])
def test_channels(data, tmp_path, monkeypatch, model, in_chans, mode):
    create_loaders, modes = module._create_loaders, []

    def record(datasets, *args):
        modes.extend(dataset[0][0].mode for dataset in datasets.values())
        return create_loaders(datasets, *args)

    monkeypatch.setattr(module, '_create_loaders', record)
    model_kwargs = dict(SMALL['model_kwargs'] if model == 'bcnn' else {}, in_chans=in_chans)
    kwargs = dict(SMALL, model=model, model_kwargs=model_kwargs, pretrained=False, epochs=1, workers=0)
    finetune(data, tmp_path / 'out', train_size=24, **kwargs)
    assert modes == [mode] * 3
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert loaded.in_chans == in_chans and loaded.pretrained_cfg['input_size'] == (in_chans, 32, 32)
    assert len(loaded.pretrained_cfg['mean']) == len(loaded.pretrained_cfg['std']) == in_chans
    for key, value in _weights(tmp_path / 'out').items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_no_images_of_so_many_channels(data, tmp_path):
    kwargs = dict(SMALL, model_kwargs=dict(SMALL['model_kwargs'], in_chans=5), pretrained=False)
    with pytest.raises(ValueError, match='1 to 4 channels, the model wants 5'):
        finetune(data, tmp_path / 'out', **kwargs)
    assert not (tmp_path / 'out').exists()


def test_diverged_loss(data, tmp_path):
    stages = [Stage(1, 'sgd', lr=1e30, head_lr=1e30, weight_decay=0.0)]
    with pytest.raises((RuntimeError, ValueError), match=r'loss became|must be finite'):
        finetune(data, tmp_path / 'out', pretrained=False, stages=stages, workers=0, **SMALL)


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nowhere', '--output', 'out'], "Data folder 'nowhere' does not exist"),
        (['DATA', '--output', 'out', '--model', 'bcnn_resnet99', '--no-pretrained'], 'bcnn_resnet99'),
        (
            ['DATA', '--output', 'out', '--model', 'bcnn', '--no-pretrained', '--model-kwargs', 'backbone_a=resnet19'],
            "'backbone_a'.*resnet18",
        ),
    ],
)
def test_command_errors(data, tmp_path, monkeypatch, argv, message):
    """One line that names the thing, exit code not 0, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(['finetune', *[str(data) if arg == 'DATA' else arg for arg in argv]])
    assert re.search(message, str(e.value.code)) and '\n' not in str(e.value.code)
    assert list(tmp_path.iterdir()) == []


def test_command(data, tmp_path, capsys):
    options = '--model bcnn --no-pretrained --img-size 32 --batch-size 8 --epochs 1 --workers 0 --amp-dtype bfloat16'
    kwargs = ['--model-kwargs', 'backbone_a=test_resnet', 'out_index_a=2']
    main(['finetune', str(data), '--output', str(tmp_path / 'out'), *options.split(), *kwargs])
    assert 'test_top1' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'config.json').is_file()
