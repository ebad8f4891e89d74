"""Every local name of a model, its classes' names as a caller has them, and what of a repo is sent."""

import json
import logging

import pytest
import timm
import torch
from hub_cases import LABELS
from safetensors.torch import save_file
from small_models import create
from test_finetuned import finetune_run

from timm_bilinear import load, push_to_hub, save_model
from timm_bilinear.hub.checkpoint import Trained, load_trained
from timm_bilinear.hub.labels import read_label_names
from timm_bilinear.hub.model_card import create_card


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'run'
    finetune_run(folder)
    return folder


@pytest.fixture
def net():
    return create(backbone_a='test_resnet', num_classes=3)


@pytest.mark.parametrize('form', ['{}', 'local-dir:{}', 'local_dir:{}', '{}/checkpoints', '{}/model.safetensors'])
def test_push_and_load_take_it(run, tmp_path, form, caplog):
    push_to_hub(run, 'me/m', dry_run=tmp_path / 'a')
    push_to_hub(form.format(run), 'me/m', dry_run=tmp_path / 'b')
    for path in (tmp_path / 'a').iterdir():
        assert path.read_bytes() == (tmp_path / 'b' / path.name).read_bytes(), path.name
    weight = load(form.format(run), 'cpu').get_classifier().weight
    assert torch.equal(weight, load(run, 'cpu').get_classifier().weight)
    assert 'not ended' not in caplog.text


def test_a_folder_of_timms_script(tmp_path, caplog):
    """Which has ended, for all that can be told."""
    model = timm.create_model('test_resnet', num_classes=3)
    run = tmp_path / 'run'
    run.mkdir()
    torch.save(dict(state_dict=model.state_dict(), epoch=1, arch='test_resnet'), run / 'model_best.pth.tar')
    (run / 'args.yaml').write_text('model: test_resnet\nnum_classes: 3\n')
    with caplog.at_level(logging.INFO):
        loaded = load(run, 'cpu', LABELS)
    assert torch.equal(loaded.get_classifier().weight, model.get_classifier().weight)
    assert 'not ended' not in caplog.text and 'model_best.pth.tar' in caplog.text
    push_to_hub(run, 'me/m', dry_run=tmp_path / 'm', label_names=LABELS)
    assert json.loads((tmp_path / 'm' / 'config.json').read_text())['label_names'] == LABELS


@pytest.mark.parametrize('use', [load, load_trained, lambda name: push_to_hub(name, 'me/m')])
@pytest.mark.parametrize(
    'name,message', [('', 'empty|missing'), ('local-dir:', 'missing|no folder'), ('local-dir:gone', "no folder 'gone'")]
)
def test_names_of_nothing(use, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        use(name)
    assert '\n' not in str(e.value)


def odd_pickle(path):
    path.write_bytes(b'\x80\x02}q\x00X\x01\x00\x00\x00ah\x05s.')  # takes from a memo what is not there


def empty(path):
    path.write_bytes(b'')


def of_torchvision(path):
    torch.save({'model': {'a': torch.ones(1)}}, path)


def list_of_tensors(path):
    torch.save([torch.ones(1)], path)


def without_names(path):
    torch.save(
        dict.fromkeys(('arch', 'model_args', 'num_classes', 'state_dict', 'class_names', 'data_config', 'args')), path
    )


@pytest.mark.parametrize(
    'make,message',
    [
        (odd_pickle, r'can be read \(\w+'),
        (empty, r'can be read \(\w+'),
        (of_torchvision, 'no state_dict.*config.json'),
        (list_of_tensors, 'not a checkpoint.*config.json'),
        (without_names, 'cannot be loaded|does not give'),
        (lambda path: torch.save({'a': torch.ones(1)}, path), 'holds weights.*config.json'),
    ],
)
@pytest.mark.parametrize('use', [lambda path: load(path, 'cpu'), lambda path: push_to_hub(path, 'me/m')])
def test_files_that_give_no_model(tmp_path, make, message, use):
    path = tmp_path / 'x.pth'
    make(path)
    with pytest.raises(ValueError, match=message) as e:
        use(path)
    text = str(e.value)
    assert str(path) in text and '\n' not in text and '()' not in text and '(5)' not in text


def test_weights_alone(tmp_path):
    save_file({'a': torch.ones(1)}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r"model\.safetensors' holds weights.*config\.json"):
        load(tmp_path / 'model.safetensors', 'cpu')


# --- class names


@pytest.mark.parametrize(
    'names',
    [{0: 'x', 1: 'y', 2: 'z'}, {'2': 'z', '0': 'x', '1': 'y'}, {'z': 2, 'x': 0, 'y': 1}, ('x', 'y', 'z'), 'file'],
)
def test_class_names_of_any_kind(net, tmp_path, names):
    if names == 'file':
        names = tmp_path / 'names.txt'
        names.write_text('x\ny\nz\n')
    folder = save_model(net, tmp_path / 'm', LABELS)
    for given in (names, str(names)) if not isinstance(names, (dict, tuple)) else (names,):
        assert load(folder, 'cpu', given).pretrained_cfg['label_names'] == ['x', 'y', 'z']
    assert load_trained(folder, names).label_names == ['x', 'y', 'z']
    for made in (
        save_model(net, tmp_path / 'n', names),
        push_to_hub(net, 'me/m', dry_run=tmp_path / 'o', label_names=names),
    ):
        assert load_trained(made).label_names == ['x', 'y', 'z']


@pytest.mark.parametrize(
    'names,error,message',
    [
        (7, TypeError, "'label_names' must be a list"),
        ({'a', 'b', 'c'}, TypeError, "'label_names' must be a list"),
        (iter('abc'), TypeError, "'label_names' must be a list"),
        (['a'], ValueError, "'label_names' must name 3 classes, got 1 names"),
        ([], ValueError, "'label_names' must name 3 classes"),
        ({0: 'a', 5: 'b'}, ValueError, "'label_names' must name 3 classes, got other indices"),
        ('abc', FileNotFoundError, "The label names 'abc'"),
        ('', OSError, "The label names ''"),
    ],
)
def test_what_are_no_class_names(net, tmp_path, names, error, message):
    folder = save_model(net, tmp_path / 'm')
    for use in (
        lambda: load(folder, 'cpu', names),
        lambda: load_trained(folder, names),
        lambda: save_model(net, tmp_path / 'n', names),
        lambda: push_to_hub(net, 'me/m', dry_run=tmp_path / 'n', label_names=names),
    ):
        with pytest.raises(error, match=message) as e:
            use()
        assert '\n' not in str(e.value)
    assert not (tmp_path / 'n').exists()


@pytest.mark.parametrize(
    'make,error,message',
    [
        (lambda p: None, FileNotFoundError, 'No such file'),
        (lambda p: p.mkdir(), IsADirectoryError, 'directory'),
        (lambda p: p.write_bytes(b'caf\xe9'), ValueError, 'no text in UTF-8'),
        (lambda p: p.write_text('[1'), ValueError, None),
    ],
)
def test_files_of_names_that_cannot_be_read(tmp_path, make, error, message):
    path = tmp_path / 'names'
    make(path)
    if message is None:  # a bracket alone makes no JSON
        assert read_label_names(path) == ['[1']
        return
    with pytest.raises(error, match=rf"^The label names '.*names' .*{message}") as e:
        read_label_names(path)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('text', ['[x] red\n[y] blue\nz', '{x} red\nblue\nz', '[red]-backed\ncat'])
def test_a_name_may_begin_with_a_bracket(tmp_path, text):
    (tmp_path / 'names').write_text(text)
    assert read_label_names(tmp_path / 'names') == text.split('\n')


# --- what is sent


def test_only_what_the_repo_is_made_of_is_sent(net, tmp_path, caplog):
    """An evaluation in the folder, say, whose files name paths of this machine."""
    repo = tmp_path / 'repo'
    push_to_hub(net, 'me/m', dry_run=repo, label_names=LABELS)
    private = 'metrics.json predictions.csv classes.csv confusion_matrix.csv confusion_matrix.png worst_images.png'
    private += ' confused_pairs.png summary.csv results.json curves.png args.yaml last.pth.tar my_metrics.json'
    for name in (*private.split(), 'LICENSE', 'LICENSE.txt', 'a picture.png', 'notes.md', '.hidden'):
        (repo / name).write_text('{}')
    card = repo / 'README.md'
    card.write_text(card.read_text() + '\n![x](a%20picture.png) [notes](./notes.md), metrics.json.bak, args.yaml')
    push_to_hub(repo, 'me/m', dry_run=tmp_path / 'sent')
    always = ['LICENSE', 'LICENSE.txt', 'README.md', 'config.json', 'model.safetensors']
    assert sorted(p.name for p in (tmp_path / 'sent').iterdir()) == sorted([*always, 'a picture.png', 'notes.md'])
    assert 'metrics.json' in caplog.text
    card.write_text(card.read_text() + '\nSee [all figures](https://huggingface.co/me/m/resolve/main/metrics.json).')
    push_to_hub(repo, 'me/m', dry_run=tmp_path / 'again')
    extra = {p.name for p in (tmp_path / 'again').iterdir()} - {p.name for p in (tmp_path / 'sent').iterdir()}
    assert extra == {'metrics.json'}


@pytest.mark.parametrize('place', ['', 'file'])
def test_a_dry_run_wants_a_folder(net, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('x')
    with pytest.raises(ValueError, match="'dry_run' must name a folder"):
        push_to_hub(net, 'me/m', dry_run=place)
    with pytest.raises((ValueError, OSError), match=r"'directory' must name a folder|file"):
        save_model(net, place)
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_the_card_says_epochs_once(net):
    stages = [dict(epochs=3, lr=0.0), dict(epochs=5, lr=0.1)]
    args = dict(stages=stages, epochs=5, head_epochs=30, opt='sgd')
    text = create_card(Trained(net, args=args), 'me/m').text
    assert '| epochs |' not in text and 'head_epochs' not in text and "'epochs': 3" in text and '| opt | sgd |' in text
    assert '| epochs | 7 |' in create_card(Trained(net, args=dict(epochs=7)), 'me/m').text
