"""Train average and bilinear pooling by one recipe, with several seeds, and write the table.

    python hub/fonts/compare.py images runs --epochs 5 --seeds 3 --table table.md

Finished runs are kept when it is run again with the same settings, begun ones start anew, so that times are of whole
runs. They are CPU time, median and range.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import List, Optional

import timm
import yaml
from report import measure, read_families
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import random_seed

from timm_bilinear import BilinearCNN
from timm_bilinear.hub import save_model
from timm_bilinear.tools.finetune import Stage, finetune

STAGE_3 = dict(layers=(2, 2, 2, 0), channels=(64, 128, 256, 256))
# name in the table, model, its arguments, peak learning rate of the classifier
MODELS = (
    ('resnet18, average pooling', 'resnet18', {}, 1e-3),
    ('resnet18, average pooling', 'resnet18', {}, 1e-2),
    ('resnet18 to stage 3, average pooling', 'resnet18', STAGE_3, 1e-3),
    ('resnet18 to stage 3, average pooling', 'resnet18', STAGE_3, 1e-2),
    ('bcnn_resnet18, proj_dim=128', 'bcnn_resnet18', dict(proj_dim=128), 1e-2),
    ('bcnn_resnet18', 'bcnn_resnet18', {}, 1e-2),
    ('bcnn_resnet18 to stage 3', 'bcnn_resnet18', dict(out_index_a=3), 1e-2),
)
LOW = ('conv1.', 'bn1.', 'layer1.', 'layer2.')  # names of a ResNet's stem and first two stages
# images as they are, for every model: timm's ResNet-18 has a crop of its own
DATA_CONFIG = dict(input_size=(3, 224, 224), interpolation='bicubic', crop_pct=1.0)


def save_start(
    folder: Path,
    model: str,
    model_kwargs: dict,
    num_classes: int,
    seed: int,
    start: Optional[Path],
):
    """Save an untrained model, with the same preprocessing whatever model it is.

    Args:
        folder: New folder for it.
        model: timm model name.
        model_kwargs: Arguments of the model.
        num_classes: Number of classes.
        seed: Seed of the weights.
        start: Folder of a bilinear CNN whose stem and first two stages the model gets, None for nothing.
    """
    random_seed(seed)
    net = timm.create_model(model, num_classes=num_classes, **model_kwargs)
    if start is not None:
        weights = timm.create_model(f'local-dir:{start}', pretrained=True).stream_a.state_dict()
        low = {k: v for k, v in weights.items() if k.startswith(LOW)}
        keys = (net.stream_a if isinstance(net, BilinearCNN) else net).load_state_dict(low, strict=False)
        if keys.unexpected_keys or any(k.startswith(LOW) for k in keys.missing_keys):
            raise ValueError(f"The first stream of '{start}' is no ResNet-18.")
    save_model(net, folder, data_config=dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, **DATA_CONFIG))


def run(
    images: Path,
    folder: Path,
    model: str,
    model_kwargs: dict,
    head_lr: float,
    epochs: int,
    seed: int,
    start: Optional[Path],
) -> dict:
    """Train and measure, unless that is done.

    Raises:
        ValueError: If what is done was done with other settings.
    """
    recipe = yaml.safe_load(Path(__file__).with_name('recipe.yaml').read_text())
    settings = dict(
        images=str(images.resolve()),
        model=model,
        model_kwargs=json.loads(json.dumps(model_kwargs)),  # as it is read again
        head_lr=head_lr,
        epochs=epochs,
        seed=seed,
        start=str(start.resolve()) if start else None,
        recipe=recipe,
    )
    file = folder / 'report.json'
    if file.is_file():
        report = json.loads(file.read_text())
        other = [k for k, v in settings.items() if report.get('settings', {}).get(k) != v]
        if other:
            raise ValueError(f"Run '{folder}' was made with another {', '.join(other)}; give a new folder for runs.")
        return report
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage(epochs, 'adamw', lr=1e-3, head_lr=head_lr, weight_decay=0.05)
    num_classes = sum(p.is_dir() for p in (images / 'train').iterdir())
    with tempfile.TemporaryDirectory() as fresh:
        save_start(Path(fresh), model, model_kwargs, num_classes, seed, start)
        began = sum(os.times()[:4])  # of this process and the loader's
        finetune(
            images,
            folder,
            stages=[stage],
            batch_size=32,
            seed=seed,
            **dict(recipe, model=f'local-dir:{fresh}', pretrained=True),
        )
        seconds = sum(os.times()[:4]) - began
    report = asdict(measure(folder, images, read_families(images)))
    report.update(seconds=seconds, confusions=report['confusions'][:10], settings=settings)
    file.write_text(json.dumps(report))
    return report


def _run_name(row: tuple, seed: int) -> str:
    name = re.sub(r'\W+', '-', row[0])
    return f'{name}_{row[3]:g}_{seed}'


def _spread(values: List[float]) -> str:
    mean = f'{statistics.mean(values):.1f}'
    return f'{mean} ± {statistics.stdev(values):.1f}' if len(values) > 1 else mean


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, help='folder rendered by build.py')
    parser.add_argument('runs', type=Path, help='folder for the runs')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--seeds', type=int, default=3, help='runs per model (default: %(default)s)')
    parser.add_argument(
        '--start',
        type=Path,
        help='bilinear CNN on ResNet-18 whose first two stages all models start from (default: none)',
    )
    parser.add_argument('--table', type=Path, help='file for the table')
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 1:
        parser.error('--epochs and --seeds must be at least 1')
    lines = [
        '| model | head lr | parameters | top-1 | family top-1 | CPU time |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    try:
        # seeds outside: after each round every model has as many
        results = [
            [
                run(args.images, args.runs / _run_name(model, seed), *model[1:], args.epochs, seed, args.start)
                for model in MODELS
            ]
            for seed in range(args.seeds)
        ]
        for model, reports in zip(MODELS, zip(*results)):
            top1, family = (_spread([r[k] for r in reports]) for k in ('top1', 'family_top1'))
            minutes = sorted(r['seconds'] / 60 for r in reports)
            lines.append(
                f'| {model[0]} | {model[3]:g} | {reports[0]["parameters"] / 1e6:.1f} M | {top1} | {family} |'
                f' {statistics.median(minutes):.1f} min ({minutes[0]:.1f} to {minutes[-1]:.1f}) |'
            )
        table = '\n'.join(lines)
        print(table)
        if args.table:
            args.table.write_text(table + '\n')
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'compare.py: error: {e}')


if __name__ == '__main__':
    main()
