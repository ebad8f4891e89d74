"""The explain command, as a user runs it."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import ONE

from timm_bilinear import predict
from timm_bilinear.cli import main
from timm_bilinear.hub import save_model

NAMES = ['cat', 'dog', 'owl', 'fox', 'emu']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    save_model(timm.create_model('bcnn', **ONE), folder, label_names=NAMES, data_config=dict(input_size=(3, 96, 96)))
    return str(folder)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for i, size in enumerate([(120, 80), (80, 120), (96, 96)]):
        values = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f'{i}.png')
    return folder


def run(*args, code=0):
    if code == 0:
        return main(['explain', *map(str, args)])
    with pytest.raises(SystemExit) as e:
        main(['explain', *map(str, args)])
    return e.value.code


def test_numbers_and_pictures(model, pictures, tmp_path, capsys):
    run(model, pictures, '--output', tmp_path / 'out', '--json', tmp_path / 'told.json')
    told = json.loads((tmp_path / 'told.json').read_text())
    said = predict(model, str(pictures))
    assert [t['image'] for t in told] == [s['image'] for s in said]
    for t, s in zip(told, said):
        target = t['target']
        assert target['name'] == s['predictions'][0]['name'] == NAMES[target['index']]
        assert target['probability'] == pytest.approx(s['predictions'][0]['probability'], abs=0.02)  # there in bfloat16
        assert target['logit'] == pytest.approx(target['bias'] + target['evidence'], abs=1e-4)
        assert np.sum(t['map']) == pytest.approx(target['evidence'], abs=1e-4)
        assert np.shape(t['map']) == (3, 3) and t['contrast'] is None and t['error'] is None
    files = {p.name for p in (tmp_path / 'out').iterdir()}
    assert files == {'0.png', '1.png', '2.png', 'sheet.png', 'explain.json'}
    for name in files - {'explain.json'}:
        with Image.open(tmp_path / 'out' / name) as image:
            assert image.convert('L').getextrema()[0] < 100 and min(image.size) > 200
    assert not capsys.readouterr().out


def test_contrast(model, pictures, tmp_path):
    args = ('--target', 'dog', '--contrast', 3, '--json', tmp_path / 'told.json')
    run(model, pictures / '0.png', '--output', tmp_path / 'out', *args)
    (told,) = json.loads((tmp_path / 'told.json').read_text())
    assert (told['target']['name'], told['contrast']['name']) == ('dog', 'fox')
    assert np.sum(told['map']) == pytest.approx(told['target']['evidence'] - told['contrast']['evidence'], abs=1e-4)
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'0.png', 'explain.json'}

    # what is taken for the other: why not for the second best
    (said,) = predict(model, str(pictures / '0.png'))
    best, second = (p['name'] for p in said['predictions'][:2])
    run(model, pictures / '0.png', '--output', tmp_path / 'out', '--contrast', best, '--json', tmp_path / 'told.json')
    (told,) = json.loads((tmp_path / 'told.json').read_text())
    assert (told['target']['name'], told['contrast']['name']) == (second, best) and np.std(told['map']) > 0


def test_rather_than_the_rest(model, pictures, tmp_path):
    args = ('--target', 'dog', '--contrast', 'rest', '--json', tmp_path / 'told.json')
    run(model, pictures / '0.png', '--output', tmp_path / 'out', *args)
    (told,) = json.loads((tmp_path / 'told.json').read_text())
    dog, rest = told['target'], told['contrast']
    assert (rest['name'], rest['index']) == ('the other classes', None)
    assert rest['probability'] == pytest.approx(1 - dog['probability'], abs=1e-6)
    each = []
    for name in NAMES:
        run(model, pictures / '0.png', '--output', tmp_path / 'out', '--target', name, '--json', tmp_path / 'one.json')
        each += json.loads((tmp_path / 'one.json').read_text())
    for key in ('logit', 'bias', 'evidence'):
        mean = np.mean([t['target'][key] for t in each if t['target']['name'] != 'dog'])
        assert rest[key] == pytest.approx(mean, abs=1e-4)
    assert np.sum(told['map']) == pytest.approx(dog['evidence'] - rest['evidence'], abs=1e-4)


def test_class_called_rest(pictures, tmp_path):
    """A class of the user's own goes before the word."""
    save_model(timm.create_model('bcnn', **ONE), tmp_path / 'model', label_names=['rest', *NAMES[1:]])
    args = ('--target', 'dog', '--contrast', 'rest', '--json', tmp_path / 'told.json')
    run(tmp_path / 'model', pictures / '0.png', '--output', tmp_path / 'out', *args)
    (told,) = json.loads((tmp_path / 'told.json').read_text())
    assert (told['contrast']['name'], told['contrast']['index']) == ('rest', 0)


def test_turned_upright(model, pictures, tmp_path):
    """A photo whose EXIF says how it is to be turned is explained as it is seen."""
    with Image.open(pictures / '0.png') as file:
        image = file.copy()
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees anticlockwise
    turned.save(tmp_path / 'turned.png', exif=exif)
    image.save(tmp_path / 'upright.png')
    run(
        model, tmp_path / 'turned.png', tmp_path / 'upright.png', '--output', tmp_path / 'out', '--json', tmp_path / 'j'
    )
    one, other = json.loads((tmp_path / 'j').read_text())
    assert one['map'] == other['map'] and one['box'] == other['box']


@pytest.mark.parametrize('contrast', [(), ('--contrast', 'rest'), ('--contrast', 'fox')], ids=str)
def test_pairs(model, pictures, tmp_path, contrast):
    run(model, pictures, '--output', tmp_path, '--target', 'owl', '--pairs', 2, *contrast)
    told = json.loads((tmp_path / 'explain.json').read_text())
    assert len(told['pairs']) == 2 and 'pairs.png' in told['files'] and (tmp_path / 'pairs.png').is_file()
    assert told['pairs'][0]['evidence'] >= told['pairs'][1]['evidence'] and len(told['pairs'][0]['images']) == 3


def test_run_again(model, pictures, tmp_path):
    """What an earlier run wrote is replaced; what others wrote is not touched."""
    run(model, pictures, '--output', tmp_path / 'out')
    run(model, pictures / '1.png', '--output', tmp_path / 'out')
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'1.png', 'explain.json'}
    (tmp_path / 'out' / 'mine.txt').write_text('mine')
    assert 'mine.txt' in run(model, pictures, '--output', tmp_path / 'out', code=1)
    assert (tmp_path / 'out' / '1.png').is_file()


def test_images_of_one_name_and_what_is_none(model, pictures, tmp_path, capsys):
    (tmp_path / 'a').mkdir()
    shutil.copy(pictures / '0.png', tmp_path / 'a' / '0.png')
    (tmp_path / 'a' / 'broken.png').write_bytes(b'no image')
    images = [pictures / '0.png', tmp_path / 'a' / '0.png', tmp_path / 'a' / 'broken.png', tmp_path / 'none.png']
    assert run(model, *images, '--output', tmp_path / 'out', code=1) == 1
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'0.png', '0_2.png', 'sheet.png', 'explain.json'}
    err = capsys.readouterr().err
    assert 'broken.png' in err and 'none.png' in err and '2 images have none' in err


@pytest.mark.parametrize(
    'args, message',
    [
        (['--target', 'do'], "'target' names no class of the model: 'do'. Is it one of 'dog'?"),
        (['--target', '5'], "'target' names no class"),
        (['--contrast', 'x'], "'contrast'"),
        (['--target', 'dog', '--contrast', '1'], "'target' and 'contrast' are both 'dog'"),
        (['--pairs', '2'], "'pairs' are of one class"),
        (['--json', '/nowhere/x.json'], '/nowhere/x.json'),
    ],
)
def test_errors(model, pictures, tmp_path, args, message):
    assert message in run(model, pictures, '--output', tmp_path / 'out', *args, code=1)
    assert not (tmp_path / 'out').exists()


def test_model_without_such_a_sum(pictures, tmp_path):
    save_model(timm.create_model('test_vit', num_classes=5), tmp_path / 'model')
    assert 'test_vit' in run(tmp_path / 'model', pictures, '--output', tmp_path / 'out', code=1)


def test_the_class_that_all_views_together_name(tmp_path):
    """The view that is explained may name another; with a random network some of these do."""
    torch.manual_seed(0)
    net = timm.create_model('bcnn', **ONE)
    torch.nn.init.normal_(net.head.fc.weight)
    config = dict(input_size=(3, 96, 96), crop_mode='border', crop_pct=1.0)
    save_model(net, tmp_path / 'model', label_names=NAMES, data_config=config)
    (tmp_path / 'pictures').mkdir()
    for i in range(24):
        values = np.random.default_rng(i).integers(0, 256, (9, 16, 3), dtype=np.uint8)
        Image.fromarray(values).resize((640, 360)).save(tmp_path / 'pictures' / f'{i}.png')
    run(tmp_path / 'model', tmp_path / 'pictures', '--output', tmp_path / 'out', '--json', tmp_path / 'j')
    told = json.loads((tmp_path / 'j').read_text())
    said = predict(str(tmp_path / 'model'), str(tmp_path / 'pictures'), amp='float32')
    assert [t['target']['name'] for t in told] == [s['predictions'][0]['name'] for s in said]
