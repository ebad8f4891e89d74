"""Run a script whose DistributedDataParallel is given device_ids, as timm's train script gives, on CPU processes."""

import functools
import runpy
import sys

from torch.nn.parallel import DistributedDataParallel

init = DistributedDataParallel.__init__


@functools.wraps(init)
def without_device_ids(self, module, device_ids=None, **kwargs):
    init(self, module, **kwargs)  # modules on the CPU take none


DistributedDataParallel.__init__ = without_device_ids
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
