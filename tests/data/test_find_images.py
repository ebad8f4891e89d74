"""Images that a user names: files, folders, patterns."""

import os
from pathlib import Path

import pytest
from image_folders import make_image

from timm_bilinear.data import find_images
from timm_bilinear.data.images import ImageError, open_image


def _names(images, root):
    return [str(path.relative_to(root)) for path in images]


def test_folder(tmp_path):
    for name in ('b/10.png', 'b/2.PNG', 'a.webp', '.hidden/a.png', 'c/.ipynb_checkpoints/a.png', 'c/._a.png'):
        make_image(tmp_path / name)
    (tmp_path / 'b' / 'notes.txt').touch()
    (tmp_path / 'Thumbs.db').touch()
    images, messages = find_images([tmp_path])
    assert _names(images, tmp_path) == ['a.webp', 'b/2.PNG', 'b/10.png']
    assert len(messages) == 1 and 'b/notes.txt' in messages[0]


def test_links(tmp_path):
    make_image(tmp_path / 'a' / 'x.png')
    make_image(tmp_path / 'b' / 'y.png')
    (tmp_path / 'a' / 'up').symlink_to(tmp_path)
    (tmp_path / 'a' / 'to_b').symlink_to(tmp_path / 'b')
    (tmp_path / 'b' / 'to_a').symlink_to(tmp_path / 'a')
    (tmp_path / 'self').symlink_to(tmp_path / 'self')
    images, messages = find_images([tmp_path])
    assert sorted(path.name for path in images) == ['x.png', 'y.png']
    assert any('up' in message for message in messages)
    (tmp_path / 'gone.png').symlink_to(tmp_path / 'nowhere')
    assert (tmp_path / 'gone.png') in find_images([tmp_path])[0]  # so that whoever reads it says so


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    make_image(tmp_path / 'a.png')
    images, messages = find_images([tmp_path])
    assert _names(images, tmp_path) == ['a.png'] and 'pipe.png' in messages[0]


def test_order_and_duplicates(tmp_path):
    files = [make_image(tmp_path / name) for name in ('2.png', '10.png', 'd/1.png')]
    images, messages = find_images([files[1], tmp_path / 'd', files[0], files[1]])
    assert images == [files[1], files[2], files[0], files[1]] and not messages
    assert find_images(str(files[0]))[0] == [files[0]]


@pytest.mark.parametrize(
    'pattern, expected',
    [
        ('*.png', ['1.png', '2.png', '10.png', 'a[1].png']),
        ('*', ['1.png', '2.png', '10.png', 'a[1].png', 'd/3.png', 'd/e/4.png']),
        ('**', ['1.png', '2.png', '10.png', 'a[1].png', 'd/3.png', 'd/e/4.png']),
        ('**/*.png', ['1.png', '2.png', '10.png', 'a[1].png', 'd/3.png', 'd/e/4.png']),
        ('?.png', ['1.png', '2.png']),
        ('a[1].png', ['a[1].png']),
        ('d/[0-9].png', ['d/3.png']),
    ],
)
def test_patterns(tmp_path, pattern, expected):
    for name in ('1.png', '2.png', '10.png', 'd/3.png', 'd/e/4.png', 'a[1].png'):
        make_image(tmp_path / name)
    (tmp_path / 'notes.txt').touch()
    images, messages = find_images([f'{tmp_path}/{pattern}'])
    assert _names(images, tmp_path) == expected
    assert len(messages) == (1 if pattern in ('*', '**') else 0)


@pytest.mark.parametrize('name', ['none.png', '*.gif', 'text.txt', ''])
def test_what_is_named_is_tried(tmp_path, name):
    (tmp_path / 'text.txt').touch()
    given = tmp_path / name if name else name  # an unset variable of a shell is not the working directory
    images, _ = find_images([given])
    assert images == [Path(given)]
    with pytest.raises(ImageError):
        open_image(images[0])


def test_folder_without_images(tmp_path):
    (tmp_path / 'empty').mkdir()
    images, messages = find_images([tmp_path / 'empty'])
    assert not images and 'empty' in messages[0]
