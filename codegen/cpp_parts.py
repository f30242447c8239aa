"""What the C++ printers of Contract and Attend share: names, function heads, a body over a part of an axis."""

from collections.abc import Collection, Mapping, Sequence

import sympy

from llmcomp.codegen.cpp_body import Scope, Writer, print_statements, simd_legal, simd_pragma
from llmcomp.codegen.kernel import Axis, Body, Check, Store, vectors


def unused(stem: str, taken: Collection[str]) -> str:
    """`stem`, with underscores until it is not taken."""
    return unused(stem + "_", taken) if stem in taken else stem


def print_span(w: Writer, body: Body, axis: Axis, scope: Scope, seeds: Mapping[str, str], head: str) -> None:
    """A body without reductions along a part of `axis`: what is constant along it once, then the loop `head`."""
    varying = vectors(body, axis.symbol, tuple(seeds))
    once = [s for s in body if not isinstance(s, Store) and s.out not in varying]
    rest = [s for s in body if s not in once]
    w.lines(print_statements(once, scope))
    if simd_legal(body, axis, scope):
        w.line(simd_pragma(rest, scope))
    with w.block(head):
        w.lines(f"const float {name} = {text};" for name, text in seeds.items())
        w.lines(print_statements(rest, scope))


def function_head(name: str, arguments: Sequence[str]) -> str:
    """A function head: on one line where it fits, else one argument a line."""
    line = f"{name}({', '.join(arguments)})"
    return line if len(line) <= 110 else f"{name}(\n    " + ",\n    ".join(arguments) + "\n)"


def positive_sizes(bodies: Sequence[Body]) -> list[sympy.Expr]:
    """Sizes of checked dimensions that may be zero: a clamped index would read an empty buffer."""
    found = [s.size for body in bodies for s in body if isinstance(s, Check) and s.mask is None]
    return [size for size in dict.fromkeys(found) if not size.is_positive]
