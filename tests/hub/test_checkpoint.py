import argparse
import json

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from small_models import create
from timm.utils import CheckpointSaver, ModelEmaV3, update_summary

import timm_bilinear
from timm_bilinear.cli import main
from timm_bilinear.hub import save_model
from timm_bilinear.hub.checkpoint import load_trained

MODEL_KWARGS = dict(backbone_a='test_resnet', out_index_a=2, proj_dim=8, eps=1e-3)
LABELS = ['ant', 'bee', 'cat']


def write_image(path, mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (80, 70)).save(path)


def train_script_run(folder, label_names=LABELS, ema=True, **args):
    """What timm's train script leaves in its output folder after two epochs, the first of them better."""
    folder.mkdir()
    model = create(num_classes=3, **MODEL_KWARGS, in_chans=args.get('in_chans') or 3)
    model_ema = ModelEmaV3(model) if ema else None
    with torch.no_grad():
        model.head.fc.weight.add_(1.0)
    for name in label_names:
        write_image(folder / 'data' / 'train' / name / '0.png')
    args = dict(
        dict(
            model='bcnn',
            model_kwargs=dict(MODEL_KWARGS, freeze_backbone=True),
            num_classes=None,
            data_dir=str(folder / 'data'),
            img_size=64,
            opt='sgd',
            lr=0.1,
            epochs=2,
            eval_metric='top1',
            crop_pct=0.9,
            gp=None,
            in_chans=None,
            class_map='',
        ),
        **args,
    )
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(**args), model_ema=model_ema, checkpoint_dir=str(folder)
    )
    for epoch, top1 in ((0, 71.5), (1, 64.25)):
        update_summary(
            epoch, {'loss': 1.0}, {'loss': 1.0, 'top1': top1, 'top5': 99.0}, folder / 'summary.csv', epoch == 0
        )
        saver.save_checkpoint(epoch, metric=top1)
    return model, model_ema


@pytest.mark.parametrize('ema', [True, False])
def test_train_script_checkpoint(tmp_path, ema):
    model, model_ema = train_script_run(tmp_path / 'run', ema=ema)
    trained = load_trained(tmp_path / 'run' / 'model_best.pth.tar')
    expected = (model_ema.module if ema else model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in trained.model.state_dict().items())
    assert trained.label_names == LABELS
    assert trained.metrics == {'eval_top1': 71.5, 'eval_top5': 99.0}
    assert load_trained(tmp_path / 'run' / 'last.pth.tar').metrics['eval_top1'] == 64.25
    assert trained.data_config['input_size'] == (3, 64, 64) and trained.data_config['crop_pct'] == 0.9
    assert trained.model.head.pool.eps == 1e-3 and not trained.model.freeze_backbone


def test_class_map(tmp_path):
    (tmp_path / 'map.txt').write_text('zebra\nyak\nant\n')
    train_script_run(tmp_path / 'run', class_map=str(tmp_path / 'map.txt'))
    assert load_trained(tmp_path / 'run' / 'model_best.pth.tar').label_names == ['zebra', 'yak', 'ant']


def test_given_names_come_first(tmp_path):
    train_script_run(tmp_path / 'run', class_map='gone.txt')
    checkpoint = tmp_path / 'run' / 'model_best.pth.tar'
    assert load_trained(checkpoint, ['x', 'y', 'z']).label_names == ['x', 'y', 'z']
    (tmp_path / 'names.json').write_text('["x", "y", "z"]')
    args = ['--repo', 'me/m', '--label-names', str(tmp_path / 'names.json'), '--dry-run', str(tmp_path / 'repo')]
    main(['push', str(checkpoint), *args])
    assert json.loads((tmp_path / 'repo' / 'config.json').read_text())['label_names'] == ['x', 'y', 'z']
    main(['push', str(tmp_path / 'repo'), *args[:2], '--dry-run', str(tmp_path / 'again')])
    with pytest.raises(SystemExit, match='names'):
        main(['push', str(tmp_path / 'repo'), *args[:4], '--dry-run', str(tmp_path / 'other')])


@pytest.mark.parametrize(
    'text,message', [('x\ny', 'must name 3 classes, got 2'), ('x\n\nz', 'no name for class 1'), (None, 'names')]
)
def test_bad_names_end_with_one_line(tmp_path, text, message):
    train_script_run(tmp_path / 'run')
    if text is not None:
        (tmp_path / 'names').write_text(text)
    args = ['--repo', 'me/m', '--label-names', str(tmp_path / 'names'), '--dry-run', str(tmp_path / 'repo')]
    with pytest.raises(SystemExit, match=message) as e:
        main(['push', str(tmp_path / 'run' / 'last.pth.tar'), *args])
    assert '\n' not in str(e.value) and not (tmp_path / 'repo').exists()


@pytest.mark.parametrize('in_chans', [1, 2, 4])
@pytest.mark.parametrize('mean', [None, [0.5]])
def test_channels(tmp_path, in_chans, mean):
    _, model_ema = train_script_run(tmp_path / 'run', in_chans=in_chans, mean=mean)
    trained = load_trained(tmp_path / 'run' / 'model_best.pth.tar')
    assert trained.data_config['input_size'] == (in_chans, 64, 64) and len(trained.data_config['mean']) == in_chans
    folder = timm_bilinear.push_to_hub(tmp_path / 'run' / 'model_best.pth.tar', 'me/x', dry_run=tmp_path / 'repo')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert loaded.pretrained_cfg['input_size'] == (in_chans, 64, 64)
    x = torch.randn(2, in_chans, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model_ema.module.eval()(x))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_plain_models_of_the_train_script(tmp_path, name):
    model = timm.create_model(name, num_classes=3, **(dict(img_size=96) if name == 'test_vit' else {}))
    args = dict(model=name, img_size=96, data_dir=None)
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**args)), tmp_path / 'last.pth.tar')
    trained = load_trained(tmp_path / 'last.pth.tar', LABELS)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.model.state_dict().items())
    assert trained.data_config['input_size'] == (3, 96, 96)


def test_checkpoint_of_another_model(tmp_path):
    train_script_run(tmp_path / 'run', model_kwargs=dict(backbone_a='test_resnet', proj_dim=4))
    with pytest.raises(ValueError, match=r"'.*last\.pth\.tar' does not fit the model that its arguments make") as e:
        load_trained(tmp_path / 'run' / 'last.pth.tar')
    assert '\n' not in str(e.value)


def test_missing_class_map(tmp_path):
    train_script_run(tmp_path / 'run', class_map='gone.txt')
    with pytest.raises(ValueError, match=r"class map 'gone\.txt' of the run cannot be read"):
        load_trained(tmp_path / 'run' / 'model_best.pth.tar')


def test_folders_that_are_not_the_classes_name_nothing(tmp_path):
    train_script_run(tmp_path / 'run', label_names=LABELS[:2])
    assert load_trained(tmp_path / 'run' / 'model_best.pth.tar').label_names is None


def test_arguments_in_the_checkpoint(tmp_path):
    train_script_run(tmp_path / 'run')
    (tmp_path / 'run' / 'args.yaml').unlink()
    assert load_trained(tmp_path / 'run' / 'model_best.pth.tar').label_names == LABELS


def test_dry_run(tmp_path, capsys):
    _, model_ema = train_script_run(tmp_path / 'run')
    args = ['--repo', 'me/insects', '--license', 'mit', '--dataset', 'insects', '--dry-run', str(tmp_path / 'repo')]
    main(['push', str(tmp_path / 'run' / 'model_best.pth.tar'), *args])
    out = capsys.readouterr().out
    assert all(f'{name}: ' in out for name in ('README.md', 'config.json', 'model.safetensors'))
    assert sorted(p.name for p in (tmp_path / 'repo').iterdir()) == ['README.md', 'config.json', 'model.safetensors']

    config = json.loads((tmp_path / 'repo' / 'config.json').read_text())
    assert config['label_names'] == LABELS and 'freeze_backbone' not in config['model_args']
    assert config['pretrained_cfg']['input_size'] == [3, 64, 64] and config['pretrained_cfg']['crop_pct'] == 0.9
    loaded = timm.create_model(f'local-dir:{tmp_path / "repo"}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model_ema.module.eval()(x))

    card = ModelCard.load(tmp_path / 'repo' / 'README.md')
    assert card.data.license == 'mit' and card.data.datasets == ['insects'] and 'transformers' not in card.data.tags
    (result,) = [r for r in card.data.eval_results if 'top-1' in r.metric_name]
    assert result.metric_value == 71.5
    for said in ('| backbone_a | test_resnet |', '| eps | 0.001 |', '| lr | 0.1 |', '71.50 %'):
        assert said in card.text, said


def test_usage_of_the_card_works(tmp_path, monkeypatch, capsys):
    train_script_run(tmp_path / 'run')
    repo = timm_bilinear.push_to_hub(tmp_path / 'run' / 'model_best.pth.tar', 'me/insects', dry_run=tmp_path / 'repo')
    code = ModelCard.load(tmp_path / 'repo' / 'README.md').text.split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (80, 70), (200, 100, 0)).save('image.jpg')
    exec(code.replace('hf-hub:me/insects', f'local-dir:{repo}'), {})
    printed = capsys.readouterr().out.splitlines()
    assert {line.split(':')[0] for line in printed} == set(LABELS)
    assert sum(float(line.split(': ')[1].split()[0]) for line in printed) == pytest.approx(100, abs=0.3)


def test_licence_is_left_out(tmp_path):
    timm_bilinear.push_to_hub(create(num_classes=3, **MODEL_KWARGS), 'me/x', dry_run=tmp_path)
    assert 'license' not in (tmp_path / 'README.md').read_text().lower()


def broken(path):
    path.write_bytes(b'PK\x03\x04 not a checkpoint')
    return path


def text(path):
    path.write_text('hello')
    return path


def state_dict_alone(path):
    torch.save({'a': torch.ones(1)}, path)
    return path


@pytest.mark.parametrize(
    'make,error,message',
    [
        (lambda p: p, FileNotFoundError, r"There is no checkpoint '.*x'"),
        (broken, ValueError, r"'.*x' is not a checkpoint that can be read"),
        (text, ValueError, r"'.*x' is not a checkpoint that can be read"),
        (state_dict_alone, ValueError, r"'.*x' holds weights, .*give a folder with a config\.json"),
        (lambda p: p.mkdir() or p, FileNotFoundError, r"'.*x' is no folder of a model"),
    ],
)
def test_bad_checkpoints(tmp_path, make, error, message):
    path = make(tmp_path / 'x')
    with pytest.raises(error, match=message):
        timm_bilinear.push_to_hub(path, 'me/x', dry_run=tmp_path / 'repo')
    assert not (tmp_path / 'repo').exists()


def test_bad_arguments(tmp_path):
    model = create(num_classes=3, **MODEL_KWARGS)
    with pytest.raises(ValueError, match="must be 'owner/name', got 'x'"):
        timm_bilinear.push_to_hub(model, 'x', dry_run=tmp_path)
    with pytest.raises(ValueError, match='me//x'):
        timm_bilinear.push_to_hub(model, 'me//x', dry_run=tmp_path)
    with pytest.raises(ValueError, match='must name 3 classes, got 2 names'):
        timm_bilinear.push_to_hub(model, 'me/x', label_names=['a', 'b'], dry_run=tmp_path)
    save_model(model, tmp_path / 'full')
    with pytest.raises(FileExistsError, match='must be new or empty'):
        timm_bilinear.push_to_hub(model, 'me/x', dry_run=tmp_path / 'full')
