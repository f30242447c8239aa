"""Sizes as graph nodes: the integer that a symbolic size stands for, computed from what the graph is given.

    s0 + 3   ->   add(x1, 3)

Here x1 is an input that is s0, or sym_size(x0, 1) where an input x0 is f32[2, s0].
"""

import operator
from collections.abc import Mapping

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from llmcomp.graph import Size, insert
from llmcomp.passes.positions import constant

_OPERATORS: Mapping[object, object] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}


def writable(size: Size) -> bool:
    """Whether `size_node` can compute a size: sums, products and quotients of the sizes of inputs."""
    return constant(size) is not None or all(
        part.is_Symbol or part.is_Integer or part.func in _OPERATORS
        for part in sympy.preorder_traversal(_expression(size))
    )


def size_node(graph: Graph, size: Size) -> int | Node:
    """A node whose value is `size`, or a plain integer. Nodes are inserted at the graph's insertion point."""
    number = constant(size)
    return _written(graph, _expression(size)) if number is None else number


def _expression(size: Size) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def _written(graph: Graph, expr: sympy.Expr) -> int | Node:
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return _symbol(graph, expr)
    parts = [_written(graph, part) for part in expr.args]
    total = parts[0]
    for part in parts[1:]:
        total = insert(graph, _OPERATORS[expr.func], total, part)  # type: ignore[arg-type]
    return total


def _symbol(graph: Graph, symbol: sympy.Symbol) -> Node:
    """The input that is `symbol`, or the size of an input that is."""
    inputs: list[Node] = graph.find_nodes(op="placeholder")
    for node in inputs:
        value = node.meta["val"]
        if isinstance(value, SymInt) and value.node.expr == symbol:
            return node
    for node in inputs:
        value = node.meta["val"]
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, SymInt) and size.node.expr == symbol:
                return insert(graph, torch.ops.aten.sym_size.int, node, dim)
    raise AssertionError(f"no input has the size {symbol}")
