"""A small font-recognition set, rendered from the font packages of the `demo` extra.

A class is a family; weights, sizes, colours, position and words vary. Test words are none of the training words.
"""

import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import List, Tuple, Union

from PIL import Image, ImageDraw
from tqdm import tqdm

__all__ = ['FAMILIES', 'render_dataset', 'render_text']

FAMILIES = (
    'anton',
    'bitter',
    'dancing-script',
    'eb-garamond',
    'inter',
    'lobster',
    'montserrat',
    'open-sans',
    'oswald',
    'playfair-display',
    'roboto',
    'roboto-mono',
)
_WEIGHTS = (400, 500, 600, 700)
_WORDS = (
    'Autumn Bridge Candle Desert Engine Forest Garden Harbor Island Jungle Kitchen Lantern Mirror Number Orchard '
    'Pepper Quarter River Silver Timber Uncle Valley Window Yellow Zebra anchor basket copper dragon embers fabric '
    'ginger hammer insect jacket kettle ladder magnet needle oyster pencil quartz ribbon saddle tunnel urchin velvet '
    'walnut yonder zigzag Almond Bottle Circle Dinner Eleven Flower Guitar Honey Indigo Jigsaw Knight Lemon Marble '
    'Nectar Onion Planet Queen Rabbit Summer Travel Upper Violin Winter Young Zinc apple bright cloudy double eager '
    'fluffy golden heavy inner jolly keen light merry noble open proud quick rough sharp tender useful vivid warm '
    'exact young zesty Brick Chalk Drift Eight Frost Globe House Juice Knife Light Music Night Ocean Piano Quiet Right '
    'Storm Train Umber Voice Wheat Youth'
).split()
_SPLITS = {'train': (0, 90), 'val': (90, 108), 'test': (108, len(_WORDS))}  # words of each split, once shuffled


def _words(split: str) -> List[str]:
    words = sorted(set(_WORDS))
    random.Random(0).shuffle(words)
    return words[slice(*_SPLITS[split])]


def _colors(rng: random.Random) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """Text and background colours whose luminance is at least 80 apart."""
    while True:
        a, b = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if abs(sum((x - y) * w for x, y, w in zip(a, b, (0.299, 0.587, 0.114)))) >= 80:
            return a, b


def render_text(family: str, words: List[str], size: int, rng: random.Random) -> Image.Image:
    """Three lines of large text, cut by the border of a square image.

    Args:
        family: Slug of a `fontpkg` family.
        words: Words to draw from.
        size: Height and width of the image in pixels.
        rng: Source of everything random.

    Raises:
        ValueError: If the family's package is not installed.
    """
    try:
        from fontpkg import FontpkgError
        from fontpkg.pil import truetype
    except ImportError as e:
        raise ValueError("Fonts come with the 'demo' extra: pip install 'timm_bilinear[demo]'.") from e
    try:
        font = truetype(family, size * rng.uniform(0.26, 0.36), weight=rng.choice(_WEIGHTS), nearest=True)
    except FontpkgError as e:
        raise ValueError(f"Font package 'fontpkg-{family}' is not installed: {e}") from e
    text_color, background = _colors(rng)
    image = Image.new('RGB', (size, size), background)
    text = '\n'.join(' '.join(rng.sample(words, 2)) for _ in range(3))
    position = (-rng.uniform(0, 0.4) * size, size * rng.uniform(-0.15, 0.05))
    ImageDraw.Draw(image).multiline_text(position, text, fill=text_color, font=font, spacing=size * 0.02)
    noise = Image.frombytes('L', (size, size), rng.randbytes(size * size)).convert('RGB')
    return Image.blend(image, noise, rng.uniform(0, 0.15))


def _render_class(root: Path, split: str, family: str, count: int, size: int):
    rng = random.Random(f'{split}/{family}')
    folder = root / split / family
    folder.mkdir(parents=True)
    words = _words(split)
    for i in range(count):
        render_text(family, words, size, rng).save(folder / f'{i:04d}.jpg', quality=90)


def render_dataset(root: Union[str, Path], train: int, val: int, test: int, size: int) -> Path:
    """Render an image folder of all families, or keep the one that is there.

    Args:
        root: Folder to make; it appears once it is whole.
        train: Images per family in the training split.
        val: Images per family in the validation split.
        test: Images per family in the test split.
        size: Height and width of the images in pixels.

    Returns:
        `root`.

    Raises:
        ValueError: If a font package is not installed.
        OSError: If images cannot be written.
    """
    root = Path(root)
    if root.is_dir():
        return root
    partial = root.with_name(f'.{root.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with ProcessPoolExecutor() as pool:
            jobs = [
                pool.submit(_render_class, partial, split, family, count, size)
                for split, count in (('train', train), ('val', val), ('test', test))
                for family in FAMILIES
            ]
            for job in tqdm(jobs, desc='Rendering fonts', unit='class'):
                job.result()
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root
