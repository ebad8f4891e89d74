"""The registry of poolings: everything that takes a pooling by name finds it, and its arguments, here."""

import difflib
import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Callable, ClassVar, Dict, List, Mapping, Optional, Tuple, Type, TypeVar, Union

import torch
import torch.fx
import torch.nn as nn

from ...ops import fold_symmetric_weight
from ..arguments import Bounds, arguments_of, check_argument, check_arguments

__all__ = [
    'BilinearPooling',
    'Terms',
    'check_pooling',
    'check_takes_levels',
    'create_pooling',
    'list_poolings',
    'most_streams',
    'pooling_arguments',
    'register_pooling',
]


@dataclass
class Terms:
    """A part of a descriptor as a sum over locations, apart from what is done to each entry afterwards.

    Args:
        entries: (B, D), zero only where the descriptor's are. They are homogeneous in the variables together, so by
            Euler's theorem the products of variables and gradients sum to `degree` times the entries.
        variables: Tensors (B, C, N) in the graph of `entries`; none if no location has a part in them.
        degree: Degree of the entries in all variables.
    """

    entries: torch.Tensor
    variables: Tuple[torch.Tensor, ...]
    degree: int


class BilinearPooling(nn.Module):
    """Base of poolings: from the feature maps of one or more streams to one descriptor per image.

    A subclass is registered under a name. Its constructor takes the maps' channels and then keyword-only arguments with
    annotations, whose types and `Bounds` are those of command line and Hub configs too:

        @register_pooling('mine')
        class MyPooling(BilinearPooling):
            def __init__(self, in_features, *, rank: Annotated[int, Bounds(1, 512)] = 8, device=None, dtype=None):

    Attributes:
        max_streams: Feature maps that it takes at most.
        is_unit_length: Whether descriptors have an L2 norm of 1.
        is_packed: Whether descriptors of one stream are packed symmetric matrices of its `in_features`.
        takes_levels: Whether it takes several levels of one stream, concatenated in one map.
        num_features: Descriptor size D, set by the subclass.
        grad_checkpointing: Whether backward should make again what forward could keep.
    """

    max_streams: ClassVar[int] = 2
    is_packed: ClassVar[bool] = False
    is_unit_length: bool = False
    takes_levels: ClassVar[bool] = False
    num_features: int

    def __init__(self):
        super().__init__()
        self.grad_checkpointing = False

    def forward(self, a: torch.Tensor, b: Optional[torch.Tensor] = None) -> torch.Tensor:
        """
        Args:
            a: (B, Ca, H, W) features of the first stream.
            b: (B, Cb, H, W) features of the second one on the same grid, if there is one.

        Returns:
            (B, D) descriptors in the dtype of the features, computed in float32 or wider.

        A subclass may take any number of maps, `forward(self, *maps)`; TorchScript wants them named as here.
        """
        raise RuntimeError(f'{type(self).__name__} has no forward.')

    def check_maps(self, a: torch.Tensor, b: Optional[torch.Tensor]):
        """Check that there are as many maps, of as many channels, as the pooling was created for.

        Raises:
            ValueError: If there are not.
        """
        if isinstance(a, torch.fx.Proxy) or not hasattr(self, 'in_features'):
            return  # nothing is known of a node of a graph, nor of what a pooling of the user's own takes
        wanted, maps = self.in_features, [x for x in (a, b) if x is not None]
        if self.takes_levels and len(maps) == 1:
            wanted = (sum(wanted),)
        if not all(isinstance(x, torch.Tensor) and x.dim() > 1 for x in maps):
            return  # told elsewhere
        got = tuple(x.shape[1] for x in maps)
        if got != wanted:
            raise ValueError(f'{type(self).__name__} takes maps of {wanted} channels, got maps of {got}.')

    def classify(self, maps: Tuple[torch.Tensor, ...], fc: nn.Linear) -> Optional[torch.Tensor]:
        """Logits (B, K) of a plain linear classifier by a fused path, or None: `fc(self(*maps))` is called then."""
        return None

    def create_classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """A classifier on this pooling's descriptors, with attributes `weight` and `bias`."""
        return nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        """Parts of the descriptor, in their order, as sums over locations: what `timm_bilinear.explain` tells.

        Args:
            a: (B, Ca, N) features in float32 or wider.
            b: (B, Cb, N) features of the second stream, or None.

        Raises:
            NotImplementedError: If the descriptor is no such sum.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say what each location gives to a descriptor.')

    def fold_classifier(self, weight: torch.Tensor) -> torch.Tensor:
        """A checkpoint's classifier weight, (K, D) in this pooling's layout: folded if it is one on full matrices."""
        if self.is_packed and len(self.in_features) == 1:
            if weight.shape[1] == self.in_features[0] ** 2 != self.num_features:
                return fold_symmetric_weight(weight)
        return weight


_IN_FEATURES = Annotated[Union[int, Tuple[int, ...]], Bounds(1)]
_poolings: Dict[str, Type[BilinearPooling]] = {}
_PoolingT = TypeVar('_PoolingT', bound=Type[BilinearPooling])


def register_pooling(name: str) -> Callable[[_PoolingT], _PoolingT]:
    """Class decorator that registers a pooling.

    Args:
        name: What `create_pooling`, and `pool_type` of head and models, know it by.

    Raises:
        TypeError: If the name is no string, or what is decorated is no pooling that can be created by name.
        ValueError: If another class has the name.
    """
    if not isinstance(name, str):
        raise TypeError(f"The name of a pooling must be a string, as in @register_pooling('mine'), got {name!r}.")

    def register(cls: _PoolingT) -> _PoolingT:
        _check_pooling_class(name, cls)
        known = _poolings.get(name, cls)
        is_reloaded = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if not name or not is_reloaded:
            raise ValueError(f'Pooling name {name!r} is {"taken" if name else "empty"}.')
        _poolings[name] = cls
        return cls

    return register


def _check_pooling_class(name: str, cls: Any):
    if not (isinstance(cls, type) and issubclass(cls, BilinearPooling)):
        raise TypeError(f"Pooling '{name}' must be a subclass of BilinearPooling, got {cls!r}.")
    parameters = inspect.signature(cls.__init__).parameters
    try:
        arguments = arguments_of(cls)
    except NameError as e:
        raise TypeError(f"An annotation of pooling '{name}' cannot be resolved: {e}.") from None
    missing = {'in_features', 'device', 'dtype'} - set(arguments)
    if missing:
        raise TypeError(f"The constructor of pooling '{name}' must take '{sorted(missing)[0]}'.")
    for argument in set(arguments) - {'in_features'}:
        if parameters[argument].default is inspect.Parameter.empty:
            raise TypeError(f"Argument '{argument}' of pooling '{name}' must have a default.")


def list_poolings() -> List[str]:
    """Names of the registered poolings, sorted."""
    return sorted(_poolings)


def _pooling_class(name: str) -> Type[BilinearPooling]:
    if name not in _poolings:
        close = difflib.get_close_matches(str(name), _poolings, 1)
        hint = f' Did you mean {close[0]!r}?' if close else ''
        known = ', '.join(map(repr, list_poolings()))
        raise ValueError(f"'pool_type' must be one of {known} or '', got {name!r}.{hint}")
    return _poolings[name]


def most_streams(name: str) -> int:
    """Feature maps that a pooling takes at most.

    Raises:
        ValueError: If there is no such pooling.
    """
    return _pooling_class(name).max_streams


def check_takes_levels(name: str):
    """Check that a pooling takes several levels of one stream.

    Raises:
        ValueError: If it does not, or there is no such pooling.
    """
    if not _pooling_class(name).takes_levels:
        takers = ', '.join(repr(k) for k, v in sorted(_poolings.items()) if v.takes_levels)
        raise ValueError(f"Pooling '{name}' does not take several levels of a stream, as {takers} does.")


def pooling_arguments(name: str) -> Dict[str, Any]:
    """Arguments of a pooling and their annotations, read from its constructor.

    Raises:
        ValueError: If there is no such pooling.
    """
    every = arguments_of(_pooling_class(name))
    return {k: v for k, v in every.items() if k not in ('in_features', 'device', 'dtype')}


def check_pooling(name: str, args: Mapping[str, Any], beside: Optional[Type] = None) -> Dict[str, Any]:
    """Check a pooling's name and arguments.

    Args:
        name: Its name; '' for no pooling yet, with the arguments of one that may be set later.
        args: Its arguments.
        beside: Class whose constructor takes them together with its own.

    Returns:
        The arguments, as their annotations have them.

    Raises:
        TypeError: If the pooling has no such argument, or a value is of the wrong type.
        ValueError: If there is no such pooling, or a value is out of its bounds.
    """
    if not name:
        every = {arg for pooling in list_poolings() for arg in pooling_arguments(pooling)}
        if unknown := sorted(set(args) - every):
            raise TypeError(f"Unknown argument '{unknown[0]}': no pooling takes it.")
        return dict(args)
    known = pooling_arguments(name)
    if taken := set(known) & set(arguments_of(beside) if beside else ()):
        raise TypeError(f"Argument '{min(taken)}' of pooling '{name}' is one of {beside.__name__} too.")
    if unknown := sorted(set(args) - set(known)):
        takes = f'takes {", ".join(known)}' if known else 'takes none'
        raise TypeError(f"Unknown argument '{unknown[0]}': pooling '{name}' {takes}.")
    return check_arguments(_pooling_class(name), args)


def create_pooling(
    name: str,
    in_features: Union[int, Tuple[int, ...]],
    *,
    device=None,
    dtype=None,
    **args,
) -> BilinearPooling:
    """Create a pooling.

    Args:
        name: One of `list_poolings()`.
        in_features: Channels of each stream's map; one number for one stream.
        **args: The pooling's own arguments.

    Returns:
        Module with `num_features`, the descriptor size D, that takes the maps and returns (B, D).

    Raises:
        TypeError: If the pooling has no such argument, or a value is of the wrong type.
        ValueError: If there is no such pooling, a value is out of its bounds, or there are too many streams.
    """
    args = check_pooling(name, args)
    in_features = check_argument('in_features', _IN_FEATURES, in_features)
    in_features = (in_features,) if isinstance(in_features, int) else in_features
    most = most_streams(name)
    if not 1 <= len(in_features) <= most:
        streams = 'one stream' if most == 1 else f'1 to {most} streams'
        raise ValueError(f"Pooling '{name}' is of {streams}, got {len(in_features)}.")
    return _pooling_class(name)(in_features, **args, device=device, dtype=dtype)
