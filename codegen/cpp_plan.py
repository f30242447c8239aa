"""A run of kernel launches -> one C function, so that a compiled program is one foreign call.

    extern "C" int64_t NAME(void* const* functions, void** p, const int64_t* s, char* arena, int64_t threads)

`functions` are the addresses of kernels, `p` the table of buffer pointers, `s` the values of the size
symbols. The function writes the pointers of planned buffers into the table, calls each kernel, and returns
the status: 0, or bit 1 for an index out of range, bit 2 for an integer division by zero. After a failure no
later kernel runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from llmcomp.codegen.build import Source
from llmcomp.codegen.cpp_body import Writer
from llmcomp.codegen.cpp_expr import index


@dataclass(frozen=True)
class Launch:
    """One call of the kernel `symbol`: its place among `functions`, its buffers in the table, its sizes."""

    symbol: str
    function: int
    buffers: tuple[int, ...]
    sizes: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Slot:
    """The entry `index` of the pointer table lies in the arena, `offset` bytes from its start."""

    index: int
    offset: sympy.Expr


def render_plan(
    name: str,
    launches: Sequence[Launch],
    slots: Sequence[Slot],
    symbols: Sequence[sympy.Symbol],
    comment: Sequence[str] = (),
) -> Source:
    """The source of the function `name`; sizes and offsets are expressions of `symbols`."""
    w = Writer()
    w.line('#include "prelude.h"')
    w.line()
    head = "void* const* functions, void** p, const int64_t* s, char* arena, int64_t threads"
    with w.block(f'extern "C" int64_t {name}({head})'):
        w.lines(f"const int64_t {symbol} = s[{k}];" for k, symbol in enumerate(symbols))
        w.line("int64_t status = 0;")
        w.lines(f"p[{slot.index}] = arena + {_atom(slot.offset)};" for slot in slots)
        for launch in launches:
            _print_call(w, launch)
        w.line("return status;")
    return Source(name, "cpp", w.text(), tuple(comment))


def _print_call(w: Writer, launch: Launch) -> None:
    sizes = [_long(size) for size in launch.sizes]
    arguments = [*(f"p[{b}]" for b in launch.buffers), *sizes, "threads"]
    w.call("op::call", ["&status", f"functions[{launch.function}]", *arguments], f";  // {launch.symbol}")


def _long(size: sympy.Expr) -> str:
    """An argument that is an int64_t for certain: its type decides how it is passed."""
    return index(size) if sympy.sympify(size).is_Symbol else f"int64_t({index(size)})"


def _atom(expr: sympy.Expr) -> str:
    return index(expr) if sympy.sympify(expr).is_Atom else f"({index(expr)})"
