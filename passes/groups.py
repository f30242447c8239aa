"""Growing kernels: nodes carry the label of the kernel that will compute them, and no kernel may wait for itself.

A label is a pair (family, number) in `node.meta["kernel"]`. The fusing passes add labels; the graph itself
stays as it was and can be executed at any time. `Groups` is the view of all labels that those passes work on.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Set

import torch
from torch.fx import Graph, Node

from llmcomp.graph import dependencies, views, written
from llmcomp.products import ends_of, is_product
from llmcomp.quantized_cache import cache_tensor
from llmcomp.region import Region, readers, sources

Label = tuple[str, int]
# Why a region cannot be one kernel, or None where it can.
Fits = Callable[[Region, Set[Node]], str | None]
# Whether a linear layer is left to the library (large float matrix products on the CPU).
Library = Callable[[Node], bool]
# The reason that such a call gives in the report.
LEFT_TO_LIBRARY = "a matrix product of many rows is left to the library"

aten = torch.ops.aten
VIEWS = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int,
        aten.t.default, aten.expand.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor,
        aten.split_with_sizes.default, aten.unbind.int, aten.unfold.default, aten.alias.default, aten.detach.default,
    }
)  # fmt: skip
CREATIONS = frozenset(
    {
        aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.zeros.default,
        aten.ones.default, aten.scalar_tensor.default, aten.new_ones.default, aten.new_zeros.default,
        aten.new_full.default, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
    }
)  # fmt: skip
# Codes and scales of a quantized cache as one tensor: each kernel that reads it, and the caller, makes its own of it.
NOTATIONS = (torch.ops.llmcomp.cache_dequantize.default, cache_tensor)
# Operators with several results whose items are computed one by one, each by the kernel that wants it.
TUPLES = frozenset({aten.native_layer_norm.default, aten.max.dim, aten.min.dim, aten.var_mean.correction})


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_view(node: Node) -> bool:
    """Whether a node only renames elements of its first input."""
    if node.target in VIEWS:
        return True
    source = node.args[0] if node.args else None
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(source, Node) and source.target in VIEWS


def base(node: Node) -> Node:
    """The node whose elements a chain of views shows."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


class Groups:
    """All kernels in the making of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.members: dict[Label, list[Node]] = {}
        self.inlined: set[Node] = set()
        self._before = dependencies(graph)
        self._after: dict[Node, set[Node]] = {n: set() for n in graph.nodes}
        for node, earlier in self._before.items():
            for e in earlier:
                self._after[e].add(node)
        for node in graph.nodes:
            if "kernel" in node.meta:
                self.members.setdefault(node.meta["kernel"], []).append(node)
            elif _inlines(node):
                self.inlined.add(node)

    def label(self, node: Node) -> Label | None:
        return node.meta.get("kernel")

    def create(self, family: str, nodes: Iterable[Node]) -> Label:
        """A new kernel of `nodes`."""
        number = 1 + max((n for _, n in self.members), default=-1)
        label = (family, number)
        self._assign(label, nodes)
        return label

    def extend(self, label: Label, nodes: Iterable[Node], family: str | None = None) -> Label:
        """Move `nodes` into the kernel `label`, which may change its family."""
        nodes = list(nodes)
        for node in nodes:
            if (old := self.label(node)) is not None:
                self.members[old].remove(node)
                if not self.members[old]:
                    del self.members[old]
        grown = (family or label[0], label[1])
        everything = self.members.pop(label, []) + nodes
        self._assign(grown, everything)
        return grown

    def _assign(self, label: Label, nodes: Iterable[Node]) -> None:
        self.members[label] = sorted(set(nodes), key=self.position.__getitem__)
        for node in self.members[label]:
            node.meta["kernel"] = label

    def region(self, family: str, nodes: Iterable[Node]) -> Region:
        """The region that `nodes` would be, with the outputs that the rest of the graph needs."""
        ordered = sorted(set(nodes), key=self.position.__getitem__)
        inside = set(ordered)
        outputs = [n for n in ordered if _is_effect(n) or any(u not in inside for u in self.readers(n))]
        return Region(family, tuple(ordered), tuple(outputs))

    def readers(self, node: Node) -> Iterator[Node]:
        """Users of a node's elements, seen through inlined nodes."""
        return readers(node, self.inlined)

    def producers(self, node: Node) -> Iterator[Node]:
        """Nodes that a node reads, seen through inlined nodes; placeholders are left out."""
        return (n for n in sources(node, self.inlined) if n.op == "call_function")

    def acyclic(self, nodes: Iterable[Node]) -> bool:
        """Whether `nodes` can run as one kernel: nothing outside both waits for them and is waited for."""
        inside = set(nodes)
        last = max(self.position[n] for n in inside)
        seen: set[Node] = set()
        stack = list(self._exits(inside))
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            label = self.label(node)
            together = [n for n in self.members[label] if n not in inside] if label is not None else [node]
            seen.update(together)
            if min(self.position[n] for n in together) > last:
                continue
            for n in together:
                for a in self._after[n]:
                    if a in inside:
                        return False
                    stack.append(a)
        return True

    def _exits(self, inside: Set[Node]) -> Iterator[Node]:
        """What waits for `inside`; inlined nodes are passed through, for those that read them recompute them."""
        seen: set[Node] = set()
        stack = [a for n in inside for a in self._after[n]]
        while stack:
            node = stack.pop()
            if node in seen or node in inside:
                continue
            seen.add(node)
            if node in self.inlined:
                stack.extend(self._after[node])
            else:
                yield node

    def order(self) -> list[Label]:
        """The kernels in an order that respects data and writes."""
        remaining = {label: 0 for label in self.members}
        after: dict[Label, set[Label]] = {label: set() for label in self.members}
        for label, nodes in self.members.items():
            waits = {w for n in nodes for w in self._waits(n)} - {label}
            remaining[label] = len(waits)
            for w in waits:
                after[w].add(label)
        ready = [(self.position[self.members[label][-1]], label) for label, n in remaining.items() if n == 0]
        heapq.heapify(ready)
        result = []
        while ready:
            _, label = heapq.heappop(ready)
            result.append(label)
            for later in after[label]:
                remaining[later] -= 1
                if remaining[later] == 0:
                    heapq.heappush(ready, (self.position[self.members[later][-1]], later))
        assert len(result) == len(self.members), "kernels wait for each other"
        return result

    def _waits(self, node: Node) -> set[Label]:
        """Kernels that must run before a node's kernel, seen through inlined nodes."""
        found: set[Label] = set()
        seen: set[Node] = set()
        stack = list(self._before[node])
        while stack:
            source = stack.pop()
            if source in seen:
                continue
            seen.add(source)
            label = self.label(source)
            if label is not None:
                found.add(label)
            else:
                stack.extend(self._before[source])
        return found


def _is_effect(node: Node) -> bool:
    return node.target in (aten.copy_.default, torch.ops.llmcomp.cache_write_.default)


def _inlines(node: Node) -> bool:
    """Views and constants are recomputed by whoever reads them; so are shallow functions of positions alone."""
    if node.op != "call_function" or _is_offset_table(node):
        return False
    return is_view(node) or node.target in (*TUPLES, *NOTATIONS) or _is_position(node, 4)


def _is_offset_table(node: Node) -> bool:
    """Whether a kernel looks up in this node which rows belong to which matrix, so that it must lie in memory."""
    return any(is_product(u) and ends_of(u) is node for u in node.users)


def _is_constant(node: Node) -> bool:
    """Whether a node makes a tensor of constants that nobody writes into."""
    if node.target not in CREATIONS:
        return False
    return not any(view in written(user) for view in views(node) for user in view.users)


def _is_position(node: Node, depth: int) -> bool:
    """Whether a node is a cheap function of constants and index positions, such as arange(n) + offset."""
    if node.target in CREATIONS or not isinstance(node.meta.get("val"), torch.Tensor):
        return _is_constant(node) or isinstance(node.meta.get("val"), torch.SymInt)
    cheap = {
        "add",
        "sub",
        "mul",
        "le",
        "lt",
        "gt",
        "ge",
        "bitwise_and",
        "logical_and",
        "unsqueeze",
        "expand",
        "view",
    }
    name = str(getattr(node.target, "__name__", "")).split(".")[0]
    if depth == 0 or name not in cheap or node.op != "call_function":
        return False
    return all(_is_position(n, depth if is_view(node) else depth - 1) for n in node.all_input_nodes)
