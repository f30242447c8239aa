"""How single operators treat positions: the rules of passes/relations.py.

Most only move axes (passes/axis_maps.py). Those that know of positions have a rule of their own here: views
that merge axes, slices, concatenation, running sums, triangles, tables looked up by position, attention.
"""

from collections.abc import Mapping
from dataclasses import replace

import sympy
import torch
from torch import SymInt
from torch.fx import Node

from llmcomp.graph import argument, known, source, tensors, val
from llmcomp.passes.axis_maps import MAPS, Use, Uses, broadcast, dims, result_axis
from llmcomp.passes.positions import QUERY, integer
from llmcomp.passes.relations import (
    INDEPENDENT,
    LAST,
    Along,
    Kind,
    Mixing,
    Reader,
    Relation,
    Rule,
    expression,
    joined,
    reads_length,
)

aten, ops = torch.ops.aten, torch.ops.llmcomp

SHAPED = (aten.expand.default, aten.repeat.default)  # their numbers are sizes


def mapped(uses: Uses) -> Rule:
    """The rule of an operator that keeps positions apart: each axis goes where `uses` says."""

    def rule(reader: Reader, node: Node) -> Relation:
        if node.target not in SHAPED and reads_length(reader, node):
            raise Mixing(node, "it computes with the length of the sequence")
        return moved(reader, node, uses(node))

    return rule


def moved(reader: Reader, node: Node, uses: tuple[Use, ...], table: Node | None = None) -> Relation:
    """The relation of a result whose axes come from those of operands as `uses` says, or else from `table`, which
    may be read anywhere.
    """
    along: dict[int, Along] = {}
    covered = {use.operand for use in uses}
    for operand in node.all_input_nodes:
        if operand is not table and operand not in covered and reader.relation(operand).along:
            raise Mixing(node, f"it mixes the positions of {operand.name}")
    for use in uses:
        for a in reader.relation(use.operand).along:
            if a.axis not in use.axes:
                raise Mixing(node, f"it mixes the positions of {use.operand.name}")
            here = replace(a, axis=use.axes[a.axis])
            if along.setdefault(here.axis, here) != here:
                raise Mixing(node, "its operands have different positions side by side")
    return joined([reader.relation(n) for n in covered], tuple(along[d] for d in sorted(along)))


# ---- views


def reshaped(reader: Reader, node: Node) -> Relation:
    """A view keeps the order of elements: how far apart two positions are tells the axis that they are along."""
    x, result = source(node), val(node)
    relation = reader.relation(x)
    along = []
    for a in relation.along:
        if a.extra:
            raise Mixing(node, f"it merges an axis of s + {a.extra} elements")
        step = sympy.expand(a.inner * _product(val(x).shape[a.axis + 1 :]))
        along.append(_found(reader, node, result.shape, step))
    return replace(relation, along=tuple(along)) if along else relation


def _found(reader: Reader, node: Node, shape: torch.Size, step: sympy.Expr) -> Along:
    """The axis of `shape` along which positions, `step` elements apart, follow each other."""
    for axis, size in enumerate(shape):
        inner = _quotient(step, _product(shape[axis + 1 :]))
        outer = None if inner is None else _quotient(expression(size), reader.length * inner)
        if inner is not None and outer is not None and reader.length not in (inner * outer).free_symbols:
            return Along(axis, inner)
    raise Mixing(node, f"its shape {tuple(shape)} splits positions")


def _product(sizes: torch.Size) -> sympy.Expr:
    return sympy.prod([expression(n) for n in sizes], start=sympy.Integer(1))


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b where that is a whole number for all sizes."""
    value = sympy.cancel(a / b)
    numerator, denominator = sympy.fraction(value)
    return None if denominator != 1 else sympy.expand(numerator)


def _slice(reader: Reader, node: Node) -> Relation:
    x = source(node)
    axis = _axis(node)
    here = reader.relation(x).at(axis)
    if here is None and reader.relation(x) == INDEPENDENT and reader.long(val(node).shape[axis]):
        return _table(reader, node, axis)
    if here is None:
        return mapped(MAPS[node.target])(reader, node)
    if argument(node, "step") != 1 or here.inner != 1:
        raise Mixing(node, "it leaves out positions")
    return _part(reader, node, here, val(node).shape[axis])


def _table(reader: Reader, node: Node, axis: int) -> Relation:
    """The first entries of a table, one for each position."""
    extra = reader.beyond(val(node).shape[axis])
    if not part_start(node).is_Integer or extra is None or argument(node, "step") != 1:
        raise Mixing(node, "it starts at a position that depends on the length")
    return joined([], (Along(axis, extra=extra),))


def _select(reader: Reader, node: Node) -> Relation:
    x, axis = source(node), _axis(node)
    here = reader.relation(x).at(axis)
    if here is None:
        return mapped(MAPS[node.target])(reader, node)
    return _part(reader, node, here, 1)


def _axis(node: Node) -> int:
    return int(argument(node, "dim")) % val(source(node)).dim()  # type: ignore[arg-type]


def part_start(node: Node) -> sympy.Expr:
    """Where a slice or a selection begins, counted from the first element."""
    size = expression(val(source(node)).shape[_axis(node)])
    given = known(argument(node, "start" if node.target is aten.slice.Tensor else "index")) or 0
    assert isinstance(given, int | SymInt)
    if isinstance(given, int):
        return sympy.Integer(given) if given >= 0 else sympy.expand(size + given)
    return sympy.expand(expression(given))


def _part(reader: Reader, node: Node, here: Along, size: int | SymInt) -> Relation:
    """A part of an axis along the sequence: what starts at a fixed index goes on; what ends it is its last part."""
    relation, start = reader.relation(source(node)), part_start(node)
    if not reader.long(size):
        back = sympy.expand(reader.length + here.extra - start)
        if back.is_Integer and len(relation.along) == 1:
            return LAST
        if start.is_Integer and relation.ahead is None and len(relation.along) == 1:
            return INDEPENDENT  # what the first positions are is known, whatever their content
        raise Mixing(node, "it takes some positions out of the sequence")
    extra = reader.beyond(size)
    if not start.is_Integer or extra is None:
        raise Mixing(node, "it starts at a position that depends on the length")
    along = tuple(replace(a, extra=extra) if a is here else a for a in relation.along)
    ahead = None if relation.ahead is None else relation.ahead + int(start)
    return replace(relation, along=along, ahead=ahead)


# ---- along the sequence


def _cat(reader: Reader, node: Node) -> Relation:
    joint = result_axis(node)
    *head, tail = tensors(node)
    if not reader.long(val(node).shape[joint]):
        return mapped(MAPS[aten.cat.default])(reader, node)
    relation, here = reader.relation(tail), reader.relation(tail).at(joint)
    before = sympy.expand(sum(expression(val(n).shape[joint]) for n in head))
    extra = reader.beyond(val(node).shape[joint])
    fixed = all(reader.relation(n) == INDEPENDENT for n in head)
    if here is None or not fixed or not before.is_Integer or extra is None or len(relation.along) > 1:
        raise Mixing(node, "it puts something behind the sequence")
    ahead = None if relation.ahead is None else relation.ahead - int(before)
    return replace(relation, along=(replace(here, extra=extra),), ahead=ahead)


def _running(reader: Reader, node: Node) -> Relation:
    """Sums and products over what came before."""
    relation = reader.relation(source(node))
    here = relation.at(_axis(node))
    if here is None:
        return mapped(MAPS[node.target])(reader, node)
    if here.inner != 1 or expression(val(node).shape[here.axis]) != reader.length + here.extra:
        raise Mixing(node, "it runs over more than the sequence")
    return replace(relation, kind=Kind.CAUSAL)


def _triangle(reader: Reader, node: Node) -> Relation:
    if reads_length(reader, node):
        raise Mixing(node, "its diagonal depends on the length of the sequence")
    return reader.relation(source(node))


def _created(reader: Reader, node: Node) -> Relation:
    """Constants as long as the sequence, and counting."""
    value = val(node)
    along = []
    for axis in reader.long_axes(value):
        extra = reader.beyond(value.shape[axis])
        inner = _quotient(expression(value.shape[axis]), reader.length)
        if extra is None and (inner is None or reader.length in inner.free_symbols):
            raise Mixing(node, f"its shape {tuple(value.shape)} has no plain axis along the sequence")
        along.append(Along(axis, inner or sympy.Integer(1), extra or 0))
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for name in ("start", "step", "fill_value"):
        number = known(argument(node, name)) if name in names else 0
        if isinstance(number, SymInt | torch.SymFloat) and reader.length in expression(number).free_symbols:
            raise Mixing(node, "it counts from the end of the sequence")
    return joined([], tuple(along))


def looked_up(reader: Reader, node: Node) -> Relation:
    """x[..., i, j, ...]: elements of x picked by tensors of indices."""
    x, picks = source(node), indices(node)
    if picks is None:
        raise Mixing(node, "its indices are not side by side")
    first, found = picks
    uses = index_uses(node, first, found)
    relation = reader.relation(x)
    inside = [a for a in relation.along if first <= a.axis < first + len(found)]
    if not inside:
        return moved(reader, node, uses)
    if relation.ahead is None and all(reader.relation(n).ahead is None for n in found):
        rest = moved(reader, node, uses[1:], table=x)
        return joined([], rest.along)
    if len(inside) > 1 or len(relation.along) > 1:
        raise Mixing(node, "it picks pairs of positions")
    shift = _shift(reader, found[inside[0].axis - first])
    if shift is None:
        raise Mixing(node, "it picks positions that depend on content")
    rest = moved(reader, node, uses[1:], table=x)
    ahead = None if relation.ahead is None else relation.ahead + shift
    return replace(relation, along=rest.along, ahead=ahead)


def _gathered(reader: Reader, node: Node) -> Relation:
    """Entries picked along one axis; along the sequence only where neither entries nor indices depend on content."""
    x, picked = reader.relation(source(node)), reader.relation(source(node, 2))
    if x.at(_axis(node)) is not None and x.ahead is None and picked.ahead is None:
        return joined([], picked.along)
    return mapped(MAPS[node.target])(reader, node)


def _sorted(reader: Reader, node: Node) -> Relation:
    """The numbers of experts, sorted: passes/relation_experts.py says what may come of it."""
    relation = reader.relation(source(node))
    if relation.along and val(source(node)).dim() == 1:
        return replace(relation, order=node)
    return mapped(MAPS[node.target])(reader, node)


def _shift(reader: Reader, picked: Node) -> int | None:
    """k where the indices are each its own position + k."""
    axes = reader.relation(picked).axes
    if len(axes) != 1:
        return None
    at = integer(picked, tuple(QUERY if d in axes else None for d in range(val(picked).dim())))
    fixed = at is not None and (at.query, at.key) == (1, 0) and isinstance(at.rest, int)
    return int(at.rest) if fixed and at is not None else None


def indices(node: Node) -> tuple[int, list[Node]] | None:
    """(the first indexed axis, the tensors of indices) of a call of aten.index, None where they are not adjacent."""
    given = node.args[1]
    assert isinstance(given, list | tuple)
    axes = [i for i, n in enumerate(given) if n is not None]
    if not axes or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    found = [given[i] for i in axes]
    whole = all(isinstance(n, Node) and val(n).dtype in (torch.int64, torch.int32) for n in found)
    return (axes[0], [n for n in found if isinstance(n, Node)]) if whole else None


def index_uses(node: Node, first: int, found: list[Node]) -> tuple[Use, ...]:
    """The operands of aten.index: x with the axes that are not indexed, and the indices, which take their place."""
    x, rank = source(node), max(val(n).dim() for n in found)
    count = len(found)
    kept = {d: d if d < first else d + rank - count for d in range(val(x).dim()) if not first <= d < first + count}
    uses = [Use(x, kept)]
    for n in found:
        shift = first + rank - val(n).dim()
        uses.append(Use(n, {d: d + shift for d in range(val(n).dim()) if val(n).shape[d] != 1}))
    return tuple(uses)


# ---- attention


def _attention(reader: Reader, node: Node) -> Relation:
    q, k, v = (source(node, i) for i in range(3))
    mask, causal, offset = (argument(node, name) for name in ("mask", "causal", "offset"))
    queries, keys, values, hidden = (reader.relation(n) for n in (q, k, v, mask))
    if not keys.along and not values.along:
        return _across(reader, node, queries, hidden)
    plain = all(r.axes == (2,) and r.along[0] == Along(2) for r in (keys, values))
    if not plain or queries.along != (Along(2),):
        raise Mixing(node, "queries, keys and values are not along the sequence alike")
    if not causal:
        raise Mixing(node, "it is attention that is not causal")
    ahead = known(offset)
    if not isinstance(ahead, int):
        raise Mixing(node, "its queries are at positions that depend on the length")
    if not set(hidden.along) <= {Along(2), Along(3)}:
        raise Mixing(node, "its mask is not along the sequence as queries and keys are")
    furthest = [queries.ahead, *(r.ahead + ahead for r in (keys, values, hidden) if r.ahead is not None)]
    return Relation(Kind.CAUSAL, (Along(2),), max([a for a in furthest if a is not None], default=None))


def _across(reader: Reader, node: Node, queries: Relation, hidden: Relation) -> Relation:
    """Attention to something else, such as the states of an encoder."""
    if known(argument(node, "offset")) != 0 or argument(node, "causal") or argument(node, "window"):
        if queries.along or hidden.along:
            raise Mixing(node, "it counts positions of another sequence")
        return INDEPENDENT
    if not set(queries.axes) <= {0, 1, 2} or not set(hidden.axes) <= {0, 1, 2}:
        raise Mixing(node, "it mixes positions")
    uses = [Use(source(node), {0: 0, 1: 1, 2: 2})]
    mask = argument(node, "mask")
    if isinstance(mask, Node):
        uses.append(Use(mask, {0: 0, 1: 1, 2: 2}))
    return moved(reader, node, tuple(uses))


def _reversed(reader: Reader, node: Node) -> Relation:
    if any(reader.relation(source(node)).at(d) for d in dims(node, "dims")):
        raise Mixing(node, "it reverses the sequence")
    return mapped(lambda n: (Use(source(n), {d: d for d in range(val(n).dim())}),))(reader, node)


CREATIONS = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.zeros.default,
    aten.ones.default, aten.scalar_tensor.default,
)  # fmt: skip
CREATIONS_LIKE = (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default)
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
RUNNING = (aten.cumsum.default, aten.cumprod.default)

RULES: Mapping[object, Rule] = {
    **{target: mapped(uses) for target, uses in MAPS.items()},
    **dict.fromkeys(RESHAPES, reshaped),
    **dict.fromkeys(RUNNING, _running),
    **dict.fromkeys((*CREATIONS, *CREATIONS_LIKE), _created),
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangle),
    aten.gather.default: _gathered,
    **dict.fromkeys((aten.sort.default, aten.sort.stable), _sorted),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.flip.default: _reversed,
    aten.index.Tensor: looked_up,
    ops.attention.default: _attention,
}
"""By operator."""

POINTWISE = mapped(broadcast)
"""Of operators that torch tags as pointwise."""
