"""Image folders: what belongs where, what is left out, and what is said about the rest."""

import os
import shutil
from pathlib import Path

import pytest
from image_folders import make_folder, make_image
from PIL import Image
from timm.data import create_dataset

from timm_bilinear.data import ImageList, create_datasets, create_split


def _fails(match, *args, error=ValueError, make=create_datasets, **kwargs):
    with pytest.raises(error, match=match) as e:
        make(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize('names', [('train', 'val', 'test'), ('training', 'validation', 'testing'), ('Train', 'eval')])
def test_splits_and_classes(tmp_path, names):
    data = create_datasets(make_folder(tmp_path, names))
    assert {key: len(d) for key, d in data.splits.items()} == dict.fromkeys(('train', 'val', 'test')[: len(names)], 4)
    assert data.class_names == data.splits['val'].class_names == ['ant', 'bee']
    assert data.splits['val'].targets == [0, 0, 1, 1]
    assert not data.skipped and not data.warnings
    image, target = data.splits['train'][3]
    assert image.size == (16, 16) and image.mode == 'RGB' and target == 1
    assert data.splits['train'].filename(3) == f'{names[0]}/bee/1.png'


@pytest.mark.parametrize('name', ['nowhere', 'file'])
def test_missing_folder(tmp_path, name):
    (tmp_path / 'file').touch()
    _fails('data_dir.*does not exist', '', error=OSError)
    _fails(name, tmp_path / name, error=OSError)


@pytest.mark.parametrize('splits, missing', [(('train',), 'val'), (('val',), 'train'), ((), 'train')])
def test_missing_split(tmp_path, splits, missing):
    assert '--val-fraction' in _fails(f"'{missing}'", make_folder(tmp_path, splits), error=FileNotFoundError)


def test_two_folders_for_a_split(tmp_path):
    _fails("'valid' and 'validation'", make_folder(tmp_path, ('train', 'valid', 'validation')))


def test_same_classes_and_order_as_timm(tmp_path):
    classes = ('b10', 'b2', 'B3', 'é', 'Z', 'a b', '007', '10', 'ß', 'x-1')
    data = create_datasets(make_folder(tmp_path, classes=classes, count=3))
    judge = create_dataset('', str(tmp_path), split='train')
    assert {name: i for i, name in enumerate(data.class_names)} == judge.reader.class_to_idx
    samples = [(Path(path), target) for path, target in judge.reader.samples]
    assert list(zip(data.splits['train'].paths, data.splits['train'].targets)) == samples


def test_order_is_total(tmp_path, monkeypatch):
    """Where timm's order depends on what the file system lists first, or fails."""
    make_folder(tmp_path, classes=('a', 'A', '1', '01', '²'), count=1)
    expected = create_datasets(tmp_path)
    assert expected.class_names == ['01', '1', 'A', 'a', '²']
    listdir = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda path: sorted(listdir(path), reverse=True))
    data = create_datasets(tmp_path)
    assert data == expected or (data.class_names, data.fingerprint) == (expected.class_names, expected.fingerprint)


def test_hidden_entries(tmp_path):
    make_folder(tmp_path)
    for name in ('.DS_Store', 'train/.DS_Store', 'train/ant/._0.png', 'train/ant/Thumbs.db', 'val/desktop.ini'):
        (tmp_path / name).write_text('x')
    for name in ('.git/x.png', 'train/.ipynb_checkpoints/0.png', 'train/ant/.ipynb_checkpoints/0.png'):
        make_image(tmp_path / name)
    make_image(tmp_path / 'train' / '__MACOSX' / '0.png')
    data = create_datasets(tmp_path)
    assert data.class_names == ['ant', 'bee'] and len(data.splits['train']) == 4
    assert data.skipped == [
        "'train/.ipynb_checkpoints' is hidden (1 images).",
        "'train/__MACOSX' is hidden (1 images).",
    ]


def test_what_does_not_fit_is_named_at_once(tmp_path):
    make_folder(tmp_path)
    make_image(tmp_path / 'top.png', 90)
    make_image(tmp_path / 'train' / 'stray.jpg', 91)
    make_image(tmp_path / 'train' / 'ant' / 'deep' / '0.png', 92)
    make_image(tmp_path / 'val' / 'group' / 'ant' / '0.png', 93)
    (tmp_path / 'train' / 'empty').mkdir()
    (tmp_path / 'train' / 'loop').symlink_to(tmp_path)
    (tmp_path / 'train' / 'twin').symlink_to(tmp_path / 'train' / 'ant')
    (tmp_path / 'train' / 'gone').symlink_to(tmp_path / 'nowhere')
    message = _fails('not made of split/class/image', tmp_path)
    for place in ('top.png', 'train/stray.jpg', 'train/ant/deep', 'val/group/ant', 'train/empty', 'train/loop'):
        assert f"'{place}' (" in message
    assert "'train/twin' (the same folder as 'train/ant')" in message and 'train/gone' in message


def test_many_problems_are_counted(tmp_path):
    make_folder(tmp_path)
    for i in range(25):
        make_image(tmp_path / 'train' / f'{i}.png')
    message = _fails('and 15 more', tmp_path)
    assert "'train/9.png'" in message and "'train/10.png'" not in message


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('rest', [(), ('notes.txt',), ('.DS_Store',)])
def test_empty_class_folder(tmp_path, split, rest):
    make_folder(tmp_path)
    folder = tmp_path / split / 'bee'
    for file in folder.iterdir():
        file.unlink()
    for name in rest:
        (folder / name).touch()
    _fails(f"'{split}/bee' \\(a class folder without images", tmp_path)


def test_formats_and_skipped_files(tmp_path):
    make_folder(tmp_path)
    names = ['a.webp', 'b.BMP', 'c.gif', 'd.tiff', 'e.JPeG', ' f g.png', 'ü.png', 'new\nline.png', 'h.jpe']
    for i, name in enumerate(names):
        make_image(tmp_path / 'train' / 'ant' / name, 50 + i)
    shutil.copy(tmp_path / 'train' / 'ant' / '0.png', tmp_path / 'train' / 'ant' / 'without_extension')
    for name in ('labels.csv', 'paper.pdf', 'drawing.eps', 'film.mpg', 'new\nline.txt'):
        (tmp_path / 'train' / 'ant' / name).write_text('%!PS')
    (tmp_path / 'train' / 'classes.txt').touch()
    (tmp_path / 'README.md').touch()
    (tmp_path / 'raw').mkdir()
    data = create_datasets(tmp_path)
    assert len(data.splits['train']) == 4 + len(names)
    assert all(image.size == (16, 16) for image, _ in data.splits['train'])
    assert len(data.skipped) == 9 and not any('\n' in message for message in data.skipped)
    for name in ('without_extension', 'labels.csv', 'paper.pdf', 'drawing.eps', 'film.mpg', 'README.md', 'raw'):
        assert any(name in message for message in data.skipped), name


def test_linked_class_folder_and_images(tmp_path):
    make_folder(tmp_path / 'data')
    (tmp_path / 'data' / 'train' / 'ant').rename(tmp_path / 'elsewhere')
    (tmp_path / 'data' / 'train' / 'ant').symlink_to(tmp_path / 'elsewhere')
    file = tmp_path / 'data' / 'train' / 'bee' / '0.png'
    file.rename(tmp_path / 'there.png')
    file.symlink_to('../../../there.png')
    data = create_datasets(tmp_path / 'data')
    assert len(data.splits['train']) == 4 and not data.warnings


def test_unicode_forms_of_a_name(tmp_path):
    make_folder(tmp_path, ('train',), ('caf\u00e9', 'bee'))
    make_folder(tmp_path, ('val',), ('cafe\u0301', 'bee'), count=3)
    if not (tmp_path / 'train' / 'cafe\u0301').exists():  # macOS takes both for one name
        assert create_datasets(tmp_path).splits['val'].targets == [0] * 3 + [1] * 3
        make_image(tmp_path / 'train' / 'cafe\u0301' / '0.png')
        _fails('another Unicode form', tmp_path)


def test_class_name_that_is_no_text(tmp_path):
    make_folder(tmp_path)
    try:
        make_image(Path(os.fsdecode(os.fsencode(tmp_path) + b'/train/\xff/0.png')))
    except OSError:
        pytest.skip('the file system refuses such names')
    _fails('not UTF-8', tmp_path)


def test_class_unknown_to_train(tmp_path):
    make_folder(tmp_path)
    (tmp_path / 'val' / 'bee').rename(tmp_path / 'val' / 'wasp')
    make_image(tmp_path / 'val' / 'Ant' / '0.png')
    assert "'val/Ant'" in _fails("'val/wasp'", tmp_path)


def test_one_class(tmp_path):
    _fails('two classes', make_folder(tmp_path, classes=('ant',)))


def test_val_lacks_classes(tmp_path):
    make_folder(tmp_path, classes=('ant', 'bee', 'cat'))
    shutil.rmtree(tmp_path / 'val' / 'bee')
    data = create_datasets(tmp_path)
    assert data.splits['val'].targets == [0, 0, 2, 2]
    assert data.warnings == ["'val' has no images of 1 of 3 classes: 'bee'."]
    shutil.rmtree(tmp_path / 'val' / 'cat')
    assert create_datasets(tmp_path).warnings == ["'val' has images of one class alone, 'ant'."]


def _damage(tmp_path):
    make_folder(tmp_path, count=3)
    bad = {}
    for name, content in {'bee/0.jpg': b'no image', 'bee/1.jpg': b'', 'ant/9.png': None}.items():
        file = tmp_path / 'train' / name
        if content is None:
            make_image(file, 99, (256, 256))
            content = file.read_bytes()[:2000]
        file.write_bytes(content)
        bad[name] = file
    (tmp_path / 'val' / 'bee' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    return [*bad, 'val/bee/gone.png']


def test_bad_images_are_named_at_once(tmp_path):
    bad = _damage(tmp_path)
    message = _fails('^4 images cannot be read', tmp_path)
    assert '--skip-bad' in message and all(name in message for name in bad)
    data = create_datasets(tmp_path, check_images=False)
    assert len(data.splits['train']) == 9
    with pytest.raises(ValueError, match=r'bee/0\.jpg|bee/1\.jpg|ant/9\.png'):
        list(data.splits['train'])


@pytest.mark.filterwarnings('error')
def test_huge_images_are_named(tmp_path, monkeypatch):
    """Pillow warns without a name, and refuses twice that."""
    make_folder(tmp_path)
    make_image(tmp_path / 'train' / 'bee' / 'huge.png', 50, (50, 50))
    file = make_image(tmp_path / 'val' / 'bee' / 'broken.png', 51, (50, 50))
    file.write_bytes(file.read_bytes()[:-900])
    make_image(tmp_path / 'val' / 'ant' / 'bomb.png', 52, (90, 90))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2000)
    message = _fails('^2 images cannot be read', tmp_path)
    assert 'val/bee/broken.png' in message and 'val/ant/bomb.png' in message and 'huge.png' not in message
    data = create_datasets(tmp_path, skip_bad=True)
    assert len(data.warnings) == 1 and 'train/bee/huge.png' in data.warnings[0] and '1 image has' in data.warnings[0]


def test_skip_bad(tmp_path):
    bad = _damage(tmp_path)
    data = create_datasets(tmp_path, skip_bad=True)
    assert len(data.splits['train']) == len(data.splits['val']) == 6 and len(data.skipped) == 4
    assert all(any(name in message for message in data.skipped) for name in bad)
    assert len(list(data.splits['train'])) == 6


def test_skip_bad_leaves_no_empty_class(tmp_path):
    make_folder(tmp_path)
    for file in (tmp_path / 'train' / 'bee').iterdir():
        file.write_text('no image')
    _fails("'bee'", tmp_path, skip_bad=True)


def test_arguments_come_before_images(tmp_path, monkeypatch):
    make_folder(tmp_path, classes=('ant',))
    monkeypatch.setattr(Image, 'open', lambda *args, **kwargs: pytest.fail('an image was opened'))
    _fails('two classes', tmp_path)


def test_val_is_train(tmp_path):
    make_folder(tmp_path, ('train',))
    (tmp_path / 'val').symlink_to('train')
    data = create_datasets(tmp_path)
    assert len(data.warnings) == 1 and "'val' is a link to the folder of 'train'" in data.warnings[0]


def test_copies(tmp_path):
    make_folder(tmp_path, ('train', 'test'))
    shutil.copytree(tmp_path / 'train', tmp_path / 'val')
    for i, file in enumerate(sorted((tmp_path / 'val').rglob('*.png'))):
        file.rename(file.parent / f'renamed{i}.png')
    shutil.copy(tmp_path / 'train' / 'ant' / '0.png', tmp_path / 'test' / 'ant' / '9.png')
    warnings = create_datasets(tmp_path).warnings
    assert len(warnings) == 3
    assert warnings[0].startswith("All 4 images of 'val' are in 'train' too")
    assert warnings[1].startswith("1 of 5 images of 'test' are in 'train' too")


def test_fingerprint(tmp_path):
    expected = create_datasets(make_folder(tmp_path / 'a')).fingerprint
    assert create_datasets(make_folder(tmp_path / 'b')).fingerprint == expected
    (tmp_path / 'b' / 'train' / 'ant' / '0.png').rename(tmp_path / 'b' / 'train' / 'ant' / '7.png')
    assert create_datasets(tmp_path / 'b').fingerprint != expected
    make_image(tmp_path / 'a' / 'train' / 'ant' / '0.png', 77, (17, 16))
    assert create_datasets(tmp_path / 'a').fingerprint != expected
    same_size = make_folder(tmp_path / 'd') / 'train' / 'ant' / '0.png'
    content = bytearray(same_size.read_bytes())
    content[-5] ^= 1  # of the last checksum, which Pillow does not look at
    same_size.write_bytes(content)
    assert create_datasets(tmp_path / 'd').fingerprint != expected
    renamed = make_folder(tmp_path / 'c')
    for split in ('train', 'val'):
        (renamed / split / 'bee').rename(renamed / split / 'bug')
    assert create_datasets(renamed).fingerprint != expected


def test_classes_of_a_model(tmp_path):
    make_folder(tmp_path)
    data = create_datasets(tmp_path, class_names=['bee', 'cat', 'ant'])
    assert data.splits['train'].targets == [2, 2, 0, 0] and data.class_names == ['bee', 'cat', 'ant']
    assert data.warnings[0] == "'train' has no images of 1 of 3 classes: 'cat'."
    assert 'The model' in _fails("'train/bee'", tmp_path, class_names=['ant', 'cat'])
    _fails("'ant'", tmp_path, class_names=['ant', 'ant', 'bee'])


def test_split(tmp_path):
    make_folder(tmp_path, ('train', 'validation', 'night'))
    shutil.rmtree(tmp_path / 'night' / 'ant')
    for split in ('val', 'validation', 'eval'):
        data = create_split(tmp_path, split)
        assert list(data.splits) == [split] and data.splits[split].targets == [0, 0, 1, 1]
    data = create_split(tmp_path, 'night')  # indices are those of the training set
    assert data.splits['night'].targets == [1, 1] and data.class_names == ['ant', 'bee']
    data = create_split(tmp_path / 'night', class_names=['bee', 'ant'])
    assert data.splits['test'].targets == [0, 0] and 'one class' in data.warnings[0]
    _fails("no 'test' folder.*'train', 'validation'", tmp_path, error=FileNotFoundError, make=create_split)
    _fails("'validation/bee'", tmp_path, 'val', class_names=['ant'], make=create_split)
    _fails('nowhere', tmp_path / 'nowhere', error=OSError, make=create_split)
    (tmp_path / 'night' / 'bee' / '0.png').write_text('no image')
    _fails('night/bee/0.png', tmp_path, 'night', make=create_split)
    assert len(create_split(tmp_path, 'night', skip_bad=True).splits['night']) == 1
    (tmp_path / 'none').mkdir()
    _fails('no class folders', tmp_path / 'none', make=create_split)


def test_image_list(tmp_path):
    path = make_image(tmp_path / 'a.png')
    dataset = ImageList([path], [0], ['a'], transform=lambda image: image.mode, input_img_mode='LA')
    assert dataset[0] == ('LA', 0) and dataset.filename(0) == str(path) and dataset.filename(0, True) == 'a.png'
    with pytest.raises(ValueError):
        ImageList([path], [0, 1], ['a'])
