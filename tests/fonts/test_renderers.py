"""The renderers that tests are drawn by, and what is measured on their images."""

import random
import shutil
from itertools import pairwise

import chromium
import numpy as np
import pango
import publish
import pytest
import retrieval
from faces import demo_fonts
from folder import render_folder
from PIL import Image
from protocol import KINDS, draw_protocol, prose
from report import Report

WHITE_ON = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope='module')
def fonts():
    """Two static fonts."""
    return {name: demo_fonts()[name][:1] for name in ('anton', 'lobster')}


@pytest.fixture(scope='module')
def corpus():
    return prose()


def test_prose(corpus):
    assert len(corpus) > 50_000 and corpus.isascii() and '  ' not in corpus
    assert sum(c.isalpha() for c in corpus) > 0.75 * len(corpus)


@pytest.mark.parametrize('kind', sorted(set(KINDS)))
def test_protocol(fonts, corpus, kind):
    image = draw_protocol(fonts['anton'][0], kind, corpus, random.Random(kind))
    assert image.height == 224 and image.mode == 'RGB' and image.width > 100


def test_protocol_has_noise_contrast_and_pitch(fonts, corpus):
    """Distance of lines of capitals is 1.2 times the ink of 'Ay', at 224 px of the whole height."""
    face, text = fonts['anton'][0], 'EEEE EEEE EEEE EEEE EEEE'
    rng = random.Random(4)
    image = draw_protocol(face, 'sentence', (text + ' ') * 40, rng, noise=0.0)
    grey = np.asarray(image, dtype=np.float32) @ WHITE_ON
    assert np.ptp(grey) >= 79
    background = grey[0, 0]
    rows = (np.abs(grey - background) > 0.5 * np.abs(grey - background).max()).any(1)
    bottoms = [i for i, (a, b) in enumerate(pairwise(rows)) if a and not b]
    _, top, _, bottom = face.at(1024, kerning=False).getbbox('Ay')
    unit = bottom - top
    lines = len(bottoms)
    scale = 224 / (1.2 * unit * lines + 256)
    assert lines >= 2 and np.diff(bottoms) == pytest.approx(1.2 * unit * scale, abs=1.1)
    noisy = draw_protocol(face, 'sentence', (text + ' ') * 40, random.Random(4))
    difference = np.asarray(noisy, dtype=np.float32) - np.asarray(image, dtype=np.float32)
    middle = (np.asarray(image) > 90) & (np.asarray(image) < 165)  # where nothing is clipped
    assert difference[middle].std() == pytest.approx(25.5, rel=0.1) if middle.any() else difference.std() > 10


def test_folder_is_drawn_by_both(fonts, tmp_path):
    render_folder(tmp_path / 'images', fonts, dict(train=2, val=1, test=3), size=48, workers=1)
    files = {str(p.relative_to(tmp_path / 'images')): p for p in (tmp_path / 'images').rglob('*.png')}
    assert len(files) == 12 and all(KINDS.count(p.stem.split('_')[0]) for n, p in files.items() if n[:4] == 'test')
    assert {Image.open(p).size for n, p in files.items() if n[:4] != 'test'} == {(48, 48)}
    before = {name: path.stat().st_mtime for name, path in files.items()}
    files['val/anton/00000.png'].unlink()
    render_folder(tmp_path / 'images', fonts, dict(train=2, val=1, test=3), size=48, workers=1)
    after = {name: path.stat().st_mtime for name, path in files.items()}
    assert [name for name in files if before[name] != after[name]] == ['val/anton/00000.png']
    with pytest.raises(ValueError, match='other arguments or fonts'):
        render_folder(tmp_path / 'images', fonts, dict(train=2, val=1, test=4), size=48)
    with pytest.raises(ValueError, match="'size' must be at least 1"):
        render_folder(tmp_path / 'other', fonts, dict(train=2), size=0)
    (tmp_path / 'full' / 'x').mkdir(parents=True)
    with pytest.raises(ValueError, match='not a folder of rendered fonts'):
        render_folder(tmp_path / 'full', fonts, dict(train=2))


def _check(draw, fonts, folder):
    """Text is on every image, and in the font that it should be in: with another font the same text looks different."""
    drawn = []
    for name, faces in fonts.items():
        draw({'font': faces}, folder / name)
        paths = sorted((folder / name / 'test' / 'font').iterdir())
        images = [np.asarray(Image.open(path).convert('L')) for path in paths]
        assert len(images) == 3
        assert all(np.ptp(pixels) > 60 and min(pixels.shape) > 10 for pixels in images)
        drawn.append([(path.name, pixels.tobytes()) for path, pixels in zip(paths, images)])
    for (name, pixels), (other_name, other_pixels) in zip(*drawn):
        assert name == other_name and pixels != other_pixels


@pytest.mark.skipif(not any(map(shutil.which, chromium._BROWSERS)), reason='there is no Chromium')
@pytest.mark.parametrize('scale', [1, 2])
def test_chromium(fonts, tmp_path, scale):
    _check(lambda fonts, folder: chromium.draw_pages(fonts, folder, 3, scale), fonts, tmp_path)


@pytest.mark.skipif(not all(map(shutil.which, pango._PROGRAMS)), reason='there is no pango-view or woff2_decompress')
def test_pango(fonts, tmp_path):
    _check(lambda fonts, folder: pango.draw_blocks(fonts, folder, 3), fonts, tmp_path)


@pytest.mark.parametrize('script', [chromium, pango])
def test_programs_that_are_not_there(script, fonts, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    draw = chromium.draw_pages if script is chromium else pango.draw_blocks
    with pytest.raises(RuntimeError, match=r'There is no .*install'):
        draw(fonts, tmp_path / 'images', 1)
    assert not (tmp_path / 'images').exists()


def test_unseen_families_are_unseen():
    from build import FAMILIES

    assert len(set(retrieval.FAMILIES)) >= 40 and not set(retrieval.FAMILIES) & set(FAMILIES)


def test_the_card_tells_retrieval():
    scores = {'recall@1': 49.44, 'MAP@R': 7.0}
    sizes = dict(renderers=['a', 'b'], queries=1006, gallery=2000, scores=scores)
    text = publish.describe_retrieval([dict(sizes, what='font', labels=503), dict(sizes, what='family', labels=50)])
    assert '1,006 queries' in text and '2,000 images' in text and '50 families' in text
    assert '| right is an image of | recall@1 | MAP@R |\n| --- | --- | --- |\n' in text
    assert '| the same font of 503 | 49.4 % | 7.0 % |\n| the same family of 50 | 49.4 % | 7.0 % |' in text


def test_the_card_tells_targets():
    def report(top1, family_top1):
        return Report(100, 10, 5, top1, 99.9, family_top1, 1.0, 1000, {}, [])

    text = publish.describe_targets({'protocol': report(93.9, 98.7), 'chromium': report(90.5, 97.8)})
    assert '- protocol, 97 % of fonts and 99 % of families: fonts missed by 3.1 points, families missed by 0.3' in text
    assert '- chromium, 90 % of fonts and 97 % of families: met' in text
    assert publish.describe_targets({'others': report(1.0, 1.0)}) == ''
