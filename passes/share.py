"""What is computed twice is computed once.

    a = arange(8); b = arange(8); c = a < b    ->    a = arange(8); c = a < a

Not shared: results of the graph, random numbers, new buffers, and whatever reads or is memory that the graph
writes into.
"""

from collections.abc import Hashable

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from llmcomp.graph import base, is_random, is_returned, is_tensor, mutated, replace, written
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES

aten = torch.ops.aten

# Calls without a tensor argument make buffers; these two make values.
VALUES = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default)


def _run(graph: Graph, report: Report) -> None:
    writes = mutated(graph)
    first: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if not _may_be_shared(node, writes):
            continue
        key = _key(node)
        if key in first and not is_returned(node):
            replace(node, first[key])
            report.rewrites += 1
        else:
            first.setdefault(key, node)


SHARE = Pass("share", _run, needs=frozenset({SHAPES}))


def _may_be_shared(node: Node, writes: frozenset[Node]) -> bool:
    if not isinstance(node.target, OpOverload) or not is_tensor(node):
        return False
    if not node.all_input_nodes and node.target not in VALUES:
        return False
    if is_random(node) or written(node):
        return False
    return not any(base(n) in writes for n in (node, *node.all_input_nodes))


def _key(node: Node) -> Hashable:
    return node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items())))


def _hashable(value: object) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    # 1, 1.0 and True are equal, and different arguments.
    return (type(value), value) if isinstance(value, int | float) else value
