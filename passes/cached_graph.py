"""The cached graph of a proof: what passes/insert_kv_cache.py promises, made node by node.

`insert_cache` walks the proved graph in order and makes each wanted version of each node:
cut to the new positions, or whole. The result has sizes of its own: `past` positions that are kept, `new` ones to
compute; the length s of the sequence is their sum everywhere.
"""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

from llmcomp.graph import argument, insert, is_tensor, source, val
from llmcomp.ops import outermost
from llmcomp.passes.cached_sizes import NEW, PAST, CachedSizes
from llmcomp.passes.demand import WHOLE, Version, attention_version, content, cuts_after, from_end, operand_version
from llmcomp.passes.insert_kv_cache import Plan, Slot, is_copied, returned
from llmcomp.passes.relation_rules import CREATIONS, CREATIONS_LIKE, RESHAPES
from llmcomp.passes.relations import Kind, expression

aten, ops = torch.ops.aten, torch.ops.llmcomp

CACHED = "cached"
"""What the meta of a cached graph calls its kind."""


def insert_cache(plan: Plan, past: int | None, new: int | None) -> GraphModule:
    """The cached graph of a proof for `past` positions (0, or None: any number from 2 on) and `new` ones (None: any
    number from 2 on).

    Its inputs are those of the proved graph, then past and new where they vary, then the slots so far; its results
    those of the proved graph, then the slots, grown.
    """
    return _Builder(plan, past, new).build()


class _Builder:
    def __init__(self, plan: Plan, past: int | None, new: int | None) -> None:
        self.plan, self.relations = plan, plan.relations
        self.graph = Graph()
        self.sizes = CachedSizes(self.graph, plan.gm.graph, plan.length, past, new)
        self.begins = past == 0  # nothing is kept: all positions are new
        self.made: dict[tuple[Node, Version], Node] = {}

    def shape(self, node: Node, version: Version) -> list[sympy.Expr]:
        """The shape of a version of a node."""
        return [self._extent(node, axis, axis in version) for axis in range(val(node).dim())]

    def _extent(self, node: Node, axis: int, cut: bool) -> sympy.Expr:
        size, along = val(node).shape[axis], self.relations[node].at(axis)
        if along is None or not cut:
            return self.sizes.moved(size)
        if along.extra:
            return self.sizes.new
        repeats = sympy.cancel(expression(size) / self.plan.length)
        return self.sizes.replaced(repeats) * self.sizes.new

    # ---- nodes

    def build(self) -> GraphModule:
        """The cached graph."""
        for node in self.plan.gm.graph.find_nodes(op="placeholder"):
            self.made[node, WHOLE] = self._input(node)
        for name, size in ((PAST, self.sizes.past), (NEW, self.sizes.new)):
            if not size.is_Integer and not any(_is(n, size) for n in self.graph.nodes):
                self._placeholder(name, self.sizes.size(size))
        grown = self._slots()
        for node in self.plan.gm.graph.nodes:
            for version in sorted(self.plan.demands.versions.get(node, ()), key=sorted):
                self._make(node, WHOLE if self.begins else version)
            if (slot := self.plan.slot(node)) is not None:
                self._write(slot, grown[node])
        outputs = [self._result(n, grown) for n in returned(self.plan.gm.graph)]
        self.graph.output(tuple(outputs) + tuple(grown.values()))
        gm = GraphModule(self.plan.gm, self.graph)
        gm.meta["kind"] = CACHED
        return gm

    def _placeholder(self, name: str, value: object) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(val=value, static=False)
        return node

    def _input(self, node: Node) -> Node:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            moved = self.sizes.moved
            value = self.sizes.fake([moved(n) for n in value.shape], [moved(n) for n in value.stride()], value)
        elif isinstance(value, SymInt):
            value = self.sizes.size(self.sizes.moved(value))
        copy = self._placeholder(str(node.target), value)
        copy.meta["static"] = node.meta.get("static", False)
        return copy

    def _slots(self) -> dict[Node, Node]:
        """The caches, which come first, so that no eager call stands between kernels."""
        slots = self.plan.slots
        pasts = [None if self.begins else self._past(i, slot) for i, slot in enumerate(slots)]
        return {slot.node: self._grown(slot, past) for slot, past in zip(slots, pasts, strict=True)}

    def _past(self, number: int, slot: Slot) -> Node:
        """The input that is what was kept of a slot."""
        shape = self.shape(slot.node, WHOLE)
        shape[slot.axis] = self.sizes.past + slot.extra
        return self._placeholder(f"slot_{number}", self.sizes.fake(shape, outermost(shape, slot.axis), val(slot.node)))

    def _grown(self, slot: Slot, past: Node | None) -> Node:
        if past is not None:
            return insert(self.graph, ops.cache_grow.default, past, self.sizes.number(self.sizes.new), slot.axis)
        shape = [self.sizes.number(n) for n in self.shape(slot.node, WHOLE)]
        value = val(slot.node)
        return insert(self.graph, ops.cache_room.default, shape, slot.axis, value.dtype, value.device)

    def _write(self, slot: Slot, cache: Node) -> None:
        """What is new of a slot goes into its cache; readers of the whole read the cache."""
        node = slot.node
        start = sympy.Integer(0) if self.begins else self.sizes.past + slot.extra
        end = self.sizes.past + self.sizes.new + slot.extra
        new = self.made[node, WHOLE if self.begins else frozenset({slot.axis})]
        bounds = (self.sizes.number(start), self.sizes.number(end))
        position = insert(self.graph, aten.arange.start, *bounds, device=val(node).device)
        insert(self.graph, ops.cache_write_.default, cache, new, position, slot.axis)
        self.made[node, WHOLE] = cache

    def _result(self, result: Argument, grown: dict[Node, Node]) -> Argument:
        if not isinstance(result, Node):
            return result
        if not is_tensor(result):
            size: Argument = self._operand(result, WHOLE)
            return size
        node = content(result, self.relations)
        slot = self.plan.slot(node)
        if slot is not None and is_copied(self.plan, slot, result):
            return insert(self.graph, aten.clone.default, grown[node], memory_format=torch.contiguous_format)
        return self.made[node, WHOLE]

    def _make(self, node: Node, version: Version) -> None:
        if (node, version) in self.made:
            return
        if node.op == "get_attr":
            made = self.graph.get_attr(str(node.target))
            made.meta.update(node.meta, val=self._constant(node))
        elif node.op == "placeholder" or (version and cuts_after(node, self.relations)):
            self._make(node, WHOLE)
            made = self._cut(node, version)
        elif is_tensor(node) or isinstance(node.meta.get("val"), tuple | list):
            made = self._call(node, version)
        else:
            return  # a size: made where it is read
        self.made[node, version] = made

    def _constant(self, node: Node) -> object:
        value = getattr(self.plan.gm, str(node.target))
        return self.sizes.mode.from_tensor(value) if isinstance(value, Tensor) else value

    def _cut(self, node: Node, version: Version) -> Node:
        """The new positions of a node of which there is the whole."""
        made = self.made[node, WHOLE]
        for axis in sorted(version):
            along = self.relations[node].at(axis)
            assert along is not None and along.inner == 1
            start = self.sizes.past + along.extra
            end = start + self.sizes.new
            made = insert(self.graph, aten.slice.Tensor, made, axis, self.sizes.number(start), self.sizes.number(end))
        return made

    def _call(self, node: Node, version: Version) -> Node:
        args, kwargs = self._arguments(node, version)
        special = _SPECIAL.get(node.target)
        if special is not None:
            return special(self, node, version, args, kwargs)
        if node.target in RESHAPES or node.target is aten.expand.default:
            args = (args[0], [self.sizes.number(n) for n in self.shape(node, version)])
        target = node.target
        assert callable(target)
        return insert(self.graph, target, *args, **kwargs)

    def _arguments(self, node: Node, version: Version) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def moved(operand: Node) -> Any:
            return self._operand(operand, operand_version(node, operand, version, self.relations))

        args, kwargs = map_arg((node.args, node.kwargs), moved)
        return args, kwargs

    def _operand(self, operand: Node, version: Version) -> Any:
        value = operand.meta.get("val")
        if isinstance(value, SymInt):
            return self.sizes.number(self.sizes.moved(value))
        if isinstance(value, int):
            return value
        return self.made[operand, WHOLE if self.begins else version]


# ---- operators whose arguments speak of positions

Special = Callable[[_Builder, Node, Version, tuple[Any, ...], dict[str, Any]], Node]


def _created(b: _Builder, node: Node, version: Version, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """A constant of the shape of this version."""
    if not b.relations[node].along:
        return insert(b.graph, node.target, *args, **kwargs)  # type: ignore[arg-type]
    shape = [b.sizes.number(n) for n in b.shape(node, version)]
    before = args[:1] if node.target in CREATIONS_LIKE else ()
    return insert(b.graph, node.target, *before, shape, *args[len(before) + 1 :], **kwargs)  # type: ignore[arg-type]


def _counted(b: _Builder, node: Node, version: Version, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    start, step = (argument(node, n) if n in names else default for n, default in (("start", 0), ("step", 1)))
    if not version:
        (along,) = b.relations[node].along or (None,)
        if along is None:
            return insert(b.graph, node.target, *args, **kwargs)  # type: ignore[arg-type]
    assert isinstance(start, int) and isinstance(step, int)
    (along,) = b.relations[node].along
    first = b.sizes.past + along.extra if version else sympy.Integer(0)
    last = b.sizes.past + b.sizes.new + along.extra
    bounds = (b.sizes.number(start + step * first), b.sizes.number(start + step * last))
    kept = {k: v for k, v in kwargs.items() if k in ("dtype", "device", "pin_memory", "layout")}
    if step == 1:
        return insert(b.graph, aten.arange.start, *bounds, **kept)
    return insert(b.graph, aten.arange.start_step, *bounds, step, **kept)


def _part(b: _Builder, node: Node, version: Version, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """A slice or selection: of the last positions, or of axes that are not along the sequence."""
    x = source(node)
    relation = b.relations[x]
    if b.relations[node].kind is not Kind.LAST or not relation.along:
        return insert(b.graph, node.target, *args, **kwargs)  # type: ignore[arg-type]
    (along,) = relation.along
    cut = operand_version(node, x, version, b.relations) and not b.begins
    whole = b.sizes.new if cut else b.sizes.past + b.sizes.new + along.extra
    start = whole - from_end(node, b.relations)
    if node.target is aten.select.int:
        return insert(b.graph, aten.select.int, args[0], along.axis, b.sizes.number(start))
    end = start + expression(val(node).shape[along.axis])
    return insert(b.graph, aten.slice.Tensor, args[0], along.axis, b.sizes.number(start), b.sizes.number(end))


def _triangle(b: _Builder, node: Node, version: Version, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    rank = val(node).dim()
    diagonal = argument(node, "diagonal")
    assert isinstance(diagonal, int)
    shift = (b.sizes.past if rank - 2 in version else 0) - (b.sizes.past if rank - 1 in version else 0)
    return insert(b.graph, node.target, args[0], b.sizes.number(diagonal + shift))  # type: ignore[arg-type]


def _attention(b: _Builder, node: Node, version: Version, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """Queries are those of the new positions, keys and values those of all."""
    operands = list(args)
    for i in range(4):
        if isinstance(node.args[i], Node):
            operands[i] = b._operand(node.args[i], attention_version(node, i, version, b.relations))  # type: ignore[arg-type]
    if 2 not in version or not b.relations[source(node, 1)].along:
        return insert(b.graph, node.target, *operands, **kwargs)  # type: ignore[arg-type]
    offset, window = argument(node, "offset"), argument(node, "window")
    assert isinstance(offset, int)
    # A single query at the end sees all keys: attention is full.
    ends = b.sizes.new == 1 and offset == 0 and not window
    operands[6], operands[7] = (False, 0) if ends else (True, b.sizes.number(b.sizes.past + offset))
    return insert(b.graph, node.target, *operands, **kwargs)  # type: ignore[arg-type]


def _put_back(b: _Builder, node: Node, version: Version, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """The inverse of a permutation of the rows of this version: they count from 0."""
    (rows,) = b.shape(node, version)
    counted = insert(b.graph, aten.arange.default, b.sizes.number(rows), device=val(node).device)
    return insert(b.graph, aten.index_put.default, args[0], args[1], counted)


_SPECIAL: dict[object, Special] = {
    **dict.fromkeys((*CREATIONS, *CREATIONS_LIKE), _created),
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _counted),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int), _part),
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangle),
    aten.index_put.default: _put_back,
    ops.attention.default: _attention,
}


def _is(node: Node, size: sympy.Expr) -> bool:
    value = node.meta.get("val")
    return isinstance(value, SymInt) and value.node.expr == size
