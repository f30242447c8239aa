"""What integer and boolean nodes hold at query i and key j, read through views, sums and comparisons.

    k = unsqueeze(arange(n), 0);  q = unsqueeze(arange(m) + p, 1)
    le(k, q) at [i, j]    holds where every term of    [i - j + p]    is at least zero

Integers are affine in i and j with sizes of the graph as constants; anything else is unknown (None).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from llmcomp.graph import Size, argument, known, same_size, val

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """query * i + key * j + rest."""

    query: int
    key: int
    rest: Size

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(self.query + other.query, self.key + other.key, self.rest + other.rest)

    def __sub__(self, other: "Affine") -> "Affine":
        return self + other.times(-1)

    def times(self, factor: int) -> "Affine":
        """This times an integer."""
        return Affine(self.query * factor, self.key * factor, self.rest * factor)

    def plus(self, size: Size) -> "Affine":
        """This plus a size."""
        return Affine(self.query, self.key, self.rest + size)


QUERY = Affine(1, 0, 0)
KEY = Affine(0, 1, 0)

# The position along each axis of a tensor; None along axes that are neither queries nor keys.
Index = tuple[Affine | None, ...]
# A conjunction: holds where every term is at least zero.
Terms = tuple[Affine, ...]
NEVER = Affine(0, 0, -1)
ZERO = Affine(0, 0, 0)


def known_true(condition: object) -> bool:
    """Whether a comparison of sizes holds for every input; never adds a guard."""
    return condition is True or (isinstance(condition, torch.SymBool) and statically_known_true(condition))


def constant(size: Size) -> int | None:
    """The value of a size that is the same for every input, else None."""
    if isinstance(size, SymInt):
        number: int | None = size.node.maybe_as_int()
        return number
    return size


# ---- from the index of a result to that of an operand


def broadcast(index: Index, operand: Tensor) -> Index:
    """The index of an operand of a pointwise operator, whose axes of one element are repeated."""
    tail = index[len(index) - operand.dim() :]
    return tuple(ZERO if _is_one(n) else at for at, n in zip(tail, operand.shape, strict=True))


def through_view(node: Node, index: Index) -> tuple[Node, Index] | None:
    """The element of its source that a view shows at `index`; None where `node` is no view, or too
    intricate.
    """
    rule = _VIEWS.get(node.target)
    if rule is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    moved = rule(node, index)
    return None if moved is None else (source, moved)


def moves_elements(node: Node) -> bool:
    """Whether a node is a view that does more than to copy or to repeat."""
    rule = _VIEWS.get(node.target)
    return rule is not None and rule not in (_same, _expand)


ViewRule = Callable[[Node, Index], Index | None]


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _source(node: Node) -> Tensor:
    source = node.args[0]
    assert isinstance(source, Node)
    return val(source)


def _same(node: Node, index: Index) -> Index:
    return index


def _expand(node: Node, index: Index) -> Index:
    return broadcast(index, _source(node))


def _reshape(node: Node, index: Index) -> Index | None:
    """Only axes of one element come and go."""
    kept = [at for at, n in zip(index, val(node).shape, strict=True) if not _is_one(n)]
    sizes = [n for n in val(node).shape if not _is_one(n)]
    inner = [n for n in _source(node).shape if not _is_one(n)]
    if len(sizes) != len(inner) or not all(map(same_size, sizes, inner)):
        return None
    rest = iter(kept)
    return tuple(ZERO if _is_one(n) else next(rest) for n in _source(node).shape)


def _transpose(node: Node, index: Index) -> Index:
    a, b = (int(known(argument(node, name))) for name in ("dim0", "dim1"))  # type: ignore[call-overload]
    moved = list(index)
    moved[a], moved[b] = moved[b], moved[a]
    return tuple(moved)


def _permute(node: Node, index: Index) -> Index:
    order = argument(node, "dims")
    assert isinstance(order, Sequence)
    moved = {int(d) % len(index): at for d, at in zip(order, index, strict=True)}  # type: ignore[arg-type]
    return tuple(moved[d] for d in range(len(index)))


def _slice(node: Node, index: Index) -> Index | None:
    start, step = known(argument(node, "start")) or 0, known(argument(node, "step"))
    dim = int(argument(node, "dim")) % len(index)  # type: ignore[arg-type]
    at, size = index[dim], _source(node).shape[dim]
    if not isinstance(start, int | SymInt) or not isinstance(step, int):
        return None
    if not known_true(start >= 0):
        start = start + size
    if not known_true(start >= 0) or not known_true(start <= size):
        return None
    moved = None if at is None else at.times(step).plus(start)
    return (*index[:dim], moved, *index[dim + 1 :])


def _select(node: Node, index: Index) -> Index | None:
    at = known(argument(node, "index"))
    dim = int(argument(node, "dim")) % (len(index) + 1)  # type: ignore[arg-type]
    if not isinstance(at, int | SymInt) or not known_true(at >= 0):
        return None
    return (*index[:dim], Affine(0, 0, at), *index[dim:])


_VIEWS: Mapping[object, ViewRule] = {
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.expand.default: _expand,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}


# ---- integers


def integer(value: object, index: Index) -> Affine | None:
    """What an integer node, or a number, holds at `index`."""
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
        number = known(value)
        return Affine(0, 0, number) if isinstance(number, int | SymInt) else None
    if val(value).dtype not in (torch.int64, torch.int32):
        return None
    if (seen := through_view(value, index)) is not None:
        return integer(*seen)
    rule = _INTEGERS.get(value.target)
    return None if rule is None else rule(value, index)


def _operand(value: object, index: Index) -> Affine | None:
    """An operand of a pointwise operator at the index of its result."""
    if isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor):
        return integer(value, broadcast(index, val(value)))
    return integer(value, ())


def _arange(node: Node, index: Index) -> Affine | None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    start = known(argument(node, "start")) if "start" in names else 0
    step = known(argument(node, "step")) if "step" in names else 1
    if index[0] is None or not isinstance(start, int | SymInt) or not isinstance(step, int):
        return None
    return index[0].times(step).plus(start)


def _sum(sign: int, swap: bool = False) -> Callable[[Node, Index], Affine | None]:
    """a + sign * alpha * b of the operands, or of the operands swapped."""

    def rule(node: Node, index: Index) -> Affine | None:
        a, b = (_operand(x, index) for x in (reversed(node.args[:2]) if swap else node.args[:2]))
        alpha = argument(node, "alpha")
        if a is None or b is None or not isinstance(alpha, int):
            return None
        return a + b.times(sign * alpha)

    return rule


def _filled(node: Node, index: Index) -> Affine | None:
    name = "s" if node.target is aten.scalar_tensor.default else "fill_value"
    value = known(argument(node, name))
    return Affine(0, 0, value) if isinstance(value, int | SymInt) else None


def _joined(node: Node, index: Index) -> Affine | None:
    """Parts one behind the other that go on as one rule, such as -1 and 0, 1, 2, ..."""
    parts, dim = node.args[0], int(argument(node, "dim")) % len(index)  # type: ignore[arg-type]
    assert isinstance(parts, list | tuple)
    at, values = index[dim], []
    if at is None:
        return None
    for position, part in enumerate(parts):
        assert isinstance(part, Node)
        single = _is_one(val(part).shape[dim])
        if not single and position < len(parts) - 1:
            return None
        value = integer(part, (*index[:dim], ZERO if single else at.plus(-position), *index[dim + 1 :]))
        if value is None:
            return None
        values.append((position, single, value))
    rule = values[-1][-1]
    agree = (_agrees(rule, value, at, position) for position, single, value in values if single)
    return rule if all(agree) else None


def _agrees(rule: Affine, value: Affine, at: Affine, position: int) -> bool:
    """Whether `rule`, which counts with the axis at `at`, is `value` at one position of that axis."""
    slopes = {(1, 0): rule.query, (0, 1): rule.key}
    slope = slopes.pop((at.query, at.key), None)
    if slope is None or any(slopes.values()) or (value.query, value.key) != (0, 0):
        return False
    return same_size(rule.rest + slope * (position - at.rest), value.rest)


def _picked(node: Node, index: Index) -> Affine | None:
    """Numbers read at positions that are affine themselves, or unknown, such as that of a row of the batch."""
    source, picks = node.args[:2]
    assert isinstance(source, Node) and isinstance(picks, list | tuple)
    if len(picks) != val(source).dim() or not all(isinstance(p, Node) for p in picks):
        return None
    return integer(source, tuple(integer(p, broadcast(index, val(p))) for p in picks if isinstance(p, Node)))


def _counted(node: Node, index: Index) -> Affine | None:
    """Running sums of what is never true, wherever along their axis."""
    source, dim = node.args[0], int(argument(node, "dim")) % len(index)  # type: ignore[arg-type]
    others = [at for axis, at in enumerate(index) if axis != dim and at is not None]
    anywhere = QUERY if any(at.key for at in others) else KEY
    if any(at.key for at in others) and any(at.query for at in others):
        return None
    whole = (*index[:dim], anywhere, *index[dim + 1 :])
    never = isinstance(source, Node) and val(source).dtype == torch.bool and truth(source, whole) == (NEVER,)
    return ZERO if never else None


_INTEGERS: Mapping[object, Callable[[Node, Index], Affine | None]] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum(-1, swap=True)),
    **dict.fromkeys((aten.full.default, aten.scalar_tensor.default), _filled),
    aten._to_copy.default: lambda node, index: integer(node.args[0], index),
    aten.neg.default: lambda node, index: _negated(integer(node.args[0], index)),
    aten.cat.default: _joined,
    aten.index.Tensor: _picked,
    aten.cumsum.default: _counted,
}


def _negated(value: Affine | None) -> Affine | None:
    return None if value is None else value.times(-1)


# ---- booleans


def truth(node: Node, index: Index) -> Terms | None:
    """Where a node is true (not zero), as a conjunction of terms, or None where that is not known."""
    if (seen := through_view(node, index)) is not None:
        return truth(*seen)
    rule = _TRUTHS.get(node.target)
    return None if rule is None else rule(node, index)


def negated(terms: Terms | None) -> Terms | None:
    """Where a conjunction does not hold; known for no more than one term."""
    if terms is None or len(terms) > 1:
        return None
    return tuple(t.times(-1).plus(-1) for t in terms) or (NEVER,)


TruthRule = Callable[[Node, Index], Terms | None]


def _less(swap: bool, strict: bool) -> TruthRule:
    """a <= b, or a < b where `strict`, of the operands, or of the operands swapped."""

    def rule(node: Node, index: Index) -> Terms | None:
        low, high = reversed(node.args[:2]) if swap else node.args[:2]
        gap = -1 if strict else 0
        if isinstance(low, Node) and low.target is aten.abs.default:
            inner, bound = _operand(low.args[0], index), _operand(high, index)
            if inner is None or bound is None:
                return None
            return (bound - inner).plus(gap), (bound + inner).plus(gap)
        a, b = _operand(low, index), _operand(high, index)
        return None if a is None or b is None else ((b - a).plus(gap),)

    return rule


def _and(node: Node, index: Index) -> Terms | None:
    a, b = (_truth_of_operand(x, index) for x in node.args[:2])
    return None if a is None or b is None else (*a, *b)


def _or(node: Node, index: Index) -> Terms | None:
    a, b = (_truth_of_operand(x, index) for x in node.args[:2])
    if a == (NEVER,):
        return b
    if b == (NEVER,):
        return a
    return () if a == () or b == () else None


def _truth_of_operand(value: object, index: Index) -> Terms | None:
    if isinstance(value, Node):
        return truth(value, broadcast(index, val(value)))
    return () if value else (NEVER,)


def _not(node: Node, index: Index) -> Terms | None:
    source = node.args[0]
    if not isinstance(source, Node) or (node.target is aten.bitwise_not.default and val(source).dtype != torch.bool):
        return None
    return negated(truth(source, index))


def _equal(negate: bool) -> TruthRule:
    """a == b, or a != b where `negate`, where they differ by the same number everywhere."""

    def rule(node: Node, index: Index) -> Terms | None:
        a, b = (_operand(x, index) for x in node.args[:2])
        difference = None if a is None or b is None else a - b
        if difference is None or (difference.query, difference.key) != (0, 0):
            return None
        rest = constant(difference.rest)
        return None if rest is None else () if (rest == 0) != negate else (NEVER,)

    return rule


def _compared_with_zero(negate: bool) -> TruthRule:
    def rule(node: Node, index: Index) -> Terms | None:
        source, number = node.args[:2]
        if (fixed := _equal(not negate)(node, index)) is not None:
            return fixed
        if isinstance(number, Node) or number != 0 or not isinstance(source, Node):
            return None
        terms = truth(source, broadcast(index, val(source)))
        return negated(terms) if negate else terms

    return rule


def _triangle(sign: int) -> TruthRule:
    """tril (sign 1) keeps columns up to row + diagonal, triu (sign -1) those from there on."""

    def rule(node: Node, index: Index) -> Terms | None:
        source, diagonal = node.args[0], known(argument(node, "diagonal"))
        assert isinstance(source, Node)
        row, column = index[-2:]
        kept = truth(source, index)
        if row is None or column is None or kept is None or not isinstance(diagonal, int | SymInt):
            return None
        return (*kept, (row - column).plus(diagonal).times(sign))

    return rule


def _constant(node: Node, index: Index) -> Terms | None:
    value = known(argument(node, "s" if node.target is aten.scalar_tensor.default else "fill_value"))
    if not isinstance(value, bool | int | float):
        return None
    return () if value else (NEVER,)


def _cast(node: Node, index: Index) -> Terms | None:
    """Fractions may become the integer zero."""
    source, dtype = node.args[0], val(node).dtype
    assert isinstance(source, Node)
    truncates = val(source).dtype.is_floating_point and not dtype.is_floating_point and dtype != torch.bool
    return None if truncates else truth(source, index)


_TRUTHS: Mapping[object, TruthRule] = {
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _less(swap=False, strict=False)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _less(swap=False, strict=True)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _less(swap=True, strict=False)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _less(swap=True, strict=True)),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default), _and),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default), _or),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _not),
    aten.eq.Tensor: _equal(negate=False),
    aten.ne.Tensor: _equal(negate=True),
    aten.eq.Scalar: _compared_with_zero(negate=True),
    aten.ne.Scalar: _compared_with_zero(negate=False),
    aten.tril.default: _triangle(1),
    aten.triu.default: _triangle(-1),
    **dict.fromkeys((aten.ones.default, aten.new_ones.default, aten.ones_like.default), lambda node, index: ()),
    **dict.fromkeys(
        (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default), lambda node, index: (NEVER,)
    ),
    **dict.fromkeys((aten.full.default, aten.scalar_tensor.default, aten.full_like.default), _constant),
    aten._to_copy.default: _cast,
}
