"""Images of text in many fonts, by the protocol of GoogleFontsBench (https://arxiv.org/abs/2602.13889).

Text wrapped to 8 line heights, a fifth of its spaces turned into line breaks, random alignment, text and background
colours with luminance at least 80 apart, rendered large and reduced by Lanczos to 224 px height, Gaussian noise of
sigma 25.5 per channel; for the network padded to a square with black and resized.
"""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from texts import CHARACTERS, SPLITS, random_text
from torch.utils.data import Dataset
from tqdm import tqdm

__all__ = [
    'Face',
    'FontDataset',
    'check_face',
    'demo_fonts',
    'find_fonts',
    'pad_square',
    'render_dataset',
    'render_text',
]

_DEMO_FAMILIES = (
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
_DEMO_WEIGHTS = (400, 500, 600, 700)
_HEIGHT = 224  # at which noise is added
_NOISE = 25.5
_WIDTH = 8  # of a block of text, in line heights
_MARGIN = 0.1  # beside the text, in line heights
_RENDER = {'train': 448, 'val': 1024, 'test': 1024}  # height of the first rendering


@dataclass(frozen=True)
class Face:
    """A font file, and the weight at which a variable one is used.

    Args:
        path: Font file of any format that FreeType reads.
        weight: Value of the weight axis; None for static fonts.
    """

    path: str
    weight: Optional[int] = None

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels per em.

        Raises:
            OSError: If FreeType cannot read the file.
        """
        return _load(self, size)


@lru_cache(maxsize=256)
def _load(face: Face, size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(face.path, size)
    if face.weight is not None:
        axes = font.get_variation_axes()
        font.set_variation_by_axes([face.weight if a['name'] == b'Weight' else a['default'] for a in axes])
    return font


def check_face(face: Face):
    """Check that a font can be read and has every character that texts are made of.

    Raises:
        ValueError: If not, naming file and characters.
    """
    try:
        font = face.at(32)
        absent = bytes(font.getmask('\uffff'))  # what is drawn for a character that no font has
        missing = [c for c in CHARACTERS if bytes(font.getmask(c)) == absent or font.getmask(c).getbbox() is None]
    except OSError as e:
        raise ValueError(f"Cannot read font '{face.path}': {e}") from e
    if missing:
        raise ValueError(f"Font '{face.path}' has no {' '.join(missing)}")


def find_fonts(root: Union[str, Path]) -> Tuple[Dict[str, List[Face]], Dict[str, str], List[str]]:
    """Fonts of a folder, one class per file.

    Args:
        root: Folder with font files (.woff2, .woff, .ttf, .otf), at any depth.

    Returns:
        Faces by class, the file's name without extension; family by class, the name of the file's folder; and what was
        left out, a sentence for each font that is broken or lacks characters.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has no usable font, or two of one name.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"Font folder '{root}' does not exist.")
    fonts: Dict[str, List[Face]] = {}
    families: Dict[str, str] = {}
    skipped: List[str] = []
    for path in sorted(p for p in root.rglob('*') if p.suffix.lower() in ('.woff2', '.woff', '.ttf', '.otf')):
        if path.stem in fonts:
            raise ValueError(f"Fonts '{fonts[path.stem][0].path}' and '{path}' have the same name.")
        face = Face(str(path.resolve()))
        try:
            check_face(face)
        except ValueError as e:
            skipped.append(str(e))
            continue
        fonts[path.stem] = [face]
        families[path.stem] = path.parent.name
    if not fonts:
        raise ValueError(f"Font folder '{root}' has no usable font{': ' if skipped else '.'}{'; '.join(skipped[:3])}")
    return fonts, families, skipped


def demo_fonts() -> Dict[str, List[Face]]:
    """Faces of the `demo` extra's font packages, all weights of a family in one class.

    Raises:
        ValueError: If a package is not installed.
    """
    try:
        import fontpkg
    except ImportError as e:
        raise ValueError("Fonts come with the 'demo' extra: pip install 'timm_bilinear[demo]'.") from e
    fonts = {}
    for name in _DEMO_FAMILIES:
        try:
            files = [f for f in fontpkg.family(name).files if f.style == 'normal']
        except fontpkg.FontpkgError as e:
            raise ValueError(f"Font package 'fontpkg-{name}' is not installed: {e}") from e
        fonts[name] = [Face(str(f.path), w) for f in files if f.variable for w in _DEMO_WEIGHTS if f.covers(w)]
        fonts[name] += [Face(str(f.path)) for f in files if not f.variable and f.weight in _DEMO_WEIGHTS]
    return fonts


def _wrap(text: str, face: Face, rng: random.Random) -> List[str]:
    """Lines of a text, a fifth of its spaces being breaks and the rest wrapped to the width."""
    font = face.at(100.0)
    width = _WIDTH * sum(font.getmetrics())
    lines = ['']
    for word in text.split(' '):
        longer = f'{lines[-1]} {word}'.lstrip()
        if lines[-1] and (rng.random() < 0.2 or font.getlength(longer) > width):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _colors(rng: random.Random) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """Text and background colours whose luminance is at least 80 apart."""
    while True:
        a, b = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if abs(sum((x - y) * w for x, y, w in zip(a, b, (0.299, 0.587, 0.114)))) >= 80:
            return a, b


def render_text(face: Face, text: str, rng: random.Random, render: int = 1024, noise: float = _NOISE) -> Image.Image:
    """A block of text, 224 px high and as wide as it comes.

    Args:
        face: Font.
        text: Text.
        rng: Source of line breaks, alignment, colours and noise.
        render: Height in pixels of the first rendering, from which Lanczos reduces.
        noise: Standard deviation of the noise of each channel, of 255.

    Returns:
        RGB image.
    """
    lines = _wrap(text, face, rng)
    align = rng.choice((0.0, 0.5, 1.0))
    ink, background = _colors(rng)
    line_height = render / len(lines)
    font = face.at(100.0 * line_height / sum(face.at(100.0).getmetrics()))
    lengths = [font.getlength(line) for line in lines]
    margin = _MARGIN * line_height
    image = Image.new('RGB', (round(max(lengths) + 2 * margin), render), background)
    draw = ImageDraw.Draw(image)
    for i, (line, length) in enumerate(zip(lines, lengths)):
        draw.text((margin + align * (max(lengths) - length), i * line_height), line, fill=ink, font=font)
    image = image.resize((max(1, round(image.width * _HEIGHT / render)), _HEIGHT), Image.Resampling.LANCZOS)
    if not noise:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    generator = np.random.default_rng(rng.getrandbits(64))
    pixels = pixels + noise * generator.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def pad_square(image: Image.Image, size: int) -> Image.Image:
    """Pad an image to a square with black, and resize it."""
    side = max(image.size)
    square = Image.new('RGB', (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


class FontDataset(Dataset):
    """Images rendered when they are asked for, the same ones whenever the arguments are the same.

    As timm's datasets it has a `transform`, which `timm.data.create_loader` sets.
    """

    def __init__(
        self,
        fonts: Dict[str, Sequence[Face]],
        split: str,
        count: int,
        size: int = 224,
        render: Optional[int] = None,
        seed: int = 0,
        transform: Optional[Callable] = None,
    ):
        """
        Args:
            fonts: Faces by class; each image takes one of its class.
            split: 'train', 'val' or 'test', none of which share a text.
            count: Images per class; in steps of 575 (train) and 40 the protocol's mix of sentences and numbers.
            size: Height and width of the square images in pixels.
            render: Height in pixels of the first rendering; None for 448 in training and the protocol's 1024 otherwise.
            seed: Seed of everything random.
            transform: Applied to each PIL image.

        Raises:
            ValueError: If `split` is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"'split' must be one of {', '.join(SPLITS)}, got {split!r}.")
        self.fonts = fonts
        self.classes = sorted(fonts)
        self.split = split
        self.count = count
        self.size = size
        self.render = _RENDER[split] if render is None else render
        self.seed = seed
        self.transform = transform

    def __len__(self) -> int:
        return len(self.classes) * self.count

    def image(self, index: int) -> Image.Image:
        label, number = self.classes[index // self.count], index % self.count
        rng = random.Random(f'{self.seed}/{self.split}/{label}/{number}')
        face = rng.choice(self.fonts[label])
        return pad_square(render_text(face, random_text(self.split, number, rng), rng, self.render), self.size)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = self.image(index)
        return image if self.transform is None else self.transform(image), index // self.count


def _render_class(root: Path, dataset: FontDataset, number: int) -> int:
    """Write those images of a class that are not there yet."""
    folder = root / dataset.split / dataset.classes[number]
    folder.mkdir(parents=True, exist_ok=True)
    # Training images are many: JPEG, whose losses are small beside the noise.
    suffix, options = ('jpg', dict(quality=90)) if dataset.split == 'train' else ('png', {})
    for i in range(dataset.count):
        path = folder / f'{i:05d}.{suffix}'
        if not path.exists():
            partial = folder / f'.{path.name}'
            dataset.image(number * dataset.count + i).save(partial, 'JPEG' if suffix == 'jpg' else 'PNG', **options)
            os.replace(partial, path)
    return dataset.count


def render_dataset(
    root: Union[str, Path],
    fonts: Dict[str, Sequence[Face]],
    counts: Dict[str, int],
    size: int = 224,
    train_render: int = _RENDER['train'],
    seed: int = 0,
    workers: Optional[int] = None,
) -> Path:
    """Render an image folder, or what is missing of one that was begun with the same arguments.

    Args:
        root: Folder for train, val and test, each with a folder per class, and fonts.json with the arguments.
        fonts: Faces by class.
        counts: Images per class by split.
        size: Height and width of the square images in pixels.
        train_render: Height in pixels of the first rendering of training images; the others have the protocol's 1024.
        seed: Seed of everything random.
        workers: Processes; None for one per core.

    Returns:
        `root`.

    Raises:
        ValueError: If a size or count is less than 1, `root` has images of other arguments, or is no such folder.
        OSError: If images cannot be written.
    """
    root = Path(root)
    for name, value in dict(counts, size=size, train_render=train_render).items():
        if value < 1:
            raise ValueError(f"'{name}' must be at least 1, got {value}.")
    settings = dict(counts=counts, size=size, train_render=train_render, seed=seed)
    # family and file, not the whole path: the folder may be moved, and so may the fonts
    settings['fonts'] = {
        k: [dict(asdict(f), path='/'.join(Path(f.path).parts[-2:])) for f in fonts[k]] for k in sorted(fonts)
    }
    file = root / 'fonts.json'
    if file.is_file():
        if json.loads(file.read_text()) != json.loads(json.dumps(settings)):
            raise ValueError(f"'{root}' was rendered with other arguments or fonts, see '{file}'; take another folder.")
    elif root.exists() and any(root.iterdir()):
        raise ValueError(f"'{root}' is not empty, and not a folder of rendered fonts: it has no fonts.json.")
    else:
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1))
    datasets = [
        FontDataset(fonts, split, count, size, train_render if split == 'train' else None, seed)
        for split, count in counts.items()
    ]
    total = sum(map(len, datasets))
    with ProcessPoolExecutor(workers) as pool, tqdm(total=total, desc='Rendering fonts', unit='img') as bar:
        jobs = [pool.submit(_render_class, root, ds, i) for ds in datasets for i in range(len(ds.classes))]
        try:
            for job in as_completed(jobs):
                bar.update(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return root
