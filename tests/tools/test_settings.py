"""Settings: one source of names, defaults, types and bounds."""

import enum
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import timm_bilinear
from timm_bilinear.tools.settings import Settings, Stage, TrainAug, default_stages

STAGE = Stage(1, 'sgd', 1e-3, 1e-2, 0.0)


@pytest.mark.parametrize(
    'given, error, message',
    [
        (dict(epochs=0), ValueError, "'epochs' must be at least 1"),
        (dict(epochs=1.5), TypeError, "'epochs' must be a whole number"),
        (dict(epochs=True), TypeError, "'epochs'"),
        (dict(epochs='3'), TypeError, "'epochs'"),
        (dict(head_epochs=-1), ValueError, "'head_epochs' must be at least 0"),
        (dict(batch_size=0), ValueError, "'batch_size'"),
        (dict(img_size=0), ValueError, "'img_size'"),
        (dict(train_size=-32), ValueError, "'train_size'"),
        (dict(lr=0.0), ValueError, "'lr' must be above 0"),
        (dict(lr=float('nan')), ValueError, "'lr'"),
        (dict(lr=float('inf')), ValueError, "'lr'"),
        (dict(head_lr=-1), ValueError, "'head_lr'"),
        (dict(head_lr=[1, 0.1, 0.1]), ValueError, "'head_lr' must be 1 or 2 numbers"),
        (dict(head_lr=[]), ValueError, "'head_lr'"),
        (dict(weight_decay=-0.1), ValueError, "'weight_decay'"),
        (dict(smoothing=1.0), ValueError, "'smoothing' must be at least 0 and below 1"),
        (dict(patience=0), ValueError, "'patience'"),
        (dict(workers=-1), ValueError, "'workers'"),
        (dict(seed=-1), ValueError, "'seed'"),
        (dict(seed=2**40), ValueError, "'seed'"),
        (dict(val_fraction=0), ValueError, "'val_fraction'"),
        (dict(val_fraction=1.0), ValueError, "'val_fraction'"),
        (dict(head_cache=-1), ValueError, "'head_cache'"),
        (dict(amp_dtype='half'), ValueError, "'amp_dtype' must be one of auto"),
        (dict(log_format='xml'), ValueError, "'log_format' must be one of bar"),
        (dict(model=None), TypeError, "'model' must be a text"),
        (dict(model_kwargs='foo'), TypeError, "'model_kwargs' must be a dict"),
        (dict(pretrained=1), TypeError, "'pretrained' must be True or False"),
        (dict(train_aug=dict(scale=0.5)), TypeError, "'scale' must be two numbers"),
        (dict(train_aug=dict(scale=(1.0, 0.5))), ValueError, "'scale'.*ascending"),
        (dict(train_aug=dict(scale=(0.5, 2.0))), ValueError, "'scale' must be above 0 and at most 1"),
        (dict(train_aug=dict(hflip=2)), ValueError, "'hflip'"),
        (dict(train_aug=dict(hflip=None)), TypeError, "'hflip' must be a number, got None"),
        (dict(train_aug=dict(vflip=None)), TypeError, "'vflip'"),
        (dict(head_cache=float('nan')), ValueError, "'head_cache' must be at least 0"),
        (dict(head_cache=float('-inf')), ValueError, "'head_cache'"),
        (dict(train_aug=dict(vflip=float('inf'))), ValueError, "'vflip'"),
        (dict(output=''), ValueError, "'output' must not be empty"),
        (dict(data_dir=''), ValueError, "'data_dir' must not be empty"),
        (dict(weights=''), ValueError, "'weights' must not be empty"),
        (dict(model=''), ValueError, "'model' must not be empty"),
        (dict(data_root=b''), ValueError, "'data_root' must not be empty"),
        (dict(output=3), TypeError, "'output' must be a text"),
        (dict(epochs=np.float64(1.5)), TypeError, "'epochs' must be a whole number"),
        (dict(epochs=np.bool_(True)), TypeError, "'epochs'"),
        (dict(lr=np.float32('nan')), ValueError, "'lr'"),
        (dict(head_lr=np.ones(3)), ValueError, "'head_lr' must be 1 or 2 numbers"),
        (dict(amp_dtype=torch.int8), ValueError, "'amp_dtype' must be one of auto.*'int8'"),
        (dict(stages=()), ValueError, "'stages'"),
        (dict(train_aug=dict(cutout=1)), TypeError, "no 'cutout'"),
        (dict(learning_rate=1), TypeError, "no setting 'learning_rate'"),
        (dict(resume=True, overwrite=True), ValueError, "'resume'.*'overwrite'"),
        (dict(freeze=True, epochs=3), ValueError, "'epochs'.*'freeze'.*'head_epochs'"),
        (dict(freeze=True, lr=0.1), ValueError, "'lr'.*'freeze'"),
        (dict(freeze=True, head_epochs=0), ValueError, "'head_epochs'"),
        (dict(stages=[]), ValueError, "'stages'"),
        (dict(stages=[STAGE], lr=0.1), ValueError, "'lr'.*'stages'"),
        (dict(stages=[STAGE], freeze=True), ValueError, "'freeze'.*'stages'"),
        (dict(stages=[dict(epochs=1)]), TypeError, "'stages' must be a list of Stage"),
        (dict(stages=[Stage(0, 'sgd', 0.1, 0.1, 0.0)]), ValueError, "'epochs'"),
        (dict(stages=[Stage(1, 'sgd', 0.1, float('nan'), 0.0)]), ValueError, "'head_lr'"),
    ],
)
def test_refused_by_name(given, error, message):
    with pytest.raises(error, match=message) as e:
        Settings.of(given)
    assert '\n' not in str(e.value)


def test_defaults_are_within_their_own_bounds():
    Settings.of({})
    for setting in (*fields(Settings), *fields(TrainAug)):
        assert setting.metadata['help'] and setting.metadata['type']


def test_none_is_float32_and_paths_are_texts():
    settings = Settings.of(dict(amp_dtype=None, data_dir=Path('a') / 'b', output=Path('c')))
    assert settings.amp_dtype is None and settings.data_dir == str(Path('a') / 'b') and settings.output == 'c'


class Word(str, enum.Enum):
    SGD = 'sgd'


@pytest.mark.parametrize(
    'name, value, plain',
    [
        ('epochs', np.int64(3), 3),
        ('lr', np.float32(0.5), 0.5),
        ('lr', np.array(0.5), 0.5),
        ('lr', torch.tensor(0.5), 0.5),
        ('head_lr', np.array([1.0, 0.5]), [1.0, 0.5]),
        ('head_lr', (np.float64(1.0), 0.5), [1.0, 0.5]),
        ('freeze', np.bool_(False), False),
        ('model', np.str_('bcnn'), 'bcnn'),
        ('opt', Word.SGD, 'sgd'),
        ('amp_dtype', torch.bfloat16, 'bfloat16'),
        ('amp_dtype', torch.float32, 'float32'),
        ('device', torch.device('cpu'), 'cpu'),
        ('device', torch.device('cuda', 1), 'cuda:1'),
        ('class_map', Path('/a') / 'b', '/a/b'),
        ('weights', '/a/ü'.encode(), '/a/ü'),
        ('head_cache', math.inf, math.inf),
        ('model_kwargs', {np.str_('a'): (np.int64(1), [Path('/b')]), 'c': dict(d=np.arange(2))}, None),
        ('train_aug', dict(scale=np.array([0.5, 1.0]), hflip=np.float64(0.25), vflip=np.int8(0)), None),
        ('stages', (Stage(np.int64(1), np.str_('sgd'), np.float32(0), np.float64(1), 0),), None),
    ],
)
def test_values_that_say_the_same(name, value, plain):
    """All of Python's own types, as YAML and checkpoints hold them, wherever they stand."""
    told = Settings.of({name: value}).plain()[name]
    if name == 'model_kwargs':
        plain = dict(a=[1, ['/b']], c=dict(d=[0, 1]))
    elif name == 'train_aug':
        plain = dict(told, scale=[0.5, 1.0], hflip=0.25, vflip=0)
    elif name == 'stages':
        plain = [dict(epochs=1, opt='sgd', lr=0.0, head_lr=1.0, weight_decay=0)]
    assert told == plain and type(told) is type(plain)
    assert yaml.safe_load(yaml.safe_dump(told)) == plain


def test_default_recipe():
    assert [stage.lr > 0 for stage in default_stages(True, 3, 2)] == [False, True]
    assert [stage.epochs for stage in default_stages(True, 3, 2)] == [2, 3]
    assert len(default_stages(False, 3, 2)) == 1
    assert len(default_stages(True, 3, 0)) == 1
    assert default_stages(True, 3, 2, freeze=True) == default_stages(True, 3, 2)[:1]


def test_options_replace_what_they_name():
    plain = default_stages(True, 3, 2)
    first, second = default_stages(True, 3, 2, lr=0.5, weight_decay=0.25)
    assert first == plain[0] and (second.lr, second.weight_decay, second.head_lr) == (0.5, 0.25, plain[1].head_lr)
    assert [s.head_lr for s in default_stages(True, 3, 2, head_lr=0.7)] == [0.7, 0.7]
    assert [s.head_lr for s in default_stages(True, 3, 2, head_lr=[0.7, 0.1])] == [0.7, 0.1]
    assert [s.head_lr for s in default_stages(False, 3, 2, head_lr=[0.7])] == [0.7]
    with pytest.raises(ValueError, match=r"'head_lr'.*1 stages"):
        default_stages(False, 3, 2, head_lr=[0.7, 0.1])


@pytest.mark.parametrize('from_weights', [True, False])
def test_another_optimizer_has_rates_of_its_own(from_weights):
    """The paper's rate of 1 for the classifier is one of SGD: Adam would take steps of that length."""
    for stage in default_stages(from_weights, 3, 2, opt='adamw'):
        assert stage.opt == 'adamw' and stage.head_lr <= 0.01 and stage.lr <= 0.001
    assert any(stage.head_lr >= 0.5 for stage in default_stages(from_weights, 3, 2, opt='sgd'))


def test_plain_settings_are_yaml():
    given = dict(data_dir='d', output='o', stages=[STAGE], model_kwargs=dict(backbone_args=dict(a=(1, 2))))
    plain = Settings.of(given).plain()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain['stages'] == [vars(STAGE)] and plain['train_aug']['scale'] == [0.3, 1.0]
    assert Path(plain['output']).is_absolute()
    with pytest.raises(TypeError, match="'model_kwargs' must be made of"):
        Settings.of(dict(model_kwargs=dict(x=object()))).plain()


def test_read_without_torch_and_timm():
    """The command's help is made of settings alone; what the package itself imports does not count here."""
    code = (
        'import sys, types\n'
        f'for name, path in (("timm_bilinear", {str(Path(timm_bilinear.__file__).parent)!r}),\n'
        f'                   ("timm_bilinear.tools", {str(Path(timm_bilinear.__file__).parent / "tools")!r})):\n'
        '    sys.modules[name] = types.ModuleType(name)\n'
        '    sys.modules[name].__path__ = [path]\n'
        'import timm_bilinear.tools.settings as s\n'
        'print(s.Settings().model, "torch" in sys.modules, "timm" in sys.modules, "numpy" in sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['bcnn_resnet18', 'False', 'False', 'False']
