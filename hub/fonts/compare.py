"""Train every pooling by one recipe, with several seeds, on one network's features, and write the table.

    python hub/fonts/build.py unseen25 --npm $(python hub/fonts/compare.py --families)     # 25 families not trained on
    python hub/fonts/build.py unseen25 img50 --select '*-latin-[47]00-normal*' --train 60 --val 20 --test 10 --size 112
    python hub/fonts/compare.py img50 hub/fonts/compare.json resnet18 --start hub/FOLDER --table table.md
    python hub/fonts/compare.py img50 hub/fonts/compare_frozen.json lite0 --start lite0 --frozen --table table.md

The folder of images is one of build.py's: validation chooses the learning rate of the head, for each row alike, and the
epoch; the test is of another renderer. `--start` is the folder of a model that the features start from; `--frozen`
trains the head alone. Finished runs are kept in the JSON file and not made again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from frozen_features import Features, compute_features, train_head
from report import measure, read_families
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import random_seed
from torch import nn

from timm_bilinear import BilinearCNN
from timm_bilinear.hub import save_model
from timm_bilinear.layers import register_pooling
from timm_bilinear.layers.pooling.plain import PlainPooling
from timm_bilinear.tools.finetune import Stage, finetune
from timm_bilinear.tools.measure import markdown_table

# Google Fonts families that are not among those of GoogleFontsBench and have the weights 400 and 700.
FAMILIES = (
    'alegreya archivo arvo barlow bitter cabin cardo cinzel comfortaa cormorant-garamond crimson-text dancing-script '
    'dosis eb-garamond exo-2 fira-sans heebo hind ibm-plex-sans ibm-plex-serif inconsolata josefin-sans kanit karla '
    'lato'
).split()
SIZE = 112  # of the images that are trained on, and of a view
HEAD_LRS = (3e-3, 3e-2, 1e-1)  # of AdamW, with the streams
FROZEN_LRS = (0.3, 1.0, 3.0, 10.0, 30.0)  # of SGD with momentum
STREAM_LR = 3e-4  # as `finetune` takes it with weights
EPOCHS, FROZEN_EPOCHS = 5, 20
BATCH_SIZE = 32
RECIPE = dict(
    img_size=SIZE,
    amp_dtype='bfloat16',
    train_aug=dict(scale=[0.8, 1.0], ratio=[0.95, 1.05], hflip=0.0, color_jitter=None),
    workers=1,
    log_format='text',
)


@register_pooling('mean')
class MeanPooling(PlainPooling):
    """The mean of the features, as timm's networks classify it, for a head like the others."""

    max_streams = 1

    def __init__(self, in_features, *, device=None, dtype=None):
        super().__init__()
        self.num_features = in_features[0]

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        return a.mean(2)


@dataclass(frozen=True)
class Network:
    """Features to pool.

    Args:
        backbone: timm model.
        stages: Stages for a pooling that takes several; others take the last of them.
        fresh: Beginnings of the names of layers that the given weights do not have.
        whole: What timm's own network is called in the table.
    """

    backbone: str
    stages: Tuple[int, ...]
    fresh: Tuple[str, ...]
    whole: str


NETWORKS = {
    'resnet18': Network('resnet18', (2, 3), ('layer4.',), "timm's `resnet18`, with stage 4"),
    'lite0': Network('tf_efficientnet_lite0', (2, 3), (), "timm's `tf_efficientnet_lite0`, with stage 4"),
}
DATA_CONFIG = dict(
    input_size=(3, SIZE, SIZE),
    interpolation='bicubic',
    crop_pct=1.0,
    crop_mode='border',
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)
# With the dim of the paper, 8192, a run of the head alone is half an hour by count.
CROSS = '`cross`, dim=1024, two stages'
# name in the table and arguments of `bcnn`
POOLINGS: Tuple[Tuple[str, Dict[str, Any]], ...] = (
    ('average pooling', dict(pool_type='mean')),
    ('`avg`', dict(pool_type='avg')),
    ('`avg`, proj_dim=128', dict(pool_type='avg', proj_dim=128)),
    ('`avg`, sigme', dict(pool_type='avg', power='sigme')),
    ('`avg`, maxexp', dict(pool_type='avg', power='maxexp')),
    ('`max`', dict(pool_type='max')),
    ('`sketch`', dict(pool_type='sketch')),
    ('`maclaurin`', dict(pool_type='maclaurin')),
    ('`isqrt`', dict(pool_type='isqrt', proj_dim=256, proj_type='conv_bn_relu')),
    ('`sqrtm`', dict(pool_type='sqrtm')),
    ('`democratic`', dict(pool_type='democratic')),
    (CROSS, dict(pool_type='cross', dim=1024)),
    ('`lowrank`, proj_dim=100', dict(pool_type='lowrank', proj_dim=100)),
    ('`moments`', dict(pool_type='moments')),
)


def _arguments(network: Network, row: str) -> Tuple[str, Dict[str, Any]]:
    """timm model of a row, and its arguments."""
    if row == network.whole:
        return network.backbone, {}
    args = dict(POOLINGS)[row]
    stages = (
        dict(out_indices_a=network.stages) if args['pool_type'] == 'cross' else dict(out_index_a=network.stages[-1])
    )
    return 'bcnn', dict(backbone_a=network.backbone, **stages, **args)


def _start_weights(folder: Path) -> Dict[str, Any]:
    net = timm.create_model(f'local-dir:{folder}', pretrained=True)
    return (net.stream_a if isinstance(net, BilinearCNN) else net).state_dict()


def create_start(network: Network, row: str, num_classes: int, seed: int, start: Path) -> nn.Module:
    """Create the model that a run starts from.

    Args:
        network: Features.
        row: Row of the table.
        num_classes: Number of classes.
        seed: Seed of what does not start from weights.
        start: Folder of a model with the same features.

    Raises:
        ValueError: If that has other features.
    """
    name, args = _arguments(network, row)
    random_seed(seed)
    net = timm.create_model(name, num_classes=num_classes, **args)
    features: nn.Module = net.stream_a if isinstance(net, BilinearCNN) else net
    fresh = ('fc.', 'classifier.', *network.fresh)
    wanted = {k: v for k, v in features.state_dict().items() if not k.startswith(fresh)}
    weights = _start_weights(start)
    if any(k not in weights or weights[k].shape != v.shape for k, v in wanted.items()):
        raise ValueError(f"'{start}' has other layers than the features of '{row}'.")
    features.load_state_dict({k: weights[k] for k in wanted}, strict=False)
    return net


def run(images: Path, key: str, row: str, head_lr: float, seed: int, start: Path) -> Dict[str, Any]:
    """Train and measure: top-1 in percent on validation and test, CPU seconds of training, parameters."""
    num_classes = sum(p.is_dir() for p in (images / 'train').iterdir())
    stage = Stage(EPOCHS, 'adamw', lr=STREAM_LR, head_lr=head_lr, weight_decay=0.05)
    with tempfile.TemporaryDirectory() as folder:
        fresh, output = Path(folder) / 'start', Path(folder) / 'run'
        net = create_start(NETWORKS[key], row, num_classes, seed, start)
        save_model(net, fresh, data_config=DATA_CONFIG)
        began = sum(os.times()[:4])  # of this process and the loader's
        done = finetune(
            images,
            output,
            model=f'local-dir:{fresh}',
            pretrained=True,
            stages=[stage],
            batch_size=BATCH_SIZE,
            seed=seed,
            **RECIPE,
        )
        seconds = sum(os.times()[:4]) - began
        report = measure(output, images, read_families(images))
    return dict(
        val=done['val_top1'],
        test=report.top1,
        test_families=report.family_top1,
        seconds=round(seconds, 1),
        parameters=report.parameters,
    )


@lru_cache(maxsize=2)
def _frozen_features(images: Path, key: str, stages: Tuple[int, ...], start: Path) -> Dict[str, Features]:
    row = CROSS if len(stages) > 1 else '`avg`'
    net = create_start(NETWORKS[key], row, 1, 0, start)
    net.pretrained_cfg = dict(net.pretrained_cfg, **DATA_CONFIG)
    return compute_features(net, images)


def run_frozen(images: Path, key: str, row: str, head_lr: float, seed: int, start: Path) -> Dict[str, Any]:
    """As `run`, with the head alone: its parameters, and no seconds for the features, which all runs share."""
    network = NETWORKS[key]
    stages = network.stages if row == CROSS else network.stages[-1:]
    features = _frozen_features(images, key, stages, start)
    names = sorted(p.name for p in (images / 'train').iterdir())
    net = create_start(network, row, len(names), seed, start)
    result = train_head(net.head, features, head_lr, FROZEN_EPOCHS, BATCH_SIZE, seed)
    families = read_families(images)
    found = [(names[i], names[j]) for i, j in zip(result.predictions.tolist(), features['test'].targets.tolist())]

    def percent(right: List[bool]) -> float:
        return 100 * sum(right) / max(len(right), 1)

    return dict(
        val=result.val_top1,
        test=percent([a == b for a, b in found]),
        test_families=percent([families[a] == families[b] for a, b in found]),
        seconds=round(result.seconds, 1),
        parameters=sum(p.numel() for p in net.head.parameters()),
    )


class Runs:
    """Results of runs, in a file that each is added to when it is finished.

    Args:
        file: JSON file, new or begun.
        settings: What all of them have in common.

    Raises:
        ValueError: If those in the file had something else in common.
    """

    def __init__(self, file: Path, settings: Dict[str, Any]):
        self.file = file
        content = json.loads(file.read_text()) if file.is_file() else dict(settings=settings, runs={})
        if content['settings'] != json.loads(json.dumps(settings)):
            raise ValueError(f"The runs in '{file}' were made with other settings; give a new file.")
        self.content = content

    def get(self, name: str) -> Optional[Dict[str, Any]]:
        return self.content['runs'].get(name)

    def add(self, name: str, result: Dict[str, Any]):
        if self.file.is_file():  # another process may have added to it
            self.content = json.loads(self.file.read_text())
        self.content['runs'][name] = result
        partial = self.file.with_suffix('.partial')
        partial.write_text(json.dumps(self.content, indent=1, sort_keys=True) + '\n')
        os.replace(partial, self.file)


def _spread(values: Sequence[float]) -> str:
    mean = f'{statistics.mean(values):.1f}'
    return f'{mean} ± {statistics.stdev(values):.1f}' if len(values) > 1 else mean


def _table(rows: Dict[str, Tuple[float, List[Dict[str, Any]]]]) -> str:
    head = ['head', 'head lr', 'parameters', 'val top-1', 'test top-1', 'families', 'CPU s']
    lines = [
        [
            row,
            f'{head_lr:g}',
            f'{results[0]["parameters"]:,}',
            *(_spread([r[k] for r in results]) for k in ('val', 'test', 'test_families')),
            f'{statistics.median(r["seconds"] for r in results):.0f}',
        ]
        for row, (head_lr, results) in rows.items()
    ]
    return markdown_table(head, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, nargs='?', help='folder rendered by build.py')
    parser.add_argument('runs', type=Path, nargs='?', help='JSON file for the results')
    parser.add_argument('network', nargs='?', choices=NETWORKS, help='features to pool')
    parser.add_argument('--families', action='store_true', help='only name families to compare on')
    parser.add_argument('--start', type=Path, help='folder of a model that the features start from')
    parser.add_argument('--frozen', action='store_true', help='train the head alone')
    parser.add_argument('--rows', nargs='+', help='poolings (default: all)')
    parser.add_argument('--seeds', type=int, default=3, help='runs at the chosen rate (default: %(default)s)')
    parser.add_argument('--table', type=Path, help='file for the table')
    args = parser.parse_args()
    if args.families:
        print(' '.join(FAMILIES))
        return
    if args.network is None or args.start is None:
        parser.error('images, a file for runs, a network and --start are needed')
    names = [name for name, _ in POOLINGS] + ([] if args.frozen else [NETWORKS[args.network].whole])
    chosen = [n for n in names if not args.rows or n in args.rows or n.strip('`') in args.rows]
    if args.seeds < 1 or not chosen:
        parser.error(f'--seeds must be at least 1, --rows among {", ".join(names)}')
    try:
        settings = dict(epochs=FROZEN_EPOCHS) if args.frozen else dict(recipe=RECIPE, epochs=EPOCHS)
        runs = Runs(args.runs, dict(images=args.images.name, **settings))

        train = run_frozen if args.frozen else run

        def result(row: str, head_lr: float, seed: int) -> Dict[str, Any]:
            name = f'{args.network}{", frozen" * args.frozen}, {row}, {head_lr:g}, seed {seed}'
            if runs.get(name) is None:
                runs.add(name, train(args.images, args.network, row, head_lr, seed, args.start))
                print(name, runs.get(name), flush=True)
            return runs.get(name)

        rows = {}
        for row in chosen:
            best = max(FROZEN_LRS if args.frozen else HEAD_LRS, key=lambda head_lr: result(row, head_lr, 0)['val'])
            rows[row] = best, [result(row, best, seed) for seed in range(args.seeds)]
        table = _table(rows)
        print(table)
        if args.table:
            args.table.write_text(table + '\n')
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        sys.exit(f'compare.py: error: {e}')


if __name__ == '__main__':
    main()
