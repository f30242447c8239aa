"""The kernel description: target-neutral, frozen, printable as Triton and as C++.

A kernel is a few loop axes and a straight-line body of scalar statements. Sizes and indices are sympy
expressions over axis symbols, size symbols (kernel arguments) and the names of integer values (gathers).
Four families share the statements:

    Map       for every point of an index space: body
    Rows      for every row: body with reductions along one inner axis
    Contract  operand(m, k) . weight(n, k), P accumulators per point, then an epilogue body
    Attend    softmax(q . k) . v with a score body

Floating point values narrower than 32 bits exist only in memory: `Load` widens bfloat16 and float16 to
float32, `Store` rounds to nearest even, and the `round` operation rounds a float32 value in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch

from llmcomp.formats import Format

MATRIX = sympy.Symbol("own_matrix", integer=True, nonnegative=True)
"""In the epilogue of a Contract with experts: the matrix of the row, the last one for rows that belong to none."""

Constant = float | int | bool
Argument = str | Constant


@dataclass(frozen=True)
class Buffer:
    """A pointer argument of a kernel; all addressing is done by element indices from its start."""

    name: str
    dtype: torch.dtype
    written: bool = False


@dataclass(frozen=True)
class Axis:
    """A loop: `symbol` runs over [0, size)."""

    symbol: sympy.Symbol
    size: sympy.Expr


@dataclass(frozen=True)
class Load:
    """out = buffer[index], or `other` where the boolean value `mask` is false. bf16/f16 arrive as float32."""

    out: str
    buffer: str
    index: sympy.Expr
    dtype: torch.dtype
    mask: str | None = None
    other: Constant = 0


@dataclass(frozen=True)
class Compute:
    """out = op(*args), a row of the operation table of each printer (`OPERATIONS` below lists them).

    `args` are names of values or constants. All operands already have the dtype that the operation computes
    in; `dtype` is the dtype of `out` (bool for comparisons).
    """

    out: str
    op: str
    args: tuple[Argument, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Index:
    """out = an integer expression of axes, sizes and integer values."""

    out: str
    expr: sympy.Expr
    dtype: torch.dtype


@dataclass(frozen=True)
class Check:
    """Clamp the integer value `out` = `value` into [0, size) and report an index error where it was outside.

    Negative indices count from the end where `wrap` is set (aten.index does that, aten.embedding does not).
    """

    out: str
    value: str
    size: sympy.Expr
    wrap: bool
    mask: str | None = None


@dataclass(frozen=True)
class Reduce:
    """out = reduction of `value` along the inner axis; `out` is constant along that axis.

    op is one of sum, prod, max, min, any, all, argmax, argmin (first index wins, NaN wins, result int64).
    """

    out: str
    op: str
    value: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Store:
    """buffer[index] = value, only where the boolean value `mask` is true."""

    buffer: str
    index: sympy.Expr
    value: str
    mask: str | None = None


Statement = Load | Compute | Index | Check | Reduce | Store
Body = tuple[Statement, ...]

UNARY = """neg abs sign sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan
sinh cosh tanh asinh acosh atanh erf erfc sigmoid floor ceil trunc round_even logical_not bitwise_not
isnan isinf""".split()
BINARY = """add sub mul div floor_div trunc_div remainder fmod pow atan2 minimum maximum fmin fmax
eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor shift_left
shift_right copysign hypot""".split()
# where(condition, a, b); convert(value) to `dtype`; round_bfloat16/round_float16: float32 -> float32,
# rounded to
# what the narrow type can hold; constant(number) of `dtype`; fma(a, b, c).
OTHER = ["where", "convert", "round_bfloat16", "round_float16", "constant", "fma"]
OPERATIONS: tuple[str, ...] = (*UNARY, *BINARY, *OTHER)


@dataclass(frozen=True)
class Map:
    """Pointwise over `axes` (outermost first); the last axis is the one that is contiguous in memory."""

    name: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...]
    axes: tuple[Axis, ...]
    body: Body


@dataclass(frozen=True)
class Rows:
    """For every point of `axes`: `body`, with `Reduce` statements along `inner`.

    Statements run in order. One that depends on `inner` (through an index or a value) is a vector along the
    row, any other is a scalar of the row; `phases` below gives the loops.
    """

    name: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...]
    axes: tuple[Axis, ...]
    inner: Axis
    body: Body


@dataclass(frozen=True)
class Packing:
    """How the elements of a weight are stored: as codes of `format`, in bytes.

    A format with groups has its scales in the buffer `scale` (and zero points in `zero`), `groups` of them for each
    row of the matrix; a scale for a whole row is a matter of the epilogue. Strides of the Weight count bytes.
    """

    format: Format
    groups: sympy.Expr = sympy.Integer(0)
    scale: str | None = None
    zero: str | None = None


@dataclass(frozen=True)
class Weight:
    """A matrix operand of a Contract: element (row, k) of expert e is at offset + e*expert_stride +
    row*row_stride + k*k_stride.

    k_stride is 1 for `nn.Linear` weights (N, K) and N for GPT-2's Conv1D (K, N), where row_stride is 1. A quantized
    weight has a `packing`, and rows that lie one behind the other.
    """

    buffer: str
    row_stride: sympy.Expr
    k_stride: sympy.Expr
    offset: sympy.Expr = sympy.Integer(0)
    expert_stride: sympy.Expr = sympy.Integer(0)
    packing: Packing | None = None


@dataclass(frozen=True)
class Accumulator:
    """The float32 dot product sum_k operand(m, k) * weight(row, k), as the value `name` of the epilogue."""

    name: str
    weight: Weight
    row: sympy.Expr


@dataclass(frozen=True)
class Section:
    """One run of output columns of a Contract: `axes` enumerate the columns (last one innermost).

    Every accumulator's `row` is an expression of `axes`, affine with step 1 in the last axis in the common
    case. The two rotary halves of a head are two accumulators: axes (h, c), rows h*D + c and h*D + c + D/2.
    `Reduce` statements in the epilogue run along the last axis (a norm within a head).
    """

    axes: tuple[Axis, ...]
    accumulators: tuple[Accumulator, ...]
    epilogue: Body


@dataclass(frozen=True)
class Contract:
    """Rows of an operand times one or more weight matrices.

    `operand` is a body over (`rows`, `depth`) with reductions along `depth` (a norm in the prologue); the
    value `operand_value` is what is multiplied. `operand_dtype` is the dtype that the graph holds the
    operand in: the printers may keep it in that dtype (tensor cores) or in float32.
    `experts`, where given, names an int32/int64 buffer of E cumulative row ends (expert e owns the rows
    [ends[e-1], ends[e]) of the operand) and weights use `expert_stride`. Epilogues know the expert of a row as
    `MATRIX`.
    Where the format of the weights is dynamic, rows of the operand are quantized (llmcomp/dynamic.py): an accumulator
    is the sum of the products of codes, times the scale of the row of the operand, in float32.
    """

    name: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...]
    rows: Axis
    depth: Axis
    operand: Body
    operand_value: str
    operand_dtype: torch.dtype
    sections: tuple[Section, ...]
    experts: str | None = None
    expert_count: sympy.Expr = sympy.Integer(1)


def packing_of(kernel: Contract) -> Packing | None:
    """How the weights of a kernel are stored, which is the same for all; None where they are dense."""
    return kernel.sections[0].accumulators[0].weight.packing


@dataclass(frozen=True)
class Strided:
    """A 4-D strided operand of Attend, (batch, head, position, channel), in elements."""

    buffer: str
    strides: tuple[sympy.Expr, sympy.Expr, sympy.Expr, sympy.Expr]
    offset: sympy.Expr = sympy.Integer(0)


@dataclass(frozen=True)
class Attend:
    """out[b, h, i] = softmax_j(score(b, h, i, j)) . v[b, h // group, j].

    `score` is a body over the axes batch, heads, queries, keys that reads the float32 value "score" (scale *
    q.k, already computed) and leaves the final score in `score_value` (soft cap, bias, -inf where masked).
    Keys outside [`key_start`, `key_end`), expressions of the queries axis and sizes, are known to be masked
    and are not visited. Rows with no visible key give zeros. `sinks`, where given, is a buffer of one float
    per head that joins the softmax denominator (and the maximum) without a value. `visible`, where given, names
    a boolean value of the score body that does not read the score: where it is false the score is -inf, so a
    printer may evaluate it first and skip keys that nobody sees (the unused end of a static cache, padding).
    Where k and v hold codes (int8 or float8), `k_scale` and `v_scale`, whose channels have stride 0, give one float32
    for each key: the score is multiplied by that of its key, the weight by that of its value.
    """

    name: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...]
    batch: Axis
    heads: Axis
    queries: Axis
    keys: Axis
    group: int
    head_dim: int
    value_dim: int
    q: Strided
    k: Strided
    v: Strided
    out: Strided
    scale: float
    score: Body
    score_value: str
    key_start: sympy.Expr
    key_end: sympy.Expr
    sinks: str | None = None
    visible: str | None = None
    k_scale: Strided | None = None
    v_scale: Strided | None = None


Kernel = Map | Rows | Contract | Attend


def bodies(kernel: Kernel) -> tuple[Body, ...]:
    """All bodies of a kernel."""
    match kernel:
        case Contract():
            return (kernel.operand, *(s.epilogue for s in kernel.sections))
        case Attend():
            return (kernel.score,)
    return (kernel.body,)


def checks(kernel: Kernel) -> bool:
    """Whether a kernel may find an index out of range, and so wants a status word."""
    return any(isinstance(s, Check) for body in bodies(kernel) for s in body)


@dataclass(frozen=True)
class Phase:
    """One loop along the inner axis of a row: `body` ends in at most one layer of reductions or in stores.

    `scalars` run once, before the loop: statements that are constant along the axis and were not available
    before.
    """

    scalars: Body
    body: Body


def inputs(statement: Statement) -> Iterator[str]:
    """Names of the values and index symbols that a statement reads."""
    match statement:
        case Load(index=index, mask=mask):
            yield from (str(s) for s in index.free_symbols)
            yield from filter(None, [mask])
        case Store(index=index, value=value, mask=mask):
            yield from (str(s) for s in index.free_symbols)
            yield value
            yield from filter(None, [mask])
        case Index(expr=expr):
            yield from (str(s) for s in expr.free_symbols)
        case Check(value=value, size=size, mask=mask):
            yield value
            yield from (str(s) for s in size.free_symbols)
            yield from filter(None, [mask])
        case Reduce(value=value):
            yield value
        case Compute(args=args):
            yield from (a for a in args if isinstance(a, str))


def needed(body: Sequence[Statement], result: str) -> Body:
    """The statements of a body that stores nothing on which the value `result` depends."""
    wanted, kept = {result}, []
    for s in reversed(body):
        assert not isinstance(s, Store), "such a body stores nothing"
        if s.out in wanted:
            wanted.update(inputs(s))
            kept.append(s)
    return tuple(reversed(kept))


def vectors(body: Sequence[Statement], inner: sympy.Symbol, seeds: Sequence[str] = ()) -> frozenset[str]:
    """Names of the values in `body` that vary along `inner`; `seeds` vary from the start (accumulators)."""
    varying = {str(inner), *seeds}
    for s in body:
        if not isinstance(s, Reduce | Store) and varying.intersection(inputs(s)):
            varying.add(s.out)
    return frozenset(varying - {str(inner)})


def phases(body: Sequence[Statement], inner: sympy.Symbol, seeds: Sequence[str] = ()) -> tuple[Phase, ...]:
    """Split the body of a row into loops along `inner`.

    A reduction ends a phase; vector statements that a later phase needs again are repeated in it (loads hit
    the cache, arithmetic is cheap next to memory), so that no row has to be kept. Accumulators (`seeds`) are
    never repeated.
    """
    varying = vectors(body, inner, seeds)
    level: dict[str, int] = {}
    by_name = {s.out: s for s in body if not isinstance(s, Store)}
    for s in body:
        depth = max((level.get(name, 0) for name in inputs(s)), default=0)
        if not isinstance(s, Store):
            level[s.out] = depth + 1 if isinstance(s, Reduce) else depth

    def need(names: Iterator[str], wanted: set[str]) -> None:
        for name in names:
            if name in varying and name in by_name and name not in wanted:
                wanted.add(name)
                need(inputs(by_name[name]), wanted)

    last = max([*level.values(), 0])
    result = []
    for depth in range(last + 1):
        ends = [
            s
            for s in body
            if (isinstance(s, Reduce) and level[s.out] == depth + 1)
            or (isinstance(s, Store) and max((level.get(n, 0) for n in inputs(s)), default=0) == depth)
        ]
        wanted: set[str] = set()
        for s in ends:
            need(inputs(s), wanted)
        scalars = tuple(
            s for s in body if not isinstance(s, Store | Reduce) and s.out not in varying and level[s.out] == depth
        )
        loop = tuple(s for s in body if s in ends or (not isinstance(s, Store | Reduce) and s.out in wanted))
        if scalars or loop:
            result.append(Phase(scalars, loop))
    return tuple(result)
