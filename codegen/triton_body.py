"""Triton text of kernel bodies: one statement per line, values shaped by the axes that they depend on.

What the family printers (triton.py, triton_contract.py, triton_attend.py) share. A kernel works on a tile.
Each dimension of the tile has a mask for its tail; a value carries the dimensions that it depends on, in
broadcast form: one that varies along "row" and "col" is [ROWS, COLS], along "row" alone it is [ROWS, 1].
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import sympy
import torch

from llmcomp.codegen.kernel import (
    Argument,
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
)
from llmcomp.codegen.triton_expr import DTYPES, NARROW_FLOATS, compute, full, index, literal

WIDTH = 100
# Names that generated code uses for itself; values of the kernel that are called so get an underscore.
RESERVED = frozenset(
    """and as assert break class continue def del elif else except False finally for from global if import in
    is lambda None nonlocal not or pass raise return True try while with yield float int bool min max range
    tl triton prelude launches program start point row rows inside row_inside col_inside k_inside status_ptr
    buffers sizes config configs default form status grid extents launch points columns
    tiles depth operand expert first_row end_row start_row shape choose kernel BLOCK_N
    pair split splits channel value_channel first last whole part run begin end key key_start key_end peak
    peak_before shift probability decay total output sink q_block k_block v_block k_head v_head partial peaks
    totals scratch hidden k_scale v_scale k_scale_head v_scale_head
    codes word quad half run sums x0 x1 x2 x3 token_codes token_quotient HALF QUADS FLOAT8""".split()
)

Dims = frozenset[str]
NO_DIMS: Dims = frozenset()


@dataclass
class Writer:
    """Lines of source text; `block` indents.

    >>> w = Writer()
    >>> with w.block("if a"):
    ...     w.line("b()")
    >>> print(w.text(), end="")
    if a:
        b()
    """

    depth: int = 0
    printed: list[str] = field(default_factory=list)

    def line(self, text: str = "") -> None:
        """One statement at the current depth (it may span lines); empty lines stay empty."""
        self.printed.append(textwrap.indent(text, "    " * self.depth))

    def lines(self, texts: Iterable[str]) -> None:
        """Several statements at the current depth."""
        for text in texts:
            self.line(text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """`head:` and what is written inside, indented."""
        self.line(f"{head}:")
        self.depth += 1
        yield
        self.depth -= 1

    def text(self) -> str:
        """All lines, each ended by a newline."""
        return "\n".join(self.printed) + "\n"


@dataclass(frozen=True)
class Dim:
    """A dimension of the tile: its block size and the mask of the elements that exist ("" where all do)."""

    name: str
    block: str
    inside: str = ""


@dataclass(frozen=True)
class Value:
    """What is known of a value in a tile."""

    dtype: torch.dtype
    dims: Dims


@dataclass
class Tile:
    """What printing a statement needs to know of its surroundings.

    `dims` in the order of the tile's dimensions; `symbols` says along which of them each axis varies (sizes
    along none); `values` grows as statements are printed; `Reduce` runs along the dimension `inner`, whose
    positions are called `inner_at`.
    """

    buffers: Mapping[str, torch.dtype]
    dims: tuple[Dim, ...]
    symbols: Mapping[str, Dims]
    values: dict[str, Value] = field(default_factory=dict)
    inner: str = ""
    inner_at: str = ""

    def dim(self, name: str) -> Dim:
        """The dimension called `name`."""
        return next(d for d in self.dims if d.name == name)

    def axis(self, name: str) -> int:
        """Its position in the shape."""
        return [d.name for d in self.dims].index(name)

    def of(self, names: Iterable[str]) -> Dims:
        """The dimensions along which an expression of these values and symbols varies."""
        found = [self.values[n].dims if n in self.values else self.symbols.get(n, NO_DIMS) for n in names]
        return frozenset().union(*found)

    def guard(self, dims: Dims, mask: str | None = None) -> str:
        """The mask of the existing elements along `dims`, and of a mask value."""
        parts = [d.inside for d in self.dims if d.name in dims and d.inside]
        return " & ".join([*parts, *([spell(mask)] if mask else [])])

    def shape(self, dims: Dims) -> str:
        """The broadcast shape of values that vary along `dims`."""
        return "[" + ", ".join(d.block if d.name in dims else "1" for d in self.dims) + "]"

    def inner_guard(self) -> str:
        """The mask of the existing elements along the reduced dimension."""
        return self.dim(self.inner).inside


def make_buffers(buffers: Sequence[Buffer]) -> dict[str, torch.dtype]:
    """dtypes of buffers by name."""
    return {b.name: b.dtype for b in buffers}


def spell(name: str) -> str:
    """The name of a value or symbol in generated code; `@name` is one of the printer's own."""
    if name.startswith("@"):
        return name[1:]
    return f"{name}_" if name in RESERVED else name


def indexed(expr: sympy.Expr) -> str:
    """An index expression in generated code."""
    return index(expr, {n: spell(n) for n in map(str, expr.free_symbols)})


def call(head: str, arguments: Sequence[str], tail: str = "") -> str:
    """`head(arguments)tail` on one line, or with the arguments on lines of their own.

    >>> call("x = tl.load", ["x_ptr + i", "mask=inside"], ".to(tl.float32)")
    'x = tl.load(x_ptr + i, mask=inside).to(tl.float32)'
    """
    text = f"{head}({', '.join(arguments)}){tail}"
    if len(text) <= WIDTH:
        return text
    together = "    " + ", ".join(arguments)
    inside = together if len(together) <= WIDTH else "".join(f"    {a},\n" for a in arguments).rstrip("\n")
    return f"{head}(\n{inside}\n){tail}"


def statements(body: Iterable[Statement], tile: Tile) -> list[str]:
    """The lines of a body whose rows lie in the tile as a whole; the tile learns the values."""
    return [line for s in body for line in statement(s, tile)]


def statement(s: Statement, tile: Tile) -> list[str]:
    """The lines of one statement; the tile learns its value."""
    match s:
        case Load():
            return [_load(s, tile)]
        case Compute():
            return [_compute(s, tile)]
        case Index():
            return [_index(s, tile)]
        case Check():
            return [_check(s, tile)]
        case Store():
            return [_store(s, tile)]
        case Reduce():
            return _reduce(s, tile)


def pointer(buffer: str, at: sympy.Expr, dims: Dims, tile: Tile) -> str:
    """The addresses of the elements `at`, spread along `dims`."""
    text = spell(buffer) if at == 0 else f"{spell(buffer)} + {indexed(at)}"
    if dims and dims == tile.of(map(str, at.free_symbols)):
        return text
    return f"tl.broadcast_to({text}, {tile.shape(dims)})"


def scalar_pointer(s: Load) -> str:
    """The address of an element that is the same for the whole tile."""
    return spell(s.buffer) if s.index == 0 else f"{spell(s.buffer)} + {indexed(s.index)}"


def own(text: str) -> sympy.Symbol:
    """A symbol of the printer's own; it is printed as `text`."""
    return sympy.Symbol(f"@{text}", integer=True, nonnegative=True)


def load_text(s: Load, tile: Tile, widen: bool = True) -> tuple[str, list[str], str]:
    """The parts of `out = tl.load(...)` for `call`; without `widen` it keeps the dtype of its buffer."""
    dims = tile.of([*map(str, s.index.free_symbols), *([s.mask] if s.mask else [])])
    dtype = tile.buffers[s.buffer]
    arguments = [pointer(s.buffer, s.index, dims, tile)]
    if mask := tile.guard(dims, s.mask):
        arguments.append(f"mask={mask}")
    if s.mask:
        arguments.append(f"other={literal(s.other, dtype)}")
    if widen and dtype == torch.float8_e4m3fn:
        return f"{spell(s.out)} = prelude.from_float8(tl.load", [as_bits(arguments[0]), *arguments[1:]], ")"
    convert = widen and dtype != s.dtype
    return f"{spell(s.out)} = tl.load", arguments, f".to({DTYPES[s.dtype]})" if convert else ""


def as_bits(address: str) -> str:
    """The address of a float8 as that of its bits: not every GPU knows the type."""
    return f"({address}).to(tl.pointer_type(tl.uint8))"


def _load(s: Load, tile: Tile) -> str:
    dims = tile.of([*map(str, s.index.free_symbols), *([s.mask] if s.mask else [])])
    tile.values[s.out] = Value(s.dtype, dims)
    if dims:
        return call(*load_text(s, tile))
    bits = tile.buffers[s.buffer] == torch.float8_e4m3fn
    text = f"prelude.from_float8(tl.load({as_bits(scalar_pointer(s))}))" if bits else f"tl.load({scalar_pointer(s)})"
    return f"{spell(s.out)} = tl.full({tile.shape(dims)}, {text}, {DTYPES[s.dtype]})"


def _operand_dtype(s: Compute, tile: Tile) -> torch.dtype:
    """The dtype that an operation computes in: that of its first named operand, for `where` of its result."""
    if s.op in ("where", "constant"):
        return s.dtype
    return next((tile.values[a].dtype for a in s.args if isinstance(a, str)), s.dtype)


def _compute(s: Compute, tile: Tile) -> str:
    text = compute(s, _operand_dtype(s, tile), spell, tile.shape(NO_DIMS))
    tile.values[s.out] = Value(s.dtype, tile.of(a for a in s.args if isinstance(a, str)))
    return f"{spell(s.out)} = {text}"


def _index(s: Index, tile: Tile) -> str:
    dims = tile.of(map(str, s.expr.free_symbols))
    tile.values[s.out] = Value(s.dtype, dims)
    text = indexed(s.expr)
    if not dims:
        return f"{spell(s.out)} = tl.full({tile.shape(dims)}, {text}, {DTYPES[s.dtype]})"
    return f"{spell(s.out)} = {text if s.expr.is_Symbol else f'({text})'}.to({DTYPES[s.dtype]})"


def _check(s: Check, tile: Tile) -> str:
    dims = tile.of([s.value])
    tile.values[s.out] = Value(torch.int64, dims)
    mask = tile.guard(dims | tile.of([s.mask] if s.mask else []), s.mask)
    inside = mask or full(True, torch.bool, tile.shape(NO_DIMS))
    arguments = [spell(s.value), indexed(s.size), str(s.wrap), inside, "status_ptr"]
    return call(f"{spell(s.out)} = prelude.checked_index", arguments)


def narrowed(value: str, have: torch.dtype, want: torch.dtype) -> str:
    """The text of a value as what a buffer of dtype `want` holds."""
    if have == want:
        return value
    if want == torch.bool:
        return f"{value} != 0"
    if want not in NARROW_FLOATS:
        return f"{value}.to({DTYPES[want]})"
    single = value if have == torch.float32 else f"{value}.to(tl.float32)"
    return f"prelude.narrow({single}, {DTYPES[want]})"


def _store(s: Store, tile: Tile) -> str:
    dims = tile.of([*map(str, s.index.free_symbols), s.value, *([s.mask] if s.mask else [])])
    dtype, at = tile.buffers[s.buffer], pointer(s.buffer, s.index, dims, tile)
    if dtype == torch.float8_e4m3fn:
        arguments = [as_bits(at), f"prelude.to_float8({spell(s.value)})"]
    else:
        arguments = [at, narrowed(spell(s.value), tile.values[s.value].dtype, dtype)]
    if mask := tile.guard(dims, s.mask):
        arguments.append(f"mask={mask}")
    return call("tl.store", arguments)


# ---- reductions ---------------------------------------------------------------------------------------

# The function of the prelude, the update of an accumulator, and the neutral element (by kind of dtype).
REDUCTIONS: dict[str, tuple[str, str]] = {
    "sum": ("total", "{acc} += {value}"),
    "prod": ("product", "{acc} *= {value}"),
    "max": ("largest", "{acc} = prelude.maximum({acc}, {value})"),
    "min": ("smallest", "{acc} = prelude.minimum({acc}, {value})"),
    "any": ("any_true", "{acc} = {acc} | ({value} != 0)"),
    "all": ("all_true", "{acc} = {acc} & ({value} != 0)"),
}


def neutral(op: str, dtype: torch.dtype) -> Argument:
    """The value that leaves a reduction as it is."""
    if op in ("any", "all"):
        return op == "all"
    if op in ("sum", "prod"):
        return 0 if op == "sum" else 1
    highest = op.endswith("min")
    if dtype.is_floating_point:
        return float("inf") if highest else float("-inf")
    if dtype == torch.bool:
        return highest
    return torch.iinfo(dtype).max if highest else torch.iinfo(dtype).min


def _neutral_text(op: str, dtype: torch.dtype) -> str:
    value = neutral(op, dtype)
    assert not isinstance(value, str)
    text = literal(value, dtype)
    return text if dtype in (torch.float32, torch.bool) else f"tl.full([1, 1], {text}, {DTYPES[dtype]})"


def reduced_dtype(s: Reduce, tile: Tile) -> torch.dtype:
    """The dtype in which a reduction accumulates."""
    if s.op in ("any", "all"):
        return torch.bool
    return tile.values[s.value].dtype if s.op.startswith("arg") else s.dtype


def reduced_value(s: Reduce, tile: Tile) -> str:
    """The operand of a reduction in its dtype, neutral in the tail, spread along the reduced dimension."""
    have, dtype = tile.values[s.value], reduced_dtype(s, tile)
    text = narrowed(spell(s.value), have.dtype, dtype)
    if inside := tile.inner_guard():
        return f"tl.where({inside}, {text}, {_neutral_text(s.op, dtype)})"
    if tile.inner not in have.dims:
        return f"tl.broadcast_to({text}, {tile.shape(have.dims | {tile.inner})})"
    return text


def _reduce(s: Reduce, tile: Tile) -> list[str]:
    value, axis, out = reduced_value(s, tile), tile.axis(tile.inner), spell(s.out)
    tile.values[s.out] = Value(s.dtype, tile.values[s.value].dims - {tile.inner})
    if not s.op.startswith("arg"):
        return [f"{out} = prelude.{REDUCTIONS[s.op][0]}({value}, {axis})"]
    return [f"{out}_of = {value}", *_first(s, f"{out}_of", tile.inner_at, axis)]


def _first(s: Reduce, values: str, positions: str, axis: int) -> list[str]:
    out, function = spell(s.out), REDUCTIONS[s.op.removeprefix("arg")][0]
    return [
        f"{out}_best = prelude.{function}({values}, {axis})",
        f"{out} = prelude.first_at({values}, {out}_best, {positions}, {axis})",
    ]


def accumulators(reductions: Iterable[Reduce], tile: Tile) -> list[str]:
    """The lines that start the accumulators of a loop along the reduced dimension, one tile each."""
    lines = []
    for s in reductions:
        dtype, shape = reduced_dtype(s, tile), tile.shape(tile.values[s.value].dims | {tile.inner})
        value = neutral(s.op, dtype)
        assert not isinstance(value, str)
        name = f"{spell(s.out)}_{'best' if s.op.startswith('arg') else 'acc'}"
        zero = f"tl.zeros({shape}, {DTYPES[dtype]})"
        full = f"tl.full({shape}, {literal(value, dtype)}, {DTYPES[dtype]})"
        lines.append(f"{name} = {zero if s.op == 'sum' else full}")
        if s.op.startswith("arg"):
            first = f"tl.arange(0, {tile.dim(tile.inner).block})[None, :].to(tl.int64)"
            lines.append(f"{spell(s.out)}_at = tl.broadcast_to({first}, {shape})")
    return lines


def accumulate(s: Reduce, tile: Tile) -> list[str]:
    """The lines that join a tile of values to the accumulator."""
    out, value = spell(s.out), reduced_value(s, tile)
    if not s.op.startswith("arg"):
        return [REDUCTIONS[s.op][1].format(acc=f"{out}_acc", value=value)]
    compare = "larger" if s.op == "argmax" else "lesser"
    return [
        f"{out}_of = {value}",
        f"{out}_better = prelude.{compare}({out}_of, {out}_best)",
        f"{out}_best = tl.where({out}_better, {out}_of, {out}_best)",
        f"{out}_at = tl.where({out}_better, {tile.inner_at}, {out}_at)",
    ]


def reduced(s: Reduce, tile: Tile) -> list[str]:
    """The lines that reduce the accumulator after the loop; the tile learns the result."""
    out, axis = spell(s.out), tile.axis(tile.inner)
    tile.values[s.out] = Value(s.dtype, tile.values[s.value].dims - {tile.inner})
    if not s.op.startswith("arg"):
        return [f"{out} = prelude.{REDUCTIONS[s.op][0]}({out}_acc, {axis})"]
    function = REDUCTIONS[s.op.removeprefix("arg")][0]
    return [
        f"{out}_top = prelude.{function}({out}_best, {axis})",
        f"{out} = prelude.first_at({out}_best, {out}_top, {out}_at, {axis})",
    ]


def loop_lines(body: Body, tile: Tile) -> list[str]:
    """The lines of a phase inside its loop along the reduced dimension."""
    return [line for s in body for line in (accumulate(s, tile) if isinstance(s, Reduce) else statement(s, tile))]


def chunks(w: Writer, body: Iterable[Statement], inner: Axis, tile: Tile) -> None:
    """A loop along `inner` by steps of the tile's block, with the accumulators of its reductions."""
    body = tuple(body)
    ends = [s for s in body if isinstance(s, Reduce)]
    col, extent, dim = spell(str(inner.symbol)), indexed(inner.size), tile.dim(tile.inner)
    # What is reduced has to be known before the loop is printed, for the shapes of the accumulators.
    statements([s for s in body if not isinstance(s, Reduce | Store)], tile)
    w.lines(accumulators(ends, tile))
    with w.block(f"for start in range(0, {extent}, {dim.block})"):
        w.line(f"{col} = start + tl.arange(0, {dim.block})[None, :]")
        if dim.inside:
            w.line(f"{dim.inside} = {col} < {extent}")
        w.lines(loop_lines(body, tile))
    for s in ends:
        w.lines(reduced(s, tile))
