"""The explain command, as a user runs it."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import ONE, create

from timm_bilinear import predict
from timm_bilinear.cli import main
from timm_bilinear.hub import save_model
from timm_bilinear.tools import explain as explain_tool

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


def test_narrow_image(model, pictures, tmp_path):
    """A side that is less than a pixel in the picture is drawn as one."""
    Image.new('RGB', (800, 1), 'red').save(tmp_path / 'narrow.png')
    Image.new('RGB', (1, 800), 'red').save(tmp_path / 'high.png')
    run(model, tmp_path / 'narrow.png', pictures / '0.png', tmp_path / 'high.png', '--output', tmp_path / 'out')
    files = {p.name for p in (tmp_path / 'out').iterdir()}
    assert files == {'narrow.png', '0.png', 'high.png', 'sheet.png', 'explain.json'}


def test_image_that_cannot_be_drawn(model, pictures, tmp_path, capsys, monkeypatch):
    draw = explain_tool.draw_panels

    def fail(image, *args):
        if image.size == (80, 120):
            raise ValueError('no paint')
        return draw(image, *args)

    monkeypatch.setattr(explain_tool, 'draw_panels', fail)
    assert run(model, pictures, '--output', tmp_path / 'out', '--json', tmp_path / 'j', code=1) == 1
    assert f'{pictures / "1.png"}: no paint' in capsys.readouterr().err
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'0.png', '2.png', 'sheet.png', 'explain.json'}
    assert {t['image']: t['error'] for t in json.loads((tmp_path / 'j').read_text())} == {
        str(pictures / '0.png'): None,
        str(pictures / '1.png'): 'no paint',
        str(pictures / '2.png'): None,
    }


def test_failed_run_knows_its_folder(model, pictures, tmp_path, monkeypatch):
    """What a run that fails late has written is its own, and what one that fails early would replace is kept."""
    with monkeypatch.context() as m:
        m.setattr(explain_tool, 'draw_sheet', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, pictures, '--output', tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'explain.json').read_text())['files'] == ['0.png', '1.png', '2.png']
    run(model, pictures, '--output', tmp_path / 'out')
    save_model(timm.create_model('test_vit', num_classes=5), tmp_path / 'vit')
    assert 'test_vit' in run(tmp_path / 'vit', pictures, '--output', tmp_path / 'out', code=1)
    assert len(list((tmp_path / 'out').iterdir())) == 5


@pytest.mark.parametrize('name, kind', [('bcnn', 'sketch'), ('test_resnet', 'test_resnet')])
def test_pairs_of_other_models(name, kind, pictures, tmp_path):
    net = create(pool_type='sketch', **ONE) if name == 'bcnn' else timm.create_model(name, num_classes=5)
    save_model(net, tmp_path / 'model')
    said = run(tmp_path / 'model', pictures, '--output', tmp_path / 'out', '--target', '0', '--pairs', 2, code=1)
    assert "'avg' and 'sum'" in said and kind in said and not (tmp_path / 'out').exists()


def test_json_in_the_folder(model, pictures, tmp_path):
    for _ in range(2):
        run(model, pictures, '--output', tmp_path, '--json', tmp_path / '0.png')  # a name that a picture would have
        assert len(json.loads((tmp_path / '0.png').read_text())) == 3
    assert {'0_2.png', '1.png', '2.png', 'sheet.png'} < {p.name for p in tmp_path.iterdir()}
    assert 'explain writes itself' in run(
        model, pictures, '--output', tmp_path, '--json', tmp_path / 'explain.json', code=1
    )
    run(model, pictures / '1.png', '--output', tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'1.png', 'explain.json'}


def test_what_is_not_finite(model, pictures, tmp_path, capsys, monkeypatch):
    """Of an image that the model gives no numbers for, here a black one; the others have theirs."""

    def load(*args):
        net = create(**ONE)
        features = net.forward_features
        is_black = lambda x: (x.mean((1, 2, 3)) < -0.9)[:, None, None, None]  # noqa: E731
        net.forward_features = lambda x: torch.where(is_black(x), torch.nan, features(x))
        return net

    monkeypatch.setattr(explain_tool, 'load', load)
    Image.new('RGB', (96, 96)).save(tmp_path / 'black.png')
    args = ('--target', 0, '--pairs', 2, '--json', tmp_path / 'j', '--output', tmp_path / 'out')
    assert run(model, tmp_path / 'black.png', pictures / '0.png', *args, code=1) == 1
    sentence = 'The model gives probabilities that are not finite.'
    assert f'black.png: {sentence}' in capsys.readouterr().err
    errors = {t['image']: t['error'] for t in json.loads((tmp_path / 'j').read_text())}
    assert errors == {str(tmp_path / 'black.png'): sentence, str(pictures / '0.png'): None}
    told = json.loads((tmp_path / 'out' / 'explain.json').read_text())
    assert told['pairs'][0]['images'] == [str(pictures / '0.png')] and np.isfinite(told['pairs'][0]['evidence'])


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
