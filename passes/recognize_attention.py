"""Attention, whole or written out, becomes one node.

    scaled_dot_product_attention(q, k, v, mask, scale=s)       ->  llmcomp.attention(q, k, v, mask, scale=s)
    softmax(q @ k.T * s + where(causal, 0, finfo.min)) @ v     ->  llmcomp.attention(q, k, v, scale=s, causal)
    softmax(cat([scores, sinks]))[..., :-1] @ v                ->  llmcomp.attention(q, k, v, sinks=sinks)
    attention(q, repeat_heads(k), repeat_heads(v))             ->  attention(q, k, v)

`attention_weights` reads from the softmax down to the product with the values, `attention_scores` up to the
product of queries and keys, `attention_operands` what is multiplied, and `recognize_mask` which changes of
the scores are structure. The node computes in float32 inside: the roundings that eager does in between do
not happen.
"""

from dataclasses import dataclass, replace
from math import inf, sqrt

import torch
from torch.fx import Graph, Node

from llmcomp.graph import Size, argument, insert, is_tensor, only_user, same_shape, same_size, val
from llmcomp.passes.attention_operands import VIEWS, Operand, read_operand
from llmcomp.passes.attention_scores import COPIES, Scores, read_scores, split_change
from llmcomp.passes.attention_sinks import join_sinks
from llmcomp.passes.attention_weights import Weights, read_weights
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.layout import adopt
from llmcomp.passes.mask_band import Shape
from llmcomp.passes.mask_parts import Added, Change, Hidden
from llmcomp.passes.recognize_mask import MaskWriter
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten


class Miss(Exception):
    """Why something that looks like attention was left alone."""


def _run(graph: Graph, report: Report) -> None:
    masks = MaskWriter(graph)
    for target, rewrite in (
        (aten.scaled_dot_product_attention.default, _whole),
        (aten._softmax.default, _written),
    ):
        for node in graph.find_nodes(op="call_function", target=target):
            try:
                report.rewrites += rewrite(node, masks)
            except Miss as miss:
                report.miss(node, str(miss))


RECOGNIZE_ATTENTION = Pass("recognize_attention", _run, needs=frozenset({SHAPES}))


@dataclass(frozen=True)
class Attention:
    """What llmcomp::attention is given: q, k and v are (batch, heads, positions, channels)."""

    q: Node
    k: Node
    v: Node
    scale: float
    changes: tuple[Change, ...] = ()
    causal: bool = False
    cap: float = 0.0
    sinks: Node | None = None


def _write(attention: Attention, masks: MaskWriter) -> Node:
    """The call, at the graph's insertion point."""
    q, k, v = attention.q, attention.k, attention.v
    batch, heads, queries, _ = val(q).shape
    mask = masks.write(attention.changes, Shape(batch, heads, queries, val(k).shape[2]), attention.causal)
    structure = (mask.causal, mask.offset, mask.window)
    target = torch.ops.llmcomp.attention.default
    return insert(q.graph, target, q, k, v, mask.mask, attention.sinks, attention.scale, *structure, attention.cap)


# ---- whole


def _whole(node: Node, masks: MaskWriter) -> int:
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    rank = val(node).dim()
    _check_whole(node, q, k, v)
    with node.graph.inserting_before(node):
        q, k, v = (_to_rank_4(t) for t in (q, k, v))
        k, v = _shared(q, k, v)
        given = argument(node, "attn_mask")
        attention = Attention(q, k, v, _scale(node, q), _change(given), bool(argument(node, "is_causal")))
        new = _write(attention, masks)
        for _ in range(4 - rank):
            new = insert(node.graph, aten.squeeze.dim, new, 0)
    adopt(node, new)
    return 1


def _check_whole(node: Node, q: Node, k: Node, v: Node) -> None:
    if argument(node, "dropout_p"):
        raise Miss("dropout")
    if argument(node, "is_causal") and argument(node, "attn_mask") is not None:
        raise Miss("both a mask and is_causal")
    if not 2 <= val(q).dim() <= 4 or val(k).dim() != val(q).dim() or val(v).dim() != val(q).dim():
        raise Miss(f"query of {val(q).dim()} axes")
    if not same_shape(val(q).shape[:-3], val(k).shape[:-3]) or not same_shape(val(k).shape[:-2], val(v).shape[:-2]):
        raise Miss("batches or heads that are broadcast")
    if not val(q).dtype.is_floating_point:
        raise Miss(f"dtype {val(q).dtype}")


def _to_rank_4(node: Node) -> Node:
    while val(node).dim() < 4:
        node = insert(node.graph, aten.unsqueeze.default, node, 0)
    return node


def _shared(q: Node, k: Node, v: Node) -> tuple[Node, Node]:
    """Keys and values without repeated heads, if both repeat theirs alike."""
    batch, heads, *_ = val(q).shape
    keys, values = (read_operand(t, batch, heads, val(t).dtype, share=True) for t in (k, v))
    if keys.factor == values.factor == 1 and same_size(val(keys.node).shape[1], val(values.node).shape[1]):
        return keys.node, values.node
    return k, v


def _scale(node: Node, q: Node) -> float:
    scale = argument(node, "scale")
    if isinstance(scale, int | float):
        return float(scale)
    channels = val(q).shape[3]
    if scale is not None or not isinstance(channels, int):
        raise Miss("a scale that depends on the input")
    return 1 / sqrt(channels)


def _change(mask: object) -> tuple[Change, ...]:
    if not isinstance(mask, Node):
        return ()
    return (Hidden(mask, False, -inf) if val(mask).dtype == torch.bool else Added(mask),)


# ---- written out


def _written(node: Node, masks: MaskWriter) -> int:
    weights = read_weights(node)
    if weights is None:
        return 0
    if isinstance(weights, str):
        raise Miss(weights)
    if (joined := join_sinks(weights)) is not None:
        return _written(joined, masks)
    with node.graph.inserting_before(weights.product):
        scores = read_scores(weights.logits)
        if scores is None:
            return _blocked(weights.logits)
        _check_alone(scores, weights)
        attention = _attention(scores, weights)
        new = _write(attention, masks)
        _place(new, weights.product)
    return 1


def _blocked(logits: Node) -> int:
    """Nothing was rewritten; the operator that kept scores from being read is a near miss."""
    seen: set[Node] = set()
    stack = [logits]
    while stack:
        node = stack.pop()
        for source in set(node.all_input_nodes) - seen:
            if is_tensor(source) and same_shape(val(source).shape, val(node).shape):
                if read_scores(source) is not None:
                    raise Miss(f"{node.name} is between the product and the softmax")
                stack.append(source)
                seen.add(source)
    return 0


def _check_alone(scores: Scores, weights: Weights) -> None:
    inside = {*scores.path, *weights.path, weights.product}
    for node in inside - {weights.product}:
        if outside := [user for user in node.users if user not in inside]:
            raise Miss(f"the scores {node.name} are used elsewhere, by {outside[0].name}")
    hidden = {(c.visible, c.negate) for c in scores.changes if isinstance(c, Hidden)}
    if weights.zeroed - hidden:
        raise Miss("the softmax counts keys whose weights are set to zero after it")


def _attention(scores: Scores, weights: Weights) -> Attention:
    values = weights.product.args[1]
    assert isinstance(values, Node)
    batch, heads = _batch_and_heads(scores, weights.softmax)
    dtype = _rounded_to(weights.product)
    for share in (True, False):
        q = read_operand(scores.q, batch, heads, dtype)
        k = read_operand(scores.k, batch, heads, dtype, swapped=True, share=share)
        v = read_operand(values, batch, heads, dtype, share=share)
        if same_shape(val(k.node).shape[:3], val(v.node).shape[:3]):
            break
    nodes = _of_one_dtype(q.node, k.node, _scaled(v), dtype)
    changes = tuple(_zeroed(c, weights) for c in scores.changes)
    if val(weights.softmax).dim() == 3:
        changes = tuple(split_change(c, batch, heads) for c in changes)
    inner = scores.scale * q.factor * k.factor
    scale, cap = (inner, 0.0) if scores.cap is None else (inner * scores.cap, scores.cap)
    return Attention(*nodes, scale, changes, cap=cap, sinks=weights.sinks)


def _zeroed(change: Change, weights: Weights) -> Change:
    """A hidden key whose weight is set to zero after the softmax too is hidden by -inf."""
    if isinstance(change, Hidden) and (change.visible, change.negate) in weights.zeroed:
        return replace(change, by=-inf)
    return change


def _rounded_to(product: Node) -> torch.dtype:
    """The dtype that the only reader of the product rounds it to, else its own."""
    node = product
    while (user := only_user(node)) is not None and user.target in (*COPIES, *MOVES):
        if val(user).dtype in HALVES and val(user).dtype != val(node).dtype:
            return val(user).dtype
        node = user
    return val(product).dtype


MOVES = (aten.transpose.int, aten.permute.default)
HALVES = (torch.bfloat16, torch.float16)


def _batch_and_heads(scores: Scores, softmax: Node) -> tuple[Size, Size]:
    shape = val(softmax).shape
    if len(shape) == 4:
        return shape[0], shape[1]
    if len(shape) == 2:
        return 1, 1
    merged = scores.q.args[0] if scores.q.target in VIEWS else scores.q
    assert isinstance(merged, Node)
    outer = val(merged).shape
    if len(outer) == 4 and same_size(outer[0] * outer[1], shape[0]):
        return outer[0], outer[1]
    return 1, shape[0]


def _scaled(operand: Operand) -> Node:
    node = operand.node
    return node if operand.factor == 1.0 else insert(node.graph, aten.mul.Tensor, node, operand.factor)


def _of_one_dtype(q: Node, k: Node, v: Node, dtype: torch.dtype) -> tuple[Node, Node, Node]:
    """The operands in `dtype`, or all in float32 where one of them is not."""
    if all(val(n).dtype == dtype for n in (q, k, v)):
        return q, k, v
    q, k, v = (_cast(n, torch.float32) for n in (q, k, v))
    return q, k, v


def _cast(node: Node, dtype: torch.dtype) -> Node:
    return node if val(node).dtype == dtype else insert(node.graph, aten._to_copy.default, node, dtype=dtype)


def _place(new: Node, product: Node) -> None:
    """Let the readers of the product with the values, merged or with heads apart, read `new`."""
    new = _cast(new, val(product).dtype)
    for user in list(product.users):
        if user.target in VIEWS and same_shape(val(user).shape, val(new).shape):
            adopt(user, new)
    if product.users:
        adopt(product, _merged(new, val(product).dim()))


def _merged(node: Node, rank: int) -> Node:
    """(B, H, S, D) as (B * H, S, D), or as (S, D) of the only head."""
    while val(node).dim() > rank and same_size(val(node).shape[0], 1):
        node = insert(node.graph, aten.squeeze.dim, node, 0)
    if val(node).dim() == rank:
        return node
    node = insert(node.graph, aten.clone.default, node, memory_format=torch.contiguous_format)
    batch, heads, *rest = val(node).shape
    sizes = [size_node(node.graph, n) for n in (batch * heads, *rest)]
    return insert(node.graph, aten.view.default, node, sizes)
