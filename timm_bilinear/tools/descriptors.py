"""What is kept of many images, in a file: descriptors or feature maps, in half precision, gone on with after a cut."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from torch import nn

__all__ = ['DescriptorFile', 'descriptor_key']


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
        is_whole = self.file.is_file() and self.file.stat().st_size == size
        if is_whole and self.progress.is_file():
            content = json.loads(self.progress.read_text())
            self.done = content['done'] if content['key'] == key else {}
        if not is_whole:
            with self.file.open('ab') as f:  # which several processes may do
                f.truncate(size)
        self.rows = np.memmap(self.file, np.float16, 'r+', shape=shape)

    def write(self, start: int, values: torch.Tensor):
        """Write (n, D) descriptors into the rows from `start`.

        Raises:
            FloatingPointError: If one is not finite in half precision.
        """
        stored = values.half()
        if not stored.isfinite().all():
            raise FloatingPointError('features are not finite')
        self.rows[start : start + len(values)] = stored.cpu().numpy()

    def save_progress(self):
        """See what is written to the disk, and only then say so."""
        self.rows.flush()
        partial = self.progress.with_suffix('.partial')
        partial.write_text(json.dumps(dict(key=self.key, done=self.done)))
        os.replace(partial, self.progress)

    def read(self, rows: Any, columns: slice = slice(None)) -> torch.Tensor:
        """Float32 descriptors of the rows, in the order given."""
        return torch.from_numpy(np.ascontiguousarray(self.rows[rows, columns])).float()

    def remove(self):
        """Remove the files, and the folder if nothing else is in it."""
        self.rows = None
        folder = self.file.parent
        for path in (self.file, *folder.glob('descriptors.*')):
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
