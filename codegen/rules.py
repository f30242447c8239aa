"""Every pull rule that is not a plain pointwise formula, by operator."""

import operator
from collections.abc import Mapping
from functools import cache

import torch
from torch.fx import Node

import llmcomp.ops
import llmcomp.packed_ops  # noqa: F401  (both define torch.ops.llmcomp)
from llmcomp.codegen.index import Index, size
from llmcomp.codegen.kernel import Argument
from llmcomp.codegen.pull import Puller, Rule, broadcast, compute_dtype, fake
from llmcomp.codegen.rules_cache import cache_rules
from llmcomp.codegen.rules_packed import dequantize
from llmcomp.codegen.rules_reduce import TUPLES, item, reduce_rules, reduced_dims
from llmcomp.codegen.rules_view import SPLITS, getitem, view_rules
from llmcomp.pointwise import activation

__all__ = ["SPLITS", "TUPLES", "is_reduction", "reduced_dims", "rules"]


def rope(p: Puller, node: Node, index: Index) -> Argument:
    """llmcomp::rope: rotate pairs of channels, half a head apart or (interleaved) side by side."""
    x, cos, sin = node.args[:3]
    assert isinstance(x, Node) and isinstance(cos, Node) and isinstance(sin, Node)
    interleaved = bool(node.args[3])
    channel, extent = index[-1], size(fake(node).shape[-1])
    first, partner = _pair(p, channel, extent, interleaved)
    saved, p.dtype = p.dtype, compute_dtype(fake(node).dtype)
    try:
        here = p.convert(p.at(x, index), p.dtype)
        there = p.convert(p.at(x, (*index[:-1], partner)), p.dtype)
        c = p.convert(p.at(cos, broadcast(index, fake(cos)), "cos"), p.dtype)
        s = p.convert(p.at(sin, broadcast(index, fake(sin)), "sin"), p.dtype)
        turned = p.op("mul", there, s)
        straight = p.op("mul", here, c)
        if isinstance(first, bool):
            return p.op("sub" if first else "add", straight, turned)
        return p.op("add", straight, p.op("where", first, p.op("neg", turned), turned))
    finally:
        p.dtype = saved


def _pair(p: Puller, channel: object, extent: object, interleaved: bool) -> tuple[Argument, object]:
    """(whether `channel` is the first of its pair: known, or a value; the other channel of the pair)."""
    half = extent / 2  # type: ignore[operator]
    if interleaved:
        pair, odd = p.space.split(channel, size(2))
        if odd.is_Integer:
            return odd == 0, channel + 1 - 2 * odd  # type: ignore[operator]
        return p.test("eq", p.named(p.integer(odd), torch.int64), 0), channel + 1 - 2 * odd  # type: ignore[operator]
    if p.space.below(channel, half):
        return True, channel + half  # type: ignore[operator]
    if p.space.at_least(channel, half):
        return False, channel - half  # type: ignore[operator]
    partner = p.space.split(channel + half, extent)[1]  # type: ignore[operator]
    return p.test("lt", p.named(p.integer(channel), torch.int64), p.integer(half)), partner


def gated(p: Puller, node: Node, index: Index) -> Argument:
    """llmcomp::gated: activation(gate) * up."""
    gate, up, name = node.args
    assert isinstance(gate, Node) and isinstance(up, Node)
    saved, p.dtype = p.dtype, compute_dtype(fake(node).dtype)
    try:
        opened = activation(p, str(name), p.convert(p.at(gate, index), p.dtype))
        return p.op("mul", opened, p.convert(p.at(up, index), p.dtype))
    finally:
        p.dtype = saved


def _getitem(p: Puller, node: Node, index: Index) -> Argument:
    value = item(p, node, index)
    return getitem(p, node, index) if value is None else value


def is_reduction(node: Node) -> bool:
    """Whether a node reduces along an axis, or is an item of what does."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and node.args[0].target in TUPLES
    return node.target in reduce_rules() or node.target is torch.ops.llmcomp.cache_scale.default


@cache
def rules() -> Mapping[object, Rule]:
    """Pull rules by operator."""
    ops = torch.ops.llmcomp
    return {
        **view_rules(),
        **reduce_rules(),
        **cache_rules(),
        operator.getitem: _getitem,
        ops.rope.default: rope,
        ops.gated.default: gated,
        ops.dequantize.default: dequantize,
    }
