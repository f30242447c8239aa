"""The pull rule of llmcomp::dequantize: one element of a quantized matrix, or of rows gathered out of one."""

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen.index import Index, size
from llmcomp.codegen.kernel import Argument
from llmcomp.codegen.pull import Puller, compute_dtype, fake
from llmcomp.formats import Format, Int4, Mxfp4, parse_format
from llmcomp.nibbles import BLOCK
from llmcomp.region import Unfit


def dequantize(p: Puller, node: Node, index: Index) -> Argument:
    """llmcomp::dequantize at (..., k), in float32."""
    codes, scale, zero, name = node.args[:4]
    assert isinstance(codes, Node) and isinstance(scale, Node) and isinstance(name, str)
    form, lead, k = parse_format(name), index[:-1], index[-1]
    if form.two_four:
        raise Unfit(f"a single element of {form} is found by counting")
    group = (*lead, p.space.split(k, size(form.group))[0]) if form.group else lead
    saved, p.dtype = p.dtype, torch.float32
    try:
        if form.bits == 8:
            value = p.convert(p.at(codes, index, "codes"), torch.float32)
        else:
            value = _number(p, form, _nibble(p, codes, lead, k))
        if isinstance(zero, Node):
            value = p.op("sub", value, p.convert(p.at(zero, group, "zero"), torch.float32))
        factor = p.at(scale, group, "scale")
        factor = _power(p, factor) if isinstance(form, Mxfp4) else p.convert(factor, torch.float32)
        return p.convert(p.op("mul", value, factor), compute_dtype(fake(node).dtype))
    finally:
        p.dtype = saved


def _nibble(p: Puller, codes: Node, lead: Index, k: sympy.Expr) -> Argument:
    """The 4-bit code k of a row, as int32 (see llmcomp/nibbles.py)."""
    block, rest = p.space.split(k, size(BLOCK))
    half, byte = p.space.split(rest, size(BLOCK // 2))
    value = p.convert(p.at(codes, (*lead, BLOCK // 2 * block + byte), "codes"), torch.int32)
    saved, p.dtype = p.dtype, torch.int32
    try:
        shift = p.convert(p.integer(4 * half), torch.int32)
        return p.op("bitwise_and", p.op("shift_right", value, shift), 15)
    finally:
        p.dtype = saved


def _number(p: Puller, form: Format, code: Argument) -> Argument:
    """What a 4-bit code stands for, before zero and scale."""
    table = form.table
    if table is None:
        raise Unfit(f"{form} has no table of codes")
    if isinstance(form, Int4):
        value = p.convert(code, torch.float32)
        return p.op("sub", value, -table[0]) if table[0] else value
    value = table[0]
    for i, number in enumerate(table[1:], 1):
        value = p.op("where", p.test("eq", code, i), number, value)
    return value


def _power(p: Puller, exponent: Argument) -> Argument:
    """2 ** (exponent - 127) of a stored exponent."""
    return p.op("exp2", p.op("sub", p.convert(exponent, torch.float32), 127.0))
