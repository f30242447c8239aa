"""Which axis of a result each axis of an operand becomes, for operators that keep positions apart.

    transpose(x, 1, 2)      x: 1 -> 2, 2 -> 1
    linear(x, w)            x: 0 -> 0, 1 -> 1      the last axis is mixed, so it has no entry; w has none at all
    sum(x, 1)               x: 0 -> 0, 2 -> 1

An operator restricted to some indices of an axis of the result needs only those of the operand's axis.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

import llmcomp.ops  # noqa: F401  (defines torch.ops.llmcomp)
from llmcomp.graph import argument, is_tensor, known, same_size, source, tensors, val
from llmcomp.passes.relations import is_pointwise
from llmcomp.quantized_cache import cache_tensor

aten, ops = torch.ops.aten, torch.ops.llmcomp


@dataclass(frozen=True)
class Use:
    """An operand, with the axis of the result that each of its axes becomes."""

    operand: Node
    axes: Mapping[int, int]


Uses = Callable[[Node], tuple[Use, ...]]


def broadcast(node: Node) -> tuple[Use, ...]:
    """Of a pointwise operator: axes are matched from the last one, those of one element are repeated."""
    return tuple(Use(n, _aligned(val(n), val(node).dim())) for n in node.all_input_nodes if is_tensor(n))


def _aligned(x: Tensor, rank: int, closed: Iterable[int] = ()) -> dict[int, int]:
    first = rank - x.dim()
    return {d: d + first for d in range(x.dim()) if not same_size(x.shape[d], 1) and d not in closed}


def _without(name: str) -> Uses:
    """The first operand keeps all axes but the one (or those) that the argument `name` lists."""

    def uses(node: Node) -> tuple[Use, ...]:
        x = source(node)
        return (Use(x, {d: d for d in range(val(x).dim()) if d not in dims(node, name)}),)

    return uses


def dims(node: Node, name: str) -> frozenset[int]:
    """The axes of the first operand that an argument names: one, several, or (None or none) all."""
    rank = val(source(node)).dim()
    given = argument(node, name)
    if given is None or (isinstance(given, list | tuple) and not given):
        return frozenset(range(rank))
    return frozenset(int(d) % max(rank, 1) for d in (given if isinstance(given, list | tuple) else [given]))  # type: ignore[arg-type]


def result_axis(node: Node) -> int:
    """The axis of the result that the argument `dim` names."""
    return int(argument(node, "dim")) % val(node).dim()  # type: ignore[arg-type]


def _reduced(name: str = "dim") -> Uses:
    """A reduction over the axes that the argument `name` lists."""

    def uses(node: Node) -> tuple[Use, ...]:
        x, gone = source(node), dims(node, name)
        kept = [d for d in range(val(x).dim()) if d not in gone]
        stay = bool(argument(node, "keepdim"))
        return (Use(x, {d: d if stay else i for i, d in enumerate(kept)}),)

    return uses


def _but_last(node: Node) -> tuple[Use, ...]:
    """Norms and linear layers: the first operand keeps all axes but the last; weights have none to keep."""
    x = source(node)
    return (Use(x, {d: d for d in range(val(x).dim() - 1)}),)


def _dequantize(node: Node) -> tuple[Use, ...]:
    """Rows of a quantized table: every part keeps the axes of the rows."""
    parts = [p for p in node.args[:3] if isinstance(p, Node)]
    return tuple(Use(p, {d: d for d in range(val(node).dim() - 1)}) for p in parts)


def _rope(node: Node) -> tuple[Use, ...]:
    rank = val(node).dim()
    operands = (source(node, i) for i in range(3))
    return tuple(Use(x, _aligned(val(x), rank, closed=(val(x).dim() - 1,))) for x in operands)


def _item(node: Node) -> tuple[Use, ...]:
    return (Use(source(node), {d: d for d in range(val(node).dim())}),)


def _transpose(node: Node) -> tuple[Use, ...]:
    x, rank = source(node), val(node).dim()
    a, b = (int(known(argument(node, n))) % rank for n in ("dim0", "dim1"))  # type: ignore[call-overload]
    return (Use(x, {**{d: d for d in range(rank)}, a: b, b: a}),)


def _turned(node: Node) -> tuple[Use, ...]:
    return (Use(source(node), {0: val(node).dim() - 1, val(node).dim() - 1: 0}),)


def _permute(node: Node) -> tuple[Use, ...]:
    order = argument(node, "dims")
    assert isinstance(order, list | tuple)
    rank = len(order)
    return (Use(source(node), {int(d) % rank: i for i, d in enumerate(order)}),)


def _slice(node: Node) -> tuple[Use, ...]:
    """Axes of which nothing is cut off, and of others what is left."""
    return (Use(source(node), {d: d for d in range(val(node).dim())}),)


def _select(node: Node) -> tuple[Use, ...]:
    x = source(node)
    (gone,) = dims(node, "dim")
    return (Use(x, {d: d - (d > gone) for d in range(val(x).dim()) if d != gone}),)


def _unsqueeze(node: Node) -> tuple[Use, ...]:
    new = result_axis(node)
    return (Use(source(node), {d: d + (d >= new) for d in range(val(node).dim() - 1)}),)


def _squeeze(node: Node) -> tuple[Use, ...]:
    x = val(source(node))
    name = "dims" if node.target is aten.squeeze.dims else "dim"
    asked = range(x.dim()) if node.target is aten.squeeze.default else dims(node, name)
    kept = [d for d in range(x.dim()) if d not in asked or not same_size(x.shape[d], 1)]
    return (Use(source(node), {d: i for i, d in enumerate(kept)}),)


def _expand(node: Node) -> tuple[Use, ...]:
    return (Use(source(node), _aligned(val(source(node)), val(node).dim())),)


def _repeat(node: Node) -> tuple[Use, ...]:
    x, times = val(source(node)), argument(node, "repeats")
    assert isinstance(times, list | tuple)
    new = len(times) - x.dim()
    return (Use(source(node), {d: d + new for d in range(x.dim()) if times[d + new] == 1}),)


def _cat(node: Node) -> tuple[Use, ...]:
    """Axes other than the one along which parts are put together."""
    joint = result_axis(node)
    return tuple(Use(x, {d: d for d in range(val(node).dim()) if d != joint}) for x in tensors(node))


def _stack(node: Node) -> tuple[Use, ...]:
    new = result_axis(node)
    return tuple(Use(x, {d: d + (d >= new) for d in range(val(node).dim() - 1)}) for x in tensors(node))


def _embedding(node: Node) -> tuple[Use, ...]:
    rows = source(node, 1)
    return (Use(rows, {d: d for d in range(val(rows).dim())}),)


def _gather(node: Node) -> tuple[Use, ...]:
    """Indices keep all axes, what they pick from those along which nothing is picked."""
    (closed,) = dims(node, "dim")
    every = {d: d for d in range(val(node).dim())}
    return Use(source(node, 2), every), Use(source(node), {d: d for d in every if d != closed})


def _scatter(node: Node) -> tuple[Use, ...]:
    """All operands keep the axes along which nothing is placed."""
    (closed,) = dims(node, "dim")
    kept = {d: d for d in range(val(node).dim()) if d != closed}
    return tuple(Use(n, kept) for n in node.all_input_nodes if is_tensor(n))


def _select_scatter(node: Node) -> tuple[Use, ...]:
    """Axes other than the one along which something is placed, which the placed tensor does not have."""
    (closed,) = dims(node, "dim")
    kept = {d: d for d in range(val(node).dim()) if d != closed}
    return Use(source(node), kept), Use(source(node, 1), {d - (d > closed): d for d in kept})


def _pad(node: Node) -> tuple[Use, ...]:
    """Axes without padding."""
    amounts, rank = argument(node, "pad"), val(node).dim()
    assert isinstance(amounts, list | tuple)
    padded = {rank - 1 - i // 2 for i, n in enumerate(amounts) if n != 0}
    return (Use(source(node), {d: d for d in range(rank) if d not in padded}),)


def _product(batch: int) -> Uses:
    """Matrix products with `batch` axes in front: rows of the first operand, columns of the second."""

    def uses(node: Node) -> tuple[Use, ...]:
        both = {d: d for d in range(batch)}
        return (
            Use(source(node, 0), {**both, batch: batch}),
            Use(source(node, 1), {**both, batch + 1: batch + 1}),
        )

    return uses


def axis_map(node: Node) -> tuple[Use, ...]:
    """The operands of a call of one of MAPS, or of what torch tags as pointwise."""
    if (uses := MAPS.get(node.target)) is not None:
        return uses(node)
    assert is_pointwise(node), f"no map of {node.target}"
    return broadcast(node)


MAPS: Mapping[object, Uses] = {
    **dict.fromkeys(
        (ops.linear.default, ops.packed_linear.default, ops.rms_norm.default, ops.layer_norm.default), _but_last
    ),
    ops.dequantize.default: _dequantize,
    ops.rope.default: _rope,
    ops.gated.default: broadcast,
    ops.cache_scale.default: _but_last,
    **dict.fromkeys((ops.cache_quantize.default, ops.cache_dequantize.default, cache_tensor), broadcast),
    **dict.fromkeys(
        (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.zeros_like.default,
         aten.ones_like.default, aten.full_like.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
         aten.lift_fresh_copy.default, aten.contiguous.default, aten.where.self, aten.where.ScalarOther,
         aten.where.ScalarSelf, aten.where.Scalar, aten.tril.default, aten.triu.default,
         aten.empty_like.default, aten.floor_divide.default, aten.remainder.Scalar),
        broadcast,
    ),
    operator.getitem: _item,
    aten.transpose.int: _transpose,
    aten.t.default: _turned,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _without("dim")),
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default, aten.softmax.int), _without("dim")),
    **dict.fromkeys((aten.topk.default, aten.sort.default, aten.sort.stable), _without("dim")),
    **dict.fromkeys((aten.cumsum.default, aten.cumprod.default), _without("dim")),
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
         aten.any.dim, aten.all.dim, aten.any.dims, aten.all.dims, aten.argmax.default, aten.argmin.default,
         aten.prod.dim_int, aten.logsumexp.default, aten.linalg_vector_norm.default, aten.var_mean.correction,
         aten.var.correction, aten.std.correction),
        _reduced(),
    ),
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.slice_scatter.default), _scatter),
    aten.select_scatter.default: _select_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.mm.default: _product(0),
    aten.bmm.default: _product(1),
}  # fmt: skip
"""By operator."""
