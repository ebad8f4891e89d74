"""Types and bounds of arguments, read from the signatures that have them.

A constructor annotates an argument once, as in `eps: Annotated[float, Bounds(above=0)] = 1e-10`; the constructor
itself, the command line and the check of configs from the Hub all read it there.
"""

import inspect
import math
import types
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Dict,
    Iterator,
    List,
    Literal,
    Mapping,
    Optional,
    Type,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

__all__ = [
    'Bounds',
    'Internal',
    'Runtime',
    'argument_problem',
    'arguments_of',
    'check_arguments',
    'describe_argument',
    'is_marked',
    'runtime_arguments',
]


@dataclass(frozen=True)
class Bounds:
    """Range of a number, or of every number within a tuple, list or dict.

    Args:
        least: Smallest value.
        most: Largest value; what no real model exceeds, so that a mistake or a hostile config allocates nothing.
        above: Value that the number must be larger than.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def problem(self, value: Any) -> Optional[str]:
        """What is wrong with a number, None if nothing is."""
        if math.isinf(value) or math.isnan(value) or value <= self.above or value < self.least:
            if (self.least, self.above) in ((1, -math.inf), (-math.inf, 0)):
                return 'must be positive' + (' and finite' if isinstance(value, float) else '')
            if self.least == 0:
                return 'must not be negative' + (' and finite' if isinstance(value, float) else '')
            return f'must be at least {self.least:g}' if math.isfinite(self.least) else 'must be finite'
        return f'must be at most {self.most:g}' if value > self.most else None


class Runtime:
    """Marks an argument that says how a model is made or trained, not what it is, and so is not saved with it."""


class Internal(Runtime):
    """Marks a runtime argument that a config, which anybody may have written, has no say in."""


def arguments_of(cls: Type) -> Dict[str, Any]:
    """Named arguments of a constructor and their annotations, with the metadata of `Annotated`.

    An argument without an annotation has `Any`.
    """
    hints = get_type_hints(cls.__init__, include_extras=True)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: hints.get(p.name, Any) for p in parameters if p.kind in named}


def is_marked(annotation: Any, mark: Type) -> bool:
    """Whether an argument's annotation has a mark, `Runtime` or `Internal`."""
    return any(isinstance(m, type) and issubclass(m, mark) for m in getattr(annotation, '__metadata__', ()))


def runtime_arguments(cls: Type) -> List[str]:
    """Names of a constructor's arguments that are not saved."""
    return [name for name, annotation in arguments_of(cls).items() if is_marked(annotation, Runtime)]


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value, maybe from JSON or a command line, is of a type as annotations write it."""
    if kind is Any:
        return True
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_a(value, args[0])
    if origin in (Union, types.UnionType):
        return any(_is_a(value, k) for k in args)
    if origin is tuple:
        if args[-1:] == (Ellipsis,):
            args = args[:1] * len(value) if isinstance(value, (list, tuple)) else args
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(_is_a, value, args))
    if origin is Literal:
        return value in args
    if origin is not None:
        return isinstance(value, origin)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if kind is type(None) else isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ' or '.join(map(_describe, args))
    if origin is Literal:
        return 'one of ' + ', '.join(map(repr, args))
    if origin is tuple:
        return f'a tuple of {len(args)} {"integers" if set(args) == {int} else "values"}'
    names = {float: 'a number', int: 'an integer', bool: 'True or False', str: 'a string', dict: 'a dict'}
    return 'None' if kind is type(None) else names.get(origin or kind, getattr(kind, '__name__', str(kind)))


def _numbers(value: Any) -> Iterator[float]:
    """The number that a value is, or those within a tuple, list or dict."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def argument_problem(annotation: Any, value: Any) -> Optional[str]:
    """What is wrong with the value of an argument.

    Args:
        annotation: The argument's, as of `arguments_of`.
        value: The value, in the form Python has it or JSON leaves it in.

    Returns:
        'must be ...', or None if nothing is wrong.
    """
    kind, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if not _is_a(value, kind):
        return f'must be {_describe(kind)}'
    for bounds in (m for m in metadata if isinstance(m, Bounds)):
        for x in _numbers(value):
            if problem := bounds.problem(x):
                return problem
    return None


def describe_argument(cls: Type, name: str) -> str:
    """An argument for documentation: its name, type, bounds and default."""
    annotation = arguments_of(cls)[name]
    kind, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    limits = []
    for bounds in (m for m in metadata if isinstance(m, Bounds)):
        named = (('above', bounds.above), ('from', bounds.least), ('to', bounds.most))
        limits += [f'{word} {limit:g}' for word, limit in named if math.isfinite(limit)]
    default = inspect.signature(cls.__init__).parameters[name].default
    return f'`{name}={default!r}`: {" ".join([_describe(kind), *limits])}'


def check_arguments(cls: Type, values: Mapping[str, Any]):
    """Check values against a constructor's signature; those of names that it does not have are passed over.

    Args:
        cls: Class with the constructor.
        values: Values by name.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a number is out of its bounds.
    """
    for name, annotation in arguments_of(cls).items():
        if name in values and (problem := argument_problem(annotation, values[name])):
            kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
            error = ValueError if _is_a(values[name], kind) else TypeError
            raise error(f"'{name}' {problem}, got {values[name]!r}.")
