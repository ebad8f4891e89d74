"""Fine-tuning from end to end, on small models."""

import json
import re
import sys
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from finetune_cases import MODEL, SMALL, digests, make_images
from PIL import Image

from timm_bilinear.cli import main
from timm_bilinear.data.folder import create_datasets
from timm_bilinear.finetune import evaluate as old_evaluate
from timm_bilinear.hub import save_model
from timm_bilinear.tools import inference, session, training
from timm_bilinear.tools.finetune import Stage, evaluate, finetune, resolve_amp_dtype
from timm_bilinear.tools.training import ImageStage, class_weights

FROZEN = [Stage(1, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data'))


def _weights(folder):
    return timm.models.load_state_dict(str(folder / 'model.safetensors'))


def test_from_nothing(data, tmp_path, capsys):
    metrics = finetune(data, tmp_path / 'out', **dict(SMALL, epochs=6))
    assert metrics['val_top1'] > 90 and metrics['test_top1'] > 90
    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == metrics
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == ['columns', 'rows']
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)
    assert len((tmp_path / 'out' / 'summary.csv').read_text().splitlines()) == 7
    assert Image.open(tmp_path / 'out' / 'curves.png').size[0] > 600
    args = yaml.safe_load((tmp_path / 'out' / 'args.yaml').read_text())
    assert args['threads'] == torch.get_num_threads() and args['versions']['timm'] == timm.__version__
    assert args['images'] == dict(train=32, val=16, test=16)
    out = capsys.readouterr().out
    for text in (
        '2 classes; images: 32 train, 16 val, 16 test',
        ' M parameters',
        'epochs: 6, steps of each: 4',
        's a step',
    ):
        assert text in out, text
    checkpoint = torch.load(tmp_path / 'out' / 'checkpoints' / 'model_best.pth.tar', weights_only=True)
    assert checkpoint['epoch'] == metrics['epoch'] and 'optimizer' not in checkpoint
    made = timm.create_model(checkpoint['arch'], **checkpoint['model_args'])
    made.load_state_dict(checkpoint['state_dict'])
    for key, value in _weights(tmp_path / 'out').items():
        assert torch.equal(made.state_dict()[key], value), key


def test_the_seed_counts(data, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        finetune(data, tmp_path / name, **dict(SMALL, epochs=1, seed=seed))
    a, b, c = (digests(tmp_path / name) for name in 'abc')
    assert a == b and a['model.safetensors'] != c['model.safetensors']


def test_two_stages(data, tmp_path, monkeypatch):
    """The first stage leaves the streams, batch norm statistics included, as they were; the second trains them."""
    torch.manual_seed(0)
    start = timm.create_model('bcnn', num_classes=5, **MODEL['model_kwargs'])
    save_model(start, tmp_path / 'start')
    stages = [Stage(2, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0), Stage(2, 'sgd', 1e-3, 1e-2, 1e-5)]
    states = []
    train_epoch = ImageStage.train_epoch

    def record(self, *args):
        result = train_epoch(self, *args)
        states.append({k: v.clone() for k, v in self.net.state_dict().items()})
        return result

    monkeypatch.setattr(ImageStage, 'train_epoch', record)
    kwargs = dict(SMALL, model=f'local-dir:{tmp_path / "start"}', model_kwargs=None, pretrained=True, head_cache=0.0)
    finetune(data, tmp_path / 'out', **dict(kwargs, stages=stages))
    streams = [k for k in states[0] if k.startswith('stream_a.')]
    assert all(torch.equal(states[1][k], start.state_dict()[k]) for k in streams)
    assert not torch.equal(states[0]['head.fc.weight'], states[1]['head.fc.weight'])
    assert not torch.equal(states[3]['stream_a.conv1.0.weight'], states[1]['stream_a.conv1.0.weight'])


def test_frozen_streams_only(data, tmp_path):
    torch.manual_seed(0)
    start = timm.create_model('bcnn', num_classes=5, **MODEL['model_kwargs'])
    torch.save(dict(state_dict=start.state_dict()), tmp_path / 'start.pth.tar')
    finetune(data, tmp_path / 'out', **dict(SMALL, weights=tmp_path / 'start.pth.tar', freeze=True, head_epochs=2))
    weights = _weights(tmp_path / 'out')
    assert len((tmp_path / 'out' / 'summary.csv').read_text().splitlines()) == 3
    assert all(torch.equal(weights[k], v) for k, v in start.state_dict().items() if k.startswith('stream_a.'))


@pytest.mark.parametrize('fast', [False, True])
def test_no_emulated_bfloat16(monkeypatch, caplog, fast):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: fast, raising=False)
    cpu = torch.device('cpu')
    assert resolve_amp_dtype('bfloat16', cpu) is (torch.bfloat16 if fast else None)
    assert ('no bfloat16' in caplog.text) != fast
    monkeypatch.setattr('timm_bilinear.tools.inference.bfloat16_pays', lambda: True)
    assert resolve_amp_dtype('auto', cpu) is (torch.bfloat16 if fast else None)
    assert resolve_amp_dtype(None, cpu) is None and resolve_amp_dtype('float32', cpu) is None


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('asked', ['bfloat16', 'auto', 'float32', None])
def test_tells_the_precision_it_trained_in(data, tmp_path, monkeypatch, capsys, fast, asked):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: fast, raising=False)
    monkeypatch.setattr('timm_bilinear.tools.inference.bfloat16_pays', lambda: True)
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1, amp_dtype=asked))
    trained_in = 'bfloat16' if fast and asked in ('bfloat16', 'auto') else None
    args = yaml.safe_load((tmp_path / 'out' / 'args.yaml').read_text())
    assert args['amp_dtype'] == trained_in
    assert f'cpu, {trained_in or "float32"}, ' in capsys.readouterr().out.splitlines()[0]


def test_does_not_overwrite(data, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not empty'):
        finetune(data, tmp_path, **SMALL)
    with pytest.raises(FileNotFoundError, match='no run to resume'):
        finetune(data, tmp_path, **dict(SMALL, resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_overwrite_and_resume_of_nothing(data, tmp_path):
    out = tmp_path / 'out'
    finetune(data, out, **dict(SMALL, epochs=2, resume=True))  # starts when there is nothing yet
    before = digests(out)
    with pytest.raises(RuntimeError, match='bcnn_resnet99'):
        finetune(data, out, **dict(SMALL, epochs=1, overwrite=True, model='bcnn_resnet99', model_kwargs=None))
    assert digests(out) == before  # nothing goes until the new run can start
    finetune(data, out, **dict(SMALL, epochs=1, overwrite=True))
    assert len((out / 'summary.csv').read_text().splitlines()) == 2


def test_other_models_for_comparison(data, tmp_path):
    plain = dict(SMALL, model='test_resnet', model_kwargs=None)
    with pytest.raises(ValueError, match=r"'model'.*frozen.*test_resnet.*head_epochs=0"):
        finetune(data, tmp_path / 'out', **dict(plain, stages=FROZEN))
    assert not (tmp_path / 'out').exists()
    finetune(data, tmp_path / 'out', **dict(plain, train_size=24, epochs=1))
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.get_classifier().out_features == 2 and model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('in_chans', [1, 2, 4])
@pytest.mark.parametrize('model', ['bcnn', 'test_resnet'])
def test_channels(data, tmp_path, monkeypatch, model, in_chans):
    shapes, forward = set(), ImageStage._loss

    def record(self, logits, targets):
        images, _ = next(iter(self.loaders['train']))
        shapes.add((images.shape[1], next(self.net.parameters()).shape[1]))
        return forward(self, logits, targets)

    monkeypatch.setattr(ImageStage, '_loss', record)
    model_kwargs = dict(MODEL['model_kwargs'] if model == 'bcnn' else {}, in_chans=in_chans)
    finetune(data, tmp_path / 'out', **dict(SMALL, model=model, model_kwargs=model_kwargs, train_size=24, epochs=1))
    assert shapes == {(in_chans, in_chans)}
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert loaded.in_chans == in_chans and loaded.pretrained_cfg['input_size'] == (in_chans, 32, 32)
    assert len(loaded.pretrained_cfg['mean']) == len(loaded.pretrained_cfg['std']) == in_chans
    for key, value in _weights(tmp_path / 'out').items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_no_images_of_so_many_channels(data, tmp_path):
    kwargs = dict(SMALL, model_kwargs=dict(MODEL['model_kwargs'], in_chans=5))
    with pytest.raises(ValueError, match='1 to 4 channels, the model wants 5'):
        finetune(data, tmp_path / 'out', **kwargs)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('lr, options', [(1e30, ['--lr', '--head-lr']), (0.0, ['--head-lr'])])
@pytest.mark.parametrize('amp', [False, True])
def test_diverged_loss(data, tmp_path, monkeypatch, capsys, lr, options, amp):
    """The remedy is one of options that exist."""
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: amp, raising=False)
    monkeypatch.setattr('timm_bilinear.tools.inference.bfloat16_pays', lambda: True)
    monkeypatch.setattr(ImageStage, '_loss', lambda *_: (torch.tensor(float('nan')), 1.0))
    stages = [Stage(1, 'sgd', lr=lr, head_lr=1.0, weight_decay=0.0)]
    with pytest.raises(RuntimeError, match=r'^Stage 1/1, epoch 1/1: the loss became nan; a lower ') as e:
        finetune(data, tmp_path / 'out', **dict(SMALL, stages=stages, head_cache=0.0))
    assert re.findall(r'--[a-z-]+', str(e.value)) == options + ['--amp'] * amp
    with pytest.raises(SystemExit):
        main(['finetune', '--help'])
    help = capsys.readouterr().out
    assert all(option in help for option in re.findall(r'--[a-z-]+', str(e.value)))


def test_a_closed_pipe_ends_nothing(data, tmp_path, monkeypatch):
    class Closed:
        lines = 0

        def write(self, text):
            self.lines += text.count('\n')

        def flush(self):
            if self.lines > 1:
                raise BrokenPipeError(32, 'Broken pipe')

    for log_format in ('text', 'json'):
        monkeypatch.setattr(sys, 'stdout', Closed())
        finetune(data, tmp_path / log_format, **dict(SMALL, epochs=2, log_format=log_format))
        assert sys.stdout.lines == 2 and (tmp_path / log_format / 'results.json').is_file()


def test_one_run_in_a_process(data, tmp_path, monkeypatch):
    """Random states are the process's: a second one would change what the first gives."""
    refused, train_epoch = [], ImageStage.train_epoch

    def other():
        with pytest.raises(RuntimeError, match='Another run goes on in this process') as e:
            finetune(data, tmp_path / 'other', **dict(SMALL, epochs=1))
        refused.append(e)

    def train(self, *args):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return train_epoch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStage, 'train_epoch', train)
        finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1))
    assert len(refused) == 1 and not (tmp_path / 'other').exists()
    finetune(data, tmp_path / 'other', **dict(SMALL, epochs=1))
    assert digests(tmp_path / 'out') == digests(tmp_path / 'other')


def test_early_stopping(data, tmp_path, capsys):
    """A stage ends when so many epochs were no better than its best one."""
    stages = [Stage(9, 'sgd', lr=1e-9, head_lr=1e-9, weight_decay=0.0), Stage(2, 'sgd', 1e-9, 1e-9, 0.0)]
    stages[0].lr = 1e-30  # what changes is less than the last digit: no epoch is better than the first
    stages[0].head_lr = 1e-30
    kwargs = dict(SMALL, model_kwargs=dict(backbone_a='test_convnext', proj_dim=8))  # no batch statistics
    finetune(data, tmp_path / 'out', **dict(kwargs, stages=stages, patience=3))
    rows = (tmp_path / 'out' / 'summary.csv').read_text().splitlines()[1:]
    assert [row.rsplit(',', 1)[1] for row in rows] == ['1'] * 4 + ['2'] * 2
    assert '3 epochs were no better' in capsys.readouterr().out
    before = digests(tmp_path / 'out')
    finetune(output=tmp_path / 'out', resume=True)
    assert digests(tmp_path / 'out') == before


def test_class_weights():
    weights = class_weights([0, 0, 0, 1], 2)
    assert weights.mean().item() == pytest.approx(1) and (weights[1] / weights[0]).item() == pytest.approx(3)
    with pytest.raises(ValueError, match='class 1 has none'):
        class_weights([0, 2], 3)


def test_class_weights_in_training(tmp_path, monkeypatch):
    data = make_images(tmp_path / 'data', (12, 4))
    for i in range(9):
        (data / 'train' / 'rows' / f'{i}.png').unlink()
    seen, cross_entropy = [], F.cross_entropy

    def record(logits, targets, weight=None, **kwargs):
        seen.append(weight)
        return cross_entropy(logits, targets, weight, **kwargs)

    monkeypatch.setattr(training.F, 'cross_entropy', record)
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1, class_weights=True))
    torch.testing.assert_close(next(w for w in seen if w is not None), torch.tensor([0.4, 1.6]))


def test_one_folder_without_splits(tmp_path):
    data = make_images(tmp_path / 'data', (8,)) / 'train'
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1, val_fraction=0.25))
    args = yaml.safe_load((tmp_path / 'out' / 'args.yaml').read_text())
    assert args['images'] == dict(train=12, val=4) and args['val_fraction'] == 0.25


def test_json_lines(data, tmp_path, capsys):
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=2, log_format='json'))
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert {'start', 'data', 'model', 'stage', 'pace', 'epoch'} <= {line['event'] for line in lines}
    epochs = [line for line in lines if line['event'] == 'epoch']
    assert [line['epoch'] for line in epochs] == [0, 1] and all(0 <= line['eval_top1'] <= 100 for line in epochs)


def test_text_has_no_bars(data, tmp_path, capsys, monkeypatch):
    from timm_bilinear.tools import progress

    monkeypatch.setattr(progress, '_SECONDS', -1.0)  # a line for each step
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1))
    captured = capsys.readouterr()
    assert '\r' not in captured.out and 'Stage 1/1, epoch 1/1: 2/4 batches, loss' in captured.out


def test_tensorboard(data, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1, tensorboard=True))
    assert list((tmp_path / 'out' / 'tensorboard').glob('events*'))


def test_no_tensorboard(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(RuntimeError, match=r"'tensorboard' takes the package .*pip install"):
        finetune(data, tmp_path / 'out', **dict(SMALL, tensorboard=True))
    assert not (tmp_path / 'out').exists()


def test_full_disk(data, tmp_path, monkeypatch):
    """The sentence has the file, the stage, what is kept and the remedy."""
    from timm_bilinear.tools import run

    count = 0

    def full(obj, f):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, 'No space left on device')
        return save(obj, f)

    save = torch.save
    monkeypatch.setattr(run.torch, 'save', full)
    with pytest.raises(OSError) as e:
        finetune(data, tmp_path / 'out', **dict(SMALL, epochs=3))
    file = r"Cannot write '.*\.pth\.tar': No space left on device\."
    told = rf'^Stage 1/1, epoch \d/3: {file} Epochs that are kept: [12]; make room, then .*--resume`\.$'
    assert re.search(told, str(e.value)), str(e.value)
    monkeypatch.setattr(run.torch, 'save', save)
    finetune(output=tmp_path / 'out', resume=True)
    finetune(data, tmp_path / 'whole', **dict(SMALL, epochs=3))
    assert digests(tmp_path / 'out') == digests(tmp_path / 'whole')


def test_full_disk_at_the_end(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(session, 'save_model', full)
        with pytest.raises(
            OSError, match=r'After the last epoch: .*No space left.* kept: 1; make room, then .*--resume`'
        ):
            finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1))
    assert 'val_top1' in finetune(output=tmp_path / 'out', resume=True)


def test_no_nan_in_json(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageStage, 'evaluate', lambda *_: dict(loss=float('nan'), top1=50.0))
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=2, log_format='json'))
    results = json.loads((tmp_path / 'out' / 'results.json').read_text(), parse_constant=pytest.fail)
    assert results['val_loss'] is None and results['epoch'] == 0


def test_evaluate_of_old_callers(data):
    assert old_evaluate is evaluate
    net = timm.create_model('bcnn', num_classes=2, **MODEL['model_kwargs'])
    config = timm.data.resolve_input_data_config(net, dict(img_size=32))
    loader = session.create_loader(create_datasets(data).splits['val'], config, 5, workers=0)
    metrics = evaluate(net, loader, torch.device('cpu'))
    with torch.inference_mode():
        images, targets = (torch.cat(parts) for parts in zip(*loader))
        logits = net(images)
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())


@pytest.mark.parametrize('name', ['resolve_amp_dtype', 'finetune', 'Stage', 'default_stages', 'Interrupted'])
def test_names_of_old_callers(name):
    import timm_bilinear.finetune as old

    assert hasattr(old, name) and old.resolve_amp_dtype is inference.resolve_amp_dtype
