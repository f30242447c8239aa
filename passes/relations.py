"""How the nodes of a graph depend on the positions of a sequence: the proof that a KV cache stands on.

    x = embedding(w, ids)           local      element i looks at position i
    y = attention(q, k, v) causal   causal     element i looks at positions up to i
    z = y[:, -1]                    last       grows with no axis: computed anew by every call
    m = mean(y, 1)                  mixing     no cache: what was computed before is wrong for a longer sequence

The sequence is a size symbol s. What holds of every related node: no element changes when the sequence gets
longer. Position i of the sequence is index i along each axis of the node that runs along it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import sympy
import torch
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from llmcomp.graph import Size, is_random, is_tensor, known, val, written


class Kind(Enum):
    """What an element at a position looks at."""

    INDEPENDENT = "independent"  # nothing of the sequence
    LOCAL = "local"  # its own position
    CAUSAL = "causal"  # positions up to its own
    LAST = "last"  # the whole sequence; the node itself has no axis along it
    TALLY = "tally"  # counts of something over positions, see passes/relation_experts.py


@dataclass(frozen=True)
class Along:
    """An axis along the sequence, of outer * s * inner elements (the position is the middle digit), or of s + extra."""

    axis: int
    inner: sympy.Expr = sympy.Integer(1)
    extra: int = 0


@dataclass(frozen=True)
class Relation:
    """What a node has to do with the sequence.

    `ahead` is how far beyond its own position an element may look (negative: it looks back), None where it
    depends on the position alone, not on the content. `computed`: floating-point work went into it, which
    a cache saves; what is not computed (positions, masks) is as cheap to make again. `order` is the sort whose
    order the elements are in, where they were sorted (the rows of experts).
    """

    kind: Kind
    along: tuple[Along, ...] = ()
    ahead: int | None = None
    computed: bool = False
    order: Node | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along the sequence."""
        return tuple(a.axis for a in self.along)

    def at(self, axis: int) -> Along | None:
        """What is known of one axis along the sequence."""
        return next((a for a in self.along if a.axis == axis), None)


INDEPENDENT = Relation(Kind.INDEPENDENT)
LAST = Relation(Kind.LAST, computed=True)


class Mixing(Exception):
    """A node of whose elements some may change when the sequence gets longer, or which no rule covers."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(f"{node.name}: {reason}")
        self.node, self.reason = node, reason


Rule = Callable[["Reader", Node], Relation]


@dataclass(frozen=True)
class Rules:
    """What to ask about a call: by operator, of all that torch tags as pointwise, and where operands are sorted."""

    by_operator: Mapping[object, Rule]
    pointwise: Rule
    ordered: Rule


@dataclass(frozen=True)
class Reader:
    """What a rule may ask: the sequence, the relations of earlier nodes, the sizes of tensors."""

    length: sympy.Symbol
    relations: dict[Node, Relation]

    def relation(self, node: object) -> Relation:
        """The relation of an operand; whatever is no tensor node is independent."""
        return self.relations.get(node, INDEPENDENT) if isinstance(node, Node) else INDEPENDENT

    def long(self, size: Size) -> bool:
        """Whether a size depends on the length of the sequence."""
        return self.length in expression(size).free_symbols

    def long_axes(self, value: Tensor) -> tuple[int, ...]:
        """The axes of a tensor whose size depends on the length."""
        return tuple(d for d, n in enumerate(value.shape) if self.long(n))

    def beyond(self, size: Size) -> int | None:
        """k where `size` is s + k, else None."""
        rest = sympy.expand(expression(size) - self.length)
        return int(rest) if rest.is_Integer else None


def expression(size: Size | torch.SymFloat) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, SymInt | torch.SymFloat) else sympy.sympify(size)


def relate(graph: Graph, length: sympy.Symbol, rules: Rules) -> dict[Node, Relation]:
    """The relation of every tensor of `graph` to the sequence of `length`.

    Raises:
        Mixing: the first node whose elements may change when the sequence gets longer.
    """
    reader = Reader(length, {})
    for node in graph.nodes:
        if node.op == "placeholder":
            reader.relations[node] = _input(reader, node)
        elif node.op == "call_function":
            reader.relations[node] = _checked(reader, node, _call(reader, node, rules))
    return reader.relations


def _input(reader: Reader, node: Node) -> Relation:
    if not is_tensor(node) or not (axes := reader.long_axes(val(node))):
        return INDEPENDENT
    if len(axes) > 1 or reader.beyond(val(node).shape[axes[0]]) != 0:
        raise Mixing(node, f"an input of shape {tuple(val(node).shape)} has no single axis along the sequence")
    return Relation(Kind.LOCAL, (Along(axes[0]),), 0, val(node).dtype.is_floating_point)


def _call(reader: Reader, node: Node, rules: Rules) -> Relation:
    if is_random(node):
        raise Mixing(node, "it draws random numbers")
    if written(node):
        raise Mixing(node, "it writes into memory")
    operands = [reader.relation(n) for n in node.all_input_nodes]
    ends = any(r.kind is Kind.LAST for r in operands)
    if ends and any(r.along for r in operands):
        raise Mixing(node, "it brings the end of the sequence to other positions")
    if ends:
        return _end(reader, node)
    if not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return INDEPENDENT  # sizes are read as expressions
    if any(r.order is not None for r in operands):
        return rules.ordered(reader, node)
    rule = rules.by_operator.get(node.target)
    if rule is None and is_pointwise(node):
        rule = rules.pointwise
    if rule is not None:
        return rule(reader, node)
    if any(r.along for r in operands) or reads_length(reader, node):
        raise Mixing(node, f"no rule says how {node.target} treats positions")
    return INDEPENDENT


def is_pointwise(node: Node) -> bool:
    """Whether torch tags an operator as pointwise."""
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _end(reader: Reader, node: Node) -> Relation:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and reader.long_axes(value):
        raise Mixing(node, "it brings the end of the sequence to other positions")
    return LAST


def _checked(reader: Reader, node: Node, relation: Relation) -> Relation:
    """`relation`, with what follows from those of the operands, if it accounts for every long axis."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and set(reader.long_axes(value)) != set(relation.axes):
        raise Mixing(node, f"its shape {tuple(value.shape)} does not follow the positions of its operands")
    if relation.kind not in (Kind.LOCAL, Kind.CAUSAL):
        return relation
    operands = [reader.relation(n) for n in node.all_input_nodes]
    floats = isinstance(value, Tensor) and value.dtype.is_floating_point
    computed = (floats and relation.ahead is not None) or any(r.computed for r in operands)
    return replace(relation, computed=computed)


def reads_length(reader: Reader, node: Node) -> bool:
    """Whether an argument of a call is a number that depends on the length of the sequence."""
    found = []

    def look(argument: Node) -> Node:
        value = known(argument)
        if isinstance(value, SymInt | torch.SymFloat | torch.SymBool):
            found.append(reader.length in value.node.expr.free_symbols)
        return argument

    map_arg((node.args, node.kwargs), look)
    return any(found)


def joined(operands: list[Relation], along: tuple[Along, ...]) -> Relation:
    """The relation of what is computed from `operands` position by position, with axes `along` the sequence."""
    if not along:
        return INDEPENDENT
    ahead = [r.ahead for r in operands if r.ahead is not None]
    kind = Kind.CAUSAL if any(r.kind is Kind.CAUSAL for r in operands) else Kind.LOCAL
    return Relation(kind, along, max(ahead) if ahead else None)
