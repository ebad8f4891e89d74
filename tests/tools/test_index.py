"""An index of images, from outside: made, brought up to date, cut off, shared by processes, searched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from index_cases import CLASSES, count_described, draw, draw_classes, run, save
from PIL import Image
from safetensors.torch import save_file
from small_models import ONE

import timm_bilinear
from timm_bilinear.hub import save_model
from timm_bilinear.tools import index as index_module
from timm_bilinear.tools.index_file import ImageIndex, search_vectors
from timm_bilinear.tools.vectors import Reduction


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp('model'))


@pytest.fixture
def pictures(tmp_path):
    return draw_classes(tmp_path / 'pictures')


def digest(file):
    return Path(file).read_bytes()


def test_every_image_finds_itself(model, pictures, tmp_path):
    index, failed = timm_bilinear.index_images(model, pictures, tmp_path / 'i', dim=64)
    assert not failed and len(index.rows) == 12 and index.vectors.shape == (12, 64)
    assert index.labels == sorted(index.labels) and set(index.labels) == set(CLASSES)
    torch.testing.assert_close(index.vectors.float().norm(dim=1), torch.ones(12), rtol=0, atol=2e-3)
    for results in (
        timm_bilinear.search(tmp_path / 'i', str(pictures), topk=3),
        timm_bilinear.search(index, str(pictures), topk=3, model=model),
    ):
        assert len(results) == 12
        for result in results:
            best = result['found'][0]
            assert Path(result['image']).samefile(tmp_path / best['path']) and best['score'] > 0.99
            assert best['label'] == Path(result['image']).parent.name and len(result['found']) == 3
            scores = [found['score'] for found in result['found']]
            assert scores == sorted(scores, reverse=True)


def test_others_may_read_it(model, pictures, tmp_path):
    timm_bilinear.index_images(model, pictures, tmp_path / 'i', dim=8)
    (tmp_path / 'plain').touch()
    assert (tmp_path / 'i').stat().st_mode == (tmp_path / 'plain').stat().st_mode
    (tmp_path / 'i').chmod(0o640)
    timm_bilinear.index_images(model, pictures, tmp_path / 'i')
    assert (tmp_path / 'i').stat().st_mode & 0o777 == 0o640


def test_brought_up_to_date(model, pictures, tmp_path, monkeypatch):
    file = tmp_path / 'i'
    whole, _ = timm_bilinear.index_images(model, pictures, file, dim=64)
    before = dict(zip((row.path for row in whole.rows), whole.vectors.tolist()))
    seen = count_described(monkeypatch)
    timm_bilinear.index_images(model, pictures, file)
    assert sum(seen) == 0
    draw(pictures / 'cat' / 'new.png', 100)
    draw(pictures / 'dog' / '1.png', 101)  # another picture under its name
    (pictures / 'owl' / '2.png').unlink()
    index, _ = timm_bilinear.index_images(model, pictures, file)
    assert sum(seen) == 2
    after = dict(zip((row.path for row in index.rows), index.vectors.tolist()))
    assert set(after) == set(before) - {'pictures/owl/2.png'} | {'pictures/cat/new.png'}
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {'pictures/cat/new.png', 'pictures/dog/1.png'}
    # images of another folder come beside these
    draw(tmp_path / 'more' / 'emu' / 'x.png', 102)
    index, _ = timm_bilinear.index_images(model, tmp_path / 'more', file)
    assert len(index.rows) == 13 and index.labels[-1] == 'emu'


def test_taken_out(model, pictures, tmp_path, capsys):
    file = tmp_path / 'i'
    run('index', model, pictures, '--output', file, '--dim', 32)
    run('index', '--output', file, '--remove', pictures / 'cat', 'pictures/dog/1.png')
    assert '5 images taken out' in capsys.readouterr().out
    index = ImageIndex.load(file)
    assert len(index.rows) == len(index.vectors) == 7 and 'cat' not in index.labels
    assert 'nowhere' in run('index', '--output', file, '--remove', 'nowhere', code=1)


def test_goes_on_after_a_cut(model, pictures, tmp_path, monkeypatch):
    whole, _ = timm_bilinear.index_images(model, pictures, tmp_path / 'whole', dim=64, batch_size=2)
    append, calls = index_module._Parts.append, []

    def cut(self, *args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(index_module._Parts, 'append', cut)
        with pytest.raises(KeyboardInterrupt, match='goes on'):
            timm_bilinear.index_images(model, pictures, tmp_path / 'i', dim=64, batch_size=2)
    assert not (tmp_path / 'i').exists()
    parts = tmp_path / '.i.parts'
    with (parts / '0-0.rows').open('a') as f:  # cut off within a row, and a row's vector too
        f.write('["half')
    seen = count_described(monkeypatch)
    index, _ = timm_bilinear.index_images(model, pictures, tmp_path / 'i', dim=64, batch_size=2)
    assert sum(seen) <= 8 and not parts.exists()  # one describes nothing but its size
    assert torch.equal(index.vectors, whole.vectors) and index.rows == whole.rows


def test_several_processes(model, pictures, tmp_path):
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    command = ['-m', 'timm_bilinear', 'index', model, str(pictures), '--dim', '64', '--batch-size', '2']
    command += ['--device', 'cpu', '--output']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    for name, starter in (('one', []), ('two', torchrun)):
        arguments = [sys.executable, *starter, *command, str(tmp_path / name)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('12 images') == 1
    assert digest(tmp_path / 'one') == digest(tmp_path / 'two')


def test_other_model(model, pictures, tmp_path):
    file = tmp_path / 'i'
    timm_bilinear.index_images(model, pictures, file, dim=64)
    before = digest(file)
    torch.manual_seed(1)
    net = timm.create_model('bcnn', **ONE)
    save_model(net, tmp_path / 'other', data_config=dict(input_size=(3, 96, 96)))
    assert 'other weights' in run('search', file, pictures, '--model', tmp_path / 'other', code=1)
    assert 'other weights' in run('index', tmp_path / 'other', pictures, '--output', file, code=1)
    save_model(timm.create_model('test_resnet', num_classes=3), tmp_path / 'third')
    message = run('index', tmp_path / 'third', pictures, '--output', file, code=1)
    assert 'index of bcnn' in message and 'test_resnet' in message
    assert digest(file) == before
    # another classifier on the same features is no other model
    net = timm_bilinear.load(model)
    net.reset_classifier(9)
    save_model(net, tmp_path / 'more_classes', data_config=dict(input_size=(3, 96, 96)))
    assert run('search', file, pictures, '--model', tmp_path / 'more_classes') is None


def test_model_that_is_gone(model, pictures, tmp_path):
    moved = tmp_path / 'model'
    shutil.copytree(model, moved)
    timm_bilinear.index_images(moved, pictures, tmp_path / 'i', dim=64)
    shutil.rmtree(moved)
    assert 'not there any more' in run('search', tmp_path / 'i', pictures, code=1)


def test_images_that_cannot_be_read(model, pictures, tmp_path, capsys):
    (pictures / 'cat' / 'broken.png').write_bytes(b'no image')
    assert run('index', model, pictures, '--output', tmp_path / 'i', '--dim', 64, code=1) == 1
    assert 'broken.png' in capsys.readouterr().err
    assert len(ImageIndex.load(tmp_path / 'i').rows) == 12
    assert run('search', tmp_path / 'i', pictures / 'cat', code=1) == 1


@pytest.mark.parametrize(
    'change, message',
    [
        (['--dim', 32], 'has vectors of 64 numbers'),
        (['--reduce', 'pca'], "by 'sketch'"),
    ],
)
def test_other_reduction(model, pictures, tmp_path, change, message):
    run('index', model, pictures, '--output', tmp_path / 'i', '--dim', 64)
    assert message in run('index', model, pictures, '--output', tmp_path / 'i', *change, code=1)


def test_wrong_files(model, pictures, tmp_path):
    (tmp_path / 'text').write_text('no index')
    save_file({'x': torch.zeros(2)}, tmp_path / 'other.safetensors')
    for name in ('text', 'other.safetensors'):
        assert f"{name}' is no index" in run('search', tmp_path / name, pictures, code=1)
        assert f"{name}' is no index" in run('index', model, pictures, '--output', tmp_path / name, code=1)
    assert 'There is no index' in run('search', tmp_path / 'none', pictures, code=1)
    assert 'There is no folder' in run('index', model, tmp_path / 'none', '--output', tmp_path / 'i', code=1)
    (tmp_path / 'empty').mkdir()
    assert 'no image in' in run('index', model, tmp_path / 'empty', '--output', tmp_path / 'i', code=1)
    assert "'output'" in run('index', model, pictures, '--output', tmp_path / 'no' / 'i', code=1)
    assert run('index', model, '--output', tmp_path / 'i', code=2) == 2


def test_found_is_told_and_drawn(model, pictures, tmp_path, capsys):
    run('index', model, pictures, '--output', tmp_path / 'i', '--dim', 64)
    run(
        'search', tmp_path / 'i', pictures / 'cat', '--topk', 3, '--json', tmp_path / 'j', '--sheet', tmp_path / 's.png'
    )
    told = json.loads((tmp_path / 'j').read_text())
    assert len(told) == 4 and all(len(t['found']) == 3 and t['error'] is None for t in told)
    with Image.open(tmp_path / 's.png') as sheet:
        colours = {colour for _, colour in sheet.convert('RGB').getcolors(1 << 24)}
    assert {(0, 114, 178), (192, 78, 0)} <= colours  # frames of right and wrong ones
    capsys.readouterr()
    run('search', tmp_path / 'i', pictures / 'cat' / '0.png', '--topk', 100)
    assert len(capsys.readouterr().out.splitlines()) == 13


def test_faiss_finds_the_same(model, pictures, tmp_path):
    pytest.importorskip('faiss')
    timm_bilinear.index_images(model, pictures, tmp_path / 'i', dim=64)
    ours = timm_bilinear.search(tmp_path / 'i', str(pictures), topk=20)
    theirs = timm_bilinear.search(tmp_path / 'i', str(pictures), topk=20, faiss=True)
    for one, other in zip(ours, theirs):
        assert [f['path'] for f in one['found']] == [f['path'] for f in other['found']]
        assert [f['score'] for f in one['found']] == pytest.approx([f['score'] for f in other['found']], abs=1e-5)


@pytest.mark.parametrize('block', [7, 1000])
def test_blocks_change_nothing(block):
    vectors = torch.randint(-2, 3, (100, 16)).half()  # products without rounding, many of them equal
    queries = torch.randint(-2, 3, (5, 16)).float()
    scores, places = search_vectors(queries, vectors, 30, block)
    wanted = (queries @ vectors.float().T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(places, wanted.indices[:, :30])
    torch.testing.assert_close(scores, wanted.values[:, :30], rtol=0, atol=1e-6)


def test_sketch_keeps_products():
    """The mean over many pairs is that of the descriptors, and its spread falls as 1 / sqrt(dim)."""
    x = F.normalize(torch.randn(60, 5000) + torch.randn(1, 5000))
    exact = x @ x.T
    errors = []
    for dim in (128, 2048):
        y = Reduction('sketch', 5000, dim)._sketch(x, dim)
        errors.append((y @ y.T - exact).std())
    assert errors[0] < 1.5 / 128**0.5 and 2.5 < errors[0] / errors[1] < 6


def test_principal_components():
    """Of descriptors in a plane two components are enough."""
    x = torch.randn(50, 2) @ torch.randn(2, 300) + torch.randn(300)
    reduction = Reduction('pca', 300, 2)
    reduction.fit(x)
    centred = F.normalize(x - x.mean(0))
    torch.testing.assert_close(reduction(x) @ reduction(x).T, centred @ centred.T, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match='principal components'):
        Reduction('pca', 300, 64).fit(x)


def test_pca_command(model, pictures, tmp_path):
    run('index', model, pictures, '--output', tmp_path / 'i', '--dim', 8, '--reduce', 'pca')
    index = ImageIndex.load(tmp_path / 'i')
    assert index.reduction.kind == 'pca' and index.vectors.shape == (12, 8)
    draw(pictures / 'cat' / 'new.png', 100)
    run('index', model, pictures, '--output', tmp_path / 'i')
    results = timm_bilinear.search(tmp_path / 'i', str(pictures), topk=1)
    assert all(Path(r['image']).samefile(tmp_path / r['found'][0]['path']) for r in results)


def test_retrieval_command(model, pictures, tmp_path, capsys):
    for path in pictures.rglob('*.png'):  # as Market-1501 names them
        number = int(path.stem)
        (tmp_path / 'market').mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / 'market' / f'{number % 3 if number % 4 else -1}_c{number % 2}s1_{number}.jpg')
    run('retrieval', model, pictures)
    plain = capsys.readouterr().out
    assert [line.split()[0] for line in plain.splitlines()][:2] == ['recall@1', 'recall@2']
    run('retrieval', model, pictures, pictures, '--json', '-')
    assert json.loads(capsys.readouterr().out)['recall@1'] == pytest.approx(100)  # there each finds itself
    options = ('--labels', '^(-?[0-9]+)_', '--cameras', 'c([0-9])s')
    run('retrieval', model, tmp_path / 'market', tmp_path / 'market', *options, '--json', tmp_path / 'j')
    assert 0 < json.loads((tmp_path / 'j').read_text())['mAP'] < 100
    assert "'cameras'" in run('retrieval', model, pictures, '--cameras', 'x([0-9])', code=1)
    assert "'labels'" in run('retrieval', model, pictures, '--labels', '(', code=1)
    assert 'There is no folder' in run('retrieval', model, tmp_path / 'none', code=1)
