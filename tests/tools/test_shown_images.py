"""Where a network's input lies in an image, found again by a dot that is drawn in the image."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from small_models import ONE, create
from timm.data import create_transform

from timm_bilinear.data.scales import VIEWS, ScaleViews
from timm_bilinear.tools.prediction import Source
from timm_bilinear.tools.shown_images import ImageReader, choose_views, shown_box

SIZES = [(400, 300), (300, 400), (224, 224), (1500, 200), (90, 60), (97, 511), (3000, 2000)]


def find_dot(pixels):
    """Column and row of the middle of what is red in (3, H, W) uint8."""
    red = np.asarray(pixels).astype(float)
    red = np.clip(red[0] - red[1] - 50, 0, None)  # the padding is a little red
    if red.max() < 100 or red[[0, -1]].any() or red[:, [0, -1]].any():  # cut off
        return None
    rows, columns = np.indices(red.shape) + 0.5
    return (columns * red).sum() / red.sum(), (rows * red).sum() / red.sum()


def dotted(size, x, y, radius=0.03):
    image = Image.new('RGB', size, 'white')
    radius *= min(size)
    place = (x * size[0], y * size[1])
    ImageDraw.Draw(image).ellipse([p - radius for p in place] + [p + radius for p in place], fill='red')
    return image


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [1.0, 0.875, 0.5])
def test_a_dot_is_where_the_box_says(size, crop_mode, crop_pct):
    config = dict(input_size=(3, 224, 224), crop_mode=crop_mode, crop_pct=crop_pct, interpolation='bicubic')
    transform = create_transform(**config, is_training=False, normalize=False)
    left, top, right, bottom = shown_box(transform, size)
    seen = 0
    for x in (0.2, 0.4, 0.5, 0.7):
        for y in (0.3, 0.5, 0.6):
            found = find_dot(transform(dotted(size, x, y)))
            column, row = 224 * (x - left) / (right - left), 224 * (y - top) / (bottom - top)
            if found is not None and 12 < column < 212 and 12 < row < 212:
                seen += 1
                # a pixel of the input, or of a small image
                assert abs(found[0] - column) < 1.5 + 112 / size[0] and abs(found[1] - row) < 1.5 + 112 / size[1]
    assert seen


@pytest.mark.parametrize('size', SIZES)
def test_views_at_several_scales(size):
    config = dict(input_size=(3, 64, 64), crop_mode='border', crop_pct=1.0, interpolation='bicubic')
    transform = create_transform(**config, is_training=False, normalize=False)
    views = ScaleViews(transform, (64, 64))
    image = dotted(size, 0.5, 0.5, 3 / min(size))
    boxes = views.boxes(image)
    pixels = views(image).split(64, 1)
    assert len(boxes) == len(pixels) - 1
    seen = 0
    for (left, top, right, bottom), view in zip(boxes, pixels[1:]):
        found = find_dot(view)
        column, row = 64 * (0.5 - left) / (right - left), 64 * (0.5 - top) / (bottom - top)
        if found is not None and 16 < column < 48 and 16 < row < 48:
            seen += 1
            assert abs(found[0] - column) < 1.5 and abs(found[1] - row) < 1.5
    assert seen


def test_reader():
    """Views as `predict` has them, the one that counts most with its place."""
    net = timm.create_model('bcnn', **ONE).eval()
    net.pretrained_cfg.update(crop_mode='border', crop_pct=1.0, input_size=(3, 96, 96))
    shown = ImageReader(net, torch.device('cpu'))(Source('dot', dotted((300, 500), 0.5, 0.5)))
    assert len(shown.views) == len(shown.boxes) == VIEWS == 10 and shown.views.shape[1:] == (3, 96, 96)
    assert shown.boxes[0] == pytest.approx((-1 / 3, 0, 4 / 3, 1), abs=0.01)
    pixels, boxes, probabilities = choose_views(net, [shown])
    assert boxes[0] in shown.boxes and probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert any(torch.equal(pixels[0], view) for view in shown.views)


def test_one_view():
    net = create(**ONE)
    shown = ImageReader(net, torch.device('cpu'))(Source('dot', dotted((300, 500), 0.5, 0.5)))
    assert len(shown.views) == len(shown.boxes) == 1
