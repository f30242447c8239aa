"""A graph without a cache becomes one that computes only the positions that are new.

    def (ids: i64[1, s])
    q, k, v = linear(embedding(w, ids)), ...; attention(q, k, v, causal); return linear(...)

        ->

    def (ids: i64[1, p + n], p, n, keys: f32[1, H, p, D], values: f32[1, H, p, D], results: f32[1, p, V])
    new = slice(ids, 1, p, p + n)
    q, k, v = linear(embedding(w, new)), ...
    keys = cache_grow(keys, n, 2); cache_write_(keys, k, arange(p, p + n), 2); ...
    attention(q, keys, values, causal at offset p); return results

The proof is passes/relations.py: no element of what is kept may change when the sequence gets longer. The pass
leaves the graph as it is and notes the proof on it (`PLAN`); `insert_cache` makes the cached graph of a proof when a
program first wants one (llmcomp/reuse.py). What is kept are the slots: computed tensors of which all positions
are read (keys, values) or returned (logits). Whatever depends on positions or tokens alone is made anew.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch
from torch import SymInt
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from llmcomp.graph import insert, is_contiguous, is_tensor, replace, source, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.demand import Demands, content, find_demands
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.quantize_cache import FLOATS, attended, quantize_operand
from llmcomp.passes.relation_experts import ordered
from llmcomp.passes.relation_rules import POINTWISE, RULES
from llmcomp.passes.relations import Mixing, Relation, Rules, expression, relate
from llmcomp.quantized_cache import cache_tensor

NAME = "insert_kv_cache"
PLAN = "kv_cache"
"""The key of a graph module's meta under which the pass leaves its proof."""

PROOF = Rules(RULES, POINTWISE, ordered)


@dataclass(frozen=True)
class Sequence:
    """An input along the sequence: its place among the inputs, and its axis."""

    position: int
    axis: int


@dataclass(frozen=True)
class Slot:
    """What is kept from call to call: a tensor that grows along `axis`, with s + `extra` elements there."""

    node: Node
    axis: int
    extra: int
    attended: bool  # attention reads it as keys or values, or as codes or scales of them


@dataclass(frozen=True)
class Plan:
    """A graph with the proof that it can be computed piece by piece."""

    gm: GraphModule
    length: sympy.Symbol
    relations: dict[Node, Relation] = field(repr=False)
    demands: Demands = field(repr=False)
    sequences: tuple[Sequence, ...] = ()
    slots: tuple[Slot, ...] = ()
    strided: bool = False  # whether results of several rows show the slots too, though eager's are contiguous

    def slot(self, node: Node) -> Slot | None:
        """The slot that keeps a node, if one does."""
        return next((s for s in self.slots if s.node is node), None)


def insert_kv_cache(dtype: torch.dtype | None = None, strided: bool = False) -> Pass:
    """The proof that only new positions need computing. Keys and values are kept as codes of `dtype`, where given.

    With `strided`, no result is copied for being contiguous.
    """

    def run(graph: Graph, report: Report) -> None:
        gm = graph.owning_module
        forward = gm is not None and gm.meta.get("kind") == "forward"
        attention = next(_attentions(graph, forward), None)
        if gm is None or attention is None:
            return
        if forward:
            report.miss(
                attention, "the graph records gradients: a loop under torch.no_grad() computes only what is new"
            )
            return
        failure: Mixing | None = None
        for length in _lengths(graph):
            try:
                plan = _with_codes(_with_masks(prove(gm, length), gm), gm, dtype)
                gm.meta[PLAN] = dataclasses.replace(plan, strided=strided)
                report.rewrites += 1
                return
            except Mixing as mixing:
                failure = failure or mixing
        if failure is not None:
            report.miss(failure.node, failure.reason)
        elif not any(True for _ in _lengths(graph)):
            report.miss(attention, "the sequence has a fixed length: from the second length on it may vary")

    return Pass(NAME, run, needs=frozenset({SHAPES}))


def _attentions(graph: Graph, forward: bool) -> Iterator[Node]:
    """The attention of a graph; where gradients are recorded it is torch's own."""
    yield from graph.find_nodes(op="call_function", target=torch.ops.llmcomp.attention.default)
    if forward:
        yield from (n for n in graph.nodes if "scaled_dot_product" in str(n.target))


def _with_masks(plan: Plan, gm: GraphModule) -> Plan:
    """The proof of `gm` where inputs that say something of every token (a mask, positions) grow with the tokens.

    Dynamo gives each input a length of its own. Where those are equal now, the graph is made for such calls alone: a
    guard says so, and a call with other lengths is traced anew.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    length, found = val(inputs[plan.sequences[0].position]).shape[plan.sequences[0].axis], False
    assert isinstance(length, SymInt)
    for node in inputs:
        if not is_tensor(node) or node.meta.get("static") or val(node).dtype.is_floating_point:
            continue
        for size in val(node).shape:
            if isinstance(size, SymInt) and expression(size).is_Symbol and expression(size) != expression(length):
                if size.node.has_hint() and size.node.hint == length.node.hint:
                    found = bool(size == length) or found  # adds the guard
    return prove(gm, expression(length)) if found else plan


def _with_codes(plan: Plan, gm: GraphModule, dtype: torch.dtype | None) -> Plan:
    """The proof of `gm` where what the graph does not return of keys and values, but a program keeps, is quantized too.

    The graph itself then reads them so: results do not depend on how a text was cut into calls.
    """
    kept = {s.node.name for s in plan.slots if s.attended}
    operands = [] if dtype is None else [n for n in attended(gm.graph) if n.name in kept and val(n).dtype in FLOATS]
    for operand in operands:
        assert dtype is not None
        quantize_operand(operand, dtype)
    return prove(gm, plan.length) if operands else plan


def _lengths(graph: Graph) -> Iterator[sympy.Symbol]:
    """Symbols that may be the length of the sequence: sizes of tokens, of what is known of each, of embeddings."""
    inputs = [n for n in graph.find_nodes(op="placeholder") if is_tensor(n) and not n.meta.get("static")]
    tokens = [n for n in inputs if not val(n).dtype.is_floating_point]
    embeddings = [n for n in inputs if val(n).dtype.is_floating_point and val(n).dim() == 3]
    seen = set()
    for node in (*tokens, *embeddings):
        for size in reversed(val(node).shape):
            symbol = expression(size)
            if symbol.is_Symbol and symbol not in seen:
                seen.add(symbol)
                yield symbol


def prove(gm: GraphModule, length: sympy.Symbol) -> Plan:
    """The proof that `gm` can be computed piece by piece along the sequence of `length`, on a copy of its graph.

    Raises:
        Mixing: it cannot; says which node stopped it and why.
    """
    relate(gm.graph, length, PROOF)  # most graphs fail here, before anything is copied
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    _copy_parts_only(graph)
    copy = GraphModule(gm, graph)
    try:
        return _proved(copy, length)
    except Mixing as mixing:
        originals = {c: n for n, c in copies.items()}
        raise Mixing(originals.get(mixing.node, mixing.node), mixing.reason) from None


def _copy_parts_only(graph: Graph) -> None:
    """slice(clone(x)) becomes clone(slice(x)): the last few keys of a sliding window are not a copy of all."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        copy = node.args[0]
        if isinstance(copy, Node) and copy.target is torch.ops.aten.clone.default:
            with graph.inserting_before(node):
                part = insert(graph, torch.ops.aten.slice.Tensor, copy.args[0], *node.args[1:])
                replace(node, insert(graph, torch.ops.aten.clone.default, part, **copy.kwargs))
    graph.eliminate_dead_code()


def _proved(gm: GraphModule, length: sympy.Symbol) -> Plan:
    relations = relate(gm.graph, length, PROOF)
    for node in results(gm.graph):
        relation = relations.get(node)
        if relation is not None and relation.along and (relation.ahead or 0) > 0:
            raise Mixing(node, f"a result looks {relation.ahead} positions ahead")
    demands = find_demands(gm.graph, results(gm.graph), relations)
    slots = tuple(_slot(node, relations[node], gm.graph) for node in demands.kept)
    if not slots:
        raise Mixing(next(iter(reversed(results(gm.graph)))), "nothing that is computed for earlier positions is read")
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    sequences = tuple(Sequence(i, r.axes[0]) for i, n in inputs if (r := relations[n]).along)
    return Plan(gm, length, relations, demands, sequences, slots)


def _slot(node: Node, relation: Relation, graph: Graph) -> Slot:
    (along,) = relation.along
    operands = attended(graph)
    codes = (n for n in operands if n.target is torch.ops.llmcomp.cache_dequantize.default)
    return Slot(node, along.axis, along.extra, node in operands or any(node in n.args[:2] for n in codes))


def returned(graph: Graph) -> list[Argument] | tuple[Argument, ...]:
    """What a graph returns: nodes, numbers, None."""
    (output,) = graph.find_nodes(op="output")
    given = output.args[0]
    assert isinstance(given, list | tuple)
    return given


def results(graph: Graph) -> list[Node]:
    """The nodes that a graph returns."""
    return [n for n in returned(graph) if isinstance(n, Node)]


def lent(plan: Plan, result: Node) -> Slot | None:
    """The slot whose memory a result of the cached graph shows, or None where it has its own."""
    node = content(result, plan.relations)
    slot = plan.slot(source(node) if node.target is cache_tensor else node)
    return None if slot is None or is_copied(plan, slot, result) else slot


def is_copied(plan: Plan, slot: Slot, result: Node) -> bool:
    """Slots lie position by position. Keys and values are returned so; other results are copied where eager's
    are contiguous and a slot is not, so that view() goes on working.
    """
    before = val(result).shape[: slot.axis]
    contiguous = not slot.attended and is_contiguous(val(result))
    return not plan.strided and contiguous and any(n != 1 for n in before)
