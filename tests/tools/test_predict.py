import gc
import os
import threading
import tracemalloc
from io import BytesIO

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from timm_bilinear.data.images import open_image
from timm_bilinear.models.image_modes import IMG_MODES
from timm_bilinear.tools import prediction as module
from timm_bilinear.tools.predict import predict
from timm_bilinear.tools.prediction import find_sources

NAMES = ['a, b', 'c\nd', 'é', '日本', 'x']
FAST = dict(workers=0, amp='float32')


def create(num_classes=5, label_names=None, name='bcnn', data_config=None, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(dict(backbone_a='test_resnet') if name == 'bcnn' else {}, **kwargs)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    if num_classes:
        nn.init.normal_(model.get_classifier().weight, std=2.0)
    chans = kwargs.get('in_chans', 3)
    config = dict(dict(input_size=(chans, 64, 64)), label_names=label_names, **(data_config or {}))
    model.pretrained_cfg = dict(model.pretrained_cfg, **config)
    return model


def picture(width, height, seed=0, mode='RGB'):
    """Smooth, as photographs are."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Five images of different sizes and formats, one that is broken, one file that is no image."""
    folder = tmp_path_factory.mktemp('photos') / 'größe 1'
    folder.mkdir()
    for i, (size, ending) in enumerate(
        [((100, 80), 'png'), ((300, 400), 'jpg'), ((50, 50), 'webp'), ((7, 90), 'bmp'), ((64, 64), 'gif')]
    ):
        picture(*size, seed=i).save(folder / f'{i} ü.{ending}')
    (folder / '9 broken.jpg').write_bytes((folder / '1 ü.jpg').read_bytes()[:500])
    (folder / 'notes.txt').write_text('mine')
    return folder


def judged(model, image, topk=5):
    """Indices and probabilities by timm's own transform and one image at a time."""
    config = resolve_input_data_config(model)
    mode = IMG_MODES[config['input_size'][0]]
    x = create_transform(**config, is_training=False)(open_image(image, mode))[None]
    with torch.no_grad():
        return x, model(x).softmax(-1)[0].topk(min(topk, model.num_classes))


def assert_as_judged(model, result, image, tolerance=1e-5):
    _, (values, indices) = judged(model, image)
    assert result['error'] is None
    assert [p['index'] for p in result['predictions']] == indices.tolist()
    assert [p['probability'] for p in result['predictions']] == pytest.approx(values.tolist(), abs=tolerance)


@pytest.mark.parametrize('workers', [0, 1, 3])
@pytest.mark.parametrize('batch_size', [1, 2, 32])
def test_folder(photos, workers, batch_size):
    model = create(label_names=NAMES)
    results = predict(model, photos, batch_size=batch_size, workers=workers, amp='float32')
    paths = sorted(p for p in photos.iterdir() if p.suffix != '.txt')
    assert [r['image'] for r in results] == [str(p) for p in paths]
    for path, result in zip(paths[:-1], results):
        assert_as_judged(model, result, path, 1e-5 if path.suffix != '.jpg' else 0.01)
        assert all(p['name'] == NAMES[p['index']] for p in result['predictions'])
    assert '9 broken.jpg' in results[-1]['error'] and '\n' not in results[-1]['error']
    assert results[-1]['predictions'] == []


@pytest.mark.parametrize(
    'config',
    [
        dict(),
        dict(crop_pct=0.8, interpolation='bilinear'),
        dict(input_size=(3, 48, 96), crop_pct=0.9),
        dict(crop_mode='squash', input_size=(3, 96, 64)),
        dict(crop_mode='border', mean=(0.9, 0.5, 0.1)),
        dict(in_chans=1, crop_mode='border', mean=(0.4,), std=(0.3,)),
        dict(in_chans=1),
        dict(in_chans=2),
        dict(in_chans=4, crop_pct=0.7),
    ],
    ids=str,
)
def test_the_model_sees_what_timm_would_show_it(photos, config):
    """Bit by bit, for images that are not decoded at a reduced size."""
    config = dict(config)
    chans = config.pop('in_chans', 3)
    model = create(in_chans=chans, data_config=dict(dict(input_size=(chans, 64, 64)), **config))
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    paths = [p for p in sorted(photos.iterdir()) if p.suffix in ('.png', '.webp', '.bmp', '.gif')]
    transparent = Image.new('RGBA', (80, 70), (200, 30, 60, 90))
    predict(model, [*paths, transparent], **FAST)
    expected = torch.cat([judged(model, image)[0] for image in [*paths, transparent]])
    assert seen[0].shape == (5, *resolve_input_data_config(model)['input_size'])
    assert torch.equal(seen[0], expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_large_jpegs_are_reduced_while_decoding(tmp_path, monkeypatch):
    picture(1600, 1200).save(tmp_path / 'large.jpg', quality=95)
    model = create(data_config=dict(crop_pct=0.875))
    sizes = []
    monkeypatch.setattr(module, 'open_image', lambda *args, **kw: sizes.append(kw) or open_image(*args, **kw))
    (result,) = predict(model, tmp_path, **FAST)
    assert open_image(tmp_path / 'large.jpg', **sizes[0]).size == (400, 300)  # of 73 x 3 at least
    assert_as_judged(model, result, tmp_path / 'large.jpg', 0.02)


def test_order_duplicates_and_globs(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '[1].png').write_bytes((photos / '0 ü.png').read_bytes())  # a name, though it looks like a pattern
    os.symlink(photos, tmp_path / 'photos')
    given = ['[1].png', 'photos/*.webp', 'photos/0 ü.png', '[1].png', 'nothing*.png', 'gone.png', tmp_path / '[1].png']
    results = predict(create(), given, **FAST)
    names = ['[1].png', 'photos/2 ü.webp', 'photos/0 ü.png', '[1].png', 'nothing*.png', 'gone.png']
    assert [r['image'] for r in results] == [*names, str(tmp_path / '[1].png')]
    assert results[4]['error'] == "Nothing matches 'nothing*.png'."
    assert "'gone.png'" in results[5]['error']
    same = [results[i]['predictions'] for i in (0, 2, 3, 6)]
    assert all([p['index'] for p in s] == [p['index'] for p in same[0]] for s in same)


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.txt').write_text('text')
    os.symlink('nowhere', tmp_path / 'link.png')
    given = ['empty', 'text.txt', 'link.png', '', 'a\0b', 'x' * 5000, '*.txt']
    results = predict(create(), given, **FAST)
    assert len(results) == len(given)
    for name, result in zip(given, results):
        assert result['image'] == name and result['predictions'] == [] and '\n' not in result['error']
        assert name[:20].replace('\0', '') in result['error'].replace('\0', '') or '\0' in name
    assert predict(create(), []) == []


def test_images_in_memory(photos):
    model = create()
    path = photos / '0 ü.png'
    image = picture(90, 60)
    data = path.read_bytes()
    with path.open('rb') as file:
        file.read()  # read before, and given twice
        given = [image, Image.open(path), file, file, BytesIO(data), image, BytesIO(b'no'), path.open()]
        results = predict(model, given, workers=3, amp='float32')
        names = ['image 0', str(path), str(path), str(path), 'image 4', 'image 5', 'image 6', str(path)]
        assert [r['image'] for r in results] == names
    for i in (1, 2, 3, 4):
        assert_as_judged(model, results[i], path)
    for i in (0, 5):
        assert_as_judged(model, results[i], image)
    assert results[6]['error'] and 'text mode' in results[7]['error']
    for single in (image, BytesIO(data), str(path), path):
        assert len(predict(model, single, **FAST)) == 1


def test_one_image_for_many_threads(photos):
    """Images that are given many times are read by one thread at a time."""
    model = create()
    with Image.open(photos / '1 ü.jpg') as image:
        results = predict(model, [image] * 40, workers=8, batch_size=16, amp='float32')
    assert {r['error'] for r in results} == {None}
    assert len({tuple(p['index'] for p in r['predictions']) for r in results}) == 1


@pytest.mark.parametrize('image', [3, b'abc', None, np.zeros((4, 4, 3)), {}, torch.zeros(3, 4, 4)])
def test_what_is_no_image(image):
    with pytest.raises(TypeError, match=f'got {type(image).__name__}|got float|got ndarray|got Tensor'):
        predict(create(), [image])


def test_topk():
    image = picture(64, 64)
    (result,) = predict(create(), image, topk=100, **FAST)
    assert sorted(p['index'] for p in result['predictions']) == [0, 1, 2, 3, 4]
    assert sum(p['probability'] for p in result['predictions']) == pytest.approx(1, abs=1e-5)
    (result,) = predict(create(), image, topk=1, **FAST)
    assert len(result['predictions']) == 1
    model = create()
    for parameter in model.get_classifier().parameters():
        nn.init.zeros_(parameter)  # equal probabilities: in the order of the classes
    (result,) = predict(model, image, topk=3, **FAST)
    assert [p['index'] for p in result['predictions']] == [0, 1, 2]


@pytest.mark.parametrize(
    'kwargs, error, message',
    [
        (dict(topk=0), ValueError, "'topk' must be at least 1, got 0"),
        (dict(topk=1.5), TypeError, "'topk'"),
        (dict(topk=True), TypeError, "'topk'"),
        (dict(batch_size=0), ValueError, "'batch_size'"),
        (dict(workers=-1), ValueError, "'workers'"),
        (dict(workers='2'), TypeError, "'workers'"),
        (dict(amp='half'), ValueError, "'amp'"),
        (dict(tta='ten'), ValueError, "'tta'"),
        (dict(device='gpu'), ValueError, "'gpu'"),
        (dict(label_names=['a']), ValueError, "'label_names'"),
    ],
)
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        predict(create(), picture(9, 9), **kwargs)


def test_other_numbers_of_classes():
    image = picture(64, 64)
    (result,) = predict(create(1, ['only']), image, **FAST)
    assert result['predictions'] == [dict(name='only', index=0, probability=1.0)]
    with pytest.raises(ValueError, match='no classifier'):
        predict(create(0), image)
    with pytest.raises(ValueError, match=r'1 to 4 channels, the model wants 5'):
        predict(create(in_chans=5), image)
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # not timm's: ImageNet's preprocessing
    (result,) = predict(plain, image, **FAST)
    assert {p['name'] for p in result['predictions']} == {'0', '1', '2'}
    with pytest.raises(ValueError, match='no logits'):
        predict(nn.AdaptiveAvgPool2d(1), image, **FAST)


def test_not_finite():
    """Of one image only: the others keep theirs."""

    class Odd(nn.Module):
        num_classes = 2

        def forward(self, x):
            logits = torch.tensor([[1.0, 2.0]]).repeat(len(x), 1)
            logits[1] = float('nan')
            return logits

    results = predict(Odd(), [picture(9, 9)] * 3, **FAST)
    assert [bool(r['error']) for r in results] == [False, True, False]
    assert 'finite' in results[1]['error'] and results[1]['predictions'] == []
    assert results[2]['predictions'][0]['index'] == 1


def test_a_users_module_is_left_as_it_was():
    model = create().train()
    model.stream_a.eval()
    before = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.pretrained_cfg
    (result,) = predict(model, picture(64, 64), label_names=NAMES, **FAST)
    assert result['predictions'][0]['name'] in NAMES and model.pretrained_cfg is config
    assert [m.training for m in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('tta', ['flip', 'crops'])
def test_views(tta):
    model = create()
    image = picture(120, 90)
    (result,) = predict(model, image, tta=tta, **FAST)
    if tta == 'flip':
        x, _ = judged(model, image)
        with torch.no_grad():
            mean = (model(x).softmax(-1)[0] + model(x.flip(-1)).softmax(-1)[0]) / 2
        found = {p['index']: p['probability'] for p in result['predictions']}
        assert [found[i] for i in range(5)] == pytest.approx(mean.tolist(), abs=1e-5)
    (plain,) = predict(model, image, **FAST)
    assert plain['predictions'] != result['predictions']
    assert sum(p['probability'] for p in result['predictions']) == pytest.approx(1, abs=1e-5)


def test_bounded_memory():
    """A stream of images of any length: only what is being computed is in memory."""
    model = create()
    alive, most = [0], [0]

    class Counted(Image.Image):
        def __del__(self):
            alive[0] -= 1

    def stream():
        for _ in range(200):
            image = Counted()
            image.__dict__.update(picture(32, 32).__dict__)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield image

    tracemalloc.start()
    results = predict(model, stream(), batch_size=4, workers=2, amp='float32')
    tracemalloc.stop()
    gc.collect()
    assert len(results) == 200 and not any(r['error'] for r in results)
    assert most[0] <= 30


def test_errors_of_the_model_end_the_threads():
    class Broken(nn.Module):
        num_classes = 2

        def forward(self, x):
            raise RuntimeError('broken')

    with pytest.raises(RuntimeError, match='broken'):
        predict(Broken(), [picture(300, 300)] * 50, workers=4, batch_size=2)
    for thread in threading.enumerate():
        if thread.name.startswith('decode'):
            thread.join(10)
            assert not thread.is_alive()


def test_out_of_memory():
    class Large(nn.Module):
        num_classes = 2

        def forward(self, x):
            raise torch.OutOfMemoryError('out of memory\nmuch more text')

    with pytest.raises(RuntimeError, match=r"^Out of memory at 'batch_size' 7: give a smaller one\.$"):
        predict(Large(), picture(9, 9), batch_size=7)


def test_sources_are_found_one_by_one():
    def endless():
        while True:
            yield picture(9, 9)

    found = find_sources(endless())
    assert [next(found).name for _ in range(3)] == ['image 0', 'image 1', 'image 2']
