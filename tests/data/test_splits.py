"""Validation images taken from one folder, class maps and timm's named data sets."""

import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from image_folders import make_folder, make_image
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset, create_transform
from torchvision import datasets as torchvision_datasets

from timm_bilinear.data import create_datasets, create_loader, create_split, named

CONFIG = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


def _one_folder(root, counts):
    number = 0
    for name, count in counts.items():
        for i in range(count):
            make_image(root / name / f'{i}.png', number := number + 1)
    return root


def _names(data, split):
    return [data.splits[split].filename(i) for i in range(len(data.splits[split]))]


def test_val_fraction(tmp_path):
    data = create_datasets(_one_folder(tmp_path, {'ant': 20, 'bee': 10, 'cat': 2, 'dog': 1, 'eel': 3}), 0.2)
    train, val = _names(data, 'train'), _names(data, 'val')
    assert not set(train) & set(val) and len(train) + len(val) == 36
    assert [data.splits['val'].targets.count(i) for i in range(5)] == [4, 2, 1, 0, 1]
    assert data.class_names == ['ant', 'bee', 'cat', 'dog', 'eel']
    assert data.warnings == ["'val' has no images of 1 of 5 classes: 'dog'."]
    large = create_datasets(tmp_path, 0.99)
    assert [large.splits['train'].targets.count(i) for i in range(5)] == [1] * 5


def test_val_fraction_depends_on_names_and_seed_alone(tmp_path):
    data = create_datasets(_one_folder(tmp_path / 'a', {'ant': 20, 'bee': 20}), 0.25, seed=1)
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    assert _names(create_datasets(tmp_path / 'b', 0.25, seed=1), 'val') == _names(data, 'val')
    assert _names(create_datasets(tmp_path / 'b', 0.25, seed=2), 'val') != _names(data, 'val')
    make_folder(tmp_path / 'c', ('train',), count=20)
    inside = create_datasets(tmp_path / 'c', 0.25, seed=1)
    assert _names(inside, 'val') == [f'train/{name}' for name in _names(data, 'val')]


@pytest.mark.parametrize('fraction', [0, 1, -0.1, 1.5, float('nan')])
def test_val_fraction_out_of_range(tmp_path, fraction):
    with pytest.raises(ValueError, match='val_fraction'):
        create_datasets(tmp_path / 'nowhere', fraction)


def test_val_fraction_refuses(tmp_path):
    make_folder(tmp_path / 'a')
    with pytest.raises(ValueError, match="'val'"):
        create_datasets(tmp_path / 'a', 0.5)
    with pytest.raises(ValueError, match='two or more images'):
        create_datasets(_one_folder(tmp_path / 'b', {'ant': 1, 'bee': 1}), 0.5)
    with pytest.raises(ValueError, match='two classes'):
        create_datasets(_one_folder(tmp_path / 'c', {'ant': 4}), 0.5)


def test_val_fraction_beside_a_test_split(tmp_path):
    make_folder(_one_folder(tmp_path, {'ant': 4, 'bee': 4}), ('test',))
    assert {k: len(v) for k, v in create_datasets(tmp_path, 0.5).splits.items()} == {'train': 4, 'val': 4, 'test': 4}


def test_a_class_called_train(tmp_path):
    data = create_datasets(_one_folder(tmp_path, {'bus': 2, 'train': 2, 'tram': 2}), 0.5)
    assert data.class_names == ['bus', 'train', 'tram'] and not data.warnings


def test_copies_between_the_parts(tmp_path):
    _one_folder(tmp_path, {'ant': 2, 'bee': 2})
    shutil.copy(tmp_path / 'ant' / '0.png', tmp_path / 'ant' / '1.png')
    assert "1 of 2 images of 'val' are in 'train' too" in create_datasets(tmp_path, 0.5).warnings[0]


@pytest.mark.parametrize('kind', ['txt', 'pkl', 'dict'])
def test_class_map(tmp_path, kind):
    make_folder(tmp_path, classes=('ant', 'bee', 'cat'))
    class_map = {'cat': 0, 'ant': 1}
    if kind == 'txt':
        (tmp_path / 'map.txt').write_text('cat\nant\n\n')
    elif kind == 'pkl':
        (tmp_path / 'map.pkl').write_bytes(pickle.dumps(class_map))
    given = class_map if kind == 'dict' else str(tmp_path / f'map.{kind}')
    data = create_datasets(tmp_path, class_map=given)
    judge = create_dataset('', str(tmp_path), split='train', class_map=given).reader
    samples = dict(zip(map(str, data.splits['train'].paths), data.splits['train'].targets))
    assert samples == dict(judge.samples) and data.class_names == ['cat', 'ant']
    assert any('train/bee' in message for message in data.skipped)
    assert create_split(tmp_path, 'val', class_map=given).splits['val'].targets == [1, 1, 0, 0]


@pytest.mark.parametrize('content', [{'ant': 0, 'bee': 2}, {'ant': 'x'}, [1], {}, b'no pickle', None])
def test_bad_class_map(tmp_path, content):
    make_folder(tmp_path)
    file = tmp_path / 'map.pkl'
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=r'map\.pkl') as e:
        create_datasets(tmp_path, class_map=file)
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match=r'map\.csv'):
        (tmp_path / 'map.csv').touch()
        create_datasets(tmp_path, class_map=tmp_path / 'map.csv')


def test_several_folders_of_one_class(tmp_path):
    make_folder(tmp_path, classes=('ant', 'bee', 'wasp'))
    data = create_datasets(tmp_path, class_map={'ant': 0, 'bee': 1, 'wasp': 1})
    assert data.class_names == ['ant', 'bee, wasp'] and data.splits['val'].targets == [0, 0, 1, 1, 1, 1]


def _cifar10(root):
    """The files of CIFAR-10, much smaller."""
    folder = root / 'cifar-10-batches-py'
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    for name in names:
        batch = {'data': rng.integers(0, 256, (4, 3072), dtype=np.uint8), 'labels': [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))


def test_torchvision(tmp_path, monkeypatch):
    _cifar10(tmp_path)
    monkeypatch.setattr(torchvision_datasets.CIFAR10, '_check_integrity', lambda self: True)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *args: True)
    data = create_datasets('torch/cifar10', root=tmp_path)
    judge = create_dataset('torch/cifar10', str(tmp_path), split='train')
    assert data.class_names == list('abcdefghij')
    assert {k: len(v) for k, v in data.splits.items()} == {'train': 20, 'val': 4}
    assert data.splits['train'].targets == judge.targets
    image, target = data.splits['train'][3]
    assert (np.asarray(image) == np.asarray(judge[3][0])).all() and target == 9
    loader = create_loader(data.splits['val'], {**CONFIG, 'input_size': (1, 16, 16)}, 4, workers=0)
    images, targets = next(iter(loader))
    assert images.shape == (4, 1, 16, 16) and targets.tolist() == [0, 1, 2, 9]
    assert list(create_split('torch/cifar10', 'validation', root=tmp_path).splits) == ['validation']


def test_torchvision_folder_is_opened_as_ours(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(np.full((16, 16), 32896, np.uint16)).save(tmp_path / 'train' / 'ant' / '0.png')
    data = create_datasets('torch/image_folder', root=tmp_path, val_split='val')
    assert data.class_names == ['ant', 'bee'] and data.splits['val'].targets == [0, 0, 1, 1]
    assert data.splits['train'][0][0].getpixel((0, 0)) == (128, 128, 128)


def test_local_folder_wins(tmp_path, monkeypatch):
    make_folder(tmp_path / 'wds' / 'birds')
    monkeypatch.chdir(tmp_path)
    assert len(create_datasets('wds/birds').splits['train']) == 4


@pytest.mark.parametrize(
    'name, root, match',
    [
        ('torch/cifar10', None, 'root'),
        ('torch/cifar10', 'here', 'Cannot open'),
        ('torch/nothing', 'here', 'nothing'),
        ('wds/nothing', None, 'root'),
        ('nothing/cifar10', None, 'does not exist'),
    ],
)
def test_named_data_that_cannot_be_opened(tmp_path, name, root, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as e:
        create_datasets(name, root=root and tmp_path)
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='val_fraction'):
        create_datasets('torch/cifar10', 0.5)


def test_missing_package(monkeypatch, tmp_path):
    def create(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'webdataset'", name='webdataset')

    monkeypatch.setattr(named, 'create_dataset', create)
    with pytest.raises(ValueError, match='webdataset'):
        create_datasets('wds/birds', root=tmp_path)


class _Reader:
    """A reader as timm's for WebDataset and Hugging Face: 16-bit images, by number."""

    class_to_idx = {'ant': 0, 'bee': 1}  # noqa: RUF012

    def __init__(self, folder):
        self.files = [make_image(folder / f'{i}.png', i) for i in range(6)]
        Image.fromarray(np.full((16, 16), 32896, np.uint16)).save(self.files[0])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return open(self.files[index], 'rb'), index % 2

    def __iter__(self):
        for i, file in enumerate(self.files):
            yield Image.open(file), i % 2

    def iter_targets(self):
        return (i % 2 for i in range(6))

    def filename(self, index, **kwargs):
        return self.files[index].name


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_readers_of_timm(tmp_path, monkeypatch, stream, workers):
    def create(name, root, split, **kwargs):
        return (IterableImageDataset if stream else ImageDataset)(root, reader=_Reader(tmp_path))

    monkeypatch.setattr(named, 'create_dataset', create)
    data = create_datasets('wds/birds' if stream else 'hfds/birds', root=tmp_path)
    assert data.class_names == ['ant', 'bee']
    if not stream:
        assert data.splits['train'].targets == [0, 1] * 3 and data.splits['train'].filename(1) == '1.png'
    loader = create_loader(data.splits['val'], CONFIG, 4, workers=min(workers, 0 if stream else 2))
    batches = list(loader)
    assert [len(targets) for _, targets in batches] == [4, 2] == [4, 2][: len(loader)]
    assert torch.allclose(batches[0][0][0], torch.tensor((128 / 255 - 0.5) / 0.5), atol=1e-6)
    if stream:
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        runs = []
        for epoch in (0, 0, 1):
            loader = create_loader(data.splits['train'], CONFIG, 3, workers=workers, is_training=True, seed=5)
            loader.set_epoch(epoch)
            runs.append(torch.cat([images for images, _ in loader]))
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
        assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()


def test_webdataset(tmp_path):
    """Every sample once, whatever read the data before; and the same as timm's own loader."""
    pytest.importorskip('webdataset')
    number, splits = 0, {}
    for split in ('train', 'validation'):
        names = [f'birds-{split}-{shard:04d}.tar' for shard in range(2)]
        for name in names:
            with tarfile.open(tmp_path / name, 'w') as tar:
                for _ in range(6):
                    number += 1
                    image = make_image(tmp_path / f'{number}.png', number)
                    label = tmp_path / f'{number}.cls'
                    label.write_text(str(number % 2))
                    tar.add(image, image.name), tar.add(label, label.name)
        splits[split] = {'name': split, 'num_samples': 12, 'filenames': names, 'shard_lengths': [6, 6]}
    (tmp_path / '_info.json').write_text(json.dumps({'name': 'birds', 'splits': splits}))
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    data = create_datasets('wds/birds', root=tmp_path, class_map=tmp_path / 'names.txt')
    judge = create_dataset('wds/birds', str(tmp_path), split='validation')
    judge.transform = create_transform(**CONFIG)
    expected = sorted((image.tolist(), target) for image, target in judge)
    for workers in (0, 2, 0):
        for _ in range(2):
            loader = create_loader(data.splits['val'], CONFIG, 4, workers=workers)
            assert sorted(s for images, t in loader for s in zip(images.tolist(), t.tolist())) == expected
    assert len(list(create_loader(data.splits['train'], CONFIG, 4, workers=2, is_training=True))) > 0


def test_hugging_face(tmp_path):
    pytest.importorskip('datasets')
    make_folder(tmp_path / 'folder', ('train', 'validation'))
    data = create_datasets(f'hfds/{tmp_path}/folder', root=tmp_path / 'cache')
    assert data.class_names == ['ant', 'bee'] and data.splits['train'].targets == [0, 0, 1, 1]
    loader = create_loader(data.splits['val'], CONFIG, 2, workers=2)
    judge = create_loader(create_split(tmp_path / 'folder', 'val').splits['val'], CONFIG, 2, workers=0)
    assert all(torch.equal(a, b) for x, y in zip(loader, judge, strict=True) for a, b in zip(x, y))


def test_stream_without_class_names(tmp_path, monkeypatch):
    class Nameless(_Reader):
        class_to_idx = {}  # noqa: RUF012

    monkeypatch.setattr(named, 'create_dataset', lambda *a, **k: IterableImageDataset('', reader=Nameless(tmp_path)))
    with pytest.raises(ValueError, match='--class-map'):
        create_datasets('wds/birds', root=tmp_path)
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    assert create_datasets('wds/birds', root=tmp_path, class_map=tmp_path / 'names.txt').class_names == ['ant', 'bee']
