"""What a run prints: progress bars, lines for log files, or a JSON object in each line; and TensorBoard's events."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator

from tqdm import tqdm

__all__ = ['RunLog', 'check_tensorboard', 'format_seconds']

_SECONDS = 30  # between the lines of an epoch
_FIGURES = dict(loss='{:.3f}', top1='{:.1f}')


def format_seconds(seconds: float) -> str:
    """Seconds in words of two digits or so: '48 s', '12 min', '3.4 h'."""
    if seconds < 1:
        return 'less than 1 s'
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 90 * 60 else f'{seconds / 3600:.1f} h'


def check_tensorboard() -> None:
    """Check that events can be written.

    Raises:
        RuntimeError: If the package is missing.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as e:
        raise RuntimeError("'tensorboard' takes the package of that name: pip install tensorboard.") from e


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Prints of a run, to standard output; bars go to standard error.

    Args:
        log_format: 'bar', 'text' or 'json'; without a terminal there are no bars, but the lines of 'text'.
        is_quiet: Print nothing, as all processes but the first.
    """

    def __init__(self, log_format: str = 'bar', is_quiet: bool = False):
        self.log_format = log_format
        self.is_quiet = is_quiet
        self._writer: Any = None

    @property
    def has_bars(self) -> bool:
        return self.log_format == 'bar' and not self.is_quiet and sys.stderr.isatty()

    def say(self, event: str, text: str, **facts: Any) -> None:
        """Print a line.

        Args:
            event: What it is of, in JSON.
            text: The line for people.
            **facts: The same for machines.
        """
        if self.is_quiet:
            return
        try:
            if self.log_format == 'json':
                line = json.dumps(dict(event=event, **_finite(facts)) if facts else dict(event=event, text=text))
                print(line, flush=True)
            elif self.has_bars:
                tqdm.write(text)
                sys.stdout.flush()
            else:
                print(text, flush=True)
        except BrokenPipeError:  # who reads has seen enough, as `head` has: the run goes on
            self.is_quiet = True

    def steps(self, loader: Iterable[Any], total: int, desc: str, figures: Dict[str, float]) -> Iterator[Any]:
        """The batches of a loader, with progress.

        Args:
            loader: The loader.
            total: Number of its batches.
            desc: What they are of.
            figures: Shown as they are at the time: 'loss' and 'top1', filled by the caller.
        """
        if self.has_bars:
            with tqdm(loader, total=total, desc=desc, unit='batch', leave=False) as bar:
                for batch in bar:
                    yield batch
                    bar.set_postfix({k: _FIGURES.get(k, '{}').format(v) for k, v in figures.items()}, refresh=False)
            return
        start = shown = time.monotonic()
        for step, batch in enumerate(loader, 1):
            yield batch
            now = time.monotonic()
            if now - shown > _SECONDS and step < total:
                shown, left = now, (now - start) / step * (total - step)
                told = ''.join(f', {k} {_FIGURES.get(k, "{}").format(v)}' for k, v in figures.items())
                text = f'{desc}: {step}/{total} batches{told}, {format_seconds(left)} left'
                self.say('progress', text, desc=desc, step=step, steps=total, seconds_left=round(left, 1), **figures)

    def open_tensorboard(self, folder: Path, epochs: int) -> None:
        """Write event files from now on.

        Args:
            folder: Folder for them.
            epochs: Epochs that are there already; later ones, of a run that was cut off, are dropped.
        """
        if not self.is_quiet:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=epochs)

    def write_epoch(self, row: Dict[str, Any]) -> None:
        """Write the figures of an epoch to TensorBoard, if that is asked for."""
        if self._writer is None:
            return
        for key, value in row.items():
            if key not in ('epoch', 'stage'):
                self._writer.add_scalar(key.replace('_', '/', 1), value, row['epoch'])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
