"""Caches that grow by concatenation are appended to in place.

    keys = cat([past, k], 2); attention(q, keys, ...); return keys
        ->  keys = cache_grow(past, n, 2); cache_write_(keys, k, arange(s, s + n), 2); ...

    attention(q, k, v); return clone(k)             the first call, which has no past
        ->  keys = cache_room([B, H, s, D], 2); cache_write_(keys, k, arange(0, s), 2); attention(q, keys, ...)

So the kernel that computes k writes it where the next call will look for it. What becomes a cache is read off
the graph: it is returned, and attention reads it as keys or values. Results change their layout in memory
(slices along the sequence lie one after the other), not their values. cache_grow shares memory with `past` at
run time, as llmcomp/headroom.py explains; graphs for training are left alone, for autograd would not know.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from llmcomp import graph as g
from llmcomp.graph import argument, base, insert, same_size, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.sizes import size_node, writable
from llmcomp.quantized_cache import cache_tensor

aten = torch.ops.aten
# Reads the scales that are being made, not the cache of them.
QUANTIZE = torch.ops.llmcomp.cache_quantize.default
CACHES = (torch.ops.llmcomp.cache_room.default, torch.ops.llmcomp.cache_grow.default)


@dataclass(frozen=True)
class Growth:
    """`new` comes behind `past`, which is an input or nothing, along `dim`; `results` are the tensor so made."""

    past: Node | None
    new: Node
    dim: int
    results: tuple[Node, ...]


def _run(graph: Graph, report: Report) -> None:
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    seen: set[Node] = set()
    writes = g.mutated(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.llmcomp.attention.default):
        for operand in _operands(node):
            if operand in seen:
                continue
            seen.add(operand)
            growth = _appended(operand) or _begun(operand, node)
            if growth is None:
                continue
            if (reason := _obstacle(growth, writes)) is not None:
                report.miss(operand, reason)
                continue
            _rewrite(growth, first)
            report.rewrites += 1


RECOGNIZE_APPEND = Pass("recognize_append", _run, needs=frozenset({SHAPES}))


def _operands(attention: Node) -> Iterator[Node]:
    """What attention reads as keys and as values; of quantized ones the codes and the scales."""
    for position in (1, 2):
        operand = attention.args[position]
        assert isinstance(operand, Node)
        if operand.target is aten.slice.Tensor and argument(operand, "dim") == 1:
            operand = g.source(operand)  # some of the heads
        if base(operand).target is torch.ops.llmcomp.cache_dequantize.default:
            yield from base(operand).all_input_nodes
        else:
            yield operand


def _is_returned(node: Node) -> bool:
    """Whether the graph returns `node` or a view of it, or a quantized cache that holds it."""
    return g.is_returned(node) or any(u.target is cache_tensor for view in g.views(node) for u in view.users)


def _appended(operand: Node) -> Growth | None:
    """The concatenation of an input and something new that an operand shows, if the graph returns it."""
    node = base(operand)
    if node.target is not aten.cat.default or not _is_returned(node):
        return None
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or not all(isinstance(p, Node) for p in parts):
        return None
    past, new = parts
    assert isinstance(past, Node) and isinstance(new, Node)
    if past.op != "placeholder":
        return None
    return Growth(past, new, int(argument(node, "dim")) % val(node).dim(), (node,))  # type: ignore[arg-type]


def _begun(operand: Node, attention: Node) -> Growth | None:
    """An operand of a first call: the graph returns it, or a copy of it, and it is as long as the queries."""
    if operand.op != "call_function" or val(operand).dim() != 4 or operand.target in CACHES:
        return None
    copies = [u for u in operand.users if u.target is aten.clone.default and g.is_returned(u)]
    returned = copies or _is_returned(operand)
    queries = attention.args[0]
    assert isinstance(queries, Node)
    if not returned or not same_size(val(operand).shape[2], val(queries).shape[2]):
        return None
    return Growth(None, operand, 2, (operand, *copies))


def _obstacle(growth: Growth, writes: frozenset[Node]) -> str | None:
    """Why this cache is not written in place, or None where it is."""
    if not all(writable(n) for n in val(growth.results[0]).shape):
        return f"its shape {tuple(val(growth.results[0]).shape)} depends on data"
    if growth.past is not None and growth.past in writes:
        return f"the past {growth.past.name} is written into"
    if growth.past is not None and val(growth.past).dtype != val(growth.new).dtype:
        return "the past has another dtype"
    if any(n in writes for n in growth.results):
        return "it is written into"
    return None


def _rewrite(growth: Growth, first: Node) -> None:
    """Make the cache before everything else, so that no eager call comes between kernels; write to it at `new`."""
    graph, whole, dim = first.graph, val(growth.results[0]), growth.dim
    device = whole.device
    with graph.inserting_before(first):
        if growth.past is None:
            shape = [size_node(graph, n) for n in whole.shape]
            cache = insert(graph, torch.ops.llmcomp.cache_room.default, shape, dim, whole.dtype, device)
        else:
            count = size_node(graph, val(growth.new).shape[dim])
            cache = insert(graph, torch.ops.llmcomp.cache_grow.default, growth.past, count, dim)
    before = 0 if growth.past is None else val(growth.past).shape[dim]
    with graph.inserting_before(growth.new.next if growth.past is None else growth.results[0]):
        start, end = size_node(graph, before), size_node(graph, whole.shape[dim])
        position = insert(graph, aten.arange.start, start, end, device=device)
        write = insert(graph, torch.ops.llmcomp.cache_write_.default, cache, growth.new, position, dim)
    kept = {write, *growth.results, *(u for u in growth.new.users if u.target is QUANTIZE)}
    for node in growth.results:
        node.replace_all_uses_with(cache, lambda user: user not in kept)
        if node is not growth.new:
            graph.erase_node(node)
