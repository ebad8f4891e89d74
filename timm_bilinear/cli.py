"""The timm-bilinear command."""

import argparse
import runpy
import sys
from pathlib import Path
from typing import List, Optional

from timm.utils import ParseKwargs

__all__ = ['main']


def _finetune(args: argparse.Namespace):
    from .tools.finetune import finetune

    args = vars(args)
    args['train_aug'] = {k: args.pop(k) for k in ('scale', 'ratio', 'hflip', 'color_jitter')}
    metrics = finetune(**args)
    print(', '.join(f'{k} {v:.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in metrics.items()))
    print(f"Saved to '{args['output']}': timm.create_model('local-dir:{args['output']}', pretrained=True)")


def _benchmark_head(args: argparse.Namespace):
    from .tools.benchmark import benchmark_head

    print(benchmark_head(args.output, args.repeats, args.device))


def _benchmark_model(args: argparse.Namespace):
    from .tools.benchmark import benchmark_model

    print(benchmark_model(args.output, args.repeats, args.device))


def _benchmark_poolings(args: argparse.Namespace):
    from .tools.benchmark import benchmark_poolings

    print(benchmark_poolings(args.output, args.repeats, args.device))


def _push(args: argparse.Namespace):
    from .hub import push_to_hub
    from .hub.client import file_hashes
    from .hub.labels import read_label_names

    args = vars(args)
    if args['label_names'] is not None:
        args['label_names'] = read_label_names(args['label_names'])
    where = push_to_hub(args.pop('checkpoint'), args.pop('repo'), **args)
    if args['dry_run'] is None:
        print(f'Pushed to {where}')
        return
    print(f"Written to '{where}', nothing was sent:")
    for path in sorted(Path(where).iterdir()):
        print(f'  {path.name}: {path.stat().st_size:,} bytes, sha256 {file_hashes(path)[0]}')


def _prepare(args: argparse.Namespace):
    from .data.prepare import prepare

    counts = prepare(args.dataset, args.src, args.dst)
    print(f"'{args.dst}': " + ', '.join(f'{k} {v}' for k, v in counts.items()))


def _run(argv: List[str]):
    """Run a script, timm's or another, as python would, with this package's models registered."""
    if not argv or argv[0].startswith('-'):
        sys.exit('usage: timm-bilinear run SCRIPT ARGS...')
    if not Path(argv[0]).is_file():
        sys.exit(f"timm-bilinear: error: there is no script '{argv[0]}'")
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name='__main__')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-bilinear', description='Bilinear CNNs for timm.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    p = commands.add_parser('finetune', help='fine-tune a model on an image folder')
    p.set_defaults(run=_finetune)
    p.add_argument('data_dir', help='folder with train, val and optionally test, each with a folder per class')
    p.add_argument('--output', required=True, help='folder for the model, its checkpoints and summary.csv')
    p.add_argument('--model', default='bcnn_resnet18', help='timm model name (default: %(default)s)')
    p.add_argument('--pretrained', action=argparse.BooleanOptionalAction, default=True, help='start from weights')
    p.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='model arguments, name=value')
    p.add_argument('--img-size', type=int, help="input height and width (default: the model's)")
    p.add_argument('--train-size', type=int, help='height and width of the crops trained on (default: --img-size)')
    p.add_argument('--batch-size', type=int, default=32)
    p.add_argument('--epochs', type=int, default=30, help='epochs with everything trained (default: %(default)s)')
    p.add_argument(
        '--head-epochs', type=int, default=30, help='before them, with frozen streams, if pretrained (default: 30)'
    )
    p.add_argument('--smoothing', type=float, default=0.1, help='label smoothing (default: %(default)s)')
    p.add_argument('--scale', type=float, nargs=2, default=(0.3, 1.0), help='area of random crops (default: 0.3 1)')
    p.add_argument('--ratio', type=float, nargs=2, default=(3 / 4, 4 / 3), help='aspect of random crops')
    p.add_argument('--hflip', type=float, default=0.5, help='probability of a flip (default: %(default)s)')
    p.add_argument('--color-jitter', type=float, default=0.4, help='strength (default: %(default)s)')
    p.add_argument('--amp-dtype', choices=('bfloat16',), help='train under autocast')
    p.add_argument('--workers', type=int, default=2, help='loader processes (default: %(default)s)')
    p.add_argument('--device', help='default: a GPU if there is one')
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--resume', action='store_true', help='continue the run in --output')

    p = commands.add_parser('push', help='publish a trained model on the Hugging Face Hub')
    p.set_defaults(run=_push)
    p.add_argument('checkpoint', help="folder of finetune or of a dry run, or checkpoint file of timm's train script")
    p.add_argument('--repo', required=True, metavar='OWNER/NAME')
    p.add_argument('--private', action='store_true', help='create the repo private')
    p.add_argument(
        '--license', help="the weights' licence as the Hub abbreviates it, e.g. apache-2.0 (default: none named)"
    )
    p.add_argument('--dataset', help='name of the dataset, for the model card')
    p.add_argument(
        '--label-names',
        metavar='FILE',
        help='class names in the order of the logits, one in each line or as a JSON list (default: those of the run)',
    )
    p.add_argument('--half', action='store_true', help='store weight matrices in half precision')
    p.add_argument('--commit-message', default='Add model')
    p.add_argument('--dry-run', metavar='DIR', help="write the repo's files into DIR and send nothing")

    p = commands.add_parser('prepare', help='make an image folder of a public dataset as downloaded')
    p.set_defaults(run=_prepare)
    p.add_argument('dataset', choices=('cub200', 'aircraft', 'cars'))
    p.add_argument('src', help='folder of the official archives, or of what they unpack to')
    p.add_argument('dst', help='new folder for train and val')

    commands.add_parser('run', help="run a script, e.g. timm's validate.py, with the models registered")

    p = commands.add_parser('benchmark', help='measure speed and memory')
    benchmarks = p.add_subparsers(required=True, metavar='WHAT')
    for name, run, text in (
        ('head', _benchmark_head, "the head against the article's, eager and compiled"),
        ('model', _benchmark_model, "a training step of the model against timm's backbone"),
        ('poolings', _benchmark_poolings, 'every registered pooling'),
    ):
        p = benchmarks.add_parser(name, help=text)
        p.set_defaults(run=run)
        p.add_argument('--output', help='file for the table, e.g. docs/benchmark_head_cpu.md')
        p.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
        p.add_argument('--repeats', type=int, default=15, help='measurements of each row (default: %(default)s)')
    return parser


def main(argv: Optional[List[str]] = None):
    """Run the command; errors of input, data or disk end it with one line and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['run']:  # a script's errors are its own
        return _run(argv[1:])
    args = _parser().parse_args(argv)
    run = args.run
    del args.run
    try:
        run(args)
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        sys.exit(f'timm-bilinear: error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)
