"""Which positions of each node a cached graph has to compute: only the new ones, or all.

    mask[i, j] = j <= i        queries i: the new ones; keys j: all
    keys                       computed for the new ones, kept for the others: a slot
    position ids               all of them where somebody reads all: they are cheap

Demands go from results to inputs. A version of a node is the set of its axes that are cut to the new positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch.fx import Graph, Node

from llmcomp.graph import is_tensor, source, val
from llmcomp.passes.axis_maps import Use, axis_map, result_axis
from llmcomp.passes.groups import NOTATIONS
from llmcomp.passes.relation_rules import CREATIONS_LIKE, RESHAPES, RUNNING, index_uses, indices, part_start
from llmcomp.passes.relations import Kind, Mixing, Relation, expression

aten, ops = torch.ops.aten, torch.ops.llmcomp

Version = frozenset[int]
WHOLE: Version = frozenset()
PARTS = (aten.slice.Tensor, aten.select.int)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)


@dataclass
class Demands:
    """The versions of each node that are wanted, and the nodes to be kept."""

    versions: dict[Node, set[Version]] = field(default_factory=dict)
    kept: list[Node] = field(default_factory=list)


def find_demands(graph: Graph, results: Sequence[Node], relations: dict[Node, Relation]) -> Demands:
    """What has to be computed for `results`, of which all positions are wanted.

    Raises:
        Mixing: all positions of something are wanted that cannot be kept.
    """
    demands = Demands()
    for node in results:
        _demand(demands, relations, content(node, relations), WHOLE)
    for node in reversed(graph.nodes):
        for version in sorted(demands.versions.get(node, ()), key=sorted):
            for operand, wanted in operands(node, version, relations):
                _demand(demands, relations, operand, wanted)
    order = {n: i for i, n in enumerate(graph.nodes)}
    demands.kept.sort(key=order.__getitem__)
    return demands


def content(result: Node, relations: dict[Node, Relation]) -> Node:
    """The node that is kept for a result of the graph, which may be a copy of it; `result` where nothing is."""
    node = result
    while node.target in COPIES:
        node = source(node)
    relation = relations.get(node)
    return node if relation is not None and relation.computed and relation.along else result


def _demand(demands: Demands, relations: dict[Node, Relation], node: Node, version: Version) -> None:
    relation = relations.get(node)
    kept = relation is not None and relation.computed and relation.along and not version and node.op != "placeholder"
    if kept and node.target not in NOTATIONS:  # of these what they are made of is kept
        assert relation is not None
        if node not in demands.kept:
            _check_kept(node, relation)
            demands.kept.append(node)
        version = frozenset(relation.axes)
    demands.versions.setdefault(node, set()).add(version)


def _check_kept(node: Node, relation: Relation) -> None:
    if len(relation.along) != 1 or relation.along[0].inner != 1:
        raise Mixing(node, "all pairs of positions of it are wanted")
    if not is_tensor(node):
        raise Mixing(node, "it has several results")
    if (relation.ahead or 0) > 0:
        raise Mixing(node, f"it looks {relation.ahead} positions ahead")


def operands(node: Node, version: Version, relations: dict[Node, Relation]) -> Iterator[tuple[Node, Version]]:
    """The versions of the tensor operands that a version of `node` is computed from."""
    for n in node.all_input_nodes:
        yield n, operand_version(node, n, version, relations)
    if node.target is ops.attention.default:  # keys may be the queries, too
        yield from ((source(node, i), attention_version(node, i, version, relations)) for i in range(3))


def operand_version(node: Node, operand: Node, version: Version, relations: dict[Node, Relation]) -> Version:
    """Which axes of an operand are cut to the new positions for a version of `node`."""
    relation, theirs = relations.get(node), relations.get(operand)
    if relation is None or theirs is None or not theirs.along:
        return WHOLE
    if relation.kind is Kind.LAST:
        return frozenset(theirs.axes) if theirs.computed and takes_last(node, relations) else WHOLE
    if sorts(node, relations):
        return frozenset(theirs.axes)  # rows of experts are wanted only of the new positions
    if node.target in CREATIONS_LIKE:
        return frozenset(theirs.axes) if theirs.computed else WHOLE  # read for its dtype alone
    if node.target in RESHAPES:
        pairs = zip(theirs.axes, relation.axes, strict=True)
        return frozenset(a for a, r in pairs if r in version)
    if node.target is ops.attention.default:
        at = next(i for i, a in enumerate(node.args) if a is operand)
        return attention_version(node, at, version, relations)
    if cuts_after(node, relations):
        return WHOLE
    for use in uses(node):
        if use.operand is operand:
            return frozenset(a for a in theirs.axes if use.axes.get(a) in version)
    return WHOLE


def sorts(node: Node, relations: dict[Node, Relation]) -> bool:
    """Whether a call sorts positions, or has to do with sorted ones."""
    nearby = (node, *node.all_input_nodes)
    return any((r := relations.get(n)) is not None and r.order is not None for n in nearby)


def attention_version(node: Node, position: int, version: Version, relations: dict[Node, Relation]) -> Version:
    """The version of an operand of attention: queries and the rows of the mask are cut, keys and values are not."""
    operand = node.args[position]
    theirs = relations.get(operand) if isinstance(operand, Node) else None
    if theirs is None or (position in (1, 2) and 2 in theirs.axes):
        return WHOLE
    return frozenset(a for a in theirs.axes if a in version and a != 3)


def cuts_after(node: Node, relations: dict[Node, Relation]) -> bool:
    """Whether the new positions of a node are cut out of all of them: where positions move, or run."""
    axes = relations[node].axes
    if node.target not in (*RUNNING, aten.cat.default, aten.slice.Tensor) or sorts(node, relations):
        return False
    return result_axis(node) in axes


def uses(node: Node) -> tuple[Use, ...]:
    """The operands of a call with the axes of its result that theirs become.

    Raises:
        Mixing: it is a size, which differs between the whole and the new positions.
    """
    if node.target is aten.sym_size.int:
        raise Mixing(node, "it is a size of something computed")
    if node.target is aten.index.Tensor:
        picks = indices(node)
        assert picks is not None
        return index_uses(node, *picks)
    return axis_map(node)


def takes_last(node: Node, relations: dict[Node, Relation]) -> bool:
    """Whether a part of the sequence is its last position, which every call computes."""
    if node.target not in PARTS:
        return False
    (along,) = relations[source(node)].along
    taken = 1 if node.target is aten.select.int else val(node).shape[along.axis]
    return bool(taken == 1) and from_end(node, relations) == 1


def from_end(node: Node, relations: dict[Node, Relation]) -> int:
    """How many elements from the end of the sequence a part of it begins."""
    (along,) = relations[source(node)].along
    return int(sympy.expand(expression(val(source(node)).shape[along.axis]) - part_start(node)))
