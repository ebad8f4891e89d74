import pytest
from PIL import Image

from timm_bilinear.data.folder import create_datasets


def _make(root, splits=('train', 'val'), classes=('ant', 'bee'), count=2):
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (16, 16), (40 * i, 0, 0)).save(folder / f'{i}.jpg')
    return root


def test_splits_and_classes(tmp_path):
    datasets = create_datasets(_make(tmp_path, ('train', 'validation', 'test')))
    assert {split: len(dataset) for split, dataset in datasets.items()} == {'train': 4, 'val': 4, 'test': 4}
    assert datasets['val'].reader.class_to_idx == {'ant': 0, 'bee': 1}


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        create_datasets(tmp_path / 'nowhere')


def test_missing_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="'val'"):
        create_datasets(_make(tmp_path, ('train',)))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_empty_class_folder(tmp_path, split):
    _make(tmp_path)
    folder = tmp_path / split / 'bee'
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f'{split}/bee'):
        create_datasets(tmp_path)


def test_no_images_at_all(tmp_path):
    with pytest.raises(ValueError, match='0 images'):
        create_datasets(_make(tmp_path, count=0))


def test_class_unknown_to_train(tmp_path):
    _make(tmp_path)
    (tmp_path / 'val' / 'bee').rename(tmp_path / 'val' / 'wasp')
    with pytest.raises(ValueError, match='val/wasp'):
        create_datasets(tmp_path)


@pytest.mark.parametrize('content', ['text', 'truncated'])
def test_unreadable_image(tmp_path, content):
    _make(tmp_path)
    file = tmp_path / 'train' / 'bee' / '1.jpg'
    if content == 'text':
        file.write_text('no image')
    else:
        Image.effect_noise((256, 256), 50).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r'train/bee/1\.jpg'):
        create_datasets(tmp_path)
