"""Where results go: devices, pipes and standard output are written to, or refused, and never replaced; what stops a
command leaves files as they were."""

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
from evaluation_cases import FILES, Nearest, run, write
from PIL import Image

from timm_bilinear import save_model
from timm_bilinear.tools import evaluate as evaluate_module
from timm_bilinear.tools.export import export_onnx
from timm_bilinear.tools.interrupt import Terminated
from timm_bilinear.tools.predict import run_predict

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='needs pipes and signals of POSIX')

CLASSES = ['é', '日本', 'c']
PREDICT = 'import sys; from timm_bilinear.cli import main; main(sys.argv[1:])'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    net = timm.create_model('bcnn', backbone_a='test_resnet', num_classes=3)
    return save_model(net, tmp_path_factory.mktemp('models') / 'm', CLASSES, dict(input_size=(3, 48, 48)))


@pytest.fixture
def image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (60, 50), 'red').save('ü.png')
    return 'ü.png'


def command(*arguments, redirect='', **options):
    environment = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', **options)
    shell = ['sh', '-c', f'exec "$@" {redirect}', 'sh']
    given = [sys.executable, '-c', PREDICT, *map(str, arguments)]
    return subprocess.run([*shell, *given], env=environment, capture_output=True, timeout=200)


@pytest.mark.parametrize(
    'target,form', [('/dev/stdout', 'json'), ('out', 'csv'), ('/dev/fd/3', 'csv'), ('/dev/stderr', 'json')]
)
def test_redirected_output_is_written_to(model, image, target, form):
    """By whatever name it has: it is there before, and has what others write to it."""
    if target.startswith('/') and not os.path.exists('/dev/fd'):
        pytest.skip('no such names here')
    Path('out').write_text('')
    inode = Path('out').stat().st_ino
    number = {'/dev/fd/3': 3, '/dev/stderr': 2}.get(target, 1)
    done = command('predict', model, image, f'--{form}', target, '--topk', '9', redirect=f'{number}>out')
    assert done.returncode == 0, done.stderr
    assert Path('out').stat().st_ino == inode and sorted(os.listdir()) == ['out', 'ü.png']
    text = Path('out').read_text(encoding='utf-8')
    if number == 2:
        text = text[text.index('image' if form == 'csv' else '[') :]
    text = text[text.index('image,error') :] if form == 'csv' else text
    rows = list(csv.DictReader(io.StringIO(text))) if form == 'csv' else json.loads(text)[0]['predictions']
    assert {row['name'] for row in rows} == set(CLASSES)


def test_both_to_standard_output(model, image, capfd):
    with pytest.raises(ValueError, match="'json' and 'csv' must not both"):
        run_predict(model, [image], json='-', csv='/dev/stdout')


def test_standard_output_in_ascii(model, image):
    done = command('predict', model, image, '--csv', '-', '--topk', '9', PYTHONIOENCODING='ascii')
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode('ascii'))))
    assert {row['name'] for row in rows} == {r'\xe9', r'\u65e5\u672c', 'c'} and rows[0]['image'] == r'\xfc.png'


@pytest.mark.parametrize('options', [(), ('--json', '-'), ('--csv', '-')])
def test_closed_standard_output(model, image, options):
    done = command('predict', model, image, *options, redirect='>&-')
    assert done.returncode == 1 and done.stderr.count(b'\n') == 1
    assert b'Standard output is closed' in done.stderr


def test_closed_streams_are_not_missed(model, image, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', None)
        patch.setattr(sys, 'stderr', None)
        assert run_predict(model, [image, 'gone'], json='out.json') == 1
    assert len(json.loads(Path('out.json').read_text())) == 2 and capfd.readouterr().out == ''


# --- what is no file


def make_pipe(path):
    os.mkfifo(path)


def make_link_to_a_pipe(path):
    os.mkfifo(path.with_name('pipe'))
    path.symlink_to(path.with_name('pipe'))


@pytest.mark.parametrize('make', [make_pipe, make_link_to_a_pipe])
def test_export_replaces_files_alone(tmp_path, make):
    path = tmp_path / 'm.onnx'
    make(path)
    with pytest.raises(ValueError, match=r"'file' must be a file, '.*m\.onnx' is a device, a pipe or a socket"):
        export_onnx('nothing is loaded', path)
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize('name', ['-', 'm', '', 'm.onnx.txt', '.', '/dev/stdout'])
def test_export_wants_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, IsADirectoryError), match="'file' must"):
        export_onnx('nothing is loaded', name)
    assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError, match="'file' must be the name of a file, got None"):
        export_onnx('nothing is loaded', None)


# --- what stops


@pytest.mark.parametrize('signal_error,code', [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_stopped_evaluation_says_what_is_kept(tmp_path, monkeypatch, signal_error, code):
    data = write(tmp_path / 'data')
    run(Nearest(), data, output=tmp_path / 'out')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}

    def stop(*args, **kwargs):
        raise signal_error

    monkeypatch.setattr(evaluate_module, 'predict_logits', stop)
    for name in ('out', 'new'):
        with pytest.raises(KeyboardInterrupt, match=rf"^Stopped: '.*{name}' is as it was\.$") as e:
            run(Nearest(), data, output=tmp_path / name)
        assert e.value.exit_code == code
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()} == before
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    'files,said', [({}, r'Stopped\.'), (dict(json='a', csv='b'), r"Stopped: 'a' and 'b' are as they were\.")]
)
def test_a_stopped_prediction_says_what_is_kept(model, image, monkeypatch, files, said):
    def stop(*args, **kwargs):
        yield dict(image='x', error='y', predictions=[])
        raise Terminated

    monkeypatch.setattr('timm_bilinear.tools.predict.iterate_predictions', stop)
    with pytest.raises(KeyboardInterrupt, match=f'^{said}$') as e:
        run_predict(model, [image], **files)
    assert e.value.exit_code == 143 and os.listdir() == [image]


def test_what_a_killed_process_leaves_goes_with_the_next(tmp_path, model, image):
    data = write(tmp_path / 'data')
    code = (
        'import os, signal; from timm_bilinear.tools import predict, evaluate, evaluation_files;'
        'from evaluation_cases import Nearest\n'
        'def die(*args, **kwargs):\n'
        '    os.kill(os.getpid(), signal.SIGKILL)\n'
        'def killed(function, **kwargs):\n'
        '    if os.fork():\n'
        '        return os.wait()\n'
        '    function(**kwargs)\n'
        'def dying_generator(*args, **kwargs):\n'
        '    yield die()\n'
        'predict.iterate_predictions, evaluation_files.draw_worst = dying_generator, die\n'
        f'killed(predict.run_predict, model={str(model)!r}, images=[{image!r}], json="o.json", device="cpu")\n'
        f'killed(evaluate.evaluate, model=Nearest(), data={str(data)!r}, output="out", workers=0, progress=False)\n'
    )
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent))
    subprocess.run([sys.executable, '-c', code], env=environment, check=True, timeout=200)
    assert len([*tmp_path.glob('.o.json.*'), *tmp_path.glob('out/.evaluate.*')]) == 2
    assert run_predict(model, [image], json='o.json') == 0
    run(Nearest(), data, output='out')
    assert sorted(os.listdir('out')) == FILES and sorted(os.listdir()) == ['data', 'o.json', 'out', 'ü.png']
