"""Fonts: files of a folder, or of the `demo` extra's packages, and what they must have."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from PIL import ImageFont
from texts import CHARACTERS

__all__ = ['Face', 'check_face', 'demo_fonts', 'find_fonts']

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


@dataclass(frozen=True)
class Face:
    """A font file, and the weight at which a variable one is used.

    Args:
        path: Font file of any format that FreeType reads.
        weight: Value of the weight axis; None for static fonts.
    """

    path: str
    weight: Optional[int] = None

    def at(self, size: float, kerning: bool = True) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels per em, laid out with kerning where Pillow has libraqm, or glyph after glyph.

        Raises:
            OSError: If FreeType cannot read the file.
        """
        engine = ImageFont.Layout.RAQM if kerning else ImageFont.Layout.BASIC
        font = ImageFont.truetype(self.path, size, layout_engine=engine)
        if self.weight is not None:
            axes = font.get_variation_axes()
            font.set_variation_by_axes([self.weight if a['name'] == b'Weight' else a['default'] for a in axes])
        return font

    def keep(self, text: str) -> str:
        """The text without the characters that the font lacks."""
        return ''.join(c for c in text if c == ' ' or _has(self, c))

    @property
    def x_height(self) -> float:
        """Height of the ink of 'x', in em."""
        return _ink_height(self, 'x')

    @property
    def line_height(self) -> float:
        """Height of the ink of 'Ay', in em."""
        return _ink_height(self, 'Ay')


@cache
def _probe(face: Face) -> Tuple[ImageFont.FreeTypeFont, bytes]:
    """The font, and what it draws for a character that no font has."""
    font = face.at(32.0)
    return font, bytes(font.getmask('\uffff'))


@cache
def _has(face: Face, character: str) -> bool:
    font, absent = _probe(face)
    mask = font.getmask(character)
    return mask.getbbox() is not None and bytes(mask) != absent


@cache
def _ink_height(face: Face, text: str) -> float:
    _, top, _, bottom = face.at(500.0).getbbox(text)
    return (bottom - top) / 500


def check_face(face: Face):
    """Check that a font can be read and has every character that texts are made of.

    Raises:
        ValueError: If not, naming file and characters.
    """
    try:
        missing = [c for c in CHARACTERS if not _has(face, c)]
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
