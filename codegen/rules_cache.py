"""Pull rules of the operators of a quantized cache: scales of rows, codes, and what codes stand for."""

from collections.abc import Mapping

import torch
from torch.fx import Node

from llmcomp.cache_ops import LEAST, LEVELS
from llmcomp.codegen.index import ZERO, Index
from llmcomp.codegen.kernel import Argument
from llmcomp.codegen.pull import Puller, Rule, compute_dtype, fake
from llmcomp.codegen.rules_reduce import Along
from llmcomp.graph import base
from llmcomp.region import Unfit


def cache_scale(p: Puller, node: Node, index: Index) -> Argument:
    """max(|x|) / LEVELS, along the channels."""
    source, dtype = _source(node), torch.float32
    rank = fake(source).dim()
    row = Along(p, node, source, (rank - 1,), index[:-1])
    largest = row.reduce("max", dtype, lambda x: p.op("abs", x))
    saved, p.dtype = p.dtype, dtype
    try:
        return p.op("div", p.op("maximum", largest, LEAST), _levels(node))
    finally:
        p.dtype = saved


def _source(node: Node, position: int = 0) -> Node:
    source = node.args[position]
    assert isinstance(source, Node)
    return source


def _levels(node: Node) -> float:
    dtype = node.args[-1]
    assert isinstance(dtype, torch.dtype)
    return LEVELS[dtype]


def cache_quantize(p: Puller, node: Node, index: Index) -> Argument:
    """round(x / scale)"""
    dtype, levels = fake(node).dtype, _levels(node)
    saved, p.dtype = p.dtype, torch.float32
    try:
        x = p.convert(p.at(_source(node), index), p.dtype)
        steps = p.op("div", x, p.at(_source(node, 1), (*index[:-1], ZERO), "scale"))
        steps = p.op("minimum", p.op("maximum", steps, -levels), levels)
        if dtype.is_floating_point:
            return steps
        # What has no number, in a row with an infinity, is 0 times NaN later on.
        number = p.test("eq", steps, steps)
        return p.convert(p.op("where", number, p.op("round_even", steps), 0.0), dtype)
    finally:
        p.dtype = saved


def cache_dequantize(p: Puller, node: Node, index: Index) -> Argument:
    """codes * scale"""
    if fake(_source(node)).dtype.is_floating_point and not p.in_memory(base(_source(node))):
        raise Unfit("codes in float8 are rounded where they are stored")
    saved, p.dtype = p.dtype, torch.float32
    try:
        codes = p.convert(p.at(_source(node), index, "codes"), p.dtype)
        value = p.op("mul", codes, p.at(_source(node, 1), (*index[:-1], ZERO), "scale"))
    finally:
        p.dtype = saved
    return p.convert(p.rounded(value, fake(node).dtype), compute_dtype(fake(node).dtype))


def cache_rules() -> Mapping[object, Rule]:
    """Rules by operator."""
    ops = torch.ops.llmcomp
    return {
        ops.cache_scale.default: cache_scale,
        ops.cache_quantize.default: cache_quantize,
        ops.cache_dequantize.default: cache_dequantize,
    }
