"""Train the font classifier on images rendered while it trains, every one of them new.

    python hub/fonts/train.py fonts run --start hub/FOLDER --steps 20000

The learning rate rises over the first steps, stays, and falls to nothing over the last three fifths. What counts is the
moving average of the weights, saved as a model in the run's folder; a run that was cut off goes on where it was.
"""

import argparse
import copy
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from faces import Face, find_fonts
from render import random_image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset

from timm_bilinear.hub import save_model
from timm_bilinear.tools.inference import autocast, resolve_amp_dtype
from timm_bilinear.tools.interrupt import Terminated, catch_signals

# Preprocessing of the published weights: an image of any shape is padded, never cut.
DATA_CONFIG = dict(
    input_size=(3, 224, 224),
    interpolation='bicubic',
    crop_pct=1.0,
    crop_mode='border',
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)
_SIZE = 112  # of the images that the size of a batch is told in


class RenderedBatches(Dataset):
    """Batches of newly rendered images of one size each; the same index gives the same batch.

    Args:
        fonts: Faces by class; each image takes one of its class.
        split: 'train' or 'val', of texts.
        sizes: Heights and widths of images in pixels, which the batches take in turn.
        batch_size: Images of 112 px in a batch; of other sizes there are as many as have as many pixels.
        count: Number of batches.
        seed: Seed of everything random.
    """

    def __init__(
        self,
        fonts: Dict[str, List[Face]],
        split: str,
        sizes: Sequence[int],
        batch_size: int,
        count: int,
        seed: int = 0,
    ):
        self.faces = [fonts[name] for name in sorted(fonts)]
        self.split = split
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) images of uint8 and (B,) classes."""
        rng = random.Random(f'{self.seed}/{self.split}/{index}')
        size = self.sizes[index % len(self.sizes)]
        labels = [rng.randrange(len(self.faces)) for _ in range(max(2, round(self.batch_size * _SIZE**2 / size**2)))]
        images = [np.asarray(random_image(rng.choice(self.faces[i]), self.split, rng, size)) for i in labels]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return images.float().sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate."""
    return min(1.0, (step + 1) / min(500, 0.1 * steps), (steps - step) / (0.6 * steps))


@torch.no_grad()
def _mean_descriptor(net: nn.Module, batches: RenderedBatches, amp_dtype, count: int = 16) -> torch.Tensor:
    """Mean (D,) of the descriptors of some batches."""
    net.eval()
    total, images = 0.0, 0
    with autocast(torch.device('cpu'), amp_dtype):
        for index in range(count):
            features = net.forward_features(_normalise(batches[index][0]))
            total = total + net.forward_head(features, pre_logits=True).float().sum(0)
            images += len(features)
    return total / images


@torch.no_grad()
def _fold(net: nn.Module, mean: torch.Tensor) -> nn.Module:
    """A copy, in eval mode, whose classifier takes descriptors as they are, from one that takes them less the mean."""
    net = copy.deepcopy(net).eval()
    net.head.fc.bias -= net.head.fc.weight @ mean
    return net


def _create_optimizer(net: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
    streams = [p for name, p in net.named_parameters() if not name.startswith('head.')]
    groups = [
        dict(params=list(net.head.parameters()), lr=head_lr, weight_decay=0.0),
        dict(params=[p for p in streams if p.ndim > 1], lr=lr, weight_decay=0.05),
        dict(params=[p for p in streams if p.ndim <= 1], lr=lr, weight_decay=0.0),
    ]
    return create_optimizer_v2(groups, opt='adamw', lr=lr, fused=True)


def _validate(net: nn.Module, loader: DataLoader, amp_dtype) -> float:
    correct = count = 0
    with torch.inference_mode(), autocast(torch.device('cpu'), amp_dtype):
        for images, labels in loader:
            correct += (net(_normalise(images)).argmax(1) == labels).sum().item()
            count += len(labels)
    return 100 * correct / count


def train(args: argparse.Namespace):
    """Train until the last step."""
    fonts = find_fonts(args.fonts)[0]
    names = sorted(fonts)
    torch.manual_seed(args.seed)
    if args.start:
        net = timm.create_model(f'local-dir:{args.start}', pretrained=True)
        if list(net.pretrained_cfg.get('label_names') or ()) != names:
            net.reset_classifier(len(names))
    else:
        net = timm.create_model(args.model, num_classes=len(names))
    net = net.to(memory_format=torch.channels_last)
    for name in args.freeze:
        if name not in dict(net.named_modules()):
            raise ValueError(f"The model has no module '{name}' to freeze.")
        net.get_submodule(name).requires_grad_(False)
    optimizer = _create_optimizer(net, args.lr, args.head_lr)
    peaks = [group['lr'] for group in optimizer.param_groups]
    amp_dtype = resolve_amp_dtype('auto', torch.device('cpu'))
    batches = RenderedBatches(fonts, 'train', args.sizes, args.batch_size, args.steps, args.seed)
    average = ModelEmaV3(net, decay=0.9995, use_warmup=True)
    args.run.mkdir(parents=True, exist_ok=True)
    file = args.run / 'last.pth.tar'
    begin = 0
    if file.is_file():
        state = torch.load(file, weights_only=True)
        net.load_state_dict(state['net'])
        average.module.load_state_dict(state['average'])
        optimizer.load_state_dict(state['optimizer'])
        mean, begin = state['mean'], state['step']
    else:
        # The classifier is trained on descriptors less their mean, which is most of each of them: else a step for some
        # classes raises or lowers the logits of every image.
        mean = _mean_descriptor(net, batches, amp_dtype)
        with torch.no_grad():
            net.head.fc.bias += net.head.fc.weight @ mean
            average.module.head.fc.bias.copy_(net.head.fc.bias)

    def save(step: int):
        state = dict(step=step, mean=mean, net=net.state_dict(), average=average.module.state_dict())
        partial = file.with_suffix('.partial')
        torch.save(dict(state, optimizer=optimizer.state_dict()), partial)
        os.replace(partial, file)
        save_model(_fold(average.module, mean), args.run / 'model', label_names=names, data_config=DATA_CONFIG)

    options = dict(batch_size=None, num_workers=args.workers, worker_init_fn=_leave_signals)
    validation = DataLoader(RenderedBatches(fonts, 'val', (160,), args.batch_size, args.val_batches), **options)
    if begin == args.steps:
        print(f"'{args.run}' is done")
        return
    net.train()
    saved, seen, correct, total, began = time.monotonic(), 0, 0, 0.0, time.monotonic()
    loader = DataLoader(batches, sampler=range(begin, args.steps), prefetch_factor=4, **options)
    for step, (images, labels) in enumerate(loader, begin):
        for group, peak in zip(optimizer.param_groups, peaks):
            group['lr'] = peak * _rate(step, args.steps)
        with autocast(torch.device('cpu'), amp_dtype):
            logits = net(_normalise(images)).float()
        logits = logits - net.head.fc.weight @ mean
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(net, step=step + 1)
        seen, total = seen + len(labels), total + loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        if time.monotonic() - saved > 60 * args.save_minutes:
            save(step + 1)
            speed = seen / (time.monotonic() - began)
            top1 = _validate(_fold(average.module, mean), validation, amp_dtype)
            print(
                f'step {step + 1}/{args.steps}, loss {total / seen:.3f}, in training {100 * correct / seen:.1f} %,'
                f' average on new texts {top1:.1f} %, {speed:.0f} images/s',
                flush=True,
            )
            saved, seen, correct, total, began = time.monotonic(), 0, 0, 0.0, time.monotonic()
    save(args.steps)
    print(
        f"top-1 on new texts {_validate(_fold(average.module, mean), validation, amp_dtype):.1f} %: '{args.run}/model'"
    )


def _leave_signals(_: int):
    """Loader processes leave Ctrl-C to the one that trains, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('fonts', type=Path, help='folder of fonts, see build.py')
    parser.add_argument('run', type=Path, help='folder for the run; one that was cut off is continued')
    parser.add_argument('--start', type=Path, help='folder of a model to start from (default: none)')
    parser.add_argument('--model', default='bcnn_resnet18_c4', help='model without a start (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=20_000, help='batches (default: %(default)s)')
    sizes = [112, 112, 112, 160, 112, 224, 112, 160]
    parser.add_argument('--sizes', type=int, nargs='+', default=sizes, help='sizes in turn (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=64, help='images of 112 px (default: %(default)s)')
    parser.add_argument('--lr', type=float, default=5e-4, help='of the streams, AdamW (default: %(default)s)')
    parser.add_argument('--head-lr', type=float, default=1e-3, help='of the classifier (default: %(default)s)')
    parser.add_argument('--val-batches', type=int, default=24, help='of 31 images (default: %(default)s)')
    parser.add_argument('--freeze', nargs='*', default=(), help='modules whose weights stay, such as stream_a.layer1')
    parser.add_argument('--save-minutes', type=float, default=5, help='between checkpoints (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes that render (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    args = parser.parse_args()
    try:
        with catch_signals():
            train(args)
    except KeyboardInterrupt as e:
        print(f"train.py: stopped; the same command goes on from '{args.run}'", file=sys.stderr)
        sys.exit(143 if isinstance(e, Terminated) else 130)
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        sys.exit(f'train.py: error: {e}')


if __name__ == '__main__':
    main()
