"""Products of batches of matrices become llmcomp::grouped_linear, whose rows pick their matrix.

    baddbmm(x, a, b)  ->  x + bmm(a, b)
    bmm(a, b)         ->  grouped_linear(a.view(B * M, K), b, [M, 2 * M, ..., B * M], kn=True).view(B, M, N)

a is (B, M, K), b (B, K, N). Attention is recognized before; what is left are its unusual forms and the products
of recurrent layers.
"""

import torch
from torch import SymInt
from torch.fx import Graph, Node
from torch.fx.node import Argument
from torch.utils._sympy.functions import FloorDiv

from llmcomp.graph import Size, argument, insert, is_view, replace, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.groups import LEFT_TO_LIBRARY, Library
from llmcomp.passes.sizes import size_node, writable

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def recognize_bmm(library: Library) -> Pass:
    """The pass; products of which `library` is true are left to the library of the target."""

    def run(graph: Graph, report: Report) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.baddbmm.default):
            report.rewrites += _split(node)
        ends: dict[tuple[str, str], Node] = {}
        for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
            a, b = val(node.args[0]), val(node.args[1])
            if a.dtype not in DTYPES or not all(writable(n) for n in (*a.shape, b.shape[2])):
                report.miss(node, f"a product in {a.dtype}, of {tuple(a.shape)}")
            elif library(node):
                node.meta["extern_reason"] = LEFT_TO_LIBRARY
            else:
                _rewrite(node, ends)
                report.rewrites += 1

    return Pass("recognize_bmm", run, needs=frozenset({SHAPES}))


def _split(node: Node) -> bool:
    """baddbmm(x, a, b) -> beta * x + alpha * bmm(a, b); a `beta` of 0 would hide what is not finite in x."""
    (x, a, b), alpha, beta = node.args, argument(node, "alpha"), argument(node, "beta")
    if beta == 0:
        return False
    with node.graph.inserting_before(node):
        product = _scaled(insert(node.graph, aten.bmm.default, a, b), alpha)
        assert isinstance(x, Node)
        replace(node, insert(node.graph, aten.add.Tensor, product, _scaled(x, beta)))
    return True


def _scaled(x: Node, factor: Argument) -> Node:
    return x if factor == 1 else insert(x.graph, aten.mul.Tensor, x, factor)


def _rewrite(node: Node, known: dict[tuple[str, str], Node]) -> None:
    graph, (a, b) = node.graph, node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    batch, rows, depth = val(a).shape
    ends = _ends(node, batch, rows, known)
    with graph.inserting_before(node):
        shape = [size_node(graph, n) for n in (batch * rows, depth)]
        flat = insert(graph, aten.reshape.default, a, shape)
        product = insert(graph, torch.ops.llmcomp.grouped_linear.default, flat, _strided(b), ends, True)
        result = [size_node(graph, n) for n in (batch, rows, val(b).shape[2])]
        replace(node, insert(graph, aten.view.default, product, result))


def _strided(matrices: Node) -> Node:
    """The matrices, copied where they are a view whose strides are unclear: it merges axes of computed sizes."""
    computed = any(isinstance(n, SymInt) and n.node.expr.has(FloorDiv) for n in val(matrices).shape)
    if not (computed and is_view(matrices)):
        return matrices
    return insert(matrices.graph, aten.clone.default, matrices, memory_format=torch.contiguous_format)


def _ends(node: Node, batch: Size, rows: Size, known: dict[tuple[str, str], Node]) -> Node:
    """Where the rows of each matrix end: (B,) integers, computed once for all products of a shape."""
    key = (str(batch), str(rows))
    if key not in known:
        graph = node.graph
        first = next(n for n in graph.nodes if n.op != "placeholder" and n.op != "get_attr")
        sized = isinstance(batch, int) and isinstance(rows, int)
        with graph.inserting_before(first if sized else node):
            numbers = insert(graph, aten.arange.default, size_node(graph, batch), device=val(node).device)
            counted = insert(graph, aten.add.Tensor, numbers, 1)
            known[key] = insert(graph, aten.mul.Tensor, counted, size_node(graph, rows))
    return known[key]
