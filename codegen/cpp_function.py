"""The frame of a C++ kernel: an exported function that shares items of work among threads.

    static void NAME_part(<buffers>, <sizes>, int64_t first, int64_t last, int64_t* status)
    extern "C" void NAME(<buffers>, <sizes>, int64_t threads, int64_t* status)

An item is one point of some outer axes, numbered row by row; the second function runs the first, in threads.
On one thread no OpenMP region is opened: a region of one thread costs a microsecond, and any region hangs in
a forked child.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import sympy

from llmcomp.codegen.cpp_body import Scope, Writer, checks, parameter
from llmcomp.codegen.cpp_expr import index
from llmcomp.codegen.kernel import Axis, Body, Buffer, Check, Index, Load, Statement, Store


@contextmanager
def kernel_function(
    w: Writer,
    name: str,
    buffers: Sequence[Buffer],
    sizes: Sequence[sympy.Symbol],
    bodies: Sequence[Body],
    scope: Scope,
    items: sympy.Expr,
    work: sympy.Expr,
) -> Iterator[None]:
    """Print the frame; what is written inside works on the items [`first`, `last`).

    `items` is the number of items, `work` the number of elements that decides how many threads are worth it.
    `failed` is in scope where `bodies` can fail at run time.
    """
    failing = checks(bodies, scope)
    arguments = [*map(parameter, buffers), *(f"int64_t {s}" for s in sizes)]
    w.line('#include "prelude.h"')
    w.line()
    part = [*arguments, "int64_t first", "int64_t last", *(["int64_t* status"] if failing else [])]
    with w.block(_head(f"static void {name}_part", part)):
        if failing:
            w.line("int64_t failed = 0;")
        yield
        if failing:
            w.line("op::report(status, failed);")
    w.line()
    with w.block(_head(f'extern "C" void {name}', [*arguments, "int64_t threads", "int64_t* status"])):
        _print_threads(w, name, buffers, sizes, _positive_sizes(bodies), failing, items, work)


def _head(name: str, arguments: Iterable[str]) -> str:
    """A function head: on one line where it fits, else one argument a line."""
    arguments = list(arguments)
    line = f"{name}({', '.join(arguments)})"
    return line if len(line) <= 110 else f"{name}(\n    " + ",\n    ".join(arguments) + ")"


def _print_threads(
    w: Writer,
    name: str,
    buffers: Sequence[Buffer],
    sizes: Sequence[sympy.Symbol],
    positive: Sequence[sympy.Expr],
    failing: bool,
    items: sympy.Expr,
    work: sympy.Expr,
) -> None:
    passed = [*(b.name for b in buffers), *map(str, sizes)]
    status = ["status"] if failing else []
    w.line(f"const int64_t items = {index(items)};")
    if not (items.is_Integer and items > 0):
        w.line("if (items <= 0) return;")
    for size in positive:
        w.line(f"if ({index(size)} <= 0) return op::report(status, 1);  // nothing to index")
    w.line(f"const int64_t team = op::team(threads, items, {index(work)});")
    w.call(f"if (team == 1) return {name}_part", [*passed, "0", "items", *status])
    w.line("#pragma omp parallel num_threads(team)")
    with w.block():
        w.line("const op::Share share = op::share(items);")
        w.call(f"{name}_part", [*passed, "share.first", "share.last", *status])


def _positive_sizes(bodies: Iterable[Body]) -> list[sympy.Expr]:
    """Sizes of checked dimensions that may be zero: a clamped index would read an empty buffer."""
    found = [s.size for body in bodies for s in body if isinstance(s, Check) and s.mask is None]
    return [size for size in dict.fromkeys(found) if not (size.is_Integer and size > 0)]


@contextmanager
def item_loop(w: Writer, axes: Sequence[Axis]) -> Iterator[None]:
    """Print the loop over the items [`first`, `last`) of `axes`, the axes' symbols being in scope inside."""
    if not axes:
        yield
        return
    if len(axes) == 1:
        with w.block(f"for (int64_t {axes[0].symbol} = first; {axes[0].symbol} < last; ++{axes[0].symbol})"):
            yield
        return
    stride = sympy.Integer(1)
    starts = []
    for axis in reversed(axes):
        outermost = axis is axes[0]
        quotient = "first" if stride == 1 else f"first / {_atom(stride)}"
        starts.append(f"int64_t {axis.symbol} = {quotient}{'' if outermost else f' % {_atom(axis.size)}'};")
        stride *= axis.size
    w.lines(reversed(starts))
    inner = [f"{a.symbol}, {index(a.size)}" for a in reversed(axes[1:])]
    step = f"op::advance({', '.join([*inner, str(axes[0].symbol)])})"
    with w.block(f"for (int64_t item = first; item < last; ++item, {step})"):
        yield


def _atom(expr: sympy.Expr) -> str:
    text = index(expr)
    return text if expr.is_Symbol or expr.is_Integer else f"({text})"


def count(axes: Iterable[Axis]) -> sympy.Expr:
    """The number of points of an index space."""
    return sympy.Mul(*(a.size for a in axes))


def merge_axes(axes: Sequence[Axis], body: Body) -> tuple[tuple[Axis, ...], Body]:
    """Axes (i < n, j < m) -> one of n*m where every index reads i*m + j: a contiguous loop becomes flat."""
    for k in range(len(axes) - 1):
        outer, inner = axes[k], axes[k + 1]
        if outer.size == 1:
            dropped = tuple(_substitute(s, outer.symbol, sympy.Integer(0)) for s in body)
            return merge_axes((*axes[:k], *axes[k + 1 :]), dropped)
        if all(_joint(e, outer, inner) for s in body for e in _expressions(s)):
            merged = Axis(inner.symbol, outer.size * inner.size)
            flat = tuple(_substitute(s, outer.symbol, sympy.Integer(0)) for s in body)
            return merge_axes((*axes[:k], merged, *axes[k + 2 :]), flat)
    return tuple(axes), body


def _expressions(s: Statement) -> Iterator[sympy.Expr]:
    match s:
        case Load(index=expr) | Store(index=expr) | Index(expr=expr) | Check(size=expr):
            yield expr
        case _:
            pass


def _joint(expr: sympy.Expr, outer: Axis, inner: Axis) -> bool:
    """Whether the expression reads the two axes only as outer * size + inner."""
    if not expr.free_symbols & {outer.symbol, inner.symbol}:
        return True
    flat = outer.symbol * inner.size + inner.symbol
    joined = expr.subs({outer.symbol: sympy.Integer(0), inner.symbol: flat}, simultaneous=True)
    return bool(sympy.expand(joined - expr) == 0)


def _substitute(s: Statement, symbol: sympy.Symbol, value: sympy.Expr) -> Statement:
    match s:
        case Load() | Store():
            return replace(s, index=s.index.subs(symbol, value))
        case Index():
            return replace(s, expr=s.expr.subs(symbol, value))
        case _:
            return s
