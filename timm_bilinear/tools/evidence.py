"""What each location of the last feature map gives to a logit, so that all of them sum to it exactly.

A linear classifier's logit less its bias is w . z of the descriptor z. Each entry of z is a multiple of one that is
homogeneous in the features, by a factor (slope of the root, norm) that is held constant; so feature times gradient,
divided by the degree, sums to w . z by Euler's theorem. With the factor's own gradient the sum would be 0 where the
descriptor does not change with the features' scale, which is why Grad-CAM's maps of these networks sum to nothing.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.utils import unwrap_model
from torch import nn

from ..layers.head import is_plain_linear
from ..layers.pooling import ExactPooling, Terms
from ..models import BilinearCNN
from ..ops import without_autocast
from ..ops.packing import triangle_indices

__all__ = [
    'REST',
    'Evidence',
    'PairEvidence',
    'best_class',
    'check_pairs',
    'explain',
    'explain_beside',
    'explain_pairs',
]

Classes = Union[int, Sequence[int], torch.Tensor, None]
REST = 'rest'  # as `contrast`: the mean of all other classes
Contrast = Union[Classes, str]


@dataclass
class Evidence:
    """What locations give to logits, or to differences of two.

    `maps` sum to `logit - bias - unlocated`.

    Args:
        maps: (B, h, w) evidence of each location for `target`, or for it rather than `contrast`.
        target: (B,) class indices.
        logit: (B,) the class's logit, less that of `contrast`.
        bias: (B,) the classifier's bias of the class, less that of `contrast`.
        contrast: (B,) class indices, 'rest' or None.
        unlocated: (B,) what a class token gives, which has no location; else 0.
        channels: (B, C) what each channel gives to the sum, of each stream as it is pooled; none for a pooling of
            several parts.
    """

    maps: torch.Tensor
    target: torch.Tensor
    logit: torch.Tensor
    bias: torch.Tensor
    contrast: Union[torch.Tensor, str, None]
    unlocated: torch.Tensor
    channels: Tuple[torch.Tensor, ...]


def explain(model: nn.Module, images: torch.Tensor, target: Classes = None, contrast: Contrast = None) -> Evidence:
    """Tell where the evidence for a class lies in images, or for one class rather than another.

    Args:
        model: A bilinear CNN, or another model of timm whose logits are linear in the mean of its last feature map; it
            is used in eval mode.
        images: (B, C, H, W), preprocessed as the model wants them, on its device.
        target: Class indices (B,), or one for all images; None for the class with the highest logit that is not
            `contrast`.
        contrast: Class indices (B,), or one for all images, that the target is compared with; or 'rest', the mean of
            all other classes. A softmax does not see what speaks for every class alike, so maps of a class alone may
            show much that does not decide.

    Returns:
        The evidence, in the dtype of the features, float32 at least. It is exact at the last feature map; what a
        location of it sees of the image is the backbone's.

    Raises:
        TypeError: If `images` are no tensor, or classes no indices.
        ValueError: If shapes or indices are wrong, or there is no such sum for the model.
    """
    with _opened(model, images) as found:
        return _evidence(found, target, contrast)


def explain_beside(
    model: nn.Module, images: torch.Tensor, target: Classes = None, contrast: Contrast = REST
) -> Tuple[Evidence, Evidence]:
    """What `explain` tells of a class alone, and of the same class rather than `contrast`, by one pass."""
    with _opened(model, images) as found:
        rather = _evidence(found, target, contrast)
        return _evidence(found, rather.target, None), rather


@dataclass
class PairEvidence:
    """What products of two channels give to logits, or to differences of two.

    Args:
        shares: (B, D) of every pair, which sum to the logit less the bias.
        pairs: Channels of the pairs told apart, of one stream the lower first.
        maps: (B, P, h, w) of these pairs, which sum to their shares over the locations.
    """

    shares: torch.Tensor
    pairs: List[Tuple[int, int]]
    maps: torch.Tensor


def check_pairs(model: nn.Module):
    """
    Raises:
        ValueError: If the model's descriptor is not of pairs of channels, a place for each.
    """
    inner = unwrap_model(model)
    is_bilinear = isinstance(inner, BilinearCNN)
    pool = inner.head.pool if is_bilinear else None
    if not isinstance(pool, ExactPooling) or pool.reduction == 'max':
        other = f"'{inner.head.pool_type}'" if is_bilinear else f'{_name(inner)}, which is no bilinear CNN'
        raise ValueError(f"Pairs of channels are told of the poolings 'avg' and 'sum', not of {other}.")


def explain_pairs(
    model: nn.Module,
    images: torch.Tensor,
    target: Classes = None,
    contrast: Contrast = None,
    pairs: Union[int, Sequence[int]] = 10,
) -> PairEvidence:
    """Tell which pairs of channels speak for a class, and where.

    Args:
        model: A bilinear CNN with exact average or sum pooling.
        images, target, contrast: As for `explain`.
        pairs: Number of pairs, those that give most to all images together, or the pairs' places in the descriptor.

    Raises:
        TypeError, ValueError: As for `explain`.
    """
    check_pairs(model)
    with _opened(model, images) as found:
        shares = _choose(found, target, contrast).weight * found.z
    places = shares.sum(0).topk(min(pairs, shares.shape[1])).indices if isinstance(pairs, int) else torch.tensor(pairs)
    places = places.to(shares.device)
    maps = [x.detach() for x in found.parts[0].variables]
    if len(maps) == 1:
        flat, _, _ = triangle_indices(maps[0].shape[1], places.device)
        places_a, places_b = flat[places] // maps[0].shape[1], flat[places] % maps[0].shape[1]
    else:
        places_a, places_b = places // maps[1].shape[1], places % maps[1].shape[1]
    products = maps[0][:, places_a] * maps[-1][:, places_b]  # (B, P, N)
    sums = products.sum(2, keepdim=True)
    parts = products / torch.where(sums == 0, 1.0, sums) * shares[:, places].unsqueeze(2)
    return PairEvidence(shares, list(zip(places_a.tolist(), places_b.tolist())), parts.unflatten(2, found.grid))


class _Found(NamedTuple):
    """What evidence is made of: descriptors z (B, D), their parts, the grid, and the classifier with its logits."""

    z: torch.Tensor
    parts: List[Terms]
    grid: Tuple[int, int]
    classify: nn.Module
    logits: torch.Tensor


class _Chosen(NamedTuple):
    """Classes (B,), the logit of each, less that of `contrast`, and its gradient (B, D)."""

    target: torch.Tensor
    contrast: Union[torch.Tensor, str, None]
    logit: torch.Tensor
    weight: torch.Tensor


@contextmanager
def _opened(model: nn.Module, images: torch.Tensor) -> Iterator[_Found]:
    """What evidence of images is made of, while the model is in eval mode."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise TypeError("'images' must be a floating point tensor (B, C, H, W).")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"'images' must be (B, C, H, W) of at least one image, got {tuple(images.shape)}.")
    model = unwrap_model(model)
    if not getattr(model, 'num_classes', 0):
        raise ValueError("'model' has no classifier, so there is no class to explain.")
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield _take_apart(model, images)
    finally:
        for module in was_training:
            module.training = True


def best_class(scores: torch.Tensor, contrast: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Classes (B,) with the highest of the scores (B, K); of those that are not `contrast` (B,), if that is given."""
    if contrast is not None:
        scores = scores.scatter(1, contrast[:, None], -torch.inf)
    return scores.argmax(1)


@torch.no_grad()
def _take_apart(model: nn.Module, images: torch.Tensor) -> _Found:
    features = model.forward_features(images)
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        raise ValueError(f'{_name(model)} has no feature map (B, C, h, w) that its logits are made of.')
    logits = model.forward_head(features)
    if isinstance(model, BilinearCNN):
        z, parts, grid = _bilinear_parts(model, features)
        classify = model.head.fc
    else:
        z, parts, grid = _mean_parts(model, features, logits)
        classify = model.get_classifier()
    _check_affine(model, classify, z)
    return _Found(z, parts, grid, classify, logits)


def _name(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def _class_indices(name: str, classes: Classes, logits: torch.Tensor) -> torch.Tensor:
    if isinstance(classes, bool) or not isinstance(classes, (int, list, tuple, torch.Tensor)):
        raise TypeError(f"'{name}' must be class indices, got {classes!r}.")
    indices = torch.as_tensor(classes, device=logits.device)
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(f"'{name}' must be class indices, got {indices.dtype}.")
    if indices.ndim == 0:
        indices = indices.expand(len(logits))
    if indices.shape != logits.shape[:1]:
        raise ValueError(f"'{name}' must be one index or {len(logits)}, got shape {tuple(indices.shape)}.")
    if not 0 <= int(indices.min()) <= int(indices.max()) < logits.shape[1]:
        raise ValueError(f"'{name}' must be within 0 and {logits.shape[1] - 1}, got {indices.tolist()}.")
    return indices.long()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pooled_maps(model: BilinearCNN, features: torch.Tensor) -> List[torch.Tensor]:
    """Maps (B, C, h, w) as the pooling gets them, in float32 or wider."""
    head = model.head
    if head.pool is None:
        raise ValueError("'model' has no pooling, so its features are not classified.")
    if head.proj_b is None:
        return [_wide(head.proj_a(features))]
    a, b = features[:, : head.in_features], features[:, head.in_features :]
    return [_wide(head.proj_a(a)), _wide(head.proj_b(b))]


def _bilinear_parts(model: BilinearCNN, features: torch.Tensor) -> Tuple[torch.Tensor, List[Terms], Tuple[int, int]]:
    """Descriptors, their parts and the grid of a bilinear CNN."""
    maps = _pooled_maps(model, features)
    with without_autocast(features.device.type):
        z = model.head.pool(*maps)
        with torch.enable_grad():
            a, *b = [x.flatten(2).requires_grad_() for x in maps]
            try:
                parts = model.head.pool.terms(a, b[0] if b else None)
            except NotImplementedError as e:
                raise ValueError(f"Pooling '{model.head.pool_type}' cannot be explained: {e}") from None
    return z, parts, maps[0].shape[-2:]


def _mean_parts(
    model: nn.Module, features: torch.Tensor, logits: torch.Tensor
) -> Tuple[torch.Tensor, List[Terms], Tuple[int, int]]:
    """Descriptors, their parts and the grid of a network that classifies the mean of its features."""
    fc = model.get_classifier() if hasattr(model, 'get_classifier') else None
    x = _wide(features).flatten(2)
    z = x.mean(2)
    is_linear = isinstance(fc, nn.Linear) and fc.in_features == z.shape[1]
    if not is_linear or not torch.allclose(fc(z.to(fc.weight.dtype)), logits, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f'The logits of {_name(model)} are no sum over the locations of its last feature map: what is explained are'
            ' bilinear CNNs, and networks that classify the mean of their features.'
        )
    with torch.enable_grad():
        x.requires_grad_()
        parts = [Terms(x.mean(2), (x,), 1)]
    return z, parts, features.shape[-2:]


def _check_affine(model: nn.Module, classify: nn.Module, z: torch.Tensor):
    """Refuse a classifier f of which f(x + y) + f(0) is not f(x) + f(y) at the descriptors z (B, D).

    Far from 0 too, where a bias does not hide what a layer adds that is not linear.
    """
    if is_plain_linear(classify):
        return
    for scale in (1, 32, 1024, 32768):
        x = scale * z
        y = -x.flip(1)  # as large, and elsewhere
        logits = _classify(classify, torch.cat([x + y, torch.zeros_like(x), x, y]))
        both, zero, first, second = logits.double().chunk(4)
        # rounding, that of TF32 too, stays below this part of the largest logit
        tolerance = max(3 * torch.finfo(logits.dtype).eps, 5e-3) * logits.double().abs().max()
        if ((both + zero - first - second).abs() > tolerance).any():  # not so for what is infinite
            raise ValueError(
                f'The logits of {_name(model)} are no sum over locations: its classifier, of class'
                f' {type(classify).__name__}, is not linear.'
            )


def _classify(classify: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) of descriptors (B, D), in the dtype of the classifier."""
    return classify(z.to(next((p.dtype for p in classify.parameters() if p.is_floating_point()), z.dtype)))


def _choose(found: _Found, target: Classes, contrast: Contrast) -> _Chosen:
    """The logit of an affine classifier, or the difference of two, and its gradient (B, D), whatever the module is."""
    logits = found.logits
    if isinstance(contrast, str):
        if contrast != REST:
            raise TypeError(f"'contrast' must be class indices or '{REST}', got {contrast!r}.")
        if logits.shape[1] == 1:
            raise ValueError("'model' has one class, so there is no rest to compare it with.")
    elif contrast is not None:
        contrast = _class_indices('contrast', contrast, logits)
    if target is None:
        target = best_class(logits, contrast if isinstance(contrast, torch.Tensor) else None)
    else:
        target = _class_indices('target', target, logits)
    with torch.enable_grad():
        z = found.z.detach().requires_grad_()
        logits = _classify(found.classify, z).to(z.dtype)
        logit = logits.gather(1, target[:, None])[:, 0]
        if isinstance(contrast, str):
            others = torch.ones_like(logits).scatter(1, target[:, None], 0.0)
            logit = logit - (logits * others).sum(1) / (logits.shape[1] - 1)
        elif contrast is not None:
            logit = logit - logits.gather(1, contrast[:, None])[:, 0]
        (weight,) = torch.autograd.grad(logit.sum(), z)
    return _Chosen(target, contrast, logit.detach(), weight)


def _evidence(found: _Found, target: Classes, contrast: Contrast) -> Evidence:
    chosen = _choose(found, target, contrast)
    sums = chosen.weight * found.z
    maps, channels, unlocated = _locate(found.parts, sums)
    maps = maps.unflatten(1, found.grid)
    return Evidence(maps, chosen.target, chosen.logit, chosen.logit - sums.sum(1), chosen.contrast, unlocated, channels)


def _locate(parts: List[Terms], sums: torch.Tensor) -> Tuple[torch.Tensor, Tuple[torch.Tensor, ...], torch.Tensor]:
    """Maps (B, N), what each channel gives (B, C) by stream, and what has no location (B,), of w * z (B, D)."""
    unlocated = torch.zeros_like(sums[:, 0])
    maps: List[torch.Tensor] = []
    channels: List[Tuple[torch.Tensor, ...]] = []
    for part, shares in zip(parts, sums.split([p.entries.shape[1] for p in parts], 1)):
        if not part.variables:
            unlocated = unlocated + shares.sum(1)
            continue
        entries = part.entries.detach()
        factor = torch.where(entries == 0, 0.0, shares / torch.where(entries == 0, 1.0, entries))
        gradients = torch.autograd.grad((factor * part.entries).sum(), part.variables, retain_graph=True)
        products = [x.detach() * g / part.degree for x, g in zip(part.variables, gradients)]
        maps += [product.sum(1) for product in products]
        channels.append(tuple(product.sum(2) for product in products))
    return torch.stack(maps).sum(0), channels[0] if len(channels) == 1 else (), unlocated
