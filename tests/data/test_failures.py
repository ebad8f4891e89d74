"""What goes wrong in a loader: one sentence with the file and the reason, in a worker as without one."""

import os
import warnings

import pytest
import torch
from image_folders import make_image
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from timm_bilinear.data import ImageError, ImageList, create_loader
from timm_bilinear.data.quiet import PILLOW, ignored
from timm_bilinear.data.samples import Failure, collate

CONFIG = dict(input_size=(3, 24, 24), interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


class _Odd(Exception):
    def __init__(self, first, second):  # torch cannot raise it again in another process
        super().__init__(f'{first}\n{second}')


class _Failing(Dataset):
    """Raises in place of image 2."""

    transform = None

    def __init__(self, error, has_names=True):
        self.error = error
        self.has_names = has_names

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise self.error
        return self.transform(Image.new('RGB', (30, 30))), 0

    def filename(self, index):
        assert self.has_names
        return f'folder/{index}.jpg'


class _FailingStream(_Failing, IterableDataset):
    def __iter__(self):
        for index in range(4):
            yield self[index] if index == 2 else (Image.new('RGB', (30, 30)), 0)


ERRORS = [
    RuntimeError('CUDA\nis gone'),
    OSError(28, 'No space left'),
    ValueError('a value'),
    KeyError('key'),
    AssertionError(),
    EOFError('the end'),
    ConnectionResetError('reset'),
    _Odd('one', 'two'),
    MemoryError('all of it'),
]


@pytest.mark.parametrize('error', ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('kind', [_Failing, _FailingStream])
def test_every_exception_names_file_and_reason(error, kind):
    sentences = []
    for workers in (0, 1):
        with pytest.raises(ImageError) as e:
            list(create_loader(kind(error), CONFIG, 1, workers=workers))
        sentences.append(str(e.value))
    assert sentences[0] == sentences[1] and '\n' not in sentences[0] and 'process' not in sentences[0]
    assert ('folder/2.jpg' if kind is _Failing else 'image 2 ') in sentences[0]
    assert type(error).__name__ in sentences[0] and ' '.join(str(error).split()) in sentences[0]


def test_a_data_set_without_names():
    with pytest.raises(ImageError, match="'image 2': ValueError: x"):
        list(create_loader(_Failing(ValueError('x'), has_names=False), CONFIG, 1, workers=1))


@pytest.mark.parametrize('target', [None, 'ant', (1, 2)])
def test_targets_that_are_no_numbers(target):
    class Labelled(_Failing):
        def __getitem__(self, index):
            return self.transform(Image.new('RGB', (30, 30))), target

    with pytest.raises(ImageError, match=r"'folder/0\.jpg'"):
        list(create_loader(Labelled(None), CONFIG, 2, workers=1))


def test_images_that_make_no_batch():
    batch = collate([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 1, 4), 1)])  # copied, the second would be spread
    assert isinstance(batch, Failure) and '(3, 1, 4), (3, 4, 4)' in batch.message


@pytest.fixture
def dataset(tmp_path):
    return ImageList([make_image(tmp_path / f'{i}.png', i, (40, 30)) for i in range(4)], [0, 1, 0, 1], ['a', 'b'])


@pytest.mark.parametrize(
    'train_aug',
    [
        {'auto_augment': 'foo'},
        {'auto_augment': 'rand-x9'},
        {'auto_augment': 'augmix-x9'},
        {'auto_augment': 5},
        {'interpolation': 'bilinea'},
        {'scale': (0.5,)},
        {'ratio': 'wide'},
        {'hflip': 'often'},
        {'color_jitter': (0.1, 0.2)},
        {'train_crop_mode': 'middle'},
        {'re_prob': 'x'},
    ],
    ids=str,
)
def test_augmentations_that_timm_refuses(dataset, train_aug):
    (name,) = train_aug
    given = {'vflip': 0.5, **train_aug, 'grayscale_prob': 0.1}
    with pytest.raises(ValueError, match=f'training fails for {name}=') as e:
        create_loader(dataset, CONFIG, 2, 0, is_training=True, train_aug=given)
    assert '\n' not in str(e.value) and 'vflip' not in str(e.value)


@pytest.mark.parametrize(
    'name', ['separate', 'naflex', 'patchify', 'use_prefetcher', 'normalize', 'is_training', 'tf_preprocessing', 'foo']
)
def test_augmentations_that_are_none(dataset, name):
    with pytest.raises(TypeError, match=f"'{name}'"):
        create_loader(dataset, CONFIG, 2, 0, is_training=True, train_aug={name: True})


@pytest.mark.parametrize(
    'change', [{'interpolation': 'random'}, {'crop_pct': -1.0}, {'crop_border_pixels': 'x'}], ids=str
)
def test_data_configs_that_timm_refuses(dataset, change):
    (name,) = change
    with pytest.raises(ValueError, match=f'evaluation fails for {name}='):
        create_loader(dataset, {**CONFIG, **change}, 2, 0)
    with pytest.raises(ValueError, match='input_size='):
        create_loader(dataset, {**CONFIG, 'input_size': (3, 0, 24)}, 2, 0)


def test_augmentations_that_work(dataset):
    for channels in (1, 2, 3, 4):
        config = {**CONFIG, 'input_size': (channels, 24, 24)}
        train_aug = {'re_prob': 0.5, 'interpolation': 'random', 'color_jitter': None}
        (images, _), *_ = create_loader(dataset, config, 2, 0, is_training=True, train_aug=train_aug)
        assert images.shape == (2, channels, 24, 24)


def test_raw_warnings(tmp_path, monkeypatch):
    """Neither Pillow's nor torch's reach the user, and the filters are as they were."""
    exif = Image.Exif()
    exif[0x0112] = 6
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 700)  # more than what the transform cuts out has
    Image.new('RGB', (30, 30)).save(tmp_path / 'image.jpg', exif=exif.tobytes()[:-9])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        Image.open(tmp_path / 'image.jpg').getexif()
        assert {w.category for w in seen} >= {Image.DecompressionBombWarning} and len(seen) > 1
        seen.clear()
        before = list(warnings.filters)
        dataset = ImageList([tmp_path / 'image.jpg'] * 32, [0] * 32, ['a'])
        for workers in (0, (os.cpu_count() or 1) + 1):
            loader = create_loader(dataset, CONFIG, 1, workers=workers)
            for _ in zip(range(1), loader):
                pass
        told = [w for w in seen if w.category is not ResourceWarning]  # of what earlier tests left open
        assert not told, [str(w.message) for w in told]
        assert warnings.filters == before


def test_ignored_leaves_other_warnings():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('default')
        for _ in range(3):
            warnings.warn('once', stacklevel=1)  # and not again because of what was ignored meanwhile
            with ignored(module=PILLOW):
                Image.warnings.warn_explicit('a', UserWarning, 'x', 1, module='PIL.Image')
                warnings.warn_explicit('b', UserWarning, 'x', 1, module='elsewhere', registry={})
    assert [str(w.message) for w in seen] == ['once', 'b', 'b', 'b']
