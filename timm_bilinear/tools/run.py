"""The folder of a fine-tuning run: who may write to it, what is in it, and how files get there whole.

All that a resumed run needs is in one file, checkpoints/last.pth.tar, which is replaced as a whole after each epoch.
The other files are derived from it, and are made anew when a run is resumed: at whatever point one is killed, what it
leaves is the state after some epoch.
"""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Set, Union

import torch
import yaml

from ..data.images import is_hidden
from ..data.scan import SPLITS, find_splits
from .lock import FolderLock
from .remedies import cannot_write

__all__ = ['FEATURES', 'TRIAL', 'RunFolder', 'best_epoch', 'check_place', 'write_whole']

_FIELDS = ('epoch', 'train_loss', 'train_top1', 'eval_loss', 'eval_top1', 'lr', 'stage')
_MODEL_FILES = ('config.json', 'model.safetensors', 'results.json', 'summary.csv', 'curves.png')
FEATURES = 'features'  # folder of what the first stage keeps
_EVENTS = 'tensorboard'
_FOLDERS = {FEATURES: 'descriptors.*', _EVENTS: 'events.out.tfevents.*'}  # names of their files
_PARTIAL = '.partial'  # end of the names of files that are being written
TRIAL = '.finetune-trial'  # folder of the save that is tried before the first epoch


def _is_unimportant(name: str) -> bool:
    """Whether a folder that holds this counts as empty: hidden files, and what file systems put into theirs."""
    return name.startswith('.') or name in ('lost+found', 'Thumbs.db', 'desktop.ini')


def _partial(path: Path) -> Path:
    """Name of a file while it is written."""
    return path.with_name(f'.{path.name}{_PARTIAL}')


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
    partial = _partial(path)
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


def check_place(output: str, data_dir: Optional[str], of_classes: bool) -> None:
    """Refuse an output within the data where it would be taken for a class, or for a part of one.

    Args:
        output: Folder of the run.
        data_dir: Folder of images, or the name of a data set.
        of_classes: Whether it may have class folders without a train folder around them.

    Raises:
        ValueError: If it lies there.
    """
    if data_dir is None or not os.path.isdir(data_dir):
        return
    folder, data = Path(output).resolve(), Path(data_dir).resolve()
    if data not in folder.parents or any(map(is_hidden, folder.relative_to(data).parts)):
        return
    splits = {name: split.resolve() for name, split in find_splits(data).items()}
    is_in_split = any(split in folder.parents for split in splits.values())
    is_split = folder.parent == data and any(folder.name.lower() in names for names in SPLITS.values())
    if is_in_split or is_split or (of_classes and 'train' not in splits):
        what = 'split' if is_split else 'class'
        raise ValueError(
            f"The output '{output}' must not lie inside the data '{data_dir}': it would be taken for a {what}."
        )


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
        OSError: If it cannot be made or written to.
        ValueError: If the checkpoint to resume from is damaged.
    """

    def __init__(self, output: Union[str, Path], resume: bool = False, overwrite: bool = False):
        self.path = Path(output)
        self.checkpoints = self.path / 'checkpoints'
        self.last = self.checkpoints / 'last.pth.tar'
        self.best = self.checkpoints / 'model_best.pth.tar'
        self.saved_epochs = 0
        self.checkpoint: Optional[Dict[str, Any]] = None
        self._best_written: Optional[int] = None
        self._to_replace = overwrite
        self._made: List[Path] = []
        self._lock: Optional[FolderLock] = None
        try:
            self._make()
            self._lock = FolderLock(self.path)
            self._look(resume, overwrite)
        except BaseException as e:
            self.close()
            if isinstance(e, OSError) and e.errno is not None:  # the system's, not a sentence of ours
                raise cannot_write(str(output), 'be written to', e) from e
            raise

    def _make(self) -> None:
        if (self.path.exists() or self.path.is_symlink()) and not self.path.is_dir():
            what = 'a file' if self.path.exists() else 'a link to nothing'
            raise FileExistsError(f"'{self.path}' is {what}, not a folder.")
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)

    def _is_cut_off(self, present: Set[str]) -> bool:
        """Whether these are the files of a run that has no checkpoint yet, and of nobody else."""
        if not present <= {'args.yaml', 'checkpoints', *_FOLDERS}:
            return False
        for folder, pattern in ((self.checkpoints, None), *((self.path / k, v) for k, v in _FOLDERS.items())):
            if not folder.is_dir():
                if folder.name in present:
                    return False
                continue
            known = set(folder.glob(pattern)) if pattern else set()
            if any(p not in known or not p.is_file() for p in folder.iterdir() if not _is_unimportant(p.name)):
                return False
        return present <= {'checkpoints'} or self._has_args()

    def _has_args(self) -> bool:
        """Whether args.yaml is that of a run of this version."""
        try:
            args = yaml.safe_load((self.path / 'args.yaml').read_text(encoding='utf-8'))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(args, dict) and {'fingerprint', 'given'} <= args.keys()

    def _look(self, resume: bool, overwrite: bool) -> None:
        """Find out what is there, and whether that is what is expected."""
        present = {p.name for p in self.path.iterdir() if not _is_unimportant(p.name)}
        has_run = self.last.is_file()
        if (overwrite and has_run) or self._is_cut_off(present):
            return
        if resume and has_run:
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
        for folder in self.path.glob('.partial-[0-9]*'):  # of save_model
            shutil.rmtree(folder, ignore_errors=True)
        for path in (*(self.path / name for name in ('args.yaml', *_MODEL_FILES)), self.best, self.last):
            _partial(path).unlink(missing_ok=True)

    def start(self, args: Dict[str, Any]) -> None:
        """Begin a new run: what an old one left goes, and its arguments are written.

        Features of one that was cut off stay, unless it is to be overwritten: they say what they are of. The old
        checkpoint goes last: a run that is removed in part is a run still.
        """
        if self._has_args() or self.last.is_file():
            self._remove_partial()
            self._remove_files(_EVENTS)
        if self._to_replace and self.last.is_file():
            for path in (*(self.path / name for name in _MODEL_FILES), self.best):
                path.unlink(missing_ok=True)
        if self._to_replace:
            self.remove_features()
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

    @property
    def has_features(self) -> bool:
        """Whether features are kept that a run can go on with."""
        return any((self.path / FEATURES).glob('descriptors.*.json'))

    def remove_features(self) -> None:
        self._remove_files(FEATURES)

    def _remove_files(self, name: str) -> None:
        """Remove the files that a run writes into one of its folders, and the folder if nothing else is in it."""
        for path in (self.path / name).glob(_FOLDERS[name]):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.path / name).rmdir()

    def _remove_made(self) -> None:
        """Leave no folder that was made for nothing."""
        for path in self._made:
            try:
                path.rmdir()
            except FileNotFoundError:  # it could not be made
                continue
            except OSError:  # something is in it
                return

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            shutil.rmtree(self.path / TRIAL, ignore_errors=True)
            self._lock.release()
        self._remove_made()

    def __enter__(self) -> 'RunFolder':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
