import random

import pytest
from PIL import ImageChops

from timm_bilinear import fonts
from timm_bilinear.image_folder import create_datasets


def test_words_of_splits_are_disjoint():
    words = [set(fonts._words(split)) for split in ('train', 'val', 'test')]
    assert all(len(w) >= 10 for w in words)
    assert not (words[0] & words[1] or words[0] & words[2] or words[1] & words[2])


def test_families_render_differently():
    images = [fonts.render_text(f, ['Bridge', 'quick'], 96, random.Random(3)) for f in fonts.FAMILIES]
    assert len(images) >= 12
    for i, a in enumerate(images):
        for b in images[:i]:
            assert ImageChops.difference(a, b).getbbox()


def test_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, 'FAMILIES', fonts.FAMILIES[:3])
    root = fonts.render_dataset(tmp_path / 'fonts', train=3, val=2, test=1, size=64)
    assert {k: len(v) for k, v in create_datasets(root).items()} == {'train': 9, 'val': 6, 'test': 3}
    again = fonts.render_dataset(tmp_path / 'again', train=3, val=2, test=1, size=64)
    for file in root.rglob('*.jpg'):
        assert file.read_bytes() == (again / file.relative_to(root)).read_bytes()


def test_missing_font_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, 'FAMILIES', ('roboto', 'no-such-font'))
    with pytest.raises(ValueError, match='no-such-font'):
        fonts.render_dataset(tmp_path / 'fonts', train=1, val=1, test=1, size=32)
    assert list(tmp_path.iterdir()) == []
