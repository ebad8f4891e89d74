"""An index of images: their vectors and where they are, in one safetensors file, and exact search in it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..hub.partial import partial_path
from .vectors import Reduction

__all__ = ['ImageIndex', 'Row', 'relative_path', 'search_vectors']

_FORMAT = 'timm_bilinear index 1'
_BLOCK = 65_536  # vectors that queries are compared with at once


@dataclass(frozen=True)
class Row:
    """An image of an index.

    Args:
        path: Its file; relative to the folder of the index if it lies below that.
        label: Name of the folder it lies in, '' right in the indexed folder.
        size: Size of the file in bytes.
        time: Time of its last change, in nanoseconds.
    """

    path: str
    label: str
    size: int
    time: int


@dataclass
class ImageIndex:
    """Vectors of images.

    Args:
        rows: Images.
        vectors: (N, D) float16, of unit length but for rounding.
        about: 'model' (where it was loaded from), 'name', 'key' (hash of weights and preprocessing), 'data_config', and
            the settings of the reduction.
        reduction: From descriptors to vectors.
    """

    rows: List[Row]
    vectors: torch.Tensor
    about: Dict[str, Any]
    reduction: Reduction
    labels: List[str] = field(init=False)

    def __post_init__(self):
        self.labels = [row.label for row in self.rows]

    def save(self, file: Union[str, Path]):
        """Write it under another name first, which is changed when it is whole.

        Raises:
            OSError: If it cannot be written.
        """
        file = Path(file)
        names = sorted(set(self.labels))
        number = {name: i for i, name in enumerate(names)}
        texts = '\0'.join(row.path for row in self.rows).encode('utf-8', 'surrogateescape')
        tensors = dict(
            vectors=self.vectors.half().contiguous(),
            paths=torch.frombuffer(bytearray(texts), dtype=torch.uint8) if texts else torch.empty(0, dtype=torch.uint8),
            labels=torch.tensor([number[label] for label in self.labels], dtype=torch.int32),
            sizes=torch.tensor([row.size for row in self.rows], dtype=torch.int64),
            times=torch.tensor([row.time for row in self.rows], dtype=torch.int64),
            **self.reduction.tensors(),
        )
        # one entry, since safetensors writes several in the order of a hash table, another in each process
        about = json.dumps(dict(self.about, format=_FORMAT, label_names=names, **self.reduction.settings()))
        with partial_path(file.parent, f'.{file.name[:50]}.', '.partial') as partial:
            partial.touch()
            mode = (file if file.exists() else partial).stat().st_mode & 0o7777  # safetensors lets nobody else read
            try:
                save_file(tensors, partial, metadata=dict(about=about))
            except SafetensorError as e:
                raise OSError(f"Cannot write '{file}': {e}.") from e
            partial.chmod(mode)
            partial.replace(file)

    @classmethod
    def load(cls, file: Union[str, Path]) -> 'ImageIndex':
        """Read an index; its vectors stay in the file until they are used.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no index.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"There is no index '{file}'.")
        try:
            with safe_open(file, 'pt') as f:
                about = json.loads((f.metadata() or {}).get('about', '{}'))
                if not isinstance(about, dict) or about.pop('format', None) != _FORMAT:
                    raise ValueError('it is no index of images')
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, ValueError, KeyError, OSError) as e:
            raise ValueError(f"'{file}' is no index of timm-bilinear: {e}.") from e
        names = about.pop('label_names')
        reduction = Reduction(about.pop('reduce'), about.pop('in_features'), about.pop('dim'))
        reduction.load_tensors(tensors)
        texts = tensors['paths'].numpy().tobytes().decode('utf-8', 'surrogateescape')
        paths = texts.split('\0') if len(tensors['labels']) else []
        rows = [
            Row(path, names[label], size, time)
            for path, label, size, time in zip(
                paths, *(tensors[name].tolist() for name in ('labels', 'sizes', 'times')), strict=True
            )
        ]
        return cls(rows, tensors['vectors'], about, reduction)

    def search(self, queries: torch.Tensor, topk: int = 10) -> Tuple[torch.Tensor, torch.Tensor]:
        """`search_vectors` among the index's vectors."""
        return search_vectors(queries, self.vectors, topk)


def _blocks(vectors: torch.Tensor, size: int) -> Iterator[Tuple[int, torch.Tensor]]:
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def search_vectors(
    queries: torch.Tensor, vectors: torch.Tensor, topk: int = 10, block: int = _BLOCK
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The vectors of largest inner product with each query, exactly; of equal products the earlier first.

    Args:
        queries: (Q, D) of unit length.
        vectors: (N, D), of any floating point dtype; a block of them is in memory in float32 at a time.
        topk: Number of vectors for each query, N at most.
        block: Vectors in a block.

    Returns:
        Inner products (Q, k) in descending order, and the vectors' places (Q, k).

    Raises:
        ValueError: If sizes do not agree.
    """
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(f'Queries {tuple(queries.shape)} and vectors {tuple(vectors.shape)} must be of one size.')
    queries = queries.float()
    best = queries.new_full((len(queries), 0), 0.0)
    places = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start, part in _blocks(vectors, block):
        scores = queries @ part.to(queries).T
        best = torch.cat([best, scores], 1)
        found = torch.arange(start, start + len(part), device=places.device).expand(len(queries), -1)
        places = torch.cat([places, found], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :topk], order[:, :topk]
        places = places.gather(1, order)
    return best, places


def relative_path(path: Path, index_file: Path) -> str:
    """A path as an index names it."""
    try:
        return str(path.relative_to(index_file.resolve().parent))
    except ValueError:
        return str(path)
