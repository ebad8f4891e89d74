"""Folders that are nearly split/class/image, arguments by name, and data sets of torchvision that are folders."""

import shutil
import sys

import pytest
from image_folders import make_folder, make_image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from timm_bilinear.data import create_datasets, create_split, named, scan


def _fails(match, *args, error=ValueError, make=create_datasets, **kwargs):
    with pytest.raises(error, match=match) as e:
        make(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def _plain(root, classes=('bus', 'train', 'tram')):
    for number, name in enumerate(classes):
        for i in range(2):
            make_image(root / name / f'{i}.png', 10 * number + i)
    return root


@pytest.mark.parametrize('split', ['train', 'training', 'val', 'test', 'Test'])
def test_split_of_a_folder_of_classes(tmp_path, split):
    """Also if a class is called like it."""
    data = create_split(_plain(tmp_path, ('bus', 'test', 'train')), split)
    assert data.class_names == ['bus', 'test', 'train'] and len(data.splits[split]) == 6
    assert len(data.warnings) == 1 and f"all its images are taken as '{split}'" in data.warnings[0]


@pytest.mark.parametrize('split', ['tset', 'bus', 'night'])
def test_split_that_there_is_none_of(tmp_path, split):
    _fails(f"no '{split}' folder", _plain(tmp_path / 'a'), split, error=FileNotFoundError, make=create_split)
    _fails(f"no '{split}'", make_folder(tmp_path / 'b'), split, error=FileNotFoundError, make=create_split)


@pytest.mark.parametrize('split', ['', ' ', '.', '..', 'a/b', '/tmp', 'a\\b', 'a\0b', None, 3, ['test']])
def test_split_that_is_no_name(tmp_path, split):
    make_folder(tmp_path, ('train', 'val', 'a/b'))
    _fails('^split must be the name', tmp_path, split, error=(ValueError, TypeError), make=create_split)


def test_split_without_class_folders(tmp_path):
    make_folder(tmp_path)
    for i in range(3):
        make_image(tmp_path / 'Test' / f'{i}.png', 50 + i)
    _fails("Test' has no class folders", tmp_path, 'test', make=create_split)
    data = create_datasets(tmp_path)
    assert set(data.splits) == {'train', 'val'} and data.skipped == ["'Test' has no class folders."]


@pytest.mark.parametrize('flat', [('train',), ('val',), ('train', 'val')])
def test_training_images_without_class_folders(tmp_path, flat):
    make_folder(tmp_path, [split for split in ('train', 'val') if split not in flat])
    for split in flat:
        make_image(tmp_path / split / '0.png', 50)
    message = _fails(f"{flat[0]}' has no class folders: images belong into", tmp_path)
    assert '--val-fraction' not in message
    if 'train' in flat:
        shutil.rmtree(tmp_path / 'val')
        _fails("train' has no class folders", tmp_path, 0.5)


def test_a_class_called_train_needs_val_fraction(tmp_path):
    _fails('--val-fraction', _plain(tmp_path), error=FileNotFoundError)
    assert create_datasets(tmp_path, 0.5).class_names == ['bus', 'train', 'tram']


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('rest', [(), ('.DS_Store', 'notes.txt')])
def test_empty_split(tmp_path, split, rest):
    make_folder(tmp_path, [name for name in ('train', 'val') if name != split])
    (tmp_path / split).mkdir()
    for name in rest:
        (tmp_path / split / name).touch()
    _fails(f"'{split}' \\(a folder of no class folders", tmp_path)
    _fails(f"{split}' has no class folders", tmp_path, split, make=create_split)


def test_hidden_class_folders(tmp_path):
    make_folder(tmp_path)
    make_image(tmp_path / 'val' / '.bee' / '0.png')
    (tmp_path / 'val' / '.empty').mkdir()
    data = create_datasets(tmp_path)
    assert data.skipped == ["'val/.bee' is hidden (1 images)."] and data.class_names == ['ant', 'bee']


def test_arguments(tmp_path):
    make_folder(tmp_path)
    for make in (create_datasets, create_split):
        _fails('data_dir', '', error=OSError, make=make)
        for data_dir in (None, 3, ['a']):
            _fails('data_dir', data_dir, error=TypeError, make=make)
        for names in ('abc', [0, 1], [None]):
            _fails('class_names', tmp_path, class_names=names, error=TypeError, make=make)
        _fails('not from both', tmp_path, class_names=['ant'], class_map={}, make=make)
        _fails('root', 'torch/cifar10', root='', error=OSError, make=make)
    for fraction in ('0.3', [0.5]):
        _fails('val_fraction', tmp_path, fraction, error=TypeError)


def test_progress(tmp_path, monkeypatch):
    make_folder(tmp_path)
    seen, tqdm = [], scan.tqdm
    monkeypatch.setattr(scan, 'tqdm', lambda *args, **kwargs: seen.append(kwargs['disable']) or tqdm(*args, **kwargs))
    for progress in (True, False):
        create_datasets(tmp_path, progress=progress)
        create_split(tmp_path, 'val', progress=progress)
    assert seen == [None, None, True, True]  # None: on a terminal alone


@pytest.mark.parametrize('name', ['torch/image_folder', 'torch/folder', 'Torch/Image_Folder'])
def test_folder_of_torchvision(tmp_path, name):
    """Its classes are torchvision's, checked as those of any folder."""
    make_folder(tmp_path, ('train', 'validation'), ('b10', 'b2', 'B3'))
    make_image(tmp_path / 'train' / '.ipynb_checkpoints' / '0.png')
    data = create_datasets(name, root=tmp_path)
    judge = ImageFolder(tmp_path / 'validation')
    assert data.class_names == judge.classes == ['B3', 'b10', 'b2']
    assert sorted(zip(map(str, data.splits['val'].paths), data.splits['val'].targets)) == sorted(judge.samples)
    assert any('ipynb_checkpoints' in message for message in data.skipped)
    assert create_split(name, 'val', root=tmp_path).class_names == judge.classes
    shutil.rmtree(tmp_path / 'validation' / 'b2')
    assert "'b2'" in create_datasets(name, root=tmp_path).warnings[0]
    make_image(tmp_path / 'validation' / 'c' / '0.png', 70)
    _fails("'validation/c'", name, root=tmp_path)
    shutil.rmtree(tmp_path / 'validation' / 'c')
    (tmp_path / 'train' / 'b2' / '0.png').write_text('no image')
    _fails('train/b2/0.png', name, root=tmp_path)
    assert len(create_datasets(name, root=tmp_path, skip_bad=True).splits['train']) == 5
    make_image(tmp_path / 'train' / 'b2' / 'deep' / '0.png', 71)
    _fails("'train/b2/deep'", name, root=tmp_path)
    _fails("no 'night' folder", name, root=tmp_path, val_split='night', error=FileNotFoundError)
    _fails('root', name)


def test_data_set_made_of_files(tmp_path, monkeypatch):
    """As torchvision's ImageNet: folders are called otherwise than classes."""
    make_folder(tmp_path, classes=('n01', 'n02'))
    names = {'train': ['crane', 'crane'], 'val': ['crane', 'crane']}

    def create(name, root, split, **kwargs):
        dataset = ImageFolder(tmp_path / split)
        dataset.classes = names[split]
        return dataset

    monkeypatch.setattr(named, 'create_dataset', create)
    options = dict(root=tmp_path, val_split='val')
    data = create_datasets('torch/imagenet', **options)
    assert data.class_names == ['crane', 'crane'] and data.splits['train'].targets == [0, 0, 1, 1]
    assert data.fingerprint and not data.warnings
    (tmp_path / 'val' / 'n02' / '0.png').write_text('no image')
    (tmp_path / 'val' / 'n02' / '1.png').write_text('no image')
    _fails(r'val/n02/0\.png', 'torch/imagenet', **options)
    data = create_datasets('torch/imagenet', skip_bad=True, **options)
    assert len(data.skipped) == 2 and "'val' has images of one class alone" in data.warnings[0]
    names['val'] = ['heron', 'crane']
    assert "not both have 'heron'" in _fails("Split 'val'", 'torch/imagenet', **options)
    names['train'] = ['crane', 'heron']
    _fails('order differs', 'torch/imagenet', **options)


MAP_FILES = [
    ('\ufeffant\nbee\n', ['ant', 'bee']),
    ('ant\r\nbee\r\n\r\n  \n', ['ant', 'bee']),
    ('ant\n\nbee\n', 'no name in line 2'),
    ('\nant\nbee\n', 'no name in line 1'),
    ('ant\nbee\nant\n', "'ant' is there more than once"),
    ('', 'names no classes'),
    (b'\xff\xfeant', 'cannot be read'),
    ('wasp\nfly\n', "names none of the class folders.*'ant', 'bee'"),
    ('ant\nfly\n', "names 'ant' alone"),
    ({}, 'names no classes'),
    ({'': 0, 'ant': 1, 'bee': 2}, 'class without a name'),
    ({'caf\u00e9': 0, 'cafe\u0301': 1}, 'more than once'),
    ({'wasp': 0, 'fly': 1}, 'names none'),
]


@pytest.mark.parametrize('content, expected', MAP_FILES, ids=repr)
def test_class_maps(tmp_path, content, expected):
    make_folder(tmp_path)
    class_map = content if isinstance(content, dict) else tmp_path / 'map.txt'
    if not isinstance(content, dict):
        class_map.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        data = create_datasets(tmp_path, class_map=class_map)
        assert data.class_names == expected and data.splits['val'].targets == [0, 0, 1, 1]
        return
    message = _fails(expected, tmp_path, class_map=class_map)
    assert isinstance(content, dict) or 'map.txt' in message
    if 'alone' not in expected:
        _fails(expected, tmp_path, 'val', class_map=class_map, make=create_split)


@pytest.mark.parametrize(
    'name, package',
    [('hfds/a', 'datasets'), ('hfids/a', 'datasets'), ('tfds/a', 'tensorflow'), ('wds/a', 'webdataset')],
)
def test_missing_packages(tmp_path, monkeypatch, capsys, name, package):
    for reader in ('hfds', 'hfids', 'tfds'):
        monkeypatch.delitem(sys.modules, f'timm.data.readers.reader_{reader}', raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr('timm.data.readers.reader_wds.wds', None)
    assert f'a package that is not installed: {package}' in _fails(f"'{name}' needs", name, root=tmp_path)
    assert capsys.readouterr().out == ''


def test_what_libraries_print(tmp_path, monkeypatch, capsys):
    def create(*args, **kwargs):
        print('Files already downloaded and verified')
        return create_dataset('torch/image_folder', str(make_folder(tmp_path)), split='train')

    monkeypatch.setattr(named, 'create_dataset', create)
    assert create_split('torch/imagenet', 'train', root=tmp_path).class_names == ['ant', 'bee']
    assert capsys.readouterr().out == ''
