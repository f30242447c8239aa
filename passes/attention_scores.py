"""Written-out attention scores, read from the softmax up to the product of queries and keys.

    softmax(tanh(view(bmm(q, k)) / 50) * 50 + mask)   reads as   q, k, scale 1/50, cap 50, changes (mask,)

What the scores are multiplied and changed by is kept in order; see `Scores`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from llmcomp.graph import Size, argument, insert, is_tensor, same_shape, same_size, val
from llmcomp.passes.constants import number
from llmcomp.passes.mask_parts import WHERE, Added, Change, Hidden
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten


@dataclass(frozen=True)
class Scores:
    """scale * (q @ k), then cap * tanh(.) where `cap` is given, then `changes` in order.

    q (..., Sq, D) and k (..., D, Skv) are the operands of the product `product`, which may have merged
    batch and heads.
    """

    product: Node
    q: Node
    k: Node
    scale: float = 1.0
    cap: float | None = None
    changes: tuple[Change, ...] = ()
    path: tuple[Node, ...] = ()

    def times(self, factor: float) -> "Scores":
        """These scores, multiplied."""
        changed = tuple(_times(c, factor) for c in self.changes)
        if self.cap is not None:
            return replace(self, cap=self.cap * factor, changes=changed)
        return replace(self, scale=self.scale * factor, changes=changed)

    def changed(self, change: Change) -> "Scores":
        """These scores after one more change."""
        return replace(self, changes=(*self.changes, change))


def _times(change: Change, factor: float) -> Change:
    if isinstance(change, Added):
        return replace(change, factor=change.factor * factor)
    return replace(change, by=change.by * factor)


def same_values(node: Node) -> Node:
    """The end of a chain of copies, casts between floats, and views that change nothing."""
    while node.target in COPIES and is_tensor(node.args[0]):
        source = node.args[0]
        assert isinstance(source, Node)
        if not same_shape(val(source).shape, val(node).shape) or not val(source).dtype.is_floating_point:
            break
        node = source
    return node


COPIES = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten._to_copy.default,
        aten.expand.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
    }
)


def read_scores(node: Node) -> Scores | None:
    """The scores that `node` computes, or None where they are not a changed product of queries and keys.

    May insert views of masks at the graph's insertion point.
    """
    rule = RULES.get(node.target)
    scores = rule(node) if rule is not None else None
    return None if scores is None else replace(scores, path=(*scores.path, node))


def _from(node: Node, value: object) -> Scores | None:
    """The scores that an operand is, if it has the shape of the result."""
    if isinstance(value, Node) and is_tensor(value) and same_shape(val(value).shape, val(node).shape):
        return read_scores(value)
    return None


def _product(node: Node) -> Scores | None:
    q, k = node.args[:2]
    assert isinstance(q, Node) and isinstance(k, Node)
    return Scores(node, q, k)


def _product_added(node: Node) -> Scores | None:
    """baddbmm(bias, q, k): beta * bias + alpha * q @ k, as BLOOM adds its alibi."""
    bias, q, k = node.args[:3]
    alpha, beta = number(argument(node, "alpha")), number(argument(node, "beta"))
    assert isinstance(bias, Node) and isinstance(q, Node) and isinstance(k, Node)
    if alpha is None or beta is None:
        return None
    scores = Scores(node, q, k, alpha)
    return scores.changed(Added(bias, beta)) if beta else scores


def _copy(node: Node) -> Scores | None:
    source = node.args[0]
    return _from(node, source) if val(node).dtype.is_floating_point else None


def _view(node: Node) -> Scores | None:
    """A view that splits the first axis (batch and heads) or changes nothing."""
    source = node.args[0]
    assert isinstance(source, Node)
    if same_shape(val(source).shape, val(node).shape):
        return read_scores(source)
    outer, inner = val(node).shape, val(source).shape
    if len(outer) != len(inner) + 1 or not same_shape(outer[2:], inner[1:]):
        return None
    scores = read_scores(source)
    if scores is None:
        return None
    return replace(scores, changes=tuple(split_change(c, outer[0], outer[1]) for c in scores.changes))


def split_change(change: Change, batch: Size, heads: Size) -> Change:
    """A change of scores (batch * heads, Sq, Skv), for scores (batch, heads, Sq, Skv)."""
    if isinstance(change, Added):
        return replace(change, node=_split(change.node, batch, heads))
    return replace(change, visible=_split(change.visible, batch, heads))


def _split(node: Node, batch: Size, heads: Size) -> Node:
    if val(node).dim() != 3:
        return node
    first = (1, 1) if same_size(val(node).shape[0], 1) else (batch, heads)
    sizes = [size_node(node.graph, n) for n in (*first, *val(node).shape[1:])]
    return insert(node.graph, aten.view.default, node, sizes)


def _mul(node: Node) -> Scores | None:
    for scores, factor in (node.args[:2], node.args[1::-1]):
        if (value := number(factor)) is not None and (found := _from(node, scores)) is not None:
            return found.times(value)
    return None


def _div(node: Node) -> Scores | None:
    divisor = number(node.args[1])
    found = _from(node, node.args[0]) if divisor and "rounding_mode" not in node.kwargs else None
    return None if found is None or not divisor else found.times(1.0 / divisor)


def _add(node: Node) -> Scores | None:
    a, b, alpha = node.args[0], node.args[1], number(argument(node, "alpha"))
    for scores, term, factor in ((a, b, alpha), (b, a, 1.0 if alpha == 1 else None)):
        if isinstance(term, Node) and is_tensor(term) and factor is not None:
            if (found := _from(node, scores)) is not None:
                return found.changed(Added(term, factor))
    return None


def _sub(node: Node) -> Scores | None:
    """scores - term; taking the largest score from all changes no softmax."""
    term, alpha = node.args[1], number(argument(node, "alpha"))
    if not isinstance(term, Node) or not is_tensor(term) or alpha is None:
        return None
    found = _from(node, node.args[0])
    return None if found is None else found.changed(Added(term, -alpha))


def _tanh(node: Node) -> Scores | None:
    found = _from(node, node.args[0])
    if found is None or found.cap is not None or found.changes:
        return None
    return replace(found, cap=1.0)


def _where(node: Node) -> Scores | None:
    condition, yes, no = node.args[:3]
    for scores, fill, negate in ((yes, no, False), (no, yes, True)):
        if (by := number(fill)) is not None and (found := _from(node, scores)) is not None:
            return _hide(found, condition, negate, by)
    return None


def _masked_fill(node: Node) -> Scores | None:
    by, found = number(node.args[2]), _from(node, node.args[0])
    return None if found is None or by is None else _hide(found, node.args[1], True, by)


def _hide(scores: Scores, condition: object, negate: bool, by: float) -> Scores | None:
    hides = by <= torch.finfo(torch.float16).min
    return scores.changed(Hidden(condition, negate, by)) if hides and isinstance(condition, Node) else None


RULES: Mapping[object, Callable[[Node], Scores | None]] = {
    **dict.fromkeys((aten.bmm.default, aten.mm.default), _product),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default, aten.expand.default), _copy),
    **dict.fromkeys((aten.alias.default, aten.detach.default), _copy),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _mul),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _div),
    **dict.fromkeys(WHERE, _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.baddbmm.default: _product_added,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.tanh.default: _tanh,
}
