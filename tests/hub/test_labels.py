"""Class names of a run of timm's train script: as its reader gave them, or none."""

import logging
import pickle

import pytest
from PIL import Image
from timm.data import create_dataset

from timm_bilinear.hub.labels import class_names, read_label_names


@pytest.fixture
def data(tmp_path):
    """Makes a data folder of classes, each with an image."""

    def make(*labels, root=tmp_path / 'data', split='train'):
        for label in labels:
            (root / split / label).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(root / split / label / 'a.png')
        return root

    return make


def names_of(tmp_path, num_classes=3, run='run', **args):
    return class_names(args, tmp_path / run / 'model_best.pth.tar', num_classes)


def assert_unknown(caplog, reason, names):
    assert names is None
    (record,) = [r for r in caplog.records if r.name == 'timm_bilinear.hub.labels']
    assert record.levelno == logging.WARNING and 'model_best.pth.tar' in record.message
    assert reason in record.message and '--label-names' in record.message and '\n' not in record.message


@pytest.mark.parametrize(
    'dataset,labels,expected',
    [
        ('', ('10', '2', '1'), ['1', '2', '10']),
        ('torch/image_folder', ('10', '2', '1'), ['1', '10', '2']),
        ('Torch/folder', ('b', 'B', 'a'), ['B', 'a', 'b']),
        ('', ('birds/owl', 'birds/jay', 'cats/lynx'), ['jay', 'lynx', 'owl']),
        ('torch/image_folder', ('birds/owl', 'birds/jay', 'cats/lynx', 'dogs/pug'), ['birds', 'cats', 'dogs']),
        ('', ('x/same', 'y/same', 'y/a', 'y/b'), ['a', 'b', 'same']),
    ],
)
def test_names_are_the_readers(data, tmp_path, dataset, labels, expected):
    root = data(*labels)
    assert names_of(tmp_path, dataset=dataset, data_dir=str(root)) == expected
    dataset = create_dataset(dataset, str(root), 'train')
    class_to_idx = getattr(dataset, 'reader', dataset).class_to_idx
    assert [class_to_idx[name] for name in expected] == [0, 1, 2]


@pytest.mark.parametrize(
    'split,asked', [('training', 'train'), ('train', 'training'), ('mine', 'mine'), ('train', None)]
)
def test_split_is_found_as_in_training(data, tmp_path, split, asked):
    root = data('c', 'b', 'a', split=split)
    data('x', split='other')
    assert names_of(tmp_path, data=str(root), train_split=asked) == ['a', 'b', 'c']


def test_split_may_be_the_folder_itself(data, tmp_path):
    root = data('c', 'b', 'a', split='.')
    assert names_of(tmp_path, data_dir=str(root)) == ['a', 'b', 'c']


def test_folders_without_images_are_no_classes(data, tmp_path):
    root = data('c', 'b', 'a')
    (root / 'train' / 'empty').mkdir()
    assert names_of(tmp_path, data_dir=str(root)) == ['a', 'b', 'c']


@pytest.mark.parametrize('labels', [('a', 'cat', 'Cat'), ('1', '01', '2')])
def test_names_without_a_certain_order(data, tmp_path, caplog, labels):
    assert_unknown(caplog, 'order', names_of(tmp_path, data_dir=str(data(*labels))))


def test_other_number_of_classes(data, tmp_path, caplog):
    assert_unknown(caplog, '2 classes', names_of(tmp_path, data_dir=str(data('a', 'b'))))


@pytest.mark.parametrize('args', [{}, dict(dataset='hfds/me/x', data_dir='/x'), dict(dataset='wds/x', data_dir='/x')])
def test_data_that_are_not_read(tmp_path, caplog, args):
    assert_unknown(caplog, 'left out', names_of(tmp_path, **args))


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder', 'torch/cifar10'])
def test_data_that_are_gone(tmp_path, caplog, dataset):
    gone = tmp_path / 'gone'
    assert_unknown(caplog, f"'{gone}' is not there", names_of(tmp_path, dataset=dataset, data_dir=str(gone)))


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder', 'torch/cifar10', 'torch/nothing'])
def test_data_without_images(tmp_path, caplog, dataset):
    (tmp_path / 'data' / 'train' / 'a').mkdir(parents=True)
    names = names_of(tmp_path, dataset=dataset, data_dir=str(tmp_path / 'data'))
    assert_unknown(caplog, 'cannot be read as in training', names)


# --- relative paths


@pytest.mark.parametrize('output,run', [('', 'output/train/x'), ('runs', 'runs/x'), ('.', 'x'), ('a/b', 'a/b/x')])
def test_relative_to_where_the_run_was_started(data, tmp_path, monkeypatch, output, run):
    project = tmp_path / 'project'
    data('a', 'b', 'c', root=project / 'data')
    data('x', 'y', 'z', root=tmp_path / 'elsewhere' / 'data')
    (project / run).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert names_of(project, run=run, output=output, data_dir='data') == ['a', 'b', 'c']


@pytest.mark.parametrize('output', ['OUT', '../runs', '', 'other', None])
@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_folders_of_elsewhere_are_not_taken(data, tmp_path, monkeypatch, caplog, output, dataset):
    data('x', 'y', 'z', root=tmp_path / 'elsewhere' / 'data')
    (tmp_path / 'runs' / 'x').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'elsewhere')
    args = {} if output is None else dict(output=output.replace('OUT', str(tmp_path / 'runs')))
    names = names_of(tmp_path, run='runs/x', dataset=dataset, data_dir='data', **args)
    assert_unknown(caplog, "'data' is relative", names)


def test_run_below_the_current_directory(data, tmp_path, monkeypatch):
    data('a', 'b', 'c')
    monkeypatch.chdir(tmp_path)
    assert names_of(tmp_path, data_dir='data') == ['a', 'b', 'c']


# --- class maps


def test_class_map_needs_no_data(tmp_path):
    (tmp_path / 'map.txt').write_text('zebra\nyak\nant\n')
    args = dict(data_dir='gone', class_map=str(tmp_path / 'map.txt'))
    assert names_of(tmp_path, **args) == ['zebra', 'yak', 'ant']
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps({'zebra': 1, 'ant': 0, 'yak': 2}))
    assert names_of(tmp_path, class_map=str(tmp_path / 'map.pkl')) == ['ant', 'zebra', 'yak']


def test_class_map_in_the_data(data, tmp_path):
    root = data('a', 'b', 'c')
    (root / 'train' / 'map.txt').write_text('c\nb\na\n')
    assert names_of(tmp_path, data_dir=str(root), class_map='map.txt') == ['c', 'b', 'a']


def test_class_map_where_the_run_was_started(tmp_path):
    (tmp_path / 'map.txt').write_text('c\nb\na\n')
    assert names_of(tmp_path, run='output/train/x', output='', class_map='map.txt') == ['c', 'b', 'a']


def test_class_map_of_elsewhere_is_not_taken(tmp_path, monkeypatch, caplog):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'map.txt').write_text('x\ny\nz\n')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert_unknown(caplog, "'map.txt' is relative", names_of(tmp_path, class_map='map.txt'))


def test_torchvisions_folder_has_no_class_map(data, tmp_path):
    root = data('a', 'b', 'c')
    (tmp_path / 'map.txt').write_text('c\nb\na\n')
    args = dict(dataset='torch/image_folder', class_map=str(tmp_path / 'map.txt'))
    assert names_of(tmp_path, data_dir=str(root), **args) == ['a', 'b', 'c']


@pytest.mark.parametrize('class_map,reason', [({'a': 0, 'b': 1, 'c': 3}, '3 classes'), ({5: 0, 6: 1, 7: 2}, 'numbers')])
def test_class_map_that_names_no_classes(tmp_path, caplog, class_map, reason):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(class_map))
    assert_unknown(caplog, reason, names_of(tmp_path, class_map=str(tmp_path / 'map.pkl')))


# --- files of names


@pytest.mark.parametrize(
    'text', ['ant\nbee\r\n cat \n', '\ufeffant\nbee\ncat', '["ant", "bee", "cat"]', '\n["ant","bee",\n"cat"]\n']
)
def test_read_label_names(tmp_path, text):
    path = tmp_path / 'names'
    path.write_bytes(text.encode())
    assert read_label_names(path) == ['ant', 'bee', 'cat']


def test_read_label_names_keeps_what_is_in_a_name(tmp_path):
    (tmp_path / 'names').write_bytes('très\u2028long\n王\n'.encode())
    assert read_label_names(tmp_path / 'names') == ['très\u2028long', '王']


@pytest.mark.parametrize(
    'text,message',
    [
        ('a\n\nb', "'.*names' have no name for class 1"),
        ('', "'.*names' have no name for class 0"),
        ('["a", 1]', "'.*names' must be a JSON list of strings"),
        ('{"0": "a"}', "'.*names' must be a JSON list of strings"),
        ('["a",', "'.*names' are not valid JSON"),
    ],
)
def test_bad_label_names(tmp_path, text, message):
    (tmp_path / 'names').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_label_names(tmp_path / 'names')
