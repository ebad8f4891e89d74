"""Indexes that are written again: by other models, under other names of the same files, by two processes at once."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from index_cases import count_described, draw, draw_classes, run, save
from safetensors import safe_open
from safetensors.torch import save_file

import timm_bilinear
from timm_bilinear.tools.index import model_key
from timm_bilinear.tools.index_file import ImageIndex
from timm_bilinear.tools.lock import FolderLock


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp('model'))


@pytest.fixture
def pictures(tmp_path):
    return draw_classes(tmp_path / 'pictures')


def index(model, folder, file, *options, **kwargs):
    run('index', model, folder, '--output', file, *options, **kwargs)
    return ImageIndex.load(file)


OTHERS = [
    dict(pool_type='sqrtm'),
    dict(eps=1e-5),
    dict(power='sigme'),
    dict(power='sigme', eta=10.0),
    dict(backbone_args=dict(output_stride=16)),
    dict(bn_eps=1e-3),
]


@pytest.mark.parametrize('arguments', OTHERS, ids=str)
def test_model_of_the_same_weights(model, pictures, tmp_path, arguments):
    other = save(tmp_path / 'other', **arguments)
    first, second = timm_bilinear.load(model), timm_bilinear.load(other)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert model_key(first) != model_key(second)
    if arguments == OTHERS[0]:
        index(model, pictures, tmp_path / 'i', '--dim', 64)
        before = (tmp_path / 'i').read_bytes()
        assert 'another pooling' in run('search', tmp_path / 'i', pictures, '--model', other, code=1)
        assert 'another pooling' in run('index', other, pictures, '--output', tmp_path / 'i', code=1)
        assert (tmp_path / 'i').read_bytes() == before


def test_same_model_said_in_other_words(model, tmp_path):
    """Defaults written out, dropout, another classifier, a frozen backbone; in another process too."""
    key = model_key(timm_bilinear.load(model))
    other = save(tmp_path / 'other', pool_type='avg', eps=1e-10, drop_rate=0.5, out_index_a=4)
    net = timm_bilinear.load(other)
    net.reset_classifier(7)
    net.set_freeze_backbone()
    assert model_key(net) == key
    code = 'import sys, timm_bilinear; from timm_bilinear.tools.index import model_key; '
    code += 'print(model_key(timm_bilinear.load(sys.argv[1])))'
    done = subprocess.run([sys.executable, '-c', code, model], capture_output=True, text=True)
    assert done.stdout.strip() == key, done.stderr[-2000:]


def test_head_of_timm():
    torch.manual_seed(0)
    first = timm.create_model('test_efficientnet', global_pool='avg').eval()
    second = timm.create_model('test_efficientnet', global_pool='max').eval()
    second.load_state_dict(first.state_dict())
    assert model_key(first) != model_key(second)


def test_file_of_an_older_version(model, pictures, tmp_path):
    index(model, pictures, tmp_path / 'i', '--dim', 64)
    with safe_open(tmp_path / 'i', 'pt') as f:
        about = dict(json.loads(f.metadata()['about']), format='timm_bilinear index 1')
        save_file({k: f.get_tensor(k) for k in f.keys()}, tmp_path / 'old', metadata=dict(about=json.dumps(about)))
    for command in (('search', tmp_path / 'old', pictures), ('index', model, pictures, '--output', tmp_path / 'old')):
        assert "old' is an index of an older version" in run(*command, code=1)


def test_folder_under_other_names(model, pictures, tmp_path, monkeypatch):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'link').symlink_to(pictures / 'cat')
    monkeypatch.chdir(tmp_path)
    whole = index(model, 'pictures', 'i', '--dim', 64)
    seen = count_described(monkeypatch)
    for name in ('pictures/cat', 'sub/../pictures/cat', 'link', 'link/../../pictures/cat', 'pictures/./', 'sub/..'):
        again = index(model, name, 'i')
        assert sorted(row.path for row in again.rows) == sorted(row.path for row in whole.rows), name
        assert sorted(again.labels) == sorted(whole.labels), name
    assert not seen
    assert run('index', '--output', 'i', '--remove', 'link') is None
    assert 'cat' not in ImageIndex.load('i').labels and len(ImageIndex.load('i').rows) == 8


def test_index_below_the_images(model, pictures):
    file = pictures / 'cat' / 'i'
    paths = [row.path for row in index(model, pictures, file, '--dim', 64).rows]
    assert [row.path for row in index(model, pictures, file).rows] == paths and len(set(paths)) == 12
    run('index', '--output', file, '--remove', pictures / 'cat')
    run('index', '--output', file, '--remove', pictures)
    assert not ImageIndex.load(file).rows


def test_new_image_of_a_class(model, pictures, tmp_path):
    index(model, pictures, tmp_path / 'i', '--dim', 64)
    draw(pictures / 'cat' / 'new.png', 100)
    again = index(model, pictures / 'cat', tmp_path / 'i')
    assert again.labels.count('cat') == 5 and '' not in again.labels
    # the other way round an image's label is learned
    assert set(index(model, pictures / 'cat', tmp_path / 'j', '--dim', 64).labels) == {''}
    assert set(index(model, pictures, tmp_path / 'j').labels) == {'cat', 'dog', 'owl'}


def test_link_to_an_index(model, pictures, tmp_path):
    (tmp_path / 'there').mkdir()
    link = tmp_path / 'here'
    link.symlink_to('there/i')
    for _ in range(2):
        rows = index(model, pictures, link, '--dim', 64).rows
        assert link.is_symlink() and (tmp_path / 'there' / 'i').is_file()
        assert len(rows) == 12 and all((tmp_path / 'there' / row.path).is_file() for row in rows)
    run('index', '--output', link, '--remove', pictures / 'cat')
    assert link.is_symlink() and len(ImageIndex.load(link).rows) == 8
    assert sorted(p.name for p in (tmp_path / 'there').iterdir()) == ['i']


@pytest.mark.parametrize(
    'first, then',
    [
        (['--dim', 9000], ['--dim', 9000]),
        (['--reduce', 'none', '--dim', 100], ['--reduce', 'none', '--dim', 100]),
        (['--reduce', 'sketch', '--dim', 4656], ['--reduce', 'sketch']),
        (['--reduce', 'pca', '--dim', 8], ['--dim', 8]),
    ],
)
def test_same_reduction_again(model, pictures, tmp_path, first, then):
    before = index(model, pictures, tmp_path / 'i', *first)
    for options in (first, then, ()):
        assert torch.equal(index(model, pictures, tmp_path / 'i', *options).vectors, before.vectors)
    assert 'leave it so' in run('index', model, pictures, '--output', tmp_path / 'i', '--dim', 100, code=1)


@pytest.mark.parametrize('form', ['{}', 'local-dir:{}', 'LOCAL_DIR:./{}'])
def test_model_named_from_a_folder(model, pictures, tmp_path, monkeypatch, form):
    monkeypatch.chdir(Path(model).parent)
    index(form.format(Path(model).name), pictures, tmp_path / 'i', '--dim', 64)
    monkeypatch.chdir(tmp_path)
    run('search', 'i', pictures / 'cat' / '0.png')


def test_descriptor_that_is_not_finite(model, pictures, tmp_path, monkeypatch):
    net = timm_bilinear.load(model)

    def poison(module, args, maps):
        is_white = args[0].mean((1, 2, 3), keepdim=True) > 0.95
        return [torch.where(is_white, torch.nan, m) for m in maps]

    net.stream_a.register_forward_hook(poison)
    draw(pictures / 'cat' / 'white.png', 0)
    white = timm_bilinear.data.images.open_image(pictures / 'cat' / 'white.png').point(lambda _: 255)
    white.save(pictures / 'cat' / 'white.png')
    for kind in ('sketch', 'pca'):
        found, failed = timm_bilinear.index_images(net, pictures, tmp_path / kind, dim=8, reduce=kind)
        assert len(failed) == 1 and 'not finite' in failed[0] and 'white.png' in failed[0]
        assert len(found.rows) == 12 and found.vectors.isfinite().all()
    for faiss in (False, *([True] if find_spec('faiss') else [])):
        results = timm_bilinear.search(tmp_path / 'sketch', str(pictures / 'cat'), model=net, faiss=faiss)
        assert [bool(r['error']) for r in results] == [not r['found'] for r in results]
        (told,) = [r for r in results if r['error']]
        assert 'not finite' in told['error'] and 'white.png' in told['error']
    monkeypatch.setattr('timm_bilinear.tools.search.load', lambda *_: net)
    assert 'white.png' in run('retrieval', model, pictures, code=1)


def test_one_process_writes(model, pictures, tmp_path):
    file = tmp_path / 'i'
    index(model, pictures, file, '--dim', 64)
    before = file.read_bytes()
    code = 'import sys; from timm_bilinear.tools.lock import FolderLock; lock = FolderLock(*sys.argv[1:]); '
    code += 'print("locked", flush=True); sys.stdin.read()'
    arguments = [sys.executable, '-c', code, str(tmp_path), 'i']
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'locked\n'
        for command in (('index', model, pictures), ('index', '--remove', pictures / 'cat')):
            told = run(*command, '--output', file, code=1)
            assert f"writes to '{file}': process {other.pid}" in told and file.read_bytes() == before
        index(model, pictures, tmp_path / 'another', '--dim', 64)
        other.communicate('')
    run('index', '--output', file, '--remove', pictures / 'cat')
    assert not [p for p in os.listdir(tmp_path) if p.startswith('.')]


def test_two_processes_at_once(model, pictures, tmp_path):
    command = [sys.executable, '-m', 'timm_bilinear', 'index', model, str(pictures), '--output', str(tmp_path / 'i')]
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    told = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and all(code == 0 or 'Another run writes to' in text for code, text in zip(codes, told)), told
    assert len(ImageIndex.load(tmp_path / 'i').rows) == 12


def test_output_that_cannot_be_written(model, pictures, monkeypatch):
    monkeypatch.setattr('timm_bilinear.tools.index.load', lambda *_: pytest.fail('the model was loaded first'))
    told = run('index', model, pictures, '--output', '/proc/x.index', code=1)
    assert "'/proc/x.index' cannot be written" in told


def test_lock_of_a_file(tmp_path):
    lock = FolderLock(tmp_path, 'i')
    FolderLock(tmp_path).release()
    with pytest.raises(RuntimeError, match="i'"):
        FolderLock(tmp_path, 'i')
    lock.release()
    assert not list(tmp_path.iterdir())
