"""The files of an evaluation: tables, pictures and metrics.json, written whole into a folder of results."""

import copy
import csv
import json
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import numpy as np
import torch
from PIL import Image

from ..data.images import open_image
from ..hub.partial import partial_path
from .interrupt import Interrupted, Terminated
from .lettering import class_label
from .metrics import ImageMetrics, class_table, confused_pairs, confusion_matrix
from .pictures import (
    GREY,
    INK,
    RIGHT,
    WRONG,
    ConfusedPair,
    Tile,
    draw_confused_pairs,
    draw_confusion_matrix,
    draw_sheet,
    thumbnail,
)

__all__ = ['FILES', 'Evaluation', 'ResultFolder', 'image_name']

# metrics.json is moved into place first: it lists which files in the folder are of an evaluation.
FILES = (
    'metrics.json',
    'predictions.csv',
    'classes.csv',
    'confusion_matrix.csv',
    'confusion_matrix.png',
    'worst_images.png',
    'confused_pairs.png',
)
_TOOL = 'timm-bilinear evaluate'
# A larger matrix has more cells than anything reads; classes.csv and predictions.csv hold what it would say.
_MAX_CLASSES = 2000
# Longer edges than this are not needed for a picture in a sheet.
_ENOUGH_PIXELS = 448


@dataclass
class Evaluation:
    """Results of a model on the images of a dataset, in their order.

    Args:
        metrics: What `summarize` gives.
        images: Of each image, on the CPU.
        class_names: Names of the model's classes.
        dataset: The images.
        shown_names: Names of the classes for people, which may be longer.
    """

    metrics: Dict[str, Any]
    images: ImageMetrics
    class_names: List[str]
    dataset: Any
    shown_names: Optional[List[str]] = None

    def image_name(self, index: int) -> str:
        """Name of an image in its data."""
        return image_name(self.dataset, index)


def image_name(dataset, index: int) -> str:
    """Name of an image of a dataset, its place where it has none."""
    try:
        return str(dataset.filename(index))
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, AssertionError):
        return f'#{index}'


class ResultFolder:
    """Context in which a folder of results is written; without a name nothing is.

    It checks on entering that the results can be written, and leaves the folder as it was after an error.

    Raises:
        FileExistsError: If the folder has files of these names that an earlier evaluation did not write.
        NotADirectoryError: If it is a file.
        OSError: If it cannot be written to.
        Interrupted: On leaving, for a KeyboardInterrupt before anything in the folder was changed.
    """

    def __init__(self, path: Optional[Union[str, Path]]):
        self.path = None if path is None else Path(path)
        self._scratch: Optional[Path] = None
        self._stack = ExitStack()
        self._is_changed = False
        self._made: List[Path] = []

    def __enter__(self) -> 'ResultFolder':
        if self.path is None:
            return self
        if self.path.is_symlink() and not self.path.exists():
            raise FileNotFoundError(f"'{self.path}' is a link that leads nowhere.")
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"'{self.path}' is not a folder.")
        own = self._read_own()
        foreign = [name for name in FILES if name not in own and os.path.lexists(self.path / name)]
        if foreign:
            raise FileExistsError(
                f"'{self.path / foreign[0]}' was not written by an evaluation and would be overwritten; give another "
                'folder.'
            )
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._scratch = self._stack.enter_context(partial_path(self.path, '.evaluate.'))
        self._scratch.mkdir()
        return self

    def __exit__(self, *error):
        self._stack.close()
        for folder in self._made if error[0] is not None else ():
            try:
                folder.rmdir()
            except OSError:  # not empty, so not ours alone
                break
        if isinstance(error[1], KeyboardInterrupt) and not self._is_changed and self.path is not None:
            code = 143 if isinstance(error[1], Terminated) else 130
            raise Interrupted(f"Stopped: '{self.path}' is as it was.", code) from error[1]

    def _read_own(self) -> List[str]:
        """Names of the files that an earlier evaluation wrote here."""
        try:
            told = json.loads((self.path / 'metrics.json').read_text())
            return [name for name in told['files'] if name in FILES] if told['tool'] == _TOOL else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def write(self, result: Evaluation, worst: int, pairs: int):
        """Write all results, then give them their names.

        Args:
            result: Results.
            worst: Number of images with the highest loss to show.
            pairs: Number of pairs of classes to show.
        """
        if self._scratch is None:
            return
        shown = [class_label(name, i) for i, name in enumerate(result.shown_names or result.class_names)]
        write_tables(self._scratch, result)
        if len(shown) <= _MAX_CLASSES:
            counts = confusion_matrix(result.images.targets, result.images.predictions, len(shown))
            _write_csv(
                self._scratch / 'confusion_matrix.csv',
                ['target', *result.class_names],
                ([name, *row] for name, row in zip(result.class_names, counts.tolist())),
            )
            _save(draw_matrix(counts, shown), self._scratch / 'confusion_matrix.png')
        if worst:
            _save(draw_worst(result, shown, worst), self._scratch / 'worst_images.png')
        if pairs and (picture := draw_pairs(result, shown, pairs)):
            _save(picture, self._scratch / 'confused_pairs.png')
        files = [name for name in FILES if name == 'metrics.json' or (self._scratch / name).exists()]
        metrics = dict(tool=_TOOL, **result.metrics, files=files)
        if not math.isfinite(metrics['loss']):  # of a class with a probability of 0, for which JSON has no number
            metrics['loss'] = None
        text = json.dumps(metrics, indent=2, allow_nan=False) + '\n'
        (self._scratch / 'metrics.json').write_text(text)
        old = self._read_own()
        self._is_changed = True
        for name in files:
            os.replace(self._scratch / name, self.path / name)
        for name in set(old) - set(files):
            (self.path / name).unlink(missing_ok=True)


def _save(image: Image.Image, path: Path):
    image.save(path, optimize=True)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]):
    # file names need not be text: what is none is written as \udc.., which no reader trips over
    with open(path, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(folder: Path, result: Evaluation):
    """Write predictions.csv, a row for each image, and classes.csv, a row for each class; accuracies in percent."""
    names, images = result.class_names, result.images
    header = ['image', 'target', 'prediction', 'probability', 'target_probability', 'target_rank', 'loss']
    columns = (
        images.targets,
        images.predictions,
        images.probabilities,
        images.target_probabilities,
        images.ranks,
        images.losses,
    )
    _write_csv(
        folder / 'predictions.csv',
        header,
        (
            [result.image_name(i), names[target], names[guess], f'{p:.6g}', f'{own:.6g}', rank, f'{loss:.6g}']
            for i, (target, guess, p, own, rank, loss) in enumerate(zip(*(column.tolist() for column in columns)))
        ),
    )
    table = class_table(images.targets, images.predictions, len(names))
    _write_csv(
        folder / 'classes.csv',
        ['class', 'images', 'correct', 'top1', 'confused_with', 'confused_images'],
        (
            [
                name,
                row.images,
                row.correct,
                '' if row.top1 is None else f'{row.top1:.2f}',
                '' if row.confused_with is None else names[row.confused_with],
                row.confused,
            ]
            for name, row in zip(names, table)
        ),
    )


def read_image(dataset, index: int) -> Optional[Image.Image]:
    """An image of a dataset as a small picture, None where it cannot be had again."""
    try:
        paths = getattr(dataset, 'paths', None)
        if paths is not None:
            return thumbnail(open_image(paths[index], 'RGB', min_size=_ENOUGH_PIXELS))
        plain = copy.copy(dataset)
        plain.transform = None
        image = plain[index][0]
        return thumbnail(open_image(image, 'RGB')) if isinstance(image, Image.Image) else None
    except (OSError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AttributeError):
        return None


def draw_matrix(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Confusion matrix of the classes that have images or were taken for one that has."""
    seen = (counts.sum(0) + counts.sum(1)).nonzero()[0]
    return draw_confusion_matrix(counts[np.ix_(seen, seen)], [names[i] for i in seen], len(names))


def draw_worst(result: Evaluation, names: Sequence[str], count: int) -> Image.Image:
    """Sheet of the images with the highest loss."""
    images = result.images
    order = images.losses.sort(descending=True, stable=True).indices[:count].tolist()
    tiles = []
    for i in order:
        target, guess = int(images.targets[i]), int(images.predictions[i])
        lines = [
            (Path(result.image_name(i)).name, GREY),
            (names[target], INK),
            (names[guess], RIGHT if guess == target else WRONG),
            (f'{100 * images.probabilities[i]:.1f} %, loss {images.losses[i]:.3g}', INK),
        ]
        tiles.append(Tile(read_image(result.dataset, i), lines, RIGHT if guess == target else WRONG))
    title = f'{len(tiles)} of {len(images.losses):,} images, highest loss first'
    return draw_sheet(tiles, f'{title}: true class, and what was predicted (wrong in orange, right in blue)')


def _examples(result: Evaluation, names: Sequence[str], target: int, other: int, count: int = 3) -> List[Tile]:
    """Images of a class: the worst of those taken for another, then right ones."""
    images = result.images
    losses = images.losses
    of_class = images.targets == target
    wrong = (of_class & (images.predictions == other)).nonzero()[:, 0]
    wrong = wrong[losses[wrong].sort(descending=True, stable=True).indices].tolist()
    right = (of_class & (images.predictions == target)).nonzero()[:, 0].tolist()
    tiles = []
    for i in (wrong + right)[:count]:
        guess = int(images.predictions[i])
        colour = RIGHT if guess == target else WRONG
        lines = [
            (Path(result.image_name(i)).name, GREY),
            (names[guess], colour),
            (f'{100 * images.probabilities[i]:.1f} %', INK),
        ]
        tiles.append(Tile(read_image(result.dataset, i), lines, colour))
    return tiles


def draw_pairs(result: Evaluation, names: Sequence[str], count: int) -> Optional[Image.Image]:
    """Picture of the pairs of classes confused most, None if there are none."""
    pairs = confused_pairs(result.images.targets, result.images.predictions)
    if not pairs:
        return None
    images = torch.bincount(result.images.targets, minlength=len(names)).tolist()
    rows = [
        ConfusedPair(
            (names[a], names[b]),
            errors,
            (images[a], images[b]),
            (_examples(result, names, a, b), _examples(result, names, b, a)),
        )
        for (a, b), errors in pairs[:count]
    ]
    title = f'{len(rows)} of {len(pairs):,} pairs of classes, most confused first'
    return draw_confused_pairs(rows, f'{title}: below each image what was predicted (wrong in orange, right in blue)')
