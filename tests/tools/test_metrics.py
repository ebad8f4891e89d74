"""Metrics against scikit-learn, torchmetrics, scipy and formulas written out anew."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, rankdata

from timm_bilinear.tools.metrics import (
    calibration_error,
    class_table,
    confused_pairs,
    confusion_matrix,
    image_metrics,
    mean_per_class,
    summarize,
    target_ranks,
    wilson_interval,
)


def batch(images, classes, seed=0, missing=(), scale=2.0):
    """Logits that lean to the target, of classes without those in `missing`."""
    gen = torch.Generator().manual_seed(seed)
    shown = torch.tensor([c for c in range(classes) if c not in missing])
    targets = shown[torch.randint(len(shown), (images,), generator=gen)]
    logits = scale * torch.randn(images, classes, generator=gen)
    logits[torch.arange(images), targets] += 1.5
    return logits, targets


CASES = {
    'many': dict(images=400, classes=23),
    'missing classes': dict(images=120, classes=12, missing=(0, 5, 11)),
    'three classes': dict(images=60, classes=3),
    'two classes': dict(images=50, classes=2),
    'six classes': dict(images=50, classes=6),
    'one image': dict(images=1, classes=8),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return batch(**request.param)


def test_agrees_with_scikit_learn(case):
    sklearn = pytest.importorskip('sklearn.metrics')
    logits, targets = case
    classes = logits.shape[1]
    metrics = image_metrics(logits, targets)
    result = summarize(metrics, classes)
    labels, guesses = list(range(classes)), logits.numpy().argmax(1)
    assert metrics.predictions.tolist() == guesses.tolist()
    assert result['top1'] == pytest.approx(100 * sklearn.accuracy_score(targets, guesses))
    recalls = sklearn.recall_score(targets, guesses, labels=sorted(set(targets.tolist())), average='macro')
    assert result['mean_per_class'] == pytest.approx(100 * recalls)
    probs = logits.double().softmax(1).numpy()
    probs /= probs.sum(1, keepdims=True)
    assert result['loss'] == pytest.approx(sklearn.log_loss(targets, probs, labels=labels), rel=1e-5)
    if classes > 5:
        top5 = sklearn.top_k_accuracy_score(targets, logits.numpy(), k=5, labels=labels)
        assert result['top5'] == pytest.approx(100 * top5)
    assert ('top5' in result) == (classes > 5)
    matrix = sklearn.confusion_matrix(targets, guesses, labels=labels)
    assert (confusion_matrix(targets, metrics.predictions, classes) == matrix).all()
    for k, row in enumerate(class_table(targets, metrics.predictions, classes)):
        errors = np.where(np.arange(classes) == k, 0, matrix[k])
        worst = int(errors.argmax()) if errors.any() else None
        assert row == (matrix[k].sum(), matrix[k, k], worst, errors.max())


def test_agrees_with_torchmetrics(case):
    torchmetrics = pytest.importorskip('torchmetrics.functional.classification')
    logits, targets = case
    classes = logits.shape[1]
    metrics = image_metrics(logits, targets)
    right = metrics.predictions == targets
    ours = calibration_error(metrics.probabilities, right)
    theirs = torchmetrics.multiclass_calibration_error(logits.softmax(1), targets, classes, n_bins=15, norm='l1')
    assert ours == pytest.approx(100 * theirs.item(), abs=1e-3)
    k = min(5, classes)
    theirs = torchmetrics.multiclass_accuracy(logits, targets, classes, average='micro', top_k=k)
    assert (metrics.ranks <= k).float().mean().item() == pytest.approx(theirs.item())


@pytest.mark.parametrize('images', [1, 2, 7, 100, 12345])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.93, 1.0])
def test_wilson_interval_is_scipys(images, share):
    correct = round(images * share)
    theirs = binomtest(correct, images).proportion_ci(0.95, method='wilson')
    assert wilson_interval(correct, images) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-9)


def test_wilson_interval_covers():
    """What an interval of 95 % promises, counted over draws of a binomial."""
    rng = np.random.default_rng(0)
    draws = rng.binomial(80, 0.9, 4000)
    covered = [low <= 90 <= high for low, high in (wilson_interval(int(n), 80) for n in draws)]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize('correct, images', [(-1, 5), (6, 5), (0, 0)])
def test_wilson_interval_refuses(correct, images):
    with pytest.raises(ValueError, match="'correct' must be"):
        wilson_interval(correct, images)


def calibration_reference(probabilities, correct, bins=15):
    """Guo et al. (2017), equation 3, with bins ((m - 1) / M, m / M]."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, p in enumerate(probabilities) if (m - 1) / bins < p <= m / bins]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            confidence = sum(probabilities[i] for i in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    return 100 * total


@pytest.mark.parametrize('seed', range(3))
def test_calibration_error_is_the_articles(seed):
    rng = np.random.default_rng(seed)
    # certain ones too, and on the bins' edges
    probs = np.concatenate([rng.uniform(0.01, 1, 200), np.arange(1, 16) / 15, np.ones(9)])
    correct = rng.random(len(probs)) < probs * 0.8
    ours = calibration_error(torch.from_numpy(probs), torch.from_numpy(correct))
    assert ours == pytest.approx(calibration_reference(probs.tolist(), correct.tolist()), abs=1e-9)


def test_ties_go_to_the_lower_index():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.integers(0, 4, (500, 9))).float()
    targets = torch.from_numpy(rng.integers(0, 9, 500))
    metrics = image_metrics(logits, targets)
    order = np.argsort(-logits.numpy(), 1, kind='stable')
    places = (order == targets.numpy()[:, None]).argmax(1) + 1
    assert metrics.ranks.tolist() == places.tolist()
    assert metrics.predictions.tolist() == order[:, 0].tolist()
    lowest = np.stack([rankdata(-row, method='min') for row in logits.numpy()])
    assert (metrics.ranks.numpy() >= lowest[np.arange(500), targets]).all()


def test_equal_logits_are_right_for_one_class_only():
    targets = torch.arange(10)
    result = summarize(image_metrics(torch.zeros(10, 10), targets), 10)
    assert (result['top1'], result['top5'], result['mean_per_class']) == (10.0, 50.0, 10.0)
    assert result['loss'] == pytest.approx(math.log(10))
    assert result['calibration_error'] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('right', [True, False])
@pytest.mark.parametrize('classes', [2, 7])
def test_perfect_and_zero(right, classes):
    targets = torch.arange(classes).repeat(5)
    logits = torch.full((len(targets), classes), -50.0)
    logits[torch.arange(len(targets)), targets if right else (targets + 1) % classes] = 50.0
    result = summarize(image_metrics(logits, targets), classes)
    assert result['top1'] == result['mean_per_class'] == 100 * right
    assert result['calibration_error'] == pytest.approx(0 if right else 100)
    assert result['top1_high'] == 100 if right else result['top1_low'] == 0
    assert 0 <= result['top1_low'] < result['top1_high'] <= 100
    assert result['loss'] == pytest.approx(0 if right else 100)
    json.dumps(result, allow_nan=False)


def test_one_class_is_always_right():
    result = summarize(image_metrics(torch.randn(4, 1), torch.zeros(4, dtype=torch.long)), 1)
    assert (result['top1'], result['loss'], result['calibration_error']) == (100, 0, 0)


def test_large_and_half_precision_logits_stay_finite():
    logits = torch.tensor([[6e4, -6e4, 0.0], [0.0, 0.0, 6e4]]).half()
    result = summarize(image_metrics(logits, torch.tensor([0, 1])), 3)
    assert (result['top1'], result['loss']) == (50.0, pytest.approx(3e4, rel=1e-3))
    json.dumps(result, allow_nan=False)


def test_nan_is_never_right():
    logits = torch.zeros(3, 4)
    logits[0, 2] = math.nan
    logits[1] = math.nan
    assert target_ranks(logits, torch.tensor([0, 0, 0])).tolist() == [2, 4, 1]
    assert target_ranks(logits, torch.tensor([2, 1, 3])).tolist() == [4, 4, 4]


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match='no images'):
        summarize(image_metrics(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), 4)


def test_pairs_count_both_directions():
    targets = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    guesses = torch.tensor([1, 1, 0, 0, 1, 3, 2, 3])
    assert confused_pairs(targets, guesses) == [((0, 1), (2, 1)), ((2, 3), (1, 0))]
    assert confused_pairs(targets, targets) == []


def test_mean_leaves_out_classes_without_images():
    table = class_table(torch.tensor([0, 0, 3, 3]), torch.tensor([0, 1, 3, 3]), 5)
    assert [row.top1 for row in table] == [50.0, None, None, 100.0, None]
    assert mean_per_class(table) == 75.0


def test_many_classes_take_memory_by_class():
    """A hundred thousand classes: their square would be 80 GB."""
    targets = torch.arange(100_000)
    table = class_table(targets, targets.roll(1), len(targets))
    assert len(table) == 100_000
    assert table[5] == (1, 0, 4, 1)
