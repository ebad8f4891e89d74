"""Settings of a fine-tuning run: names, defaults, help and bounds, for Python, the command line and the run's folder.

Imports neither torch nor timm, so that the command's help is there at once.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Tuple, Union

from .options import check_value, option, plain_value
from .recipe import Stage, default_stages

__all__ = ['FREE_ON_RESUME', 'Settings', 'Stage', 'TrainAug', 'default_stages']

AMP_DTYPES = ('auto', 'bfloat16', 'float16', 'float32')
LOG_FORMATS = ('bar', 'text', 'json')
# With these a run may be resumed, whatever it was started with: they do not change its result.
FREE_ON_RESUME = (
    'data_dir',
    'data_root',
    'download',
    'output',
    'workers',
    'device',
    'log_format',
    'tensorboard',
    'resume',
    'overwrite',
)


@dataclass
class TrainAug:
    """Augmentation of training images; the names are those of `timm.data.create_transform`."""

    scale: Optional[Tuple[float, float]] = field(
        default=(0.3, 1.0),
        metadata=option(
            'area of random crops', type=float, nargs=2, lengths=(2,), above=0, most=1, metavar=('MIN', 'MAX')
        ),
    )
    ratio: Optional[Tuple[float, float]] = field(
        default=(3 / 4, 4 / 3),
        metadata=option('aspect of random crops', type=float, nargs=2, lengths=(2,), above=0, metavar=('MIN', 'MAX')),
    )
    hflip: float = field(default=0.5, metadata=option('probability of a horizontal flip', type=float, least=0, most=1))
    vflip: float = field(default=0.0, metadata=option('probability of a vertical flip', type=float, least=0, most=1))
    color_jitter: Optional[Union[float, Tuple[float, ...]]] = field(
        default=0.4, metadata=option('strength of changes of colour', type=float, lengths=(3, 4), least=0)
    )
    auto_augment: Optional[str] = field(
        default=None, metadata=option("timm's auto augmentation, e.g. rand-m9-mstd0.5", type=str)
    )


@dataclass
class Settings:
    """Every setting of a run, as `finetune` and the command take them."""

    data_dir: Optional[str] = field(
        default=None,
        metadata=option(
            'folder with train, val and optionally test, each with a folder per class', type=str, metavar='DATA'
        ),
    )
    output: Optional[str] = field(
        default=None, metadata=option('folder for the model, its checkpoints and summary.csv', type=str, metavar='DIR')
    )
    model: str = field(default='bcnn_resnet18', metadata=option('timm model name', type=str))
    pretrained: bool = field(default=True, metadata=option('start from pretrained weights', type=bool))
    weights: Optional[str] = field(
        default=None, metadata=option('start from these weights, of any number of classes', type=str, metavar='FILE')
    )
    model_kwargs: Optional[Dict[str, Any]] = field(
        default=None, metadata=option('model arguments', type=dict, nargs='*', metavar='NAME=VALUE')
    )
    img_size: Optional[int] = field(
        default=None, metadata=option("input height and width (default: the model's)", type=int, least=1)
    )
    train_size: Optional[int] = field(
        default=None,
        metadata=option('height and width of the crops trained on (default: --img-size)', type=int, least=1),
    )
    batch_size: int = field(default=32, metadata=option('images per step', type=int, least=1))
    epochs: int = field(default=30, metadata=option('epochs with everything trained', type=int, least=1, most=100_000))
    head_epochs: int = field(
        default=30,
        metadata=option(
            'before them, with frozen streams, if those start from weights', type=int, least=0, most=100_000
        ),
    )
    stages: Optional[List[Stage]] = field(default=None, metadata=option('replaces the recipe', type=list, cli=False))
    opt: Optional[str] = field(
        default=None, metadata=option('timm optimizer (default: sgd, adamw without weights)', type=str)
    )
    lr: Optional[float] = field(
        default=None,
        metadata=option(
            'peak learning rate of the streams (default: 1e-3, adaptive optimizers 3e-4)', type=float, above=0
        ),
    )
    head_lr: Optional[Union[float, List[float]]] = field(
        default=None,
        metadata=option(
            'peak learning rate of the head, one for every stage or one for each'
            ' (default: 1 and 1e-2, adaptive optimizers 1e-2 and 3e-3)',
            type=float,
            above=0,
            nargs='+',
            lengths=(1, 2),
        ),
    )
    weight_decay: Optional[float] = field(
        default=None,
        metadata=option(
            "weight decay of the streams' weights (default: 1e-5, adaptive optimizers 0.05)", type=float, least=0
        ),
    )
    freeze: bool = field(
        default=False, metadata=option('leave the streams as they are: --head-epochs epochs of the head', type=bool)
    )
    smoothing: float = field(default=0.1, metadata=option('label smoothing', type=float, least=0, below=1))
    class_weights: bool = field(
        default=False, metadata=option('weight the loss of a class by the inverse of its share', type=bool)
    )
    patience: Optional[int] = field(
        default=None,
        metadata=option(
            'end a stage after so many epochs without a better validation result (default: never)', type=int, least=1
        ),
    )
    train_aug: Optional[Dict[str, Any]] = field(default=None, metadata=option('augmentation', type=dict, cli=False))
    amp_dtype: Optional[str] = field(
        default='auto',
        metadata=option(
            'precision of training; auto: bfloat16 where the device has it', type=str, choices=AMP_DTYPES, flag='amp'
        ),
    )
    workers: Optional[int] = field(
        default=None, metadata=option('loader processes (default: by the cores)', type=int, least=0, most=1024)
    )
    device: Optional[str] = field(
        default=None, metadata=option('cpu, cuda ... (default: a GPU if there is one)', type=str)
    )
    seed: int = field(
        default=42, metadata=option('seed of weights, order and augmentation', type=int, least=0, most=2**31 - 1)
    )
    val_fraction: Optional[float] = field(
        default=None,
        metadata=option('share of the images to validate on, if DATA has no val folder', type=float, above=0, below=1),
    )
    skip_bad: bool = field(default=False, metadata=option('go on without the images that cannot be read', type=bool))
    class_map: Optional[str] = field(
        default=None,
        metadata=option("file with the order of the classes, as timm's --class-map", type=str, metavar='FILE'),
    )
    data_root: Optional[str] = field(
        default=None, metadata=option("folder of a named data set, e.g. DATA 'torch/cifar10'", type=str, metavar='DIR')
    )
    train_split: str = field(default='train', metadata=option('training split of a named data set', type=str))
    val_split: str = field(default='validation', metadata=option('validation split of a named data set', type=str))
    test_split: Optional[str] = field(
        default=None, metadata=option('test split of a named data set (default: none)', type=str)
    )
    download: bool = field(default=False, metadata=option('download a named data set that is not there', type=bool))
    head_cache: float = field(
        default=8.0,
        metadata=option(
            'GB of features kept for the epochs with frozen streams; 0: images anew in each, augmented',
            type=float,
            least=0,
            infinite=True,
        ),
    )
    resume: bool = field(default=False, metadata=option('continue the run in --output, with its arguments', type=bool))
    overwrite: bool = field(default=False, metadata=option('delete the run in --output and start anew', type=bool))
    log_format: str = field(
        default='bar',
        metadata=option('progress bars, lines, or a JSON object in each line', type=str, choices=LOG_FORMATS),
    )
    tensorboard: bool = field(
        default=False, metadata=option('write event files for TensorBoard into --output', type=bool)
    )

    def __post_init__(self) -> None:
        self.given: FrozenSet[str] = frozenset()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> 'Settings':
        """Settings of which some are given, in values of Python, or of numpy and torch that say the same.

        Raises:
            TypeError: If a name is unknown, or a value has a wrong type.
            ValueError: If a value is out of its range.
        """
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                raise TypeError(f"There is no setting '{name}'; there are {', '.join(sorted(known))}.")
        settings = cls(**plain_value(given))
        settings.given = frozenset(given)
        if isinstance(settings.stages, tuple):
            settings.stages = list(settings.stages)
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse what is wrong by itself, before anything is read.

        Raises:
            TypeError: If a value has a wrong type.
            ValueError: If a value is out of its range, or two do not go together.
        """
        for setting in fields(self):
            check_value(setting, getattr(self, setting.name))
        for stage in self.stages or ():
            if not isinstance(stage, Stage):
                raise TypeError(f"'stages' must be a list of Stage, got {stage!r}.")
            for setting in fields(stage):
                check_value(setting, getattr(stage, setting.name))
        if self.stages is not None:
            told = [n for n in ('opt', 'lr', 'head_lr', 'weight_decay') if getattr(self, n) is not None]
            if told or self.freeze:
                raise ValueError(f"'{(told or ['freeze'])[0]}' is for the default recipe, which 'stages' replaces.")
            if not self.stages:
                raise ValueError("'stages' must have a stage, got none.")
        if self.freeze:
            for name in ('lr', 'weight_decay', 'epochs'):
                if name in self.given and getattr(self, name) is not None:
                    hint = "; 'head_epochs' says for how long the head is" if name == 'epochs' else ''
                    raise ValueError(f"'{name}' is for the streams, which 'freeze' leaves untrained{hint}.")
            if self.head_epochs == 0:
                raise ValueError("'head_epochs' must be at least 1 with 'freeze', got 0.")
        if self.resume and self.overwrite:
            raise ValueError("'resume' continues the run in the output and 'overwrite' deletes it: give one of them.")
        if not self.resume:  # where what is not given is the run's to say
            self.resolve_stages()
        self.augmentation()

    @property
    def from_weights(self) -> bool:
        return self.pretrained or self.weights is not None

    def resolve_stages(self) -> List[Stage]:
        """Stages of the run: those given, or the recipe's."""
        if self.stages is not None:
            return list(self.stages)
        rates = (self.opt, self.lr, self.head_lr, self.weight_decay)
        return default_stages(self.from_weights, self.epochs, self.head_epochs, *rates, freeze=self.freeze)

    def augmentation(self) -> Dict[str, Any]:
        """Augmentation with its defaults, as arguments of `timm.data.create_transform`.

        Raises:
            TypeError: If a name is unknown.
            ValueError: If a value is out of its range.
        """
        known = {f.name: f for f in fields(TrainAug)}
        values = {name: f.default for name, f in known.items()}
        for name, value in (self.train_aug or {}).items():
            if name not in known:
                raise TypeError(f"'train_aug' has no '{name}'; it has {', '.join(known)}.")
            check_value(known[name], value)
            values[name] = tuple(value) if isinstance(value, list) else value
        for name in ('scale', 'ratio'):
            if values[name] is not None and values[name][0] > values[name][1]:
                raise ValueError(f"'{name}' must be two numbers in ascending order, got {values[name]!r}.")
        return values

    def plain(self) -> Dict[str, Any]:
        """Settings as args.yaml holds them: numbers, texts, lists and dicts; paths are absolute.

        Raises:
            TypeError: If a model argument is none of these.
        """
        told = asdict(self)
        told['train_aug'] = self.augmentation()
        told['stages'] = [asdict(stage) for stage in self.resolve_stages()]
        for name in ('data_dir', 'data_root', 'output', 'weights', 'class_map'):
            path = told[name]
            if path is not None and (name != 'data_dir' or os.path.exists(path)):  # not the name of a data set
                told[name] = os.path.abspath(path)
        source, colon, path = self.model.partition(':')
        if colon and source == 'local-dir':
            told['model'] = f'local-dir:{os.path.abspath(path)}'
        return {name: _plain(name, value) for name, value in told.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(name, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"'{name}' must be made of numbers, texts, lists and dicts, got {value!r}.")
