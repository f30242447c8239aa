"""C++ text of kernel bodies: statements one per line, and the loops of a row with its reductions.

What the family printers (cpp.py, cpp_contract.py, cpp_attend.py) share. A printer makes one `Scope` of all
its bodies and one `Writer`, opens its own loops with `Writer.block`, and fills them with `print_statements`
(straight-line bodies) or `print_phases` (bodies with reductions along an axis). Names of generated code
besides those of the kernel: `threads`, `status`, `failed` (bits of failed checks), `start`, `stop`.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import sympy
import torch

from llmcomp.codegen.cpp_expr import (
    MEMORY_TYPES,
    VALUE_TYPES,
    compute,
    constant,
    divisor,
    index,
)
from llmcomp.codegen.kernel import (
    Axis,
    Body,
    Buffer,
    Check,
    Compute,
    Index,
    Load,
    Reduce,
    Statement,
    Store,
    inputs,
    phases,
    vectors,
)

# Elements that a float32 sum adds up before the partial result joins a total kept in double.
SUM_BLOCK = 256
# Generated lines are no longer than those of the printers.
WIDTH = 110


@dataclass
class Writer:
    """Lines of source text; `block` indents.

    >>> w = Writer()
    >>> with w.block("if (a)"):
    ...     w.line("b();")
    >>> print(w.text(), end="")
    if (a) {
        b();
    }
    """

    depth: int = 0
    printed: list[str] = field(default_factory=list)

    def line(self, text: str = "") -> None:
        """One line at the current depth; preprocessor lines keep the depth, empty lines stay empty."""
        self.printed.append("    " * self.depth + text if text else "")

    def lines(self, texts: Iterable[str]) -> None:
        """Several lines at the current depth."""
        for text in texts:
            self.line(text)

    def call(self, head: str, arguments: Sequence[str], tail: str = ";") -> None:
        """`head(arguments)tail`, the arguments filled into further lines where one is too long."""
        line = f"{head}({', '.join(arguments)}){tail}"
        if len(line) + 4 * self.depth <= WIDTH:
            self.line(line)
            return
        filled = textwrap.wrap(", ".join(arguments), WIDTH - 4 * (self.depth + 1), break_on_hyphens=False)
        self.line(f"{head}(")
        self.lines(f"    {text}" for text in filled[:-1])
        self.line(f"    {filled[-1]}){tail}")

    @contextmanager
    def block(self, head: str = "") -> Iterator[None]:
        """`head {`, what is written inside, indented, and `}`."""
        self.line(f"{head} {{".lstrip())
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    def text(self) -> str:
        """All lines, each ended by a newline."""
        return "\n".join(self.printed) + "\n"


@dataclass(frozen=True)
class Scope:
    """What printing a statement needs to know of its surroundings: the dtypes of buffers and of values."""

    buffers: Mapping[str, torch.dtype]
    values: Mapping[str, torch.dtype]

    @property
    def narrow(self) -> frozenset[str]:
        """Values that have to be widened before they take part in index arithmetic."""
        return frozenset(name for name, dtype in self.values.items() if dtype != torch.int64)

    def dtype(self, argument: str | float | int | bool) -> torch.dtype:
        """The dtype of a value; axes and sizes are int64."""
        return self.values.get(argument, torch.int64) if isinstance(argument, str) else torch.int64


def make_scope(
    buffers: Sequence[Buffer], bodies: Iterable[Body], seeds: Mapping[str, torch.dtype] | None = None
) -> Scope:
    """The scope of a kernel; `seeds` are values that no statement defines (accumulators, the score)."""
    values = dict(seeds or {})
    for body in bodies:
        for s in body:
            if not isinstance(s, Store):
                values[s.out] = torch.int64 if isinstance(s, Check) else s.dtype
    widened = {name: torch.float32 if d in NARROW_FLOATS else d for name, d in values.items()}
    return Scope({b.name: b.dtype for b in buffers}, widened)


NARROW_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float8_e4m3fn})


def parameter(buffer: Buffer) -> str:
    """The declaration of a pointer argument, such as `const bf16* x`."""
    return f"{'' if buffer.written else 'const '}{MEMORY_TYPES[buffer.dtype]}* {buffer.name}"


def loop(symbol: sympy.Symbol | str, stop: str, start: str = "0") -> str:
    """The head of a for loop by steps of one."""
    return f"for (int64_t {symbol} = {start}; {symbol} < {stop}; ++{symbol})"


def checks(bodies: Iterable[Body], scope: Scope) -> bool:
    """Whether the bodies can fail at run time: then `int64_t failed` has to be in scope where they are.

    Bit 1 of `failed` says that an index was out of range, bit 2 that an integer was divided by zero.
    """
    return any(_fails(s, scope) for body in bodies for s in body)


def _fails(s: Statement, scope: Scope) -> bool:
    return isinstance(s, Check) or (isinstance(s, Compute) and divisor(s, _operand_dtype(s, scope)) is not None)


def print_statements(body: Iterable[Statement], scope: Scope) -> list[str]:
    """The lines of straight-line statements; `Reduce` updates its variable, which the caller has declared."""
    return [line for s in body for line in print_statement(s, scope)]


def print_statement(s: Statement, scope: Scope) -> list[str]:
    """The lines of one statement."""
    match s:
        case Load():
            return [f"const {_value_type(s.out, scope)} {s.out} = {_load(s, scope)};"]
        case Compute():
            return _compute(s, scope)
        case Index():
            text = index(s.expr, scope.narrow)
            return [f"const {_value_type(s.out, scope)} {s.out} = {text};"]
        case Check():
            return _check(s, scope)
        case Store():
            guard = f"if ({s.mask}) " if s.mask else ""
            return [f"{guard}{element(s.buffer, s.index, scope)} = {narrowed(s, scope)};"]
        case Reduce():
            return [_update(s, s.out, scope)]


def element(buffer: str, at: sympy.Expr, scope: Scope) -> str:
    """The text of one element of a buffer."""
    return f"{buffer}[{index(at, scope.narrow)}]"


def narrowed(s: Store, scope: Scope) -> str:
    """The stored value as the buffer takes it; assigning a float to bf16 or f16 rounds to nearest even."""
    target = scope.buffers[s.buffer]
    target = torch.float32 if target in NARROW_FLOATS else target
    if scope.dtype(s.value) == target:
        return s.value
    return f"{s.value} != 0" if target == torch.bool else f"op::convert<{VALUE_TYPES[target]}>({s.value})"


def _value_type(name: str, scope: Scope) -> str:
    return VALUE_TYPES[scope.values[name]]


def _load(s: Load, scope: Scope) -> str:
    text = element(s.buffer, s.index, scope)
    if scope.values[s.out] == torch.bool:
        text += " != 0"
    if s.mask is None:
        return text
    dtype = scope.values[s.out]
    return f"{s.mask} ? {VALUE_TYPES[dtype]}({text}) : {constant(s.other, dtype)}"


def _operand_dtype(s: Compute, scope: Scope) -> torch.dtype:
    """The dtype that an operation computes in: that of its first named operand, for `where` of its result."""
    if s.op in ("where", "constant"):
        return scope.values[s.out]
    names = [a for a in s.args if isinstance(a, str)]
    return scope.dtype(names[0]) if names else scope.values[s.out]


def _compute(s: Compute, scope: Scope) -> list[str]:
    dtype = _operand_dtype(s, scope)
    by = divisor(s, dtype)
    guard = [f"failed |= 2 * ({by} == 0);"] if by else []
    return [*guard, f"const {_value_type(s.out, scope)} {s.out} = {compute(s, dtype)};"]


def _check(s: Check, scope: Scope) -> list[str]:
    size = index(s.size, scope.narrow)
    kind = "wrapped_index" if s.wrap else "index"
    outside = f"op::outside_{kind}({s.value}, {size})"
    return [
        f"failed |= {f'{s.mask} & ' if s.mask else ''}{outside};",
        f"const int64_t {s.out} = op::clamp_{kind}({s.value}, {size});",
    ]


# For each reduction: the clause that joins partial results, the first value, and the update.
# `maximum` and `minimum` are declared in prelude.h: they keep NaN, as torch does.
REDUCTIONS: dict[str, tuple[str, str, str]] = {
    "sum": ("+", "0", "{out} += {value};"),
    "prod": ("*", "1", "{out} *= {value};"),
    "max": ("maximum", "op::lowest<{T}>()", "{out} = op::maximum({out}, {value});"),
    "min": ("minimum", "op::highest<{T}>()", "{out} = op::minimum({out}, {value});"),
    "any": ("|", "0", "{out} |= {value};"),
    "all": ("&", "1", "{out} &= {value};"),
}

# Reductions of flags are gathered in an int: gcc does not vectorize one into a bool.
FLAGS = frozenset({"any", "all"})


def _update(s: Reduce, variable: str, scope: Scope) -> str:
    value = s.value
    dtype = scope.dtype(value)
    if s.op in FLAGS:
        value = value if dtype == torch.bool else f"({value} != 0)"
    elif dtype != scope.values[s.out]:
        value = f"{_value_type(s.out, scope)}({value})"
    return REDUCTIONS[s.op][2].format(out=variable, value=value)


def expand_argmax(body: Body, inner: sympy.Symbol) -> Body:
    """argmax -> the maximum (NaN, where there is one), then the smallest index that holds it."""
    result: list[Statement] = []
    dtypes = {s.out: s.dtype for s in body if isinstance(s, Load | Compute | Index | Reduce)}
    for s in body:
        if isinstance(s, Reduce) and s.op in ("argmax", "argmin"):
            result.extend(_expand_argmax(s, dtypes[s.value], inner))
        else:
            result.append(s)
    return tuple(result)


def _expand_argmax(s: Reduce, dtype: torch.dtype, inner: sympy.Symbol) -> Iterator[Statement]:
    best, equal, nan, found, here, at = (f"{s.out}_{n}" for n in ("best", "equal", "nan", "found", "here", "at"))
    dtype = torch.float32 if dtype in NARROW_FLOATS else dtype
    yield Reduce(best, s.op.removeprefix("arg"), s.value, dtype)
    yield Compute(equal, "eq", (s.value, best), torch.bool)
    yield Compute(nan, "isnan", (s.value,), torch.bool)
    yield Compute(found, "logical_or", (equal, nan), torch.bool)
    yield Index(here, inner, torch.int64)
    yield Compute(at, "where", (found, here, (1 << 63) - 1), torch.int64)
    yield Reduce(s.out, "min", at, torch.int64)


def simd_legal(body: Iterable[Statement], axis: Axis, scope: Scope) -> bool:
    """Whether iterations along `axis` are independent: every store moves by a fixed step along it."""
    if axis.size == 1:
        return True
    body = tuple(body)
    varying = vectors(body, axis.symbol)
    stores = [s for s in body if isinstance(s, Store)]
    return all(
        _moves(s.index, axis.symbol) and not varying.intersection(map(str, s.index.free_symbols)) for s in stores
    )


def _moves(expr: sympy.Expr, symbol: sympy.Symbol) -> bool:
    step = sympy.expand(expr.subs(symbol, symbol + 1) - expr)
    return symbol not in step.free_symbols and step.is_zero is False


def simd_pragma(body: Iterable[Statement], scope: Scope, parts: Mapping[str, str] | None = None) -> str:
    """`#pragma omp simd` with the clauses that `body` needs; `parts` names the variables of reductions."""
    body = tuple(body)
    failing = checks([body], scope)
    clauses: dict[str, list[str]] = {}
    for r in body:
        if isinstance(r, Reduce):
            clauses.setdefault(REDUCTIONS[r.op][0], []).append((parts or {}).get(r.out, r.out))
    if failing:
        clauses.setdefault("|", []).append("failed")
    return "#pragma omp simd" + "".join(f" reduction({op} : {', '.join(names)})" for op, names in clauses.items())


def print_phases(w: Writer, body: Body, inner: Axis, scope: Scope, seeds: Mapping[str, str] | None = None) -> None:
    """The loops of one row: every phase of `body` along `inner`, reductions declared before their loop.

    `seeds` maps values that vary along `inner` and that no statement defines to the C++ expression that reads
    them (an accumulator: {"a0": "acc0[c]"}). `body` and `scope` are those after `expand_argmax`.
    """
    for phase in phases(body, inner.symbol, tuple(seeds or ())):
        w.lines(print_statements(phase.scalars, scope))
        varying = vectors(phase.body, inner.symbol, tuple(seeds or ())) | {str(inner.symbol)}
        once = [s for s in phase.body if isinstance(s, Store) and not varying.intersection(inputs(s))]
        w.lines(print_statements(once, scope))
        loop_body = tuple(s for s in phase.body if s not in once)
        if loop_body:
            _print_phase(w, loop_body, inner, scope, seeds or {})


def _print_phase(w: Writer, body: Body, inner: Axis, scope: Scope, seeds: Mapping[str, str]) -> None:
    """One loop along the row; long float sums go in blocks, whose results are added up in double."""
    reductions = [s for s in body if isinstance(s, Reduce)]
    totals = [r for r in reductions if r.op == "sum" and scope.values[r.out].is_floating_point]
    if inner.size.is_Integer and int(inner.size) <= SUM_BLOCK:
        totals = []
    variables = {r.out: f"{r.out}_part" if r in totals else r.out for r in reductions}
    variables |= {r.out: f"{r.out}_flag" for r in reductions if r.op in FLAGS}
    size = index(inner.size)

    w.lines(_declare(r, variables[r.out], scope) for r in reductions if r not in totals)
    if totals:
        w.lines(f"double {r.out}_total = 0;" for r in totals)
        with w.block(f"for (int64_t start = 0; start < {size}; start += {SUM_BLOCK})"):
            w.line(f"const int64_t stop = op::minimum<int64_t>(start + {SUM_BLOCK}, {size});")
            w.lines(_declare(r, variables[r.out], scope) for r in totals)
            _print_loop(w, body, inner, scope, seeds, loop(inner.symbol, "stop", "start"), variables)
            w.lines(f"{r.out}_total += {r.out}_part;" for r in totals)
    else:
        _print_loop(w, body, inner, scope, seeds, loop(inner.symbol, size), variables)
    w.lines(_result(r, f"{r.out}_total", scope) for r in totals)
    w.lines(f"const bool {r.out} = {r.out}_flag != 0;" for r in reductions if r.op in FLAGS)


def _declare(r: Reduce, variable: str, scope: Scope) -> str:
    ctype = "int32_t" if r.op in FLAGS else _value_type(r.out, scope)
    return f"{ctype} {variable} = {REDUCTIONS[r.op][1].format(T=ctype)};"


def _result(r: Reduce, total: str, scope: Scope) -> str:
    ctype = _value_type(r.out, scope)
    return f"const {ctype} {r.out} = {total if ctype == 'double' else f'{ctype}({total})'};"


def _print_loop(
    w: Writer,
    body: Body,
    inner: Axis,
    scope: Scope,
    seeds: Mapping[str, str],
    head: str,
    variables: Mapping[str, str],
) -> None:
    read = {name for s in body for name in inputs(s)}
    if simd_legal(body, inner, scope):
        w.line(simd_pragma(body, scope, variables))
    with w.block(head):
        w.lines(f"const {_value_type(n, scope)} {n} = {text};" for n, text in seeds.items() if n in read)
        for s in body:
            if isinstance(s, Reduce):
                w.line(_update(s, variables[s.out], scope))
            else:
                w.lines(print_statement(s, scope))
