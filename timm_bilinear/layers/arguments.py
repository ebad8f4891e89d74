"""Types and bounds of arguments, read from the signatures that have them.

A constructor annotates an argument once, as in `eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10`; the
constructor itself, the command line and the check of configs from the Hub all read it there.
"""

import inspect
import math
import numbers
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Dict,
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
    'check_argument',
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

    def problem(self, value: Union[int, float]) -> Optional[str]:
        """What is wrong with a number, None if nothing is."""
        is_finite = isinstance(value, int) or math.isfinite(value)  # an int may be too large for a float
        if not is_finite or value <= self.above or value < self.least:
            finite = '' if isinstance(value, int) else ' and finite'
            if (self.least, self.above) in ((1, -math.inf), (-math.inf, 0)):
                return f'must be positive{finite}'
            if self.least == 0:
                return f'must not be negative{finite}'
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


class _Problem(Exception):
    """What is wrong with a value: its type, or a number in it."""

    def __init__(self, text: str, of_type: bool):
        super().__init__(text)
        self.error = TypeError if of_type else ValueError


def _check_bounds(value: Any, bounds: Bounds):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if problem := bounds.problem(value):
            raise _Problem(problem, of_type=False)
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_bounds(item, bounds)


def _convert(value: Any, kind: Any) -> Any:
    """A value as its annotation has it, from the form that Python, JSON, numpy or a command line gave it.

    Raises:
        _Problem: If it is not of that type, or a number in it is out of bounds.
    """
    origin, args = get_origin(kind), get_args(kind)
    wrong = _Problem(f'must be {_describe(kind)}', of_type=True)
    if kind is Any:
        return value
    if origin is Annotated:
        value = _convert(value, args[0])
        for bounds in (m for m in args[1:] if isinstance(m, Bounds)):
            _check_bounds(value, bounds)
        return value
    if origin in (Union, types.UnionType):
        problems = []
        for option in args:
            try:
                return _convert(value, option)
            except _Problem as e:
                problems.append(e)
        raise next((e for e in problems if e.error is ValueError), wrong)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise wrong
    if origin is tuple or origin in (list, Sequence):
        if not isinstance(value, (list, tuple)):
            raise wrong
        if origin is tuple and args[-1:] != (Ellipsis,):
            if len(value) != len(args):
                raise wrong
            return tuple(map(_convert, value, args))
        return (tuple if origin is tuple else list)(_convert(item, args[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {_convert(k, args[0]): _convert(v, args[1]) for k, v in value.items()}
    if kind in (int, float):
        # an integer is a number too; a truth value is neither
        abstract = numbers.Integral if kind is int else numbers.Real
        if not isinstance(value, abstract) or isinstance(value, bool):
            raise wrong
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    kind = type(None) if kind is None else origin or kind
    if isinstance(kind, type) and not isinstance(value, kind):
        raise wrong
    return value


def _describe(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe(args[0])
    if origin in (Union, types.UnionType):
        return ' or '.join(map(_describe, args))
    if origin is Literal:
        return 'one of ' + ', '.join(map(repr, args))
    if origin is tuple:
        count = '' if args[-1:] == (Ellipsis,) else f'{len(args)} '
        return f'a tuple of {count}{"integers" if set(args) - {Ellipsis} == {int} else "values"}'
    names = {
        float: 'a number',
        int: 'an integer',
        bool: 'True or False',
        str: 'a string',
        dict: 'a dict',
        list: 'a list',
    }
    return 'None' if kind in (None, type(None)) else names.get(origin or kind, getattr(kind, '__name__', str(kind)))


def argument_problem(annotation: Any, value: Any) -> Optional[str]:
    """What is wrong with the value of an argument.

    Args:
        annotation: The argument's, as of `arguments_of`.
        value: The value, in the form Python has it or JSON leaves it in.

    Returns:
        'must be ...', or None if nothing is wrong.
    """
    try:
        _convert(value, annotation)
    except _Problem as e:
        return str(e)
    return None


def check_argument(name: str, annotation: Any, value: Any) -> Any:
    """Check one value, see `check_arguments`."""
    try:
        return _convert(value, annotation)
    except _Problem as e:
        raise e.error(f"'{name}' {e}, got {value!r}.") from None


def check_arguments(cls: Type, values: Mapping[str, Any]) -> Dict[str, Any]:
    """Check values against a constructor's signature; those of names that it does not have are passed over.

    Args:
        cls: Class with the constructor.
        values: Values by name.

    Returns:
        The values of its arguments, as the annotations have them: a tuple for JSON's list, an int for numpy's.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a number is out of its bounds.
    """
    return {k: check_argument(k, v, values[k]) for k, v in arguments_of(cls).items() if k in values}


def describe_argument(cls: Type, name: str) -> str:
    """An argument for documentation: its name, type, bounds and default."""
    annotation = arguments_of(cls)[name]
    limits = []
    for bounds in (m for m in getattr(annotation, '__metadata__', ()) if isinstance(m, Bounds)):
        named = (('above', bounds.above), ('from', bounds.least), ('to', bounds.most))
        limits += [f'{word} {limit:g}' for word, limit in named if math.isfinite(limit)]
    default = inspect.signature(cls.__init__).parameters[name].default
    return f'`{name}={default!r}`: {" ".join([_describe(annotation), *limits])}'
