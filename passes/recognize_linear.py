"""Matrix products with a 2-D right side become llmcomp::linear.

    linear(x, w, b)          ->  llmcomp.linear(x, w, b, kn=False)
    mm(x, t(w))              ->  llmcomp.linear(x, w, None, kn=False)
    addmm(b, x, w)           ->  llmcomp.linear(x, w, b, kn=True)
    linear(view(x, [-1, K])) ->  view(linear(x))
    convolution(x, w, b)     ->  linear(windows of x, w, b), or a sum where each channel has its own filter

The fourth so that the views around a flattened product meet, and canonicalize drops them.
"""

import torch
from torch.fx import Graph, Node

from llmcomp.graph import argument, insert, same_size, source, val
from llmcomp.ops import OPS
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.convolutions import rewrite_convolution
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.layout import adopt
from llmcomp.passes.match import is_vector

aten = torch.ops.aten
TRANSPOSES = (aten.transpose.int, aten.permute.default)

Parts = tuple[Node, Node, Node | None, bool]


def _run(graph: Graph, report: Report) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        if (reason := rewrite_convolution(node)) is not None:
            report.miss(node, reason)
        else:
            report.rewrites += 1
    for node in list(graph.nodes):
        parts = _parts(node)
        if parts is None:
            continue
        if (reason := _unfit(*parts)) is not None:
            report.miss(node, reason)
            continue
        _rewrite(node, *parts)
        report.rewrites += 1


RECOGNIZE_LINEAR = Pass("recognize_linear", _run, needs=frozenset({SHAPES}))


def _parts(node: Node) -> Parts | None:
    """(x, weight, bias, kn) of a matrix product, or None."""
    if node.target is aten.linear.default:
        bias = argument(node, "bias")
        weight, transposed = _untransposed(argument(node, "weight"))
        return source(node), weight, bias if isinstance(bias, Node) else None, transposed
    if node.target is aten.mm.default:
        weight, transposed = _untransposed(node.args[1])
        return source(node), weight, None, not transposed
    if node.target is aten.addmm.default and argument(node, "beta") == argument(node, "alpha") == 1:
        weight, transposed = _untransposed(node.args[2])
        return source(node, 1), weight, source(node), not transposed
    return None


def _untransposed(weight: object) -> tuple[Node, bool]:
    """(w, True) where `weight` is the transposed matrix w, else (weight, False)."""
    assert isinstance(weight, Node)
    if weight.target is aten.t.default or (weight.target in TRANSPOSES and _order(weight) == [1, 0]):
        return source(weight), True
    return weight, False


def _order(view: Node) -> list[int]:
    """The axes of a matrix in the order in which a view shows them."""
    if view.target is aten.permute.default:
        return [int(d) % 2 for d in view.args[1]]  # type: ignore[arg-type,union-attr]
    a, b = (int(d) % 2 for d in view.args[1:3])  # type: ignore[arg-type]
    return [1, 0] if a != b else [0, 1]


def _unfit(x: Node, weight: Node, bias: Node | None, kn: bool) -> str | None:
    """Why this product is no linear layer, or None."""
    if not val(x).dtype.is_floating_point:
        return f"the product is of {val(x).dtype}"
    if val(weight).dim() != 2 or not val(x).dim():
        return f"the operands have {val(x).dim()} and {val(weight).dim()} dimensions"
    if {val(n).dtype for n in (x, weight, bias) if n is not None} != {val(x).dtype}:
        return "the operands differ in dtype"
    if bias is not None and not is_vector(bias, val(weight).shape[1 if kn else 0]):
        return "the bias is not a vector of one number per output"
    return None


def _rewrite(node: Node, x: Node, weight: Node, bias: Node | None, kn: bool) -> None:
    graph, y = node.graph, _before_flattening(x)
    with graph.inserting_before(node):
        new = insert(graph, OPS.linear.default, y, weight, bias, kn)
        if y is not x:
            shape = x.args[1]
            assert isinstance(shape, list | tuple)
            new = insert(graph, aten.view.default, new, [*shape[:-1], val(weight).shape[1 if kn else 0]])
    adopt(node, new)


def _before_flattening(x: Node) -> Node:
    """y where x is view(y, [-1, K]) of y (..., K), else x."""
    if x.target not in (aten.view.default, aten._unsafe_view.default):
        return x
    y = source(x)
    merges = val(x).dim() < val(y).dim() and same_size(val(x).shape[-1], val(y).shape[-1])
    return y if merges else x
