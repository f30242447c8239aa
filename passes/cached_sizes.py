"""The sizes of a cached graph: those of the graph it is made of, with past + new for the length of the sequence."""

from collections.abc import Sequence

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node

from llmcomp import compat
from llmcomp.passes.relations import expression
from llmcomp.passes.sizes import size_node

PAST, NEW = "past", "new"
# Examples of the sizes, for decisions that need one: a prompt behind a context as long as the traced sequence.
LEAST_PAST, EXAMPLE_NEW = 8, 24


class CachedSizes:
    """Symbols of a new graph for those of an old one."""

    def __init__(self, graph: Graph, old: Graph, length: sympy.Symbol, past: int | None, new: int | None) -> None:
        """`length` is the symbol of `old` that becomes past + new; each is a fixed number, or varies from 2 on."""
        fixed = {PAST: past, NEW: new}
        others = sorted(_symbols(old) - {length}, key=str)
        hints = {str(s): _example(old, s) for s in others}
        hints |= {PAST: max(LEAST_PAST, _example(old, length)), NEW: EXAMPLE_NEW}
        self.mode, made = compat.fresh_sizes({n: h for n, h in hints.items() if fixed.get(n) is None})
        values = {n: sympy.Integer(k) for n, k in fixed.items() if k is not None}
        values |= {n: expression(size) for n, size in made.items()}
        self.past, self.new = values[PAST], values[NEW]
        self._graph = graph
        self._examples = {values[n]: h for n, h in hints.items() if n in made}
        self._symbols = {s: values[str(s)] for s in others} | {length: self.past + self.new}
        self._numbers: dict[sympy.Expr, int | Node] = {}

    def replaced(self, expr: sympy.Expr) -> sympy.Expr:
        """An expression over sizes of the old graph in those of the new one."""
        return sympy.expand(expr.subs(self._symbols, simultaneous=True))

    def moved(self, size: int | SymInt) -> sympy.Expr:
        """A size of the old graph in symbols of the new one."""
        return self.replaced(expression(size))

    def size(self, expr: sympy.Expr) -> int | SymInt:
        """A size of fake tensors of the new graph."""
        expr = sympy.expand(expr)
        return compat.sized(self.mode, expr, int(expr.subs(self._examples)))

    def number(self, expr: sympy.Expr) -> int | Node:
        """A size as an argument of a call: a plain integer, or the node that computes it."""
        expr = sympy.expand(expr)
        if expr not in self._numbers:
            self._numbers[expr] = size_node(self._graph, self.size(expr))
        return self._numbers[expr]

    def fake(self, shape: Sequence[sympy.Expr], strides: Sequence[sympy.Expr], like: Tensor) -> Tensor:
        """A fake tensor of the dtype and device of `like`."""
        sizes, steps = [self.size(n) for n in shape], [self.size(n) for n in strides]
        with self.mode:
            return torch.empty_strided(sizes, steps, dtype=like.dtype, device=like.device)


def _symbols(graph: Graph) -> set[sympy.Symbol]:
    """All size symbols of the inputs of a graph."""
    found: set[sympy.Symbol] = set()
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = [*value.shape, *value.stride()] if isinstance(value, Tensor) else [value]
        for size in sizes:
            if isinstance(size, SymInt):
                found |= expression(size).free_symbols
    return found


def _example(graph: Graph, symbol: sympy.Symbol) -> int:
    """An example of a size, from the call that was traced."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in [*value.shape] if isinstance(value, Tensor) else [value]:
            if isinstance(size, SymInt) and size.node.expr == symbol and size.node.hint is not None:
                return max(int(size.node.hint), 2)
    return 8
