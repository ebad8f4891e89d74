"""What finetune leaves: folder, checkpoints, those of its older version; and folders that contradict themselves."""

import argparse
import json
import shutil

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import create
from timm.data import resolve_input_data_config
from timm.utils import CheckpointSaver, update_summary

from timm_bilinear import push_to_hub
from timm_bilinear.hub import save_model
from timm_bilinear.hub.checkpoint import load_trained
from timm_bilinear.tools.network import describe_network
from timm_bilinear.tools.run import RunFolder

LABELS = ['ant', 'bee', 'cat']
MODEL_KWARGS = dict(backbone_a='test_resnet', out_index_a=2, proj_dim=8, eps=1e-3)
CONFIG = dict(input_size=(3, 96, 96), crop_pct=0.8, crop_mode='border', mean=(0.1, 0.2, 0.3))
# Epoch 1 is as accurate as 0 and has the lower loss, epoch 2 is worse.
TOP1, LOSS = (70.0, 70.0, 60.0), (1.5, 1.0, 0.9)
STAGES = [dict(epochs=3, opt='sgd', lr=0.0, head_lr=1.0, weight_decay=0.0)]


def finetune_run(folder, name='bcnn', kwargs=MODEL_KWARGS, has_ended=True):
    """Folder and networks, by epoch, of a run of three epochs."""
    torch.manual_seed(1)
    nets = [timm.create_model(name, num_classes=3, **kwargs).eval() for _ in TOP1]
    args = dict(model='local-dir:/gone', model_kwargs=kwargs, data_dir='/home/me/data', amp_dtype=None, lr=None, seed=7)
    args.update(stages=STAGES)
    with RunFolder(folder) as run:
        run.start(args)
        best = None
        history = []
        for epoch, net in enumerate(nets):
            history.append(dict(epoch=epoch, eval_top1=TOP1[epoch], eval_loss=LOSS[epoch], train_loss=1.0, stage=1))
            state = net.state_dict()
            if epoch == 1 or best is None:
                best = dict(epoch=epoch, metrics={}, state_dict=None)
            elif best['state_dict'] is None:
                best = dict(best, state_dict=nets[best['epoch']].state_dict())
            config = resolve_input_data_config(net, CONFIG)
            content = dict(epoch=epoch, state_dict=state, history=list(history), best=best, args=args, optimizer={})
            content.update(describe_network(net, kwargs), class_names=LABELS, data_config=config)
            run.save(content)
        if has_ended:
            save_model(nets[1], folder, LABELS, config)
            run.write_results(dict(epoch=1, val_top1=TOP1[1], val_loss=LOSS[1], test_top1=66.0))
    return nets


def older_run(folder, data):
    """What the version before wrote: timm's saver in checkpoints/, the arguments and the summary above it."""
    torch.manual_seed(1)
    net = create(num_classes=3, **MODEL_KWARGS)
    for label in LABELS:
        (data / 'train' / label).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(data / 'train' / label / '0.png')
    (folder / 'checkpoints').mkdir(parents=True)
    args = dict(data_dir=str(data), model='bcnn', model_kwargs=MODEL_KWARGS, img_size=96, amp_dtype=None, stages=STAGES)
    (folder / 'args.yaml').write_text(yaml.safe_dump(json.loads(json.dumps(args))))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    saver = CheckpointSaver(
        net, optimizer, argparse.Namespace(model='bcnn'), checkpoint_dir=str(folder / 'checkpoints')
    )
    for epoch in (0, 1, 2):
        update_summary(
            epoch, {'loss': 1.0}, {'loss': 1.0, 'top1': 50.0 + epoch % 2}, folder / 'summary.csv', epoch == 0
        )
        saver.save_checkpoint(epoch, metric=50.0 + epoch % 2)
    return net


def assert_weights(trained, net):
    state = trained.model.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize('name,kwargs', [('bcnn', MODEL_KWARGS), ('test_vit', dict(img_size=96)), ('test_resnet', {})])
def test_checkpoints(tmp_path, name, kwargs):
    nets = finetune_run(tmp_path / 'run', name, kwargs)
    for file, epoch in (('model_best', 1), ('last', 2)):
        trained = load_trained(tmp_path / 'run' / 'checkpoints' / f'{file}.pth.tar')
        assert_weights(trained, nets[epoch])
        assert trained.label_names == LABELS and trained.args['seed'] == 7
        assert trained.metrics == dict(eval_top1=TOP1[epoch], **(dict(test_top1=66.0) if epoch == 1 else {}))
        assert {k: tuple(v) if k in ('mean', 'input_size') else v for k, v in CONFIG.items()}.items() <= {
            k: tuple(v) if isinstance(v, list) else v for k, v in trained.data_config.items()
        }.items()
    trained = load_trained(tmp_path / 'run')
    assert_weights(trained, nets[1])
    assert trained.metrics == dict(eval_top1=70.0, test_top1=66.0) and trained.label_names == LABELS


def test_push_of_checkpoint_and_folder_is_the_same(tmp_path):
    finetune_run(tmp_path / 'run')
    of_folder = push_to_hub(tmp_path / 'run', 'me/m', dry_run=tmp_path / 'a')
    push_to_hub(tmp_path / 'run' / 'checkpoints' / 'model_best.pth.tar', 'me/m', dry_run=tmp_path / 'b')
    for name in ('config.json', 'model.safetensors', 'README.md'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), name
    card = (tmp_path / 'a' / 'README.md').read_text()
    assert 'fine-tuned with timm_bilinear' in card and '| precision | float32 |' in card and '70.00 %' in card
    assert '/home' not in card and '/gone' not in card and str(tmp_path) not in card
    cfg = timm.create_model(f'local-dir:{of_folder}').pretrained_cfg
    assert cfg['crop_mode'] == 'border' and tuple(cfg['input_size']) == (3, 96, 96)


def test_checkpoint_that_was_moved(tmp_path):
    nets = finetune_run(tmp_path / 'run')
    other = tmp_path / 'other'
    finetune_run(other, 'test_resnet', {})
    (other / 'summary.csv').write_text('epoch,eval_top1\n1,99.0\n')
    moved = shutil.copy(tmp_path / 'run' / 'checkpoints' / 'model_best.pth.tar', other / 'checkpoints' / 'mine.pth.tar')
    trained = load_trained(moved)
    assert_weights(trained, nets[1])
    assert trained.metrics == dict(eval_top1=70.0)


def test_run_that_has_not_ended(tmp_path, caplog):
    finetune_run(tmp_path / 'run', has_ended=False)
    push_to_hub(tmp_path / 'run', 'me/m', dry_run=tmp_path / 'm')
    assert 'is a run that has not ended' in caplog.text and 'model_best.pth.tar' in caplog.text
    push_to_hub(tmp_path / 'run' / 'checkpoints' / 'model_best.pth.tar', 'me/m', dry_run=tmp_path / 'n')
    for path in (tmp_path / 'm').iterdir():
        assert path.read_bytes() == (tmp_path / 'n' / path.name).read_bytes()


def test_older_checkpoints(tmp_path):
    net = older_run(tmp_path / 'run', tmp_path / 'data')
    best = tmp_path / 'run' / 'checkpoints' / 'model_best.pth.tar'
    trained = load_trained(best)
    assert_weights(trained, net)
    assert trained.label_names == LABELS and trained.metrics == dict(eval_top1=51.0)
    assert tuple(trained.data_config['input_size']) == (3, 96, 96)
    shutil.rmtree(tmp_path / 'data')
    assert load_trained(best).label_names is None
    save_model(net, tmp_path / 'run', ['x', 'y', 'z'])  # as at the end of the run
    (tmp_path / 'run' / 'results.json').write_text('{"epoch": 1, "val_top1": 51.0, "test_top1": 49.0}')
    assert load_trained(best).label_names == ['x', 'y', 'z']
    assert load_trained(best).metrics == dict(eval_top1=51.0, test_top1=49.0)
    assert load_trained(best.with_name('last.pth.tar')).metrics == dict(eval_top1=50.0)
    args = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(dict(args, model=f'local-dir:{tmp_path}/gone')))
    with pytest.raises(ValueError, match='which is not to be had') as e:
        load_trained(best)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'changes,message',
    [
        (dict(class_names=['a', 'b']), 'num_classes is 3, class_names is 2'),
        (dict(num_classes=4), 'disagree: num_classes is 4'),
        (dict(model_args=dict(MODEL_KWARGS, num_classes=7)), r'model_args\.num_classes is 7'),
        (dict(model_args=dict(MODEL_KWARGS, proj_dim=4)), 'does not fit the model'),
        (dict(model_args=dict(MODEL_KWARGS, colour='red')), 'does not give a model: .*colour'),
        (dict(arch='resnet1'), 'does not give a model: .*resnet1'),
    ],
)
def test_checkpoints_that_contradict_themselves(tmp_path, changes, message):
    finetune_run(tmp_path / 'run')
    path = tmp_path / 'run' / 'checkpoints' / 'last.pth.tar'
    torch.save(dict(torch.load(path), **changes), path)
    with pytest.raises(ValueError, match=message) as e:
        load_trained(path)
    assert '\n' not in str(e.value) and str(path) in str(e.value)


def edit(folder, change):
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))


def cut_weights(folder):
    path = folder / 'model.safetensors'
    save_file({k: v[:2].clone() if k.startswith('head.fc') else v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda c: c.update(num_classes=4), r'num_classes is 4, model_args\.num_classes is 3'),
        (lambda c: c['model_args'].update(num_classes=4), r'num_classes is 3, model_args\.num_classes is 4'),
        (lambda c: c['pretrained_cfg'].update(num_classes=4), r'pretrained_cfg\.num_classes is 4'),
        (lambda c: (c.update(num_classes=4), c['model_args'].update(num_classes=4),
                    c['pretrained_cfg'].update(num_classes=4), c.pop('label_names')), 'in model.safetensors is 3'),
        (lambda c: (c.update(num_classes=0), c['model_args'].update(num_classes=0),
                    c['pretrained_cfg'].update(num_classes=0)), 'in model.safetensors is 3'),
        (lambda c: c.update(label_names=['a', 'b']), 'num_classes is 3, names 2'),
        (lambda c: c.update(num_classes='3'), "num_classes is '3'"),
        (lambda c: c.update(num_classes=-1), 'num_classes is -1'),
        (lambda c: c.update(model_args=[]), 'its model_args is'),
        (lambda c: c.update(label_names='abc'), 'its label_names is'),
        (lambda c: c.pop('architecture'), 'names no architecture'),
        (lambda c: c.update(architecture='resnet1'), 'resnet1'),
        (lambda c: c['model_args'].update(proj_dim=4), 'does not give a model'),
        (cut_weights, 'in model.safetensors is 2'),
        (lambda f: (f / 'config.json').write_text('{'), 'is not valid JSON'),
        (lambda f: (f / 'config.json').write_text('[]'), 'must be a JSON object'),
        (lambda f: (f / 'model.safetensors').write_bytes(b'no'), 'cannot be read'),
        (lambda f: (f / 'model.safetensors').unlink(), 'has no weights'),
    ],
)  # fmt: skip
def test_folders_that_contradict_themselves(tmp_path, change, message):
    folder = push_to_hub(create(num_classes=3, **MODEL_KWARGS), 'me/m', dry_run=tmp_path / 'm', label_names=LABELS)
    folder = tmp_path / 'm'
    try:
        edit(folder, change)
    except (AttributeError, TypeError):
        change(folder)
    for is_repo in (True, False):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
            push_to_hub(folder, 'me/m', dry_run=tmp_path / 'out')
        assert '\n' not in str(e.value) and str(folder) in str(e.value)
        if is_repo:
            (folder / 'README.md').unlink()
    assert not (tmp_path / 'out').exists()


def test_a_headless_folder_is_fine(tmp_path):
    save_model(create(num_classes=0, **MODEL_KWARGS), tmp_path / 'm')
    assert load_trained(tmp_path / 'm').model.num_classes == 0


@pytest.mark.parametrize(
    'name,text', [('args.yaml', 'a: ['), ('args.yaml', '- 1'), ('results.json', '{'), ('results.json', '[1]')]
)
def test_damaged_files_of_a_run(tmp_path, name, text):
    finetune_run(tmp_path / 'run')
    (tmp_path / 'run' / name).write_text(text)
    with pytest.raises(ValueError, match=name) as e:
        load_trained(tmp_path / 'run')
    assert '\n' not in str(e.value)


def test_rows_that_were_cut_off(tmp_path):
    finetune_run(tmp_path / 'run')
    with (tmp_path / 'run' / 'summary.csv').open('a') as f:
        f.write('3,0.5\nx,y,z\n')
    (tmp_path / 'run' / 'results.json').unlink()  # then no epoch is known
    assert load_trained(tmp_path / 'run').metrics == {}
