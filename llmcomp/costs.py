"""What a call moves and computes, by the sizes that were traced: for the report."""

from collections.abc import Sequence
from math import prod

import torch
from torch.fx import Graph, Node

from llmcomp.blocks import numbers_in
from llmcomp.graph import base, is_view
from llmcomp.hints import hint
from llmcomp.products import BLOCKS, PRODUCTS
from llmcomp.region import Region


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(hint(n) for n in node.meta["val"].shape)


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return prod(_shape(node)) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def flops(node: Node) -> int:
    """Floating point operations of a node: 2 for a multiply-add, 1 for each element of anything pointwise."""
    ops, aten = torch.ops.llmcomp, torch.ops.aten
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    if node.target in (*PRODUCTS, aten.linear.default, aten.mm.default,
                       aten.bmm.default, aten.addmm.default, aten.matmul.default):  # fmt: skip
        first = node.args[1] if node.target is aten.addmm.default else node.args[0]
        assert isinstance(first, Node)
        if node.target is BLOCKS:
            return 2 * prod(_shape(node)[:-1]) * _kept(node)
        return 2 * prod(_shape(node)) * _shape(first)[-1]
    if node.target in (ops.attention.default, aten.scaled_dot_product_attention.default):
        q, k, v = (a for a in node.args[:3] if isinstance(a, Node))
        return 2 * prod(_shape(node)[:-1]) * _shape(k)[-2] * (_shape(q)[-1] + _shape(v)[-1])
    return prod(_shape(node))


def _kept(product: Node) -> int:
    """Weights that a product with a matrix stored in blocks reads."""
    codes = product.args[1]
    assert isinstance(codes, Node)
    return numbers_in(_bytes(codes), _shape(product)[-1], product.meta["val"].dtype.itemsize)


def _is_parameter(node: Node) -> bool:
    return node.op == "placeholder" and bool(node.meta.get("static"))


def _read(buffer: Node, readers: Sequence[Node]) -> int:
    """Bytes read of a buffer: a gathered table counts the rows that are taken."""
    taking = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)
    gathers = [n for n in readers if n.target in taking and n.args[0] is buffer]
    if gathers:
        return sum(_bytes(n) for n in gathers)
    return _bytes(buffer)


def kernel_cost(region: Region, buffers: Sequence[Node]) -> tuple[int, int, int]:
    """(bytes, flops, weight bytes) of one launch."""
    total = sum(_read(b, region.nodes) for b in buffers)
    weights = sum(_read(b, region.nodes) for b in buffers if _is_parameter(b))
    return total, sum(flops(n) for n in region.nodes), weights


def extern_cost(node: Node) -> tuple[int, int, int]:
    """(bytes, flops, weight bytes) of one eager call."""
    inputs = node.all_input_nodes
    weights = sum(_read(n, [node]) for n in inputs if _is_parameter(n))
    return _bytes(node) + sum(_read(n, [node]) for n in inputs), flops(node), weights


def work(graph: Graph, once: str) -> tuple[int, int]:
    """(weight bytes, flops) of a call, without nodes that are computed once: those with `once` in their `meta`."""
    weight_bytes = total = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.meta.get(once) or is_view(node):
            continue
        read = {base(n) for n in node.all_input_nodes}
        weight_bytes += sum(_read(n, [node]) for n in read if _is_parameter(n) or n.meta.get(once))
        total += flops(node)
    return weight_bytes, total
