"""Queries, keys and values of written-out attention as (batch, heads, positions, channels), without repeats.

view(expand(transpose(k, 2, 3)), [B * H, D, S])              reads as   k, of the right shape
view(expand(unsqueeze(k, 2), [B, K, G, S, D]), [B, H, ...])  reads as   k, whose heads G queries share
x * 0.125                                                    reads as   x, and the factor 0.125
"""

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from llmcomp.graph import Size, argument, insert, is_tensor, same_shape, same_size, val
from llmcomp.passes.attention_scores import COPIES
from llmcomp.passes.constants import number
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class Operand:
    """`factor` times `node`; `swapped`: the last two axes are those of the operand in the other order."""

    node: Node
    factor: float = 1.0
    swapped: bool = False


def read_operand(
    node: Node, batch: Size, heads: Size, dtype: torch.dtype, swapped: bool = False, share: bool = False
) -> Operand:
    """What an operand (batch * heads, positions, channels) of a product is made from.

    It has channels before positions where `swapped`. Casts from `dtype` are looked through, and repeated
    heads where `share`. Nodes are inserted at the graph's insertion point.
    """
    operand = Operand(node, swapped=swapped)
    while (simpler := _simpler(operand, batch, heads, dtype, share)) is not None:
        operand = simpler
    node = operand.node
    if val(node).dim() == 3:
        sizes = [size_node(node.graph, n) for n in (batch, heads, *val(node).shape[1:])]
        node = insert(node.graph, aten.view.default, node, sizes)
    while val(node).dim() < 4:
        node = insert(node.graph, aten.unsqueeze.default, node, 0)
    if operand.swapped:
        node = insert(node.graph, aten.transpose.int, node, 2, 3)
    return Operand(node, operand.factor)


def _simpler(operand: Operand, batch: Size, heads: Size, dtype: torch.dtype, share: bool) -> Operand | None:
    """One step towards what the operand is made from."""
    node = operand.node
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not is_tensor(source):
        return None
    if _copies(node, source, dtype) or _splits(node, source, batch, heads):
        return replace(operand, node=source)
    if _swaps_last(node):
        return replace(operand, node=source, swapped=not operand.swapped)
    if (factor := _factor(node)) is not None:
        return replace(operand, node=source, factor=operand.factor * factor)
    single = _single_heads(node, batch, heads) if share else None
    return None if single is None else replace(operand, node=single)


def _copies(node: Node, source: Node, dtype: torch.dtype) -> bool:
    """Whether a node has the elements of its source in the same places, at most widened from `dtype`."""
    same = same_shape(val(node).shape, val(source).shape) and val(source).dtype in (val(node).dtype, dtype)
    return same and node.target in COPIES


def _splits(node: Node, source: Node, batch: Size, heads: Size) -> bool:
    """Whether a node (batch * heads, M, N) is a view of (batch, heads, M, N)."""
    if node.target not in VIEWS or val(node).dim() != 3:
        return False
    return same_shape(val(source).shape, (batch, heads, *val(node).shape[1:]))


def _swaps_last(node: Node) -> bool:
    rank = val(node).dim()
    if node.target is aten.transpose.int:
        return {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]
    if node.target is not aten.permute.default:
        return node.target is aten.t.default and rank == 2
    order = [int(d) % rank for d in argument(node, "dims")]  # type: ignore[union-attr, arg-type]
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _factor(node: Node) -> float | None:
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return number(node.args[1])
    if node.target in (aten.div.Tensor, aten.div.Scalar) and "rounding_mode" not in node.kwargs:
        divisor = number(node.args[1])
        return 1.0 / divisor if divisor else None
    return None


def _single_heads(node: Node, batch: Size, heads: Size) -> Node | None:
    """The keys (B, K, S, D) whose heads a node (B, K * G, S, D) or (B * K * G, S, D) repeats G times each."""
    if node.target is aten.expand.default and val(node).dim() == 4:
        return _once(node, 1)
    repeated = _expanded(node.args[0]) if node.target in VIEWS else None
    if repeated is None or val(repeated).dim() != 5:
        return None
    wide, rest = val(repeated).shape, val(node).shape[-2:]
    if not same_shape((batch, heads, *rest), (wide[0], wide[1] * wide[2], *wide[3:])):
        return None
    once = _once(repeated, 2)
    return None if once is None else _without(once, 2)


def _expanded(value: object) -> Node | None:
    """The `expand` that a value is, or is a copy of."""
    while isinstance(value, Node) and value.target is aten.clone.default:
        value = value.args[0]
    return value if isinstance(value, Node) and value.target is aten.expand.default else None


def _once(expand: Node, axis: int) -> Node | None:
    """The source of an `expand` that repeats along `axis` only."""
    source = expand.args[0]
    assert isinstance(source, Node)
    narrow, wide = list(val(source).shape), list(val(expand).shape)
    if len(narrow) != len(wide) or not same_size(narrow.pop(axis), 1):
        return None
    wide.pop(axis)
    return source if same_shape(narrow, wide) else None


def _without(node: Node, axis: int) -> Node:
    """`node` without an axis of one element."""
    source = node.args[0]
    if node.target is aten.unsqueeze.default and isinstance(source, Node):
        if int(node.args[1]) % val(node).dim() == axis:  # type: ignore[arg-type]
            return source
    return insert(node.graph, aten.squeeze.dim, node, axis)
