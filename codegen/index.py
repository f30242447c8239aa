"""Index algebra: how the index of an output element becomes the index of an input element."""

from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from llmcomp.hints import volume

Index = tuple[sympy.Expr, ...]
ZERO = sympy.Integer(0)


def size(value: int | torch.SymInt) -> sympy.Expr:
    """A size, stride or offset of a fake tensor as a sympy expression."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(int(value))


def sizes(values: Iterable[int | torch.SymInt]) -> Index:
    """Sizes of a fake tensor as sympy expressions."""
    return tuple(size(v) for v in values)


def axis_symbol(name: str) -> sympy.Symbol:
    """A loop variable."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


class Space:
    """Loop variables with their sizes; simplifies quotients and remainders of expressions over them."""

    def __init__(self, extents: Mapping[sympy.Symbol, sympy.Expr]) -> None:
        self.extents = dict(extents)
        self.data: set[sympy.Symbol] = set()
        """Symbols that stand for loaded integers: nothing is known of them."""

    def upper(self, expr: sympy.Expr) -> sympy.Expr | None:
        """The largest value of an affine expression, or None where it is not known."""
        total = ZERO
        for term in sympy.Add.make_args(sympy.expand(expr)):
            free = [s for s in term.free_symbols if s in self.extents]
            if len(free) > 1 or any(isinstance(a, FloorDiv | Mod) for a in sympy.preorder_traversal(term)):
                return None
            if self.data.intersection(term.free_symbols):
                return None
            if not free:
                total += term
                continue
            factor = term.coeff(free[0], 1)
            if factor == 0 or factor.has(free[0]):
                return None
            if factor.is_nonnegative:
                total += factor * (self.extents[free[0]] - 1)
            elif not factor.is_nonpositive:
                return None
        return sympy.expand(total)

    def below(self, expr: sympy.Expr, bound: sympy.Expr) -> bool:
        """Whether expr < bound is proved."""
        highest = self.upper(expr)
        return highest is not None and bool(sympy.expand(bound - highest).is_positive)

    def at_least(self, expr: sympy.Expr, bound: sympy.Expr) -> bool:
        """Whether expr >= bound is proved."""
        highest = self.upper(sympy.expand(bound - expr))
        return highest is not None and bool(highest.is_nonpositive)

    def split(self, expr: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """(expr // divisor, expr % divisor) for expr >= 0."""
        if divisor == 1:
            return expr, ZERO
        quotient, rest = [], []
        for term in sympy.Add.make_args(sympy.expand(expr)):
            whole = _divide(term, divisor)
            if whole is None:
                rest.append(term)
            else:
                quotient.append(whole)
        remainder = sympy.Add(*rest)
        if remainder == 0 or (all(_nonnegative(t) for t in rest) and self.below(remainder, divisor)):
            return sympy.Add(*quotient), remainder
        return FloorDiv(expr, divisor), Mod(expr, divisor)

    def flatten(self, index: Sequence[sympy.Expr], extents: Sequence[sympy.Expr]) -> sympy.Expr:
        """Row-major position of `index` in an array of `extents`."""
        parts = [(i, n) for i, n in zip(index, extents, strict=True) if n != 1]
        while len(parts) > 1:
            (high, n), (low, m) = parts[-2:]
            inverse = isinstance(low, Mod) and low.args[1] == m and high == FloorDiv(low.args[0], m)
            parts[-2:] = [(low.args[0] if inverse else high * m + low, n * m)]
        return parts[0][0] if parts else ZERO

    def unflatten(self, position: sympy.Expr, extents: Sequence[sympy.Expr]) -> Index:
        """Inverse of `flatten`."""
        result: list[sympy.Expr] = []
        kept = [n for n in extents if n != 1]
        for n in reversed(kept[1:]):
            position, low = self.split(position, n)
            result.append(low)
        if kept:
            result.append(position)
        result.reverse()
        values = iter(result)
        return tuple(ZERO if n == 1 else next(values) for n in extents)

    def joined(self, expr: sympy.Expr) -> sympy.Expr:
        """`expr` with c*b*(x // b) + c*(x % b) written as c*x: a split that was undone."""
        expr = sympy.expand(expr)
        for low in expr.atoms(Mod):
            x, b = low.args
            step, high = expr.coeff(low), expr.coeff(FloorDiv(x, b))
            if step != 0 and sympy.expand(high - step * b) == 0:
                expr = sympy.expand(expr - high * FloorDiv(x, b) - step * low + step * x)
        return expr

    def reshape(
        self,
        index: Sequence[sympy.Expr],
        outer: Sequence[int | torch.SymInt],
        inner: Sequence[int | torch.SymInt],
    ) -> Index:
        """The index into an array of sizes `inner` of the element at `index` of its view of sizes `outer`."""
        result: list[sympy.Expr] = []
        for outs, ins in _groups(outer, inner):
            position = self.flatten([index[d] for d in outs], sizes(outer[d] for d in outs))
            result.extend(self.unflatten(position, sizes(inner[d] for d in ins)))
        return tuple(result)


def _nonnegative(term: sympy.Expr) -> bool:
    return bool(term.is_nonnegative)


def _divide(term: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """term / divisor where that is an integer expression for every value of the symbols, else None."""
    ratio = term / divisor
    numerator, denominator = ratio.as_numer_denom()
    return ratio if denominator == 1 and numerator.is_integer else None


def _groups(
    outer: Sequence[int | torch.SymInt], inner: Sequence[int | torch.SymInt]
) -> list[tuple[list[int], list[int]]]:
    """Split the dimensions of two shapes of equal volume into runs of equal volume."""
    groups, i, j = [], 0, 0
    while i < len(outer) or j < len(inner):
        outs, ins = [], []
        if i < len(outer):
            outs.append(i)
            i += 1
        if j < len(inner):
            ins.append(j)
            j += 1
        # All dimensions together are equal, also where algebra cannot show it (n // 2 * 2, for an even n).
        while _volume(outer, outs) != _volume(inner, ins) and (i < len(outer) or j < len(inner)):
            smaller = volume(outer[d] for d in outs) <= volume(inner[d] for d in ins)
            if (smaller and i < len(outer)) or j >= len(inner):
                outs.append(i)
                i += 1
            else:
                ins.append(j)
                j += 1
        groups.append((outs, ins))
    return groups


def _volume(shape: Sequence[int | torch.SymInt], dims: Sequence[int]) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*sizes(shape[d] for d in dims)))
