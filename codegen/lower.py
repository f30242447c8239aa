"""Lowering: a region of the graph becomes one kernel description, or `Unfit` says why it cannot."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen import kernel as K
from llmcomp.codegen.index import ZERO, Index, Space, axis_symbol, size, sizes
from llmcomp.codegen.pull import Inner, Puller, fake
from llmcomp.codegen.rules import reduced_dims, rules
from llmcomp.hints import hint
from llmcomp.region import Region, Unfit

aten = torch.ops.aten


@dataclass(frozen=True)
class Lowered:
    """A kernel and what its arguments are in this graph: a node per buffer, an expression per size."""

    kernel: K.Kernel
    buffers: tuple[Node, ...]
    sizes: tuple[sympy.Expr, ...]


def lower(region: Region, inlined: Set[Node]) -> Lowered:
    """The kernel of a region.

    Raises:
        Unfit: the region is not one kernel of its family; the text is the reason.
    """
    from llmcomp.codegen.lower_attend import lower_attend
    from llmcomp.codegen.lower_contract import lower_contract

    if any(n == 0 for o in region.outputs for n in fake(destination(o)[1]).shape if isinstance(n, int)):
        raise Unfit("no elements")
    families = {"map": lower_map, "rows": lower_rows, "contract": lower_contract, "attend": lower_attend}
    return families[region.family](region, inlined)


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
    buffer = p.buffer(target, "out")
    if not buffer.written:
        buffer = p.buffers[target] = replace(buffer, written=True)
    result = p.at(value, index)
    where = list(index)
    if output.target is torch.ops.llmcomp.cache_write_.default:
        positions, dim = output.args[2], int(output.args[3])  # type: ignore[arg-type]
        assert isinstance(positions, Node)
        rank = fake(positions).dim()
        position = p.at(positions, (index[dim],) if rank else (), "position")
        where[dim] = p.checked(position, size(fake(target).shape[dim]), wrap=False)
    elif target is not value:
        shape = fake(target).shape
        where = [
            ZERO if n == 1 else i for i, n in zip(index[len(index) - len(shape) :], sizes(shape), strict=True)
        ]
    strides = sizes(fake(target).stride())
    p.store(buffer, sympy.Add(*(i * s for i, s in zip(where, strides, strict=True))), result)


def body_of(p: Puller) -> K.Body:
    return tuple(p.statements)


def loop_axes(value: torch.Tensor, prefix: str = "i") -> tuple[Index, list[K.Axis]]:
    """An index of fresh loop variables (0 where the size is 1) and the loops, in memory order (outermost first)."""
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
        (hint(fake(n).shape[-1]), bool(n.args[3]))
        for n in region.nodes
        if n.target is torch.ops.llmcomp.rope.default
    }
    return found.pop() if len(found) == 1 else None


def channel_points(symbol: sympy.Symbol, channels: int, interleaved: bool) -> tuple[sympy.Expr, ...]:
    """The two channels that a rotary embedding turns into each other."""
    return (2 * symbol, 2 * symbol + 1) if interleaved else (symbol, symbol + channels // 2)


def lower_map(region: Region, inlined: Set[Node]) -> Lowered:
    """Pointwise over the index space of the outputs, which all have the same number of elements in the same order."""
    inside = members(region, inlined)
    _, reference_node = destination(region.outputs[0])
    reference = fake(reference_node)
    index, loops = loop_axes(reference)
    points: tuple[Index, ...] = (index,)
    turn = rotation(region)
    if turn is not None and size(reference.shape[-1]) == turn[0] and loops and loops[-1].symbol == index[-1]:
        half = K.Axis(loops[-1].symbol, sympy.Integer(turn[0] // 2))
        loops[-1] = half
        points = tuple((*index[:-1], c) for c in channel_points(half.symbol, *turn))
    p = Puller(Space({a.symbol: a.size for a in loops}), inside.__contains__, rules())
    for output in region.outputs:
        value = fake(destination(output)[1])
        if sympy.expand(volume(value) - volume(reference)) != 0:
            raise Unfit(f"{output.name} has another number of elements")
        for point in points:
            same = sizes(value.shape) == sizes(reference.shape)
            write(p, output, point if same else p.space.reshape(point, reference.shape, value.shape))
    refuse_hazards(p)
    axes, body = merge_axes(tuple(loops) or (K.Axis(axis_symbol("i0"), sympy.Integer(1)),), body_of(p))
    return finish(p, lambda buffers, symbols: K.Map(kernel_name(region), buffers, symbols, axes, body))


def refuse_hazards(p: Puller) -> None:
    """A buffer that is read at another element than the one being written may already have been overwritten."""
    written: dict[str, set[sympy.Expr]] = {}
    for s in p.statements:
        if isinstance(s, K.Store):
            written.setdefault(s.buffer, set()).add(s.index)
    for s in p.statements:
        if isinstance(s, K.Load) and s.buffer in written and written[s.buffer] != {s.index}:
            raise Unfit(f"{s.buffer} is read while it is written")


def lower_rows(region: Region, inlined: Set[Node]) -> Lowered:
    """Reductions along the trailing dimensions; outputs are whole rows or one value per row."""
    inside = members(region, inlined)
    extent, count = _row(region)
    full = [o for o in region.outputs if _ends_in(fake(destination(o)[1]), extent)]
    reference = fake(destination(full[0])[1]) if full else fake(destination(region.outputs[0])[1])
    rank = reference.dim() - (_trailing(reference, extent) if full else 0)
    outer, loops = loop_axes(
        reference.new_empty_strided(reference.shape[:rank], reference.stride()[:rank]), "r"
    )
    symbol, points, inner_size = axis_symbol("c"), None, extent
    turn = rotation(region)
    if turn is not None and extent == turn[0]:
        points, inner_size = channel_points(symbol, *turn), sympy.Integer(turn[0] // 2)
    inner = Inner(symbol, points or (symbol,), extent)
    space = Space({**{a.symbol: a.size for a in loops}, symbol: inner_size})
    p = Puller(space, inside.__contains__, rules(), inner=inner)
    rows = sizes(reference.shape[:rank])
    for output in region.outputs:
        value = fake(destination(output)[1])
        if _ends_in(value, extent) and full:
            tail = value.dim() - _trailing(value, extent)
            head = _same_rows(p, outer, rows, sizes(value.shape[:tail]), output)
            for point in inner.points:
                write(p, output, (*head, *p.space.unflatten(point, sizes(value.shape[tail:]))))
        else:
            write(p, output, _same_rows(p, outer, rows, sizes(value.shape), output))
    refuse_hazards(p)
    axes = tuple(loops) or (K.Axis(axis_symbol("r"), sympy.Integer(1)),)
    row_axis = K.Axis(symbol, inner_size)
    return finish(
        p, lambda buffers, symbols: K.Rows(kernel_name(region), buffers, symbols, axes, row_axis, body_of(p))
    )


def _row(region: Region) -> tuple[sympy.Expr, int]:
    """Number of elements along the reductions of a region, and of dimensions."""
    for node in region.nodes:
        reducer = node if node.target in rules() else None
        if reducer is None or not is_reduction(node):
            continue
        source = node.args[0]
        if isinstance(source, Node) and is_tuple_reduction(source):
            node, source = source, source.args[0]
        assert isinstance(source, Node)
        along = reduced_dims(node)
        shape = sizes(fake(source).shape)
        if along and along != tuple(range(len(shape) - len(along), len(shape))):
            raise Unfit(f"{node.name} reduces leading dimensions")
        return sympy.expand(sympy.Mul(*(shape[d] for d in along))), len(along)
    raise Unfit("no reduction")


def is_tuple_reduction(node: Node) -> bool:
    """Whether a node is a reduction with several results, read through getitem."""
    from llmcomp.codegen.rules import TUPLES

    return node.target in TUPLES


def is_reduction(node: Node) -> bool:
    """Whether a node reduces along an axis."""
    from llmcomp.codegen.rules_reduce import reduce_rules

    if node.target in reduce_rules():
        return True
    source = node.args[0] if node.args else None
    return (
        str(node.target) == "<built-in function getitem>"
        and isinstance(source, Node)
        and is_tuple_reduction(source)
    )


def _trailing(value: torch.Tensor, extent: sympy.Expr) -> int:
    """How many trailing dimensions hold `extent` elements, or 0."""
    total = sympy.Integer(1)
    for count in range(1, value.dim() + 1):
        total = sympy.expand(total * size(value.shape[-count]))
        if total == extent and extent != 1:
            return count
    return 0


def _ends_in(value: torch.Tensor, extent: sympy.Expr) -> bool:
    return _trailing(value, extent) > 0


def _same_rows(p: Puller, outer: Index, rows: Index, shape: Index, output: Node) -> Index:
    """The index of the same row in an array of rows of another shape."""
    if shape == rows:
        return outer
    if sympy.expand(sympy.Mul(*shape) - sympy.Mul(*rows)) != 0:
        raise Unfit(f"{output.name} has another number of rows")
    return p.space.unflatten(p.space.flatten(outer, rows), shape)


def merge_axes(axes: tuple[K.Axis, ...], body: K.Body) -> tuple[tuple[K.Axis, ...], K.Body]:
    """Join neighbouring loops wherever every index of the body steps through them as through one."""
    for position in range(len(axes) - 1, 0, -1):
        outer, inner = axes[position - 1], axes[position]
        joined = _join(outer, inner, body)
        if joined is not None:
            axis = K.Axis(inner.symbol, sympy.expand(outer.size * inner.size))
            return merge_axes((*axes[: position - 1], axis, *axes[position + 1 :]), joined)
    return axes, body


def _join(outer: K.Axis, inner: K.Axis, body: K.Body) -> K.Body | None:
    result = []
    for s in body:
        expr = s.index if isinstance(s, K.Load | K.Store) else s.expr if isinstance(s, K.Index) else None
        if expr is None:
            result.append(s)
            continue
        step, high = expr.coeff(inner.symbol), expr.coeff(outer.symbol)
        rest = sympy.expand(expr - step * inner.symbol - high * outer.symbol)
        if rest.has(inner.symbol, outer.symbol) or sympy.expand(high - step * inner.size) != 0:
            return None
        joined = rest + step * inner.symbol
        result.append(replace(s, expr=joined) if isinstance(s, K.Index) else replace(s, index=joined))
    return tuple(result)


def finish(p: Puller, make: object) -> Lowered:
    """Name the size symbols of a kernel n0, n1, ... in order of use, and pair arguments with graph values."""
    return finish_all([p], p.buffers, make)


def finish_all(pullers: Sequence[Puller], buffers: dict[Node, K.Buffer], make: object) -> Lowered:
    """`finish` for kernels whose bodies were pulled apart (Contract)."""
    local = {s for p in pullers for s in (*p.space.extents, *p.space.data)}
    draft = make(tuple(buffers.values()), ())  # type: ignore[operator]
    found = [s for s in _free_symbols(draft) if s not in local]
    renamed = {s: sympy.Symbol(f"n{i}", integer=True, positive=True) for i, s in enumerate(found)}
    final = _renamed(make(tuple(buffers.values()), tuple(renamed.values())), renamed)  # type: ignore[operator]
    return Lowered(final, tuple(buffers), tuple(found))


def _free_symbols(value: object) -> list[sympy.Symbol]:
    """Symbols of every expression inside a description, in order of appearance, names of values excluded."""
    seen: dict[sympy.Symbol, None] = {}

    def visit(v: object) -> None:
        if isinstance(v, sympy.Expr):
            for s in sorted(v.free_symbols, key=str):
                seen.setdefault(s)
        elif isinstance(v, tuple):
            for item in v:
                visit(item)
        elif hasattr(v, "__dataclass_fields__"):
            if isinstance(v, K.Axis):
                visit(v.size)
                return
            for name in v.__dataclass_fields__:
                visit(getattr(v, name))

    visit(value)
    return list(seen)


def _renamed(value: object, names: dict[sympy.Symbol, sympy.Symbol]) -> object:
    """A description with symbols exchanged everywhere."""
    if not names:
        return value
    if isinstance(value, sympy.Expr):
        return value.xreplace(names)
    if isinstance(value, tuple):
        return tuple(_renamed(v, names) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{n: _renamed(getattr(value, n), names) for n in value.__dataclass_fields__})  # type: ignore[type-var]
    return value
