"""Kernels around linear layers: siblings, epilogues and prologues.

    fuse_siblings   linear(x, a); linear(x, b); linear(x, c)      ->  one kernel, three matrices, no concatenation
    fuse_epilogue   add(linear(x, w), residual)                   ->  one kernel
    fuse_prologue   linear(rms_norm(x), w)                        ->  one kernel

Nodes are labelled, not rewritten. Each step asks `fits` whether the grown region is still one kernel; what it
refuses is reported with the reason.
"""

from collections.abc import Callable, Iterable

import torch
from torch.fx import Graph, Node

from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.groups import LEFT_TO_LIBRARY, Fits, Groups, Label, Library, base
from llmcomp.products import PRODUCTS, ends_of, is_product, operand_of


def fuse_siblings(fits: Fits, library: Library) -> Pass:
    """Linear layers that read the same operand share one kernel (q/k/v; gate/up)."""

    def run(graph: Graph, report: Report) -> None:
        groups = Groups(graph)
        by_operand: dict[tuple[Node, ...], list[Node]] = {}
        for node in graph.nodes:
            if not is_product(node):
                continue
            if library(node):
                node.meta["extern_reason"] = LEFT_TO_LIBRARY
            else:
                by_operand.setdefault(_operand_key(node), []).append(node)
        for siblings in by_operand.values():
            _join_siblings(groups, siblings, fits, report)

    return Pass("fuse_siblings", run, needs=frozenset({SHAPES}))


def _operand_key(node: Node) -> tuple[Node, ...]:
    return tuple(n for n in (operand_of(node), ends_of(node)) if n is not None)


def _join_siblings(groups: Groups, siblings: list[Node], fits: Fits, report: Report) -> None:
    label: Label | None = None
    for node in siblings:
        alone = fits(groups.region("contract", [node]), groups.inlined)
        if alone is not None:
            report.miss(node, alone)
            continue
        if label is not None:
            together = [*groups.members[label], node]
            reason = fits(groups.region("contract", together), groups.inlined)
            if reason is None and groups.acyclic(together):
                label = groups.extend(label, [node])
                report.rewrites += 1
                continue
            report.miss(node, reason or "its sibling must run first")
        label = groups.create("contract", [node])


def fuse_epilogue(fits: Fits) -> Pass:
    """What happens to the result of a linear layer, element by element, happens in its kernel."""

    def run(graph: Graph, report: Report) -> None:
        groups = Groups(graph)
        for label in [x for x in groups.order() if x[0] == "contract"]:
            _grow(groups, label, fits, report)

    return Pass("fuse_epilogue", run, needs=frozenset({SHAPES}))


def _grow(groups: Groups, label: Label, fits: Fits, report: Report) -> None:
    refused: dict[Node, str] = {}
    while taken := _next(groups, label, fits, refused):
        label = groups.extend(label, taken)
        refused.clear()
        report.rewrites += len(taken)
    for node, reason in refused.items():
        report.miss(node, reason)


def _next(groups: Groups, label: Label, fits: Fits, refused: dict[Node, str]) -> list[Node]:
    """The next nodes to take: one, or one with a reader of it where only both together fit.

    silu(gate) * up of one linear layer is such a pair: after silu alone, half of the result would be stored.
    """
    for node in _readers(groups, label):
        reason = _refusal(groups, label, [node], fits)
        if reason is None:
            return [node]
        refused[node] = reason
        for reader in sorted(_free(groups, groups.readers(node)), key=groups.position.__getitem__):
            if _refusal(groups, label, [node, reader], fits) is None:
                return [node, reader]
    return []


def _readers(groups: Groups, label: Label) -> list[Node]:
    found = {r for n in groups.members[label] for r in _free(groups, groups.readers(n))}
    return sorted(found, key=groups.position.__getitem__)


def _free(groups: Groups, nodes: Iterable[Node]) -> set[Node]:
    """Nodes that no kernel has taken and that are no heads of kernels themselves."""
    heads = (*PRODUCTS, torch.ops.llmcomp.attention.default)
    return {n for n in nodes if n.op == "call_function" and groups.label(n) is None and n.target not in heads}


def _refusal(groups: Groups, label: Label, nodes: list[Node], fits: Fits) -> str | None:
    grown = [*groups.members[label], *nodes]
    reason = fits(groups.region("contract", grown), groups.inlined)
    if reason is None and not groups.acyclic(grown):
        return "it waits for something that needs this kernel"
    return reason


def fuse_prologue(fits: Fits, rows: Callable[[Node], int], most_rows: int) -> Pass:
    """A norm that only one kernel's linear layers read is computed in that kernel, once for each thread or block.

    Above `most_rows` rows the repetition costs more than a kernel of its own; `rows` tells how many there are.
    """

    def run(graph: Graph, report: Report) -> None:
        groups = Groups(graph)
        for label in [x for x in groups.order() if x[0] == "contract"]:
            _absorb(groups, label, fits, rows, most_rows, report)

    return Pass("fuse_prologue", run, needs=frozenset({SHAPES}))


def _absorb(
    groups: Groups, label: Label, fits: Fits, rows: Callable[[Node], int], most_rows: int, report: Report
) -> None:
    layer = next(n for n in groups.members[label] if is_product(n))
    producer = base(operand_of(layer))
    if producer.op != "call_function" or groups.label(producer) is not None or producer in groups.inlined:
        return
    grown = [*groups.members[label], producer]
    if rows(layer) > most_rows:
        report.miss(producer, f"{rows(layer)} rows: a kernel of its own is cheaper")
    elif any(groups.label(r) != label for r in groups.readers(producer)):
        report.miss(producer, "others read it too")
    elif (reason := fits(groups.region("contract", grown), groups.inlined)) is not None:
        report.miss(producer, reason)
    elif groups.acyclic(grown):
        groups.extend(label, [producer])
        report.rewrites += 1
