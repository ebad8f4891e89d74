"""Pictures: that they show what they were given, whatever it is called, and in colours that differ for everyone."""

import math
import time

import numpy as np
import pytest
from PIL import Image

from timm_bilinear.tools.lettering import class_label, clean_text, find_font, fit_text
from timm_bilinear.tools.pictures import (
    RIGHT,
    WRONG,
    ConfusedPair,
    Tile,
    draw_confused_pairs,
    draw_confusion_matrix,
    draw_curves,
    draw_sheet,
)

# What class folders and files may be called: scripts, bytes that are no text, and what breaks lines or layouts.
NAMES = [
    '001.Black_footed_Albatross',
    'Ærø Łódź žluťoučký',
    'Берёза',
    '北海道の鳥',
    'مرحبا',
    '🦜',
    'two\nlines\tand tabs',
    'caf\udce9',
    '',
    ' ',
    'x' * 400,
    '\u202ereversed',
    'a\x00b',
    'e\u0301' * 3,
]


def matrix(classes, images=30, errors=0.2):
    rng = np.random.default_rng(classes)
    shares = np.full((classes, classes), errors / classes) + (1 - errors) * np.eye(classes)
    return np.stack([rng.multinomial(images, row / row.sum()) for row in shares])


def colours(image, fraction=0.0):
    """Colours by their number of pixels."""
    return {colour: n for n, colour in image.getcolors(1 << 24) if n >= fraction * image.width * image.height}


def rows(epochs=12, **changes):
    history = [
        dict(
            epoch=i,
            stage=1 + (i >= 5),
            train_loss=3 * 0.8**i,
            train_top1=100 - 90 * 0.8**i,
            eval_loss=3 * 0.85**i,
            eval_top1=95 - 90 * 0.85**i,
            lr=0.1,
        )
        for i in range(epochs)
    ]
    for row in history:
        row.update(changes)
    return history


def test_curves_show_both_lines():
    image = draw_curves(rows())
    assert (image.mode, image.size) == ('RGB', (1200, 460))
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        for half in (image.crop((0, 65, 600, 400)), image.crop((600, 65, 1200, 400))):
            assert colours(half).get(colour, 0) > 100


@pytest.mark.parametrize(
    'history',
    [
        [],
        rows(1),
        rows(2),
        rows(3000),
        rows(eval_loss=math.nan),
        rows(train_loss=math.inf, eval_top1=None),
        rows(train_loss=1e30, eval_loss=-1e30),
        rows(eval_top1=0.0, train_top1=100.0),
        rows(stage=None),
        [dict(epoch='0', train_loss='2.5', eval_top1='', eval_loss='nan')],
        [{}],
        [dict(epoch=7), dict(epoch=7)],
    ],
    ids=['none', 'one', 'two', 'many', 'nan', 'inf', 'huge', 'flat', 'no stage', 'text', 'empty row', 'same epoch'],
)
def test_curves_of_anything(history):
    assert draw_curves(history).size == (1200, 460)
    assert len(colours(draw_curves(history))) > 2


def test_curves_leave_gaps():
    """A line is not drawn across an epoch that has no number."""
    whole, broken = rows(), rows()
    broken[6]['train_loss'] = math.nan
    columns = [np.asarray(draw_curves(h).crop((0, 65, 600, 400))) for h in (whole, broken)]
    blue = [(c == (0, 0x72, 0xB2)).all(2).any(0) for c in columns]
    assert blue[1].sum() < blue[0].sum() - 40


def test_curves_mark_the_best():
    history = rows()
    history[3]['eval_top1'] = history[8]['eval_top1'] = 99.0
    history[3]['eval_loss'], history[8]['eval_loss'] = 2.0, 1.0  # equal accuracy: lower loss
    assert draw_curves(history) == draw_curves(history, best=8) != draw_curves(history, best=3)


@pytest.mark.parametrize('classes', [1, 2, 3, 10, 40, 200, 201, 378, 1000])
def test_matrix_is_darkest_where_images_are(classes):
    counts = np.zeros((classes, classes), int)
    counts[np.arange(classes), (np.arange(classes) + 1) % classes] = 7  # all wrong, in one direction
    counts[0] = 0
    names = [f'class {i}' for i in range(classes)]
    image = draw_confusion_matrix(counts, names)
    assert max(image.size) < 3000
    dark = (8, 40, 100)
    cell = max(12, min(64, 800 // classes)) if classes <= 200 else 2000 // classes
    count = colours(image).get(dark, 0)
    # without the grid, the numbers in the cells, and with what the scale has of it
    assert 0.4 * (classes - 1) * cell**2 <= count <= (classes - 1) * cell**2 + 200


def test_matrix_merges_classes_that_no_picture_could_show():
    start = time.perf_counter()
    image = draw_confusion_matrix(np.eye(5000, dtype=int), [''] * 5000)
    assert max(image.size) < 3000 and time.perf_counter() - start < 60


def test_matrix_rows_are_the_true_classes():
    image = np.asarray(draw_confusion_matrix(np.array([[5, 5], [0, 10]]), ['a', 'b']))
    ys, xs = np.nonzero((image == (8, 40, 100)).all(2)[:, :-140])  # the scale is at the right
    y, x = ys.min() + 4, xs.min() + 4  # a corner of the one full cell, beside its number
    left, above, diagonal = image[y, x - 64], image[y - 64, x], image[y - 64, x - 64]
    assert left.tolist() == [255, 255, 255] and above.tolist() == diagonal.tolist() != left.tolist()


def test_matrix_counts_are_written():
    few, many = (colours(draw_confusion_matrix(np.eye(2, dtype=int) * n, ['a', 'b'])) for n in (1, 123456))
    assert many[(255, 255, 255)] != few[(255, 255, 255)]


def test_matrix_of_any_names():
    draw_confusion_matrix(matrix(len(NAMES)), NAMES)


@pytest.mark.parametrize('counts, names', [(np.zeros((0, 0)), []), (np.eye(2), ['a']), (np.eye(2)[:1], ['a', 'b'])])
def test_matrix_refuses(counts, names):
    with pytest.raises(ValueError, match='confusion matrix'):
        draw_confusion_matrix(counts, names)


@pytest.mark.parametrize('size', [(1, 1), (7, 900), (900, 7), (224, 224), (2000, 1500)])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P', '1'])
def test_sheet_of_any_image(size, mode):
    sheet = draw_sheet([Tile(Image.new(mode, size, 1), [('text', 'black')])], 'title')
    assert sheet.mode == 'RGB' and len(colours(sheet)) > 3


def test_sheet_shows_each_image_in_its_place():
    palette = [(200, 30 * i, 255 - 20 * i) for i in range(8)]
    tiles = [Tile(Image.new('RGB', (40, 40), colour), [('x', 'black')], WRONG) for colour in palette]
    sheet = np.asarray(draw_sheet(tiles, 'title', columns=3))
    centres = [np.argwhere((sheet == colour).all(2)).mean(0) for colour in palette]
    order = sorted(range(8), key=lambda i: (round(centres[i][0]), round(centres[i][1])))
    assert order == list(range(8))
    assert len({round(c[0]) for c in centres}) == 3 and len({round(c[1]) for c in centres}) == 3


def test_sheet_of_nothing_and_without_pictures():
    assert draw_sheet([], 'none').size[0] > 1000
    assert draw_sheet([Tile(None, [(name, 'black') for name in NAMES])], '\n').size[1] > 300
    assert draw_confused_pairs([], 'none').mode == 'RGB'


def test_pairs_show_their_sides():
    red, blue = (Tile(Image.new('RGB', (40, 40), c), [('x', 'black')], RIGHT) for c in ('#ff0000', '#0000ff'))
    pair = ConfusedPair(('a', 'b'), (2, 1), (9, 8), ([red] * 3, [blue] * 2))
    sheet = np.asarray(draw_confused_pairs([pair, pair], 'title'))
    reds, blues = (np.argwhere((sheet == c).all(2)) for c in ((255, 0, 0), (0, 0, 255)))
    assert reds[:, 1].max() < sheet.shape[1] / 2 < blues[:, 1].min()
    assert len(reds) == 6 * 224**2 and len(blues) == 4 * 224**2


def test_names_are_one_drawable_line():
    for i, name in enumerate(NAMES):
        text = class_label(name, i)
        assert text and '\n' not in text and '\0' not in text
        text.encode()
        assert find_font(text, 14).getlength(fit_text(text, find_font(text, 14), 100)) <= 100
    assert class_label('Robin', 3) == 'Robin'
    assert class_label('', 3) == class_label('\ue000', 3) == 'class 3'  # of private use: no font has it
    assert clean_text('a\nb') == 'a b'


def test_shortened_names_keep_both_ends():
    font = find_font('x', 14)
    text = fit_text('open-sans-latin-400-italic', font, 120)
    assert text.startswith('open') and text.endswith('lic') and '...' in text
    assert fit_text('short', font, 120) == 'short'
    assert fit_text('abc', font, 0) == '...'


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.array(linear)


def test_right_and_wrong_differ_for_every_vision():
    """Viénot, Brettel and Mollon's (1999) simulation of the two dichromacies with red and green."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for simulation in (np.eye(3), protan, deutan):
        seen = [np.linalg.inv(to_lms) @ simulation @ to_lms @ luminance(colour) for colour in (RIGHT, WRONG)]
        assert np.abs(seen[0] - seen[1]).max() > 0.3
    for colour in (RIGHT, WRONG):  # as text on white, WCAG's contrast of 4.5
        assert 1.05 / (luminance(colour) @ (0.2126, 0.7152, 0.0722) + 0.05) >= 4.5


@pytest.mark.parametrize('size', [(800, 1), (1, 800)])
def test_narrow_image_on_a_sheet(size):
    sheet = np.asarray(draw_sheet([Tile(Image.new('RGB', size, 'red'))], 'narrow'))
    assert (sheet == (255, 0, 0)).all(2).sum() == 224
