"""Written-out norms over the last axis become llmcomp::rms_norm and llmcomp::layer_norm.

    h = float32(x); w * cast(h * rsqrt(mean(h * h) + eps))   ->  rms_norm(x, w, eps, round_first=True)
    cast(h * rsqrt(mean(h * h) + eps) * (1 + float32(w)))    ->  rms_norm(x, w, eps, plus_one=True)
    x * rsqrt(sum(x * x) + eps)                              ->  rms_norm(x, None, eps / N) * N ** -0.5
    c = h - mean(h); w * c * rsqrt(mean(c * c) + eps) + b    ->  layer_norm(x, w, b, eps)
    (h - mean(h)) * rsqrt(var(h) + eps)                      ->  layer_norm(x, None, None, eps)
    native_layer_norm(x, [N], w, b, eps)[0]                  ->  layer_norm(x, w, b, eps)

Casts around the norm are taken in, for the operators compute in float32 inside. `m ** -0.5` and
`x / sqrt(m)` are known; a weight that is no vector over the last axis stays outside as a product.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from llmcomp.graph import argument, insert, only_user, source, val
from llmcomp.ops import OPS
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.layout import adopt
from llmcomp.passes.match import (
    is_cast,
    is_last_axis,
    is_vector,
    narrowed,
    operands,
    other_operand,
    uncast,
    with_number,
)

aten = torch.ops.aten


MEANS = (aten.mean.dim, aten.sum.dim_IntList, aten.var.correction)


@dataclass(frozen=True)
class MeanSquare:
    """mean(of ** 2, dims) + eps; a sum where `summed`, the variance of `of` where `centred`."""

    of: Node
    dims: Argument
    eps: float
    summed: bool = False
    centred: bool = False


@dataclass(frozen=True)
class Scaled:
    """`last` is a normalized value times `weight` (plus one), plus `bias`, rounded as `round_first` says."""

    last: Node
    weight: Node | None = None
    plus_one: bool = False
    round_first: bool = False
    bias: Node | None = None


def _run(graph: Graph, report: Report) -> None:
    for node in list(graph.nodes):
        report.rewrites += _native(node, report) or _written_out(node, report)


RECOGNIZE_NORM = Pass("recognize_norm", _run, needs=frozenset({SHAPES}))


def _written_out(node: Node, report: Report) -> bool:
    """Rewrite the norm whose normalized value is `node`."""
    parts = _normalized(node)
    square = parts and _mean_square(parts[1])
    if parts is None or square is None:
        return False
    if (reason := _unfit(node, *parts, square)) is not None:
        report.miss(node, reason)
        return False
    centred = square.of if square.centred else _centred(square.of)
    if square.summed:
        _replace_by_scaled_norm(node, uncast(square.of), square.eps)
    elif centred is None:
        _replace_by_rms_norm(_scaled(node, biased=False), uncast(square.of), square.eps)
    else:
        _replace_by_layer_norm(_scaled(node, biased=True), uncast(centred), square.eps)
    return True


def _unfit(node: Node, x: Node, m: Node, square: MeanSquare) -> str | None:
    """Why `node`, x / sqrt(m), is no norm over the last axis, or None."""
    normalized, measured = (_centred(x), square.of) if square.centred else (uncast(x), uncast(square.of))
    if normalized is not measured:
        return "what is normalized is not what the mean is taken of"
    if not is_last_axis(square.dims, square.of):
        return "the mean is not over the last axis"
    if not val(x).dtype.is_floating_point:
        return f"the norm is of {val(x).dtype}"
    if square.summed and not isinstance(val(x).shape[-1], int):
        return "the vector is of a length that is not known"
    between = m
    while between is not node:
        user = only_user(between)
        if user is None:
            return f"{between.name} has another user"
        between = user
    return None


def _normalized(node: Node) -> tuple[Node, Node] | None:
    """(x, m) where `node` is x / sqrt(m) in one of its spellings."""
    if (pair := operands(node, aten.mul.Tensor)) is not None:
        for x, factor in (pair, pair[::-1]):
            if (m := _under_inverse_root(factor)) is not None:
                return x, m
    if (pair := operands(node, aten.div.Tensor)) is not None and pair[1].target is aten.sqrt.default:
        return pair[0], source(pair[1])
    return None


def _under_inverse_root(node: Node) -> Node | None:
    """m where `node` is rsqrt(m) or m ** -0.5, perhaps cast."""
    if is_cast(node):
        node = source(node)
    power = with_number(node, aten.pow.Tensor_Scalar)
    if power is not None and power[1] == -0.5:
        return power[0]
    return source(node) if node.target is aten.rsqrt.default else None


def _mean_square(m: Node) -> MeanSquare | None:
    sum_ = with_number(m, aten.add.Tensor)
    mean, eps = sum_ if sum_ is not None else (m, 0.0)
    if mean.target not in MEANS or not argument(mean, "keepdim"):
        return None
    dims = argument(mean, "dim")
    if mean.target is aten.var.correction:
        biased = argument(mean, "correction") == 0
        return MeanSquare(source(mean), dims, eps, centred=True) if biased else None
    h = _squared(source(mean))
    return None if h is None else MeanSquare(h, dims, eps, summed=mean.target is aten.sum.dim_IntList)


def _squared(node: Node) -> Node | None:
    power = with_number(node, aten.pow.Tensor_Scalar)
    if power is not None:
        return power[0] if power[1] == 2 else None
    pair = operands(node, aten.mul.Tensor)
    return pair[0] if pair is not None and pair[0] is pair[1] else None


def _centred(node: Node) -> Node | None:
    """h where `node` is h - mean(h) over the last axis."""
    pair = operands(node, aten.sub.Tensor)
    if pair is None or pair[1].target is not aten.mean.dim:
        return None
    h, mean = pair
    whole = mean.args[0] is h and is_last_axis(mean.args[1], h) and argument(mean, "keepdim")
    return h if whole else None


def _scaled(node: Node, biased: bool) -> Scaled:
    """Follow the normalized value `node` as far as its weight, its bias and its casts go."""
    rounded = narrowed(node)
    weighted = _weighted(rounded)
    if weighted is None:
        return Scaled(rounded)
    product, weight = weighted
    if rounded is not node:
        return Scaled(product, weight, round_first=True)
    bias = _biased(product) if biased else None
    last = narrowed(bias[0] if bias is not None else product)
    one_more = None if biased else _plus_one(weight)
    return Scaled(
        last,
        uncast(one_more or weight),
        plus_one=one_more is not None,
        bias=None if bias is None else uncast(bias[1]),
    )


def _weighted(node: Node) -> tuple[Node, Node] | None:
    """(product, weight) where the only user of `node` multiplies it by a vector, in the dtype of `node`."""
    return _with_vector(node, aten.mul.Tensor)


def _biased(node: Node) -> tuple[Node, Node] | None:
    return _with_vector(node, aten.add.Tensor)


def _with_vector(node: Node, target: object) -> tuple[Node, Node] | None:
    user = only_user(node)
    vector = other_operand(user, node, target)
    if user is None or vector is None or not is_vector(vector, val(node).shape[-1]) or val(node).dim() == 1:
        return None
    return (user, vector) if val(user).dtype == val(node).dtype else None


def _plus_one(weight: Node) -> Node | None:
    """w where `weight` is 1 + w, computed in the dtype of the norm."""
    sum_ = with_number(weight, aten.add.Tensor)
    inside = val(weight).dtype in (torch.float32, torch.float64)
    return sum_[0] if sum_ is not None and sum_[1] == 1 and inside else None


def _replace_by_rms_norm(found: Scaled, x: Node, eps: float) -> None:
    graph = found.last.graph
    with graph.inserting_before(found.last):
        new = insert(
            graph,
            OPS.rms_norm.default,
            x,
            found.weight,
            float(eps),
            found.plus_one,
            found.round_first,
            *_dtype(x, found.last),
        )
    adopt(found.last, new)


def _replace_by_layer_norm(found: Scaled, x: Node, eps: float) -> None:
    graph = found.last.graph
    with graph.inserting_before(found.last):
        op = OPS.layer_norm.default
        new = insert(graph, op, x, found.weight, found.bias, float(eps), *_dtype(x, found.last))
    adopt(found.last, new)


def _replace_by_scaled_norm(node: Node, x: Node, eps: float) -> None:
    """x / sqrt(sum(x ** 2) + eps) is the norm with mean and eps / N, divided by sqrt(N), rounded once."""
    graph, last = node.graph, narrowed(node)
    length = val(x).shape[-1]
    wide = torch.promote_types(val(x).dtype, torch.float32)
    with graph.inserting_before(last):
        op = OPS.rms_norm.default
        dtype = () if wide == val(x).dtype else (wide,)
        norm = insert(graph, op, x, None, eps / length, False, False, *dtype)
        new = insert(graph, aten.mul.Tensor, norm, length**-0.5)
        if wide != val(last).dtype:
            new = insert(graph, aten._to_copy.default, new, dtype=val(last).dtype)
    adopt(last, new)


def _dtype(x: Node, last: Node) -> tuple[torch.dtype, ...]:
    """The trailing dtype argument, where it is not the default."""
    return () if val(x).dtype == val(last).dtype else (val(last).dtype,)


def _native(node: Node, report: Report) -> bool:
    """Rewrite getitem(native_layer_norm(x, [N], w, b, eps), 0) where no one reads the statistics."""
    norm = source(node) if node.target is operator.getitem else node
    if norm.target is not aten.native_layer_norm.default or norm is node or node.args[1] != 0:
        return False
    if any(user is not node for user in norm.users):
        report.miss(node, "the mean or the deviation is read too")
        return False
    x, shape, weight, bias, eps = norm.args
    assert isinstance(x, Node) and isinstance(shape, list | tuple) and isinstance(eps, float | int)
    if len(shape) != 1:
        report.miss(node, f"the norm is over the last {len(shape)} axes")
        return False
    w, b = (uncast(n) if isinstance(n, Node) else None for n in (weight, bias))
    _replace_by_layer_norm(Scaled(narrowed(node), w, bias=b), uncast(x), eps)
    return True
