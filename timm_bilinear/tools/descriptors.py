"""What is kept of many images, in a file: descriptors or feature maps, in half precision, gone on with after a cut."""

import hashlib
import inspect
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import nn

__all__ = ['DescriptorFile', 'FeatureError', 'descriptor_key']


# Arguments of layers that change nothing of what a trained model computes, or only its classifier.
_WITHOUT_EFFECT = frozenset(
    'num_classes drop_rate drop_path_rate drop_prob momentum inplace fix_init freeze_backbone'.split()
)
_PASSING_ON = ('Identity', 'Drop')  # starts of the classes that do nothing in eval mode


class FeatureError(FloatingPointError):
    """Features of an image cannot be kept."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _architecture(net: nn.Module, trained_prefix: str) -> Iterator[Tuple[Any, ...]]:
    """Each layer with its class and the arguments that it keeps: what the weights do not tell, such as a pooling.

    Not its repr, in which torch's versions differ, nor the arguments the model was made with, which leave out defaults.
    """
    for name, module in net.named_modules():
        kind = type(module).__name__
        if f'{name}.'.startswith(trained_prefix) or kind.startswith(_PASSING_ON):
            continue
        # and what a bilinear CNN has made of the levels that it was to take
        names = {*inspect.signature(type(module).__init__).parameters, 'levels', 'pooled_maps'} - _WITHOUT_EFFECT
        kept = {k: vars(module)[k] for k in sorted(names & vars(module).keys()) if _is_plain(vars(module)[k])}
        yield name, kind, kept


def descriptor_key(
    net: nn.Module,
    trained_prefix: str,
    data_config: Dict[str, Any],
    fingerprint: str,
    amp_dtype: Optional[torch.dtype],
) -> str:
    """Hash of all that is kept depends on: the model but for what is trained, preprocessing, images, dtype."""
    settings = (
        trained_prefix,
        list(_architecture(net, trained_prefix)),
        fingerprint,
        sorted((key, str(value)) for key, value in data_config.items()),
        str(amp_dtype),
    )
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in net.state_dict().items():
        if not name.startswith(trained_prefix):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class DescriptorFile:
    """Rows of descriptors in a file, with a small file beside it for each process that says how many it has written.

    Args:
        folder: Folder of the files.
        shape: Rows and columns.
        key: Hash of what the descriptors are made of; those of another are computed anew.
        rank: The process, which has its own share of the rows.
    """

    def __init__(self, folder: Path, shape: Tuple[int, int], key: str, rank: int = 0):
        self.file, self.progress = folder / 'descriptors.bin', folder / f'descriptors.{rank}.json'
        self.key = key
        self.done: Dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        size = 2 * math.prod(shape)
        if self.file.is_file() and self.file.stat().st_size == size:
            self.done = self._read_progress()
        with self.file.open('ab') as f:
            f.truncate(size)
        # written by calls, since a disk that fills up under mapped memory kills the process
        self._writer = self.file.open('r+b', buffering=0)
        self.rows = np.memmap(self.file, np.float16, 'r', shape=shape)

    def _read_progress(self) -> Dict[str, int]:
        """Rows that are there of what the key stands for; none if the file that says so is not whole."""
        try:
            content = json.loads(self.progress.read_text())
            return {split: int(done) for split, done in content['done'].items()} if content['key'] == self.key else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def write(self, start: int, values: torch.Tensor):
        """Write (n, D) descriptors into the rows from `start`.

        Raises:
            FeatureError: If one is not finite in half precision.
            OSError: If the disk is full.
        """
        stored = values.half()
        if not stored.isfinite().all():
            raise FeatureError('features are not finite in half precision')
        data = memoryview(stored.cpu().contiguous().numpy()).cast('B')
        try:
            self._writer.seek(start * self.rows.strides[0])
            while data:  # a signal may cut a call short
                data = data[self._writer.write(data) :]
        except OSError as e:
            raise OSError(f"Cannot write '{self.file}': {e.strerror}; make room, or use --head-cache 0.") from e

    def save_progress(self):
        """See what is written to the disk, and only then say so."""
        os.fsync(self._writer.fileno())
        partial = self.progress.with_suffix('.partial')
        with partial.open('w') as f:
            json.dump(dict(key=self.key, done=self.done), f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, self.progress)

    def read(self, rows: Any, columns: slice = slice(None)) -> torch.Tensor:
        """Float32 descriptors of the rows, in the order given."""
        return torch.from_numpy(np.array(self.rows[rows, columns])).float()

    def close(self):
        """Let go of the file."""
        self._writer.close()
        self.rows = None

    def remove(self):
        """Remove the files, and the folder if nothing else is in it."""
        self.close()
        folder = self.file.parent
        for path in (self.file, *folder.glob('descriptors.*')):
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
