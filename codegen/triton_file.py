"""The frame of a Triton file: imports, the signature of a kernel, and the launcher.

@triton.jit
def NAME(<buffers>, <sizes>, INDEX, <blocks>)
def extents(sizes)                                 the loop sizes that decide the launch configuration
def configs(sizes)                                 configurations worth a try
def launch(buffers, sizes, config, status)         computes the grid, launches, returns what was compiled
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import sympy

from llmcomp.codegen.kernel import Axis, Body, Check, Kernel, Load, Statement, Store
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.codegen.triton_expr import host


def file_head(w: Writer, imports: Sequence[str] = (), codes: bool = False) -> None:
    """The imports; with `codes` also the functions for quantized weights."""
    w.lines(imports)
    w.line("import triton")
    w.line("import triton.language as tl")
    w.line()
    w.line("import llmcomp.codegen.launch as launches")
    if codes:
        w.line("import llmcomp.codegen.triton_codes as codes")
    w.line("import llmcomp.codegen.triton_prelude as prelude")


def count(axes: Sequence[Axis]) -> sympy.Expr:
    """The number of points of `axes`."""
    return sympy.expand(sympy.Mul(*(a.size for a in axes)))


def checks(bodies: Sequence[Body]) -> bool:
    """Whether a body can find an index out of range, and so wants the status word."""
    return any(isinstance(s, Check) for body in bodies for s in body)


@contextmanager
def jit_function(
    w: Writer,
    kernel: Kernel,
    bodies: Sequence[Body],
    name: str,
    blocks: Sequence[str],
    doc: str,
    more: Sequence[str] = (),
) -> Iterator[None]:
    """Print the signature of a kernel; what is written inside is its body. `more` are further arguments.

    Triton makes no special case of the value of a size: a new length must not compile anew.
    """
    sizes = [spell(str(s)) for s in kernel.sizes]
    parameters = [*(spell(b.name) for b in kernel.buffers), *sizes]
    parameters += ["status_ptr"] if checks(bodies) else []
    parameters += more
    constants = [f"{b}: tl.constexpr" for b in ["INDEX", *blocks]]
    w.line()
    w.line()
    names = ", ".join(f'"{s}"' for s in [*sizes, *(m for m in more if m == "splits")])
    w.line(f"@triton.jit(do_not_specialize=[{names}])" if names else "@triton.jit")
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


def unpack(w: Writer, names: Sequence[str], source: str) -> None:
    """The line that takes a sequence apart, where there is something in it."""
    if names:
        w.line(f"{f'({names[0]},)' if len(names) == 1 else ', '.join(names)} = {source}")


def host_text(expr: sympy.Expr) -> str:
    """An integer expression of sizes in a launcher."""
    return host(expr, {str(s): spell(str(s)) for s in expr.free_symbols})


def _field(value: sympy.Expr | bool) -> str:
    return str(value) if isinstance(value, bool) else host_text(value)


def extents_function(w: Writer, sizes: Sequence[sympy.Symbol], family: str, fields: Mapping[str, sympy.Expr]) -> None:
    """Print `extents(sizes)`: the loop sizes by which a launch configuration is chosen."""
    w.line()
    w.line()
    with w.block("def extents(sizes)"):
        w.line('"""The sizes of the loops."""')
        unpack(w, [spell(str(s)) for s in sizes], "sizes")
        w.line(call(f"return launches.{family}", [f"{n}={_field(e)}" for n, e in fields.items()]))


def config_functions(w: Writer, forms: Sequence[str], few: str = "") -> None:
    """Print `default` and `configs`; of two forms, the first is for shapes of which `few` holds."""
    docs = {
        "default": ("config", "The launch configuration for the class of these sizes."),
        "configs": ("configs", "Launch configurations worth a try."),
    }
    for name, (kind, doc) in docs.items():
        w.line()
        w.line()
        with w.block(f"def {name}(sizes)"):
            w.line(f'"""{doc}"""')
            w.line("shape = extents(sizes)")
            if len(forms) > 1:
                with w.block(f"if {few}"):
                    w.line(f"return launches.{forms[0]}_{kind}(shape)")
            w.line(f"return launches.{forms[-1]}_{kind}(shape)")


@contextmanager
def launcher(w: Writer, doc: str, name: str = "launch") -> Iterator[None]:
    """Print the head of a launcher; what is written inside launches."""
    w.line()
    w.line()
    with w.block(f"def {name}(buffers, sizes, config=None, status=None)"):
        w.line(f'"""{doc}"""')
        w.line("shape = extents(sizes)")
        w.line("config = config or default(sizes)")
        yield


LAUNCH = "Launch on the current stream; a failed index check sets `status`."


def arguments(kernel: Kernel, bodies: Sequence[Body]) -> list[str]:
    """What a launcher passes on."""
    status = ["status"] if checks(bodies) else []
    return ["*buffers", *(["*sizes"] if kernel.sizes else []), *status]


def launch_function(w: Writer, kernel: Kernel, bodies: Sequence[Body], grid: str, points: str) -> None:
    """Print the launcher of a file with one kernel and a grid of one dimension."""
    with launcher(w, LAUNCH):
        w.line(f"grid = ({grid},)")
        index = f"INDEX=launches.index_type(buffers, {points})"
        passed = [*arguments(kernel, bodies), index, "**config.options()"]
        w.line(call(f"return [{spell(kernel.name)}[grid]", passed, "]"))
