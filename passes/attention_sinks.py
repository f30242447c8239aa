"""Sinks that are written as a gate on the result, joined to the softmax as one more score.

    softmax(s) @ v * sigmoid(logsumexp(s) - sink)    ->    softmax(cat([s, sink]))[..., :-1] @ v

The gate is the share of the sum of exponentials that does not go to the sink, so both are equal.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from llmcomp.graph import Size, argument, insert, only_user, replace, same_shape, val
from llmcomp.passes.attention_scores import COPIES
from llmcomp.passes.attention_weights import Weights
from llmcomp.passes.match import is_last_axis, operands, other_operand
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """`gated` is `result` times a gate by `sinks`; `path` computes the gate from the logits, last node first."""

    gated: Node
    result: Node
    sinks: Node
    path: tuple[Node, ...]


def join_sinks(weights: Weights) -> Node | None:
    """Rewrite the gate of an attention, if it has one, and return the new softmax."""
    gate = _gate(weights)
    if gate is None:
        return None
    softmax = weights.softmax
    graph, shape = softmax.graph, val(softmax).shape
    with graph.inserting_before(softmax):
        column = insert(graph, aten.view.default, gate.sinks, [1, -1, 1, 1])
        sizes = [size_node(graph, n) for n in (*shape[:-1], 1)]
        column = insert(graph, aten.expand.default, column, sizes)
        joined = insert(graph, aten.cat.default, [weights.logits, column], -1)
        new = insert(graph, aten._softmax.default, joined, -1, False)
        kept = insert(graph, aten.slice.Tensor, new, 3, 0, -1)
    replace(softmax, kept)
    replace(gate.gated, gate.result)
    for node in gate.path:
        graph.erase_node(node)
    return new


def _gate(weights: Weights) -> Gate | None:
    """The gate that is made from the logits of a softmax which nothing else reads."""
    node, path = weights.logits, []
    for target in (aten.logsumexp.default, aten.sub.Tensor, aten.sigmoid.default, aten.unsqueeze.default):
        users = [user for user in node.users if user is not weights.softmax]
        if len(users) != 1 or users[0].target is not target:
            return None
        path.append(node := users[0])
    total, difference = path[:2]
    pair, gated = operands(difference, aten.sub.Tensor), only_user(node)
    result = None if gated is None else other_operand(gated, node, aten.mul.Tensor)
    if pair is None or pair[0] is not total or gated is None or result not in weights.product.users:
        return None
    batch, heads, queries, _ = val(weights.softmax).shape
    sinks = _vector(pair[1], heads)
    fits = same_shape(val(node).shape, (batch, heads, queries, 1))
    if sinks is None or not fits or not is_last_axis(argument(total, "dim"), weights.logits):
        return None
    return Gate(gated, result, sinks, tuple(reversed(path)))


def _vector(node: Node, heads: Size) -> Node | None:
    """The vector (heads,) that a node (1, heads, 1) shows."""
    if not same_shape(val(node).shape, (1, heads, 1)):
        return None
    while node.target in COPIES and val(node).dim() > 1:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node if same_shape(val(node).shape, (heads,)) else None
