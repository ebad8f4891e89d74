"""Measures of retrieval against kept libraries, and against the protocols written out query by query."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

import timm_bilinear
from timm_bilinear.tools.ranking import rerank_distances


def vectors(count, classes, seed, size=16, spread=1.5):
    """Vectors around one for each class, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, size, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return F.normalize(centres[labels] + spread * torch.randn(count, size, generator=generator)), labels


def reference(query, labels, gallery, gallery_labels, cameras=None, gallery_cameras=None, skip_self=False):
    """As the papers tell it, one query after another."""
    recalls, map_at_r, ranks, average = {k: [] for k in (1, 2, 4, 8)}, [], {k: [] for k in (1, 5, 10)}, []
    for i, q in enumerate(query):
        ranked = sorted(range(len(gallery)), key=lambda j: (-float(q @ gallery[j]), j))
        kept = []
        for j in ranked:
            same = labels[i] == gallery_labels[j]
            same_camera = cameras is not None and cameras[i] == gallery_cameras[j]
            if not ((skip_self and i == j) or gallery_labels[j] == -1 or (same and same_camera)):
                kept.append(same)
        if labels[i] == -1 or not any(kept):
            continue
        places = [n for n, right in enumerate(kept, 1) if right]
        for k in recalls:
            recalls[k].append(places[0] <= k)
        for k in ranks:
            ranks[k].append(places[0] <= k)
        relevant = len(places)
        precisions = [(m, place) for m, place in enumerate(places, 1)]
        map_at_r.append(sum(m / place for m, place in precisions if place <= relevant) / relevant)
        average.append(sum(m / place for m, place in precisions) / relevant)
    out = {f'recall@{k}': v for k, v in recalls.items()}
    out.update({'MAP@R': map_at_r, **{f'rank-{k}': v for k, v in ranks.items()}, 'mAP': average})
    return {k: 100 * sum(map(float, v)) / len(v) for k, v in out.items()}


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize('seed', range(3))
def test_by_the_protocols(seed):
    """More queries than are ranked at once."""
    x, labels = vectors(300, 12, seed)
    assert_same(
        timm_bilinear.retrieval_metrics(x, labels),
        reference(x, labels, x, labels, skip_self=True),
    )
    y, others = vectors(90, 12, seed)
    assert_same(timm_bilinear.retrieval_metrics(x, labels, y, others), reference(x, labels, y, others))


@pytest.mark.parametrize('seed', range(3))
def test_reidentification(seed):
    """Cameras, junk of identity -1, distractors that no query shows, queries without a match; with ties."""
    x, labels = vectors(60, 9, seed)
    y, others = vectors(80, 11, seed)
    y[::5] = y[1::5]  # equal vectors of other classes
    generator = np.random.default_rng(seed)
    others[generator.integers(80, size=9)] = -1
    labels[:2] = -1
    cameras, gallery_cameras = generator.integers(3, size=60), generator.integers(3, size=80)
    found = timm_bilinear.retrieval_metrics(x, labels, y, others, cameras, gallery_cameras)
    assert_same(found, reference(x, labels, y, others, cameras, gallery_cameras))
    assert found != timm_bilinear.retrieval_metrics(x, labels, y, others)
    named = timm_bilinear.retrieval_metrics(
        x, labels, y, others, [f'c{c}' for c in cameras], tuple(f'c{c}' for c in gallery_cameras)
    )
    assert named == found


def test_by_pytorch_metric_learning():
    accuracy = pytest.importorskip('pytorch_metric_learning.utils.accuracy_calculator')
    inference = pytest.importorskip('pytorch_metric_learning.utils.inference')
    distance = pytest.importorskip('pytorch_metric_learning.distances').CosineSimilarity()
    judge = accuracy.AccuracyCalculator(
        include=('precision_at_1', 'mean_average_precision_at_r', 'mean_average_precision'),
        k='max_bin_count',
        knn_func=inference.CustomKNN(distance),
    )
    x, labels = vectors(200, 10, 0)
    found, wanted = timm_bilinear.retrieval_metrics(x, labels), judge.get_accuracy(x, labels)
    assert found['recall@1'] == pytest.approx(100 * wanted['precision_at_1'], abs=1e-6)
    assert found['MAP@R'] == pytest.approx(100 * wanted['mean_average_precision_at_r'], abs=1e-6)
    y, others = vectors(150, 10, 0)
    found, wanted = timm_bilinear.retrieval_metrics(x, labels, y, others), judge.get_accuracy(x, labels, y, others)
    assert found['MAP@R'] == pytest.approx(100 * wanted['mean_average_precision_at_r'], abs=1e-6)
    whole = accuracy.AccuracyCalculator(
        include=('mean_average_precision',), k=len(y), knn_func=inference.CustomKNN(distance)
    ).get_accuracy(x, labels, y, others)
    assert found['mAP'] == pytest.approx(100 * whole['mean_average_precision'], abs=1e-6)


def test_by_torchmetrics():
    x, labels = vectors(100, 8, 1)
    y, others = vectors(120, 8, 1)
    scores, right = x @ y.T + 2, labels[:, None] == others[None]
    found = timm_bilinear.retrieval_metrics(x, labels, y, others)
    # there nothing is retrieved whose score is not above 0
    average = [retrieval_average_precision(s, r) for s, r in zip(scores, right)]
    assert found['mAP'] == pytest.approx(100 * float(torch.stack(average).mean()), abs=1e-4)
    for k in (1, 2, 4, 8):
        hits = [retrieval_hit_rate(s, r, top_k=k) for s, r in zip(scores, right)]
        assert found[f'recall@{k}'] == pytest.approx(100 * float(torch.stack(hits).mean()), abs=1e-4)


def _torchreid(path):
    """A module of torchreid alone: the package imports what it does not need."""
    spec = importlib.util.find_spec('torchreid')
    if spec is None:
        pytest.skip('pip install --no-deps torchreid')
    file = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_by_torchreid():
    rank = _torchreid('reid/metrics/rank.py')
    x, labels = vectors(80, 12, 2)
    y, others = vectors(150, 12, 2)
    cameras, gallery_cameras = np.random.default_rng(0).integers(4, size=80), np.arange(150) % 4
    distances = (1 - x.double() @ y.double().T).numpy()
    args = (labels.numpy(), others.numpy(), cameras, gallery_cameras)
    cmc, average = rank.evaluate_rank(distances, *args, use_cython=False)
    found = timm_bilinear.retrieval_metrics(x.double(), labels, y.double(), others, cameras, gallery_cameras)
    assert found['mAP'] == pytest.approx(100 * average, abs=1e-6)
    for k in (1, 5, 10):
        assert found[f'rank-{k}'] == pytest.approx(100 * cmc[k - 1], abs=1e-4)


def test_rerank_by_torchreid():
    rerank = _torchreid('reid/utils/rerank.py').re_ranking
    x, y = vectors(40, 6, 3)[0].double(), vectors(90, 6, 3)[0].double()
    between = [torch.cdist(a, b).numpy() for a, b in ((x, y), (x, x), (y, y))]
    wanted = torch.from_numpy(rerank(*between).astype(np.float64))
    torch.testing.assert_close(rerank_distances(x, y), wanted, rtol=0, atol=1e-5)


def kept(x, k1=20, k2=6, weight=0.3):
    """Distances of a set to itself, each vector of it once, as the authors' re_ranking has them."""
    count = len(x)
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    distances = (distances / distances.max(0)).T
    ranks = np.argsort(distances, kind='stable')
    encodings = np.zeros((count, count))
    for i in range(count):
        near = ranks[i, : k1 + 1]
        found = near[(ranks[near, : k1 + 1] == i).any(1)]
        expanded = found
        for j in found:
            near = ranks[j, : k1 // 2 + 1]
            others = near[(ranks[near, : k1 // 2 + 1] == j).any(1)]
            if len(np.intersect1d(others, found)) > 2 / 3 * len(others):
                expanded = np.append(expanded, others)
        expanded = np.unique(expanded)
        weights = np.exp(-distances[i, expanded])
        encodings[i, expanded] = weights / weights.sum()
    encodings = np.stack([encodings[row[:k2]].mean(0) for row in ranks])
    shared = np.minimum(encodings[:, None], encodings[None]).sum(-1)
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * distances


def test_rerank_of_a_set_in_itself():
    x, labels = vectors(80, 8, 7, spread=2.0)
    wanted = torch.from_numpy(kept(x.double().numpy()))
    torch.testing.assert_close(rerank_distances(x.double()), wanted, rtol=0, atol=1e-9)
    found = timm_bilinear.retrieval_metrics(x.double(), labels, rerank=True)
    precisions = []
    for i, row in enumerate(wanted.numpy()):
        order = [j for j in np.argsort(row, kind='stable') if j != i]
        places = [n for n, j in enumerate(order, 1) if labels[j] == labels[i]]
        precisions.append(np.mean([m / place for m, place in enumerate(places, 1)]))
    assert found['mAP'] == pytest.approx(100 * np.mean(precisions), abs=1e-6)


def test_rerank_of_equal_vectors():
    x = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    for dtype in (torch.float32, torch.float64):
        for distances in (rerank_distances(x[:4].to(dtype), x[4:].to(dtype)), rerank_distances(x.to(dtype))):
            assert distances.isfinite().all() and (distances == distances[0, 0]).all()
    found = timm_bilinear.retrieval_metrics(x[:1], [0], x[1:4], [1, 0, 1], rerank=True)
    assert found['mAP'] == 50


@pytest.mark.parametrize('count', [7, 37, 101])
def test_equal_vectors_stay_in_order(count):
    """Products with a single query, of which the last bit depends on the place of a vector."""
    x = F.normalize(torch.randn(40, 512))
    gallery = x[:1].expand(count, -1).contiguous()
    for query in x:
        found = timm_bilinear.retrieval_metrics(query[None], [0], gallery, [1] * (count - 1) + [0])
        assert found['mAP'] == pytest.approx(100 / count)


def test_rerank_helps():
    x, labels = vectors(60, 6, 4, spread=2.0)
    y, others = vectors(200, 6, 4, spread=2.0)
    plain = timm_bilinear.retrieval_metrics(x, labels, y, others)
    again = timm_bilinear.retrieval_metrics(x, labels, y, others, rerank=True)
    assert again['mAP'] > plain['mAP'] + 1


def test_kinds_of_labels():
    x, labels = vectors(50, 5, 5)
    wanted = timm_bilinear.retrieval_metrics(x, labels)
    for given in (labels.numpy(), labels.tolist(), [f'class {i}' for i in labels.tolist()], labels.to(torch.int32)):
        assert timm_bilinear.retrieval_metrics(x, given) == wanted
    assert all(math.isfinite(v) and 0 <= v <= 100 for v in wanted.values())


X, L = vectors(10, 3, 6)


@pytest.mark.parametrize(
    'args, kwargs, error, message',
    [
        ((X.tolist(), L), {}, TypeError, "'query'"),
        ((X.long(), L), {}, TypeError, "'query'"),
        ((2 * X, L), {}, ValueError, "'query' must have rows of unit length, row 0 has 2"),
        ((X * torch.nan, L), {}, ValueError, "'query' must have rows of unit length"),
        ((X[0], L), {}, ValueError, "'query' must be"),
        ((X[:0], L[:0]), {}, ValueError, "'query' must be"),
        ((X, L[:9]), {}, ValueError, "'query_labels' must be 10.*got 9"),
        ((X, L, X), {}, ValueError, "'gallery_labels' are missing"),
        ((X, L, None, L), {}, ValueError, "'gallery_labels'"),
        ((X, L, X[:, :-1] / X[:, :-1].norm(dim=1, keepdim=True), L), {}, ValueError, '16 columns.*15'),
        ((X, L, X, L), dict(query_cameras=L), ValueError, "'gallery_cameras' are missing"),
        ((X, L, X, L), dict(query_cameras=L, gallery_cameras=L[:3]), ValueError, "'gallery_cameras' must be 10"),
        ((X, range(10)), {}, ValueError, 'No query has a match'),
        ((X, [-1] * 10), {}, ValueError, 'No query has a match'),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm_bilinear.retrieval_metrics(*args, **kwargs)
