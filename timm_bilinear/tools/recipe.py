"""Stages of training, and the recipe that is followed if none are given."""

from dataclasses import dataclass, field
from typing import List, Optional, Union

from .options import option

__all__ = ['Stage', 'default_stages']


@dataclass
class Stage:
    """A part of training with an optimizer and a schedule of its own.

    Args:
        epochs: Length.
        opt: timm optimizer name.
        lr: Peak learning rate of the streams; 0 keeps them frozen.
        head_lr: Peak learning rate of the head, whose unit-length descriptors want a higher one.
        weight_decay: Weight decay of the streams' weight matrices; the head has none.
    """

    epochs: int = field(metadata=option('length', type=int, least=1, most=100_000))
    opt: str = field(metadata=option('timm optimizer', type=str))
    lr: float = field(metadata=option('peak learning rate of the streams', type=float, least=0))
    head_lr: float = field(metadata=option('peak learning rate of the head', type=float, above=0))
    weight_decay: float = field(metadata=option("weight decay of the streams' weights", type=float, least=0))


def _is_adaptive(opt: str) -> bool:
    return not opt.lower().startswith(('sgd', 'momentum', 'nesterov'))


def default_stages(
    from_weights: bool,
    epochs: int,
    head_epochs: int,
    opt: Optional[str] = None,
    lr: Optional[float] = None,
    head_lr: Optional[Union[float, List[float]]] = None,
    weight_decay: Optional[float] = None,
    freeze: bool = False,
) -> List[Stage]:
    """Recipe: two stages if the streams start from weights, one if they start from nothing.

    The learning rates from weights follow the paper: 1.0 for the classifier alone, then 1e-3 for the streams. Other
    optimizers than SGD scale each step to its gradients and have lower ones.

    Args:
        from_weights: The streams start from weights.
        epochs: Epochs with everything trained.
        head_epochs: Epochs with frozen streams before them, if the streams start from weights.
        opt: Optimizer of every stage; None for the recipe's, SGD from weights and AdamW from nothing.
        lr: Peak learning rate of the streams where they are trained; None for the recipe's.
        head_lr: Peak learning rate of the head: one number for every stage, or one for each; None for the recipe's.
        weight_decay: Weight decay of the streams where they are trained; None for the recipe's.
        freeze: The streams stay frozen: `head_epochs` epochs and no more.

    Returns:
        Stages in their order.

    Raises:
        ValueError: If there are other numbers of `head_lr` than stages.
    """
    opt = opt or ('sgd' if from_weights else 'adamw')
    adaptive = _is_adaptive(opt)
    head = Stage(head_epochs, opt, lr=0.0, head_lr=1e-2 if adaptive else 1.0, weight_decay=0.0)
    if from_weights:
        recipe = (3e-4, 3e-3, 0.05) if adaptive else (1e-3, 1e-2, 1e-5)
    else:
        recipe = (1e-3, 1e-2, 0.05) if adaptive else (5e-2, 5e-1, 1e-4)
    everything = Stage(epochs, opt, *recipe)
    everything.lr = everything.lr if lr is None else lr
    everything.weight_decay = everything.weight_decay if weight_decay is None else weight_decay
    stages = [head] if freeze else [head, everything] if from_weights else [everything]
    stages = [stage for stage in stages if stage.epochs > 0]
    rates = list(head_lr) if isinstance(head_lr, (list, tuple)) else [head_lr] * len(stages)
    if len(rates) == 1:
        rates = rates * len(stages)
    if len(rates) != len(stages):
        raise ValueError(f"'head_lr' must be one number or one for each of the {len(stages)} stages, got {head_lr!r}.")
    for stage, rate in zip(stages, rates):
        stage.head_lr = stage.head_lr if rate is None else rate
    return stages
