"""Importing the package registers models, a head and ops, and changes nothing else in any library or the process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Where a registration adds an entry: tables of timm and torch, and what the entries' names have in them.
REGISTRIES = {
    'timm.models._registry.': ('bcnn', 'mpncov_', 'hbp_', 'lrbp_'),  # models
    'timm.layers._fx.': 'timm_bilinear',  # modules and functions that FX does not trace
    'torch.library.': 'timm_bilinear',  # ops
    'torch._library.': 'timm_bilinear',
    'torch.ops': 'timm_bilinear',
    'torch.jit._builtins._builtin_table': '',  # ops that were looked up, by their ids
}


@pytest.fixture(scope='module')
def changes():
    script = Path(__file__).with_name('import_changes.py')
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize('kind', ['changed', 'removed', 'settings'])
def test_nothing_is_replaced(changes, kind):
    assert changes[kind] == {}


def test_only_registrations_are_added(changes):
    for owner, names in changes['added'].items():
        part = next((part for registry, part in REGISTRIES.items() if owner.startswith(registry)), None)
        assert part is not None, f'{owner} got {names}'
        parts = (part,) if isinstance(part, str) else part
        assert all(any(each in name for each in parts) for name in names), f'{owner} got {names}'
    assert "'bcnn_resnet18'" in changes['added']['timm.models._registry._model_entrypoints']
