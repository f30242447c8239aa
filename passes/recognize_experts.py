"""The grouped products of mixture-of-experts layers become llmcomp::grouped_linear.

    transformers.grouped_mm_fallback(x, w, ends)   ->  llmcomp.grouped_linear(x, w, ends, kn=True)
    aten._grouped_mm(x, w, ends)                   ->  llmcomp.grouped_linear(x, w, ends, kn=True)

x (T, K) holds the rows sorted by expert, w (E, K, N) a matrix for each, ends (E,) where the rows of each end.
"""

import torch
from torch.fx import Graph, Node

from llmcomp.graph import replace_by, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES

# By name: transformers, which registers the first, need not be installed.
NAMES = frozenset({"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"})


def _run(graph: Graph, report: Report) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in NAMES:
            continue
        if (reason := _unfit(node)) is not None:
            report.miss(node, reason)
            continue
        replace_by(node, torch.ops.llmcomp.grouped_linear.default, *node.args[:3], True)
        report.rewrites += 1


def _unfit(node: Node) -> str | None:
    """Why this product is not one of rows and experts, or None."""
    if len(node.args) != 3 or any(v is not None for v in node.kwargs.values()):
        return "it has a bias or another dtype of the result"
    x, weight, ends = node.args
    assert isinstance(x, Node) and isinstance(weight, Node) and isinstance(ends, Node)
    if val(x).dim() != 2 or val(weight).dim() != 3:
        return f"the operands have {val(x).dim()} and {val(weight).dim()} dimensions"
    if not val(x).dtype == val(weight).dtype == val(node).dtype:
        return "the operands differ in dtype"
    return None


RECOGNIZE_EXPERTS = Pass("recognize_experts", _run, needs=frozenset({SHAPES}))
