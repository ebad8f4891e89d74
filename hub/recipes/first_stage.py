"""Seconds that the first stage of B-CNN takes, streams frozen, in three ways on the same images:

timm's train script with `freeze_backbone`, the way of HaoMood/blinear-cnn-faster (each image's features computed once,
one at a time, then the classifier trained on the full outer product of the kept features, in float32), and `finetune`.

python hub/recipes/first_stage.py IMAGES --train-script train.py --output docs/first_stage.md

IMAGES is a folder with train and val. The train script is run for one epoch, on a tenth and on a fifth of the images;
what 30 epochs of all take follows from the difference. The other two run whole.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from timm_bilinear.hub import save_model
from timm_bilinear.tools.finetune import finetune
from timm_bilinear.tools.inference import resolve_amp_dtype
from timm_bilinear.tools.measure import describe_machine, markdown_table, write

_SIZE = 448
_BATCH_SIZE = 32  # of the train script


def train_script(script: Path, model: str, images: Path, epochs: int, workers: int) -> float:
    """Seconds of so many epochs of timm's train script, by one epoch of a tenth of the images and one of a fifth."""

    def run(data: Path, output: Path) -> float:
        command = [sys.executable, '-m', 'timm_bilinear', 'run', str(script), '--data-dir', str(data), '--model', model]
        command += ['--num-classes', str(len(list((data / 'train').iterdir()))), '--img-size', str(_SIZE)]
        command += ['--model-kwargs', 'freeze_backbone=True', '--opt', 'sgd', '--lr', '1.0', '--weight-decay', '0']
        command += [
            '--batch-size',
            str(_BATCH_SIZE),
            '--epochs',
            '1',
            '--warmup-epochs',
            '0',
            '--workers',
            str(workers),
        ]
        command += ['--output', str(output), '--device', 'cpu', '--no-prefetcher']
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"'{script}' failed: {done.stderr.strip().splitlines()[-1]}")
        return time.perf_counter() - began

    def copy(part: int, folder: Path) -> None:
        for source in sorted(p for split in ('train', 'val') for p in (images / split).iterdir()):
            target = folder / source.relative_to(images)
            target.mkdir(parents=True)
            files = sorted(source.iterdir())
            for file in files[: max(1, round(len(files) / part))]:
                shutil.copy(file, target)

    def count(folder: Path) -> int:
        """Images of an epoch, which leaves out a last batch that is not full."""
        train, val = (sum(1 for _ in folder.glob(f'{split}/*/*')) for split in ('train', 'val'))
        return train // _BATCH_SIZE * _BATCH_SIZE + val

    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ('tenth', 'fifth')]
        for part, folder in zip((10, 5), folders):
            copy(part, folder)
        few, more = map(count, folders)
        seconds = [run(folder, Path(scratch) / 'runs') for folder in folders]
    of_image = (seconds[1] - seconds[0]) / (more - few)
    return seconds[0] - few * of_image + epochs * count(images) * of_image


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
            **kwargs,
        )
        return time.perf_counter() - began, metrics['val_top1']


def measure(models: List[str], images: Path, script: Path, epochs: int, workers: int) -> str:
    """Table of all models and ways."""
    num_classes = len(list((images / 'train').iterdir()))
    counts = {split: sum(1 for _ in (images / split).glob('*/*')) for split in ('train', 'val')}
    has_bfloat16 = resolve_amp_dtype('auto', torch.device('cpu')) is not None
    rows, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            label = Path(model).name
            if ':' not in model:  # weights do not matter to the time, but a frozen stream has to have some
                folder = Path(scratch) / model
                save_model(timm.create_model(model, num_classes=num_classes), folder)
                label, model = f'`{model}`, weights at random', f'local-dir:{folder}'
            net = timm.create_model(model, pretrained=True).eval()
            run = partial(ours, model, images, epochs, workers)
            ways: Dict[str, Callable[[], Tuple[float, float]]] = {
                "timm's train.py, `freeze_backbone`": lambda m=model: (
                    train_script(script, m, images, epochs, workers),
                    float('nan'),
                ),
                'features once, as blinear-cnn-faster': partial(features_once, net, images, num_classes, epochs),
                '`finetune --freeze --amp float32 --hflip 0`': partial(
                    run, amp_dtype='float32', train_aug=dict(hflip=0.0)
                ),
                '`finetune --freeze`, images and mirror images': run,
            }
            for way, measure_way in ways.items():
                seconds, accuracy = measure_way()
                precision = 'bfloat16' if has_bfloat16 and way.endswith('images') else 'float32'
                top1 = '' if accuracy != accuracy else f'{accuracy:.1f} %'
                slowest = seconds if 'train.py' in way else slowest
                rows.append([label, way, precision, f'{seconds:.0f}', f'{slowest / seconds:.1f} x', top1])
                print(rows[-1], flush=True)
    title = f'{counts["train"]} training and {counts["val"]} validation images, {_SIZE} px, {epochs} epochs'
    machine = describe_machine(torch.device('cpu'))
    columns = ['model', 'way', 'precision', 'seconds', 'speed', 'top-1']
    heading = f'# The first stage\n\n`python hub/recipes/first_stage.py`: {title}. {machine}.\n\n'
    return heading + markdown_table(columns, rows)


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
