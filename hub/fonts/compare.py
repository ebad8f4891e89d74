"""Train average and bilinear pooling by one recipe, with several seeds, and write the table.

    python hub/fonts/build.py fonts images --npm dm-sans inter merriweather --train 300 --val 20
    python hub/fonts/compare.py images runs --epochs 5 --seeds 3 --table docs/fonts_comparison.md

Finished runs are kept when it is run again, begun ones start anew, so that training times are of whole runs.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import List

import yaml
from report import measure

from timm_bilinear.finetune import Stage, finetune

# name in the table, model, its arguments, peak learning rate of the classifier
MODELS = (
    ('resnet18, average pooling', 'resnet18', {}, 1e-3),
    ('bcnn_resnet18, proj_dim=128', 'bcnn_resnet18', dict(proj_dim=128), 1e-2),
    ('bcnn_resnet18', 'bcnn_resnet18', {}, 1e-2),
    ('bcnn_resnet18, stage 3', 'bcnn_resnet18', dict(out_index_a=3), 1e-2),
)


def run(images: Path, folder: Path, model: str, model_kwargs: dict, head_lr: float, epochs: int, seed: int) -> dict:
    """Train and measure, unless that is done."""
    file = folder / 'report.json'
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        recipe = yaml.safe_load(Path(__file__).with_name('recipe.yaml').read_text())
        stage = Stage(epochs, 'adamw', lr=1e-3, head_lr=head_lr, weight_decay=0.05)
        start = time.perf_counter()
        finetune(
            images, folder, model=model, model_kwargs=model_kwargs, stages=[stage], batch_size=32, seed=seed, **recipe
        )
        seconds = time.perf_counter() - start
        report = asdict(measure(folder, images))
        file.write_text(json.dumps(dict(report, seconds=seconds, confusions=report['confusions'][:10])))
    return json.loads(file.read_text())


def _spread(values: List[float]) -> str:
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, help='folder rendered by build.py')
    parser.add_argument('runs', type=Path, help='folder for the runs')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--seeds', type=int, default=3, help='runs per model (default: %(default)s)')
    parser.add_argument('--table', type=Path, help='file for the table')
    args = parser.parse_args()
    lines = [
        '| model | head lr | parameters | top-1 | family top-1 | training |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    try:
        # seeds outside: after each round every model has as many
        results = [
            [
                run(args.images, args.runs / f'{i}_{seed}', *model[1:], args.epochs, seed)
                for i, model in enumerate(MODELS)
            ]
            for seed in range(args.seeds)
        ]
        for model, reports in zip(MODELS, zip(*results)):
            top1, family = (_spread([r[k] for r in reports]) for k in ('top1', 'family_top1'))
            minutes = statistics.median(r['seconds'] for r in reports) / 60
            lines.append(
                f'| {model[0]} | {model[3]:g} | {reports[0]["parameters"] / 1e6:.1f} M | {top1} | {family} |'
                f' {minutes:.1f} min |'
            )
        table = '\n'.join(lines)
        print(table)
        if args.table:
            args.table.write_text(table + '\n')
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'compare.py: error: {e}')


if __name__ == '__main__':
    main()
