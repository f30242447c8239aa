"""Lowering of pointwise regions: one loop nest over the index space that all outputs share."""

from collections.abc import Set
from dataclasses import replace

import sympy
from torch.fx import Node

from llmcomp.codegen import kernel as K
from llmcomp.codegen.index import Index, Space, axis_symbol, size, sizes
from llmcomp.codegen.lowered import (
    Lowered,
    body_of,
    channel_points,
    destination,
    finish,
    kernel_name,
    loop_axes,
    members,
    refuse_hazards,
    rotation,
    volume,
    write,
)
from llmcomp.codegen.pull import Puller, fake
from llmcomp.codegen.rules import rules
from llmcomp.region import Region, Unfit


def lower_map(region: Region, inlined: Set[Node]) -> Lowered:
    """Pointwise over the index space of the outputs, which all have the same number of elements in the same
    order."""
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
