"""Options of the timm-bilinear command that several of its parsers have, or that are made of settings."""

import argparse
import ast
from dataclasses import MISSING, Field
from typing import Any, Dict

from .tools.options import check_value
from .tools.settings import AMP_DTYPES

__all__ = ['LABELS_HELP', 'MODEL_HELP', 'add_inference_options', 'add_setting', 'not_negative', 'positive']

MODEL_HELP = (
    "folder, checkpoint of finetune or of timm's train script, hf-hub:OWNER/NAME, or a registered name with weights"
)
LABELS_HELP = 'class names in the order of the logits, one in each line or as a JSON list (default: those of the run)'


class _KeywordArguments(argparse.Action):
    """NAME=VALUE pairs as a dict; values that are Python literals become what they are."""

    def __call__(self, parser, namespace, values, option_string=None):
        arguments: Dict[str, Any] = dict(getattr(namespace, self.dest, None) or {})
        for pair in values:
            name, equals, value = pair.partition('=')
            if not equals or not name.isidentifier():
                parser.error(f"argument {option_string}: '{pair}' is not NAME=VALUE")
            arguments[name] = _literal(value)
        setattr(namespace, self.dest, arguments)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {'true': True, 'false': False, 'none': None, 'null': None}.get(text.lower(), text)


def _number(setting: Field):
    """Converter of one value of a setting, which refuses it by name if it is out of range."""
    kind = setting.metadata['type']

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            word = {int: 'a whole number', float: 'a number'}.get(kind, kind.__name__)
            raise argparse.ArgumentTypeError(f'must be {word}, got {text!r}') from None
        if setting.metadata.get('nargs') is None:
            try:
                check_value(setting, value)
            except (TypeError, ValueError) as e:
                raise argparse.ArgumentTypeError(str(e).split("' ", 1)[-1].rstrip('.')) from None
        return value

    return convert


def add_setting(parser: argparse.ArgumentParser, setting: Field):
    """Option of a setting, which is left out of the result if it is not given."""
    metadata = dict(setting.metadata)
    if not metadata.get('cli', True):
        return
    default = None if setting.default is MISSING else setting.default
    text = metadata['help'].replace('%', '%%')
    kind = metadata['type']
    if default is not None and default is not False and '(default' not in text:
        shown = (
            'yes'
            if default is True
            else ' '.join(f'{v:.4g}' for v in default)
            if isinstance(default, tuple)
            else default
        )
        text += f' (default: {shown})'
    options: Dict[str, Any] = dict(help=text, default=argparse.SUPPRESS, dest=setting.name)
    flag = metadata.get('flag', setting.name).replace('_', '-')
    flags = [f'--{flag}'] + ([f'--{setting.name.replace("_", "-")}'] if 'flag' in metadata else [])
    if kind is bool and default is True:
        options['action'] = argparse.BooleanOptionalAction
    elif kind is bool:
        options['action'] = 'store_true'
    elif kind is dict:
        options.update(action=_KeywordArguments, nargs=metadata.get('nargs', '*'), metavar=metadata.get('metavar'))
    else:
        options['type'] = str if kind is str else _number(setting)
        options.update({key: metadata[key] for key in ('nargs', 'metavar', 'choices') if key in metadata})
    parser.add_argument(*flags, **options)


def add_inference_options(p: argparse.ArgumentParser, workers: str):
    p.add_argument('--batch-size', type=positive, default=32, help='images at a time (default: %(default)s)')
    p.add_argument(
        '--amp',
        choices=AMP_DTYPES,
        default='auto',
        help='precision; auto: bfloat16 where it is faster (default: %(default)s)',
    )
    p.add_argument('--workers', type=not_negative, help=f'{workers} (default: by the cores)')
    p.add_argument('--device', help='cpu, cuda ... (default: a GPU if there is one)')
    p.add_argument('--label-names', metavar='FILE', help=LABELS_HELP)
    p.add_argument(
        '--tta',
        choices=('auto', 'none', 'flip', 'crops', 'scales'),
        default='auto',
        help='mean over mirror images, corners and centre, or parts at several scales; auto: scales for models that '
        'want images padded whole, else none (default: %(default)s)',
    )


def positive(text: str) -> int:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError('must be at least 1, got 0')
    return value


def not_negative(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a whole number, got {text!r}') from None
    if value < 0:
        raise argparse.ArgumentTypeError(f'must be at least 0, got {value}')
    return value
