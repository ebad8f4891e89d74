"""Train bcnn_resnet18_c4.googlefonts on a folder rendered by build.py.

python hub/fonts/train.py images run
"""

import argparse
import sys
from pathlib import Path

import yaml

from timm_bilinear.tools.finetune import Interrupted, Stage, finetune


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, help='folder rendered by build.py')
    parser.add_argument('run', type=Path, help='folder for the run; one that was cut off is continued')
    parser.add_argument('--epochs', type=int, default=9, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='loader processes (default: %(default)s)')
    args = parser.parse_args()
    recipe = yaml.safe_load(Path(__file__).with_name('recipe.yaml').read_text())
    try:
        metrics = finetune(
            args.images,
            args.run,
            model='bcnn_resnet18_c4',
            batch_size=64,
            stages=[Stage(args.epochs, 'adamw', lr=1e-3, head_lr=1e-2, weight_decay=0.05)],
            workers=args.workers,
            seed=0,
            resume=True,
            **recipe,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        sys.exit(f'train.py: error: {e}')
    except Interrupted as e:
        print(f'train.py: {e}', file=sys.stderr)
        sys.exit(e.exit_code)
    print(metrics)


if __name__ == '__main__':
    main()
