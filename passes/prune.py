"""Weights that are zero are neither read nor multiplied.

    mul(weight, mask)                             ->  the same, computed once and not in every call
    linear(gated(linear(x, a), linear(x, b)), c)  ->  the same of index_select(a, 0, kept), (b, 0, kept), (c, 1, kept)
    linear(y, c)                                  ->  linear(index_select(y, -1, kept), index_select(c, 1, kept))
    add(residual, linear(x, zeros))               ->  residual
    scattered zeros, 2:4                          ->  compressed matrices: passes/compress.py

What is computed of weights alone is marked, for llmcomp/prepared.py to compute when a weight has changed. Exact for the
weights as they are; what the pass relied on is in `gm.meta["zero_facts"]`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from llmcomp.graph import insert, mutated, replace, same_shape, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.compress import compress
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.zero_structure import CASTS, PREPARED, UNARY, Values
from llmcomp.products import LINEAR, bias_of, operand_of

aten = torch.ops.aten
FACTS = "zero_facts"
POINTWISE = (*UNARY, *CASTS, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, torch.ops.llmcomp.gated.default)
LEAST = 16  # channels: what a vector holds; kept ones are a multiple of it
PART = 0.02  # of the channels: less is not worth another copy of the weights


def prune(weights: Mapping[str, Tensor], packs: bool = False) -> Pass:
    """The pass for a graph whose parameters have these values, by the names of their placeholders.

    `packs`: kernels read 2:4 sparse weights faster than dense ones.
    """

    def run(graph: Graph, report: Report) -> None:
        written = mutated(graph)
        inputs = [n for n in graph.find_nodes(op="placeholder") if n not in written]
        values = Values({n: weights[n.name] for n in inputs if n.name in weights})
        _fold_masks(graph, values, report)
        _drop_zero_products(graph, values, report)
        graph.eliminate_dead_code()
        _shrink_operands(graph, values, report)
        graph.eliminate_dead_code()
        compress(graph, values, packs, report)
        assert graph.owning_module is not None
        graph.owning_module.meta[FACTS] = tuple(values.facts.values())

    return Pass("prune", run, needs=frozenset({SHAPES}))


# ---- masks ----------------------------------------------------------------------------------------------------------


def _fold_masks(graph: Graph, values: Values, report: Report) -> None:
    for node in list(graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
        operands = [values.of(n) for n in node.all_input_nodes]
        known = [value for value in operands if value is not None]
        if len(known) != 2 or len(operands) != 2:
            continue
        masks = [value for value in known if _is_mask(value)]
        if not masks:
            continue
        if any(value.requires_grad for value in masks):
            report.miss(node, "the mask requires grad: it is learned, and multiplied in every call")
        else:
            node.meta[PREPARED] = True
            report.rewrites += 1


def _is_mask(value: Tensor) -> bool:
    """Whether a tensor holds zeros and ones, of both some."""
    return bool(((value == 0) | (value == 1)).all()) and bool((value == 0).any())


# ---- layers that add nothing ----------------------------------------------------------------------------------------


def _drop_zero_products(graph: Graph, values: Values, report: Report) -> None:
    for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if len(node.all_input_nodes) != 2 or node.kwargs:
            continue
        for product, other in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if product.target is LINEAR and _is_zero(product, values) and _same(other, node):
                replace(node, other)
                report.rewrites += 1
                break


def _is_zero(product: Node, values: Values) -> bool:
    found = values.channels(product)
    return found is not None and bool(found.all())


def _same(a: Node, b: Node) -> bool:
    return val(a).dtype == val(b).dtype and same_shape(val(a).shape, val(b).shape)


# ---- channels -------------------------------------------------------------------------------------------------------


def _shrink_operands(graph: Graph, values: Values, report: Report) -> None:
    by_operand: dict[Node, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        by_operand.setdefault(operand_of(node), []).append(node)
    for operand, layers in by_operand.items():
        found = [values.unread(layer) for layer in layers]
        unread = [x for x in found if x is not None]
        if len(unread) < len(layers):
            continue
        dropped = torch.stack(unread).all(0)
        count = int(dropped.sum())
        if count == 0:
            continue
        kept = _kept(dropped)
        if len(dropped) - len(kept) < max(LEAST, PART * len(dropped)):
            report.miss(layers[0], f"{count} of its {len(dropped)} inputs do not count: too few to pay")
            continue
        _shrink(operand, layers, kept, values, report)


def _kept(dropped: Tensor) -> Tensor:
    """The channels that stay: those that count, and some others, to make a multiple of LEAST."""
    order = torch.argsort(dropped.to(torch.int8), stable=True)
    count = int((~dropped).sum())
    number = min(max(LEAST, -(-count // LEAST) * LEAST), len(dropped))
    return order[:number].sort().values


def _shrink(operand: Node, layers: Sequence[Node], kept: Tensor, values: Values, report: Report) -> None:
    graph = operand.graph
    first = min(layers)
    with graph.inserting_before(first):
        index = _constant(graph, kept, val(operand))
    reason = _fixed(operand, set(layers), values)
    if reason is None:
        made = _smaller(operand, index, {})
    else:
        report.miss(operand, f"computed whole, for {reason}")
        with graph.inserting_before(first):
            made = insert(graph, aten.index_select.default, operand, -1, index)
    for layer in layers:
        weight, bias, kn = layer.args[1], bias_of(layer), bool(layer.args[3])
        assert isinstance(weight, Node)
        with graph.inserting_before(layer):
            less = _take(weight, 0 if kn else 1, index)
            new = insert(graph, LINEAR, made, less, bias, kn)
        replace(layer, new)
        report.rewrites += 1


def _constant(graph: Graph, kept: Tensor, like: Tensor) -> Node:
    """A node whose value is a tensor of the module that owns the graph."""
    module = graph.owning_module
    assert module is not None
    name = next(n for i in range(1 << 30) if not hasattr(module, n := f"kept_{i}"))
    module.register_buffer(name, kept.to(like.device), persistent=False)
    index = graph.get_attr(name)
    mode = torch._guards.detect_fake_mode([like])
    assert mode is not None
    with mode:
        index.meta["val"] = torch.empty(kept.shape, dtype=torch.int64, device=like.device)
    return index


def _take(weight: Node, dim: int, index: Node) -> Node:
    """The part of a weight that counts, made where the graph stands."""
    part = insert(weight.graph, aten.index_select.default, weight, dim, index)
    part.meta[PREPARED] = True
    return part


def _fixed(node: Node, readers: set[Node], values: Values) -> str | None:
    """Why a node can't be computed for some of its channels alone, or None."""
    if set(node.users) - readers:
        other = next(user for user in node.users if user not in readers)
        return f"{other.name} reads all of it"
    if node.target is LINEAR:
        weight, bias = node.args[1], bias_of(node)
        known = values.of(weight) is not None and (bias is None or values.of(bias) is not None)
        return None if known else f"the weight of {node.name} is computed"
    if node.target not in POINTWISE:
        return f"{node.name} is no linear layer and not computed channel by channel"
    reasons = (_fixed(n, {node}, values) for n in node.all_input_nodes if _along(n, node))
    return next((reason for reason in reasons if reason is not None), None)


def _along(operand: Node, node: Node) -> bool:
    """Whether an operand has the channels of `node`, and is not broadcast along them."""
    shape = val(operand).shape
    return len(shape) > 0 and bool(shape[-1] == val(node).shape[-1])


def _smaller(node: Node, index: Node, made: dict[Node, Node]) -> Node:
    """`node` for the channels in `index`."""
    if node in made:
        return made[node]
    graph = node.graph
    if node.target is LINEAR:
        weight, bias, kn = node.args[1], bias_of(node), bool(node.args[3])
        assert isinstance(weight, Node)
        with graph.inserting_before(node):
            index = _moved(index)
            less = _take(weight, 1 if kn else 0, index)
            part = None if bias is None else _take(bias, 0, index)
            made[node] = insert(graph, LINEAR, operand_of(node), less, part, kn)
        return made[node]
    inner = {n: _smaller(n, index, made) for n in node.all_input_nodes if _along(n, node)}
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: inner.get(n, n))
    with graph.inserting_before(node):
        made[node] = insert(graph, node.target, *args, **kwargs)  # type: ignore[arg-type]
    return made[node]


def _moved(index: Node) -> Node:
    """The same constant, where the graph stands."""
    again = index.graph.get_attr(str(index.target))
    again.meta["val"] = index.meta["val"]
    return again
