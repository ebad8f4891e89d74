import csv
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_bilinear.hub import save_model
from timm_bilinear.tools.predict import predict, run_predict

NAMES = ['a, "b"', 'c\nd', 'é\x1b[31m', '日本']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = timm.create_model('bcnn', backbone_a='test_resnet', num_classes=4)
    nn.init.normal_(net.get_classifier().weight, std=2.0)
    return save_model(net, tmp_path_factory.mktemp('models') / 'm', NAMES, dict(input_size=(3, 48, 48)))


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(['a, b.png', 'ü ß.png', 'new\nline.png']):
        Image.new('RGB', (60, 50), (90 * i, 250 - 40 * i, 20)).save(name)
    Path('bad.png').write_bytes(b'bad')
    return ['a, b.png', 'ü ß.png', 'bad.png', 'gone.png', 'new\nline.png']


def strict(text):
    """JSON without what only Python's reader takes."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_on_stdout_is_only_json(model, images, capfd):
    assert run_predict(model, images, topk=2, json='-') == 1
    out, err = capfd.readouterr()
    results = strict(out)
    assert results == predict(model, images, topk=2)
    assert [r['image'] for r in results] == images
    assert [list(r) for r in results] == [['image', 'error', 'predictions']] * 5
    assert [list(p) for p in results[0]['predictions']] == [['name', 'index', 'probability']] * 2
    assert 'bad.png' in err and 'gone.png' in err and '2 of 5 images' in err
    assert 'bcnn (4 classes, 48 x 48 pixels) on cpu in ' in err


def test_files(model, images, tmp_path, capfd):
    (tmp_path / 'kept').mkdir()
    old = os.umask(0o027)
    try:
        assert run_predict(model, images[:2], json='out.json', csv=tmp_path / 'out.csv') == 0
    finally:
        os.umask(old)
    assert capfd.readouterr().out == ''
    results = strict(Path('out.json').read_text(encoding='utf-8'))
    assert '日本' in Path('out.json').read_text(encoding='utf-8')
    assert len(results) == 2 and len(results[0]['predictions']) == 4
    assert stat.S_IMODE(Path('out.json').stat().st_mode) == 0o640
    assert not list(tmp_path.glob('.*'))
    with open('out.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['image', 'error', 'rank', 'name', 'index', 'probability']
    flat = [(r['image'], p['name'], p['index'], p['probability']) for r in results for p in r['predictions']]
    assert [(r['image'], r['name'], int(r['index']), float(r['probability'])) for r in rows] == flat
    assert [r['rank'] for r in rows] == ['1', '2', '3', '4'] * 2


def test_csv_of_errors(model, images, capfd):
    assert run_predict(model, ['bad.png', 'new\nline.png'], topk=1, csv='-') == 1
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out, newline='')))
    assert len(rows) == 2 and 'bad.png' in rows[0]['error'] and rows[0]['name'] == rows[0]['probability'] == ''
    assert rows[1]['image'] == 'new\nline.png' and rows[1]['error'] == '' and rows[1]['name'] in NAMES


def test_lines(model, images, capfd):
    assert run_predict(model, images) == 1
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith('a, b.png: ') and lines[2].startswith('new\\nline.png: ')
    assert all(line.count(' %') == 4 for line in lines)
    assert not any(c in line for line in lines for c in '\n\x1b')
    assert run_predict(model, images[:1]) == 0


@pytest.mark.parametrize('given, text', [([], '[]'), (['bad.png'], None)])
def test_json_of_no_predictions(model, images, tmp_path, given, text):
    if not given:
        with pytest.raises(ValueError, match="'images' are empty"):
            run_predict(model, given, json='out.json')
        return
    assert run_predict(model, given, json='out.json') == 1
    assert len(strict(Path('out.json').read_text())) == 1


@pytest.mark.skipif(sys.platform == 'win32', reason='file names are bytes elsewhere')
def test_names_that_are_no_unicode(model, images, tmp_path, capfd):
    name = os.fsdecode(b'\xff.png')
    try:
        Path(images[0]).rename(name)
    except OSError:
        pytest.skip('this file system takes no such name')
    assert run_predict(model, [name], json='out.json', csv='-') == 0
    assert strict(Path('out.json').read_text(encoding='utf-8'))[0]['image'] == '\\xff.png'
    assert run_predict(model, [name]) == 0
    assert '\\xff.png' in capfd.readouterr().out


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(json='no/where.json'), "folder of 'no/where.json'"),
        (dict(csv='.'), "'csv' must name a file.*'.'"),
        (dict(json=''), "'json' must name a file"),
        (dict(json='-', csv='-'), "'json' and 'csv' must not both"),
        (dict(json='x', csv='./x'), "'json' and 'csv' must not both"),
        (dict(topk=0), "'topk'"),
        (dict(device='gpu'), "'gpu'"),
    ],
)
def test_wrong_arguments_come_before_the_model(images, monkeypatch, kwargs, message):
    monkeypatch.setattr('timm_bilinear.tools.predict.load', None)
    with pytest.raises((ValueError, OSError), match=message):
        run_predict('nothing', images, **kwargs)


def test_a_file_keeps_what_it_had_until_the_new_one_is_whole(model, images, tmp_path, monkeypatch):
    Path('out.json').write_text('old')
    os.symlink('out.json', 'link.json')

    def cut(*args, **kwargs):
        yield dict(image='x', error='y', predictions=[])
        assert Path('out.json').read_text() == 'old'
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('timm_bilinear.tools.predict.iterate_predictions', cut)
        with pytest.raises(KeyboardInterrupt, match=r"^Stopped: 'out\.json' is as it was\.$") as e:
            run_predict(model, images, json='out.json')
        assert e.value.exit_code == 130
    assert Path('out.json').read_text() == 'old' and not list(tmp_path.glob('.*'))
    assert run_predict(model, images[:1], json='link.json') == 0
    assert Path('link.json').is_symlink() and len(strict(Path('out.json').read_text())) == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk(model, images):
    with pytest.raises(OSError, match=r"Could not write '/dev/full': No space left on device"):
        run_predict(model, images, json='/dev/full')


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_as_a_process(model, images, encoding):
    """In any locale JSON is JSON, and who closes the pipe early gets no traceback."""
    code = (
        'import sys; from timm_bilinear.tools.predict import run_predict;'
        ' sys.exit(run_predict(sys.argv[1], sys.argv[4:] * int(sys.argv[2]), json=sys.argv[3] or None, topk=9))'
    )
    environment = dict(os.environ, PYTHONIOENCODING=encoding, OMP_NUM_THREADS='1', TQDM_DISABLE='')

    def command(times, target):
        return [sys.executable, '-c', code, str(model), str(times), target, *images]

    done = subprocess.run(command(1, '-'), env=environment, capture_output=True)
    assert done.returncode == 1, done.stderr
    names = {p['name'] for p in strict(done.stdout.decode(encoding))[1]['predictions']}
    assert names == set(NAMES)
    process = subprocess.Popen(command(300, ''), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait() == 1 and 'Traceback' not in error and 'Broken' not in error
