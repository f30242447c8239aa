"""Map and Rows -> C++ source: one translation unit with one `extern "C"` function."""

from collections.abc import Sequence
from dataclasses import replace

import sympy
from torch.utils._sympy.functions import FloorDiv

from llmcomp.codegen.build import Source
from llmcomp.codegen.cpp_body import (
    Scope,
    Writer,
    expand_argmax,
    loop,
    make_scope,
    print_phases,
    print_statements,
    simd_legal,
    simd_pragma,
)
from llmcomp.codegen.cpp_expr import index
from llmcomp.codegen.cpp_function import count, item_loop, kernel_function, merge_axes
from llmcomp.codegen.kernel import Axis, Body, Map, Rows, Store, vectors

# A Map splits its last axis in pieces of this many elements, so that few long rows still keep all threads
# busy.
PIECE = 4096
# The point of a Map without axes.
POINT = Axis(sympy.Symbol("i0", integer=True, nonnegative=True), sympy.Integer(1))

KEYWORDS = frozenset(
    """alignas alignof and asm auto bf16 bitand bitor bool break case catch char class compl const
    constexpr continue decltype default delete do double else enum explicit export extern f16 false
    float for friend goto if inline int long main mutable namespace new noexcept not nullptr op operator
    or private protected public register return short signed sizeof static struct switch template this
    throw true try typedef typeid typename union unsigned using virtual void volatile while xor""".split()
)
# Functions that prelude.h calls: a kernel of that name would be called instead.
LIBRARY = frozenset(
    """abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh div erf erfc exp exp2 expm1 floor fma fmax
    fmin fmod free hypot log log10 log1p log2 malloc memcpy memset pow remainder rint sin sinh sqrt tan tanh
    trunc""".split()
)


def render(kernel: Map | Rows, comment: Sequence[str] = ()) -> Source:
    """The C++ source of `kernel`; `comment` names the graph nodes that it computes.

    The exported symbol, `Source.name`, is the kernel's name unless that means something else in C++.
    """
    kernel = replace(kernel, name=symbol(kernel.name))
    text = render_map(kernel) if isinstance(kernel, Map) else render_rows(kernel)
    return Source(kernel.name, "cpp", text, tuple(comment))


def symbol(name: str) -> str:
    """A name that means nothing else in C++."""
    return f"{name}_kernel" if name in KEYWORDS | LIBRARY else name


def render_map(kernel: Map) -> str:
    """The text of a Map: an item is a point of the outer axes and a piece of the last one, a vector loop."""
    axes, body = merge_axes(kernel.axes or (POINT,), kernel.body)
    *outer, inner = axes
    scope = make_scope(kernel.buffers, [body])
    whole = inner.size.is_Integer and int(inner.size) <= PIECE
    piece = Axis(sympy.Symbol("piece", integer=True, nonnegative=True), FloorDiv(inner.size + PIECE - 1, PIECE))
    item_axes = outer if whole else [*outer, piece]
    w = Writer()
    items, work = count(item_axes), count(axes)
    with kernel_function(w, kernel.name, kernel.buffers, kernel.sizes, [body], scope, items, work):
        with item_loop(w, item_axes):
            if whole:
                _print_points(w, body, inner, scope, loop(inner.symbol, index(inner.size)))
            else:
                w.line(f"const int64_t start = piece * {PIECE};")
                w.line(f"const int64_t stop = op::minimum<int64_t>(start + {PIECE}, {index(inner.size)});")
                _print_points(w, body, inner, scope, loop(inner.symbol, "stop", "start"))
    return w.text()


def _print_points(w: Writer, body: Body, inner: Axis, scope: Scope, head: str) -> None:
    """What is constant along the inner axis once, then the loop."""
    varying = vectors(body, inner.symbol)
    once = [s for s in body if not isinstance(s, Store) and s.out not in varying]
    rest = [s for s in body if s not in once]
    w.lines(print_statements(once, scope))
    if simd_legal(body, inner, scope):
        w.line(simd_pragma(rest, scope))
    with w.block(head):
        w.lines(print_statements(rest, scope))


def render_rows(kernel: Rows) -> str:
    """The text of a Rows: an item is a row, its phases are loops along the inner axis."""
    axes, merged = merge_axes(kernel.axes, kernel.body)
    body = expand_argmax(merged, kernel.inner.symbol)
    scope = make_scope(kernel.buffers, [body])
    items, work = count(axes), count([*axes, kernel.inner])
    w = Writer()
    with kernel_function(w, kernel.name, kernel.buffers, kernel.sizes, [body], scope, items, work):
        with item_loop(w, axes):
            print_phases(w, body, kernel.inner, scope)
    return w.text()
