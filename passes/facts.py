"""The facts about a whole graph that passes need and give."""

import torch
from torch.fx import Graph, Node

from llmcomp.graph import is_returned
from llmcomp.passes.base import Fact

aten = torch.ops.aten

ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten._unsafe_view.default)


def _has_value(node: Node) -> bool:
    # Calls for their effect alone, such as assertions, have no value.
    return node.op not in ("call_function", "placeholder") or not node.users or "val" in node.meta


def _knows_shapes(graph: Graph) -> bool:
    return all(map(_has_value, graph.nodes))


def _is_canonical(graph: Graph) -> bool:
    return not any(is_alias(node) for node in graph.nodes)


def is_alias(node: Node) -> bool:
    """Whether a node only gives another name to a value that nobody outside sees."""
    return node.target in ALIASES and not is_returned(node)


SHAPES = Fact("every call and every input has its fake value", _knows_shapes)
CANONICAL = Fact("no detach, alias, lift_fresh_copy or _unsafe_view but for results", _is_canonical)
