"""Every node of the graph gets a kernel: what is left after the fusing passes becomes Map, Rows, Attend or Extern.

    mul -> add -> rms_norm      ->  one Rows kernel, or two where something else needs a value in between

Nodes are labelled, not rewritten; `read_partition` gives the result.
"""

import torch
from torch.fx import Graph, Node

from llmcomp.hints import elements
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.groups import Fits, Groups, Label
from llmcomp.region import Partition, Region

LARGEST = 48  # nodes in one Map or Rows kernel: beyond it source gets long and nothing is saved
# Worth computing once and storing where the result is broadcast to something larger.
COSTLY = frozenset("sin cos exp tanh erf pow log sqrt rsqrt embedding gather index softmax mean sum".split())


def partition(fits: Fits) -> Pass:
    """Assign every node that no kernel has taken yet."""

    def run(graph: Graph, report: Report) -> None:
        groups = Groups(graph)
        for node in graph.nodes:
            if node.op == "call_function" and groups.label(node) is None and node not in groups.inlined:
                _place(groups, node, fits, report)

    return Pass("partition", run, needs=frozenset({SHAPES}))


def _place(groups: Groups, node: Node, fits: Fits, report: Report) -> None:
    if "extern_reason" in node.meta:
        groups.create("extern", [node])
        return
    reasons = []
    for family in ("attend",) if node.target is torch.ops.llmcomp.attention.default else ("map", "rows"):
        reason = fits(groups.region(family, [node]), groups.inlined)
        if reason is None:
            label = groups.create(family, [node])
            if family != "attend":
                _merge(groups, label, node, fits, report)
            return
        reasons.append(reason)
    groups.create("extern", [node])
    node.meta["extern_reason"] = reasons[0] if len(set(reasons)) == 1 else "; ".join(dict.fromkeys(reasons))
    report.miss(node, node.meta["extern_reason"])


def _merge(groups: Groups, label: Label, node: Node, fits: Fits, report: Report) -> None:
    """Join the kernels that compute what `node` reads, nearest first."""
    producers = sorted(groups.producers(node), key=groups.position.__getitem__, reverse=True)
    for producer in producers:
        other = groups.label(producer)
        if other is None or other == label or other[0] not in ("map", "rows") or _repeats(producer, node):
            continue
        together = groups.members[other] + groups.members[label]
        if len(together) > LARGEST:
            continue
        for family in ("rows",) if "rows" in (label[0], other[0]) else ("map",):
            reason = fits(groups.region(family, together), groups.inlined)
            if reason is None and groups.acyclic(together):
                label = groups.extend(label, groups.members[other], family)
                report.rewrites += 1
                break


def _repeats(producer: Node, node: Node) -> bool:
    """Whether computing `producer` inside the kernel of `node` would compute it many times over."""
    if producer.target is torch.ops.llmcomp.cache_scale.default:
        return False  # one number of each row, and all readers go by rows
    smaller, larger = elements(producer), elements(node)
    name = str(getattr(producer.target, "__name__", "")).split(".")[0].strip("_")
    return larger > smaller > 0 and (name in COSTLY or larger > 4 * smaller)


def read_partition(graph: Graph) -> Partition:
    """The kernels of a partitioned graph in the order in which they run."""
    groups = Groups(graph)
    regions: list[Region] = [groups.region(label[0], groups.members[label]) for label in groups.order()]
    return Partition(tuple(regions), frozenset(groups.inlined))
