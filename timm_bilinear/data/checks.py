"""The checks of image folders: errors name all that is wrong, warnings what spoils the figures of a split."""

import hashlib
import os
import unicodedata
from pathlib import Path
from typing import Dict, List, Sequence

import PIL.Image

from .images import shown
from .scan import ScannedSplit, count_copies, find_flat_splits, is_of_classes, listed, unreadable

__all__ = [
    'check_images',
    'class_indices',
    'leave_out',
    'refuse_flat',
    'refuse_problems',
    'refuse_unknown',
    'take_out',
    'warn_of_classes',
    'warn_of_copies',
    'warn_of_links',
]


def refuse_problems(data_dir: Path, scans: Sequence[ScannedSplit]):
    """Raises one error on everything that does not fit into split/class/image."""
    problems = [problem for scan in scans for problem in scan.problems]
    if problems:
        raise ValueError(
            f"Data folder '{shown(data_dir)}' is not made of split/class/image "
            f'(or of class/image alone): {listed(problems)}.'
        )


def refuse_flat(data_dir: Path, keys: Sequence[str], folders: Dict[str, Path]):
    """Raises an error on split folders with images but no class folders; beside others, they are classes themselves."""
    for key, path in find_flat_splits(data_dir).items():
        if key in keys and (folders or not is_of_classes(data_dir)):
            place = shown(path)
            raise ValueError(f"'{place}' has no class folders: images belong into folders '{place}/CLASS'.")


def refuse_unknown(data_dir: Path, scans: Dict[str, ScannedSplit], known: Dict[str, int], owner: str):
    """Raises one error on all class folders that are not among the classes."""
    unknown = [
        f"'{shown(os.path.relpath(scan.folder / name, data_dir))}'"
        for scan in scans.values()
        for name in scan.classes
        if name not in known
    ]
    if unknown:
        raise ValueError(f'{owner} has no class for {listed(unknown)}.')


def class_indices(names: Sequence[str]) -> Dict[str, int]:
    """Index by class name, in the form that `scan_split` gives names."""
    indices = {unicodedata.normalize('NFC', name): index for index, name in enumerate(names)}
    if len(indices) != len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1}) or list(names)
        raise ValueError(f'Class names must differ, got {listed([repr(name) for name in twice])} more than once.')
    return indices


def leave_out(scan: ScannedSplit, map_: Dict[str, int], data_dir: Path, owner: str, least: int = 1):
    """As timm does, a class map leaves out the folders that it does not name.

    Raises:
        ValueError: If it leaves fewer than `least`.
    """
    found = [repr(name) for name in scan.classes]
    for name in [name for name in scan.classes if name not in map_]:
        folder = shown(os.path.relpath(scan.folder / name, data_dir))
        scan.skipped.append(f"'{folder}' is not in the class map ({len(scan.classes.pop(name))} images).")
    if len(scan.classes) < least:
        names = f'{next(iter(scan.classes))!r} alone' if scan.classes else 'none'
        raise ValueError(f"{owner} names {names} of the class folders of '{shown(scan.folder)}': {listed(found)}.")


def check_images(scans: Dict[str, ScannedSplit], skip_bad: bool, progress: bool = True) -> List[str]:
    """Raises one error on all images that cannot be read, or moves them to what is skipped.

    Returns:
        Warnings.
    """
    bad, huge = unreadable([image for scan in scans.values() for image in scan.images()], progress)
    warnings = []
    if huge:
        count = '1 image has' if len(huge) == 1 else f'{len(huge)} images have'
        names = listed([f"'{shown(path)}'" for path in huge])
        warnings.append(f'{count} more than {PIL.Image.MAX_IMAGE_PIXELS} pixels: {names}.')
    if not bad:
        return warnings
    if not skip_bad:
        count = 'One image cannot' if len(bad) == 1 else f'{len(bad)} images cannot'
        reasons = '; '.join(message.rstrip('.') for message in bad.values())
        raise ValueError(f'{count} be read (skip_bad, --skip-bad, goes on without): {reasons}.')
    for scan in scans.values():
        scan.skipped += [bad[image.path] for image in scan.images() if image.path in bad]
        for name, images in scan.classes.items():
            scan.classes[name] = [image for image in images if image.path not in bad]
    emptied = [name for name, images in scans.get('train', ScannedSplit(Path())).classes.items() if not images]
    if emptied:
        raise ValueError(f'No image can be read of the training classes {listed([repr(name) for name in emptied])}.')
    for key, scan in scans.items():
        if not scan.images():
            raise ValueError(f"No image of '{key}' can be read.")
    return warnings


def warn_of_copies(scans: Dict[str, ScannedSplit]) -> List[str]:
    """Says how many images of a split lie in another one."""
    warnings = []
    keys = list(scans)
    for i, key in enumerate(keys):
        for other in keys[:i]:
            images = scans[key].images()
            linked = not scans[key].taken and os.path.samefile(scans[key].folder, scans[other].folder)
            count = 0 if linked else count_copies(scans[other].images(), images)
            if count:
                many = f'All {count}' if count == len(images) else f'{count} of {len(images)}'
                warnings.append(f"{many} images of '{key}' are in '{other}' too: its figures will be too good.")
    return warnings


def warn_of_links(data_dir: Path, folders: Dict[str, Path]) -> List[str]:
    """Splits that are one folder: a link is taken at the user's word, anything else is a mistake."""
    warnings = []
    keys = list(folders)
    for i, key in enumerate(keys):
        for other in keys[:i]:
            if not os.path.samefile(folders[key], folders[other]):
                continue
            if not (folders[key].is_symlink() or folders[other].is_symlink()):
                raise ValueError(f"'{key}' and '{other}' of '{shown(data_dir)}' are the same folder.")
            warnings.append(f"'{key}' is a link to the folder of '{other}': its figures will be too good.")
    return warnings


def warn_of_classes(scans: Dict[str, ScannedSplit], indices: Dict[str, int], class_names: List[str]) -> List[str]:
    """Says which classes a split has no images of."""
    warnings = []
    for key, scan in scans.items():
        present = {indices[name] for name, images in scan.classes.items() if images}
        lacking = [repr(name) for index, name in enumerate(class_names) if index not in present]
        if len(present) == 1 and len(class_names) > 1:
            warnings.append(f"'{key}' has images of one class alone, {class_names[present.pop()]!r}.")
        elif lacking:
            some = f'{len(lacking)} of {len(class_names)} classes'
            warnings.append(f"'{key}' has no images of {some}: {listed(lacking)}.")
    return warnings


def take_out(scan: ScannedSplit, fraction: float, seed: int) -> ScannedSplit:
    """Moves a part of each class, chosen by its files' names and the seed, into a split of its own."""
    taken = ScannedSplit(scan.folder, taken=True)
    for name, images in scan.classes.items():
        count = min(max(int(fraction * len(images) + 0.5), 1), len(images) - 1)
        by_hash = sorted(
            images, key=lambda image: hashlib.sha256(os.fsencode(f'{seed}/{name}/{image.path.name}')).digest()
        )
        chosen = set(by_hash[:count])
        scan.classes[name] = [image for image in images if image not in chosen]
        if chosen:
            taken.classes[name] = [image for image in images if image in chosen]
    return taken
