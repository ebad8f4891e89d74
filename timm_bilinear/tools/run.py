"""The folder of a fine-tuning run: who may write to it, what is in it, and how files get there whole.

All that a resumed run needs is in one file, checkpoints/last.pth.tar, which is replaced as a whole after each epoch.
The other files are derived from it, and are made anew when a run is resumed: at whatever point one is killed, what it
leaves is the state after some epoch.
"""

import csv
import io
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Union

import torch
import yaml

from .lock import FolderLock

__all__ = ['FEATURES', 'TRIAL', 'RunFolder', 'best_epoch', 'write_whole']

_FIELDS = ('epoch', 'train_loss', 'train_top1', 'eval_loss', 'eval_top1', 'lr', 'stage')
_MODEL_FILES = ('config.json', 'model.safetensors', 'results.json', 'summary.csv', 'curves.png')
FEATURES = 'features'  # folder of what the first stage keeps
_FOLDERS = ('tensorboard', FEATURES)
_PARTIAL = '.partial'  # end of the names of files that are being written
TRIAL = '.trial'  # folder of the save that is tried before the first epoch


def _is_unimportant(name: str) -> bool:
    """Whether a folder that holds this counts as empty: hidden files, and what file systems put into theirs."""
    return name.startswith('.') or name in ('lost+found', 'Thumbs.db', 'desktop.ini')


def _sync_folder(folder: Path) -> None:
    """See a new name to the disk, where folders can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # not every file system does that
        pass
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name, see it to the disk, then give it its name: it is the old one or the new one.

    Raises:
        OSError: If it cannot be written; the message names it, and the old one is left.
    """
    partial = path.with_name(f'.{path.name}{_PARTIAL}')
    try:
        try:
            with partial.open('wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as e:  # torch's writer has an error of its own for a full disk
        reason = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).splitlines()[0]
        if isinstance(e.__context__, OSError) and e.__context__.strerror:
            reason = e.__context__.strerror
        raise OSError(f"Cannot write '{path}': {reason}.") from e


def best_epoch(history: List[Dict[str, Any]]) -> int:
    """Index of the best row: highest validation accuracy, of equal ones the lowest loss, of equal ones the first."""

    def key(index: int):
        row = history[index]
        is_number = row['eval_loss'] == row['eval_loss']
        return (row['eval_top1'], is_number, -row['eval_loss'] if is_number else 0.0, -index)

    return max(range(len(history)), key=key)


class RunFolder:
    """Folder of a run, locked while it is open.

    Args:
        output: The folder; made if it is not there.
        resume: A run that is there is to be continued.
        overwrite: A run that is there is to be replaced.

    Raises:
        FileExistsError: If it holds something and neither `resume` nor `overwrite` is set, or it is no folder.
        FileNotFoundError: If it holds no run to resume, but other files.
        RuntimeError: If another process writes to it.
        OSError: If it cannot be made.
        ValueError: If the checkpoint to resume from is damaged.
    """

    def __init__(self, output: Union[str, Path], resume: bool = False, overwrite: bool = False):
        self.path = Path(output)
        self.checkpoints = self.path / 'checkpoints'
        self.last = self.checkpoints / 'last.pth.tar'
        self.best = self.checkpoints / 'model_best.pth.tar'
        if (self.path.exists() or self.path.is_symlink()) and not self.path.is_dir():
            what = 'a file' if self.path.exists() else 'a link to nothing'
            raise FileExistsError(f"'{self.path}' is {what}, not a folder.")
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self.saved_epochs = 0
        self.checkpoint: Optional[Dict[str, Any]] = None
        self._best_written: Optional[int] = None
        self._to_replace = False
        try:
            self._lock = FolderLock(self.path)
        except BaseException:
            self._remove_made()
            raise
        try:
            self._look(resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _look(self, resume: bool, overwrite: bool) -> None:
        """Find out what is there, and whether that is what is expected."""
        present = {p.name for p in self.path.iterdir() if not _is_unimportant(p.name)}
        has_run = self.last.is_file()
        files = {p.name for p in self.checkpoints.iterdir()} if self.checkpoints.is_dir() else set()
        # a run that was cut off before its first checkpoint: there is nothing to lose, and nothing to continue
        files = {name for name in files if not _is_unimportant(name)} - {'tmp.pth.tar'}
        is_new = not files and present <= {'args.yaml', 'checkpoints', *_FOLDERS}
        if is_new or (overwrite and has_run):
            self._to_replace = True
        elif resume and has_run:
            self.checkpoint = self._read()
            self.saved_epochs = len(self.checkpoint['history'])
            self._remove_partial()
        elif resume:
            raise FileNotFoundError(f"'{self.path}' has no run to resume: there is no '{self.last}', but other files.")
        elif overwrite:
            raise FileExistsError(f"'{self.path}' holds files and no run that could be overwritten.")
        elif has_run:
            raise FileExistsError(
                f"'{self.path}' is not empty but has a run: --resume continues it, --overwrite replaces it."
            )
        else:
            raise FileExistsError(f"'{self.path}' is not empty; take another folder.")

    def _read(self) -> Dict[str, Any]:
        hint = 'it cannot be resumed; overwrite starts anew'
        try:
            checkpoint = torch.load(self.last, map_location='cpu', weights_only=True)
        except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as e:
            if isinstance(e, pickle.UnpicklingError) and 'Namespace' in str(e):
                raise ValueError(f"'{self.last}' was written by an older version: {hint}.") from e
            reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
            raise ValueError(f"'{self.last}' is damaged ({reason}): {hint}.") from e
        if not isinstance(checkpoint, dict) or not {'history', 'args', 'state_dict', 'best'} <= checkpoint.keys():
            raise ValueError(f"'{self.last}' is no checkpoint of this version of finetune: {hint}.")
        return checkpoint

    def _remove_partial(self) -> None:
        for folder in (self.path / TRIAL, *self.path.glob('.partial-*')):  # the latter of save_model
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(f'.*{_PARTIAL}'):
                path.unlink(missing_ok=True)

    def start(self, args: Dict[str, Any]) -> None:
        """Begin a new run: what an old one left goes, and its arguments are written.

        The old checkpoint goes last: a run that is removed in part is a run still.
        """
        if self._to_replace:
            self._remove_partial()
            for path in (*(self.path / name for name in _MODEL_FILES), self.best, self.checkpoints / 'tmp.pth.tar'):
                path.unlink(missing_ok=True)
            for name in _FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
            self.last.unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self._write_args(args)
        self._made = []

    def restore(self, checkpoint: Dict[str, Any]) -> None:
        """Make anew what is derived from the checkpoint of a run that goes on."""
        if not (self.path / 'args.yaml').is_file():
            self._write_args(checkpoint['args'])
        self.derive(checkpoint, anew=True)

    def _write_args(self, args: Dict[str, Any]) -> None:
        text = yaml.safe_dump(args, sort_keys=False, allow_unicode=True)
        write_whole(self.path / 'args.yaml', lambda f: f.write(text.encode()))

    def save(self, checkpoint: Dict[str, Any]) -> None:
        """Save the state after an epoch, then what is derived from it."""
        self.checkpoints.mkdir(exist_ok=True)
        write_whole(self.last, lambda f: torch.save(checkpoint, f))
        self.saved_epochs = len(checkpoint['history'])
        self.derive(checkpoint)

    def derive(self, checkpoint: Dict[str, Any], anew: bool = False) -> None:
        """Write the best checkpoint, if it is another one than before, and summary.csv.

        Args:
            checkpoint: What last.pth.tar holds.
            anew: Whatever is there may be of another epoch.
        """
        best = checkpoint['best']
        if anew or self._best_written != best['epoch']:
            content = {k: v for k, v in checkpoint.items() if k not in ('optimizer', 'best')}
            content.update(epoch=best['epoch'], history=checkpoint['history'][: best['epoch'] + 1])
            if best['state_dict'] is not None:
                content['state_dict'] = best['state_dict']
            content['best'] = dict(best, state_dict=None)
            write_whole(self.best, lambda f: torch.save(content, f))
            self._best_written = best['epoch']
        text = io.StringIO()
        writer = csv.DictWriter(text, _FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(checkpoint['history'])
        write_whole(self.path / 'summary.csv', lambda f: f.write(text.getvalue().encode()))

    def write_curves(self, history: List[Dict[str, Any]]) -> None:
        from .curves import draw_curves

        image = draw_curves(history, best_epoch(history))
        write_whole(self.path / 'curves.png', lambda f: image.save(f, format='PNG'))

    def write_results(self, metrics: Dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        text = json.dumps(finite) + '\n'  # JSON has no nan
        write_whole(self.path / 'results.json', lambda f: f.write(text.encode()))

    def remove_features(self) -> None:
        shutil.rmtree(self.path / FEATURES, ignore_errors=True)

    def _remove_made(self) -> None:
        """Leave no folder that was made for nothing."""
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # something is in it
                return

    def close(self) -> None:
        """Let others write to the folder."""
        shutil.rmtree(self.path / TRIAL, ignore_errors=True)
        self._lock.release()
        self._remove_made()

    def __enter__(self) -> 'RunFolder':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
