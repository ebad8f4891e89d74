"""Streams: the length is the number of steps that come, and an epoch is the same whatever ran before."""

import json
import logging
import tarfile

import pytest
import torch
from image_folders import make_image
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import IterableDataset, get_worker_info

from timm_bilinear.data import create_datasets, create_loader, named

CONFIG = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


class _Shards:
    """A reader whose workers have shards of their own, of different lengths; its images are their numbers."""

    class_to_idx = {'ant': 0, 'bee': 1}  # noqa: RUF012

    def __init__(self, shards, said=None):
        self.shards = shards
        self.said = sum(shards) if said is None else said
        self.num_workers = 1

    def set_loader_cfg(self, num_workers=None):
        self.num_workers = max(num_workers, 1)

    def __len__(self):  # as timm's readers, rounded
        return self.said // self.num_workers * self.num_workers

    def __iter__(self):
        info, number = get_worker_info(), 0
        for shard, count in enumerate(self.shards):
            for _ in range(count):
                if info is None or shard % info.num_workers == info.id:
                    yield Image.new('RGB', (16, 16), (number,) * 3), number % 2
                number += 1


def _splits(monkeypatch, shards, said=None):
    def create(*args, **kwargs):
        return IterableImageDataset('', reader=_Shards(shards, said))

    monkeypatch.setattr(named, 'create_dataset', create)
    return create_datasets('wds/numbers', root='here').splits


def _numbers(batches):
    return [int(image[0, 0, 0] * 255 + 0.5) for images, _ in batches for image in images]


@pytest.mark.parametrize('shards', [(5, 1, 7), (13,), (1, 1, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize('workers', [0, 1, 2, 3])
@pytest.mark.parametrize('batch_size', [1, 4, 32])
def test_length_is_the_number_of_steps(monkeypatch, caplog, shards, workers, batch_size):
    splits, count = _splits(monkeypatch, shards), sum(shards)
    loader = create_loader(splits['val'], CONFIG, batch_size, workers)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-count // batch_size)
    assert sorted(_numbers(batches)) == list(range(count))
    assert all(len(targets) == batch_size for _, targets in batches[:-1])
    assert all((images[:, 0, 0, 0] * 255).round().remainder(2).equal(targets.float()) for images, targets in batches)
    augmentation = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'color_jitter': None}
    loader = create_loader(splits['train'], CONFIG, batch_size, workers, is_training=True, train_aug=augmentation)
    batches = list(loader)
    size = min(batch_size, count)
    assert [len(targets) for _, targets in batches] == [size] * (count // size) and len(loader) == len(batches)
    assert len(set(_numbers(batches))) == size * (count // size)
    assert not caplog.records


@pytest.mark.parametrize('said', [9, 15])
def test_streams_that_miscount(monkeypatch, caplog, said):
    splits = _splits(monkeypatch, (5, 1, 7), said)
    loader = create_loader(splits['train'], CONFIG, 4, 2, is_training=True)
    assert len(list(loader)) == len(loader) == said // 4
    with caplog.at_level(logging.WARNING):
        assert len(_numbers(create_loader(splits['val'], CONFIG, 4, 2))) == 13
    assert f'has {said} images, and gave 13' in caplog.text


def test_processes_take_the_same_number_of_steps(monkeypatch):
    for is_training in (True, False):
        for said in (9, 13):
            dataset = _splits(monkeypatch, (5, 1, 7), said)['val']
            loader = create_loader(dataset, CONFIG, 8, 2, is_training=is_training, rank=1, world_size=2)
            assert len(list(loader)) == len(loader)


def test_streams_without_images(monkeypatch):
    with pytest.raises(ValueError, match='gives no images'):
        list(create_loader(_splits(monkeypatch, (), 3)['train'], CONFIG, 2, 0, is_training=True))

    class Endless(IterableDataset):
        transform = None

        def __iter__(self):
            yield Image.new('RGB', (16, 16)), 0

    with pytest.raises(ValueError, match='how many images'):
        create_loader(Endless(), CONFIG, 2, 0)


def _write_shards(folder, counts):
    number, names = 0, []
    for shard, count in enumerate(counts):
        names.append(f'birds-train-{shard:04d}.tar')
        with tarfile.open(folder / names[-1], 'w') as tar:
            for _ in range(count):
                image = make_image(folder / f'{number}.png', number)
                label = folder / f'{number}.cls'
                label.write_text(str(number))
                tar.add(image, image.name), tar.add(label, label.name)
                number += 1
    split = {'name': 'train', 'num_samples': number, 'filenames': names, 'shard_lengths': list(counts)}
    splits = {'train': split, 'validation': {**split, 'name': 'validation'}}
    (folder / '_info.json').write_text(json.dumps({'name': 'birds', 'splits': splits}))
    (folder / 'names.txt').write_text('\n'.join(map(str, range(number))))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('counts', [(12,), (5, 3, 4)])
def test_webdataset_epochs(tmp_path, workers, counts):
    pytest.importorskip('webdataset')
    _write_shards(tmp_path, counts)
    data = create_datasets('wds/birds', root=tmp_path, class_map=tmp_path / 'names.txt')

    def epochs(*numbers):
        loader = create_loader(data.splits['train'], CONFIG, 4, workers, is_training=True)
        for number in numbers:
            loader.set_epoch(number)
            batches = list(loader)
            assert len(batches) == len(loader) == 3
            yield torch.cat([targets for _, targets in batches]).tolist()

    first, second, again, third = epochs(0, 1, 1, 2)
    assert second == again and len({tuple(order) for order in (first, second, third)}) == 3
    assert next(epochs(1)) == second
    loader = create_loader(data.splits['val'], CONFIG, 4, workers)
    for _ in range(2):
        assert sorted(t for _, targets in loader for t in targets.tolist()) == list(range(12))
        assert len(list(loader)) == len(loader) == 3
