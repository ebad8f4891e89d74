"""Types and bounds that annotations tell."""

from typing import Annotated, Any, Dict, List, Literal, Optional, Sequence, Tuple, Union

import numpy as np
import pytest

from timm_bilinear.layers.arguments import Bounds, argument_problem, check_argument

SMALL = Annotated[int, Bounds(1, 9)]


@pytest.mark.parametrize(
    'annotation,good,bad',
    [
        (SMALL, [1, 9, np.int64(3)], [0, 10, -(10**400), 10**400, 2.0, True, '3', None]),
        (Annotated[float, Bounds(above=0)], [1, 0.5, np.float32(2)], [0, -1.0, float('nan'), float('inf'), '1', True]),
        (Optional[SMALL], [None, 5], [-5, 10]),
        (Annotated[Optional[int], Bounds(1, 9)], [None, 5], [-5, 10, 2.5]),
        (Tuple[SMALL, ...], [(1, 2), [3], ()], [(-5, 2), 'ab', 3, [1, 'x']]),
        (Annotated[Union[int, Tuple[int, int]], Bounds(1, 99)], [5, (3, 4), [3, 4]], [0, (3,), (3, 100), (0, 3), 'x']),
        (List[int], [[1], (1,)], [['x'], 'x', [1.5]]),
        (Sequence[int], [(1, 2)], ['abc', 3]),
        (Dict[str, int], [{'a': 1}, {}], [{'a': 'b'}, {1: 2}, [1]]),
        (Annotated[Dict[str, Any], Bounds(0, 9)], [{'a': {'b': [1, 'x', True]}}], [{'a': {'b': [1, 10]}}]),
        (Literal[1, 'x'], [1, 'x'], [True, 1.0, 'y']),
        (bool, [True], [1, 'true', None]),
        (int | None, [None, 1], ['x']),
        (Any, [print], []),
    ],
)
def test_values(annotation, good, bad):
    assert [argument_problem(annotation, value) for value in good] == [None] * len(good)
    assert [value for value in bad if argument_problem(annotation, value) is None] == []


def test_values_are_converted():
    assert check_argument('x', Tuple[int, ...], [1, np.int32(2)]) == (1, 2)
    assert type(check_argument('x', float, 3)) is int and type(check_argument('x', int, np.int8(3))) is int
    with pytest.raises(ValueError, match=r"'x' must be at most 9, got 10"):
        check_argument('x', Optional[SMALL], 10)
    with pytest.raises(TypeError, match=r"'x' must be a tuple of integers, got 'a'"):
        check_argument('x', Tuple[int, ...], 'a')
