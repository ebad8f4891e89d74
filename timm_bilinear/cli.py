"""The timm-bilinear command: parsers and error lines. Torch is imported by what a command runs, never for its help."""

import argparse
import importlib
import os
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .cli_options import LABELS_HELP, MODEL_HELP, add_inference_options, add_setting, not_negative, positive
from .tools.interrupt import Terminated, catch_signals
from .tools.settings import AMP_DTYPES, Settings, TrainAug

__all__ = ['main']


def _function(module: str, name: str):
    """A function of a tool, which is imported now."""
    return getattr(importlib.import_module(f'.{module}', __package__), name)


def _finetune(args: argparse.Namespace) -> Optional[int]:
    given = vars(args)
    augmentation = {f.name: given.pop(f.name) for f in fields(TrainAug) if f.name in given}
    if augmentation:
        given['train_aug'] = augmentation
    if 'output' not in given:
        raise _usage_error('finetune', 'the following arguments are required: --output')
    if 'data_dir' not in given and 'resume' not in given:
        raise _usage_error('finetune', 'the following arguments are required: DATA (or --resume)')
    try:
        Settings.of(given)
    except (TypeError, ValueError) as e:  # before torch is imported
        raise _usage_error('finetune', str(e)) from None
    output = given['output']
    metrics = _function('tools.finetune', 'finetune')(**given)
    if metrics and given.get('log_format') != 'json' and os.environ.get('RANK', '0') == '0':
        print(', '.join(f'{k} {v:.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in metrics.items()))
        print(f"Saved to '{output}'. timm-bilinear predict {output} IMAGE... says what images show.")


def _read_label_names(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of a command, with the names that are in the file of `--label-names`."""
    given = vars(args)
    if given['label_names'] is not None:
        given['label_names'] = _function('hub.labels', 'read_label_names')(given['label_names'])
    return given


def _evaluate(args: argparse.Namespace):
    metrics = _function('tools.evaluate', 'evaluate')(**_read_label_names(args))
    print(_function('tools.evaluate', 'format_metrics')(metrics))


def _predict(args: argparse.Namespace) -> Optional[int]:
    return _function('tools.predict', 'run_predict')(**_read_label_names(args))


def _explain(args: argparse.Namespace) -> Optional[int]:
    return _function('tools.explain', 'run_explain')(**_read_label_names(args))


def _index(args: argparse.Namespace) -> Optional[int]:
    if not args.remove and (args.model is None or args.folder is None):
        raise _usage_error('index', 'the following arguments are required: MODEL, FOLDER (or --remove)')
    return _function('tools.index', 'run_index')(**vars(args))


def _search(args: argparse.Namespace) -> Optional[int]:
    return _function('tools.search', 'run_search')(**vars(args))


def _retrieval(args: argparse.Namespace) -> Optional[int]:
    return _function('tools.search', 'run_retrieval')(**vars(args))


def _app(args: argparse.Namespace) -> Optional[int]:
    return _function('tools.app', 'run_app')(**vars(args))


def _export(args: argparse.Namespace) -> Optional[int]:
    return _function('tools.export', 'run_export')(**_read_label_names(args))


def _benchmark(args: argparse.Namespace):
    print(_function('tools.benchmark', f'benchmark_{args.what}')(args.output, args.repeats, args.device))


def _push(args: argparse.Namespace):
    is_space = vars(args).pop('space')
    given = _read_label_names(args)
    if is_space:
        taken = ('private', 'license', 'commit_message', 'dry_run')
        others = [k for k, v in given.items() if v and k not in (*taken, 'checkpoint', 'repo')]
        if others:
            raise _usage_error('push', f'argument --space: not allowed with argument --{others[0].replace("_", "-")}')
        space = {name: given[name] for name in taken}
        where = _function('hub.space', 'push_space')(given['checkpoint'], given['repo'], **space)
    else:
        where = _function('hub', 'push_to_hub')(given.pop('checkpoint'), given.pop('repo'), **given)
    if given['dry_run'] is None:
        print(f'Pushed to {where}')
        return
    file_hashes = _function('hub.client', 'file_hashes')
    print(f"Written to '{where}', nothing was sent:")
    for path in sorted(Path(where).iterdir()):
        print(f'  {path.name}: {path.stat().st_size:,} bytes, sha256 {file_hashes(path)[0]}')


def _prepare(args: argparse.Namespace):
    counts = _function('data.prepare', 'prepare')(args.dataset, args.src, args.dst)
    print(f"'{args.dst}': " + ', '.join(f'{k} {v}' for k, v in counts.items()))


def _run(argv: List[str]):
    """Run a script, timm's or another, as python would, with this package's models registered."""
    if not argv or argv[0].startswith('-'):
        sys.exit('usage: timm-bilinear run SCRIPT ARGS...')
    if not Path(argv[0]).is_file():
        sys.exit(f"timm-bilinear: error: there is no script '{argv[0]}'")
    importlib.import_module('.models', __package__)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name='__main__')


class _VersionAction(argparse.Action):
    """Versions of this package and of what its results depend on, read without importing any."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs=0,
            default=argparse.SUPPRESS,
            help='versions of timm_bilinear, timm, torch and Python',
        )

    def __call__(self, parser, namespace, values, option_string=None):
        import platform
        from importlib.metadata import PackageNotFoundError, version

        told = []
        for name in ('timm_bilinear', 'timm', 'torch', 'torchvision', 'huggingface_hub'):
            try:
                told.append(f'{name} {version(name)}')
            except PackageNotFoundError:
                told.append(f'{name} not installed')
        print(', '.join([*told, f'Python {platform.python_version()}']))
        parser.exit()


class _CommandError(Exception):
    """Wrong arguments of a command: it and the message of argparse."""


def _usage_error(command: str, message: str) -> _CommandError:
    return _CommandError(command, message)


def _add_finetune(commands):
    usage = 'timm-bilinear finetune DATA --output DIR [OPTIONS]'
    p = commands.add_parser('finetune', usage=usage, help='fine-tune a model on images')
    p.set_defaults(run=_finetune)
    settings = {f.name: f for f in fields(Settings)}
    data_dir = settings.pop('data_dir')
    p.add_argument('data_dir', nargs='?', default=argparse.SUPPRESS, metavar='DATA', help=data_dir.metadata['help'])
    for setting in settings.values():
        if setting.name == 'train_aug':
            for part in fields(TrainAug):
                add_setting(p, part)
        else:
            add_setting(p, setting)


def _add_evaluate(commands):
    p = commands.add_parser('evaluate', help='measure a model on images with known classes')
    p.set_defaults(run=_evaluate)
    p.add_argument('model', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('data', metavar='DATA', help='folder with a folder per split or per class, or a timm dataset')
    p.add_argument('--split', default='test', help='split of DATA (default: %(default)s)')
    p.add_argument('--output', metavar='DIR', help='folder for metrics.json, tables and pictures (default: none)')
    p.add_argument('--worst', type=not_negative, default=25, help='images on their sheet (default: %(default)s)')
    p.add_argument('--pairs', type=not_negative, default=10, help='pairs on their sheet (default: %(default)s)')
    p.add_argument('--skip-bad', action='store_true', help='go on without the images that cannot be read')
    p.add_argument('--class-map', metavar='FILE', help="file with the order of the classes, as timm's --class-map")
    p.add_argument('--data-root', dest='root', metavar='DIR', help='folder of a timm dataset')
    p.add_argument('--download', action='store_true', help='download a timm dataset that is not there')
    add_inference_options(p, 'loader processes')


def _add_predict(commands):
    p = commands.add_parser('predict', help='say what images show')
    p.set_defaults(run=_predict)
    p.add_argument('model', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('images', metavar='IMAGE', nargs='+', help='images, folders of them, or patterns')
    p.add_argument('--topk', type=positive, default=5, help='classes of each image (default: %(default)s)')
    p.add_argument('--json', metavar='FILE', help='write a JSON list; - for standard output')
    p.add_argument('--csv', metavar='FILE', help='write a table; - for standard output')
    add_inference_options(p, 'threads that read images')


def _add_explain(commands):
    p = commands.add_parser('explain', help='show where in images the evidence for a class lies')
    p.set_defaults(run=_explain)
    p.add_argument('model', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('images', metavar='IMAGE', nargs='+', help='images, folders of them, or patterns')
    p.add_argument('--output', required=True, metavar='DIR', help='folder for the pictures')
    p.add_argument(
        '--target', metavar='CLASS', help='class to explain, by name or index (default: the best but CONTRAST)'
    )
    p.add_argument('--contrast', metavar='CLASS', help="class that it is compared with, or 'rest': the others' mean")
    p.add_argument('--json', metavar='FILE', help='write numbers and maps as a JSON list; - for standard output')
    p.add_argument(
        '--pairs',
        type=not_negative,
        default=0,
        help='pairs of channels that give most to the target, to draw with what they see (default: %(default)s)',
    )
    p.add_argument('--device', help='cpu, cuda ... (default: a GPU if there is one)')
    p.add_argument('--label-names', metavar='FILE', help=LABELS_HELP)


def _add_index(commands):
    usage = 'timm-bilinear index MODEL FOLDER --output FILE [OPTIONS]'
    p = commands.add_parser('index', usage=usage, help='make an index of images to search in')
    p.set_defaults(run=_index)
    p.add_argument('model', nargs='?', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('folder', nargs='?', metavar='FOLDER', help='folder of images')
    p.add_argument('--output', required=True, metavar='FILE', help='the index, new or brought up to date')
    p.add_argument('--dim', type=positive, help='numbers that are kept of an image (default: 512)')
    p.add_argument('--reduce', choices=('sketch', 'pca', 'none'), help='how they are made (default: sketch)')
    p.add_argument('--remove', nargs='+', metavar='PATH', help='take these images, or folders, out of the index')
    p.add_argument('--batch-size', type=positive, default=32, help='images at a time (default: %(default)s)')
    p.add_argument('--amp', choices=AMP_DTYPES, default='auto', help='precision (default: %(default)s)')
    p.add_argument('--workers', type=not_negative, help='threads that read images (default: by the cores)')
    p.add_argument('--device', help='cpu, cuda ... (default: a GPU if there is one)')

    p = commands.add_parser('app', help='show a page that pictures are dropped on')
    p.set_defaults(run=_app)
    p.add_argument('model', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('--index', metavar='FILE', help='index of images to find look-alikes in')
    p.add_argument('--port', type=positive, help='port (default: the first free one from 7860)')
    p.add_argument('--host', help='address to listen on (default: 127.0.0.1, this machine alone)')
    p.add_argument('--device', help='cpu, cuda ... (default: a GPU if there is one)')

    p = commands.add_parser('search', help='find the images of an index that look like others')
    p.set_defaults(run=_search)
    p.add_argument('index', metavar='FILE', help='index')
    p.add_argument('images', metavar='IMAGE', nargs='+', help='images, folders of them, or patterns')
    p.add_argument('--topk', type=positive, default=10, help='images to find for each (default: %(default)s)')
    p.add_argument('--model', metavar='MODEL', help='model of the index (default: where it was)')
    p.add_argument('--json', metavar='FILE', help='write a JSON list; - for standard output')
    p.add_argument('--sheet', metavar='PNG', help='draw what is found')
    p.add_argument('--faiss', action='store_true', help='search by faiss, with the same results')
    p.add_argument('--device', help='cpu, cuda ... (default: a GPU if there is one)')

    p = commands.add_parser('retrieval', help='measure how well images of a class find each other')
    p.set_defaults(run=_retrieval)
    p.add_argument('model', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('query', metavar='QUERY_FOLDER', help='folder with a folder of images per class')
    p.add_argument('gallery', metavar='GALLERY_FOLDER', nargs='?', help='images to look in (default: the queries)')
    p.add_argument('--cameras', metavar='REGEX', help="finds the camera in a file name, e.g. 'c([0-9]+)'")
    p.add_argument('--labels', metavar='REGEX', help="finds the class in a file name (default: its folder's name)")
    p.add_argument('--rerank', action='store_true', help='rank by k-reciprocal neighbours too')
    p.add_argument('--json', metavar='FILE', help='write the numbers; - for standard output')
    p.add_argument('--batch-size', type=positive, default=32, help='images at a time (default: %(default)s)')
    p.add_argument('--workers', type=not_negative, help='threads that read images (default: by the cores)')
    p.add_argument('--device', help='cpu, cuda ... (default: a GPU if there is one)')


def _add_export(commands):
    p = commands.add_parser('export', help='write a model as ONNX, checked in onnxruntime')
    p.set_defaults(run=_export)
    p.add_argument('model', metavar='MODEL', help=MODEL_HELP)
    p.add_argument('file', metavar='FILE.onnx')
    p.add_argument('--opset', type=positive, help="ONNX opset (default: the exporter's)")
    p.add_argument(
        '--img-size',
        dest='size',
        type=positive,
        nargs='+',
        metavar='PIXELS',
        help="height and width (default: the model's)",
    )
    p.add_argument('--label-names', metavar='FILE', help=LABELS_HELP)
    p.add_argument('--image', metavar='FILE', help='picture that the result is checked on (default: one is drawn)')
    p.add_argument(
        '--repeats',
        type=not_negative,
        default=5,
        help='runs that measure the speed, 0 for none (default: %(default)s)',
    )


def _add_push(commands):
    p = commands.add_parser('push', help='publish a trained model on the Hugging Face Hub')
    p.set_defaults(run=_push)
    p.add_argument(
        'checkpoint', help="folder of finetune or of a dry run, or checkpoint of finetune or of timm's train script"
    )
    p.add_argument('--repo', required=True, metavar='OWNER/NAME')
    p.add_argument('--private', action='store_true', help='create the repo private')
    p.add_argument(
        '--license', help="the weights' licence as the Hub abbreviates it, e.g. apache-2.0 (default: none named)"
    )
    p.add_argument('--license-name', metavar='NAME', help='name of the licence, if --license is other')
    p.add_argument('--license-link', metavar='URL', help='where it is to be read')
    p.add_argument('--dataset', help='name of the dataset, for the model card')
    p.add_argument(
        '--label-names',
        metavar='FILE',
        help=LABELS_HELP,
    )
    p.add_argument('--half', action='store_true', help='store weight matrices in half precision')
    p.add_argument('--commit-message', default='Add model', help='(default: %(default)s)')
    p.add_argument('--space', action='store_true', help='publish the page of `app` for a model that is on the Hub')
    p.add_argument('--dry-run', metavar='DIR', help="write the repo's files into DIR and send nothing")


def _add_others(commands):
    p = commands.add_parser('prepare', help='make an image folder of a public dataset as downloaded')
    p.set_defaults(run=_prepare)
    p.add_argument('dataset', choices=('cub200', 'aircraft', 'cars'))
    p.add_argument('src', help='folder of the official archives, or of what they unpack to')
    p.add_argument('dst', help='new folder for train and val')

    commands.add_parser('run', help="run a script, e.g. timm's validate.py, with the models registered")

    p = commands.add_parser('benchmark', help='measure speed and memory')
    p.set_defaults(run=_benchmark)
    benchmarks = p.add_subparsers(required=True, metavar='WHAT', dest='what')
    for name, text in (
        ('head', "the head against the article's, eager and compiled"),
        ('model', "a training step of the model against timm's backbone"),
        ('poolings', 'every registered pooling'),
    ):
        p = benchmarks.add_parser(name, help=text)
        p.add_argument('--output', help='file for the table, e.g. docs/benchmark_head_cpu.md')
        p.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
        p.add_argument('--repeats', type=int, default=15, help='measurements of each row (default: %(default)s)')


def _parser() -> Tuple[argparse.ArgumentParser, Dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog='timm-bilinear', description='Bilinear CNNs for timm.')
    parser.add_argument('--version', action=_VersionAction)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for add in (_add_finetune, _add_evaluate, _add_predict, _add_explain, _add_index):
        add(commands)
    for add in (_add_export, _add_push, _add_others):
        add(commands)
    return parser, commands.choices


def main(argv: Optional[List[str]] = None):
    """Run the command.

    Errors of input, data or disk end it with one line and exit code 1, wrong arguments with argparse's and 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['run']:  # a script's errors are its own
        return _run(argv[1:])
    parser, commands = _parser()
    args = parser.parse_args(argv)
    run = args.run
    del args.run
    try:
        with catch_signals():
            code = run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
    except _CommandError as e:
        commands[e.args[0]].error(e.args[1])
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        message = ' '.join(str(e).split()) or type(e).__name__
        sys.exit(f'timm-bilinear: error: {message}')
    except KeyboardInterrupt as e:
        print(f'timm-bilinear: {str(e) or "Stopped."}', file=sys.stderr)
        sys.exit(getattr(e, 'exit_code', 143 if isinstance(e, Terminated) else 130))
    if code:
        sys.exit(code)
