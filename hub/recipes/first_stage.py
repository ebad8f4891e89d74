"""Seconds that the first stage of B-CNN takes, streams frozen, in three ways on the same images:

timm's train script with `freeze_backbone`, the way of HaoMood/blinear-cnn-faster (each image's features computed once,
one at a time, then the classifier trained on the full outer product of the kept features, in float32), and `finetune`.

python hub/recipes/first_stage.py IMAGES --train-script train.py --output docs/first_stage.md

IMAGES is a folder with train and val. The train script is run for one epoch, on the images and on a tenth of them;
what 30 epochs take follows from the difference. The other two run whole.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from timm_bilinear.tools.finetune import finetune
from timm_bilinear.tools.measure import describe_machine, markdown_table, write

_SIZE = 448


def train_script(script: Path, model: str, images: Path, epochs: int, workers: int) -> float:
    """Seconds of so many epochs of timm's train script, by its first epoch on all images and on a tenth."""

    def run(data: Path, output: Path) -> float:
        command = [sys.executable, '-m', 'timm_bilinear', 'run', str(script), '--data-dir', str(data), '--model', model]
        command += ['--num-classes', str(len(list((data / 'train').iterdir()))), '--img-size', str(_SIZE)]
        command += ['--model-kwargs', 'freeze_backbone=True', '--opt', 'sgd', '--lr', '1.0', '--weight-decay', '0']
        command += ['--batch-size', '32', '--epochs', '1', '--warmup-epochs', '0', '--workers', str(workers)]
        command += ['--output', str(output), '--device', 'cpu', '--no-prefetcher']
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"'{script}' failed: {done.stderr.strip().splitlines()[-1]}")
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as scratch:
        tenth = Path(scratch) / 'tenth'
        for folder in sorted(p for split in ('train', 'val') for p in (images / split).iterdir()):
            target = tenth / folder.relative_to(images)
            target.mkdir(parents=True)
            files = sorted(folder.iterdir())
            for file in files[: max(1, round(len(files) / 10))]:
                shutil.copy(file, target)
        few, all_images = run(tenth, Path(scratch) / 'few'), run(images, Path(scratch) / 'all')
        count = {data: sum(1 for _ in data.glob('*/*/*')) for data in (tenth, images)}
    epoch = (all_images - few) * count[images] / (count[images] - count[tenth])
    return all_images - epoch + epochs * epoch


def features_once(net: nn.Module, images: Path, num_classes: int, epochs: int) -> Tuple[float, float]:
    """Seconds, and top-1 accuracy of the best epoch in percent, of features kept as HaoMood/blinear-cnn-faster does.

    Its settings: images squeezed to squares, one at a time, float32; full bilinear descriptors, 1e-5 under the square
    root (signed here, for features that are not rectified), SGD with momentum 0.9, batches of 64, learning rate 1,
    weight decay 1e-5, the rate divided by ten after 8 epochs without a better accuracy.
    """
    config = timm.data.resolve_model_data_config(net)
    prepare = transforms.Compose(
        [transforms.Resize((_SIZE, _SIZE)), transforms.ToTensor(), transforms.Normalize(config['mean'], config['std'])]
    )
    began = time.perf_counter()
    kept: Dict[str, TensorDataset] = {}
    with torch.no_grad():
        for split in ('train', 'val'):
            loader = DataLoader(ImageFolder(str(images / split), prepare), batch_size=1)
            features, targets = zip(*((net.forward_features(image)[0], target) for image, target in loader))
            kept[split] = TensorDataset(torch.stack(features), torch.cat(targets))
    channels = kept['train'].tensors[0].shape[1]
    fc = nn.Linear(channels**2, num_classes)
    optimizer = torch.optim.SGD(fc.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode='max', factor=0.1, patience=8)

    def classify(features: torch.Tensor) -> torch.Tensor:
        x = features.flatten(2)
        x = torch.bmm(x, x.transpose(1, 2)) / x.shape[2]
        x = x.flatten(1)
        return fc(F.normalize(x.sign() * torch.sqrt(x.abs() + 1e-5)))

    best = 0.0
    for _ in range(epochs):
        for features, targets in DataLoader(kept['train'], batch_size=64, shuffle=True):
            loss = F.cross_entropy(classify(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        correct = 0
        with torch.no_grad():
            for features, targets in DataLoader(kept['val'], batch_size=64):
                correct += (classify(features).argmax(1) == targets).sum().item()
        accuracy = 100 * correct / len(kept['val'])
        scheduler.step(accuracy)
        best = max(best, accuracy)
    return time.perf_counter() - began, best


def ours(model: str, images: Path, epochs: int, workers: int, **kwargs) -> Tuple[float, float]:
    """Seconds of the whole run, and top-1 accuracy of its best epoch in percent."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        metrics = finetune(
            images,
            Path(scratch) / 'run',
            model=model,
            img_size=_SIZE,
            freeze=True,
            head_epochs=epochs,
            workers=workers,
            amp_dtype='float32',
            **kwargs,
        )
        return time.perf_counter() - began, metrics['val_top1']


def measure(models: List[str], images: Path, script: Path, epochs: int, workers: int) -> str:
    """Table of all models and ways."""
    num_classes = len(list((images / 'train').iterdir()))
    counts = {split: sum(1 for _ in (images / split).glob('*/*')) for split in ('train', 'val')}
    rows = []
    for model in models:
        name = timm.create_model(model, pretrained=model.startswith('local-dir:')).pretrained_cfg['architecture']
        name = f'`{name}`' + (f' ({Path(model).name})' if ':' in model else '')
        net = timm.create_model(model, pretrained=model.startswith('local-dir:')).eval()
        ways: Dict[str, Callable[[], Tuple[float, float]]] = {
            "timm's train.py, `freeze_backbone`": lambda m=model: (
                train_script(script, m, images, epochs, workers),
                float('nan'),
            ),
            'features once, as blinear-cnn-faster': lambda n=net: features_once(n, images, num_classes, epochs),
            '`finetune --freeze`, images and mirror images': lambda m=model: ours(m, images, epochs, workers),
            '`finetune --freeze --hflip 0`': lambda m=model: ours(
                m, images, epochs, workers, train_aug=dict(hflip=0.0)
            ),
        }
        results = {way: run() for way, run in ways.items()}
        slowest = next(iter(results.values()))[0]
        for way, (seconds, accuracy) in results.items():
            top1 = '' if accuracy != accuracy else f'{accuracy:.1f} %'
            rows.append([name, way, f'{seconds:.0f}', f'{slowest / seconds:.1f} x', top1])
            print(rows[-1], flush=True)
    title = f'{counts["train"]} training and {counts["val"]} validation images, {_SIZE} px, {epochs} epochs, float32'
    machine = describe_machine(torch.device('cpu'))
    return f'{title}. {machine}.\n\n' + markdown_table(['model', 'way', 'seconds', 'speed', 'top-1'], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path)
    parser.add_argument('--train-script', type=Path, required=True, help="timm's train.py, outside of a checkout")
    parser.add_argument('--models', nargs='+', default=['bcnn_vgg16'], help='names, or local-dir: folders')
    parser.add_argument('--epochs', type=int, default=30, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='loader processes (default: %(default)s)')
    parser.add_argument('--output', type=Path, help='file for the table')
    args = parser.parse_args()
    print(write(measure(args.models, args.images, args.train_script, args.epochs, args.workers), args.output))


if __name__ == '__main__':
    main()
