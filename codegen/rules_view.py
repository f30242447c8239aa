"""Pull rules of operators that move elements: views, concatenation, padding, creation, gathers."""

from collections.abc import Mapping, Sequence

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen.index import ZERO, Index, size, sizes
from llmcomp.codegen.kernel import Argument
from llmcomp.codegen.pull import Puller, Rule, broadcast, compute_dtype, fake
from llmcomp.graph import is_contiguous, is_view
from llmcomp.region import Unfit

aten = torch.ops.aten


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _extent(value: object) -> sympy.Expr:
    """A size or position given as an int, a SymInt or a node that computes one."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, int | torch.SymInt):
        return size(value)
    raise Unfit(f"size {value!r}")


def identity(p: Puller, node: Node, index: Index) -> Argument:
    """clone, alias, detach, contiguous."""
    return p.at(_source(node), index)


def reshape(p: Puller, node: Node, index: Index) -> Argument:
    """view, _unsafe_view, squeeze, unsqueeze: the same elements in row-major order."""
    source = _source(node)
    if p.in_memory(source) and is_contiguous(fake(source)):
        return p.load_at(source, p.space.flatten(index, sizes(fake(node).shape)))  # no detour by an index of its own
    return p.at(source, p.space.reshape(index, fake(node).shape, fake(source).shape))


def permute(p: Puller, node: Node, index: Index) -> Argument:
    order = [d % len(index) for d in node.args[1]]  # type: ignore[union-attr, operator]
    moved = {d: i for d, i in zip(order, index, strict=True)}
    return p.at(_source(node), tuple(moved[d] for d in range(len(index))))


def transpose(p: Puller, node: Node, index: Index) -> Argument:
    a, b = (int(d) % len(index) for d in node.args[1:3])  # type: ignore[arg-type]
    moved = list(index)
    moved[a], moved[b] = moved[b], moved[a]
    return p.at(_source(node), tuple(moved))


def matrix_transpose(p: Puller, node: Node, index: Index) -> Argument:
    return p.at(_source(node), tuple(reversed(index)))


def expand(p: Puller, node: Node, index: Index) -> Argument:
    source = _source(node)
    return p.at(source, broadcast(index, fake(source)))


def select(p: Puller, node: Node, index: Index) -> Argument:
    source = _source(node)
    shape = fake(source).shape
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    position = _from_start(_extent(node.args[2]), size(shape[dim]))
    return p.at(source, (*index[:dim], position, *index[dim:]))


def _from_start(position: sympy.Expr, extent: sympy.Expr) -> sympy.Expr:
    """A position that may count from the end."""
    if position.is_nonnegative:
        return position
    if position.is_negative:
        return position + extent
    raise Unfit(f"position {position} of unknown sign")


def slice_(p: Puller, node: Node, index: Index) -> Argument:
    source = _source(node)
    dim, start, _, step = slice_arguments(node)
    position = index[dim] * step + start
    return p.at(source, (*index[:dim], sympy.expand(position), *index[dim + 1 :]))


def slice_arguments(node: Node) -> tuple[int, sympy.Expr, sympy.Expr, int]:
    """(dim, start, extent of the result, step) of aten.slice.Tensor, start clamped as eager clamps it."""
    args = dict(zip(("dim", "start", "end", "step"), (*node.args[1:], *[None] * 4), strict=False))
    args.update(node.kwargs)
    source = fake(_source(node))
    dim = int(args["dim"] or 0) % source.dim()  # type: ignore[arg-type]
    extent = size(source.shape[dim])
    step = int(args["step"] or 1)  # type: ignore[arg-type]
    start = ZERO if args["start"] is None else _extent(args["start"])
    if start.is_negative:
        start = start + extent
        if not start.is_nonnegative:
            start = ZERO if start.is_negative else _clamped(node, dim, start, extent)
    elif not start.is_nonnegative:
        raise Unfit(f"slice start {start} of unknown sign")
    elif start.is_Integer and extent.is_Integer and start > extent:
        start = extent
    return dim, start, size(fake(node).shape[dim]), step


def _clamped(node: Node, dim: int, start: sympy.Expr, extent: sympy.Expr) -> sympy.Expr:
    """max(start, 0): decided by the traced shape where that tells (x[-n:] of fewer than n elements is all of
    x)."""
    result = size(fake(node).shape[dim])
    if result == extent:
        return ZERO
    if sympy.expand(extent - start - result) == 0:
        return start
    return sympy.Max(ZERO, start)


def unfold(p: Puller, node: Node, index: Index) -> Argument:
    """Windows along a dimension; the position within one is the last dimension."""
    if not fake(_source(node)).dim():
        return p.at(_source(node), ())
    dim, step = int(node.args[1]) % fake(_source(node)).dim(), int(node.args[3])  # type: ignore[arg-type]
    *at, within = index
    return p.at(_source(node), (*at[:dim], step * at[dim] + within, *at[dim + 1 :]))


def split_item(p: Puller, node: Node, index: Index) -> Argument:
    """getitem of split, chunk and unbind."""
    producer, which = _source(node), int(node.args[1])  # type: ignore[arg-type]
    source = _source(producer)
    rank = fake(source).dim()
    if producer.target is aten.unbind.int:
        dim = int(producer.args[1] if len(producer.args) > 1 else 0) % rank  # type: ignore[arg-type]
        return p.at(source, (*index[:dim], sympy.Integer(which), *index[dim:]))
    dim = int(producer.args[2] if len(producer.args) > 2 else producer.kwargs.get("dim", 0)) % rank  # type: ignore[arg-type]
    parts: Sequence[torch.Tensor] = producer.meta["val"]
    start = sympy.Add(*(size(part.shape[dim]) for part in parts[:which]))
    return p.at(source, (*index[:dim], index[dim] + start, *index[dim + 1 :]))


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default)


def cat(p: Puller, node: Node, index: Index) -> Argument:
    """One input where the range of the index tells which, else a chain of selections over masked loads."""
    rank = len(index)
    inputs = [n for n in node.args[0] if fake(n).dim() == rank]  # type: ignore[union-attr, arg-type]
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[arg-type]
    at, start = index[dim], ZERO
    pieces: list[tuple[Node, sympy.Expr, sympy.Expr]] = []
    for n in inputs:
        end = start + size(fake(n).shape[dim])  # type: ignore[arg-type]
        if p.space.at_least(at, start) and p.space.below(at, end):
            return _piece(p, node, n, index, dim, start)  # type: ignore[arg-type]
        if not (p.space.at_least(at, end) or p.space.below(at, start)):
            pieces.append((n, start, end))  # type: ignore[arg-type]
        start = end
    result: Argument | None = None
    for n, start, end in reversed(pieces):
        inside = _between(p, at, start, end, first=start == ZERO, last=result is None)
        value = _masked(p, inside, lambda n=n, start=start: _piece(p, node, n, index, dim, start))
        result = value if result is None else _choose(p, inside, value, result, fake(node).dtype)
    assert result is not None
    return result


def _piece(p: Puller, node: Node, source: Node, index: Index, dim: int, start: sympy.Expr) -> Argument:
    moved = (*index[:dim], sympy.expand(index[dim] - start), *index[dim + 1 :])
    return p.convert(p.at(source, moved), compute_dtype(fake(node).dtype))


def _between(p: Puller, at: sympy.Expr, start: sympy.Expr, end: sympy.Expr, first: bool, last: bool) -> str:
    """The bool start <= at < end; one side is enough at the ends of the chain."""
    position = p.named(p.integer(at), torch.int64)
    low = None if first else p.test("ge", position, p.integer(start))
    high = None if last else p.test("lt", position, p.integer(end))
    if low is None or high is None:
        return p.named(low if low is not None else high if high is not None else True, torch.bool)
    return p.named(p.test("logical_and", low, high), torch.bool)


def _masked(p: Puller, mask: str, value: object) -> Argument:
    """Evaluate with loads limited to where `mask` holds."""
    saved = p.mask
    p.mask = mask if saved is None else p.named(p.test("logical_and", saved, mask), torch.bool)
    try:
        return value()  # type: ignore[operator, no-any-return]
    finally:
        p.mask = saved


def _choose(p: Puller, condition: str, yes: Argument, no: Argument, dtype: torch.dtype) -> Argument:
    saved, p.dtype = p.dtype, compute_dtype(dtype)
    try:
        return p.op("where", condition, p.convert(yes, p.dtype), p.convert(no, p.dtype))
    finally:
        p.dtype = saved


def pad(p: Puller, node: Node, index: Index) -> Argument:
    """constant_pad_nd: masked loads inside, the constant outside."""
    source, amounts = _source(node), list(node.args[1])  # type: ignore[arg-type]
    value = node.args[2] if len(node.args) > 2 else 0
    moved, tests = list(index), []
    for n in range(len(amounts) // 2):
        dim, before = len(index) - 1 - n, _extent(amounts[2 * n])
        extent = size(fake(source).shape[dim])
        moved[dim] = index[dim] - before
        if not p.space.at_least(moved[dim], ZERO):
            tests.append(p.test("ge", p.named(p.integer(moved[dim]), torch.int64), 0))
        if not p.space.below(moved[dim], extent):
            tests.append(p.test("lt", p.named(p.integer(moved[dim]), torch.int64), p.integer(extent)))
    if not tests:
        return p.at(source, tuple(moved))
    inside = tests[0]
    for t in tests[1:]:
        inside = p.test("logical_and", inside, t)
    name = p.named(inside, torch.bool)
    result = _masked(p, name, lambda: p.at(source, tuple(moved)))
    return _choose(p, name, result, value, fake(node).dtype)  # type: ignore[arg-type]


def arange(p: Puller, node: Node, index: Index) -> Argument:
    """arange over integers: start + step * i."""
    bounds = list(node.args)
    dtype = fake(node).dtype
    if dtype.is_floating_point:
        raise Unfit("arange of floats")
    start = _extent(bounds[0]) if len(bounds) > 1 else ZERO
    step = _extent(bounds[2]) if len(bounds) > 2 else sympy.Integer(1)
    return p.convert(p.integer(sympy.expand(start + step * index[0])), dtype)


def full(p: Puller, node: Node, index: Index) -> Argument:
    """full, full_like, new_full, scalar_tensor: one value everywhere."""
    position = 0 if node.target is aten.scalar_tensor.default else 1 if node.target is not aten.new_full.default else 2
    value = node.args[position]
    if isinstance(value, Node):
        value = p.integer(_extent(value))
    if not isinstance(value, bool | int | float | str):
        raise Unfit(f"fill value {value!r}")
    return p.convert(value, compute_dtype(fake(node).dtype))


def constant(value: float) -> Rule:
    """zeros, ones and their relatives."""
    return lambda p, node, index: p.convert(value, compute_dtype(fake(node).dtype))


def to_dtype(p: Puller, node: Node, index: Index) -> Argument:
    """_to_copy: a change of dtype rounds."""
    source = _source(node)
    if fake(source).device != fake(node).device:
        raise Unfit("copy between devices")
    if fake(node).dtype == torch.float8_e4m3fn != fake(source).dtype and _is_read(p, node):
        raise Unfit("a value that is rounded to float8 is read by its own kernel")
    return p.rounded(p.at(source, index), fake(node).dtype)


def _is_read(p: Puller, node: Node) -> bool:
    """Whether a kernel computes with a value of its own, and does not only store it."""
    stores = (aten.copy_.default, torch.ops.llmcomp.cache_write_.default)
    for user in node.users:
        stored = user.target in stores and user.args[1] is node
        if not stored and p.inside(user) and (not is_view(user) or _is_read(p, user)):
            return True
    return False


def embedding(p: Puller, node: Node, index: Index) -> Argument:
    weight, ids = node.args[0], node.args[1]
    assert isinstance(weight, Node) and isinstance(ids, Node)
    row = p.checked(p.at(ids, index[:-1], "ids"), size(fake(weight).shape[0]), wrap=False)
    return p.at(weight, (row, index[-1]), "weight")


def index_select(p: Puller, node: Node, index: Index) -> Argument:
    source, dim, picks = node.args
    assert isinstance(source, Node) and isinstance(picks, Node)
    if not index or not fake(source).dim():
        raise Unfit("index_select of a scalar")
    d = int(dim) % len(index)  # type: ignore[arg-type]
    row = p.checked(
        p.at(picks, (index[d],) if fake(picks).dim() else (), "index"),
        size(fake(source).shape[d]),
        wrap=False,
    )
    return p.at(source, (*index[:d], row, *index[d + 1 :]))


def gather(p: Puller, node: Node, index: Index) -> Argument:
    source, dim, picks = node.args[:3]
    assert isinstance(source, Node) and isinstance(picks, Node)
    if fake(source).dim() != fake(picks).dim() or not index:
        raise Unfit("gather of a scalar")
    d = int(dim) % len(index)  # type: ignore[arg-type]
    row = p.checked(p.at(picks, index, "index"), size(fake(source).shape[d]), wrap=False)
    return p.at(source, (*index[:d], row, *index[d + 1 :]))


def advanced_index(p: Puller, node: Node, index: Index) -> Argument:
    """aten.index.Tensor with integer tensors: their broadcast shape replaces the indexed dimensions."""
    source, picks = node.args
    assert isinstance(source, Node) and isinstance(picks, list | tuple)
    given = {d: n for d, n in enumerate(picks) if isinstance(n, Node)}
    if any(fake(n).dtype not in (torch.int64, torch.int32) for n in given.values()):
        raise Unfit("index by a mask")
    rank = max(fake(n).dim() for n in given.values())
    adjacent = max(given) - min(given) + 1 == len(given)
    start = min(given) if adjacent else 0
    inner = index[start : start + rank]
    rest = iter((*index[:start], *index[start + rank :]))
    shape = fake(source).shape
    full_index = []
    for d in range(len(shape)):
        if d in given:
            value = p.at(given[d], broadcast(inner, fake(given[d])), "index")
            full_index.append(p.checked(value, size(shape[d]), wrap=True))
        else:
            full_index.append(next(rest))
    return p.at(source, tuple(full_index))


def triangle(keep: str) -> Rule:
    """tril (keep "le") and triu (keep "ge"): compare column - row with the diagonal."""

    def rule(p: Puller, node: Node, index: Index) -> Argument:
        diagonal = _extent(node.args[1] if len(node.args) > 1 else 0)
        offset = p.named(p.integer(index[-1] - index[-2]), torch.int64)
        kept = p.named(p.test(keep, offset, p.integer(diagonal)), torch.bool)
        return _choose(p, kept, p.at(_source(node), index), 0, fake(node).dtype)

    return rule


def flip(p: Puller, node: Node, index: Index) -> Argument:
    source = _source(node)
    shape = sizes(fake(source).shape)
    flipped = {int(d) % len(shape) for d in node.args[1]}  # type: ignore[union-attr, arg-type]
    return p.at(
        source,
        tuple(n - 1 - i if d in flipped else i for d, (i, n) in enumerate(zip(index, shape, strict=True))),
    )


def slice_scatter(p: Puller, node: Node, index: Index) -> Argument:
    """The source inside of [start, end) along one dimension, what was there before outside."""
    before, update = node.args[:2]
    assert isinstance(before, Node) and isinstance(update, Node)
    args = dict(zip(("dim", "start", "end", "step"), (*node.args[2:], *[None] * 4), strict=False)) | dict(node.kwargs)
    if args["step"] not in (None, 1):
        raise Unfit("slice_scatter with a step")
    dim = int(args["dim"] or 0) % len(index)  # type: ignore[arg-type]
    start = ZERO if args["start"] is None else _from_start(_extent(args["start"]), size(fake(before).shape[dim]))
    moved = (*index[:dim], sympy.expand(index[dim] - start), *index[dim + 1 :])
    return _updated(p, node, index, dim, start, size(fake(update).shape[dim]), update, moved)


def select_scatter(p: Puller, node: Node, index: Index) -> Argument:
    """The source at one position along a dimension, what was there before elsewhere."""
    before, update = node.args[:2]
    assert isinstance(before, Node) and isinstance(update, Node)
    dim = int(node.args[2]) % len(index)  # type: ignore[arg-type]
    start = _from_start(_extent(node.args[3]), size(fake(before).shape[dim]))
    return _updated(p, node, index, dim, start, sympy.Integer(1), update, (*index[:dim], *index[dim + 1 :]))


def _updated(
    p: Puller, node: Node, index: Index, dim: int, start: sympy.Expr, count: sympy.Expr, update: Node, moved: Index
) -> Argument:
    """`update` at `moved` where start <= index[dim] < start + count, else the first input of `node`."""
    at, end = index[dim], start + count
    first, last = p.space.at_least(at, start), p.space.below(at, end)
    if first and last:
        return p.at(update, moved)
    if p.space.below(at, start) or p.space.at_least(at, end):
        return p.at(_source(node), index)
    inside = _between(p, at, start, end, first, last)
    return _choose(
        p, inside, _masked(p, inside, lambda: p.at(update, moved)), p.at(_source(node), index), fake(node).dtype
    )


def repeat(p: Puller, node: Node, index: Index) -> Argument:
    source = _source(node)
    shape = fake(source).shape
    tail = index[len(index) - len(shape) :]
    return p.at(source, tuple(p.space.split(i, size(n))[1] for i, n in zip(tail, shape, strict=True)))


def getitem(p: Puller, node: Node, index: Index) -> Argument:
    """An item of an operator with several results."""
    producer = _source(node)
    if producer.target in SPLITS:
        return split_item(p, node, index)
    raise Unfit(f"getitem of {producer.target}")


def view_rules() -> Mapping[object, Rule]:
    """Rules by operator."""
    import operator

    rules: dict[object, Rule] = {operator.getitem: getitem}
    for target in (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
                   aten.contiguous.default, aten.lift_fresh.default):  # fmt: skip
        rules[target] = identity
    for target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
                   aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):  # fmt: skip
        rules[target] = reshape
    for target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        rules[target] = constant(0)
    for target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        rules[target] = constant(1)
    for target in (
        aten.full.default,
        aten.full_like.default,
        aten.new_full.default,
        aten.scalar_tensor.default,
    ):
        rules[target] = full
    for target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        rules[target] = arange
    rules |= {
        aten.permute.default: permute,
        aten.transpose.int: transpose,
        aten.t.default: matrix_transpose,
        aten.expand.default: expand,
        aten.select.int: select,
        aten.slice.Tensor: slice_,
        aten.unfold.default: unfold,
        aten.cat.default: cat,
        aten.constant_pad_nd.default: pad,
        aten._to_copy.default: to_dtype,
        aten.embedding.default: embedding,
        aten.index_select.default: index_select,
        aten.gather.default: gather,
        aten.index.Tensor: advanced_index,
        aten.tril.default: triangle("le"),
        aten.triu.default: triangle("ge"),
        aten.flip.default: flip,
        aten.repeat.default: repeat,
        aten.slice_scatter.default: slice_scatter,
        aten.select_scatter.default: select_scatter,
    }
    return rules
