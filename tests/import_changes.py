"""Prints, as JSON, what importing timm_bilinear changes in this process. Run by test_import.py, in a fresh one."""

import builtins
import json
import locale
import logging
import os
import random
import signal
import sys
import types
import warnings

import huggingface_hub
import numpy
import PIL.Image
import safetensors.torch
import timm
import torch
import torchvision

LIBRARIES = ('timm', 'torch', 'torchvision', 'huggingface_hub', 'safetensors', 'numpy', 'PIL', 'yaml', 'tqdm')
KEPT = []  # so that no id is given twice


def identity(value):
    KEPT.append(value)
    return id(value)


def label(entry) -> str:
    """Name of an entry of a container, with its module if it has one."""
    if isinstance(entry, (type, types.FunctionType)):
        return f'{entry.__module__}.{entry.__qualname__}'
    return repr(entry)[:200]


def contents(value) -> dict:
    """Entries of a module, class or container."""
    if isinstance(value, (types.ModuleType, type)):
        return {name: identity(entry) for name, entry in list(vars(value).items())}
    if isinstance(value, dict):
        return {label(key): identity(entry) for key, entry in list(value.items())}
    if isinstance(value, (list, tuple, set, frozenset)):
        return {label(entry): True for entry in list(value)}
    return {}


def libraries() -> dict:
    """Every attribute of every loaded module, and one level deep those of classes and containers among them."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] not in LIBRARIES or not isinstance(module, types.ModuleType):
            continue
        found[name] = contents(module)
        for attribute, value in list(vars(module).items()):
            if isinstance(value, (type, dict, list, set)) and attribute not in ('__builtins__', '__warningregistry__'):
                found[f'{name}.{attribute}'] = contents(value)
    found['builtins'] = contents(builtins)
    return found


def settings() -> dict:
    """What a process has one of."""
    loggers = {name: log for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    values = {f'logger {name}': (log.level, repr(log.handlers), log.disabled) for name, log in loggers.items()}
    values.update({f'environ {name}': value for name, value in os.environ.items()})
    values.update(
        cwd=os.getcwd(),
        path=list(sys.path),
        hooks=[repr(hook) for hook in (sys.excepthook, sys.displayhook, sys.meta_path, sys.path_hooks, sys.stdout)],
        recursion=sys.getrecursionlimit(),
        warnings=[repr(entry) for entry in warnings.filters],
        showwarning=repr(warnings.showwarning),
        root=(logging.root.level, repr(logging.root.handlers), logging.root.manager.disable),
        signals={int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        locale=locale.setlocale(locale.LC_ALL),
        random=hash(random.getstate()),
        numpy_random=repr(numpy.random.get_state()),
        numpy_errors=numpy.geterr(),
        torch_random=torch.get_rng_state().sum().item(),
        torch=[
            str(torch.get_default_dtype()),
            str(torch.get_default_device()),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_anomaly_enabled(),
            torch.multiprocessing.get_start_method(allow_none=True),
            torch.multiprocessing.get_sharing_strategy(),
        ],
        backends=[
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            torch.backends.mkldnn.enabled,
        ],
        layer_config=[timm.layers.is_scriptable(), timm.layers.is_exportable(), timm.layers.is_no_jit()],
        pixels=PIL.Image.MAX_IMAGE_PIXELS,
        endpoint=huggingface_hub.constants.ENDPOINT,
        image_backend=torchvision.get_image_backend(),
        safetensors=safetensors.__version__,
    )
    return json.loads(json.dumps(values))


def main():
    before, settings_before = libraries(), settings()
    import timm_bilinear  # noqa: F401

    after, settings_after = libraries(), settings()
    changes = {'added': {}, 'changed': {}, 'removed': {}, 'settings': {}}
    for owner, entries in before.items():
        now = after[owner]
        for kind, names in (
            ('removed', set(entries) - set(now)),
            ('added', {n for n in set(now) - set(entries) if f'{owner}.{n}' not in sys.modules}),  # but for submodules
            ('changed', {n for n in set(entries) & set(now) if entries[n] != now[n]}),
        ):
            if names:
                changes[kind][owner] = sorted(names)
    names = {*settings_before, *(name for name in settings_after if name.startswith('environ '))}
    for name in sorted(names):  # a logger of the package's own is no change
        if settings_before.get(name) != settings_after.get(name):
            changes['settings'][name] = [settings_before.get(name), settings_after.get(name)]
    print(json.dumps(changes))


if __name__ == '__main__':
    main()
