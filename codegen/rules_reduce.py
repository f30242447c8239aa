"""Pull rules of operators that reduce along the inner axis of a kernel: sums, maxima, softmax, norms."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen.index import Index, sizes
from llmcomp.codegen.kernel import Argument
from llmcomp.codegen.pull import Puller, Rule, compute_dtype, dims, fake
from llmcomp.region import Unfit

aten = torch.ops.aten

COMBINE = {
    "sum": "add",
    "prod": "mul",
    "max": "maximum",
    "min": "minimum",
    "any": "logical_or",
    "all": "logical_and",
}


def argument(node: Node, name: str, default: object = None) -> object:
    """An argument of a node by its schema name, wherever it was given."""
    for position, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            if position < len(node.args):
                return node.args[position]
            fallback = a.default_value if a.has_default_value() and default is None else default
            return node.kwargs.get(name, fallback)
    return default


def reduced_dims(node: Node) -> tuple[int, ...]:
    """The dimensions of its first input that a reducing operator (softmax and norms too) works along."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise Unfit(f"{node.name} reduces a list")
    rank = fake(source).dim()
    target = node.target
    if target in (aten.native_layer_norm.default, aten.layer_norm.default):
        count = len(node.args[1])  # type: ignore[arg-type]
        return tuple(range(rank - count, rank))
    if target in NORMS():
        return (rank - 1,)
    return dims(argument(node, "dim"), rank)


class Along:
    """The elements of `source` along the inner axis, seen from an output index."""

    def __init__(self, p: Puller, node: Node, source: Node, along: tuple[int, ...], outer: Index) -> None:
        shape = sizes(fake(source).shape)
        extent = sympy.expand(sympy.Mul(*(shape[d] for d in along)))
        if p.inner is None or sympy.expand(p.inner.extent - extent) != 0:
            raise Unfit(f"{node.name} reduces {extent} elements, not the inner axis")
        if p.inner.symbol in sympy.Tuple(*outer).free_symbols or p.space.data & sympy.Tuple(*outer).free_symbols:
            raise Unfit(f"{node.name} is read at another row")
        self.p, self.source, self.along, self.outer, self.shape = p, source, along, outer, shape

    def elements(self) -> list[Argument]:
        """The values at the points that the inner axis stands for."""
        assert self.p.inner is not None
        return [self.p.at(self.source, self._index(point)) for point in self.p.inner.points]

    def _index(self, point: sympy.Expr) -> Index:
        position = iter(self.p.space.unflatten(point, [self.shape[d] for d in self.along]))
        outer = iter(self.outer)
        return tuple(next(position) if d in self.along else next(outer) for d in range(len(self.shape)))

    def reduce(self, op: str, dtype: torch.dtype, each: Callable[[Argument], Argument]) -> str:
        """The reduction of `each(element)` over all points."""
        p = self.p
        saved, p.dtype = p.dtype, dtype
        try:
            values = [each(p.convert(x, dtype)) for x in self.elements()]
            total = values[0]
            for value in values[1:]:
                total = p.op(COMBINE[op], total, value)
            return p.reduce(op, total, dtype)
        finally:
            p.dtype = saved


def _outer(index: Index, along: Sequence[int], keepdim: bool, rank: int) -> Index:
    """The part of an output index that names the row."""
    return tuple(i for d, i in enumerate(index) if d not in along) if keepdim or len(index) == rank else index


def _computing(p: Puller, dtype: torch.dtype, value: Callable[[], Argument]) -> Argument:
    saved, p.dtype = p.dtype, dtype
    try:
        return value()
    finally:
        p.dtype = saved


def _source(node: Node) -> Node:
    source = node.args[0]
    if not isinstance(source, Node):
        raise Unfit(f"{node.name} reduces a list")
    return source


def fold(op: str) -> Rule:
    """sum, prod, amax, amin, any, all, argmax, argmin."""

    def rule(p: Puller, node: Node, index: Index) -> Argument:
        source, along = _source(node), reduced_dims(node)
        outer = _outer(index, along, bool(argument(node, "keepdim", False)), fake(source).dim())
        dtype = compute_dtype(fake(node).dtype)
        working = (
            torch.bool if op in ("any", "all") else compute_dtype(fake(source).dtype) if op.startswith("arg") else dtype
        )
        elements = Along(p, node, source, along, outer)
        if op.startswith("arg") and (p.inner is None or p.inner.points != (p.inner.symbol,)):
            raise Unfit("arg reduction over a divided axis")
        if working == torch.bool:
            total = elements.reduce(op, torch.bool, lambda x: x)
        else:
            total = elements.reduce(op, working, lambda x: x)
        return p.convert(total, dtype)

    return rule


def mean(p: Puller, node: Node, index: Index) -> Argument:
    source, along = _source(node), reduced_dims(node)
    outer = _outer(index, along, bool(argument(node, "keepdim", False)), fake(source).dim())
    dtype = compute_dtype(fake(node).dtype)
    total = Along(p, node, source, along, outer).reduce("sum", dtype, lambda x: x)
    return _computing(p, dtype, lambda: p.op("div", total, _count(p, dtype)))


def _count(p: Puller, dtype: torch.dtype) -> Argument:
    assert p.inner is not None
    return p.convert(p.integer(p.inner.extent), dtype)


def softmax(logarithm: bool) -> Rule:
    """exp(x - max) / sum(exp(x - max)), or its logarithm."""

    def rule(p: Puller, node: Node, index: Index) -> Argument:
        source, along = _source(node), reduced_dims(node)
        outer = _outer(index, along, True, fake(source).dim())
        dtype = compute_dtype(fake(node).dtype)
        elements = Along(p, node, source, along, outer)
        highest = elements.reduce("max", dtype, lambda x: x)
        total = elements.reduce("sum", dtype, lambda x: p.op("exp", p.op("sub", x, highest)))

        def value() -> Argument:
            shifted = p.op("sub", p.convert(p.at(source, index), dtype), highest)
            if logarithm:
                return p.op("sub", shifted, p.op("log", total))
            return p.op("div", p.op("exp", shifted), total)

        return _computing(p, dtype, value)

    return rule


def moments(
    p: Puller, node: Node, source: Node, along: tuple[int, ...], outer: Index
) -> tuple[Argument, Argument, torch.dtype]:
    """(mean, sum of squared deviations, dtype) of the row."""
    dtype = compute_dtype(fake(source).dtype)
    elements = Along(p, node, source, along, outer)
    total = elements.reduce("sum", dtype, lambda x: x)
    centre = _computing(p, dtype, lambda: p.op("div", total, _count(p, dtype)))

    def squared(x: Argument) -> Argument:
        deviation = p.op("sub", x, centre)
        return p.op("mul", deviation, deviation)

    return centre, elements.reduce("sum", dtype, squared), dtype


def variance(p: Puller, node: Node, index: Index) -> Argument:
    """var.correction."""
    source, along = _source(node), reduced_dims(node)
    outer = _outer(index, along, bool(argument(node, "keepdim", False)), fake(source).dim())
    return _variance(p, node, source, along, outer)


def _variance(p: Puller, node: Node, source: Node, along: tuple[int, ...], outer: Index) -> Argument:
    correction = argument(node, "correction", 1)
    correction = 1 if correction is None else correction
    if not isinstance(correction, int | float):
        raise Unfit("symbolic correction")
    _, squares, dtype = moments(p, node, source, along, outer)

    def value() -> Argument:
        return p.op("div", squares, p.op("maximum", p.op("sub", _count(p, dtype), correction), 0.0))

    return _computing(p, dtype, value)


def _standardize(
    p: Puller, node: Node, source: Node, along: tuple[int, ...], index: Index, eps: float
) -> tuple[Argument, torch.dtype]:
    outer = _outer(index, along, True, fake(source).dim())
    centre, squares, dtype = moments(p, node, source, along, outer)

    def value() -> Argument:
        spread = p.op("add", p.op("div", squares, _count(p, dtype)), eps)
        return p.op("mul", p.op("sub", p.convert(p.at(source, index), dtype), centre), p.op("rsqrt", spread))

    return _computing(p, dtype, value), dtype


def _affine(p: Puller, value: Argument, dtype: torch.dtype, weight: object, bias: object, tail: Index) -> Argument:
    def result() -> Argument:
        out = value
        if isinstance(weight, Node):
            out = p.op("mul", out, p.convert(p.at(weight, tail, "weight"), dtype))
        if isinstance(bias, Node):
            out = p.op("add", out, p.convert(p.at(bias, tail, "bias"), dtype))
        return out

    return _computing(p, dtype, result)


def layer_norm(p: Puller, node: Node, index: Index) -> Argument:
    """llmcomp::layer_norm(x, weight, bias, eps)."""
    source, weight, bias, eps = node.args[:4]
    assert isinstance(source, Node)
    along = reduced_dims(node)
    value, dtype = _standardize(p, node, source, along, index, float(eps))  # type: ignore[arg-type]
    return _affine(p, value, dtype, weight, bias, index[along[0] :])


def native_layer_norm_item(p: Puller, node: Node, producer: Node, index: Index) -> Argument:
    source, _, weight, bias, eps = producer.args[:5]
    assert isinstance(source, Node)
    along = reduced_dims(producer)
    which = int(node.args[1])  # type: ignore[arg-type]
    if which == 0:
        value, dtype = _standardize(p, producer, source, along, index, float(eps))  # type: ignore[arg-type]
        return _affine(p, value, dtype, weight, bias, index[along[0] :])
    centre, squares, dtype = moments(p, producer, source, along, _outer(index, along, True, fake(source).dim()))
    if which == 1:
        return centre
    return _computing(
        p,
        dtype,
        lambda: p.op("rsqrt", p.op("add", p.op("div", squares, _count(p, dtype)), float(eps))),  # type: ignore[arg-type]
    )


def rms_norm(p: Puller, node: Node, index: Index) -> Argument:
    """llmcomp::rms_norm(x, weight, eps, plus_one, round_first, ...)."""
    source, weight = _source(node), argument(node, "weight")
    eps = float(argument(node, "eps"))  # type: ignore[arg-type]
    plus_one, round_first = bool(argument(node, "plus_one")), bool(argument(node, "round_first"))
    along = reduced_dims(node)
    outer = _outer(index, along, True, fake(source).dim())
    wide = torch.float64 if fake(source).dtype == torch.float64 else torch.float32
    squares = Along(p, node, source, along, outer).reduce("sum", wide, lambda x: p.op("mul", x, x))

    def normalized() -> Argument:
        given = int(argument(node, "count"))  # type: ignore[call-overload]
        mean = p.op("div", squares, float(given) if given else _count(p, wide))
        scale = p.op("rsqrt", p.op("add", mean, eps))
        return p.op("mul", p.convert(p.at(source, index), wide), scale)

    value = _computing(p, wide, normalized)
    if round_first:
        value = p.rounded(value, fake(source).dtype)
    if isinstance(weight, Node):
        factor = p.convert(p.at(weight, index[-1:], "weight"), wide)
        if plus_one:
            factor = _computing(p, wide, lambda: p.op("add", factor, 1.0))
        value = _computing(p, wide, lambda: p.op("mul", value, factor))
    return p.convert(value, compute_dtype(fake(node).dtype))


def vector_norm(p: Puller, node: Node, index: Index) -> Argument:
    """linalg_vector_norm of order 2."""
    if argument(node, "ord", 2) not in (2, 2.0, None):
        raise Unfit("norm of another order than 2")
    source, along = _source(node), reduced_dims(node)
    outer = _outer(index, along, bool(argument(node, "keepdim", False)), fake(source).dim())
    dtype = compute_dtype(fake(node).dtype)
    squares = Along(p, node, source, along, outer).reduce("sum", dtype, lambda x: p.op("mul", x, x))
    return _computing(p, dtype, lambda: p.op("sqrt", squares))


def logsumexp(p: Puller, node: Node, index: Index) -> Argument:
    source, along = _source(node), reduced_dims(node)
    outer = _outer(index, along, bool(argument(node, "keepdim", False)), fake(source).dim())
    dtype = compute_dtype(fake(node).dtype)
    elements = Along(p, node, source, along, outer)
    peak = elements.reduce("max", dtype, lambda x: x)

    def shift() -> Argument:
        return p.op("where", p.test("isinf", peak), 0.0, peak)

    safe = _computing(p, dtype, shift)
    total = elements.reduce("sum", dtype, lambda x: p.op("exp", p.op("sub", x, safe)))
    return _computing(p, dtype, lambda: p.op("add", p.op("log", total), safe))


def item(p: Puller, node: Node, index: Index) -> Argument | None:
    """getitem of an operator with several results, or None where it is not one of ours."""
    producer = _source(node)
    which = int(node.args[1])  # type: ignore[arg-type]
    if producer.target is aten.native_layer_norm.default:
        return native_layer_norm_item(p, node, producer, index)
    if producer.target in (aten.max.dim, aten.min.dim):
        name = "max" if producer.target is aten.max.dim else "min"
        source, along = _source(producer), reduced_dims(producer)
        outer = _outer(index, along, bool(argument(producer, "keepdim", False)), fake(source).dim())
        if which == 1 and (p.inner is None or p.inner.points != (p.inner.symbol,)):
            raise Unfit("arg reduction over a divided axis")
        dtype = compute_dtype(fake(source).dtype)
        return Along(p, producer, source, along, outer).reduce(name if which == 0 else f"arg{name}", dtype, lambda x: x)
    if producer.target is aten.var_mean.correction:
        source, along = _source(producer), reduced_dims(producer)
        outer = _outer(index, along, bool(argument(producer, "keepdim", False)), fake(source).dim())
        if which == 0:
            return _variance(p, producer, source, along, outer)
        return moments(p, producer, source, along, outer)[0]
    return None


TUPLES = (aten.native_layer_norm.default, aten.max.dim, aten.min.dim, aten.var_mean.correction)


def NORMS() -> tuple[object, ...]:
    """What in our vocabulary works along the last dimension: the norms, and the scale of a row."""
    ops = torch.ops.llmcomp
    return ops.rms_norm.default, ops.layer_norm.default, ops.cache_scale.default


@cache
def reduce_rules() -> Mapping[object, Rule]:
    """Rules by operator; getitem is left to the caller, which knows all operators with several results."""
    rules: dict[object, Rule] = {}
    for op, targets in {
        "sum": (aten.sum.dim_IntList, aten.sum.default),
        "prod": (aten.prod.dim_int, aten.prod.default),
        "max": (aten.amax.default, aten.max.default),
        "min": (aten.amin.default, aten.min.default),
        "any": (aten.any.dim, aten.any.dims, aten.any.default),
        "all": (aten.all.dim, aten.all.dims, aten.all.default),
        "argmax": (aten.argmax.default,),
        "argmin": (aten.argmin.default,),
    }.items():
        rules |= {target: fold(op) for target in targets}
    rules |= {
        aten.mean.dim: mean,
        aten.mean.default: mean,
        aten._softmax.default: softmax(False),
        aten._log_softmax.default: softmax(True),
        aten.var.correction: variance,
        aten.linalg_vector_norm.default: vector_norm,
        aten.logsumexp.default: logsumexp,
        torch.ops.llmcomp.rms_norm.default: rms_norm,
        torch.ops.llmcomp.layer_norm.default: layer_norm,
    }
    return rules
