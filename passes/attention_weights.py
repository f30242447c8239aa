"""Attention weights, read from the softmax down to the product with the values.

    bmm(view(softmax(cat([scores, sinks]) - max)[..., :-1]), v)     reads as   scores, sinks, and the product
    bmm(masked_fill(softmax(scores), hidden, 0), v)                 reads as   scores, and what is zeroed

Nothing but that product may read the weights, for they will not be computed.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from llmcomp.graph import Size, argument, same_shape, same_size, val
from llmcomp.passes.attention_scores import COPIES
from llmcomp.passes.constants import number
from llmcomp.passes.match import is_last_axis, operands

aten = torch.ops.aten
PRODUCTS = (aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Weights:
    """A softmax of `logits` (and of `sinks`, one more for each head), whose result only `product` reads.

    `path` is what else computes it. `zeroed` are conditions, and whether they are negated, under which
    weights stay: others are set to zero.
    """

    softmax: Node
    logits: Node
    sinks: Node | None
    product: Node
    path: tuple[Node, ...]
    zeroed: frozenset[tuple[Node, bool]]


def read_weights(softmax: Node) -> Weights | str | None:
    """The weights of attention, the reason why they are not, or None where nothing looks like attention."""
    if not is_last_axis(argument(softmax, "dim"), softmax):
        return None
    logits, sinks, joining = _logits(softmax)
    path, node = [*joining, softmax], softmax
    zeroed: set[tuple[Node, bool]] = set()
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in PRODUCTS and user.args[0] is node:
            return Weights(softmax, logits, sinks, user, tuple(path), frozenset(zeroed))
        if (kept := _kept(user, node)) is not None:
            zeroed.add(kept)
        elif not (_keeps_weights(user, node) or sinks is not None and _drops_last(user, node)):
            return f"{user.name} is between the softmax and the values" if _multiplies(user) else None
        path.append(user)
        node = user
    return "the attention weights are used elsewhere" if _multiplies(node) else None


def _multiplies(node: Node) -> bool:
    """Whether a product reads a node, or a copy of it, as its first factor."""
    return any(
        user.args[0] is node and (user.target in PRODUCTS or user.target in COPIES and _multiplies(user))
        for user in node.users
        if user.args
    )


def _keeps_weights(user: Node, node: Node) -> bool:
    """Whether a node copies the weights, merges axes before the last two, or makes zeros of NaN.

    A row that sees no key is NaN in eager before, and zeros in llmcomp::attention.
    """
    if user.target is aten.nan_to_num.default:
        return not argument(user, "nan")
    return user.target in COPIES and same_shape(val(user).shape[-2:], val(node).shape[-2:])


def _kept(user: Node, node: Node) -> tuple[Node, bool] | None:
    """The condition under which a node keeps weights that it else sets to zero, and whether it is negated."""
    if user.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and user.args[0] is node:
        condition, fill, negate = user.args[1], user.args[2], True
    elif user.target in (aten.where.self, aten.where.ScalarOther) and user.args[1] is node:
        condition, fill, negate = user.args[0], user.args[2], False
    elif user.target in (aten.where.self, aten.where.ScalarSelf) and user.args[2] is node:
        condition, fill, negate = user.args[0], user.args[1], True
    else:
        return None
    return (condition, negate) if isinstance(condition, Node) and number(fill) == 0 else None


def _drops_last(user: Node, node: Node) -> bool:
    """weights[..., :-1]"""
    if user.target is not aten.slice.Tensor:
        return False
    shape, last = val(node).shape, len(val(node).shape) - 1
    shorter = same_size(val(user).shape[last], shape[last] - 1)
    return shorter and is_last_axis(argument(user, "dim"), node) and not argument(user, "start")


def _logits(softmax: Node) -> tuple[Node, Node | None, tuple[Node, ...]]:
    """(scores, sinks, nodes that join the two): what a softmax is taken of."""
    top = softmax.args[0]
    assert isinstance(top, Node)
    whole, joining = _unshifted(top)
    parts = whole.args[0] if whole.target is aten.cat.default else None
    if isinstance(parts, list | tuple) and len(parts) == 2 and val(whole).dim() == 4:
        scores, last = parts
        assert isinstance(scores, Node) and isinstance(last, Node)
        if (sinks := _per_head(last, val(whole).shape[1])) is not None:
            return scores, sinks, (whole, *joining)
    return whole, None, joining


def _unshifted(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """x for x - max(x), which a softmax cannot tell from x, and the nodes of the difference."""
    pair = operands(node, aten.sub.Tensor)
    if pair is None:
        return node, ()
    source, largest = pair
    reduction = largest.args[0] if largest.target is operator.getitem and largest.args[1] == 0 else largest
    assert isinstance(reduction, Node)
    if reduction.target not in (aten.amax.default, aten.max.dim) or reduction.args[0] is not source:
        return node, ()
    if not is_last_axis(argument(reduction, "dim"), source) or not argument(reduction, "keepdim"):
        return node, ()
    return source, (node, largest, reduction)


def _per_head(node: Node, heads: Size) -> Node | None:
    """The vector (heads,) that a node (B, heads, S, 1) repeats."""
    if not same_size(val(node).shape[3], 1):
        return None
    while node.target in COPIES and val(node).dim() == 4:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node if same_shape(val(node).shape, (heads,)) else None
