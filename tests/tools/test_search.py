"""Search in an index: in the order of the vectors where they are equal, with nothing in it, and wrong options."""

import re
import shutil
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from index_cases import draw, draw_classes, run, save

import timm_bilinear
from timm_bilinear.tools.index_file import ImageIndex, rank_places, search_vectors
from timm_bilinear.tools.search import _by_faiss
from timm_bilinear.tools.vectors import Reduction


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / '0.png'
    draw(path, 0)
    return path


def finders(vectors):
    yield lambda queries, topk: search_vectors(queries, vectors, topk)
    yield lambda queries, topk: search_vectors(queries, vectors, topk, 10)
    if find_spec('faiss'):
        yield _by_faiss(vectors)


@pytest.mark.parametrize('count', [7, 37, 101, 300])
def test_equal_vectors_stay_in_order(count):
    queries = F.normalize(torch.randn(8, 512))
    vectors = F.normalize(torch.randn(1, 512)).half().repeat(count, 1)
    for find in finders(vectors):
        for some in (*queries[:, None], queries):
            scores, places = find(some, 50)
            assert torch.equal(places, torch.arange(min(count, 50)).expand(len(some), -1))
            assert (scores == scores[:, :1]).all()


def test_equal_vectors_among_others():
    """Some of each of several vectors, all over the index, more of them than are wanted."""
    kinds = F.normalize(torch.randn(20, 64)).half()
    which = torch.randint(20, (500,))
    queries = F.normalize(torch.randn(6, 64))
    products = (queries.double() @ kinds.double().T).float()[:, which]
    wanted = products.sort(dim=1, descending=True, stable=True)
    for find in finders(kinds[which]):
        for topk in (1, 30, 60, 500):
            scores, places = find(queries, topk)
            assert torch.equal(places, wanted.indices[:, :topk])
            torch.testing.assert_close(scores, wanted.values[:, :topk], rtol=0, atol=1e-6)


def test_one_query_is_as_several():
    queries, vectors = F.normalize(torch.randn(5, 128)), F.normalize(torch.randn(1000, 128)).half()
    scores, places = search_vectors(queries, vectors, 20)
    for i in range(5):
        alone = search_vectors(queries[i : i + 1], vectors, 20)
        assert torch.equal(alone[0][0], scores[i]) and torch.equal(alone[1][0], places[i])
    assert torch.equal(rank_places(queries[0], vectors, torch.arange(1000), 20)[1], places[0])


@pytest.mark.parametrize('faiss', [False, True])
def test_index_of_nothing(model, picture, tmp_path, capsys, faiss):
    if faiss:
        pytest.importorskip('faiss')
    timm_bilinear.index_images(model, picture.parent, tmp_path / 'i', dim=64)
    run('index', '--output', tmp_path / 'i', '--remove', picture)
    assert run('search', tmp_path / 'i', picture, *(['--faiss'] if faiss else [])) is None
    assert '0.png:' in capsys.readouterr().out
    (result,) = timm_bilinear.search(tmp_path / 'i', str(picture), faiss=faiss)
    assert result['found'] == [] and result['error'] is None


def test_index_is_named(model, picture, tmp_path):
    moved = tmp_path / 'model'
    shutil.copytree(model, moved)
    timm_bilinear.index_images(f'local-dir:{moved}', picture.parent, tmp_path / 'i', dim=64)
    shutil.rmtree(moved)
    assert f"The model of '{tmp_path / 'i'}'" in run('search', tmp_path / 'i', picture, code=1)
    given = ImageIndex([], torch.empty(0, 4), dict(model='', name='bcnn', key=''), Reduction('none', 4, 4))
    with pytest.raises(ValueError, match="'index' does not say"):
        timm_bilinear.search(given, str(picture))


@pytest.mark.parametrize(
    'sheet, told',
    [
        ('nodir/x.png', "The folder of '.*nodir/x.png' does not exist"),
        ('x.foo', "'sheet' must name a file of a format that can be written.*x.foo"),
        ('', "'sheet' must name a file, got the folder"),
    ],
)
def test_sheet_that_cannot_be_written(picture, tmp_path, sheet, told):
    """It is refused before the index is looked at, of which there is none."""
    assert re.search(told, run('search', tmp_path / 'i', picture, '--sheet', tmp_path / sheet, code=1))


def test_group_without_a_part(model, tmp_path):
    pictures = draw_classes(tmp_path / 'pictures')
    told = run('retrieval', model, pictures, '--cameras', 'x([0-9])|[0-9]', code=1)
    assert "'cameras'" in told and "'x([0-9])|[0-9]'" in told and '0.png' in told
