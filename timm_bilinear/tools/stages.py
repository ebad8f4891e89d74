"""Which way a stage is trained: on images in every epoch, or on features of them that are computed once."""

from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

from torch import nn

from ..data.folder import ImageData
from .frozen import FrozenStage
from .frozen_stages import create_frozen_stage, no_cache_reason
from .progress import RunLog
from .recipe import Stage
from .run import FEATURES
from .settings import Settings
from .training import ImageStage

__all__ = ['create_stage', 'describe_stage', 'is_frozen']

# Augmentation that features which are computed once have nothing of.
_LOST = ('scale', 'ratio', 'color_jitter', 'vflip', 'auto_augment')


def is_frozen(stage: Stage) -> bool:
    return stage.lr == 0.0


def _asked(settings: Settings) -> List[str]:
    """What was given for images that are augmented."""
    names = [name for name in _LOST if (settings.train_aug or {}).get(name)]
    return names + ['train_size'] * (settings.train_size is not None)


def create_stage(
    settings: Settings,
    stage: Stage,
    net: nn.Module,
    data: ImageData,
    loaders: Dict[str, Any],
    data_config: Dict[str, Any],
    *,
    place: str,
    checkpoint: Optional[Dict[str, Any]],
    is_resumed: bool,
    first: Callable[[Callable[[], Any]], Any],
    log: RunLog,
    **common: Any,
) -> Union[ImageStage, FrozenStage]:
    """Make what trains a stage.

    Args:
        settings: Of the run.
        stage: The stage.
        net: The model, on its device.
        data: Data sets, and the fingerprint of their images.
        loaders: Loaders by 'train' and 'val', for training on images.
        data_config: The model's preprocessing.
        place: Name of the stage, for the log.
        checkpoint: Of the run that is resumed, if it is.
        is_resumed: Whether the stage itself has begun before.
        first: Does something in the first process for all.
        log: Where it is said what cannot be done as was asked.
        **common: Further arguments of both kinds of stage.
    """
    folder, hflip = Path(settings.output) / FEATURES, settings.augmentation()['hflip']
    if is_resumed:  # as it began, though disks fill
        is_cached = 'kind' in checkpoint['optimizer']
    else:
        is_cached = is_frozen(stage) and settings.head_cache > 0
    if is_cached and not is_resumed:
        check = partial(no_cache_reason, net, stage, data.splits, data_config, hflip, settings.head_cache, folder)
        reason = first(check)
        if reason is not None:
            is_cached = False
            log.say('no_cache', f'{place}: images go through the streams in every epoch, as {reason}.')
    if not is_cached:
        return ImageStage(net, stage, loaders, log=log, **common)
    asked = _asked(settings) if checkpoint is None else []  # the settings of a resumed run have all names
    if asked:
        told = f'Warning: {place} does without {", ".join(asked)}, which --head-cache 0 has; it takes longer.'
        log.say('warning', told, unused=asked)
    return create_frozen_stage(
        net,
        stage,
        data.splits,
        data_config,
        folder,
        batch_size=settings.batch_size,
        hflip=hflip,
        seed=settings.seed,
        fingerprint=data.fingerprint,
        workers=settings.workers,
        log=log,
        **common,
    )


def describe_stage(stage: Stage, trainer: Union[ImageStage, FrozenStage]) -> str:
    """A line on what is trained, and on which images."""
    trained = sum(p.numel() for p in trainer.net.parameters() if p.requires_grad)
    what = 'the streams frozen' if is_frozen(stage) else 'everything trained'
    text = f'{what}, {trained / 1e6:.2f} M parameters, epochs: {stage.epochs}, steps of each: {trainer.steps}'
    if not isinstance(trainer, FrozenStage):
        return text
    mirrored = 'mirrored at random' if trainer.hflip > 0 else 'not mirrored'
    return f'{text}; images are whole and {mirrored}, features computed once (--head-cache 0 augments)'
