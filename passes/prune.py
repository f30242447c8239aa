"""Weights that are zero are neither read nor multiplied.

    mul(weight, mask)                   ->  the same, computed once and not in every call
    where(mask, weight, 0)              ->  the same; masked_fill too
    add(residual, linear(x, zeros))     ->  residual
    channels and heads that don't count ->  smaller matrices, and less of what lies between: passes/shrink.py,
                                            of experts passes/shrink_experts.py
    blocks of zeros, 2:4, scattered     ->  compressed matrices: passes/compress.py

What is computed of weights alone is marked, for llmcomp/prepared.py to compute when a weight has changed. Exact for the
weights as they are and finite operands (what is left out would give NaN where it meets NaN or infinity, and counts as
zero); what the pass relied on is in `gm.meta["zero_facts"]`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Graph, Node

from llmcomp.costs import work
from llmcomp.graph import mutated, replace, same_shape, val
from llmcomp.passes.base import Pass, Report, Saving
from llmcomp.passes.compress import compress
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.narrow import Indices
from llmcomp.passes.shrink import shrink_heads, shrink_operands, shrink_streams
from llmcomp.passes.shrink_experts import shrink_experts
from llmcomp.passes.zero_structure import FILLS, PREPARED, Values, is_mask
from llmcomp.products import LINEAR

aten = torch.ops.aten
FACTS = "zero_facts"
MULTIPLIED = (aten.mul.Tensor,)
FILLED = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
CHOSEN = (aten.where.self, *FILLED)


def prune(weights: Mapping[str, Tensor], packs: bool = False, skips: int = 0) -> Pass:
    """The pass for a graph whose parameters have these values, by the names of their placeholders.

    `packs`: kernels read 2:4 sparse weights faster than dense ones; `skips`: they skip blocks of zeros, faster too,
    for up to so many rows of the operand.
    """

    def run(graph: Graph, report: Report) -> None:
        written = mutated(graph)
        inputs = [n for n in graph.find_nodes(op="placeholder") if n not in written]
        values = Values({n: weights[n.name] for n in inputs if n.name in weights})
        indices, whole = Indices(graph), dict[Node, str]()
        for name, step in (
            ("masks that are multiplied once", lambda: _fold_masks(graph, values, report)),
            ("layers that add nothing", lambda: _drop_zero_products(graph, values, report)),
            ("heads of attention", lambda: shrink_heads(graph, values, indices, report)),
            ("hidden channels", lambda: whole.update(shrink_streams(graph, values, indices, report))),
            ("channels of experts", lambda: shrink_experts(graph, values, indices, report)),
            ("channels between layers", lambda: shrink_operands(graph, values, indices, report, whole)),
            ("matrices stored without zeros", lambda: compress(graph, values, packs, skips, report)),
        ):
            _saving(name, step, graph, report)
        assert graph.owning_module is not None
        graph.owning_module.meta[FACTS] = tuple(values.facts.values())

    return Pass("prune", run, needs=frozenset({SHAPES}))


def _saving(name: str, step: Callable[[], None], graph: Graph, report: Report) -> None:
    """Run a step, and note what its rewrites save."""
    rewrites, before = report.rewrites, work(graph, PREPARED)
    step()
    graph.eliminate_dead_code()
    if report.rewrites > rewrites:
        after = work(graph, PREPARED)
        report.savings.append(Saving(name, report.rewrites - rewrites, before[0] - after[0], before[1] - after[1]))


# ---- masks ----------------------------------------------------------------------------------------------------------


def _fold_masks(graph: Graph, values: Values, report: Report) -> None:
    folds = {target: find for targets, find in ((MULTIPLIED, _multiplied), (CHOSEN, _chosen)) for target in targets}
    for node in list(graph.nodes):
        if node.op != "call_function" or (find := folds.get(node.target)) is None:
            continue
        masks = find(node, values)
        if any(value.requires_grad for value in masks):
            report.miss(node, "the mask requires grad: it is learned, and multiplied in every call")
        elif masks:
            node.meta[PREPARED] = True
            report.rewrites += 1


def _multiplied(node: Node, values: Values) -> list[Tensor]:
    """The masks of weight * mask, where both are known."""
    operands = [values.of(n) for n in node.all_input_nodes]
    known = [value for value in operands if value is not None]
    return [value for value in known if is_mask(value)] if len(known) == len(operands) == 2 else []


def _chosen(node: Node, values: Values) -> list[Tensor]:
    """The mask of where(mask, weight, 0) or masked_fill(weight, mask, 0), where both are known."""
    weight, mask, fill = node.args[:3] if node.target in FILLED else (node.args[1], node.args[0], node.args[2])
    if _is_nothing(weight, values):
        weight, fill = fill, weight
    where = values.of(mask)
    known = where is not None and values.of(weight) is not None and _is_nothing(fill, values)
    return [where] if known and where is not None and is_mask(where) else []


def _is_nothing(value: object, values: Values) -> bool:
    """Whether an argument is 0, or nothing but zeros."""
    if isinstance(value, Node):
        found = values.of(value) if value.target in FILLS or value.op == "get_attr" else None
        return found is not None and not bool(found.any())
    return value == 0


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
