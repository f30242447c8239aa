"""Lowering of regions with reductions along trailing dimensions: one row at a time."""

from collections.abc import Set

import sympy
import torch
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
    write,
)
from llmcomp.codegen.pull import Inner, Puller, fake
from llmcomp.codegen.rules import TUPLES, is_reduction, reduced_dims, rules
from llmcomp.region import Region, Unfit


def lower_rows(region: Region, inlined: Set[Node]) -> Lowered:
    """Reductions along the trailing dimensions; outputs are whole rows or one value per row."""
    inside = members(region, inlined)
    extent = _row(region)
    full = [o for o in region.outputs if _ends_in(fake(destination(o)[1]), extent)]
    reference = fake(destination(full[0])[1]) if full else fake(destination(region.outputs[0])[1])
    rank = reference.dim() - (_trailing(reference, extent) if full else 0)
    outer, loops = loop_axes(reference.new_empty_strided(reference.shape[:rank], reference.stride()[:rank]), "r")
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
    return finish(p, lambda buffers, symbols: K.Rows(kernel_name(region), buffers, symbols, axes, row_axis, body_of(p)))


def _row(region: Region) -> sympy.Expr:
    """Number of elements along the reductions of a region."""
    for node in filter(is_reduction, region.nodes):
        source = node.args[0]
        if isinstance(source, Node) and source.target in TUPLES:
            node, source = source, source.args[0]
        assert isinstance(source, Node)
        along = reduced_dims(node)
        shape = sizes(fake(source).shape)
        if along and along != tuple(range(len(shape) - len(along), len(shape))):
            raise Unfit(f"{node.name} reduces leading dimensions")
        return sympy.expand(sympy.Mul(*(shape[d] for d in along)))
    raise Unfit("no reduction")


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
