"""Saving touches nothing but the folder that it saves to, and leaves whole files or none."""

import json
import os
import stat
import subprocess
import sys

import pytest
import timm
import torch
from small_models import create
from timm.models import save_for_hf

from timm_bilinear.hub import save as save_module
from timm_bilinear.hub import save_model

FILES = ['config.json', 'model.safetensors']
LABELS = ['ant', 'bee', 'cat']


@pytest.fixture
def net():
    return create(backbone_a='test_resnet', proj_dim=8, num_classes=3)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Saves twice, then says every path outside the folder that was opened for writing, made, renamed or removed.
_WATCHED = """
import os, sys
import timm, timm_bilinear
folder = os.path.realpath(sys.argv[1])
net = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=3)
timm_bilinear.save_model(net, sys.argv[2])  # what is loaded on first use is loaded now
seen = set()
def watch(event, args):
    writes = event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = event in ('os.mkdir', 'os.rmdir', 'os.remove', 'os.rename', 'os.link', 'os.symlink', 'os.chmod')
    changes = changes or event.startswith(('shutil.', 'tempfile.'))
    if writes or changes:
        for path in args:
            if isinstance(path, (str, os.PathLike)) and os.sep in str(path):
                path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
                if not path.startswith(folder + os.sep):
                    seen.add((event, path))
sys.addaudithook(watch)
timm_bilinear.save_model(net, sys.argv[1])
timm_bilinear.save_model(net, sys.argv[1], ['a', 'b', 'c'])
for event, path in sorted(seen):
    print(event, path)
"""


@pytest.mark.parametrize('is_link', [False, True])
def test_nothing_outside_is_touched(tmp_path, is_link):
    folder = tmp_path / 'disk' / 'run'
    folder.mkdir(parents=True)
    target = folder
    if is_link:
        target = tmp_path / 'link'
        target.symlink_to(folder)
    run = subprocess.run(
        [sys.executable, '-c', _WATCHED, target, tmp_path / 'first'], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == ''
    assert names(folder) == FILES and target.is_symlink() == is_link


@pytest.mark.skipif(os.getuid() != 0, reason='mounts need root')
def test_mount_point(net, tmp_path):
    folder = tmp_path / 'mounted'
    folder.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', str(folder)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip('this machine allows no mounts')
    try:
        assert folder.stat().st_dev != tmp_path.stat().st_dev
        save_model(net, folder)
        save_model(net, folder)
        assert names(folder) == FILES
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert torch.equal(loaded.head.fc.weight, net.head.fc.weight)
    finally:
        subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.skipif(os.getuid() == 0, reason='root may write anywhere')
def test_parent_that_cannot_be_written_to(net, tmp_path):
    folder = tmp_path / 'parent' / 'run'
    folder.mkdir(parents=True)
    folder.parent.chmod(0o555)
    try:
        save_model(net, folder)
        assert names(folder) == FILES
    finally:
        folder.parent.chmod(0o755)


@pytest.mark.parametrize('umask,mode', [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(net, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(net, tmp_path / 'new' / 'model')
    finally:
        os.umask(before)
    for name in FILES:
        assert stat.S_IMODE((tmp_path / 'new' / 'model' / name).stat().st_mode) == mode, name
    assert stat.S_IMODE((tmp_path / 'new' / 'model').stat().st_mode) == 0o777 & ~umask


def test_folders_that_are_none(net, tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'gone' / 'away')
    (tmp_path / 'taken' / 'model.safetensors').mkdir(parents=True)
    before = sorted(tmp_path.rglob('*'))
    for name, reason in {
        'file': 'it is a file, not a folder',
        'file/below': 'Not a directory',
        'dangling': 'it is a link to nothing',
        'dangling/below': '.',
        'taken': 'Is a directory',
        'x' * 300: 'File name too long',
    }.items():
        with pytest.raises(OSError, match='Could not save the model to') as e:
            save_model(net, tmp_path / name)
        assert reason in str(e.value) and f"'{tmp_path / name}'" in str(e.value) and '\n' not in str(e.value)
        assert sorted(tmp_path.rglob('*')) == before, name
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('bug'), OSError(28, 'No space left on device')])
@pytest.mark.parametrize('place', ['there', 'new/er'])
def test_errors_leave_what_was_there(net, tmp_path, monkeypatch, error, place):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'note.txt').write_text('mine')

    def fail(model, directory, **kwargs):
        save_for_hf(model, directory, **kwargs)
        raise error

    monkeypatch.setattr(save_module, 'save_for_hf', fail)
    with pytest.raises(type(error)):
        save_model(net, tmp_path / place)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['note.txt', 'there']


def test_error_of_the_second_rename(net, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError(13, 'Permission denied')
        real(source, target)

    monkeypatch.setattr(save_module.os, 'replace', fail)
    with pytest.raises(OSError, match=r"Could not save the model to '.*': Permission denied\."):
        save_model(net, tmp_path / 'model')
    # without config.json it is no model, and nothing hidden is left
    assert not (tmp_path / 'model').exists() or names(tmp_path / 'model') == ['model.safetensors']


def test_names_stay_with_a_model(net, tmp_path):
    described = dict(ant='an insect', bee='another', dog='none of them')
    save_model(net, tmp_path / 'first', LABELS)
    config = json.loads((tmp_path / 'first' / 'config.json').read_text())
    config['label_descriptions'] = described
    (tmp_path / 'first' / 'config.json').write_text(json.dumps(config))

    loaded = timm.create_model(f'local-dir:{tmp_path / "first"}', pretrained=True)
    save_model(loaded, tmp_path / 'second')
    config = json.loads((tmp_path / 'second' / 'config.json').read_text())
    assert config['label_names'] == LABELS and 'label_names' not in config['pretrained_cfg']
    assert config['label_descriptions'] == dict(ant='an insect', bee='another')
    again = timm.create_model(f'local-dir:{tmp_path / "second"}', pretrained=True)
    assert list(again.pretrained_cfg['label_names']) == LABELS

    # names for other classes are not its own
    save_model(again, tmp_path / 'third', ['x', 'y', 'z'])
    config = (tmp_path / 'third' / 'config.json').read_text()
    assert json.loads(config)['label_names'] == ['x', 'y', 'z'] and 'ant' not in config and 'insect' not in config
    again.reset_classifier(2)
    save_model(again, tmp_path / 'fourth')
    assert 'label_names' not in (tmp_path / 'fourth' / 'config.json').read_text()
    other = timm.create_model(f'local-dir:{tmp_path / "first"}', pretrained=True, num_classes=5)
    save_model(other, tmp_path / 'fifth')
    assert 'ant' not in (tmp_path / 'fifth' / 'config.json').read_text()


def test_names_with_gaps(net, tmp_path):
    net.pretrained_cfg = dict(net.pretrained_cfg, label_names={'0': 'ant', '2': 'cat'})
    save_model(net, tmp_path / 'gaps')
    assert json.loads((tmp_path / 'gaps' / 'config.json').read_text())['label_names'] == ['ant', '1', 'cat']
    net.pretrained_cfg = dict(net.pretrained_cfg, label_names={'ant': 0, 'bee': 1, 'cat': 2})
    save_model(net, tmp_path / 'inverse')
    assert json.loads((tmp_path / 'inverse' / 'config.json').read_text())['label_names'] == LABELS
    net.pretrained_cfg = dict(net.pretrained_cfg, label_names={'7': 'ant'})
    save_model(net, tmp_path / 'others')
    assert 'label_names' not in (tmp_path / 'others' / 'config.json').read_text()
