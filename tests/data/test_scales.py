import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_bilinear.data.scales import VIEWS, ScaleViews
from timm_bilinear.tools.inference import batch_logits, resolve_tta
from timm_bilinear.tools.predict import predict


def _views(size=(32, 32), crop_pct=1.0, mode='border', **kwargs):
    transform = create_transform((3, *size), crop_pct=crop_pct, crop_mode=mode, normalize=False, **kwargs)
    return transform, ScaleViews(transform, size, crop_pct)


def _noise(width, height, mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, 'RGBA').convert(mode)


@pytest.mark.parametrize('width, height', [(1, 1), (12, 300), (300, 12), (32, 32), (20, 60), (500, 333), (1000, 40)])
@pytest.mark.parametrize('crop_pct, mode', [(1.0, 'border'), (0.875, 'center'), (1.0, 'squash')])
def test_every_image_has_as_many_views(width, height, crop_pct, mode):
    transform, views = _views(crop_pct=crop_pct, mode=mode)
    image = _noise(width, height)
    stacked = views(image)
    assert stacked.shape == (3, VIEWS * 32, 32) and stacked.dtype == torch.uint8
    assert torch.equal(stacked[:, :32], transform(image))


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA'])
def test_images_of_every_mode(mode):
    mean = (0.5,) * len(mode)
    _, views = _views(mean=mean, std=mean)
    assert views(_noise(90, 50, mode)).shape == (len(mode), VIEWS * 32, 32)


def test_scales_go_from_the_whole_image_to_twice_its_own():
    """A checkerboard of 8 px: its period in each view is 16 px times the scale."""
    width, height = 512, 256
    rows, columns = np.mgrid[:height, :width] // 8
    image = Image.fromarray((255 * ((rows + columns) % 2)).astype(np.uint8)).convert('RGB')
    _, views = _views((64, 64))
    whole = 64 / 512
    for i, view in enumerate(views(image).split(64, 1)[2::2]):
        scale = whole * (2 / whole) ** ((i + 1) / 4)
        spectrum = np.abs(np.fft.rfft(view[0, 32].double().numpy() - 127.5))
        assert np.argmax(spectrum) == pytest.approx(64 / (16 * scale), abs=1)


def test_a_large_image_is_never_enlarged_whole():
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try:
        image = Image.new('RGB', (9000, 7000), 'white')
        assert _views()[1](image).shape == (3, VIEWS * 32, 32)
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize('place', [(10, 20), (600, 350), (50, 400), (700, 10)])
def test_parts_are_where_the_detail_is(place):
    """A page with one word on it: the finest views show the word."""
    image = Image.new('RGB', (800, 500), (200, 220, 240))
    image.paste(_noise(40, 24), place)
    _, views = _views((64, 64))
    for view in views(image).split(64, 1)[4::2]:  # the better part of the three finest scales
        assert view.float().std() > 20
    last = views(image).split(64, 1)[-2].float()
    assert (last - torch.tensor([200.0, 220.0, 240.0]).view(3, 1, 1)).abs().amax(0).gt(30).float().mean() > 0.3


def test_beyond_the_image_is_its_margin():
    image = Image.new('RGB', (200, 10), (10, 200, 30))
    image.paste(_noise(20, 6), (90, 2))
    _, views = _views((64, 64))
    for view in views(image).split(64, 1)[1:3]:
        assert view[:, 0, 0].tolist() == [10, 200, 30] and view[:, -1, -1].tolist() == [10, 200, 30]


def test_second_view_is_the_whole_image_at_half_its_size():
    image = Image.new('RGB', (80, 40), 'white')
    image.paste('black', (0, 0, 40, 40))
    _, views = _views((64, 64))
    half = np.full((64, 64), 255)
    half[24:40, 16:32] = 0  # 32 x 16 px in the middle of the window, its left half black
    view = views(image).split(64, 1)[1].numpy()
    ringing = np.abs(np.arange(64) - 31.5) < 3  # of the filter at the edge
    assert (view[:, :, ~ringing] == half[:, ~ringing]).all()


class _Mean(torch.nn.Module):
    """Two classes, by the brightness of the image; as timm has a model."""

    num_classes = 2

    def __init__(self, crop_mode):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))
        config = dict(input_size=(3, 32, 32), crop_mode=crop_mode, crop_pct=1.0, interpolation='bicubic')
        self.pretrained_cfg = dict(config, mean=(0.5,) * 3, std=(0.5,) * 3, label_names=('dark', 'light'))

    def forward(self, x):
        brightness = self.scale * x.mean((1, 2, 3))
        return torch.stack([-brightness, brightness], 1)


def test_predictions_are_the_mean_of_views_by_their_certainty():
    model = _Mean('border').eval()
    image = _noise(150, 70)
    image.paste((255, 255, 255), (0, 0, 60, 70))
    config = resolve_model_data_config(model)
    views = ScaleViews(create_transform(**config), (32, 32))(image).split(32, 1)
    assert len(views) == VIEWS
    with torch.inference_mode():
        each = [model(view[None])[0].softmax(0) for view in views]
    each = torch.stack(each)
    weights = torch.exp(2 * (each * each.log()).sum(1))  # exp(-2 H)
    assert weights.max() > 1.2 * weights.min()
    expected = (weights[:, None] * each).sum(0) / weights.sum()
    for kwargs in ({}, dict(tta='auto'), dict(tta='scales')):
        (result,) = predict(model, image, workers=0, amp='float32', **kwargs)
        said = {p['name']: p['probability'] for p in result['predictions']}
        assert said['light'] == pytest.approx(expected[1].item(), abs=2e-3)
    (alone,) = predict(model, image, workers=0, amp='float32', tta='none')
    assert {p['name']: p['probability'] for p in alone['predictions']}['light'] == pytest.approx(
        each[0][1].item(), abs=2e-3
    )


def test_auto():
    assert resolve_tta(_Mean('border'), 'auto') == 'scales' and resolve_tta(_Mean('center'), 'auto') is None
    assert resolve_tta(_Mean('border'), 'none') is None and resolve_tta(_Mean('center'), 'flip') == 'flip'
    assert resolve_tta(timm.create_model('test_resnet'), 'auto') is None


def test_auto_means_the_same_to_images_and_logits():
    """Views that lie one below another are never taken for one high image."""
    model = _Mean('border').eval()
    stacked = ScaleViews(create_transform(**resolve_model_data_config(model)), (32, 32))(_noise(150, 70))[None]
    assert torch.equal(batch_logits(model, stacked, tta='auto'), batch_logits(model, stacked, tta='scales'))
    assert not torch.equal(batch_logits(model, stacked, tta='none'), batch_logits(model, stacked, tta='scales'))
