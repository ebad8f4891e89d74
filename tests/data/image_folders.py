"""Image folders that the tests of this folder make."""

import numpy as np
from PIL import Image


def make_image(path, number=0, size=(16, 16)):
    """A picture that no other number gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_folder(root, splits=('train', 'val'), classes=('ant', 'bee'), count=2):
    number = 0
    for split in splits:
        for name in classes:
            for i in range(count):
                make_image(root / split / name / f'{i}.png', number)
                number += 1
    return root
