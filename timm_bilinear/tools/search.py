"""The search and retrieval commands: look-alikes of images in an index, and how often they are of the same class."""

import json as json_module
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.utils import unwrap_model
from torch import nn

from ..data.images import find_images, open_image
from .index import check_same_model, model_key
from .index_file import ROUNDING, ImageIndex, rank_places
from .inference import load, model_name, resolve_amp_dtype
from .pictures import GREY, GRID, INK, RIGHT, WRONG, Tile, draw_sheet, thumbnail
from .prediction import Source, find_sources
from .prediction_files import check_targets, json_writer, printable
from .ranking import retrieval_metrics
from .vectors import iterate_descriptors

__all__ = ['draw_found', 'run_retrieval', 'run_search', 'search']

_QUERIES = 32
_SPARE = 16  # vectors beyond those wanted that faiss is asked for at first


def search(
    index: Union[str, Path, ImageIndex],
    images: Any,
    topk: int = 10,
    model: Union[str, Path, nn.Module, None] = None,
    device: Optional[str] = None,
    faiss: bool = False,
) -> List[Dict[str, Any]]:
    """Find the images of an index that look most like others.

    Args:
        index: An index, or its file.
        images: As for `predict`.
        topk: Images to find for each.
        model: The model of the index; None to load it from where it was when the index was made.
        device: As for `predict`.
        faiss: Search by the package faiss, with the same results.

    Returns:
        For each image: 'image', 'error' (None, or what is wrong with it) and 'found', most similar first: 'path',
        'label' and 'score', the cosine.

    Raises:
        FileNotFoundError: If there is no such index, or its model is gone.
        ModuleNotFoundError: If faiss is wanted and not installed.
        ValueError: If the index is of another model.
    """
    index = ImageIndex.load(index) if isinstance(index, (str, Path)) else index
    net = _load_model(index, model, device)
    find = _by_faiss(index.vectors) if faiss else index.search
    results = []
    amp_dtype = resolve_amp_dtype('auto', next((p.device for p in net.parameters()), torch.device('cpu')))
    for entries, descriptors in iterate_descriptors(net, list(find_sources(images)), _QUERIES, None, amp_dtype):
        vectors = index.reduction(descriptors).cpu()
        scores, places = find(vectors, topk) if len(vectors) else ((), ())
        rows = iter(zip(scores, places))
        for entry in entries:
            found = []
            if entry.image is not None:
                for score, place in zip(*next(rows)):
                    row = index.rows[int(place)]
                    found.append(dict(path=row.path, label=row.label, score=float(score)))
            results.append(dict(image=entry.name, error=entry.error, found=found))
    return results


def _load_model(index: ImageIndex, model: Any, device: Optional[str]) -> nn.Module:
    file = index.file or 'index'
    given = index.about['model'] if model is None else model
    if not given:
        raise ValueError(f"'{file}' does not say where its model {index.about['name']} is: give the model.")
    try:
        net = load(given, device)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"The model of '{file}', {index.about['name']}, is not there any more: {e}") from e
    check_same_model(index, model_name(net), model_key(net), file)
    return net


def _by_faiss(vectors: torch.Tensor):
    try:
        import faiss
    except ImportError:
        raise ModuleNotFoundError("faiss is not installed: pip install 'timm_bilinear[faiss]'") from None
    flat = faiss.IndexFlatIP(vectors.shape[1])
    for start in range(0, len(vectors), 65_536):
        flat.add(vectors[start : start + 65_536].float().numpy())

    def find(queries: torch.Tensor, topk: int) -> Tuple[torch.Tensor, torch.Tensor]:
        topk = min(topk, len(vectors))
        if not topk:
            return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        count, is_enough = topk + _SPARE, False
        while not is_enough:  # until there is all that may be equal to the last of those wanted
            scores, places = flat.search(queries.numpy(), min(count, len(vectors)))
            is_enough = count >= len(vectors) or (scores[:, topk - 1] - scores[:, -1] > ROUNDING).all()
            count *= 4
        ranked = [rank_places(q, vectors, row.sort().values, topk) for q, row in zip(queries, torch.from_numpy(places))]
        scores, places = zip(*ranked)
        return torch.stack(scores), torch.stack(places)

    return find


def run_search(
    index: str,
    images: Sequence[str],
    topk: int = 10,
    model: Optional[str] = None,
    json: Optional[str] = None,
    sheet: Optional[str] = None,
    device: Optional[str] = None,
    faiss: bool = False,
) -> int:
    """The command: search, and print, write or draw what is found.

    Returns:
        Exit code: 0, or 1 if an image could not be read.

    Raises:
        As `search`, and OSError if a file cannot be written.
    """
    if json is not None:
        check_targets(json, None)
    if sheet is not None:
        _check_sheet(sheet)
    opened = ImageIndex.load(index)
    results = search(opened, images, topk, _given_model(opened, model, index), device, faiss)
    if not results:
        raise ValueError("'images' are empty: name at least one file, folder or pattern.")
    failed = 0
    with ExitStack() as stack:
        write = stack.enter_context(json_writer(os.fspath(json))) if json is not None else None
        for result in results:
            if result['error'] is not None:
                failed += 1
                print(f'timm-bilinear: error: {printable(result["error"])}', file=sys.stderr)
            if write is not None:
                write(result)
            elif result['error'] is None:
                print(f'{printable(result["image"])}:')
                for found in result['found']:
                    print(f'  {found["score"]:.3f} {printable(found["path"])}')
    if sheet is not None:
        draw_found(results, Path(index).resolve().parent, opened).save(sheet)
    return 1 if failed else 0


def _check_sheet(sheet: str):
    """Check that a picture can be written, before a model is loaded."""
    path = Path(sheet)
    if path.is_dir():
        raise ValueError(f"'sheet' must name a file, got the folder '{sheet}'.")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"'sheet' must name a file of a format that can be written, such as s.png, got '{sheet}'.")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"The folder of '{sheet}' does not exist.")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise PermissionError(f"'{sheet}' cannot be written.")


def _given_model(index: ImageIndex, model: Optional[str], file: str) -> Optional[str]:
    if model is None and not index.about['model']:
        raise ValueError(f"'{file}' does not say where its model {index.about['name']} is: give --model.")
    return model


def draw_found(results: Sequence[Dict[str, Any]], folder: Path, index: ImageIndex, columns: int = 6) -> Image.Image:
    """Each image with what was found for it, in order, right and wrong ones in frames if labels are known.

    An image's label is known if the folder it lies in is one of the index's labels.

    Args:
        results: Of `search`.
        folder: Folder of the index, which its paths are relative to.
        index: The index.
        columns: Pictures in a row, the image itself among them.
    """
    tiles: List[Tile] = []
    labels = set(index.labels) - {''}
    for result in results:
        if result['error'] is not None:
            continue
        label = Path(result['image']).absolute().parent.name
        label = label if label in labels else ''
        row = [Tile(_open(Path(result['image'])), [(label or 'image', INK), (Path(result['image']).name, GREY)], INK)]
        for found in result['found'][: columns - 1]:
            colour = GRID if not label else RIGHT if found['label'] == label else WRONG
            told = [(f'{found["score"]:.3f} {found["label"]}', INK if not label else colour)]
            row.append(Tile(_open(folder / found['path']), [*told, (Path(found['path']).name, GREY)], colour))
        tiles += row + [Tile(None)] * (min(columns, 1 + len(result['found'])) - len(row))
    width = min(columns, 1 + max((len(r['found']) for r in results if r['error'] is None), default=0))
    return draw_sheet(tiles, f'What looks alike to {index.about["name"]}, of {len(index.rows):,} images', width)


def _open(path: Path) -> Optional[Image.Image]:
    try:
        return thumbnail(open_image(path, min_size=448))
    except (OSError, ValueError):
        return None


def _describe_folder(net: nn.Module, folder: str, batch_size: int, workers: Optional[int]):
    """Descriptors, and paths, of the images below a folder."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    paths = [str(path) for path in find_images([folder])[0]]
    if not paths:
        raise FileNotFoundError(f"There is no image in '{folder}'.")
    amp_dtype = resolve_amp_dtype('auto', next((p.device for p in net.parameters()), torch.device('cpu')))
    vectors = []
    sources = [Source(path, path) for path in paths]
    for entries, descriptors in iterate_descriptors(net, sources, batch_size, workers, amp_dtype):
        for entry in entries:
            if entry.image is None:
                raise ValueError(entry.error)
        vectors.append(descriptors.cpu())
    return torch.cat(vectors), [Path(path) for path in paths]


def _in_names(option: str, pattern: str, paths: Sequence[Path]) -> List[str]:
    """What a pattern, or its first group, matches in the name of each file."""
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise ValueError(f"'{option}' must be a regular expression, got {pattern!r}: {e}.") from None
    texts = []
    for path in paths:
        found = compiled.search(path.name)
        if found is None:
            raise ValueError(f"'{option}' {pattern!r} is not found in the name of '{path}'.")
        text = found[1] if compiled.groups else found[0]
        if text is None:
            raise ValueError(f"The first group of '{option}' {pattern!r} takes no part in the name of '{path}'.")
        texts.append(text)
    return texts


def run_retrieval(
    model: str,
    query: str,
    gallery: Optional[str] = None,
    cameras: Optional[str] = None,
    labels: Optional[str] = None,
    rerank: bool = False,
    json: Optional[str] = None,
    batch_size: int = 32,
    workers: Optional[int] = None,
    device: Optional[str] = None,
) -> int:
    """The command: measure how well a model's descriptors find images of the same class.

    Args:
        model: As for `predict`.
        query: Folder with a folder of images per class, or with images whose names have the class.
        gallery: Folder of the images to look in; None for the queries themselves, each without itself.
        cameras: Regular expression that finds the camera in a file name, e.g. 'c([0-9]+)' for Market-1501.
        labels: Regular expression that finds the class in a file name, e.g. '^(-?[0-9]+)_'; None for its folder's name.
        rerank: Rank by k-reciprocal neighbours too.
        json: File for the numbers, '-' for stdout.
        batch_size, workers, device: As for `predict`.

    Returns:
        Exit code 0.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        ValueError: If an image cannot be read, a camera is not found, or no query has a match.
    """
    if json is not None:
        check_targets(json, None)
    net = load(model, device)
    sides = [_describe_folder(net, folder, batch_size, workers) for folder in (query, gallery) if folder is not None]
    vectors = [side[0] for side in sides]
    named = [
        [p.parent.name for p in paths] if labels is None else _in_names('labels', labels, paths) for _, paths in sides
    ]
    named = [[-1 if label == '-1' else label for label in side] for side in named]  # which is ignored
    found = [None if cameras is None else _in_names('cameras', cameras, paths) for _, paths in sides]
    if gallery is None:
        metrics = retrieval_metrics(vectors[0], named[0], query_cameras=found[0], rerank=rerank)
    else:
        metrics = retrieval_metrics(vectors[0], named[0], vectors[1], named[1], *found, rerank=rerank)
    sizes = f'{len(vectors[0]):,} queries' + (f' in {len(vectors[1]):,} images' if gallery is not None else '')
    print(f'{model_name(unwrap_model(net))}, {sizes}:', file=sys.stderr)
    if json == '-':
        print(json_module.dumps(metrics))
        return 0
    for name, value in metrics.items():
        print(f'{name} {value:.2f}')
    if json is not None:
        Path(json).write_text(json_module.dumps(metrics, indent=1) + '\n')
    return 0
