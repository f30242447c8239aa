"""How experts treat positions: rows are sorted by expert, computed expert by expert, and put back.

    ids = view(topk(router(x)), [2 * s])
    sorted, order = sort(ids)
    rows = x[order // 2]                                   in the order of the sort
    ends = cumsum(histc(sorted))                           a tally
    rows = grouped_linear(rows, w, ends)                   each row with the matrix of its own expert
    inverse[order] = arange(2 * s);  y = rows[inverse]     positions again

Where a row stands depends on all positions; what it holds depends on its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import sympy
import torch
from torch.fx import Node

from llmcomp.graph import source, val
from llmcomp.passes.axis_maps import MAPS, broadcast
from llmcomp.passes.relation_rules import RESHAPES, indices, looked_up, mapped, reshaped
from llmcomp.passes.relations import Along, Kind, Mixing, Reader, Relation, is_pointwise
from llmcomp.products import GROUPED, PACKED_GROUPED, ends_of, operand_of

aten = torch.ops.aten

COUNTS = (aten.histc.default, aten.bincount.default)


def ordered(reader: Reader, node: Node) -> Relation:
    """The relation of a call of which some operand is sorted, or counts what was sorted.

    Raises:
        Mixing: it is not one of the calls that experts are made of.
    """
    order = _order(reader, node)
    special = _RULES.get(node.target)
    if special is not None:
        return special(reader, node, order)
    if any(reader.relation(n).kind is Kind.TALLY for n in node.all_input_nodes):
        raise Mixing(node, "it computes with counts over positions")
    if any(r.along and r.order is None for r in map(reader.relation, node.all_input_nodes)):
        raise Mixing(node, "it brings sorted positions and positions together")
    if node.target in MAPS:
        return replace(mapped(MAPS[node.target])(reader, node), order=order)
    if is_pointwise(node):
        return replace(mapped(broadcast)(reader, node), order=order)
    raise Mixing(node, f"no rule says how {node.target} treats sorted positions")


def _order(reader: Reader, node: Node) -> Node:
    orders = {r.order for n in node.all_input_nodes if (r := reader.relation(n)).order is not None}
    if len(orders) != 1:
        raise Mixing(node, "its operands are sorted in different orders")
    (order,) = orders
    assert order is not None
    return order


def _viewed(reader: Reader, node: Node, order: Node) -> Relation:
    relation, before = reshaped(reader, node), reader.relation(source(node))
    if [a.inner for a in relation.along] != [a.inner for a in before.along]:
        raise Mixing(node, "it puts sorted rows side by side")
    return relation


def _counted(reader: Reader, node: Node, order: Node) -> Relation:
    return Relation(Kind.TALLY, order=order, computed=True)


def _cast(reader: Reader, node: Node, order: Node) -> Relation:
    relation = reader.relation(source(node))
    return relation if relation.kind is Kind.TALLY else replace(mapped(broadcast)(reader, node), order=order)


def _summed(reader: Reader, node: Node, order: Node) -> Relation:
    """Running sums of counts: where the rows of each expert end."""
    relation = reader.relation(source(node))
    if relation.kind is not Kind.TALLY:
        raise Mixing(node, "it runs over sorted positions")
    return relation


def _product(reader: Reader, node: Node, order: Node) -> Relation:
    rows, weights, ends = operand_of(node), node.all_input_nodes[1:], ends_of(node)
    assert ends is not None
    relation = reader.relation(rows)
    tally = Relation(Kind.TALLY, order=order, computed=True)
    if any(reader.relation(w).along for w in weights if w is not ends) or reader.relation(ends) != tally:
        raise Mixing(node, "its rows are not those of the experts that it counts")
    if not _counts_experts(ends, order) or relation.order is not order or relation.axes != (0,):
        raise Mixing(node, "its rows are not sorted by expert")
    return relation


def _counts_experts(ends: Node, order: Node) -> bool:
    """Whether `ends` are running sums of the counts of what `order` sorts: 0, 1, ... up to the last expert."""
    if ends.target is not aten.cumsum.default:
        return False
    counts = source(ends)
    while counts.target is aten._to_copy.default:
        counts = source(counts)
    if counts.target is aten.histc.default:
        bins, low, high = counts.args[1:4]
        if low != 0 or not isinstance(bins, int) or high != bins - 1:
            return False
    elif counts.target is not aten.bincount.default or len(counts.args) > 2 and counts.args[1] is not None:
        return False
    counted = source(counts)
    while counted.target is aten._to_copy.default:
        counted = source(counted)
    return counted is source(order) or (counted.args[:2] == (order, 0))


def _picked(reader: Reader, node: Node, order: Node) -> Relation:
    """Rows in the order of the sort, or rows of a sort back at their positions."""
    x, picks = source(node), indices(node)
    relation = reader.relation(x)
    if picks is None or len(picks[1]) != 1:
        raise Mixing(node, "it picks rows by several indices")
    first, (picked,) = picks
    if not relation.along:
        return replace(looked_up(reader, node), order=order)
    if relation.axes != (0,) or first != 0 or val(picked).dim() != 1:
        raise Mixing(node, "it picks rows along another axis")
    (here,) = relation.along
    if relation.order is order and is_inverse(picked, order):
        return replace(relation, order=None)
    width = permuted(picked, order)
    (sorted_along,) = reader.relation(order).along
    if relation.order is not None or width is None or sympy.expand(here.inner * width) != sorted_along.inner:
        raise Mixing(node, "it picks rows that are not those of the sort")
    return replace(relation, along=(Along(0, sorted_along.inner),), order=order)


def permuted(picked: Node, order: Node) -> int | None:
    """k where the indices are order // k, the places of the sorted elements, else None."""
    if picked.args[:2] == (order, 1):
        return 1
    if picked.target in (aten.floor_divide.default, aten.div.Tensor_mode) and isinstance(picked.args[1], int):
        rounds_down = picked.target is aten.floor_divide.default or picked.kwargs.get("rounding_mode") == "floor"
        return picked.args[1] if rounds_down and permuted(source(picked), order) == 1 else None
    return None


def is_inverse(picked: Node, order: Node) -> bool:
    """Whether the indices lead back from the order of a sort: arange put where the sorted elements were."""
    if picked.target is not aten.index_put.default or len(picked.args) > 3 and picked.args[3]:
        return False
    places, counted = picked.args[1:3]
    assert isinstance(places, list | tuple) and isinstance(counted, Node)
    plain = counted.target is aten.arange.default and len(counted.args) == 1
    return plain and len(places) == 1 and isinstance(places[0], Node) and permuted(places[0], order) == 1


def _inverse(reader: Reader, node: Node, order: Node) -> Relation:
    if not is_inverse(node, order):
        raise Mixing(node, "it writes at positions that depend on content")
    return reader.relation(order)


_RULES: Mapping[object, Callable[[Reader, Node, Node], Relation]] = {
    **dict.fromkeys(RESHAPES, _viewed),
    **dict.fromkeys(COUNTS, _counted),
    **dict.fromkeys((aten.cumsum.default,), _summed),
    aten._to_copy.default: _cast,
    **dict.fromkeys((GROUPED, PACKED_GROUPED), _product),
    aten.index.Tensor: _picked,
    aten.index_put.default: _inverse,
}
