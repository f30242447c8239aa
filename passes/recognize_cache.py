"""Caches that are updated as a whole and copied back are written in place.

    new = index_copy(cache, 2, position, k); ... new ...; copy_(cache, new)
        ->  cache_write_(cache, k, position, 2); ... cache ...
    new = index_put(cache, [None, None, position], k)       ->  the same, with negative positions wrapped
    new = slice_scatter(cache, k, 2, start, end)            ->  the same, at arange(start, end)
    new = select_scatter(cache, k, 2, at)                   ->  the same, at one position
    index_put(roll(cache, -1), [None, None, [-1]], k)       ->  cat([cache[:, :, 1:], k]), and copied back

A write in place needs that nobody reads the old content after it: other readers of the cache come before
the write, or are the copy back and the caller, who expect the new content. A buffer that the graph makes for
itself is written in place too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from llmcomp import graph as g
from llmcomp.graph import Size, argument, base, insert, known, same_shape, same_size, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.constants import number
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.positions import QUERY, integer, known_true
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten


def _run(graph: Graph, report: Report) -> None:
    for node in list(graph.nodes):
        if (simpler := _simplified(node)) is not None:
            g.replace(node, simpler)
            report.rewrites += 1
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if (write := read_write(node)) is not None:
            reason = _obstacle(write)
            if reason is None:
                _write_in_place(write)
                report.rewrites += 1
            elif _updates_input(write):
                report.miss(node, reason)


RECOGNIZE_CACHE = Pass("recognize_cache", _run, needs=frozenset({SHAPES}))


# ---- reading


@dataclass(frozen=True)
class Write:
    """`node` is `cache` with `value` at `position` along `dim` of `target`, which is `cache` or a view of it.

    `position` is a tensor of indices, or the (start, end) of a range.
    """

    node: Node
    cache: Node
    target: Node
    value: Node
    position: Node | tuple[Size, Size]
    dim: int
    wraps: bool = False


def read_write(node: Node) -> Write | None:
    """The update that a call makes to a copy of its first argument, or None where it is of no known form."""
    rule = _RULES.get(node.target)
    write = None if rule is None else rule(node)
    return None if write is None else replace(write, cache=_whole(write.cache), value=_uncopied(write.value))


def _uncopied(value: Node) -> Node:
    """What a value was before it was cast and expanded to the part of the cache that it goes to."""
    source = value.args[1] if value.target is aten.copy.default else value
    assert isinstance(source, Node)
    return source


def _whole(node: Node) -> Node:
    """What a node is a view of, if it shows all of it as it is."""
    while g.is_view(node) and g.same_layout(val(node), val(node.args[0])):  # type: ignore[arg-type]
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _index_copy(node: Node) -> Write | None:
    cache, dim, position, value = (argument(node, n) for n in ("self", "dim", "index", "source"))
    assert isinstance(cache, Node) and isinstance(position, Node) and isinstance(value, Node)
    if val(cache).dim() == 0 or val(value).dim() != val(cache).dim():
        return None
    return Write(node, cache, cache, value, position, int(dim) % val(cache).dim())  # type: ignore[arg-type]


def _index_put(node: Node) -> Write | None:
    """cache[:, :, position] = value, with one vector of integers."""
    cache, indices, value = (argument(node, n) for n in ("self", "indices", "values"))
    assert isinstance(cache, Node) and isinstance(value, Node) and isinstance(indices, list | tuple)
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if len(given) != 1 or argument(node, "accumulate"):
        return None
    dim, position = given[0]
    if not isinstance(position, Node) or val(position).dim() != 1 or val(position).dtype != torch.int64:
        return None
    return Write(node, cache, cache, value, position, dim, wraps=True)


def _slice_scatter(node: Node) -> Write | None:
    """cache[:, start:end] = value, or a write into that slice, written back."""
    cache, value = argument(node, "self"), argument(node, "src")
    assert isinstance(cache, Node) and isinstance(value, Node)
    inner = read_write(value)
    if inner is not None and inner.cache.target is aten.slice.Tensor and _same_slice(node, inner.cache, cache):
        return replace(inner, node=node, cache=cache)
    dim = int(argument(node, "dim")) % val(cache).dim()  # type: ignore[arg-type]
    start, count = known(argument(node, "start")) or 0, val(value).shape[dim]
    if not isinstance(start, int | torch.SymInt) or argument(node, "step") != 1:
        return None
    if not known_true(start >= 0):
        return None
    return Write(node, cache, cache, value, (start, start + count), dim)


def _same_slice(scatter: Node, part: Node, whole: Node) -> bool:
    names = ("dim", "start", "end", "step")
    return part.args[0] is whole and all(argument(scatter, n) == argument(part, n) for n in names)


def _select_scatter(node: Node) -> Write | None:
    """cache[:, at] = value"""
    cache, value, at = argument(node, "self"), argument(node, "src"), known(argument(node, "index"))
    assert isinstance(cache, Node) and isinstance(value, Node)
    if not isinstance(at, int | torch.SymInt) or not known_true(at >= 0):
        return None
    dim = int(argument(node, "dim")) % val(cache).dim()  # type: ignore[arg-type]
    return Write(node, cache, cache, value, (at, at + 1), dim)


_RULES: Mapping[object, Callable[[Node], Write | None]] = {
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
}


# ---- deciding

FRESH = (aten.zeros.default, aten.full.default, aten.empty.memory_format)


def _updates_input(write: Write) -> bool:
    return write.cache.op == "placeholder"


def _obstacle(write: Write) -> str | None:
    """Why a write may not happen in place, or None where it may."""
    cache, node = write.cache, write.node
    if not _updates_input(write) and cache.target not in FRESH:
        return "it updates neither an input nor a buffer of its own"
    if _updates_input(write):
        if not _is_copied_back(node, cache):
            return "the result is not copied back into the cache"
        if g.is_returned(node):
            return "the result is returned as a tensor of its own"
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    for view in g.views(cache):
        for reader in view.users:
            if order[reader] > order[node] and not _sees_new_content(reader, cache):
                return f"{reader.name} reads the old content later"
    return None


def _is_copied_back(node: Node, cache: Node) -> bool:
    """Whether `node`, or what later writes make of it, is what is finally copied into `cache`."""
    for user in node.users:
        if user.target is aten.copy_.default and user.args[0] is cache and user.args[1] is node:
            return True
        later = read_write(user)
        if later is not None and later.cache is node and _is_copied_back(user, cache):
            return True
    return False


def _sees_new_content(reader: Node, cache: Node) -> bool:
    """Whether a reader after a write expects an input's final content: the copy back, and the caller."""
    if cache.op != "placeholder":
        return False
    return reader.op == "output" or (reader.target is aten.copy_.default and reader.args[0] is cache)


# ---- writing


def _write_in_place(write: Write) -> None:
    node, cache = write.node, write.cache
    with node.graph.inserting_before(node):
        value, position = _value(write), _position(write)
        insert(node.graph, torch.ops.llmcomp.cache_write_.default, write.target, value, position, write.dim)
    g.replace(node, cache)
    for user in list(cache.users):
        if user.target is aten.copy_.default and user.args[:2] == (cache, cache):
            g.replace(user, cache)


def _value(write: Write) -> Node:
    """The value in the dtype and the shape of the part of the cache that it goes to."""
    graph, value = write.node.graph, write.value
    if base(value) is write.cache:
        # What moves within the cache is read before it is written.
        value = insert(graph, aten.clone.default, value, memory_format=torch.contiguous_format)
    if val(value).dtype != val(write.target).dtype:
        value = insert(graph, aten._to_copy.default, value, dtype=val(write.target).dtype)
    shape: list[Size] = list(val(write.target).shape)
    shape[write.dim] = _count(write)
    if write.node.target is aten.select_scatter.default:
        value = insert(graph, aten.unsqueeze.default, value, write.dim)
    if same_shape(val(value).shape, shape):
        return value
    return insert(graph, aten.expand.default, value, [size_node(graph, n) for n in shape])


def _count(write: Write) -> Size:
    if isinstance(write.position, Node):
        return val(write.position).shape[0] if val(write.position).dim() else 1
    start, end = write.position
    return end - start


def _position(write: Write) -> Node:
    """The indices as a tensor, none of them negative."""
    graph, position = write.node.graph, write.position
    device = val(write.target).device
    if not isinstance(position, Node):
        start, end = (size_node(graph, n) for n in position)
        return insert(graph, aten.arange.start, start, end, device=device)
    if not write.wraps or _never_negative(position):
        return position
    size = size_node(graph, val(write.target).shape[write.dim])
    wrapped = insert(graph, aten.add.Tensor, position, size)
    negative = insert(graph, aten.lt.Scalar, position, 0)
    return insert(graph, aten.where.self, negative, wrapped, position)


def _never_negative(position: Node) -> bool:
    at = integer(position, (QUERY,))
    return at is not None and at.query >= 0 and known_true(at.rest >= 0)


# ---- copies that add nothing


def _simplified(node: Node) -> Node | None:
    """What a functional write computes, in fewer copies, or None where it needs them all."""
    if node.target is aten.index_put.default:
        return _shifted(node)
    if node.target is aten.copy.default:
        return _alone(node, node.args[1])
    return _alone(node, argument(node, "src")) if node.target is aten.slice_scatter.default else None


def _alone(node: Node, source: object) -> Node | None:
    """`source`, or a copy of it, where it overwrites all of a tensor of its kind."""
    assert isinstance(source, Node)
    a, b = val(node), val(source)
    if not same_shape(a.shape, b.shape) or a.dtype != b.dtype or a.device != b.device:
        return None
    if not g.is_returned(node) and base(source) not in g.mutated(node.graph):
        return source
    if not g.is_contiguous(a):
        return None
    with node.graph.inserting_before(node):
        return insert(node.graph, aten.clone.default, source, memory_format=torch.contiguous_format)


def _shifted(node: Node) -> Node | None:
    """A cache that is moved one place ahead and gets a new last row, without the copies in between."""
    write = _index_put(node)
    if write is None or write.cache.target is not aten.roll.default or not isinstance(write.position, Node):
        return None
    cache, shifts, dims = (argument(write.cache, n) for n in ("self", "shifts", "dims"))
    assert isinstance(cache, Node) and isinstance(dims, list | tuple)
    if list(shifts) != [-1] or [int(d) % val(cache).dim() for d in dims] != [write.dim]:  # type: ignore[arg-type]
        return None
    if number(write.position) != -1 or not same_size(_count(write), 1):
        return None
    with node.graph.inserting_before(node):
        kept = insert(node.graph, aten.slice.Tensor, cache, write.dim, 1, torch.iinfo(torch.int64).max)
        return insert(node.graph, aten.cat.default, [kept, _value(write)], write.dim)
