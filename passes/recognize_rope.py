"""Written-out rotary embeddings become llmcomp::rope.

    x * cos + cat([-x[R/2:], x[:R/2]]) * sin                     ->  rope(x, cos, sin, interleaved=False)
    x * cos + view(cat([-x[1::2], x[::2]])) * sin                ->  rope(x, cos, sin, interleaved=True)
    cat([x[:R/2] * c - x[R/2:] * s, x[R/2:] * c + x[:R/2] * s])  ->  rope(x, cat([c, c]), cat([s, s]), False)
    products of complex numbers                                  ->  rope_complex.py

A rotation the other way (cat([x[R/2:], -x[:R/2]])) gets -sin. Even and odd channels whose turned values are
joined as halves (DeepSeek) are joined before the rope instead. Casts of x to float32 before and back after
are taken in. A rotation of a part of the channels stays a slice, a rope and a cat.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from llmcomp.graph import argument, insert, insert_once, only_user, same_shape, same_size, source, tensors, val
from llmcomp.ops import OPS
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.layout import adopt
from llmcomp.passes.match import is_cast, is_last_axis, narrowed, operands, other_operand, uncast
from llmcomp.passes.rope_complex import rewrite_complex
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Part:
    """Half of the channels of `of`: the first or second ones, or the even or odd ones (`interleaved`)."""

    of: Node
    second: bool
    interleaved: bool


@dataclass(frozen=True)
class Rotated:
    """`of` turned by a quarter: (-second, first), or (second, -first) where `backwards`."""

    of: Node
    interleaved: bool
    backwards: bool


def _run(graph: Graph, report: Report) -> None:
    for node in list(graph.nodes):
        report.rewrites += _whole(node, report) or _by_halves(node, report) or rewrite_complex(node, _paired)


RECOGNIZE_ROPE = Pass("recognize_rope", _run, needs=frozenset({SHAPES}))


def _whole(node: Node, report: Report) -> bool:
    """Rewrite x * cos + rotated(x) * sin."""
    terms = operands(node, aten.add.Tensor)
    if terms is None:
        return False
    for straight, turned in (terms, terms[::-1]):
        found = _turned(turned)
        if found is None:
            continue
        rotated, sin = found
        cos = other_operand(straight, rotated.of, aten.mul.Tensor)
        if cos is None:
            report.miss(node, f"{straight.name} is not {rotated.of.name} times its cosines")
        elif (reason := _unfit(node, rotated.of, cos, sin)) is not None:
            report.miss(node, reason)
        else:
            _rewrite(node, rotated, cos, sin)
            return True
    return False


def _turned(node: Node) -> tuple[Rotated, Node] | None:
    """(rotated, sin) where `node` is their product."""
    pair = operands(node, aten.mul.Tensor)
    for rotated, sin in (pair, pair[::-1]) if pair is not None else ():
        if (found := _rotated(rotated)) is not None:
            return found, sin
    return None


def _unfit(node: Node, x: Node, cos: Node, sin: Node) -> str | None:
    """Why x * cos + rotated(x) * sin is not a rope, or None."""
    if not same_shape(val(node).shape, val(x).shape):
        return f"the result has another shape than {x.name}"
    for angle in (cos, sin):
        if not val(angle).dim() or not same_size(val(angle).shape[-1], val(x).shape[-1]):
            return f"{angle.name} is not as wide as {x.name}"
    return None


def _rewrite(node: Node, rotated: Rotated, cos: Node, sin: Node) -> None:
    graph, last, x = node.graph, narrowed(node), uncast(rotated.of)
    if rotated.backwards:
        sin = insert_once(last, aten.neg.default, sin)
    with graph.inserting_before(last):
        dtype = () if val(last).dtype == val(x).dtype else (val(last).dtype,)
        op = OPS.rope.default
        new = insert(graph, op, x, uncast(cos), uncast(sin), rotated.interleaved, *dtype)
    adopt(last, new)


def _rotated(node: Node) -> Rotated | None:
    """What `node` is a quarter turn of."""
    joined = _joined(node)
    if joined is None:
        return None
    (a, b), interleaved = joined
    minus = [part.target is aten.neg.default for part in (a, b)]
    first, second = (_part(source(part) if neg else part) for part, neg in zip((a, b), minus, strict=True))
    if first is None or second is None or minus[0] == minus[1] or first.of is not second.of:
        return None
    if (first.interleaved, second.interleaved) != (interleaved, interleaved):
        return None
    if not first.second or second.second or not same_shape(val(node).shape, val(first.of).shape):
        return None
    return Rotated(first.of, interleaved, backwards=minus[1])


def _joined(node: Node) -> tuple[tuple[Node, Node], bool] | None:
    """((a, b), interleaved): `node` is cat([a, b], -1), or takes its channels from a and b in turn."""
    if node.target is aten.cat.default:
        parts, interleaved = tensors(node) if _along_last(node) else [], False
    elif node.target is aten.view.default:
        stack = source(node)
        flat = val(stack).dim() and same_shape(val(node).shape[:-1], val(stack).shape[:-2])
        parts, interleaved = _stacked(stack) if flat else [], True
    else:
        return None
    return ((parts[0], parts[1]), interleaved) if len(parts) == 2 else None


def _along_last(node: Node) -> bool:
    """Whether the dim that follows the first argument of a call is the last one of its result."""
    return is_last_axis(node.args[1] if len(node.args) > 1 else 0, node)


def _stacked(node: Node) -> list[Node]:
    """The parts that were stacked along a last axis of their own; [] for anything else."""
    if node.target is not aten.cat.default or not _along_last(node):
        return []
    columns = all(p.target is aten.unsqueeze.default and _along_last(p) for p in tensors(node))
    return [source(p) for p in tensors(node)] if columns else []


def _part(node: Node) -> Part | None:
    """Which half of which tensor `node` is."""
    if node.target is aten.slice.Tensor:
        return _sliced(node)
    if node.target is aten.select.int:
        return _column(source(node), node.args[1], node.args[2])
    if node.target is not operator.getitem:
        return None
    producer, which = source(node), node.args[1]
    if producer.target is aten.unbind.int:
        return _column(source(producer), producer.args[1] if len(producer.args) > 1 else 0, which)
    return _split(producer, which) if producer.target in SPLITS else None


def _sliced(node: Node) -> Part | None:
    """x[..., :R/2], x[..., R/2:], x[..., ::2] or x[..., 1::2]."""
    x = source(node)
    dim, start, end, step = (argument(node, name) for name in ("dim", "start", "end", "step"))
    width = val(x).shape[-1]
    if not is_last_axis(dim, x) or not isinstance(width, int) or width % 2:
        return None
    if not isinstance(start, int | None) or not isinstance(end, int | None):
        return None
    first, last = (_from_start(start, 0, width), _from_start(end, width, width))
    if step == 2 and first in (0, 1) and last >= width - 1 + first:
        return Part(x, first == 1, True)
    if step == 1 and (first, last) in ((0, width // 2), (width // 2, width)):
        return Part(x, first != 0, False)
    return None


def _from_start(position: int | None, default: int, width: int) -> int:
    """A bound of a slice as Python takes it, counted from the start."""
    if position is None:
        return default
    return position + width if position < 0 else min(position, width)


def _split(producer: Node, which: object) -> Part | None:
    """One result of a split in two equal halves."""
    x, halves = source(producer), producer.meta["val"]
    dim = producer.args[2] if len(producer.args) > 2 else producer.kwargs.get("dim", 0)
    if not is_last_axis(dim, x) or len(halves) != 2:
        return None
    equal = same_size(halves[0].shape[-1], halves[1].shape[-1])
    return Part(x, which == 1, False) if equal else None


def _column(pairs: Node, dim: Argument, which: object) -> Part | None:
    """Column `which` of x viewed as pairs (..., R/2, 2)."""
    if pairs.target is not aten.view.default or not is_last_axis(dim, pairs) or which not in (0, 1):
        return None
    x = source(pairs)
    paired = same_size(val(pairs).shape[-1], 2) and same_shape(val(pairs).shape[:-2], val(x).shape[:-1])
    return Part(x, which == 1, True) if paired else None


def _by_halves(node: Node, report: Report) -> bool:
    """Rewrite the join of x1 * cos - x2 * sin and x2 * cos + x1 * sin."""
    joined = _joined(node)
    if joined is None:
        return False
    (upper, lower), interleaved = joined
    minus = operands(_unrounded(upper), aten.sub.Tensor)
    plus = operands(_unrounded(lower), aten.add.Tensor)
    if minus is None or plus is None:
        return False
    halves = _halves(minus, plus) or _halves(minus, plus[::-1])
    if halves is None:
        return False
    first, second = halves.parts
    if interleaved and not first.interleaved:
        report.miss(node, "channels of the two halves are joined in turn")
        return False
    if not same_shape(val(node).shape, val(first.of).shape):
        report.miss(node, f"the result has another shape than {first.of.name}")
        return False
    _rewrite_halves(node, halves, interleaved)
    return True


def _unrounded(node: Node) -> Node:
    """A half before it was cast back: halves may be rounded before they are joined."""
    return source(node) if is_cast(node) and only_user(source(node)) is node else node


@dataclass(frozen=True)
class Halves:
    """Both parts of one tensor, as nodes and as what they are, and the angles they are turned by."""

    nodes: tuple[Node, Node]
    parts: tuple[Part, Part]
    cos: Node
    sin: Node


def _halves(minus: tuple[Node, Node], plus: tuple[Node, Node]) -> Halves | None:
    """What the terms are where minus is (x1 * cos, x2 * sin) and plus is (x2 * cos, x1 * sin)."""
    found = [_with_part(term) for term in (*minus, *plus)]
    products = [f for f in found if f is not None]
    if len(products) != 4:
        return None
    (x1, c), (x2, s), second, first = products
    one, two = _part(x1), _part(x2)
    if second != (x2, c) or first != (x1, s) or one is None or two is None:
        return None
    ordered = one.of is two.of and one.interleaved == two.interleaved and two.second and not one.second
    return Halves((x1, x2), (one, two), c, s) if ordered else None


def _with_part(node: Node) -> tuple[Node, Node] | None:
    """(half of x, angle) where `node` is their product."""
    pair = operands(node, aten.mul.Tensor)
    for part, angle in (pair, pair[::-1]) if pair is not None else ():
        if _part(part) is not None and same_shape(val(part).shape, val(node).shape):
            return part, angle
    return None


def _rewrite_halves(node: Node, halves: Halves, interleaved: bool) -> None:
    graph, last = node.graph, narrowed(node)
    x = uncast(halves.parts[0].of)
    if halves.parts[0].interleaved != interleaved:
        x = insert_once(last, aten.cat.default, list(halves.nodes), -1)
    dtype = () if val(last).dtype == val(x).dtype else (val(last).dtype,)
    cos, sin = (_doubled(last, uncast(angle), interleaved) for angle in (halves.cos, halves.sin))
    with graph.inserting_before(last):
        new = insert(graph, OPS.rope.default, x, cos, sin, interleaved, *dtype)
    adopt(last, new)


def _paired(before: Node, angle: Node) -> Node:
    return _doubled(before, angle, interleaved=True)


def _doubled(before: Node, angle: Node, interleaved: bool) -> Node:
    """An angle for every channel, made of one for every pair of channels; made once for queries and keys."""
    if not interleaved:
        return insert_once(before, aten.cat.default, [angle, angle], -1)
    column = insert_once(before, aten.unsqueeze.default, angle, -1)
    pairs = insert_once(before, aten.cat.default, [column, column], -1)
    with before.graph.inserting_before(before):
        shape = [size_node(before.graph, n) for n in val(angle).shape[:-1]]
    return insert_once(before, aten.view.default, pairs, [*shape, -1])
