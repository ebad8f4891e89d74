"""`prepare` on tiny archives with the official layouts, and the recipes that go with it."""

import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from timm.data import create_dataset

import timm_bilinear  # noqa: F401
from timm_bilinear.data.folder import create_datasets
from timm_bilinear.data.prepare import COUNTS, prepare

RECIPES = Path(__file__).parents[2] / 'hub' / 'recipes'
BIRDS = ('001.Black_footed_Albatross', '002.Laysan_Albatross', '010.Red_winged_Blackbird')
PLANES = ('707-320', 'DC-10', 'DC-3', 'F/A-18')
CARS = ('AM General Hummer SUV 2000', 'Ram C/V Cargo Van Minivan 2012')


def _image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (12, 8), (len(path.stem), 0, 0)).save(path)


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{line}\n' for line in lines))


def _pack(folder, archive, *more):
    """The folder as an archive beside it, as downloaded; `more` are files beside the folder in the archive."""
    path = folder.parent / archive
    with tarfile.open(path, 'w:gz') as tar:
        tar.add(folder, folder.name)
        for member in more:
            tar.add(folder.parent / member, member)
    for file in sorted(folder.rglob('*'), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()
    return path


def _cub200(src):
    """Two training images and one test image a class."""
    root = src / 'CUB_200_2011'
    names = [f'{c}/{c[4:]}_{i:04d}_{n}.jpg' for n, c in enumerate(BIRDS) for i in range(3)]
    for name in names:
        _image(root / 'images' / name)
    _write(root / 'images.txt', [f'{i} {name}' for i, name in enumerate(names, 1)])
    _write(root / 'classes.txt', [f'{i} {name}' for i, name in enumerate(BIRDS, 1)])
    _write(root / 'image_class_labels.txt', [f'{i + 1} {i // 3 + 1}' for i in range(len(names))])
    _write(root / 'train_test_split.txt', [f'{i + 1} {int(i % 3 != 1)}' for i in range(len(names))])
    _write(src / 'attributes.txt', ['1 has_bill_shape::curved_(up_or_down)'])
    return root


def _aircraft(src):
    """Two trainval images and one test image a class."""
    root = src / 'fgvc-aircraft-2013b'
    _write(root / 'data' / 'variants.txt', PLANES)
    lists = {'trainval': [], 'test': []}
    for i in range(3 * len(PLANES)):
        _image(root / 'data' / 'images' / f'{i:07d}.jpg')
        lists['test' if i % 3 == 1 else 'trainval'].append(f'{i:07d} {PLANES[i // 3]}')
    for part, lines in lists.items():
        _write(root / 'data' / f'images_variant_{part}.txt', lines)
    return root


def _annotations(path, rows, fields, **more):
    np, io = pytest.importorskip('numpy'), pytest.importorskip('scipy.io', reason='Stanford Cars takes scipy')
    annotations = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        annotations[0, i] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    io.savemat(path, {'annotations': annotations, **more})


def _class_names(names):
    np = pytest.importorskip('numpy')
    cells = np.empty((1, len(names)), dtype=object)
    cells[0] = names
    return cells


BOX = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2')


def _cars(src, pack=True):
    """Three training images and two test images a class, in the five files of the download page."""
    io = pytest.importorskip('scipy.io', reason='Stanford Cars takes scipy')
    for split, per_class, list_file in (
        ('train', 3, src / 'devkit' / 'cars_train_annos.mat'),
        ('test', 2, src / 'cars_test_annos_withlabels.mat'),
    ):
        rows = [(1, 2, 10, 7, 1 + i % len(CARS), f'{i + 1:05d}.jpg') for i in range(per_class * len(CARS))]
        for row in rows:
            _image(src / f'cars_{split}' / row[-1])
        _annotations(list_file, rows, (*BOX, 'class', 'fname'))
        if split == 'test':
            _annotations(src / 'devkit' / 'cars_test_annos.mat', [(*r[:4], r[-1]) for r in rows], (*BOX, 'fname'))
    io.savemat(src / 'devkit' / 'cars_meta.mat', {'class_names': _class_names(CARS)})
    if pack:
        for folder, archive in (('cars_train', 'cars_train.tgz'), ('cars_test', 'cars_test.tgz')):
            _pack(src / folder, archive)
        _pack(src / 'devkit', 'car_devkit.tgz')


@pytest.fixture
def src(tmp_path, monkeypatch):
    monkeypatch.setitem(COUNTS, 'cub200', {'classes': 3, 'train': 6, 'val': 3})
    monkeypatch.setitem(COUNTS, 'aircraft', {'classes': 4, 'train': 8, 'val': 4})
    monkeypatch.setitem(COUNTS, 'cars', {'classes': 2, 'train': 6, 'val': 4})
    (tmp_path / 'src').mkdir()
    return tmp_path / 'src'


def _fails(error, match, dataset, src, dst):
    with pytest.raises(error, match=match):
        prepare(dataset, src, dst)
    assert not dst.exists()
    assert not list(dst.parent.glob('.*'))  # nothing half-written either


def _files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob('*') if not file.is_dir())


def test_official_counts():
    assert {name: tuple(counts.values()) for name, counts in COUNTS.items()} == {
        'cub200': (200, 5994, 5794),
        'aircraft': (100, 6667, 3333),
        'cars': (196, 8144, 8041),
    }


def test_cub200_archive(src, tmp_path):
    _pack(_cub200(src), 'CUB_200_2011.tgz', 'attributes.txt')
    (src / 'attributes.txt').unlink()
    dst = tmp_path / 'sets' / 'birds'
    assert prepare('cub200', src, dst) == {'classes': 3, 'train': 6, 'val': 3}
    assert os.listdir(src) == ['CUB_200_2011.tgz']  # what was downloaded is left as it was
    assert sorted(os.listdir(dst)) == ['.source', 'train', 'val']
    assert _files(dst / 'val') == [f'{c}/{c[4:]}_0001_{n}.jpg' for n, c in enumerate(BIRDS)]
    link = dst / 'train' / BIRDS[2] / 'Red_winged_Blackbird_0002_2.jpg'
    assert link.is_symlink() and not os.path.isabs(os.readlink(link))

    dst.rename(tmp_path / 'moved')  # links are relative, and to the inside
    data = create_datasets(tmp_path / 'moved')
    assert {split: len(d) for split, d in data.splits.items()} == {'train': 6, 'val': 3}
    assert data.class_names == list(BIRDS)


def test_cub200_given_as_archive_or_folder(src, tmp_path):
    root = _cub200(src)
    for n, given in enumerate((src, root)):
        prepare('cub200', given, tmp_path / str(n))
        assert not (tmp_path / str(n) / '.source').exists()
        link = tmp_path / str(n) / 'train' / BIRDS[0] / 'Black_footed_Albatross_0000_0.jpg'
        assert link.is_symlink() and link.resolve() == root / 'images' / BIRDS[0] / link.name
    prepare('cub200', _pack(root, 'CUB_200_2011.tgz'), tmp_path / 'archive')
    assert _files(tmp_path / 'archive' / 'train') == _files(tmp_path / '0' / 'train')


@pytest.mark.parametrize('pack', [True, False])
def test_aircraft(src, tmp_path, pack):
    root = _aircraft(src)
    if pack:
        _pack(root, 'fgvc-aircraft-2013b.tar.gz')
    dst = tmp_path / 'planes'
    assert prepare('aircraft', src, dst) == {'classes': 4, 'train': 8, 'val': 4}
    assert _files(dst / 'val') == ['707-320/0000001.jpg', 'DC-10/0000004.jpg', 'DC-3/0000007.jpg', 'F_A-18/0000010.jpg']
    # what the train script does, with its default split names
    for split, count in (('train', 8), ('validation', 4)):
        reader = create_dataset('', str(dst), split=split).reader
        assert len(reader) == count and list(reader.class_to_idx) == ['707-320', 'DC-3', 'DC-10', 'F_A-18']


@pytest.mark.parametrize('pack', [True, False])
def test_cars(src, tmp_path, pack):
    _cars(src, pack)
    dst = tmp_path / 'cars'
    assert prepare('cars', src, dst) == {'classes': 2, 'train': 6, 'val': 4}
    assert sorted(os.listdir(dst / 'train')) == [
        '001.AM General Hummer SUV 2000',
        '002.Ram C_V Cargo Van Minivan 2012',
    ]
    assert _files(dst / 'val' / '002.Ram C_V Cargo Van Minivan 2012') == ['00002.jpg', '00004.jpg']
    assert len(create_datasets(dst).splits['train']) == 6


def test_cars_in_one_archive(src, tmp_path):
    rows = [(f'car_ims/{i:06d}.jpg', 1, 2, 10, 7, 1 + i % 2, int(i >= 6)) for i in range(10)]
    _annotations(
        src / 'cars_annos.mat',
        rows,
        ('relative_im_path', *BOX, 'class', 'test'),
        class_names=_class_names(CARS),
    )
    for row in rows:
        _image(src / row[0])
    prepare('cars', src, tmp_path / 'folder')
    _pack(src / 'car_ims', 'car_ims.tgz')
    assert prepare('cars', src, tmp_path / 'archive') == {'classes': 2, 'train': 6, 'val': 4}
    assert _files(tmp_path / 'archive' / 'val') == [
        '001.AM General Hummer SUV 2000/000006.jpg',
        '001.AM General Hummer SUV 2000/000008.jpg',
        '002.Ram C_V Cargo Van Minivan 2012/000007.jpg',
        '002.Ram C_V Cargo Van Minivan 2012/000009.jpg',
    ]


def test_cars_without_scipy(src, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    _fails(RuntimeError, 'pip install scipy', 'cars', src, tmp_path / 'dst')


def test_cars_test_list_without_labels(src, tmp_path):
    _cars(src, pack=False)
    (src / 'devkit' / 'cars_test_annos.mat').rename(src / 'cars_test_annos_withlabels.mat')
    _fails(ValueError, r"cars_test_annos_withlabels\.mat': .* no 'class'", 'cars', src, tmp_path / 'dst')


def test_cars_names_all_that_is_missing(src, tmp_path):
    _cars(src)
    for name in ('cars_test.tgz', 'cars_test_annos_withlabels.mat'):
        (src / name).unlink()
    _fails(FileNotFoundError, r'cars_test\.tgz.*cars_test_annos_withlabels\.mat', 'cars', src, tmp_path / 'dst')


def test_broken_mat(src, tmp_path):
    _cars(src, pack=False)
    (src / 'devkit' / 'cars_meta.mat').write_text('no matrix')
    _fails(ValueError, r'Cannot read .*cars_meta\.mat', 'cars', src, tmp_path / 'dst')


def test_nothing_downloaded(src, tmp_path):
    _fails(FileNotFoundError, r"lacks 'CUB_200_2011\.tgz' \(or", 'cub200', src, tmp_path / 'dst')
    _fails(FileNotFoundError, 'nowhere', 'cub200', tmp_path / 'nowhere', tmp_path / 'dst')
    _fails(ValueError, "'cub200', 'aircraft', 'cars', got 'dogs'", 'dogs', src, tmp_path / 'dst')


@pytest.mark.parametrize('pack', [True, False])
def test_missing_images(src, tmp_path, pack):
    root = _cub200(src)
    for name in ('Laysan_Albatross_0000_1.jpg', 'Laysan_Albatross_0002_1.jpg'):
        (root / 'images' / BIRDS[1] / name).unlink()
    if pack:
        _pack(root, 'CUB_200_2011.tgz')
    match = "images' lacks 2 of the 6 images in 'train_test_split.txt' for 'train', first '002.*_0000_1.jpg'"
    _fails(FileNotFoundError, match, 'cub200', src, tmp_path / 'dst')


@pytest.mark.parametrize('name', ['images', 'classes', 'image_class_labels', 'train_test_split'])
def test_cub200_missing_list(src, tmp_path, name):
    root = _cub200(src)
    (root / f'{name}.txt').unlink()
    _fails(FileNotFoundError, rf"'.*CUB_200_2011/{name}\.txt' is missing", 'cub200', src, tmp_path / 'dst')


@pytest.mark.parametrize(
    'counts, match',
    [
        ({'classes': 4}, r"classes\.txt': expected 4 classes, found 3"),
        ({'train': 7}, r"train_test_split\.txt': expected 7 images for 'train', found 6"),
        ({'val': 2}, r"train_test_split\.txt': expected 2 images for 'val', found 3"),
    ],
)
def test_wrong_counts(src, tmp_path, monkeypatch, counts, match):
    _pack(_cub200(src), 'CUB_200_2011.tgz')
    monkeypatch.setitem(COUNTS, 'cub200', {**COUNTS['cub200'], **counts})
    _fails(ValueError, f"^'CUB_200_2011/{match}", 'cub200', src, tmp_path / 'dst')


@pytest.mark.parametrize(
    'file, old, new, match',
    [
        ('images_variant_test.txt', 'DC-3', 'DC-4', r"images_variant_test\.txt': variant 'DC-4' of image 0000007"),
        ('images_variant_test.txt', '0000007 DC-3', '0000007', r"images_variant_test\.txt', line 3: expected 2 fields"),
        ('images_variant_test.txt', '0000007', '../../0000007', 'not possible'),
        ('images_variant_trainval.txt', '0000002', '0000000', r"image '0000000\.jpg' 2 times"),
        ('variants.txt', 'DC-3', 'DC-10', 'DC-3'),
        ('variants.txt', '707-320', 'F?A-18', '707-320'),
    ],
)
def test_broken_lists(src, tmp_path, file, old, new, match):
    path = _aircraft(src) / 'data' / file
    path.write_text(path.read_text().replace(old, new))
    _fails(ValueError, match, 'aircraft', src, tmp_path / 'dst')


@pytest.mark.parametrize('how', ['truncated', 'no archive', 'flipped byte', 'other archive'])
def test_broken_archive(src, tmp_path, how):
    if how == 'other archive':
        _pack(_aircraft(src), 'CUB_200_2011.tgz')
        return _fails(ValueError, "no folder 'CUB_200_2011'", 'cub200', src, tmp_path / 'dst')
    archive = _pack(_cub200(src), 'CUB_200_2011.tgz')
    data = bytearray(archive.read_bytes())
    if how == 'truncated':
        data = data[: len(data) // 2]
    elif how == 'no archive':
        data = b'<html>404</html>'
    else:
        data[-8] ^= 1  # gzip's checksum
    archive.write_bytes(data)
    _fails(ValueError, r"Archive '.*CUB_200_2011\.tgz' is broken or incomplete", 'cub200', src, tmp_path / 'dst')


@pytest.mark.parametrize('kind', ['path', 'link'])
def test_archive_that_leaves_its_folder(src, tmp_path, kind):
    root = _cub200(src)
    archive = src / 'CUB_200_2011.tgz'
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(root, root.name)
        member = tarfile.TarInfo('../../../evil.txt' if kind == 'path' else 'CUB_200_2011/evil')
        if kind == 'link':
            member.type, member.linkname = tarfile.SYMTYPE, '../../../../evil'
        tar.addfile(member)
    root.rename(tmp_path / 'elsewhere')
    _fails(ValueError, 'unsafe', 'cub200', src, tmp_path / 'dst')
    assert not list(tmp_path.rglob('evil*'))


def test_destination(src, tmp_path):
    _cub200(src)
    dst = tmp_path / 'dst'
    dst.mkdir()
    prepare('cub200', src, dst)  # an empty folder is as good as none
    (dst / 'mine.txt').write_text('mine')
    before = _files(dst)
    with pytest.raises(FileExistsError, match='not an empty folder'):
        prepare('cub200', src, dst)
    assert _files(dst) == before
    with pytest.raises(FileExistsError, match='not an empty folder'):
        prepare('cub200', src, dst / 'mine.txt')


def test_links_lead_through_a_linked_destination(src, tmp_path):
    _cub200(src)
    (tmp_path / 'disk' / 'deep').mkdir(parents=True)
    (tmp_path / 'short').symlink_to(tmp_path / 'disk' / 'deep')
    prepare('cub200', src, tmp_path / 'short' / 'birds')
    assert len(create_datasets(tmp_path / 'short' / 'birds').splits['train']) == 6


@pytest.mark.parametrize('hard', [True, False])
def test_without_symbolic_links(src, tmp_path, monkeypatch, hard):
    root = _cub200(src)

    def refuse(*args, **kwargs):
        raise OSError('not supported')

    monkeypatch.setattr(Path, 'symlink_to', refuse)
    if not hard:
        monkeypatch.setattr(os, 'link', refuse)
    prepare('cub200', src, tmp_path / 'dst')
    image = root / 'images' / BIRDS[0] / 'Black_footed_Albatross_0000_0.jpg'
    file = tmp_path / 'dst' / 'train' / BIRDS[0] / image.name
    assert not file.is_symlink() and file.samefile(image) == hard and file.read_bytes() == image.read_bytes()


def test_disk_full_while_linking(src, tmp_path, monkeypatch):
    _cub200(src)

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    for owner, name in ((Path, 'symlink_to'), (os, 'link'), (shutil, 'copyfile')):
        monkeypatch.setattr(owner, name, full)
    _fails(OSError, 'No space left', 'cub200', src, tmp_path / 'dst')
