"""An index of images: their vectors and where they are, in one safetensors file, and exact search in it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..hub.partial import partial_path
from .vectors import Reduction

__all__ = ['ROUNDING', 'ImageIndex', 'Row', 'rank_places', 'relative_path', 'resolve_path', 'search_vectors']

_FORMAT = 'timm_bilinear index 2'
_OLD_FORMAT = 'timm_bilinear index 1'  # whose hash of the model did not tell one pooling from another
_BLOCK = 65_536  # vectors that queries are compared with at once
_ROWS = 1024  # vectors of which products are taken in float64 at once
ROUNDING = 1e-5  # many times that of a product of two vectors of unit length in float32


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
    label: str = field(compare=False)  # it may be learned later, and the image be the same
    size: int
    time: int


@dataclass
class ImageIndex:
    """Vectors of images.

    Args:
        rows: Images.
        vectors: (N, D) float16, of unit length but for rounding.
        about: 'model' (where it was loaded from), 'name', 'key' (hash of layers, weights and preprocessing) and
            'precision'.
        reduction: From descriptors to vectors.
        file: Where it was read from.
    """

    rows: List[Row]
    vectors: torch.Tensor
    about: Dict[str, Any]
    reduction: Reduction
    file: Optional[Path] = None
    labels: List[str] = field(init=False)

    def __post_init__(self):
        self.labels = [row.label for row in self.rows]

    def save(self, file: Union[str, Path]):
        """Write it under another name first, which is changed when it is whole.

        Raises:
            OSError: If it cannot be written.
        """
        file = Path(file).resolve()  # a link stays one
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
                version = about.pop('format', None) if isinstance(about, dict) else None
                if version not in (_FORMAT, _OLD_FORMAT):
                    raise ValueError('it is no index of images')
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, ValueError, KeyError, OSError) as e:
            raise ValueError(f"'{file}' is no index of timm-bilinear: {e}.") from e
        if version == _OLD_FORMAT:
            raise ValueError(f"'{file}' is an index of an older version, which mixed up poolings: make it anew.")
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
        return cls(rows, tensors['vectors'], about, reduction, file)

    def search(self, queries: torch.Tensor, topk: int = 10) -> Tuple[torch.Tensor, torch.Tensor]:
        """`search_vectors` among the index's vectors."""
        return search_vectors(queries, self.vectors, topk)


def rank_places(
    query: torch.Tensor, vectors: torch.Tensor, places: torch.Tensor, topk: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Of vectors at some places those of largest inner product with a query; of equal products the earlier first.

    Equal vectors have equal products here, which are summed up in float64 row by row: the last bit of a product of
    matrices depends on where in the matrix a vector is.

    Args:
        query: (D,).
        vectors: (N, D).
        places: Some of them, (n,) int64 in ascending order.
        topk: Number of vectors, n at most.

    Returns:
        Inner products (k,), float32, in descending order, and the vectors' places (k,).
    """
    query = query.double()
    products = [(vectors[some].to(query) * query).sum(1).float() for some in places.split(_ROWS)]
    scores, order = torch.cat(products).sort(descending=True, stable=True)
    return scores[:topk], places[order[:topk].cpu()]


def search_vectors(
    queries: torch.Tensor, vectors: torch.Tensor, topk: int = 10, block: int = _BLOCK
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The vectors of largest inner product with each query, exactly; of equal products the earlier first.

    Args:
        queries: (Q, D) of unit length.
        vectors: (N, D) of unit length, of any floating point dtype; a block of them is in memory in float32 at a time.
        topk: Number of vectors for each query, N at most.
        block: Vectors in a block.

    Returns:
        Inner products (Q, k), float32, in descending order, and the vectors' places (Q, k).

    Raises:
        ValueError: If sizes do not agree.
    """
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(f'Queries {tuple(queries.shape)} and vectors {tuple(vectors.shape)} must be of one size.')
    topk = min(topk, len(vectors))
    best, places = queries.new_empty(len(queries), topk).float(), torch.empty(len(queries), topk, dtype=torch.int64)
    if not best.numel():
        return best, places
    # what may be among the best, found in float32, is ranked by products that are the same with equal vectors
    best.fill_(-torch.inf)
    margin = ROUNDING * queries.float().norm(dim=1, keepdim=True)
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block]
        scores = queries.float() @ part.to(queries.device, torch.float32).T
        least = best[:, -1:]
        if len(part) >= topk:
            least = least.maximum(scores.topk(topk).values[:, -1:])
        for i, near in enumerate(~(scores < least - margin)):
            some = near.nonzero()[:, 0].cpu()
            products, found = rank_places(queries[i], part, some, topk)
            products, order = torch.cat([best[i], products]).sort(descending=True, stable=True)
            best[i] = products[:topk]
            places[i] = torch.cat([places[i], start + found])[order[:topk].cpu()]
    return best, places.to(best.device)


def resolve_path(path: Union[str, Path]) -> Path:
    """The one absolute path of a file or folder, however it is spelt; a link to a file stays one."""
    path = Path(path)
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def relative_path(path: Path, index_file: Path) -> str:
    """A path of `resolve_path` as an index names it."""
    try:
        return str(path.relative_to(index_file.resolve().parent))
    except ValueError:
        return str(path)
