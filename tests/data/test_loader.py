"""Batches: timm's own transforms, the same whatever reads them, and one sentence when something breaks."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from image_folders import make_folder, make_image
from PIL import Image
from timm.data import create_transform
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset

from timm_bilinear.data import ImageError, ImageList, create_datasets, create_loader, default_workers, open_image
from timm_bilinear.data.loader import draft_size

CONFIG = dict(
    input_size=(3, 24, 24),
    interpolation='bicubic',
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
    crop_mode='center',
)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    paths = [make_image(root / f'{i}.png', i, (40 + i, 50 - i)) for i in range(11)]
    return ImageList(paths, [i % 3 for i in range(11)], ['a', 'b', 'c'], root)


def _epoch(dataset, epoch=0, **kwargs):
    settings = {'batch_size': 4, 'workers': 0, 'is_training': True, **kwargs}
    loader = create_loader(dataset, CONFIG, **settings)
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def _same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'crop_mode': 'border'},
        {'crop_mode': 'squash'},
        {'crop_pct': 1.0},
        {'interpolation': 'nearest'},
        {'mean': (0.5, 0.4, 0.3), 'std': (0.1, 0.2, 0.3)},
        {'input_size': (3, 20, 28)},
        {'input_size': (1, 24, 24), 'mean': (0.5,), 'std': (0.5,)},
        {'input_size': (1, 24, 24), 'mean': (0.5,), 'std': (0.5,), 'crop_mode': 'border'},
        {'input_size': (2, 24, 24), 'mean': (0.5, 0.4), 'std': (0.5, 0.6)},
        {'input_size': (4, 24, 24), 'mean': (0.5,) * 4, 'std': (0.5,) * 4, 'crop_mode': 'border'},
        {'crop_border_pixels': 3},
    ],
    ids=str,
)
@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_is_timms_transform(dataset, change, workers):
    """Bit for bit, and every key of the data config has its say."""
    config = {**CONFIG, **change}
    transform = create_transform(**config)
    mode = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}[config['input_size'][0]]
    judge = torch.stack([transform(open_image(path, mode)) for path in dataset.paths])
    batches = list(create_loader(dataset, config, 4, workers=workers))
    assert torch.equal(torch.cat([images for images, _ in batches]), judge)
    assert torch.cat([targets for _, targets in batches]).tolist() == dataset.targets
    assert [len(targets) for _, targets in batches] == [4, 4, 3]
    for images, targets in batches:
        assert images.is_contiguous(memory_format=torch.channels_last) and targets.dtype == torch.int64
    if change:
        other = torch.cat([images for images, _ in create_loader(dataset, CONFIG, 4, workers=0)])
        assert judge.shape != other.shape or not torch.equal(judge, other)


def test_figures_for_other_channels(dataset):
    images, _ = next(iter(create_loader(dataset, {**CONFIG, 'input_size': (1, 24, 24)}, 2, workers=0)))
    config = {**CONFIG, 'mean': (0.449,), 'std': (0.226,), 'input_size': (1, 24, 24)}
    assert torch.allclose(images, next(iter(create_loader(dataset, config, 2, workers=0)))[0], atol=1e-6)


@pytest.mark.parametrize('train_aug', [None, {'re_prob': 1.0, 're_mode': 'pixel', 'auto_augment': 'rand-m9-mstd0.5'}])
def test_training_repeats(dataset, train_aug):
    """Whatever the workers, whatever ran before, and in any epoch."""
    expected = _epoch(dataset, 3, train_aug=train_aug)
    assert [len(targets) for _, targets in expected] == [4, 4]
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    for workers in (0, 1, 3):
        assert _same(_epoch(dataset, 3, train_aug=train_aug, workers=workers), expected)
    loader = create_loader(dataset, CONFIG, 4, workers=0, is_training=True, train_aug=train_aug)
    for epoch in (2, 3):
        loader.set_epoch(epoch)
        batches = list(loader)
    assert _same(batches, expected)
    for different in (_epoch(dataset, 4, train_aug=train_aug), _epoch(dataset, 3, train_aug=train_aug, seed=1)):
        assert not torch.equal(different[0][0], expected[0][0])


@pytest.mark.parametrize('world_size', [2, 4])
def test_ranks_see_together_what_one_sees(dataset, world_size):
    for is_training in (True, False):
        expected = _epoch(dataset, 1, is_training=is_training)
        ranks = [_epoch(dataset, 1, is_training=is_training, rank=r, world_size=world_size) for r in range(world_size)]
        if is_training:
            together = [tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)]
            assert _same(together, expected)
        else:
            together = torch.cat([images for batches in ranks for images, _ in batches])
            assert torch.equal(together, torch.cat([images for images, _ in expected]))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('is_training', [True, False])
def test_random_states_of_the_caller(dataset, workers, is_training):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    _epoch(dataset, is_training=is_training, workers=workers)
    assert state() == before


def test_order_is_random_and_whole(dataset):
    numbers = ImageList(dataset.paths, range(11), list('abcdefghijk'))
    epochs = [torch.cat([t for _, t in _epoch(numbers, e, batch_size=11)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3


def test_a_small_set_is_one_batch(dataset):
    assert [len(targets) for _, targets in _epoch(dataset, batch_size=32)] == [11]


def test_train_size_and_augmentation(dataset):
    train_aug = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'hflip': 0.0, 'color_jitter': None}
    images, _ = _epoch(dataset, train_size=16, train_aug=train_aug)[0]
    assert images.shape == (4, 3, 16, 16)
    upside_down, _ = _epoch(dataset, train_size=16, train_aug={**train_aug, 'vflip': 1.0})[0]
    assert torch.equal(upside_down, images.flip(2))


def test_the_data_set_is_left_alone(dataset):
    loaders = [create_loader(dataset, CONFIG, 4, 0, is_training=t) for t in (True, False)]
    assert dataset.transform is None and dataset.min_size is None
    assert loaders[0].dataset.min_size > loaders[1].dataset.min_size == 83  # 3 x 24 / 0.875, rounded up


@pytest.mark.parametrize(
    'settings, is_training, expected',
    [
        ({'crop_pct': 1.0}, False, 300),
        ({'crop_pct': 0.5}, False, 600),
        ({'crop_pct': None}, False, 343),
        ({'crop_pct': 1.0, 'crop_border_pixels': 2}, False, None),
        ({'scale': (0.25, 1.0)}, True, 400),
        ({}, True, 708),
        ({'no_aug': True}, True, 200),
        ({'train_crop_mode': 'rkrc'}, True, 224),
    ],
)
def test_smallest_draft(settings, is_training, expected):
    assert draft_size({'input_size': (3, 60, 100), **settings}, is_training) == expected


@pytest.mark.parametrize('size', [(800, 600), (600, 800), (793, 601), (801, 602), (800, 601), (788, 600), (1023, 767)])
@pytest.mark.parametrize('change', [{}, {'crop_mode': 'border'}, {'crop_mode': 'squash', 'crop_pct': 1.0}], ids=str)
def test_drafts_hardly_change_what_the_model_sees(tmp_path, size, change):
    """On noise with the spectrum of photographs; 8-bit steps of the 24 x 24 image."""
    config, (width, height), rng = {**CONFIG, **change}, size, np.random.default_rng(0)
    spectrum = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])[..., None]
    distance[0, 0] = 1
    pixels = np.fft.irfft2(spectrum / distance, (height, width), axes=(0, 1))
    pixels = (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.jpg', quality=90)
    dataset = ImageList([tmp_path / 'photo.jpg'], [0], ['a'])
    ((images, _),) = create_loader(dataset, config, 1, workers=0)
    whole = create_transform(**config)(open_image(tmp_path / 'photo.jpg'))
    steps = (images[0] - whole).abs() * torch.tensor(CONFIG['std']).view(3, 1, 1) * 255
    assert steps.mean() < 1 and steps.max() < 6
    smallest = draft_size(config)
    factor = max(f for f in (1, 2, 4, 8) if (width % f == height % f == 0 and min(size) // f >= smallest) or f == 1)
    assert open_image(tmp_path / 'photo.jpg', min_size=smallest).size == (width // factor, height // factor)
    assert (steps.max() == 0) == (factor == 1)


def test_models_with_more_channels(dataset):
    with pytest.raises(ValueError, match='1 to 4 channels, the model wants 5'):
        create_loader(dataset, {**CONFIG, 'input_size': (5, 24, 24)}, 4)


@pytest.mark.parametrize(
    'error, match, kwargs',
    [
        (ValueError, 'batch size 0', {'batch_size': 0}),
        (ValueError, 'process 2 of 2', {'rank': 2, 'world_size': 2}),
        (ValueError, 'cannot be shared by 3', {'world_size': 3}),
        (TypeError, 'scales', {'train_aug': {'scales': (0.5, 1.0)}}),
    ],
)
def test_arguments(dataset, error, match, kwargs):
    with pytest.raises(error, match=match):
        create_loader(dataset, CONFIG, **{'batch_size': 4, 'is_training': True, **kwargs})


def test_data_config_with_more_keys(dataset):
    with pytest.raises(TypeError, match='crop_size'):
        create_loader(dataset, {**CONFIG, 'crop_size': 3}, 4)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_prefetching(dataset, device, tmp_path):
    """timm's prefetcher, as on a GPU; without one, the same code on the CPU."""
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    broken = tmp_path / 'broken.png'
    broken.write_text('no image')
    expected = list(create_loader(dataset, CONFIG, 4, workers=0))
    for paths in (dataset.paths, [*dataset.paths[:-1], broken]):
        loader = create_loader(ImageList(paths, dataset.targets, 'abc'), CONFIG, 4, 2, torch.device(device))
        if device == 'cpu':
            options = dict(mean=CONFIG['mean'], std=CONFIG['std'], device=torch.device('cpu'))
            loader._prefetcher = PrefetchLoader(loader.batches, **options)
        if broken in paths:
            with pytest.raises(ImageError, match=r'broken\.png'):
                list(loader)
            continue
        for (images, targets), (judge, judge_targets) in zip(loader, expected, strict=True):
            assert images.device.type == device and images.is_contiguous(memory_format=torch.channels_last)
            assert torch.allclose(images.cpu(), judge, atol=1e-5) and torch.equal(targets.cpu(), judge_targets)


@pytest.mark.parametrize('workers', [0, 2])
def test_image_that_breaks_while_training(tmp_path, workers):
    splits = create_datasets(make_folder(tmp_path, count=5)).splits
    (tmp_path / 'train' / 'bee' / '3.png').write_text('no image')
    with pytest.raises(ImageError, match=r'train/bee/3\.png') as e:
        _epoch(splits['train'], batch_size=2, workers=workers)
    assert '\n' not in str(e.value)


class _Deadly(Dataset):
    """Its image 5 takes the worker along."""

    transform = None

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.transform(Image.new('RGB', (30, 30))), 0

    def filename(self, index):
        return f'image{index}.jpg'


def test_worker_that_dies():
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(RuntimeError, match=r'A loader process died at .*image5\.jpg') as e:
        list(create_loader(_Deadly(), CONFIG, 1, workers=2))
    assert '\n' not in str(e.value)
    assert signal.getsignal(signal.SIGCHLD) == handler


class _Told(Dataset):
    """Gives what a worker is like instead of an image."""

    transform = None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((3, 1, 1), torch.get_num_threads(), dtype=torch.uint8), signal.getsignal(signal.SIGINT) == 1


def test_workers_are_modest():
    config = {**CONFIG, 'mean': (0.0,) * 3, 'std': (1 / 255,) * 3}
    for images, ignores in create_loader(_Told(), config, 1, workers=2):
        assert images.round().unique().tolist() == [1] and ignores.item()
    assert 1 <= default_workers() <= 4 and default_workers(world_size=1000) == 1


def test_as_timms_own_pipeline(tmp_path):
    """One batch of timm's loader on the same files, in evaluation."""
    from timm.data import create_dataset
    from timm.data import create_loader as create_timm_loader

    make_folder(tmp_path, count=3)
    judge = create_timm_loader(
        create_dataset('', str(tmp_path), split='val'), batch_size=6, num_workers=0, use_prefetcher=False, **CONFIG
    )
    assert isinstance(judge, DataLoader)
    ours = create_loader(create_datasets(tmp_path).splits['val'], CONFIG, 6, workers=0)
    assert _same(list(ours), list(judge))
