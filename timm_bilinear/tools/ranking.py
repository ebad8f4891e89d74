"""Measures of retrieval and re-identification, by the protocols of their fields.

Recall@k and MAP@R as in Musgrave, Belongie, Lim, 'A Metric Learning Reality Check', https://arxiv.org/abs/2003.08505.
Cumulated matching and mAP as for Market-1501, Zheng et al., 'Scalable Person Re-identification', ICCV 2015.
Re-ranking as in Zhong, Zheng, Cao, Li, 'Re-ranking Person Re-identification with k-reciprocal Encoding',
https://arxiv.org/abs/1701.08398.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch

__all__ = ['rerank_distances', 'retrieval_metrics']

Labels = Union[Sequence[Any], np.ndarray, torch.Tensor]

_RECALLS = (1, 2, 4, 8)
_RANKS = (1, 5, 10)
_IGNORED = -1  # identity of what Market-1501 calls junk
_BLOCK = 256  # queries that are ranked at once
_COLUMNS = 4096  # vectors that these are compared with at once


def retrieval_metrics(
    query: torch.Tensor,
    query_labels: Labels,
    gallery: Optional[torch.Tensor] = None,
    gallery_labels: Optional[Labels] = None,
    query_cameras: Optional[Labels] = None,
    gallery_cameras: Optional[Labels] = None,
    *,
    rerank: bool = False,
) -> Dict[str, float]:
    """Measure how well vectors find those of their own class by their cosine.

    Of equal cosines the earlier image of the gallery comes first. Queries without a match in the gallery are left out,
    as are queries and gallery images of the identity -1.

    Args:
        query: (Q, D) vectors of unit length.
        query_labels: Q classes: numbers or texts.
        gallery: (G, D) vectors of unit length to look in; None for the queries, each without itself.
        gallery_labels: G classes.
        query_cameras: Q cameras, numbers or texts; with them gallery images of a query's identity and camera are left
            out, as in person re-identification.
        gallery_cameras: G cameras.
        rerank: Rank by k-reciprocal neighbours too, with k1 = 20, k2 = 6 and lambda = 0.3.

    Returns:
        In percent: 'recall@1', 'recall@2', 'recall@4', 'recall@8', 'MAP@R', 'rank-1', 'rank-5', 'rank-10' and 'mAP'.

    Raises:
        TypeError: If vectors are no floating point tensors.
        ValueError: If shapes do not agree, what belongs together is not given together, a vector is not of unit length,
            or no query has a match.
    """
    is_same = gallery is None
    if is_same:
        if gallery_labels is not None or gallery_cameras is not None:
            raise ValueError("'gallery_labels' and 'gallery_cameras' are those of a 'gallery', and there is none.")
        gallery, gallery_labels, gallery_cameras = query, query_labels, query_cameras
    elif gallery_labels is None:
        raise ValueError("'gallery_labels' are missing.")
    if (query_cameras is None) != (gallery_cameras is None):
        missing = 'query_cameras' if query_cameras is None else 'gallery_cameras'
        raise ValueError(f"'{missing}' are missing: cameras are those of both sides.")
    query, gallery = _check_vectors('query', query), _check_vectors('gallery', gallery)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"'query' has {query.shape[1]} columns and 'gallery' {gallery.shape[1]}.")
    sides = _Sides(
        *_as_numbers('labels', (query_labels, gallery_labels), (len(query), len(gallery)), query.device),
        *_as_numbers('cameras', (query_cameras, gallery_cameras), (len(query), len(gallery)), query.device),
    )
    distances = rerank_distances(query, None if is_same else gallery) if rerank else None
    sums: Dict[str, float] = {}
    count = 0
    for start in range(0, len(query), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = _cosines(query[rows], gallery) if distances is None else -distances[rows]
        right, is_left_out = _relevance(sides, rows, is_same)
        parts, counted = _measure(scores, right, is_left_out)
        count += counted
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
    if not count:
        raise ValueError('No query has a match in the gallery.')
    return {name: 100 * value / count for name, value in sums.items()}


class _Sides(NamedTuple):
    """Classes and cameras as numbers, -1 for the identity that is ignored; None without cameras."""

    query_labels: torch.Tensor
    gallery_labels: torch.Tensor
    query_cameras: Optional[torch.Tensor]
    gallery_cameras: Optional[torch.Tensor]


def _check_vectors(name: str, vectors: torch.Tensor) -> torch.Tensor:
    if not isinstance(vectors, torch.Tensor) or not vectors.is_floating_point():
        raise TypeError(f"'{name}' must be a floating point tensor (N, D), got {type(vectors).__name__}.")
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"'{name}' must be (N, D) with at least one row, got {tuple(vectors.shape)}.")
    vectors = vectors.detach()
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    lengths = vectors.norm(dim=1)
    wrong = ~((lengths - 1).abs() < 1e-2)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"'{name}' must have rows of unit length, row {row} has {float(lengths[row]):.4g}.")
    return vectors


def _cosines(query: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Products (B, G), float32, the same with equal vectors: summed up in float32 they depend on a vector's place."""
    query = query.double()
    return torch.cat([(query @ part.double().T).float() for part in gallery.split(_COLUMNS)], 1)


def _as_list(values: Labels) -> List[Any]:
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else list(values)


def _as_numbers(
    name: str, sides: Tuple[Optional[Labels], Optional[Labels]], sizes: Tuple[int, int], device: torch.device
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Numbers that are equal where the values of both sides are."""
    if sides[0] is None:
        return None, None
    lists = [_as_list(side) for side in sides]
    for side, values, size in zip(('query', 'gallery'), lists, sizes):
        if len(values) != size:
            raise ValueError(f"'{side}_{name}' must be {size}, one for each vector, got {len(values)}.")
    numbers: Dict[Any, int] = {_IGNORED: _IGNORED} if name == 'labels' else {}
    for values in lists:
        for value in values:
            numbers.setdefault(value, len(numbers))
    return tuple(torch.tensor([numbers[v] for v in values], device=device) for values in lists)


def _relevance(sides: _Sides, rows: slice, is_same: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Which gallery images are right for the queries of a block, and which are left out, (B, G) each."""
    labels = sides.query_labels[rows, None]
    right = labels == sides.gallery_labels[None]
    is_left_out = (sides.gallery_labels == _IGNORED).expand_as(right) | (labels == _IGNORED)
    if sides.query_cameras is not None:
        is_left_out = is_left_out | (right & (sides.query_cameras[rows, None] == sides.gallery_cameras[None]))
    if is_same:
        queries = torch.arange(len(sides.query_labels), device=right.device)
        is_left_out = is_left_out | (queries[rows, None] == queries[None])
    return right & ~is_left_out, is_left_out


def _measure(scores: torch.Tensor, right: torch.Tensor, is_left_out: torch.Tensor) -> Tuple[Dict[str, float], int]:
    """Sums of each measure over the queries of a block that have a match, and how many these are."""
    has_match = right.any(1)
    scores, right = scores[has_match].masked_fill(is_left_out[has_match], -torch.inf), right[has_match]
    order = scores.argsort(dim=1, descending=True, stable=True)
    right = right.gather(1, order)
    places = torch.arange(1, right.shape[1] + 1, device=right.device)
    precision = right.cumsum(1).double() / places * right  # at the places of what is right
    relevant = right.sum(1, keepdim=True)
    first = right.int().argmax(1)
    sums = {f'recall@{k}': float((first < k).sum()) for k in _RECALLS}
    sums['MAP@R'] = float(((precision * (places <= relevant)).sum(1) / relevant[:, 0]).sum())
    sums.update({f'rank-{k}': float((first < k).sum()) for k in _RANKS})
    sums['mAP'] = float((precision.sum(1) / relevant[:, 0]).sum())
    return sums, len(right)


def rerank_distances(
    query: torch.Tensor, gallery: Optional[torch.Tensor] = None, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> torch.Tensor:
    """Distances that tell neighbours which are each other's from those that are not.

    It takes memory for (Q + G)^2 numbers.

    Args:
        query: (Q, D) vectors.
        gallery: (G, D) vectors; None for the queries, each of which is then there once.
        k1: Neighbours that may be reciprocal ones.
        k2: Neighbours whose encodings are averaged.
        weight: Weight, lambda, of the distances themselves beside those of the encodings.

    Returns:
        (Q, G) distances.
    """
    vectors = query if gallery is None else torch.cat([query, gallery])
    count, first = len(vectors), 0 if gallery is None else len(query)  # the gallery's first row
    distances = torch.cdist(vectors, vectors).square()
    largest = distances.amax(0)  # of each row
    distances = (distances / torch.where(largest > 0, largest, 1.0)).T  # equal vectors have distances of 0
    nearest = distances.argsort(dim=1, stable=True)[:, : k1 + 1]
    half = round(k1 / 2)

    def reciprocal(row: int, k: int) -> torch.Tensor:
        """Those of a row's k nearest, and itself, that have it among theirs."""
        candidates = nearest[row, : k + 1]
        return candidates[(nearest[candidates, : k + 1] == row).any(1)]

    encodings = torch.zeros_like(distances)
    for row in range(count):
        found = reciprocal(row, k1)
        expanded = [found]
        for candidate in found.tolist():
            others = reciprocal(candidate, half)
            if torch.isin(others, found).sum() > 2 / 3 * len(others):
                expanded.append(others)
        members = torch.cat(expanded).unique()
        weights = torch.exp(-distances[row, members])
        encodings[row, members] = weights / weights.sum()
    if k2 > 1:
        encodings = torch.stack([encodings[rows].mean(0) for rows in nearest[:, :k2]])
    of_gallery = encodings[first:]
    shared = torch.stack([torch.minimum(row, of_gallery).sum(1) for row in encodings[: len(query)]])
    jaccard = 1 - shared / (2 - shared)
    return (1 - weight) * jaccard + weight * distances[: len(query), first:]
