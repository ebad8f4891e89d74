"""Files of more than 8 bits whose levels Pillow leaves to the reader, and what is no file."""

import os
import struct

import numpy as np
import pytest
from PIL import Image

from timm_bilinear.data import ImageError, open_image

SHORT, LONG = 3, 4


def _tiff(values, white_is_zero=False, sample_format=1, order='<'):
    """A TIFF file of one strip, written by hand: Pillow writes neither inverted levels nor ones without a sign."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [
        (256, LONG, width),
        (257, LONG, height),
        (258, SHORT, values.dtype.itemsize * 8),
        (259, SHORT, 1),
        (262, SHORT, 0 if white_is_zero else 1),
        (273, LONG, 8 + 2 + 11 * 12 + 4),
        (277, SHORT, 1),
        (278, LONG, height),
        (279, LONG, len(data)),
        (284, SHORT, 1),
        (339, SHORT, sample_format),
    ]
    entries = b''
    for tag, kind, value in tags:
        entries += struct.pack(order + 'HHI', tag, kind, 1)
        entries += struct.pack(order + ('HH' if kind == SHORT else 'I'), *((value, 0) if kind == SHORT else (value,)))
    mark = b'II' if order == '<' else b'MM'
    head = mark + struct.pack(order + 'HIH', 42, 8, len(tags))
    return head + entries + struct.pack(order + 'I', 0) + data


def _levels(path, content):
    path.write_bytes(content)
    return np.asarray(open_image(path, 'L')).tolist()


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('white, expected', [(1.0, [0, 128, 255]), (255.0, [0, 128, 255]), (65535.0, [0, 128, 255])])
def test_portable_float_maps(tmp_path, order, white, expected):
    values = np.array([[0, 0.5 * white, white]], order + 'f4')
    content = f'Pf\n3 1\n{-1.0 if order == "<" else 1.0}\n'.encode() + values.tobytes()
    assert _levels(tmp_path / 'image.pfm', content) == [expected]


def test_32_bits_without_a_sign(tmp_path):
    values = np.array([[0, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1]], np.uint32)
    assert _levels(tmp_path / 'image.tif', _tiff(values)) == [[0, 127, 128, 191, 255]]
    assert _levels(tmp_path / 'image.tif', _tiff(values // 2**24)) == [[0, 127, 128, 192, 255]]
    signed = np.array([[-5, 0, 100, 255]], np.int32)
    for order in '<>':
        assert _levels(tmp_path / 'image.tif', _tiff(signed, sample_format=2, order=order)) == [[0, 0, 100, 255]]


@pytest.mark.parametrize('white_is_zero', [False, True])
def test_white_is_zero(tmp_path, white_is_zero):
    """In 16 bits and floating point as Pillow has it in 8."""
    eight = np.array([[0, 1, 100, 254, 255]], np.uint8)
    judge = np.asarray(Image.open(_write(tmp_path / 'judge.tif', _tiff(eight, white_is_zero)))).tolist()
    assert judge[0][0] == (255 if white_is_zero else 0)
    assert _levels(tmp_path / 'image.tif', _tiff(eight, white_is_zero)) == judge
    assert _levels(tmp_path / 'image.tif', _tiff(eight.astype(np.uint16) * 257, white_is_zero)) == judge
    for order in '<>':
        content = _tiff(eight.astype(np.float32) / 255, white_is_zero, 3, order)
        assert _levels(tmp_path / 'image.tif', content) == judge


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes')
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    for path in (tmp_path / 'pipe.png', '/dev/zero'):
        with pytest.raises(ImageError, match='it is no file'):
            open_image(path)


@pytest.mark.parametrize('source', [np.zeros((4, 4, 3), np.uint8), b'\x89PNG', None, 3, [Image.new('L', (2, 2))]])
def test_what_is_no_source(source):
    with pytest.raises(TypeError, match=r'file name.*Pillow') as e:
        open_image(source)
    assert type(source).__name__ in str(e.value)
