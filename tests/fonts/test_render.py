import random
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from faces import demo_fonts
from render import Layout, random_image, random_layout, render_text
from texts import CHARACTERS, KINDS, SPLITS, random_kind, random_text

PLAIN = Layout(x_height=16, fit=False, fill=False, padding=None, anchor=(0.5, 0.5), lines=2, break_chance=1.0)


@pytest.fixture(scope='module')
def faces():
    return {name: choices[0] for name, choices in demo_fonts().items()}


def _words(split):
    texts = [random_text(split, kind, 400, random.Random(f'{kind}{i}')) for kind in KINDS for i in range(60)]
    return {word.strip('.,;:?!()*"').lower() for text in texts for word in text[5:-5].split(' ')[1:-1]}


def test_words_of_splits_are_disjoint():
    train, val = (_words(split) for split in SPLITS)
    # 'the', and prices and percentages, of which there are few, are in both
    shared = {word for word in train & val if word.isalpha() and len(word) > 6}
    assert not shared and min(len(train), len(val)) > 500


@pytest.mark.parametrize('kind', KINDS)
def test_texts(kind):
    texts = [random_text('train', kind, length, random.Random(length)) for length in range(1, 200)]
    assert all(text and text == text.strip() for text in texts)
    if kind in ('prose', 'made-up words', 'capitals'):
        assert all(len(text) <= length for length, text in enumerate(texts, 1) if length > 50)
    assert len(set(texts)) > 190


def test_texts_have_numbers_and_every_character():
    rng = random.Random(0)
    kinds = Counter(random_kind(rng) for _ in range(2000))
    assert set(kinds) == set(KINDS)
    assert sum(kinds[kind] for kind in ('numbers', 'dollars', 'percentages')) >= 2000 / 5
    assert set(CHARACTERS) <= set(''.join(random_text('train', kind, 3000, rng) for kind in KINDS for _ in range(9)))


@pytest.mark.parametrize('split, kind', [('test', 'prose'), ('train', 'poems')])
def test_texts_that_are_not_there(split, kind):
    with pytest.raises(ValueError, match=f"'{split}' and kind '{kind}'"):
        random_text(split, kind, 10, random.Random(0))


def test_layouts_cover_what_images_have():
    layouts = [random_layout(random.Random(i)) for i in range(4000)]
    values = {field.name: [getattr(layout, field.name) for layout in layouts] for field in fields(Layout)}
    for name, low, high in (('x_height', 6, 70), ('pitch', 0.9, 2.0), ('noise', 0, 25.5), ('lines', 1, 12)):
        assert low <= min(values[name]) < low + 0.1 * (high - low) and high * 0.95 < max(values[name]) <= high, name
    contrast = [np.dot(np.subtract(a.ink, a.background), (0.299, 0.587, 0.114)) for a in layouts]
    assert 0.35 < np.mean(np.array(contrast) > 0) < 0.65 and 0.1 < np.mean(np.abs(contrast) < 80) < 0.4
    assert np.abs(contrast).min() >= 30
    for name, value in (('kerning', False), ('fit', False), ('oversampling', 1.0), ('padding', (0.0, 0.0, 0.0))):
        assert 0.1 < sum(v == value for v in values[name]) / len(layouts) < 0.7, name
    assert sum(values['subpixel']) > 20 and sum(q is not None for q in values['jpeg']) > 800
    assert np.std(values['degrees']) > 0.5 and set(values['align']) == {0, 0.5, 1} and len(set(values['kernel'])) == 5


def _baselines(pixels):
    """Rows below which lines of 'HHH' end, in black on white."""
    dark = (pixels < 128).any(1)
    return [row for row, (above, below) in enumerate(pairwise(dark)) if above and not below]


@pytest.mark.parametrize('pitch', [1.0, 1.2, 1.7])
def test_pitch_of_lines_is_not_the_fonts(faces, pitch):
    """The distance of lines is told by the ink alone, whatever ascent and descent a font has."""
    for name, face in faces.items():
        image = render_text(face, 'HHH HHH', replace(PLAIN, pitch=pitch, x_height=12), 112)
        rows = _baselines(np.asarray(image.convert('L')))
        assert len(rows) == 2, name
        assert rows[1] - rows[0] == pytest.approx(pitch * face.line_height * 12 / face.x_height, abs=1.1), name


def test_size_of_letters_is_not_the_fonts(faces):
    for name, face in faces.items():
        image = render_text(face, 'xxx', replace(PLAIN, x_height=40, lines=1), 112)
        rows = np.flatnonzero((np.asarray(image.convert('L')) < 128).any(1))
        assert rows[-1] - rows[0] + 1 == pytest.approx(40, abs=1.6), name


CHANGES = dict(
    x_height=20,
    pitch=1.6,
    by_ink=True,
    wrap=0.3,
    lines=1,
    break_chance=0.0,
    align=1.0,
    kerning=False,
    tracking=0.2,
    oversampling=1.0,
    mono=True,
    kernel='BOX',
    blur=1.0,
    degrees=4.0,
    perspective=0.05,
    fit=True,
    fill=False,
    anchor=(0.1, 0.2),
    margin=1.0,
    padding=(9.0, 9.0, 9.0),
    ink=(0.0, 90.0, 0.0),
    background=(200.0, 255.0, 255.0),
    linear=True,
    gradient=40.0,
    texture=20.0,
    noise=20.0,
    jpeg=30,
)


@pytest.mark.parametrize('name', [field.name for field in fields(Layout)])
def test_every_part_of_a_layout_is_drawn(faces, name):
    base = replace(PLAIN, x_height=11, wrap=0.8, break_chance=0.0, lines=4)
    if name in ('fill', 'margin', 'padding'):
        base = replace(base, fit=True, fill=True)
    if name == 'break_chance':
        base = replace(base, break_chance=1.0)
    changed = dict(subpixel=True) if name == 'subpixel' else {name: CHANGES[name]}
    if name == 'subpixel':
        base = replace(base, oversampling=3.0)
    text = 'AVAT To yon gate 37%, Wy.'
    images = [render_text(faces['open-sans'], text, replace(base, **kwargs), 112) for kwargs in ({}, changed)]
    assert images[0].tobytes() != images[1].tobytes()
    assert all(image.size == (112, 112) and image.mode == 'RGB' for image in images)


def test_subpixels_have_no_colour_on_the_whole(faces):
    """Black text on white: the mean of red, green and blue is one grey, the edges are not."""
    layout = replace(PLAIN, oversampling=3.0, subpixel=True)
    pixels = np.asarray(render_text(faces['inter'], 'Hill mill', layout, 112), dtype=np.float32)
    assert np.ptp(pixels.mean((0, 1))) < 0.5 and np.ptp(pixels, axis=2).max() > 40


def test_a_block_shown_whole_is_whole(faces):
    """Its ink is that of the same text with any other anchor, and beyond its margin there is the padding's colour."""
    ink = []
    for anchor in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        layout = replace(Layout(), fill=False, x_height=9.0, padding=(255.0, 0.0, 0.0), anchor=anchor)
        pixels = np.asarray(render_text(faces['inter'], 'Two lines of it', layout, 112), dtype=np.float32)
        is_padding = (pixels == (255, 0, 0)).all(2)
        ink.append((255 - pixels[~is_padding][:, 0]).sum() / 255)
        corner = {(0.0, 0.0): (-1, -1), (0.5, 0.5): (0, 0), (1.0, 1.0): (0, 0)}[anchor]
        assert is_padding[corner] and not is_padding.all()
    assert ink[0] > 60 and ink == pytest.approx([ink[0]] * 3, rel=0.03)


@pytest.mark.parametrize('size', [96, 224])
def test_images_show_letters(faces, size):
    for i in range(150):
        rng, again = random.Random(i), random.Random(i)
        face = faces[sorted(faces)[i % 12]]
        image = random_image(face, 'train', rng, size)
        assert image.size == (size, size) and image.mode == 'RGB'
        assert np.asarray(image).std((0, 1)).max() > 2, i
        assert image.tobytes() == random_image(face, 'train', again, size).tobytes()
