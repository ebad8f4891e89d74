"""Image folders of fonts: training and validation by render.py, the test by a renderer that shares no code with it."""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

from faces import Face
from protocol import KINDS, draw_protocol, prose
from render import random_image
from texts import SPLITS
from tqdm import tqdm

__all__ = ['render_folder']

_corpus = cache(prose)


def _render_class(
    root: Path, split: str, index: int, name: str, faces: Sequence[Face], count: int, size: int, seed: int
) -> int:
    """Write those images of a class, the one of that index, that are not there yet."""
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        # in steps of 40 images a class has the protocol's mix; of few images, all classes together do
        kind = KINDS[(17 * index + 13 * number) % len(KINDS)]
        path = folder / (f'{number:05d}.png' if split in SPLITS else f'{kind}_{number:05d}.png')
        if path.exists():
            continue
        rng = random.Random(f'{seed}/{split}/{name}/{number}')
        face = rng.choice(faces)
        if split in SPLITS:
            image = random_image(face, split, rng, size)
        else:
            image = draw_protocol(face, kind, _corpus(), rng)
        partial = folder / f'.{path.name}'
        image.save(partial, 'PNG')
        os.replace(partial, path)
    return count


def render_folder(
    root: Union[str, Path],
    fonts: Dict[str, List[Face]],
    counts: Dict[str, int],
    size: int = 224,
    seed: int = 0,
    workers: Optional[int] = None,
) -> Path:
    """Render an image folder, or what is missing of one that was begun with the same arguments.

    Args:
        root: Folder for train, val and test, each with a folder per class, and fonts.json with the arguments.
        fonts: Faces by class; each image takes one of its class.
        counts: Images per class by split: 'train' and 'val', and 'test' by the protocol of GoogleFontsBench.
        size: Height and width of the square images of train and val in pixels; those of the test are 224 px high.
        seed: Seed of everything random.
        workers: Processes; None for one per core.

    Returns:
        `root`.

    Raises:
        ValueError: If a size or count is less than 1, `root` has images of other arguments, or is no such folder.
        OSError: If images cannot be written.
    """
    root = Path(root)
    for name, value in dict(counts, size=size).items():
        if value < 1:
            raise ValueError(f"'{name}' must be at least 1, got {value}.")
    settings = dict(counts=counts, size=size, seed=seed)
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
    total = len(fonts) * sum(counts.values())
    with ProcessPoolExecutor(workers) as pool, tqdm(total=total, desc='Rendering fonts', unit='img') as bar:
        jobs = [
            pool.submit(_render_class, root, split, index, name, fonts[name], count, size, seed)
            for split, count in counts.items()
            for index, name in enumerate(sorted(fonts))
        ]
        try:
            for job in as_completed(jobs):
                bar.update(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return root
