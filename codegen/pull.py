"""Pulling: the value of a graph node at an index, as straight-line scalar statements.

`Puller.at(node, index)` asks for one element. Views change the index and ask their input; pointwise
operators ask each input at the broadcast index and append an operation; nodes computed elsewhere become
loads. What a kernel computes is thus written down by asking for its outputs, and fusion is a question of
what is asked through.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch._prims_common import elementwise_dtypes
from torch.fx import Node

from llmcomp.codegen.index import ZERO, Index, Space, size, sizes
from llmcomp.codegen.kernel import (
    Argument,
    Buffer,
    Check,
    Compute,
    Constant,
    Load,
    Reduce,
    Statement,
    Store,
)
from llmcomp.codegen.kernel import Index as IndexStatement
from llmcomp.pointwise import Pointwise, table
from llmcomp.region import Unfit

LOADABLE = frozenset(
    {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool}
    | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
)
NARROW_FLOATS = {torch.bfloat16: "round_bfloat16", torch.float16: "round_float16"}
MOVABLE = LOADABLE | {torch.float8_e4m3fn}
"""What kernels load and store; arithmetic that rounds to float8 is not theirs."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` live in registers."""
    return torch.float32 if dtype in NARROW_FLOATS or dtype == torch.float8_e4m3fn else dtype


def fake(node: Node) -> torch.Tensor:
    """The fake tensor that stands for a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unfit(f"{node.name} is not a tensor")
    return value


@dataclass(frozen=True)
class Inner:
    """The reduction axis of a kernel: `symbol` runs along it; `points` are the positions it stands for.

    An axis of D elements is normally covered by (symbol,). Two rotary halves cover it by (c, c + D/2).
    """

    symbol: sympy.Symbol
    points: tuple[sympy.Expr, ...]
    extent: sympy.Expr


Special = Callable[["Puller", Node, Index], Argument]
Rule = Callable[["Puller", Node, Index], Argument]


class Puller:
    """Writes the body of one kernel.

    `inside` says which nodes are computed here (region members and inlined nodes); all others are loaded from
    memory. `special` overrides how a node is computed (accumulators). Rules for operators are in `rules`.
    """

    def __init__(
        self,
        space: Space,
        inside: Callable[[Node], bool],
        rules: Mapping[object, Rule],
        special: Mapping[Node, Special] | None = None,
        inner: Inner | None = None,
    ) -> None:
        self.space = space
        self.inside = inside
        self.rules = rules
        self.special = special or {}
        self.inner = inner
        self.statements: list[Statement] = []
        self.buffers: dict[Node, Buffer] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.dtype = torch.float32
        self.mask: str | None = None
        self._names: dict[str, int] = {}
        self._memo: dict[object, Argument] = {}

    # Names -----------------------------------------------------------------------------------------------

    def name(self, stem: str) -> str:
        """A fresh readable name: stem, stem_1, stem_2, ..."""
        stem = "".join(c if c.isalnum() or c == "_" else "_" for c in stem)
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return stem if count == 0 else f"{stem}_{count}"

    def buffer(self, node: Node, stem: str) -> Buffer:
        """The buffer argument that holds a node's value."""
        if node not in self.buffers:
            dtype = fake(node).dtype
            if dtype not in MOVABLE:
                raise Unfit(f"{node.name} has dtype {dtype}")
            self.buffers[node] = Buffer(self.name(f"{stem}_ptr"), dtype)
        return self.buffers[node]

    # Statements ------------------------------------------------------------------------------------------

    def emit(self, stem: str, dtype: torch.dtype, make: Callable[[str], Statement]) -> str:
        """Append the statement that `make` builds for a fresh name; the same statement is kept once."""
        key = make("")
        if key in self._memo:
            return str(self._memo[key])
        name = self.name(stem)
        self.statements.append(make(name))
        self.dtypes[name] = dtype
        self._memo[key] = name
        return name

    def op(self, name: str, *args: Argument) -> Argument:
        """The value of an operation in the current computation dtype."""
        return self.emit(name, self.dtype, lambda out: Compute(out, name, args, self.dtype))

    def test(self, name: str, *args: Argument) -> Argument:
        """The value of an operation that gives a bool."""
        if args and all(not isinstance(a, str | bool) for a in args):
            args = (
                self.named(args[0], self.dtype),
                *args[1:],
            )  # a comparison of constants has their dtype, not its own
        return self.emit(name, torch.bool, lambda out: Compute(out, name, args, torch.bool))

    def convert(self, value: Argument, dtype: torch.dtype) -> Argument:
        """`value` as `dtype` (a register dtype)."""
        if not isinstance(value, str):
            return _constant(value, dtype)
        if self.dtypes[value] == dtype:
            return value
        return self.emit("as_" + str(dtype).split(".")[-1], dtype, lambda out: Compute(out, "convert", (value,), dtype))

    def named(self, value: Argument, dtype: torch.dtype) -> str:
        """`value` as the name of a value of `dtype`: constants get a statement."""
        value = self.convert(value, dtype)
        if isinstance(value, str):
            return value
        return self.emit("constant", dtype, lambda out: Compute(out, "constant", (value,), dtype))

    def integer(self, expr: sympy.Expr, dtype: torch.dtype = torch.int64) -> Argument:
        """An index expression as a value."""
        if expr.is_Integer:
            return int(expr)
        return self.emit("at", dtype, lambda out: IndexStatement(out, expr, dtype))

    def symbol(self, value: Argument) -> sympy.Expr:
        """A loaded integer as a symbol of index expressions."""
        if not isinstance(value, str):
            return sympy.Integer(int(value))
        symbol = sympy.Symbol(value, integer=True)
        self.space.data.add(symbol)
        return symbol

    def checked(self, value: Argument, extent: sympy.Expr, wrap: bool) -> sympy.Expr:
        """A loaded index, checked against [0, extent)."""
        name = self.named(value, torch.int64)
        mask = self.mask
        return self.symbol(self.emit("index", torch.int64, lambda out: Check(out, name, extent, wrap, mask)))

    def in_memory(self, node: Node) -> bool:
        """Whether a node is loaded rather than computed here."""
        return node not in self.special and not self.inside(node)

    def load(self, node: Node, index: Index, stem: str) -> Argument:
        """One element of a node that lies in memory."""
        return self.load_at(
            node, sympy.Add(*(i * s for i, s in zip(index, sizes(fake(node).stride()), strict=True))), stem
        )

    def load_at(self, node: Node, offset: sympy.Expr, stem: str = "x") -> Argument:
        """The element `offset` elements behind the first of a node that lies in memory."""
        value, position = fake(node), self.space.joined(offset)
        buffer, dtype, mask = self.buffer(node, stem), compute_dtype(value.dtype), self.mask
        loaded = self.emit(stem, dtype, lambda out: Load(out, buffer.name, position, dtype, mask))
        if not value.is_neg():
            return loaded
        # Memory holds the negative of what the tensor means: the imaginary part of a conjugate is such a
        # view.
        return self.emit("neg", dtype, lambda out: Compute(out, "neg", (loaded,), dtype))

    def store(self, buffer: Buffer, position: sympy.Expr, value: Argument) -> None:
        """Write one element."""
        name = self.named(value, compute_dtype(buffer.dtype))
        self.statements.append(Store(buffer.name, self.space.joined(position), name, self.mask))

    def reduce(self, op: str, value: Argument, dtype: torch.dtype) -> str:
        """A reduction of `value` along the inner axis."""
        assert self.inner is not None
        if self.mask is not None:
            raise Unfit("a reduction under a mask")
        name = self.named(value, dtype)
        out_dtype = torch.int64 if op.startswith("arg") else dtype
        return self.emit(f"{op}_{name}", out_dtype, lambda out: Reduce(out, op, name, out_dtype))

    # Graph -----------------------------------------------------------------------------------------------

    def at(self, node: Node, index: Index, stem: str = "x") -> Argument:
        """The value of `node` at `index`; `stem` names it if it is loaded."""
        key = (node, index, self.mask)
        if key not in self._memo:
            self._memo[key] = self._at(node, index, stem)
        return self._memo[key]

    def _at(self, node: Node, index: Index, stem: str) -> Argument:
        if node in self.special:
            return self.special[node](self, node, index)
        if not self.inside(node):
            return self.load(node, index, stem)
        rule = table().get(node.target)  # type: ignore[call-overload]
        if fake(node).dtype not in (MOVABLE if rule is None else LOADABLE):
            raise Unfit(f"{node.name} has dtype {fake(node).dtype}")
        if rule is not None:
            return self._pointwise(node, rule, index)
        if (special := self.rules.get(node.target)) is not None:
            return special(self, node, index)
        raise Unfit(f"no rule for {node.target}")

    def argument(self, arg: object, index: Index, stem: str) -> Argument:
        """An operand of a pointwise operator at the output index, broadcast."""
        if isinstance(arg, Node):
            value = arg.meta["val"]
            if isinstance(value, torch.SymInt):
                return self.integer(size(value))
            if not isinstance(value, torch.Tensor):
                raise Unfit(f"{arg.name} is a number that is computed from sizes")
            return self.at(arg, broadcast(index, value), stem)
        if isinstance(arg, bool | int | float):
            return arg
        raise Unfit(f"operand {arg!r}")

    def _pointwise(self, node: Node, rule: Pointwise, index: Index) -> Argument:
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        operands = list(zip(names, node.args, strict=False)) + list(node.kwargs.items())
        values = [(n, a if a is None or isinstance(a, str) else self.argument(a, index, _stem(n))) for n, a in operands]
        promoting = [
            _dtype_witness(a) for n, a in operands if n not in ("alpha", "beta", "condition", "mask", "approximate")
        ]
        computation, _ = elementwise_dtypes(
            *(p for p in promoting if p is not None), type_promotion_kind=rule.promotion
        )
        if computation not in LOADABLE:
            raise Unfit(f"{node.name} computes in {computation}")
        computation = compute_dtype(computation)
        tensors = {n for n, a in operands if isinstance(a, Node)}
        converted = [
            (n, self._operand(n, v, computation) if n in tensors or isinstance(v, bool | int | float) else v)
            for n, v in values
        ]
        positional = len(node.args)
        saved, self.dtype = self.dtype, computation
        try:
            result = rule.formula(self, *(v for _, v in converted[:positional]), **dict(converted[positional:]))
        finally:
            self.dtype = saved
        return self.convert(result, compute_dtype(fake(node).dtype))

    def _operand(self, name: str, value: Argument | None, dtype: torch.dtype) -> Argument | None:
        if value is None or name in ("condition", "mask"):
            return value
        return self.convert(value, dtype)

    def rounded(self, value: Argument, dtype: torch.dtype) -> Argument:
        """`value` rounded to what `dtype` can hold, in its register dtype."""
        value = self.convert(value, compute_dtype(dtype))
        if (rounding := NARROW_FLOATS.get(dtype)) and isinstance(value, str):
            return self.emit("rounded", torch.float32, lambda out: Compute(out, rounding, (value,), torch.float32))
        return value


def _constant(value: Constant, dtype: torch.dtype) -> Constant:
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


def _stem(argument: str) -> str:
    return {"self": "x", "input": "x"}.get(argument, argument)


def _dtype_witness(arg: object) -> torch.Tensor | bool | int | float | None:
    """What type promotion sees of an operand."""
    if isinstance(arg, Node):
        value = arg.meta["val"]
        return 1 if isinstance(value, torch.SymInt) else value
    return arg if isinstance(arg, bool | int | float) else None


def broadcast(index: Index, value: torch.Tensor) -> Index:
    """The index of an operand of shape `value.shape` that meets the output index."""
    tail = index[len(index) - value.dim() :]
    return tuple(ZERO if _is_one(n) else i for i, n in zip(tail, value.shape, strict=True))


def _is_one(extent: int | torch.SymInt) -> bool:
    return isinstance(extent, int) and extent == 1


def dims(value: object, rank: int) -> tuple[int, ...]:
    """Normalized dimension numbers of an argument such as dim=-1 or dim=[1, 2] (None or empty: all)."""
    if value is None or value == []:
        return tuple(range(rank))
    given: Sequence[int] = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return tuple(sorted(d % rank for d in given)) if rank else ()
