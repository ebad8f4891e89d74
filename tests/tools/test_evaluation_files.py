"""Files of an evaluation: what is in them, and what they replace."""

import json
import math
import os
import shutil
from itertools import chain

import numpy as np
import pytest
from evaluation_cases import FILES, LEVELS, NAMES, Nearest, expected, read_csv, run, write
from PIL import Image

from timm_bilinear.tools.evaluate import format_metrics


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write(folder / 'train')
    write(folder / 'test')
    return folder


def test_files(data, tmp_path):
    output = tmp_path / 'new' / 'results'
    old = os.umask(0o027)
    try:
        metrics = run(Nearest(), data, output=output)
    finally:
        os.umask(old)
    assert sorted(p.name for p in output.iterdir()) == FILES
    assert {p.stat().st_mode & 0o777 for p in output.iterdir()} == {0o640}
    written = json.loads((output / 'metrics.json').read_text())
    assert metrics.items() <= written.items() and sorted(written['files']) == FILES

    rows = read_csv(output / 'predictions.csv')
    for row, (name, target, guess, probs) in zip(rows, expected()):
        assert row['image'].endswith(name)
        assert (row['target'], row['prediction']) == (NAMES[target], NAMES[guess])
        assert float(row['probability']) == pytest.approx(probs.max(), rel=1e-3)
        assert float(row['target_probability']) == pytest.approx(probs[target], rel=1e-3)
        assert float(row['loss']) == pytest.approx(-math.log(probs[target]), abs=1e-4)
        assert int(row['target_rank']) == 1 + (probs > probs[target]).sum()
    assert len(rows) == 13

    classes = {row['class']: row for row in read_csv(output / 'classes.csv')}
    assert list(classes) == NAMES
    expected_row = dict(images='3', correct='1', top1='33.33', confused_with='cat, wild', confused_images='2')
    assert classes['dog'] == dict(expected_row, **{'class': 'dog'})
    assert (classes['eel']['images'], classes['eel']['top1'], classes['eel']['confused_with']) == ('0', '', '')

    matrix = read_csv(output / 'confusion_matrix.csv')
    assert [row['target'] for row in matrix] == NAMES
    counts = np.array([[int(row[name]) for name in NAMES] for row in matrix])
    assert counts.sum() == 13 and counts[3, 2] == 2 and counts[0, 1] == 1 and np.trace(counts) == 9
    for name in FILES:
        if name.endswith('.png'):
            with Image.open(output / name) as image:
                image.load()


def test_worst_images_show_the_highest_loss_first(data, tmp_path):
    run(Nearest(), data, output=tmp_path, worst=2, pairs=1)
    losses = {
        level: -math.log(p[t]) for (_, t, _, p), level in zip(expected(), chain(*map(LEVELS.get, sorted(LEVELS))))
    }
    worst = sorted(losses, key=losses.get, reverse=True)[:2]
    sheet = np.asarray(Image.open(tmp_path / 'worst_images.png'))
    columns = [np.argwhere((sheet == level).all(2))[:, 1] for level in worst]
    assert all(len(c) > 5000 for c in columns) and columns[0].mean() < columns[1].mean()
    pairs = np.asarray(Image.open(tmp_path / 'confused_pairs.png'))
    for level in (90, 88, 125, 92, 93):  # all images of the two classes
        assert ((pairs == level).all(2)).sum() > 5000
    assert ((pairs == 20).all(2)).sum() < 500


def test_a_perfect_model_has_no_confusions(data, tmp_path):
    run(Nearest(), data, output=tmp_path)
    centres = {'ant': [20], 'bee': [55], 'cat, wild': [90]}
    perfect = write(tmp_path / 'perfect', centres)
    metrics = run(Nearest(), perfect, output=tmp_path)  # replaces the results, the old pairs too
    assert (metrics['top1'], metrics['mean_per_class'], metrics['most_confused']) == (100, 100, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*FILES, 'perfect'} - {'confused_pairs.png'})


@pytest.mark.parametrize('name', FILES)
def test_files_of_others_are_not_overwritten(data, tmp_path, name):
    content = json.dumps(dict(tool='another', files=FILES))
    (tmp_path / name).write_text(content)
    with pytest.raises(FileExistsError, match=name):
        run(Nearest(), data, output=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_own_files_are_replaced_and_others_kept(data, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    for _ in range(2):
        run(Nearest(), data, output=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, 'notes.txt'])
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_output_that_cannot_be(data, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    for name in ('file', 'link', 'file/below'):
        with pytest.raises(OSError, match=name.split('/')[0]):
            run(Nearest(), data, output=tmp_path / name)
    with pytest.raises(ValueError, match='must not lie inside the data'):
        run(Nearest(), data, output=data / 'results')
    assert sorted(p.name for p in data.iterdir()) == ['test', 'train']


def test_output_may_be_a_link(data, tmp_path):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    run(Nearest(), data, output=tmp_path / 'link')
    assert sorted(p.name for p in (tmp_path / 'real').iterdir()) == FILES


@pytest.mark.parametrize('point', range(1, len(FILES) + 1))
def test_killed_between_the_files(data, tmp_path, monkeypatch, point):
    """Wherever writing stops, the next evaluation finds its own files and goes on."""
    calls = []
    replace = os.replace

    def fail_at(*args):
        calls.append(args)
        if len(calls) == point:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, 'replace', fail_at)
    with pytest.raises(KeyboardInterrupt):
        run(Nearest(), data, output=tmp_path / 'out')
    monkeypatch.undo()
    run(Nearest(), data, output=tmp_path / 'out')
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == FILES


def test_names_as_files_have_them(tmp_path):
    names = ['Ærø', '北海道', 'a"b', "it's", 'x' * 100, '=1+1']
    folder = write(tmp_path / 'data', {name: [30 * i + 10] for i, name in enumerate(names)})
    shutil.move(folder / 'Ærø' / '0.png', folder / 'Ærø' / 'two\nlines, é.png')
    run(Nearest([30 * i + 10 for i in range(6)], names), folder, output=tmp_path / 'out')
    rows = read_csv(tmp_path / 'out' / 'predictions.csv')
    assert {row['target'] for row in rows} == set(names)
    assert any(row['image'].endswith('two\nlines, é.png') for row in rows)


@pytest.mark.skipif(os.name != 'posix' or os.uname().sysname == 'Darwin', reason='file names are text')
def test_names_that_are_no_text(tmp_path):
    folder = write(tmp_path / 'data', {'ant': [20], 'bee': [55]})
    os.rename(folder / 'ant' / '0.png', os.fsencode(folder / 'ant') + b'/caf\xe9.png')
    metrics = run(Nearest(), folder, output=tmp_path / 'out')
    format_metrics(metrics).encode()
    assert any('caf\\udce9.png' in row['image'] for row in read_csv(tmp_path / 'out' / 'predictions.csv'))
