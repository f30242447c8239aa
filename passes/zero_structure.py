"""Which rows and columns of a graph's weights are zero, by the values they have while it is compiled.

What was found is noted: a program that relies on it asks again when a weight has changed (llmcomp/prepared.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node

from llmcomp.graph import is_view, source
from llmcomp.ops import ACTIVATIONS
from llmcomp.products import LINEAR, bias_of, operand_of

aten = torch.ops.aten
PREPARED = "prepared"
"""Marks a node that is computed of weights alone, once and not in every call."""
UNARY = (aten.relu.default, aten.silu.default, aten.gelu.default, aten.tanh.default, aten.neg.default)
CASTS = (aten._to_copy.default,)
LOGIC = (aten.bitwise_not.default, aten.logical_not.default, aten.eq.Scalar, aten.ne.Scalar)  # of masks
FILLS = (aten.scalar_tensor.default, aten.full.default, aten.zeros_like.default)
VIEWS = (aten.slice.Tensor, aten.view.default, aten._unsafe_view.default)  # where the last axis stays
SAMPLE = 64  # rows or columns that are looked at first
AT_ONCE = 1 << 16  # numbers
VANISHING = frozenset(ACTIVATIONS) - {"sigmoid"}  # activations of gated that are 0 at 0


@dataclass(frozen=True)
class Zero:
    """The slices of the tensor of a node along `dim` at which it is zero; of one of experts (E, ...) those of each."""

    node: Node
    dim: int
    where: Tensor


@dataclass
class Values:
    """Values of the weights of a graph, by their placeholders; `facts` are those that somebody was told."""

    weights: Mapping[Node, Tensor]
    facts: dict[tuple[Node, int], Zero] = field(default_factory=dict)
    _made: dict[Node, Tensor] = field(default_factory=dict)
    _channels: dict[Node, Tensor | None] = field(default_factory=dict)

    def of(self, node: object) -> Tensor | None:
        """The value of a weight, of a view of one, or of what is computed of weights alone once."""
        if not isinstance(node, Node):
            return None
        if node in self.weights:
            return self.weights[node]
        if node.op == "get_attr":
            found = getattr(node.graph.owning_module, str(node.target))
            assert isinstance(found, Tensor)
            return found
        if node in self._made:
            return self._made[node]
        simple = is_view(node) or node.target in (*CASTS, *LOGIC, *FILLS)
        if not (node.meta.get(PREPARED) or simple) or node.op != "call_function":
            return None
        given = {n: self.of(n) for n in node.all_input_nodes}
        if not (given or node.target in FILLS) or any(value is None for value in given.values()):
            return None
        with torch.no_grad():
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
            assert callable(node.target)
            self._made[node] = node.target(*args, **kwargs)
        return self._made[node]

    def zeros(self, node: Node, dim: int) -> Tensor | None:
        """Where along `dim` a weight is zero: a bool vector, or None where it is nowhere, or no weight."""
        if (value := self.of(node)) is None or not 1 <= value.dim() <= 2:
            return None
        dim %= value.dim()
        if (node, dim) not in self.facts:
            where = _zero_slices(value, dim)
            if not bool(where.any()):
                return None
            self.facts[node, dim] = Zero(node, dim, where)
        return self.facts[node, dim].where

    def zeros_of_experts(self, node: Node, dim: int) -> Tensor | None:
        """Where along `dim` each matrix of experts is zero: bools (E, size), or None where none is anywhere."""
        if (value := self.of(node)) is None or value.dim() != 3:
            return None
        if (node, dim) not in self.facts:
            where = torch.stack([_zero_slices(matrix, dim - 1) for matrix in value])
            if not bool(where.any()):
                return None
            self.facts[node, dim] = Zero(node, dim, where)
        return self.facts[node, dim].where

    # ---- of what is computed ----

    def learn(self, graph: Graph) -> None:
        """Ask after every node of a graph, in order, so that what is asked later needs no long way down."""
        for node in graph.nodes:
            self.channels(node)

    def channels(self, node: Node) -> Tensor | None:
        """Which elements along the last axis of a node are zero whatever its inputs are, or None."""
        if node.op != "call_function":
            return None
        if node not in self._channels:
            self._channels[node] = self._of_call(node)
        return self._channels[node]

    def _of_call(self, node: Node) -> Tensor | None:
        match node.target:
            case _ if node.target is LINEAR:
                return self._of_linear(node)
            case torch.ops.llmcomp.gated.default:
                up = self.channels(source(node, 1))
                return _either(up, self.channels(source(node)) if node.args[2] in VANISHING else None)
            case aten.mul.Tensor:
                return _either(*(self.channels(n) for n in node.all_input_nodes if _alike(n, node)))
            case aten.add.Tensor | aten.sub.Tensor:
                return self._of_sum(node)
            case aten.embedding.default:
                return self.zeros(source(node), 1)
            case torch.ops.llmcomp.rms_norm.default if node.args[2]:  # without eps a row of zeros gives NaN
                return self.channels(source(node))
            case _ if node.target in (*UNARY, *CASTS, *VIEWS):
                return self.channels(source(node)) if _alike(source(node), node) else None
        return None

    def _of_sum(self, node: Node) -> Tensor | None:
        """Where both are zero."""
        if len(node.args) != 2 or not all(isinstance(n, Node) and _alike(n, node) for n in node.args):
            return None
        a, b = (self.channels(source(node, i)) for i in range(2))
        return None if a is None or b is None or not bool((both := a & b).any()) else both

    def _of_linear(self, node: Node) -> Tensor | None:
        weight = node.args[1]
        assert isinstance(weight, Node)
        rows = self.zeros(weight, 1 if node.args[3] else 0)
        if rows is None or (bias := bias_of(node)) is None:
            return rows
        zero = self.zeros(bias, 0)
        return None if zero is None or not bool((both := rows & zero).any()) else both

    def unread(self, node: Node) -> Tensor | None:
        """Which channels of its operand a linear layer multiplies with zeros, or knows to be zero."""
        weight = node.args[1]
        assert isinstance(weight, Node)
        return _either(self.zeros(weight, 0 if node.args[3] else 1), self.channels(operand_of(node)))


def _zero_slices(value: Tensor, dim: int) -> Tensor:
    if value.dim() == 1:
        return value == 0
    some = (value.narrow(1 - dim, 0, min(SAMPLE, value.shape[1 - dim])) == 0).all(1 - dim)
    return (value == 0).all(1 - dim) if bool(some.any()) else some


def is_mask(value: Tensor) -> bool:
    """Whether a tensor holds zeros and ones, or False and True, and some of the first."""
    if value.dtype == torch.bool:
        return not bool(value.all())
    # Piece by piece: every compilation asks this of codes too, where the first piece tells and all would take memory.
    pieces = (piece for piece in value.flatten().split(AT_ONCE))
    return all(bool(((piece == 0) | (piece == 1)).all()) for piece in pieces) and not bool(value.all())


def share_of_zeros(value: Tensor) -> float:
    """The part of a matrix, or of several, that is zero, by some of their rows."""
    value = value.flatten(0, -2)
    rows = value[:: max(1, value.shape[0] // SAMPLE)]
    return float((rows == 0).float().mean()) if rows.numel() else 0.0


def _either(*found: Tensor | None) -> Tensor | None:
    some = [x for x in found if x is not None]
    result = some[0] if some else None
    for x in some[1:]:
        result = result | x if result is not None else x
    return result


def _alike(a: Node, b: Node) -> bool:
    """Whether a broadcast operand has the result's last axis; a size has none."""
    shapes = [v.shape for n in (a, b) if isinstance(v := n.meta["val"], Tensor)]
    return len(shapes) == 2 and bool(shapes[0]) and shapes[0][-1] == shapes[1][-1]
