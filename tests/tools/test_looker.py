"""What the page of a model says of a picture, without the page."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import ONE

import timm_bilinear
from timm_bilinear.hub import save_model
from timm_bilinear.tools.looker import Looker

NAMES = ['cat', 'dog', 'owl', 'fox', 'emu']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('looker')
    config = dict(input_size=(3, 96, 96))
    save_model(timm.create_model('bcnn', **ONE), folder / 'model', label_names=NAMES, data_config=config)
    (folder / 'pictures' / 'owl').mkdir(parents=True)
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((120, 90)).save(folder / 'pictures' / 'owl' / f'{i}.png')
    timm_bilinear.index_images(folder / 'model', folder / 'pictures', folder / 'index', dim=64)
    return folder


def test_picture(folder):
    looker = Looker(folder / 'model', folder / 'index')
    picture = folder / 'pictures' / 'owl' / '2.png'
    sight = looker.look(picture)
    said = timm_bilinear.predict(str(folder / 'model'), str(picture), amp='float32')[0]['predictions']
    assert list(sight.probabilities) == [p['name'] for p in said]
    assert list(sight.probabilities.values()) == pytest.approx([p['probability'] for p in said], abs=1e-5)
    assert sight.sentence == f'{said[0]["name"]}, {100 * said[0]["probability"]:.1f} %.'
    assert sight.evidence.width > 600
    assert sight.found[0][1] == 'owl, 1.000' and len(sight.found) == 4
    contrasted = looker.look(picture, said[1]['name'])
    assert contrasted.evidence.width > sight.evidence.width and contrasted.sentence == sight.sentence
    same = looker.look(picture, said[0]['name'])
    assert 'to be compared with' in same.sentence and same.evidence.width == sight.evidence.width


def test_no_picture(folder, tmp_path):
    looker = Looker(folder / 'model')
    assert looker.look(None).sentence == 'Drop a picture.'
    (tmp_path / 'text.png').write_text('no picture')
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'huge.png')  # 400 megapixels
    wrong = (('text.png', 'no image format'), ('huge.png', 'exceeds limit'), ('none.png', 'does not exist'))
    for name, sentence in wrong:
        sight = looker.look(tmp_path / name)
        assert sentence in sight.sentence and not sight.probabilities and sight.evidence is None
        assert '\n' not in sight.sentence and str(tmp_path) not in sight.sentence


def test_found_pictures_that_were_moved(folder, tmp_path):
    looker = Looker(folder / 'model', folder / 'index')
    looker.folder = tmp_path
    assert looker.look(folder / 'pictures' / 'owl' / '2.png').found == []


def test_model_without_evidence(folder):
    looker = Looker(timm.create_model('test_vit', num_classes=5).eval())
    sight = looker.look(folder / 'pictures' / 'owl' / '2.png')
    assert 'no feature map' in sight.sentence and sight.evidence is None and len(sight.probabilities) == 5


def test_refused(folder):
    with pytest.raises(ValueError, match='no classifier'):
        Looker(timm.create_model('bcnn', **dict(ONE, num_classes=0)))
    with pytest.raises(ValueError, match='is an index of'):
        Looker(timm.create_model('test_resnet', num_classes=5).eval(), folder / 'index')
