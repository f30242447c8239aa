"""What lowering of every family shares: outputs and where they are written, loop axes, names of arguments."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass, replace

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen import kernel as K
from llmcomp.codegen.index import ZERO, Index, axis_symbol, size, sizes
from llmcomp.codegen.pull import Puller, fake
from llmcomp.hints import hint
from llmcomp.region import Region, Unfit

aten = torch.ops.aten

# The description of a kernel from its buffers and size symbols.
Make = Callable[[tuple[K.Buffer, ...], tuple[sympy.Symbol, ...]], K.Kernel]


@dataclass(frozen=True)
class Lowered:
    """A kernel and what its arguments are in this graph: a node per buffer, an expression per size."""

    kernel: K.Kernel
    buffers: tuple[Node, ...]
    sizes: tuple[sympy.Expr, ...]


def kernel_name(region: Region) -> str:
    """A readable name made of the operators of the region, the same for equal regions."""
    words: list[str] = []
    skipped = {
        "view",
        "transpose",
        "unsqueeze",
        "clone",
        "expand",
        "slice",
        "getitem",
        "permute",
        "_unsafe_view",
        "reshape",
    }
    for node in region.nodes:
        word = str(getattr(node.target, "__name__", node.target)).split(".")[0].strip("_")
        if word not in words and word not in skipped:
            words.append(word)
    return "_".join(words or ["copy"])[:60].strip("_")


def destination(output: Node) -> tuple[Node, Node]:
    """(node whose memory is written, node whose value is written) of a region output."""
    if output.target is aten.copy_.default:
        target, value = output.args[:2]
        assert isinstance(target, Node) and isinstance(value, Node)
        return target, value
    if output.target is torch.ops.llmcomp.cache_write_.default:
        target, value = output.args[:2]
        assert isinstance(target, Node) and isinstance(value, Node)
        return target, value
    return output, output


def write(p: Puller, output: Node, index: Index) -> None:
    """Store the element of a region output at `index` (an index of the written value)."""
    target, value = destination(output)
    if fake(target).is_neg():
        raise Unfit("writes to a tensor whose memory holds its negative")
    buffer = p.buffer(target, "out")
    if not buffer.written:
        buffer = p.buffers[target] = replace(buffer, written=True)
    result = p.at(value, index)
    where = list(index)
    if output.target is torch.ops.llmcomp.cache_write_.default:
        positions, dim = output.args[2], int(output.args[3])  # type: ignore[arg-type]
        assert isinstance(positions, Node)
        where[dim] = _position(p, positions, index[dim], size(fake(target).shape[dim]))
    elif target is not value:
        shape = fake(target).shape
        where = [ZERO if n == 1 else i for i, n in zip(index[len(index) - len(shape) :], sizes(shape), strict=True)]
    strides = sizes(fake(target).stride())
    p.store(buffer, sympy.Add(*(i * s for i, s in zip(where, strides, strict=True))), result)


def _position(p: Puller, positions: Node, at: sympy.Expr, extent: sympy.Expr) -> sympy.Expr:
    """Where along its dimension a cache is written for element `at` of the positions."""
    if positions.target is aten.arange.start and p.inside(positions):
        start = positions.args[0]
        start = start.meta["val"] if isinstance(start, Node) else start
        assert isinstance(start, int | torch.SymInt)
        return sympy.expand(size(start) + at)  # a range that was made from sizes needs no check
    position = p.at(positions, (at,) if fake(positions).dim() else (), "position")
    return p.checked(position, extent, wrap=False)


def body_of(p: Puller) -> K.Body:
    return tuple(p.statements)


def loop_axes(value: torch.Tensor, prefix: str = "i") -> tuple[Index, list[K.Axis]]:
    """An index of fresh loop variables (0 where the size is 1) and the loops, in memory order (outermost
    first)."""
    index: list[sympy.Expr] = []
    loops: list[tuple[int, K.Axis]] = []
    for d, (n, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if isinstance(n, int) and n == 1:
            index.append(ZERO)
            continue
        axis = K.Axis(axis_symbol(f"{prefix}{d}"), size(n))
        index.append(axis.symbol)
        loops.append((hint(stride), axis))
    loops.sort(key=lambda pair: -pair[0])
    return tuple(index), [axis for _, axis in loops]


def volume(value: torch.Tensor) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*sizes(value.shape)))


def members(region: Region, inlined: Set[Node]) -> Set[Node]:
    return frozenset(region.nodes) | frozenset(inlined)


def rotation(region: Region) -> tuple[int, bool] | None:
    """(channels, interleaved) of the rotary embeddings of a region, if they agree and channels are known."""
    found = {
        (hint(fake(n).shape[-1]), bool(n.args[3])) for n in region.nodes if n.target is torch.ops.llmcomp.rope.default
    }
    return found.pop() if len(found) == 1 else None


def channel_points(symbol: sympy.Symbol, channels: int, interleaved: bool) -> tuple[sympy.Expr, ...]:
    """The two channels that a rotary embedding turns into each other."""
    return (2 * symbol, 2 * symbol + 1) if interleaved else (symbol, symbol + channels // 2)


def refuse_hazards(p: Puller) -> None:
    """A buffer that is read at another element than the one being written may already have been
    overwritten."""
    written: dict[str, set[sympy.Expr]] = {}
    for s in p.statements:
        if isinstance(s, K.Store):
            written.setdefault(s.buffer, set()).add(s.index)
    for s in p.statements:
        if isinstance(s, K.Load) and s.buffer in written and written[s.buffer] != {s.index}:
            raise Unfit(f"{s.buffer} is read while it is written")


def finish(p: Puller, make: Make) -> Lowered:
    """Name the size symbols of a kernel n0, n1, ... in order of use, and pair arguments with graph values."""
    return finish_all([p], p.buffers, make)


def finish_all(pullers: Sequence[Puller], buffers: dict[Node, K.Buffer], make: Make) -> Lowered:
    """`finish` for kernels whose bodies were pulled apart (Contract)."""
    local = {s for p in pullers for s in (*p.space.extents, *p.space.data)}
    draft = make(tuple(buffers.values()), ())
    symbols, functions = _free_symbols(draft)
    if rounded := functions & ROUNDED:
        raise Unfit(f"a size is computed with {', '.join(sorted(rounded))}")
    found = [s for s in symbols if s not in local]
    renamed = {s: sympy.Symbol(f"n{i}", integer=True, positive=True) for i, s in enumerate(found)}
    final: K.Kernel = _renamed(make(tuple(buffers.values()), tuple(renamed.values())), renamed)  # type: ignore[assignment]
    return Lowered(final, tuple(buffers), tuple(found))


# Functions of sizes through floating point numbers (scale factors of interpolation): left to Python.
ROUNDED = frozenset("ToFloat TruncToInt TruncToFloat CeilToInt FloorToInt RoundToInt IntTrueDiv FloatTrueDiv".split())


def _free_symbols(value: object) -> tuple[list[sympy.Symbol], Set[str]]:
    """(symbols of every expression inside a description, in order of appearance, names of values excluded; names of
    the functions that are called)."""
    seen: dict[sympy.Symbol, None] = {}
    functions: set[str] = set()

    def visit(v: object) -> None:
        if isinstance(v, sympy.Expr):
            functions.update(f.func.__name__ for f in v.atoms(sympy.Function))
            for s in sorted(v.free_symbols, key=str):
                seen.setdefault(s)
        elif isinstance(v, tuple):
            for item in v:
                visit(item)
        elif is_dataclass(v):
            if isinstance(v, K.Axis):
                visit(v.size)
                return
            for field in fields(v):
                visit(getattr(v, field.name))

    visit(value)
    return list(seen), functions


def _renamed(value: object, names: dict[sympy.Symbol, sympy.Symbol]) -> object:
    """A description with symbols exchanged everywhere."""
    if not names:
        return value
    if isinstance(value, sympy.Expr):
        return value.xreplace(names)
    if isinstance(value, tuple):
        return tuple(_renamed(v, names) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _renamed(getattr(value, f.name), names) for f in fields(value)})
    return value
