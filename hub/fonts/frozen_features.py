"""Feature maps of a folder of images, computed once, and heads trained on them."""

import copy
import time
from pathlib import Path
from typing import Dict, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from timm_bilinear import BilinearCNN
from timm_bilinear.data import create_loader
from timm_bilinear.data.folder import create_split
from timm_bilinear.tools.inference import view_data_config, view_log_weights, views

__all__ = ['Features', 'HeadResult', 'compute_features', 'train_head']


class Features(NamedTuple):
    """Maps (V, n, C, H, W) of V views of the images of a split, and their classes (n,)."""

    maps: torch.Tensor
    targets: torch.Tensor


class HeadResult(NamedTuple):
    """Top-1 in percent on validation at the best epoch, classes (n,) predicted of test images then, CPU seconds."""

    val_top1: float
    predictions: torch.Tensor
    seconds: float


@torch.inference_mode()
def compute_features(net: BilinearCNN, images: Path, batch_size: int = 32) -> Dict[str, Features]:
    """Maps by split, of test images in the views that `predict` takes.

    Args:
        net: Model with its `pretrained_cfg`, which pads images ('border').
        images: Folder with folders train, val and test, each with a folder per class.
        batch_size: Images in a batch.
    """
    net.eval()
    names = sorted(p.name for p in (images / 'train').iterdir())
    features = {}
    for split, tta in (('train', None), ('val', None), ('test', 'scales')):
        config = view_data_config(net, tta)
        dataset = create_split(images, split, class_names=names).splits[split]
        maps, targets = [], []
        for x, y in tqdm(create_loader(dataset, config, batch_size, workers=1), desc=split, leave=False):
            maps.append(torch.stack([net.forward_features(view) for view in views(x, tta, config['input_size'][1:])]))
            targets.append(y)
        features[split] = Features(torch.cat(maps, 1), torch.cat(targets))
    return features


def train_head(
    head: nn.Module, features: Dict[str, Features], lr: float, epochs: int, batch_size: int, seed: int
) -> HeadResult:
    """Train a head by SGD with momentum 0.9, a cosine to 0 and label smoothing 0.1; the best epoch on val counts.

    A head whose classifier alone has parameters is trained on descriptors, which are computed once too.

    Args:
        head: Takes maps, with `fc` and `drop`.
        features: As `compute_features` gives them.
        lr: First learning rate.
        epochs: Passes over the training images.
        batch_size: Images in a batch.
        seed: Seed of their order.
    """
    random_seed(seed)
    began = time.process_time()
    # copies, since inference tensors take no gradient
    inputs = {split: x.maps.flatten(0, 1).clone() for split, x in features.items()}
    network: nn.Module = head
    if type(head.fc) is nn.Linear and all(name.startswith('fc.') for name, _ in head.named_parameters()):
        head.eval()
        with torch.no_grad():
            inputs = {
                split: torch.cat([head(maps, pre_logits=True) for maps in x.split(batch_size)])
                for split, x in inputs.items()
            }
        network = nn.Sequential(head.drop, head.fc)
    count = len(inputs['train'])
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    steps = epochs * -(-count // batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_state = 0.0, copy.deepcopy(network.state_dict())  # what there is if it diverges at once
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(count).split(batch_size):
            loss = F.cross_entropy(
                network(inputs['train'][batch]), features['train'].targets[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if not loss.isfinite():
            break
        right = _logits(network, inputs['val'], batch_size).argmax(1) == features['val'].targets
        top1 = 100 * right.double().mean().item()
        if top1 > best:
            best, best_state = top1, copy.deepcopy(network.state_dict())
    network.load_state_dict(best_state)
    logits = _logits(network, inputs['test'], batch_size).unflatten(0, features['test'].maps.shape[:2])
    logits = (logits.log_softmax(-1) + view_log_weights(logits, 'scales')).logsumexp(0)
    return HeadResult(best, logits.argmax(1), time.process_time() - began)


@torch.no_grad()
def _logits(network: nn.Module, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
    network.eval()
    return torch.cat([network(x) for x in inputs.split(batch_size)])
