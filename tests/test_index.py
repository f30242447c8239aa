"""Index algebra against numpy: whatever view is taken, the element found is the element that is there."""

from itertools import product
from math import prod

import numpy as np
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp.codegen.index import Space, axis_symbol

FACTORS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def partitions(factors: list[int], cuts: list[bool]) -> list[int]:
    """Neighbouring factors multiplied together wherever there is no cut: a shape of the same volume."""
    shape = [factors[0]]
    for factor, cut in zip(factors[1:], cuts, strict=False):
        if cut:
            shape.append(factor)
        else:
            shape[-1] *= factor
    return shape


@settings(deadline=None)
@given(FACTORS, st.lists(st.booleans(), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_reshape_finds_the_same_element(factors: list[int], outer_cuts: list[bool], inner_cuts: list[bool]) -> None:
    outer, inner = partitions(factors, outer_cuts), partitions(factors, inner_cuts)
    symbols = [axis_symbol(f"i{d}") for d in range(len(outer))]
    space = Space(dict(zip(symbols, map(sympy.Integer, outer), strict=True)))
    index = space.reshape(tuple(symbols), outer, inner)
    elements = np.arange(prod(outer))
    for point in product(*map(range, outer)):
        found = tuple(int(e.xreplace(dict(zip(symbols, map(sympy.Integer, point), strict=True)))) for e in index)
        assert elements.reshape(inner)[found] == elements.reshape(outer)[point]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_split_is_division(size: int, divisor: int, step: int, constant: int) -> None:
    i = axis_symbol("i")
    space = Space({i: sympy.Integer(size)})
    expr = step * i + constant
    quotient, remainder = space.split(sympy.sympify(expr), sympy.Integer(divisor))
    for value in range(size):
        at = {i: sympy.Integer(value)}
        number = step * value + constant
        assert int(quotient.xreplace(at)) == number // divisor
        assert int(remainder.xreplace(at)) == number % divisor


def test_heads_split_off_without_division() -> None:
    h, c = axis_symbol("h"), axis_symbol("c")
    space = Space({h: sympy.Integer(4), c: sympy.Integer(8)})
    assert space.split(8 * h + c, sympy.Integer(8)) == (h, c)
    assert space.reshape((h, c), (4, 8), (32,)) == (8 * h + c,)


def test_a_split_that_is_undone_leaves_no_trace() -> None:
    m, n = axis_symbol("m"), sympy.Symbol("n", integer=True, positive=True)
    space = Space({m: 3 * n})
    high, low = space.split(m, n)
    assert space.flatten((high, low), (sympy.Integer(3), n)) == m
    assert space.joined(4 * n * high + 4 * low) == 4 * m


def test_nothing_is_known_of_loaded_integers() -> None:
    i, loaded = axis_symbol("i"), sympy.Symbol("ids", integer=True)
    space = Space({i: sympy.Integer(4)})
    space.data.add(loaded)
    assert space.below(sympy.sympify(i), sympy.Integer(4)) and not space.below(loaded, sympy.Integer(4))
    assert not space.at_least(loaded, sympy.Integer(0))
