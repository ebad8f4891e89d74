"""What the page of a model says of a picture, without the page."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import ONE, create

import timm_bilinear
from timm_bilinear.hub import save_model
from timm_bilinear.tools import explain as explain_tool
from timm_bilinear.tools.app import create_app
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
    contrasted = looker.look(picture, said[1]['index'])
    assert contrasted.evidence.width > sight.evidence.width and contrasted.sentence == sight.sentence
    same = looker.look(picture, said[0]['index'])
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


def described(descriptions):
    net = create(**ONE)
    net.pretrained_cfg.update(label_names=['n1', 'n2', 'n3', 'n4', 'n5'], label_descriptions=descriptions)
    return net


def test_classes_of_one_name(folder, monkeypatch):
    """Classes are told by their index, and by their label where people call several the same."""
    looker = Looker(described(['crane', 'crane', 'x', 'y', 'n1']))
    assert looker.names == ['crane (n1)', 'crane (n2)', 'x', 'y', 'n1']
    titles = []
    draw = explain_tool.draw_panels
    monkeypatch.setattr(explain_tool, 'draw_panels', lambda *args: titles.append(args[1]) or draw(*args))
    picture = folder / 'pictures' / 'owl' / '2.png'
    best = looker.names.index(looker.look(picture).sentence.split(',')[0])
    for i in set(range(5)) - {best}:
        sight = looker.look(picture, i)
        assert len(sight.probabilities) == 5 and set(sight.probabilities) == set(looker.names)
        assert titles[-1] == f'What speaks for {looker.names[best]} rather than {looker.names[i]}'


def test_classes_on_the_page(folder):
    pytest.importorskip('gradio')
    page = create_app(Looker(described(['crane', 'crane', 'x', 'y', 'n1'])))
    (dropdown,) = (c for c in page.config['components'] if c['type'] == 'dropdown')
    places = dict(dropdown['props']['choices'])
    assert places == {'': -1, 'crane (n1)': 0, 'crane (n2)': 1, 'x': 2, 'y': 3, 'n1': 4}
    look = next(f.fn for f in page.fns.values() if f.name == 'look')
    picture = str(folder / 'pictures' / 'owl' / '2.png')
    evidence = [look(picture, place)[2] for place in places.values()]
    assert all(image is not None for image in evidence) and len({image.width for image in evidence}) == 2


def test_narrow_picture(folder, tmp_path):
    Image.new('RGB', (800, 1), 'red').save(tmp_path / 'narrow.png')
    assert Looker(folder / 'model').look(tmp_path / 'narrow.png').evidence is not None


def test_what_is_not_finite(folder):
    net = create(**ONE)
    torch.nn.init.constant_(net.head.fc.bias, torch.nan)
    sight = Looker(net).look(folder / 'pictures' / 'owl' / '2.png')
    assert sight.sentence == 'The model gives probabilities that are not finite.'
    assert not sight.probabilities and sight.evidence is None


def test_refused(folder):
    with pytest.raises(ValueError, match='no classifier'):
        Looker(timm.create_model('bcnn', **dict(ONE, num_classes=0)))
    with pytest.raises(ValueError, match='is an index of'):
        Looker(timm.create_model('test_resnet', num_classes=5).eval(), folder / 'index')
