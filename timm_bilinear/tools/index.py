"""The index command: vectors of the images of a folder in a file, kept up to date and gone on with after a cut."""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from ..data.images import find_images
from ..data.scales import VIEWS
from .descriptors import descriptor_key
from .distributed import Ranks, broadcast, init_distributed, shutdown
from .index_file import ImageIndex, Row, relative_path, resolve_path
from .inference import load, model_name, precision, resolve_amp_dtype, view_data_config, whole_number
from .interrupt import Interrupted, Terminated, catch_signals
from .lock import FolderLock
from .prediction import Source
from .prediction_files import printable
from .vectors import Reduction, describe, iterate_descriptors

__all__ = ['check_same_model', 'index_images', 'model_key', 'remove_images', 'run_index']

DIM = 512
_FITTED = 4096  # images that principal components are found of, at most


def model_key(net: nn.Module) -> str:
    """Hash of what an image's descriptor depends on: architecture and weights but the classifier's, preprocessing."""
    cfg = getattr(net, 'pretrained_cfg', None) or {}
    classifier = cfg.get('classifier') if isinstance(cfg.get('classifier'), str) else 'head.fc'
    return descriptor_key(net, f'{classifier}.', view_data_config(net, 'auto'), '', None)


class _Parts:
    """What was computed so far, in a folder beside the index: rows of each process, appended batch by batch.

    Args:
        folder: The folder.
        key: What the vectors depend on; those of another are thrown away.
        dim: Numbers in a vector.
    """

    def __init__(self, folder: Path, key: str, dim: int):
        self.folder, self.key, self.dim = folder, key, dim

    def read(self) -> Dict[Row, np.ndarray]:
        """Vectors by row, of every process that wrote any."""
        try:
            is_same = (self.folder / 'key').read_text() == self.key
        except OSError:
            is_same = False
        if not is_same:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / 'key').write_text(self.key)
            return {}
        found = {}
        for file in sorted(self.folder.glob('*.rows')):
            vectors = np.fromfile(file.with_suffix('.vectors'), np.float16)
            vectors = vectors[: len(vectors) // self.dim * self.dim].reshape(-1, self.dim)
            for line, vector in zip(file.read_text('utf-8', 'surrogateescape').splitlines(True), vectors):
                if line.endswith('\n'):  # else it was cut off
                    found[Row(*json.loads(line))] = vector
        return found

    def new_name(self, rank: int) -> str:
        """A name for what a process adds: what a cut left half written is not added to."""
        number = sum(file.name.startswith(f'{rank}-') for file in self.folder.glob('*.vectors'))
        return f'{rank}-{number}'

    def append(self, name: str, rows: Sequence[Row], vectors: torch.Tensor):
        """Add to a file; the rows after their vectors, so that a row that is there has one."""
        for suffix, data in (
            ('.vectors', vectors.half().cpu().numpy().tobytes()),
            ('.rows', ''.join(json.dumps([r.path, r.label, r.size, r.time]) + '\n' for r in rows).encode()),
        ):
            with (self.folder / f'{name}{suffix}').open('ab') as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class _Listed(NamedTuple):
    """An image to index: its row, and the file that it is read from."""

    row: Row
    file: str


def _list_images(folder: Path, index_file: Path, rows: Sequence[Row]) -> Tuple[List[_Listed], List[str]]:
    """Images below a folder, and what is wrong with those whose files cannot be looked at.

    Those right in the folder have the label that images of it have in the rows of the index: that of a folder above it.
    """
    paths, skipped = find_images([str(folder)])
    where = resolve_path(folder)
    labels = {os.path.dirname(row.path): row.label for row in rows}
    listed, failed = [], []
    for message in skipped[:3]:
        print(f'timm-bilinear: skipped: {printable(message)}', file=sys.stderr)
    for path in paths:
        try:
            stat = path.stat()
        except OSError as e:
            failed.append(f"Cannot read '{path}': {e.strerror}.")
            continue
        name = relative_path(where / path.relative_to(folder), index_file)
        label = path.parent.name if path.parent != folder else labels.get(os.path.dirname(name), '')
        listed.append(_Listed(Row(name, label, stat.st_size, stat.st_mtime_ns), str(path)))
    return listed, failed


def _vectors(
    net: nn.Module, images: Sequence[_Listed], batch_size: int, workers: Optional[int], amp_dtype: Any
) -> Iterator[Tuple[List[_Listed], torch.Tensor, List[str]]]:
    """Descriptors (B, D) of the images that can be read, a batch at a time, and what is wrong with the others."""
    sources = [Source(image.file, image.file) for image in images]
    rest = iter(images)
    for entries, descriptors in iterate_descriptors(net, sources, batch_size, workers, amp_dtype):
        good = [image for entry, image in zip(entries, rest) if entry.image is not None]  # entries end first
        yield good, descriptors, [entry.error for entry in entries if entry.image is None]


def _in_features(net: nn.Module, device: torch.device) -> int:
    config = view_data_config(net, 'auto')
    channels, height, width = config['input_size']
    height *= VIEWS if config.get('scales') else 1
    return describe(net, torch.zeros(1, channels, height, width, device=device)).shape[1]


def check_same_model(index: ImageIndex, name: str, key: str, file: Union[str, Path]):
    """Check that an index is of a model.

    Raises:
        ValueError: If it is of another, or of the same network with another pooling, weights or preprocessing.
    """
    if index.about['key'] != key:
        other = ' with another pooling, other weights or preprocessing' if index.about['name'] == name else ''
        raise ValueError(f"'{file}' is an index of {index.about['name']}, and the model is {name}{other}.")


def index_images(
    model: Union[str, Path, nn.Module],
    folder: Union[str, Path],
    output: Union[str, Path],
    dim: Optional[int] = None,
    reduce: Optional[str] = None,
    batch_size: int = 32,
    workers: Optional[int] = None,
    amp: Optional[str] = 'auto',
    device: Optional[str] = None,
    progress: bool = True,
) -> Tuple[ImageIndex, List[str]]:
    """Make an index of the images below a folder, or bring one up to date.

    Images of the folder that are in the index already, with the same size and time, are not read again; those that are
    gone are taken out, and images of other folders stay. What an interrupted call has computed is used by the next.
    Under torchrun each process takes its share of the batches, and the file is that of one process.

    Args:
        model: As for `predict`.
        folder: Folder of images. An image's label is the name of the folder that it lies in, if that is another.
        output: File of the index, new or made with the same model.
        dim: Numbers in a vector; None for 512, or as it is in the index.
        reduce: 'sketch', 'pca' or 'none', see `Reduction`; None for 'sketch', or as it is in the index.
        batch_size, workers, amp, device: As for `predict`.
        progress: Show a bar on stderr.

    Returns:
        The index, and what is wrong with the images that are not in it.

    Raises:
        FileNotFoundError: If there is no such folder, or no image below it.
        ValueError: If the index is of another model or reduction, or an argument is wrong.
        OSError, RuntimeError, TypeError: As for `predict`, and if the file cannot be written.
        RuntimeError: If another process writes to it.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    folder, output = Path(folder), Path(output).resolve()  # a link stays one
    batch_size = whole_number('batch_size', batch_size, 1)
    dim = None if dim is None else whole_number('dim', dim, 1)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"'output' must be a file in a folder that exists, got '{output}'.")
    ranks = init_distributed(device)
    try:
        with catch_signals(), _locked(output, ranks):
            return _index(model, folder, output, dim, reduce, batch_size, workers, amp, ranks, progress)
    except KeyboardInterrupt as e:
        code = 143 if isinstance(e, Terminated) else 130
        raise Interrupted('Stopped; the same command goes on where this one was.', code) from e
    finally:
        shutdown(ranks)


@contextmanager
def _locked(file: Path, ranks: Ranks) -> Iterator[None]:
    """Context in which no other process writes to an index, if the first one gets hold of it.

    Raises:
        RuntimeError: If another does.
        OSError: If the file cannot be written.
    """
    lock = error = None
    if ranks.is_first:
        try:
            lock = FolderLock(file.parent, file.name)
        except RuntimeError as e:
            error = e
        except OSError as e:
            error = OSError(f"'{file}' cannot be written: {e.strerror}.")
    try:
        if error := broadcast(error, ranks):
            raise error
        yield
    finally:
        if lock is not None:
            lock.release()


def _open_index(
    output: Path, net: nn.Module, about: Dict[str, Any], dim: Optional[int], reduce: Optional[str], device: torch.device
) -> ImageIndex:
    """The index as it is, or an empty one."""
    if not output.exists():
        reduction = Reduction(reduce or 'sketch', _in_features(net, device), DIM if dim is None else dim)
        return ImageIndex([], torch.empty(0, reduction.dim, dtype=torch.float16), about, reduction)
    index = ImageIndex.load(output)
    check_same_model(index, about['name'], about['key'], output)
    kind, size = index.reduction.kind, index.reduction.dim
    # a sketch of as many numbers as descriptors have is none
    wanted = Reduction(reduce or kind.replace('none', 'sketch'), index.reduction.in_features, dim or size)
    if (wanted.kind, wanted.dim) != (kind, size):
        raise ValueError(f"'{output}' has vectors of {size} numbers by '{kind}': leave it so, or begin a new file.")
    index.about = about
    return index


def _index(model, folder, output, dim, reduce, batch_size, workers, amp, ranks: Ranks, progress: bool):
    net = load(model, ranks.device)
    amp_dtype = resolve_amp_dtype(amp, ranks.device)
    about = dict(model=_source(model), name=model_name(net), key=model_key(net), precision=precision(net, amp_dtype))
    index = _open_index(output, net, about, dim, reduce, ranks.device)
    listed, failed = _list_images(folder, output, index.rows)
    if not listed:
        raise FileNotFoundError(f"There is no image in '{folder}'.")
    key = json.dumps([about, *index.reduction.settings().items()], sort_keys=True)
    parts = _Parts(output.parent / f'.{output.name}.parts', key, index.reduction.dim)
    known = dict(zip(index.rows, index.vectors.numpy()))
    if ranks.is_first:
        known.update(parts.read())
    # the first process says what is left, since the others may write already
    left = broadcast([image for image in listed if image.row not in known] if ranks.is_first else None, ranks)
    if index.reduction.kind == 'pca' and index.reduction.components is None:
        _fit(index.reduction, net, listed, parts, batch_size, workers, amp_dtype, ranks)
    mine = [image for i, image in enumerate(left) if i // batch_size % ranks.world_size == ranks.rank]
    bar = tqdm(total=len(mine), desc='Indexing', unit='img', disable=None if progress and ranks.is_first else True)
    name = parts.new_name(ranks.rank)
    for good, descriptors, errors in _vectors(net, mine, batch_size, workers, amp_dtype):
        parts.append(name, [image.row for image in good], index.reduction(descriptors))
        failed += errors
        bar.update(len(good) + len(errors))
    bar.close()
    if ranks.world_size > 1:
        dist.barrier()
    if ranks.is_first:
        known.update(parts.read())
        _merge(index, folder, output, listed, known)
        index.save(output)
        parts.remove()
    if ranks.world_size > 1:
        dist.barrier()
    return (index if ranks.is_first else ImageIndex.load(output)), failed


def _source(model: Union[str, Path, nn.Module]) -> str:
    """Where a model is loaded from, of any working directory; '' if from nowhere."""
    if not isinstance(model, (str, os.PathLike)):
        return ''
    name = os.fspath(model)
    kind, _, place = name.partition(':')
    if kind.lower().replace('_', '-') == 'local-dir':
        return f'local-dir:{os.path.abspath(os.path.expanduser(place))}'
    return os.path.abspath(name) if os.path.exists(name) else name


def _merge(index: ImageIndex, folder: Path, output: Path, listed: Sequence[_Listed], known: Dict[Row, np.ndarray]):
    """Rows of the folder as it is now, after those of other folders."""
    inside = os.path.join(resolve_path(folder), '')
    others = [row for row in index.rows if not os.path.join(output.parent, row.path).startswith(inside)]
    rows = others + [image.row for image in listed if image.row in known]
    vectors = np.stack([known[row] for row in rows]) if rows else np.empty((0, index.reduction.dim), np.float16)
    index.rows, index.labels = rows, [row.label for row in rows]
    index.vectors = torch.from_numpy(vectors)


def _fit(reduction, net, listed, parts: _Parts, batch_size, workers, amp_dtype, ranks: Ranks):
    """Principal components of some images all over the folder, found by the first process once."""
    file = parts.folder / 'components.pt'
    if ranks.is_first and not file.exists():
        step = -(-len(listed) // _FITTED)
        sample = _vectors(net, listed[::step], batch_size, workers, amp_dtype)
        reduction.fit(torch.cat([descriptors.cpu() for _, descriptors, _ in sample]))
        torch.save(reduction.tensors(), file.with_suffix('.partial'))
        os.replace(file.with_suffix('.partial'), file)
    if ranks.world_size > 1:
        dist.barrier()
    reduction.load_tensors(torch.load(file, weights_only=True))


def remove_images(file: Union[str, Path], paths: Sequence[str]) -> int:
    """Take images out of an index.

    Args:
        file: File of the index.
        paths: Files or folders, as the index names them or as they are found from here.

    Returns:
        How many were taken out.

    Raises:
        OSError, ValueError: If the file is no index, or cannot be written.
        RuntimeError: If another process writes to it.
        ValueError: If a path names none of its images.
    """
    file = Path(file).resolve()
    with _locked(file, Ranks()):
        return _remove(file, paths)


def _remove(file: Path, paths: Sequence[str]) -> int:
    index = ImageIndex.load(file)
    places = [os.path.join(file.parent, row.path) for row in index.rows]
    gone = set()
    for path in paths:
        names = {str(resolve_path(path)), os.path.normpath(file.parent / path)}
        folders = tuple(os.path.join(name, '') for name in names)
        found = {row for row, place in zip(index.rows, places) if place in names or place.startswith(folders)}
        if not found:
            raise ValueError(f"'{file}' has no image '{path}'.")
        gone |= found
    kept = [i for i, row in enumerate(index.rows) if row not in gone]
    index.rows, index.vectors = [index.rows[i] for i in kept], index.vectors[kept]
    index.labels = [row.label for row in index.rows]
    index.save(file)
    return len(gone)


def run_index(
    model: str, folder: Optional[str], output: str, remove: Optional[Sequence[str]] = None, **options: Any
) -> int:
    """The command: index a folder, or take images out.

    Returns:
        Exit code: 0, or 1 if an image is not in the index.

    Raises:
        As `index_images` and `remove_images`.
    """
    if remove:
        print(f"{remove_images(output, remove)} images taken out of '{output}'.")
        return 0
    index, failed = index_images(model, folder, output, **options)
    for error in failed:
        print(f'timm-bilinear: error: {printable(error)}', file=sys.stderr)
    if os.environ.get('RANK', '0') == '0':
        size = Path(output).stat().st_size
        kind = index.reduction
        print(
            f"'{output}': {len(index.rows):,} images, {kind.dim} numbers each ({kind.kind} of {kind.in_features:,}),"
            f' {size / 1e6:.1f} MB'
        )
    return 1 if failed else 0
