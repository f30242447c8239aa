"""Lowering with memory: layers that are alike are lowered once.

Two regions are alike when they hold the same operators with the same constants, wired in the same way, over
values of the same dtype, shape and strides; symbolic sizes count by order of appearance, not by name.
"""

from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen import kernel as K
from llmcomp.codegen.index import size
from llmcomp.codegen.lower import lower
from llmcomp.codegen.lowered import Lowered
from llmcomp.region import Region, Unfit


@dataclass(frozen=True)
class _Known:
    """A kernel, and where its arguments stand in the description of its region."""

    kernel: K.Kernel
    buffers: tuple[int, ...]
    sizes: tuple[int, ...]


class Lowerer:
    """Lowers the regions of one graph."""

    def __init__(self) -> None:
        self._known: dict[object, _Known | str] = {}

    def fits(self, region: Region, inlined: Set[Node]) -> str | None:
        """Why a region cannot be one kernel, or None where it can."""
        known = self._lookup(_Description(region, inlined), region, inlined)
        return known if isinstance(known, str) else None

    def lower(self, region: Region, inlined: Set[Node]) -> Lowered:
        """The kernel of a region.

        Raises:
            Unfit: the region cannot be one kernel; the text is the reason.
        """
        described = _Description(region, inlined)
        known = self._lookup(described, region, inlined)
        if isinstance(known, str):
            raise Unfit(known)
        buffers = tuple(described.nodes[i] for i in known.buffers)
        return Lowered(known.kernel, buffers, tuple(described.symbols[i] for i in known.sizes))

    def _lookup(self, described: "_Description", region: Region, inlined: Set[Node]) -> _Known | str:
        if described.key not in self._known:
            self._known[described.key] = _lowered(described, region, inlined)
        return self._known[described.key]


def _lowered(described: "_Description", region: Region, inlined: Set[Node]) -> _Known | str:
    try:
        result = lower(region, inlined)
    except Unfit as reason:
        return str(reason)
    return _Known(
        result.kernel,
        tuple(described.nodes.index(n) for n in result.buffers),
        tuple(described.symbols.index(s) for s in result.sizes),
    )


class _Description:
    """A region written down without names: `key` is equal for regions that are alike."""

    def __init__(self, region: Region, inlined: Set[Node]) -> None:
        self.nodes: list[Node] = []
        self.symbols: list[sympy.Symbol] = []
        self._number: dict[Node, int] = {}
        self._inside = set(region.nodes)
        self._inlined = inlined
        lines = [self._line(n) for n in self._ordered(region)]
        self.key = (region.family, tuple(lines), tuple(self._number[o] for o in region.outputs))

    def _ordered(self, region: Region) -> list[Node]:
        for node in region.nodes:
            self._visit(node)
        return self.nodes

    def _visit(self, node: Node) -> None:
        if node in self._number:
            return
        self._number[node] = -1
        if node in self._inside or node in self._inlined:
            for source in node.all_input_nodes:
                self._visit(source)
        self._number[node] = len(self.nodes)
        self.nodes.append(node)

    def _line(self, node: Node) -> object:
        value = self._value(node.meta.get("val"))
        if node not in self._inside and node not in self._inlined:
            return ("extern", value)
        return (
            node.target,
            self._argument(node.args),
            self._argument(tuple(sorted(node.kwargs.items()))),
            value,
        )

    def _value(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            shape = tuple(self._size(n) for n in (*value.shape, *value.stride()))
            return (value.dtype, value.device, value.dim(), shape)
        if isinstance(value, list | tuple):
            return tuple(self._value(v) for v in value)
        return self._size(value) if isinstance(value, int | torch.SymInt) else None

    def _size(self, value: int | torch.SymInt) -> object:
        if isinstance(value, int):
            return value
        expr = size(value)
        for symbol in _symbols(expr):
            if symbol not in self.symbols:
                self.symbols.append(symbol)
        hint = int(value.node.hint) if value.node.has_hint() else None
        return (_spelled(expr, tuple(map(self.symbols.index, _symbols(expr)))), hint)

    def _argument(self, value: object) -> object:
        if isinstance(value, Node):
            return ("node", self._number.get(value))
        if isinstance(value, list | tuple):
            return tuple(self._argument(v) for v in value)
        if isinstance(value, float) and value != value:
            return "nan"
        return (type(value).__name__, value) if not isinstance(value, dict) else str(value)


@lru_cache(maxsize=4096)
def _symbols(expr: sympy.Expr) -> tuple[sympy.Symbol, ...]:
    return tuple(sorted(expr.free_symbols, key=str))


@lru_cache(maxsize=4096)
def _spelled(expr: sympy.Expr, numbers: tuple[int, ...]) -> str:
    """`expr` as text with its symbols, as `_symbols` orders them, called n and a number."""
    names = {s: sympy.Symbol(f"n{i}") for s, i in zip(_symbols(expr), numbers, strict=True)}
    return str(expr.xreplace(names))
