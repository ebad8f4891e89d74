"""How far maps of evidence can be trusted, beside Grad-CAM, HiResCAM, a centre prior and chance.

    python hub/recipes/explain_evidence.py MODEL PICTURES... --output table.md
    python hub/recipes/explain_evidence.py hub/FOLDER images/chromium/test --labels --count 100 --output table.md

Grad-CAM, HiResCAM and ROAD are those of the package grad-cam (the `test` extra). Of each picture the class that its
folder names (`--labels`) or the predicted one is explained, on the view that counts most for `predict`.

Deletion and insertion: mean probability of the class, in percent, while the pixels that a map ranks highest are blurred
one tenth after the other, or brought back. ROAD: fall of the probability if the most relevant pixels are replaced by
what their neighbours say, less that for the least relevant. Randomised: rank correlation of a map with the one after
all weights were shuffled within their tensors. Pointing: two pictures side by side, and the share of what speaks for
the one's class rather than for the other's that lies in its half.
"""

import argparse
import copy
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple, Union

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM, HiResCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from timm_bilinear import explain
from timm_bilinear.tools.explain import find_class
from timm_bilinear.tools.inference import label_names, load, model_name
from timm_bilinear.tools.measure import markdown_table, write
from timm_bilinear.tools.prediction import find_sources
from timm_bilinear.tools.shown_images import ImageReader, choose_views, read_batches

_RATHER = ', rather than the rest'
METHODS = ('evidence', f'evidence{_RATHER}', 'Grad-CAM', 'HiResCAM', f'HiResCAM{_RATHER}', 'centre prior', 'chance')
_STEPS = 10
_PAIRS = 200


class _Split(nn.Module):
    """A model whose last feature map is what a module gives, for the hooks of grad-cam."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.map = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(self.map(self.model.forward_features(x)))


class Maps:
    """Maps (H, W) of the pixels of an image by each method, for a class or for one rather than another."""

    def __init__(self, model: nn.Module, seed: int = 0):
        self.model = model
        self.split = _Split(model)
        kinds = {'Grad-CAM': GradCAM, 'HiResCAM': HiResCAM}
        self.cams = {name: cam(self.split, [self.split.map]) for name, cam in kinds.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, method: str, image: torch.Tensor, target: int, contrast: Union[int, str, None] = None
    ) -> torch.Tensor:
        height, width = image.shape[-2:]
        name = method.removesuffix(_RATHER)
        if name != method:
            contrast = 'rest'
        if name == 'evidence':
            values = explain(self.model, image[None], target, contrast).maps
        elif name in self.cams:

            def score(logits):
                if contrast == 'rest':
                    return logits[target] - (logits.sum() - logits[target]) / (len(logits) - 1)
                return logits[target] - (0 if contrast is None else logits[contrast])

            return torch.from_numpy(self.cams[name](image[None], [score])[0]).double()
        elif method == 'chance':
            values = torch.randn(1, 7, 7, generator=self.generator)
        else:
            y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing='ij')
            return torch.exp(-2 * (x**2 + y**2)).double()
        return F.interpolate(values[None].double(), (height, width), mode='bilinear')[0, 0]

    def relative_sum(self, method: str, image: torch.Tensor, target: int) -> float:
        """Sum of feature times gradient over all locations, as a share of the sum of its absolute values."""
        cam = self.cams[method]
        cam(image[None], [lambda logits: logits[target]])
        activations, gradients = cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0]
        values = (activations * gradients).sum(1)
        return float(values.sum().abs() / values.abs().sum())


@torch.no_grad()
def _probabilities(model: nn.Module, images: torch.Tensor, target: int) -> np.ndarray:
    return model(images).float().softmax(1)[:, target].numpy()


def curves(model: nn.Module, image: torch.Tensor, values: torch.Tensor, target: int) -> Tuple[float, float]:
    """Means of the deletion and of the insertion curve, in percent."""
    blurred = gaussian_blur(image, 51, 20.0)
    ranks = values.flatten().argsort(descending=True, stable=True).argsort().view_as(values)
    shares = [(ranks < step / _STEPS * values.numel()).to(image) for step in range(_STEPS + 1)]
    deleted = torch.stack([image * (1 - mask) + blurred * mask for mask in shares])
    inserted = torch.stack([image * mask + blurred * (1 - mask) for mask in shares])
    return tuple(100 * float(_probabilities(model, images, target).mean()) for images in (deleted, inserted))


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model whose weights are shuffled within each tensor."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    return model


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Rank correlation of two maps; 0 if one is the same everywhere, as Grad-CAM's of nothing positive."""
    if any(x.min() == x.max() for x in (one, other)):
        return 0.0
    return float(scipy.stats.spearmanr(one.flatten(), other.flatten()).statistic)


def beside(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Two images (C, H, W) in one, each as wide as half of it."""
    height, width = one.shape[-2:]
    size = (height // 2, width // 2)
    halves = [F.interpolate(i[None], size, mode='bilinear', antialias=True)[0] for i in (one, other)]
    pair = torch.cat(halves, 2)
    return F.pad(pair, (0, width - pair.shape[2], height // 4, height - height // 2 - height // 4), mode='replicate')


def pointing(values: torch.Tensor) -> Tuple[float, float]:
    """Of a map for the class at the left rather than that at the right: the share of its positive part that lies at the
    left, and the share of all of it that has the sign of its half, in percent.
    """
    half = values.shape[1] // 2
    left, right = values[:, :half], values[:, half:]
    positive = values.clamp_min(0).sum()
    share = left.clamp_min(0).sum() / positive.clamp_min(1e-30)
    signed = (left.clamp_min(0).sum() - right.clamp_max(0).sum()) / values.abs().sum().clamp_min(1e-30)
    return 100 * float(share), 100 * float(signed)


def measure(model: nn.Module, images: Sequence[torch.Tensor], targets: Sequence[int], seed: int = 0) -> List[List[str]]:
    """A row of the table for each method."""
    maps, other = Maps(model, seed), Maps(shuffled(model, seed), seed)
    road = ROADCombined(percentiles=[20, 40, 60, 80])
    rng = random.Random(seed)
    pairs = [(i, j) for i in range(len(images)) for j in range(len(images)) if targets[i] != targets[j]]
    pairs = rng.sample(pairs, min(_PAIRS, len(pairs)))
    rows = []
    for method in METHODS:
        found: Dict[str, List[float]] = defaultdict(list)
        for image, target in zip(images, targets):
            values = maps(method, image, target)
            for name, value in zip(('deletion', 'insertion'), curves(model, image, values, target)):
                found[name].append(value)
            targets_ = [lambda logits, target=target: logits.softmax(-1)[target]]
            found['road'].append(100 * float(road(image[None], values[None].float().numpy(), targets_, model)[0]))
            if method not in ('centre prior', 'chance'):
                again = other(method, image, target)
                found['random'].append(correlation(values, again))
            if method in maps.cams:
                found['sum'].append(maps.relative_sum(method, image, target))
            elif method == 'evidence':
                exact = explain(model, image[None], target)
                found['sum'].append(float(exact.maps.sum().abs() / exact.maps.abs().sum()))
        for i, j in pairs:
            values = maps(method, beside(images[i], images[j]), targets[i], targets[j])
            share, signed = pointing(values)
            found['half'].append(share)
            if values.min() < 0:
                found['sign'].append(signed)
        cells = {name: f'{np.mean(v):.{2 if name in ("random", "sum") else 1}f}' for name, v in found.items()}
        rows.append([method, *(cells.get(name, '') for name in _COLUMNS)])
        print(rows[-1], flush=True)
    return rows


_COLUMNS = ('deletion', 'insertion', 'road', 'random', 'sum', 'half', 'sign')
HEADER = ['map', 'deletion', 'insertion', 'ROAD', 'randomised', 'sum', 'in its half', 'right sign']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='as for timm-bilinear predict')
    parser.add_argument('pictures', nargs='+', help='pictures, or folders of them')
    parser.add_argument('--labels', action='store_true', help='explain the class that the folder of a picture names')
    parser.add_argument('--count', type=int, help='pictures, drawn at random (default: all)')
    parser.add_argument('--output', help='file for the table')
    args = parser.parse_args()
    try:
        model = load(args.model, 'cpu')
        sources = list(find_sources(args.pictures))
        if args.count:
            sources = sorted(random.Random(0).sample(sources, min(args.count, len(sources))))
        read = ImageReader(model, torch.device('cpu'))
        names = label_names(model)
        images: List[torch.Tensor] = []
        targets: List[int] = []
        for batch, errors in read_batches(sources, read):
            for error in errors:
                print(error['error'], file=sys.stderr)
            pixels, _, probabilities = choose_views(model, batch)
            images += list(pixels)
            named: Callable = lambda shown: find_class(Path(shown.name).parent.name, names, names, 'target')  # noqa: E731
            targets += [named(s) for s in batch] if args.labels else probabilities.argmax(1).tolist()
        rows = measure(model, images, targets)
        text = f'{model_name(model)}, {len(images)} pictures.\n\n' + markdown_table(HEADER, rows)
        print(write(text, args.output))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'explain_evidence.py: error: {e}')


if __name__ == '__main__':
    main()
