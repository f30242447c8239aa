"""Rotary embeddings written as products of complex numbers.

    view_as_real(view_as_complex(view(x, [..., R/2, 2])) * polar(abs, angle)), flattened
        ->  rope(x, abs * cos(angle), abs * sin(angle), interleaved=True)

with every angle twice, once for each channel of its pair. The angles may be seen through views and multiplied by
a number; complex numbers of any other origin are read as their two parts.
"""

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument

from llmcomp.graph import insert, insert_once, is_view, same_shape, source, val
from llmcomp.ops import OPS
from llmcomp.passes.layout import adopt
from llmcomp.passes.match import narrowed, operands, uncast, with_number
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten


def rewrite_complex(node: Node, double: Callable[[Node, Node], Node]) -> bool:
    """Rewrite `node` if it is the flattened result of such a product; `double` repeats an angle for its pair."""
    product = _product(node)
    if product is None:
        return False
    pairs, angles = product
    graph, last, x = node.graph, narrowed(node), uncast(source(pairs))
    with graph.inserting_before(last):
        if not same_shape(val(x).shape, val(node).shape):
            x = insert(graph, aten.view.default, x, [size_node(graph, n) for n in val(node).shape])
    cos, sin = (double(last, part) for part in _parts(last, angles))
    with graph.inserting_before(last):
        dtype = () if val(last).dtype == val(x).dtype else (val(last).dtype,)
        new = insert(graph, OPS.rope.default, x, cos, sin, True, *dtype)
    adopt(last, new)
    return True


def _product(node: Node) -> tuple[Node, Node] | None:
    """(x viewed as pairs, angles) where `node` is their complex product with its pairs side by side."""
    if node.target is not aten.view.default or source(node).target is not aten.view_as_real.default:
        return None
    real = source(node)
    pair = operands(source(real), aten.mul.Tensor)
    flat = same_shape(val(node).shape[:-1], val(real).shape[:-2])
    for number, angles in (pair, pair[::-1]) if pair is not None and flat else ():
        if number.target is not aten.view_as_complex.default:
            continue
        pairs = source(number)
        if pairs.target is aten.view.default and same_shape(val(pairs).shape, val(real).shape):
            return pairs, angles
    return None


def _parts(before: Node, angles: Node) -> tuple[Node, Node]:
    """The real and the imaginary part of complex numbers, as real tensors; made once for all that read them."""
    if angles.target is aten.polar.default:
        length, angle = source(angles), source(angles, 1)
        cos, sin = (insert_once(before, f, angle) for f in (aten.cos.default, aten.sin.default))
        if length.target is aten.ones_like.default:
            return cos, sin
        return _both(before, aten.mul.Tensor, (cos, sin), length)
    scaled = with_number(angles, aten.mul.Tensor)
    if scaled is not None:
        return _both(before, aten.mul.Tensor, _parts(before, scaled[0]), scaled[1])
    if is_view(angles) and not angles.kwargs and val(source(angles)).is_complex():
        assert isinstance(angles.target, OpOverload)
        return _both(before, angles.target, _parts(before, source(angles)), *angles.args[1:])
    real = insert_once(before, aten.view_as_real.default, angles)
    return insert_once(before, aten.select.int, real, -1, 0), insert_once(before, aten.select.int, real, -1, 1)


def _both(before: Node, target: OpOverload, parts: tuple[Node, Node], *args: Argument) -> tuple[Node, Node]:
    """One call for each of two parts."""
    cos, sin = parts
    return insert_once(before, target, cos, *args), insert_once(before, target, sin, *args)
