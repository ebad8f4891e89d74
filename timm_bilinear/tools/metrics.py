"""Metrics of classification, on tensors: streamed image by image, so that logits need not be kept.

Of equal logits the class with the lower index comes first, in predictions as in ranks. Shares are in percent.
"""

import math
from statistics import NormalDist
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    'ClassRow',
    'ImageMetrics',
    'calibration_error',
    'class_table',
    'confused_pairs',
    'confusion_matrix',
    'count_pairs',
    'image_metrics',
    'mean_per_class',
    'summarize',
    'target_ranks',
    'wilson_interval',
]


class ImageMetrics(NamedTuple):
    """What is kept of each of N images.

    Args:
        targets: True classes, (N,) int64.
        predictions: Classes with the highest logit, (N,) int64.
        probabilities: Their probabilities, (N,) float32.
        target_probabilities: Probabilities of the true classes, (N,) float32.
        ranks: Places of the true classes among the classes by logit, from 1, (N,) int64.
        losses: Cross-entropies, (N,) float32.
    """

    targets: torch.Tensor
    predictions: torch.Tensor
    probabilities: torch.Tensor
    target_probabilities: torch.Tensor
    ranks: torch.Tensor
    losses: torch.Tensor


def target_ranks(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Place of each target among the classes by descending logit, from 1; of equal logits the lower index is first.

    Args:
        logits: (B, K); an image of which one is nan is not ranked first.
        targets: (B,) int64 in [0, K).

    Returns:
        (B,) int64 in [1, K].
    """
    own = logits.gather(1, targets[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    # written so that whatever is compared with nan counts as higher: nan is never right
    higher = ~(logits <= own) | ((logits == own) & lower)
    return (1 + higher.sum(1)).clamp(max=logits.shape[1])


def image_metrics(logits: torch.Tensor, targets: torch.Tensor) -> ImageMetrics:
    """Metrics of each image of a batch, on the device of the logits.

    Args:
        logits: (B, K), finite; computed with in float32.
        targets: (B,) int64 in [0, K).
    """
    logits = logits.float()
    log_probs = logits.log_softmax(1)
    predictions = logits.argmax(1)  # the first of equal ones
    return ImageMetrics(
        targets,
        predictions,
        log_probs.gather(1, predictions[:, None])[:, 0].exp(),
        log_probs.gather(1, targets[:, None])[:, 0].exp(),
        target_ranks(logits, targets),
        F.nll_loss(log_probs, targets, reduction='none'),
    )


def wilson_interval(correct: int, images: int, confidence: float = 0.95) -> Tuple[float, float]:
    """Wilson's score interval (1927) of a share, in percent: within [0, 100] and of use near its ends too.

    Args:
        correct: Number of successes.
        images: Number of trials, at least 1.
        confidence: Probability that such an interval holds the true share.

    Raises:
        ValueError: If there are no trials, or more successes than trials.
    """
    if not 0 <= correct <= images or images < 1:
        raise ValueError(f"'correct' must be 0 to 'images', and these at least 1, got {correct} of {images}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, squared = correct / images, z * z / images
    centre = share + squared / 2
    half = math.sqrt(squared * (share * (1 - share) + squared / 4))
    low = 0.0 if correct == 0 else (centre - half) / (1 + squared)
    high = 1.0 if correct == images else (centre + half) / (1 + squared)
    return 100 * low, 100 * high


def calibration_error(probabilities: torch.Tensor, correct: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599), in percent.

    The images are sorted by the probability of their prediction into bins of equal width, open below and closed
    above; the differences of mean probability and accuracy are averaged, weighted by the bins' images.

    Args:
        probabilities: Of the predictions, (N,) in [0, 1], N at least 1.
        correct: Whether they are right, (N,) bool.
        bins: Number of bins.
    """
    probabilities, correct = probabilities.double(), correct.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1].to(probabilities.device)
    index = torch.bucketize(probabilities, edges)
    gaps = torch.zeros(bins, dtype=torch.float64, device=probabilities.device)
    gaps.index_add_(0, index, probabilities - correct)
    return 100 * gaps.abs().sum().item() / len(probabilities)


def confusion_matrix(targets: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> np.ndarray:
    """Numbers of images of class `row` predicted as `column`, (K, K) int64."""
    pairs = targets.cpu() * num_classes + predictions.cpu()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).numpy()


class ClassRow(NamedTuple):
    """Results of a class.

    Args:
        images: Number of its images.
        correct: How many of them were predicted right.
        confused_with: The class that most others were taken for, the first of several; None if there are none.
        confused: How many were taken for it.
    """

    images: int
    correct: int
    confused_with: Optional[int]
    confused: int

    @property
    def top1(self) -> Optional[float]:
        """Accuracy in percent, None without images."""
        return 100 * self.correct / self.images if self.images else None


def count_pairs(targets: torch.Tensor, predictions: torch.Tensor) -> Dict[Tuple[int, int], int]:
    """Numbers of images by (target, prediction), without those that have none; in ascending order."""
    pairs, counts = torch.stack([targets.cpu(), predictions.cpu()]).unique(dim=1, return_counts=True)
    return {(target, guess): count for target, guess, count in zip(*pairs.tolist(), counts.tolist())}


def confused_pairs(targets: torch.Tensor, predictions: torch.Tensor) -> List[Tuple[Tuple[int, int], Tuple[int, int]]]:
    """Pairs of classes of which images of either were taken for the other, most such images first.

    Returns:
        The two classes in ascending order, and how many of the first were taken for the second, and back.
    """
    errors = {pair: count for pair, count in count_pairs(targets, predictions).items() if pair[0] != pair[1]}
    pairs = {(min(pair), max(pair)) for pair in errors}
    both = [((a, b), (errors.get((a, b), 0), errors.get((b, a), 0))) for a, b in pairs]
    return sorted(both, key=lambda item: (-sum(item[1]), item[0]))


def class_table(targets: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> List[ClassRow]:
    """Results of each class, in memory that grows with the classes, not with their square."""
    images = torch.bincount(targets.cpu(), minlength=num_classes).tolist()
    correct = [0] * num_classes
    confused: List[Tuple[Optional[int], int]] = [(None, 0)] * num_classes
    for (target, guess), count in count_pairs(targets, predictions).items():
        if target == guess:
            correct[target] = count
        elif count > confused[target][1]:
            confused[target] = (guess, count)
    return [ClassRow(n, right, *other) for n, right, other in zip(images, correct, confused)]


def mean_per_class(table: List[ClassRow]) -> float:
    """Mean of the classes' accuracies, in percent; classes without images are left out."""
    shares = [row.top1 for row in table if row.images]
    return math.fsum(shares) / len(shares)


def summarize(metrics: ImageMetrics, num_classes: int) -> Dict[str, float]:
    """Metrics of all images.

    Args:
        metrics: Of at least one image.
        num_classes: Number of classes of the model.

    Returns:
        'images', 'loss' and in percent 'top1', its 95 % confidence interval 'top1_low' to 'top1_high' (Wilson's),
        'top5' if there are more than five classes, 'mean_per_class' and 'calibration_error' (15 bins).

    Raises:
        ValueError: If there are no images.
    """
    images = len(metrics.targets)
    if not images:
        raise ValueError('There are no images to evaluate.')
    right = metrics.predictions == metrics.targets
    correct = int(right.sum())
    low, high = wilson_interval(correct, images)
    result = dict(images=images, loss=metrics.losses.double().mean().item(), top1=100 * correct / images)
    result.update(top1_low=low, top1_high=high)
    if num_classes > 5:
        result['top5'] = 100 * int((metrics.ranks <= 5).sum()) / images
    result['mean_per_class'] = mean_per_class(class_table(metrics.targets, metrics.predictions, num_classes))
    result['calibration_error'] = calibration_error(metrics.probabilities, right)
    return result
