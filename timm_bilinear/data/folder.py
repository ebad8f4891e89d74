"""Image folders for fine-tuning: train, val and optionally test, each with a folder per class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Union

from PIL import Image
from timm.data import ImageDataset, create_dataset
from tqdm import tqdm

__all__ = ['create_datasets']


def _check_image(path: str):
    try:
        with Image.open(path) as img:
            img.draft('RGB', (32, 32))  # JPEG decodes to an eighth of its size, which still reads it to the end
            img.load()
    except Exception as e:
        raise ValueError(f"Cannot read image '{path}': {e}") from e


def _check_classes(root: Path, train: ImageDataset, dataset: ImageDataset):
    """Every leaf folder must hold images of a class that is in the training set."""
    filled = {str(Path(f).parent) for f in dataset.filenames(absolute=True)}
    for folder in sorted(p for p in root.rglob('*') if p.is_dir()):
        if not any(p.is_dir() for p in folder.iterdir()) and str(folder) not in filled:
            known = folder.name in train.reader.class_to_idx
            raise ValueError(
                f"Class folder '{folder}' has no images."
                if known or not any(folder.iterdir())
                else f"Class folder '{folder}' has no counterpart in the training set, or no images."
            )


def create_datasets(data_dir: Union[str, Path]) -> Dict[str, ImageDataset]:
    """Datasets of an image folder, checked: no class is empty, every image can be read.

    Args:
        data_dir: Folder with `train`, `val` (or timm's other names for it) and optionally `test`.

    Returns:
        timm image datasets by 'train', 'val' and, if there is one, 'test', with the class indices of 'train'.

    Raises:
        FileNotFoundError: If the folder or a split is missing.
        ValueError: If a class folder is empty or unknown to 'train', or an image cannot be read.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"Data folder '{data_dir}' does not exist.")
    names = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid'), 'test': ('test', 'testing')}
    datasets: Dict[str, ImageDataset] = {}
    paths: List[str] = []
    for split, folders in names.items():
        root = next((data_dir / f for f in folders if (data_dir / f).is_dir()), None)
        if root is None:
            if split == 'test':
                continue
            raise FileNotFoundError(f"Data folder '{data_dir}' has no '{split}' folder.")
        class_map = datasets['train'].reader.class_to_idx if datasets else ''
        try:
            dataset = create_dataset('', str(root), class_map=class_map, search_split=False)
        except RuntimeError as e:  # no images at all
            raise ValueError(str(e)) from e
        datasets[split] = dataset
        _check_classes(root, datasets['train'], dataset)
        paths += dataset.filenames(absolute=True)
    with ThreadPoolExecutor(4) as pool:
        for _ in tqdm(pool.map(_check_image, paths), total=len(paths), desc='Checking images', unit='img'):
            pass
    return datasets
