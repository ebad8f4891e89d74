"""What a run says when it cannot go on: what is kept, and what to do."""

import errno
import os
import re
import shlex
from typing import Optional

import torch

from .frozen import FeatureError
from .recipe import Stage

__all__ = ['cannot_write', 'is_full', 'of_numbers', 'resume_command', 'stopped']

_FULL = (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))


def _number(error: Optional[BaseException]) -> Optional[int]:
    """The system's number of an error, that of what it was raised from, or that in the text of safetensors."""
    while error is not None:
        in_text = re.search(r'\(os error (\d+)\)', str(error))
        number = getattr(error, 'errno', None) or (int(in_text[1]) if in_text else None)
        if number:
            return number
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException) -> bool:
    """Whether a disk, or someone's share of it, is full."""
    return _number(error) in _FULL or 'no space left' in str(error).lower()


def cannot_write(output: str, what: str, error: BaseException) -> OSError:
    """Error of a folder that cannot be used, with the remedy.

    Args:
        output: The folder.
        what: What it cannot do, e.g. 'be written to'.
        error: The system's error.
    """
    number = _number(error)
    if is_full(error):
        reason, remedy = 'no space left', 'make room or take another --output'
    else:
        reason = str(error).rsplit(': ', 1)[-1].rstrip('.') if number is None else os.strerror(number)
        remedy = 'take another --output'
    return OSError(f"'{output}' cannot {what}: {reason[:1].lower()}{reason[1:]}; {remedy}.")


def resume_command(output: str) -> str:
    return f'timm-bilinear finetune --output {shlex.quote(output)} --resume'


def stopped(output: str, saved_epochs: int, has_features: bool, overwrite: bool) -> str:
    """What is kept of a run that was stopped, and how to go on.

    Args:
        output: Its folder.
        saved_epochs: Epochs in its checkpoint.
        has_features: Whether features for its first stage are in the folder.
        overwrite: Whether it replaces a run.
    """
    if saved_epochs:
        epochs = '1 epoch is' if saved_epochs == 1 else f'{saved_epochs} epochs are'
        return f"Stopped: {epochs} kept in '{output}'; go on with `{resume_command(output)}`."
    told = f"Stopped before the first epoch was saved in '{output}'"
    if not has_features:
        return f'{told}: the same command starts anew.'
    same = 'the same command' + (' without --overwrite' if overwrite else '')
    return f'{told}: the features computed so far are kept; go on with {same}, or with DATA and --resume.'


def of_numbers(error: FloatingPointError, stage: Stage, amp_dtype: Optional[torch.dtype]) -> str:
    """What may help where numbers are no longer finite.

    Args:
        error: What was raised.
        stage: The stage of training.
        amp_dtype: Dtype of autocast, None for float32.
    """
    if isinstance(error, FeatureError):
        return '--head-cache 0 does without.'
    rates = '--head-lr' if stage.lr == 0.0 else '--lr or --head-lr'
    amp = '' if amp_dtype is None else ', or --amp float32,'
    return f'a lower {rates}{amp} may help.'
