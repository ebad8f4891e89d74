import os
import random
import shutil
from pathlib import Path

import pytest
import render as fonts
import torch
from PIL import Image, ImageChops
from texts import CHARACTERS, SPLITS, random_text
from timm.data import create_loader

from timm_bilinear.data.folder import create_datasets


@pytest.fixture(scope='module')
def faces():
    return fonts.demo_fonts()


@pytest.fixture
def folder(tmp_path, faces):
    """Two families with a font each."""
    for name in ('anton', 'lobster'):
        path = Path(faces[name][0].path)
        (tmp_path / 'fonts' / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / 'fonts' / name / f'{name}-latin-400-normal{path.suffix}')
    return tmp_path / 'fonts'


def test_texts_of_splits_are_disjoint():
    texts = {s: {random_text(s, i, random.Random(f'{s}{i}')) for i in range(1150)} for s in SPLITS}
    assert all(len(texts[s]) > 1000 for s in SPLITS)
    assert not (texts['train'] & texts['val'] or texts['train'] & texts['test'] or texts['val'] & texts['test'])
    assert set(''.join(''.join(t) for t in texts.values())) <= {*CHARACTERS, ' '}


def test_texts_have_the_protocols_mix():
    train = [random_text('train', i, random.Random(i)) for i in range(575)]
    assert [sum(f(t) for t in train) for f in (lambda t: t[0] == '$', lambda t: t[-1] == '%')] == [25, 25]
    sentences = [t for t in train if any(c.isalpha() for c in t)]
    assert len(sentences) == 500 and all(20 <= len(t) <= 100 for t in sentences)


def test_every_image_has_its_font_and_contrast(faces):
    images = {}
    for name, choices in faces.items():
        images[name] = fonts.render_text(choices[0], 'Bridge and quick 37', random.Random(3), render=448, noise=0)
        assert images[name].height == 224
        grey = images[name].convert('L').getextrema()
        assert grey[1] - grey[0] >= 79  # of 80, less the rounding of luminance
    names = list(images)
    assert len(names) == 12
    for i, a in enumerate(names):
        for b in names[:i]:
            assert images[a].size != images[b].size or ImageChops.difference(images[a], images[b]).getbbox()


def test_noise_and_padding(faces):
    face = faces['inter'][0]
    clean = fonts.render_text(face, 'Level 12', random.Random(0), render=448, noise=0)
    noisy = fonts.render_text(face, 'Level 12', random.Random(0), render=448)
    pixels = [torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).float() for x in (clean, noisy)]
    middle = (pixels[0] > 90) & (pixels[0] < 165)  # where nothing is clipped
    if middle.any():
        assert (pixels[1] - pixels[0])[middle].std().item() == pytest.approx(25.5, rel=0.05)
    assert (pixels[1] - pixels[0]).std() > 10
    square = fonts.pad_square(Image.new('RGB', (100, 40), 'white'), 50)
    assert square.size == (50, 50) and square.getpixel((25, 2)) == (0, 0, 0) and square.getpixel((25, 25)) == (255,) * 3


def test_dataset_in_timms_loader(faces):
    few = {k: faces[k] for k in ('anton', 'lobster')}
    dataset = fonts.FontDataset(few, 'train', 4, size=32, render=64)
    assert len(dataset) == 8 and dataset.image(5).tobytes() == dataset.image(5).tobytes()
    loader = create_loader(dataset, (3, 32, 32), 8, use_prefetcher=False, num_workers=2)
    images, targets = next(iter(loader))
    assert images.shape == (8, 3, 32, 32) and targets.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="'split' must be one of train, val, test"):
        fonts.FontDataset(few, 'valid', 4)


def test_image_folder_is_deterministic_and_resumable(tmp_path, folder):
    classes, families, skipped = fonts.find_fonts(folder)
    assert families == {'anton-latin-400-normal': 'anton', 'lobster-latin-400-normal': 'lobster'} and not skipped
    args = dict(fonts=classes, counts=dict(train=3, val=2, test=1), size=32, train_render=64, workers=2)
    root = fonts.render_dataset(tmp_path / 'a', **args)
    assert {k: len(v) for k, v in create_datasets(root).splits.items()} == {'train': 6, 'val': 4, 'test': 2}

    again = fonts.render_dataset(tmp_path / 'b', **args)
    files = sorted(p.relative_to(root) for p in root.rglob('*.*g'))
    assert len(files) == 12
    (again / files[0]).unlink()
    kept = os.stat(again / files[1]).st_mtime_ns
    fonts.render_dataset(again, **args)
    assert os.stat(again / files[1]).st_mtime_ns == kept
    for file in files:
        assert (root / file).read_bytes() == (again / file).read_bytes()

    with pytest.raises(ValueError, match='other arguments or fonts'):
        fonts.render_dataset(root, **dict(args, seed=1))
    with pytest.raises(ValueError, match=r'no fonts\.json'):
        fonts.render_dataset(folder, **args)


def test_bad_fonts_are_skipped_by_name(tmp_path, folder):
    (folder / 'anton' / 'broken.woff2').write_bytes(b'wOF2 no font')
    classes, _, skipped = fonts.find_fonts(folder)
    assert len(classes) == 2 and len(skipped) == 1 and 'broken.woff2' in skipped[0]
    with pytest.raises(FileNotFoundError, match='nowhere'):
        fonts.find_fonts(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='no usable font'):
        fonts.find_fonts(tmp_path / 'empty')


@pytest.mark.parametrize('name', ['anton', 'inter'])  # Inter has signs of its own in the private use area
def test_missing_characters_are_named(faces, monkeypatch, name):
    fonts.check_face(faces[name][0])
    monkeypatch.setattr(fonts, 'CHARACTERS', CHARACTERS + '漢')
    with pytest.raises(ValueError, match=r'has no 漢$'):
        fonts.check_face(faces[name][0])


@pytest.mark.parametrize('bad', [dict(size=0), dict(train_render=0), dict(counts=dict(train=-3))])
def test_bad_sizes_leave_nothing(tmp_path, faces, bad):
    args = dict(dict(counts=dict(train=1), size=32, train_render=64), **bad)
    with pytest.raises(ValueError, match=f"'{'train' if 'counts' in bad else next(iter(bad))}' must be at least 1"):
        fonts.render_dataset(tmp_path / 'images', {'anton': faces['anton']}, **args)
    assert not (tmp_path / 'images').exists()
