"""The frame of a Triton file: imports, the signature of a kernel, and the launcher.

@triton.jit
def NAME(<buffers>, <sizes>, INDEX, <blocks>)
def extents(sizes)                                 the loop sizes that decide the launch configuration
def configs(sizes)                                 configurations worth a try
def launch(buffers, sizes, config, status)         computes the grid and launches
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import sympy

from llmcomp.codegen.kernel import Axis, Body, Check, Kernel, Load, Statement, Store
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.codegen.triton_expr import host


def file_head(w: Writer, imports: Sequence[str] = ()) -> None:
    """The imports."""
    w.lines(imports)
    w.line("import triton")
    w.line("import triton.language as tl")
    w.line()
    w.line("import llmcomp.codegen.launch as launches")
    w.line("import llmcomp.codegen.triton_prelude as prelude")


def count(axes: Sequence[Axis]) -> sympy.Expr:
    """The number of points of `axes`."""
    return sympy.expand(sympy.Mul(*(a.size for a in axes)))


def checks(bodies: Sequence[Body]) -> bool:
    """Whether a body can find an index out of range, and so wants the status word."""
    return any(isinstance(s, Check) for body in bodies for s in body)


@contextmanager
def jit_function(
    w: Writer, kernel: Kernel, bodies: Sequence[Body], name: str, blocks: Sequence[str], doc: str
) -> Iterator[None]:
    """Print the signature of a kernel; what is written inside is its body."""
    sizes = [spell(str(s)) for s in kernel.sizes]
    parameters = [*(spell(b.name) for b in kernel.buffers), *sizes]
    parameters += ["status_ptr"] if checks(bodies) else []
    constants = [f"{b}: tl.constexpr" for b in ["INDEX", *blocks]]
    w.line()
    w.line()
    names = ", ".join(f'"{s}"' for s in sizes)
    w.line(f"@triton.jit(do_not_specialize=[{names}])" if sizes else "@triton.jit")
    w.line(call(f"def {spell(name)}", [*parameters, *constants], ":"))
    w.depth += 1
    if doc:
        w.line(f'"""{doc}"""')
    w.lines(f"{s} = {s}.to(INDEX)" for s in sizes)
    yield
    w.depth -= 1


def decode(position: str, axes: Sequence[Axis], used: Collection[str]) -> list[str]:
    """The lines that take a row-major position apart into the axes; those not in `used` are left out."""
    lines = []
    for i, axis in reversed(list(enumerate(axes))):
        name, step = spell(str(axis.symbol)), sympy.expand(sympy.Mul(*(a.size for a in axes[i + 1 :])))
        divided = position if step == 1 else f"{position} // {_factor(step)}"
        last = i == 0
        text = divided if last else f"{divided if step == 1 else f'({divided})'} % {_factor(axis.size)}"
        if str(axis.symbol) in used:
            lines.append(f"{name} = {text}")
    return lines[::-1]


def _factor(expr: sympy.Expr) -> str:
    text = indexed(expr)
    return text if expr.is_Integer or expr.is_Symbol else f"({text})"


def flatten(s: Statement, axes: Sequence[Axis], point: sympy.Symbol) -> Statement:
    """Addresses that number the points of all axes row by row become `point`."""
    if not isinstance(s, Load | Store):
        return s
    return replace(s, index=flattened(s.index, axes, point))


def flattened(expr: sympy.Expr, axes: Sequence[Axis], point: sympy.Symbol) -> sympy.Expr:
    """`expr` with step * (row-major position in `axes`) written as step * point, where it is of that form."""
    if not axes:
        return expr
    expr = sympy.expand(expr)
    step = expr.coeff(axes[-1].symbol)
    position: sympy.Expr = sympy.Integer(0)
    for axis in axes:
        position = position * axis.size + axis.symbol
    rest = sympy.expand(expr - step * position)
    symbols = {a.symbol for a in axes}
    if step == 0 or symbols & (step.free_symbols | rest.free_symbols):
        return expr
    return step * point + rest


def tuple_text(items: Sequence[str]) -> str:
    """The text of a tuple, without parentheses where Python needs none."""
    return f"({items[0]},)" if len(items) == 1 else ", ".join(items)


def unpack(w: Writer, names: Sequence[str], source: str) -> None:
    """The line that takes a sequence apart, where there is something in it."""
    if names:
        w.line(f"{tuple_text(names)} = {source}")


def host_text(expr: sympy.Expr) -> str:
    """An integer expression of sizes in a launcher."""
    return host(expr, {str(s): spell(str(s)) for s in expr.free_symbols})


def extents_function(w: Writer, sizes: Sequence[sympy.Symbol], extents: Mapping[str, sympy.Expr]) -> None:
    """Print `extents(sizes)`: the loop sizes by which a launch configuration is chosen."""
    w.line()
    w.line()
    with w.block("def extents(sizes)"):
        w.line(f'"""{", ".join(extents).capitalize()}."""')
        unpack(w, [spell(str(s)) for s in sizes], "sizes")
        w.line(f"return {tuple_text([host_text(e) for e in extents.values()])}")


def configs_function(w: Writer, family: str) -> None:
    """Print `configs(sizes)`: the launch configurations worth a try."""
    w.line()
    w.line()
    with w.block("def configs(sizes)"):
        w.line('"""Launch configurations worth a try."""')
        w.line(f"return launches.{family}_configs(*extents(sizes))")


def launch_function(
    w: Writer,
    kernel: Kernel,
    bodies: Sequence[Body],
    family: str,
    extents: Sequence[str],
    grid: Sequence[str],
) -> None:
    """Print `configs` and the launcher of a file with one kernel; `grid` is Python text over the extents."""
    configs_function(w, family)
    w.line()
    w.line()
    with w.block("def launch(buffers, sizes, config=None, status=None)"):
        w.line('"""Launch on the current stream; a failed index check sets `status`."""')
        unpack(w, extents, "extents(sizes)")
        w.line(f"config = config or launches.{family}_config({', '.join(extents)})")
        w.line(f"grid = {tuple_text(grid)}")
        status = ["status"] if checks(bodies) else []
        index = f"INDEX=launches.index_type(buffers, {' * '.join(extents)})"
        arguments = ["*buffers", *(["*sizes"] if kernel.sizes else []), *status, index, "**config.options()"]
        w.line(call(f"{spell(kernel.name)}[grid]", arguments))
