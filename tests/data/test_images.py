"""Images as they are opened, against torchvision's decoders and arithmetic written out here."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_image

from timm_bilinear.data.images import IMG_MODES, ImageError, image_extensions, name_key, open_image

pytestmark = pytest.mark.filterwarnings('ignore:The image decoding and encoding capabilities of TorchVision')

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 11, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (9, 11), dtype=np.uint8)


def _array(image):
    return np.asarray(image).astype(np.int64)


def _white(colour, alpha):
    """Blended onto white, by the definition."""
    alpha = alpha[..., None] / 255 if colour.ndim == 3 else alpha / 255
    return np.floor(colour * alpha + 255 * (1 - alpha) + 0.5).astype(np.int64)


def _png(width, height, bits, colour_type, rows, key=None):
    """A PNG file written by hand: Pillow writes neither 16-bit colours nor their keys."""

    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, 0))
    data += chunk(b'tRNS', key) if key else b''
    data += chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows)))
    return io.BytesIO(data + chunk(b'IEND', b''))


def _of_mode(mode):
    image = Image.fromarray(PIXELS)
    if mode in ('La', 'RGBa'):
        return image.convert({'La': 'LA', 'RGBa': 'RGBA'}[mode]).convert(mode)
    if mode == 'PA':
        return image.convert('P').convert('PA')
    if mode == 'LAB':
        return Image.frombytes('LAB', image.size, PIXELS.tobytes())
    if mode.startswith('I;16'):
        grey = np.asarray(image.convert('L')).astype('>u2' if mode[-1] == 'B' else '<u2') * 257
        return Image.frombytes(mode, image.size, grey.astype('>u2' if mode[-1] == 'B' else '<u2').tobytes())
    return image.convert('L').convert(mode) if mode in ('I', 'F') else image.convert(mode)


MODES = ['1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F']


@pytest.mark.parametrize('mode', [*MODES, 'I;16', 'I;16B', 'I;16L', 'I;16N'])
def test_every_mode(mode):
    image = _of_mode(mode)
    before = image.copy()
    for wanted in IMG_MODES.values():
        opened = open_image(image, wanted)
        assert opened.mode == wanted and opened.size == (11, 9)
        if wanted.endswith('A'):
            assert opened.getchannel('A').getextrema() == (255, 255)
    assert image == before
    grey = _array(Image.fromarray(PIXELS).convert('L'))
    if mode in ('L', 'LA', 'La', 'I', 'F') or mode.startswith('I;16'):
        assert (_array(open_image(image, 'L')) == grey).all()
    elif mode in ('RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK'):
        assert (_array(open_image(image)) == PIXELS).all()


@pytest.mark.parametrize('extension', ['png', 'tiff', 'jp2', 'pgm'])
def test_16_bits(tmp_path, extension):
    values = RNG.integers(0, 65536, (9, 11), dtype=np.uint16)
    values[0, :2] = 0, 65535
    file = tmp_path / f'image.{extension}'
    Image.fromarray(values).save(file, **({'irreversible': False} if extension == 'jp2' else {}))
    expected = np.round(values.astype(np.float64) * 255 / 65535)
    assert (_array(open_image(file, 'L')) == expected).all()
    assert (_array(open_image(file)) == expected[..., None]).all()
    if extension == 'png':
        judge = decode_image(str(file)).to(torch.float64).div(257).round()
        assert (_array(open_image(file, 'L')) == judge[0].numpy()).all()


def test_dark_16_bits_stay_dark(tmp_path):
    """The white of a file of 16 bits does not depend on what is in it."""
    file = tmp_path / 'dark.png'
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(file)
    assert open_image(file, 'L').getextrema() == (1, 1)
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / 'dark.pgm')
    assert open_image(tmp_path / 'dark.pgm', 'L').getextrema() == (1, 1)


@pytest.mark.parametrize(
    'values, expected',
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 25700.0, 65535.0]], np.float32), [0, 100, 255]),
        (np.array([[-3.0, np.nan, np.inf]], np.float32), [0, 0, 255]),
        (np.array([[-5, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 64, 127]),
    ],
)
def test_levels_without_a_fixed_white(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / 'image.tiff')
    assert _array(open_image(tmp_path / 'image.tiff', 'L')).tolist() == [expected]


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('extension', ['jpg', 'png', 'webp', 'tiff'])
def test_orientation(tmp_path, orientation, extension):
    """Against torchvision's decoder; TIFF, which it does not read, against PNG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)))
    file = tmp_path / f'image.{extension}'
    image.save(file, exif=exif, **({'lossless': True} if extension == 'webp' else {}))
    opened = open_image(file)
    assert open_image(opened) == opened  # not turned a second time
    if extension in ('jpg', 'png'):
        judge = decode_image(str(file), ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
    else:
        image.save(tmp_path / 'judge.png', exif=exif)
        judge = decode_image(str(tmp_path / 'judge.png'), apply_exif_orientation=True).permute(1, 2, 0).numpy()
    assert opened.size == judge.shape[1::-1]
    assert np.abs(_array(opened) - judge).max() <= (2 if extension == 'jpg' else 0)
    assert (_array(open_image(Image.open(file))) == _array(opened)).all()


def test_damaged_exif(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / 'image.png', exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
    assert (_array(open_image(tmp_path / 'image.png')) == PIXELS).all()


@pytest.mark.parametrize('extension', ['png', 'webp', 'tiff'])
def test_transparent_is_white(tmp_path, extension):
    rgba = np.dstack([PIXELS, ALPHA])
    file = tmp_path / f'image.{extension}'
    options = {'lossless': True, 'exact': True} if extension == 'webp' else {}
    Image.fromarray(rgba).save(file, **options)
    assert np.abs(_array(open_image(file)) - _white(PIXELS, ALPHA)).max() <= 1
    assert (_array(open_image(file, 'RGBA')) == rgba).all()
    on_white = Image.fromarray(_white(PIXELS, ALPHA).astype(np.uint8))
    assert np.abs(_array(open_image(file, 'L')) - _array(on_white.convert('L'))).max() <= 1


def test_transparent_grey(tmp_path):
    grey = PIXELS[..., 0]
    Image.merge('LA', [Image.fromarray(grey), Image.fromarray(ALPHA)]).save(tmp_path / 'image.png')
    opened = open_image(tmp_path / 'image.png')
    assert (_array(opened)[..., 0] == _white(grey, ALPHA)).all()
    assert (_array(open_image(tmp_path / 'image.png', 'LA')) == np.dstack([grey, ALPHA])).all()


@pytest.mark.parametrize('transparency', [3, bytes([255, 0, 128, 7])])
def test_transparent_palette(tmp_path, transparency):
    index = (ALPHA % 4).astype(np.uint8)
    image = Image.fromarray(index).convert('P')
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / 'image.png', transparency=transparency)
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]])
    alphas = np.array(list(transparency) if isinstance(transparency, bytes) else [255, 255, 255, 0])
    assert (_array(open_image(tmp_path / 'image.png')) == _white(palette[index], alphas[index])).all()
    judge = decode_image(str(tmp_path / 'image.png'), ImageReadMode.RGB_ALPHA).permute(1, 2, 0).numpy()
    assert (_array(open_image(tmp_path / 'image.png', 'RGBA')) == judge).all()


def test_transparent_colour_of_gif(tmp_path):
    image = Image.fromarray((ALPHA % 2).astype(np.uint8)).convert('P')
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / 'image.gif', transparency=1)
    expected = np.array([[255, 0, 0], [255, 255, 255]])[ALPHA % 2]
    assert (_array(open_image(tmp_path / 'image.gif')) == expected).all()


@pytest.mark.parametrize('bits, key', [(1, 1), (2, 2), (4, 11), (8, 100), (16, 40000)])
def test_transparent_grey_level(bits, key):
    """A key counts in the bits of the file (PNG specification, 11.3.2.1); torchvision's decoder ignores it."""
    levels = [key, 0, key - 1, 2**bits - 1]
    row = bytes([sum(v << (8 - bits * (i + 1)) for i, v in enumerate(levels[: 8 // bits]))]) if bits < 8 else b''
    row = row or b''.join(struct.pack('>H' if bits == 16 else 'B', v) for v in levels)
    width = 8 // bits if bits < 8 else 4
    if bits == 1:
        row, width = b'\xa0', 4
        levels = [1, 0, 1, 0]
    file = _png(width, 1, bits, 0, [row], struct.pack('>H', key))
    expected = [255 if v == key else round(v * 255 / (2**bits - 1)) for v in levels[:width]]
    assert _array(open_image(file, 'L'))[0].tolist() == expected


@pytest.mark.parametrize('bits', [8, 16])
def test_transparent_colour(bits):
    code, unit = ('>3H', 257) if bits == 16 else ('3B', 1)
    colours = [(10, 20, 30), (10, 20, 31), (0, 0, 0)]
    row = b''.join(struct.pack(code, *(v * unit for v in colour)) for colour in colours)
    key = struct.pack('>3H', *(v * unit for v in colours[0]))
    assert _array(open_image(_png(3, 1, bits, 2, [row], key)))[0].tolist() == [[255] * 3, [10, 20, 31], [0] * 3]


FORMATS = [
    'avif',
    'bmp',
    'dib',
    'gif',
    'ico',
    'jp2',
    'jpg',
    'pcx',
    'png',
    'ppm',
    'qoi',
    'sgi',
    'tga',
    'tif',
    'webp',
]


@pytest.mark.parametrize('extension', FORMATS)
def test_formats(tmp_path, extension):
    if extension == 'avif' and not features.check('avif'):
        pytest.skip('Pillow without AVIF')
    Image.new('RGB', (16, 16), (250, 120, 0)).save(tmp_path / f'image.{extension}')
    assert f'.{extension}' in image_extensions()
    assert np.abs(_array(open_image(tmp_path / f'image.{extension}')) - [250, 120, 0]).max() <= 8


def test_pictures_of_telephones(tmp_path):
    """JPEG files with a second picture inside, and CMYK as Adobe's programs write it, inverted."""
    frames = [Image.new('RGB', (640, 480), c) for c in ((250, 10, 10), (10, 10, 250))]
    frames[0].save(tmp_path / 'image.jpg', format='MPO', save_all=True, append_images=frames[1:])
    for min_size in (None, 60):
        opened = open_image(tmp_path / 'image.jpg', min_size=min_size)
        assert np.abs(_array(opened) - [250, 10, 10]).max() <= 4
        assert opened.size == ((640, 480) if min_size is None else (80, 60))
    Image.new('CMYK', (16, 16), (0, 255, 255, 0)).save(tmp_path / 'cmyk.jpg')
    assert np.abs(_array(open_image(tmp_path / 'cmyk.jpg')) - [255, 0, 0]).max() <= 4


def test_what_is_no_image_format():
    assert not image_extensions() & {'.pdf', '.eps', '.ps', '.mpg', '.mpeg', '.h5', '.hdf', '.grib', '.bufr', '.wmf'}
    assert {'.jpe', '.jfif', '.mpo', '.apng', '.tiff', '.pfm'} <= image_extensions()


def test_ghostscript_is_not_started(tmp_path):
    (tmp_path / 'image.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    with pytest.raises(ImageError, match='no image format'):
        open_image(tmp_path / 'image.jpg')


def test_first_frame(tmp_path):
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    for extension in ('gif', 'tiff', 'png', 'webp'):
        options = {'lossless': True} if extension == 'webp' else {}
        frames[0].save(tmp_path / f'image.{extension}', save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / f'image.{extension}').getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    'name, content, reason',
    [
        ('empty.png', b'', 'no image format'),
        ('text.jpg', b'no image', 'no image format'),
        ('folder.png', None, 'is a folder'),
        ('none.png', ..., 'does not exist'),
        ('flat.bmp', b'BM' + struct.pack('<IHHIIiiHHIIIIII', 54, 0, 0, 54, 40, 0, 5, 1, 24, 0, 0, 0, 0, 0, 0), ''),
    ],
)
def test_unreadable(tmp_path, name, content, reason):
    if content is None:
        (tmp_path / name).mkdir()
    elif content is not ...:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f'{name}.*{reason}') as e:
        open_image(tmp_path / name)
    assert str(e.value).endswith('.') and '\n' not in str(e.value)


@pytest.mark.parametrize('extension', ['jpg', 'png', 'webp', 'tiff', 'bmp'])
@pytest.mark.parametrize('min_size', [None, 1])
def test_truncated(tmp_path, extension, min_size):
    file = tmp_path / f'image.{extension}'
    Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ImageError, match=f'image.{extension}'):
        open_image(file, min_size=min_size)


def test_bomb(tmp_path, monkeypatch):
    Image.new('L', (100, 100)).save(tmp_path / 'huge.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)
    with pytest.raises(ImageError, match=r'huge\.png.*10000 pixels'):
        open_image(tmp_path / 'huge.png')


@pytest.mark.parametrize('size', [(2001, 2), (1, 5000)])
def test_too_narrow(tmp_path, size):
    """Resized for a model, it would take gigabytes."""
    Image.new('L', size).save(tmp_path / 'line.png')
    with pytest.raises(ImageError, match=rf'line\.png.*{size[0]} x {size[1]}'):
        open_image(tmp_path / 'line.png')
    assert open_image(Image.new('L', (2000, 2))).size == (2000, 2)


def test_names(tmp_path):
    for name in (' blank .PNG', 'Ünïcode.png', 'new\nline.png', "it's.png"):
        Image.fromarray(PIXELS).save(tmp_path / name, format='png')
        assert open_image(str(tmp_path / name)).size == (11, 9)
    bad = os.path.join(os.fsencode(tmp_path), b'a\xff\nb.png')
    with open(bad, 'wb'):
        pass
    with pytest.raises(ImageError) as e:
        open_image(os.fsdecode(bad))
    assert str(e.value).isprintable()


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match='CMYK'):
        open_image(Image.new('L', (2, 2)), 'CMYK')
    with pytest.raises(ValueError, match='min_size'):
        open_image(Image.new('L', (2, 2)), min_size=0)


@pytest.mark.parametrize('size', [(1600, 1200), (1200, 1600), (300, 40), (1602, 1200), (1600, 1201)])
@pytest.mark.parametrize('min_size', [1, 50, 300, 601, 5000])
def test_draft(tmp_path, size, min_size):
    """The shorter edge keeps what it must, and what is reduced by a filter of one's own hardly changes."""
    gradient = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None] * np.array([1, 2, 3]) // 8 % 256
    image = Image.fromarray(gradient.astype(np.uint8)).resize(size)
    image.save(tmp_path / 'image.jpg', quality=95)
    whole, draft = open_image(tmp_path / 'image.jpg'), open_image(tmp_path / 'image.jpg', min_size=min_size)
    assert min(draft.size) >= min(min_size, *size)
    factor = round(size[0] / draft.size[0])
    fits = [f for f in (2, 4, 8) if min(size) // f >= min_size and size[0] % f == size[1] % f == 0]
    assert factor == max(fits, default=1) and draft.size == (size[0] // factor, size[1] // factor)
    reduced = [image.resize((20, 15), Image.Resampling.BOX) for image in (whole, draft)]
    assert np.abs(_array(reduced[0]) - _array(reduced[1])).mean() < 3


def test_order_of_names():
    names = ['a10', 'a2', 'A2', 'a02', 'b', 'B', '²', '1', '01', '']
    expected = sorted(names, key=name_key)
    names.reverse()
    assert expected == sorted(names, key=name_key)
    assert expected == ['', '01', '1', 'A2', 'a02', 'a2', 'a10', 'B', 'b', '²']
