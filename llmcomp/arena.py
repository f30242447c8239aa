"""Intermediate results share one block of memory: who lies where, and who may follow whom.

Two values may lie in the same slot when neither is alive while the other is. Sizes may be symbolic, so slots are
reused by equal expressions, and by plain comparison where both are numbers; offsets are sums of slot sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Node
from torch.utils._sympy.functions import CeilDiv

ALIGNMENT = 64  # a cache line, and the widest vector register


@dataclass(frozen=True)
class Lifetime:
    """A value of `size` bytes, written by step `first` and read for the last time by step `last`."""

    node: Node
    size: sympy.Expr
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """Byte offsets of values in one block of `size` bytes."""

    offsets: dict[Node, sympy.Expr]
    size: sympy.Expr


@dataclass
class _Slot:
    size: sympy.Expr
    free_after: int
    nodes: list[Node]


def plan_arena(lifetimes: Sequence[Lifetime]) -> Arena:
    """Give every value a place; values alive at the same time never overlap."""
    slots: list[_Slot] = []
    for value in sorted(lifetimes, key=lambda v: v.first):
        slot = _fitting(slots, value)
        if slot is None:
            slots.append(_Slot(value.size, value.last, [value.node]))
            continue
        slot.size = sympy.Max(slot.size, value.size)
        slot.free_after = value.last
        slot.nodes.append(value.node)
    offsets: dict[Node, sympy.Expr] = {}
    end: sympy.Expr = sympy.Integer(0)
    for slot in slots:
        offsets.update({n: end for n in slot.nodes})
        end = end + _aligned(slot.size)
    return Arena(offsets, end)


def _fitting(slots: Sequence[_Slot], value: Lifetime) -> _Slot | None:
    """The free slot whose size is nearest, if its size can be compared with the value's."""
    free = [s for s in slots if s.free_after < value.first]
    same = next((s for s in free if s.size == value.size), None)
    if same is not None or not value.size.is_Integer:
        return same
    known = [s for s in free if s.size.is_Integer]
    return min(known, key=lambda s: abs(int(s.size) - int(value.size)), default=None)


def _aligned(size: sympy.Expr) -> sympy.Expr:
    if size.is_Integer:
        return sympy.Integer(-(-int(size) // ALIGNMENT) * ALIGNMENT)
    return CeilDiv(size, sympy.Integer(ALIGNMENT)) * ALIGNMENT
