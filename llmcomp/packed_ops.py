"""Operators on weights in a storage format (llmcomp/formats.py): `llmcomp::dequantize`, `llmcomp::packed_linear` and
`llmcomp::packed_grouped_linear`, and `llmcomp::pack_codes`, which leaves out zeros.

`format` is the name of a format. Importing this module registers the operators, as importing `llmcomp.ops` does for
the others.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.dynamic import multiply
from llmcomp.formats import Packed, parse_format
from llmcomp.ops import wide_linear
from llmcomp.pairs import BLOCK


@custom_op("llmcomp::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int, dtype: torch.dtype
) -> Tensor:
    """The matrix (..., columns) of `dtype` that a quantized one stands for, or some of its rows."""
    return parse_format(format).dequantize(Packed(codes, scale, zero), columns, dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], columns, dtype=dtype)


@custom_op("llmcomp::pack_codes", mutates_args=())
def pack_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int) -> Tensor:
    """The codes of a 2:4 sparse matrix of `format` without those of zeros, as its `two_four` stores them.

    Raises:
        NotTwoFour: it is not 2:4 sparse.
    """
    form = parse_format(format)
    bytes = form.codes(Packed(codes, scale, zero), columns)
    return replace(form, two_four=True).without_zeros(bytes, zero)


@pack_codes.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int) -> Tensor:
    blocks = -(-columns // BLOCK)
    width = (BLOCK * parse_format(format).bits // 2 + BLOCK) // 8
    return codes.new_empty(codes.shape[0], blocks * width, dtype=torch.uint8)


@custom_op("llmcomp::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, format: str
) -> Tensor:
    """x (..., K) times a quantized weight (N, K), plus bias (N,): (..., N), contiguous, dtype of x.

    Where the format is dynamic x is quantized, as llmcomp/dynamic.py says. Otherwise both sides are float32 (float64
    where x is). Kernels accumulate in float32 too, but may round: the weight to the dtype of x where many rows meet
    it, and on a CPU with integer dot products x to a 65,000th (float32: to a 16 millionth) of the largest of 128
    neighbours.
    """
    form, packed = parse_format(format), Packed(codes, scale, zero)
    if form.dynamic:
        product = multiply(x, packed, form)
        return (product if bias is None else product + bias.float()).to(x.dtype)
    return wide_linear(x, form.dequantize(packed, x.shape[-1], torch.float32), bias)


@packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@custom_op("llmcomp::packed_grouped_linear", mutates_args=())
def packed_grouped_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, ends: Tensor, format: str
) -> Tensor:
    """Rows x (T, K) sorted by expert, times quantized weights (E, N, K): (T, N), as `grouped_linear` and
    `packed_linear`.
    """
    form, out, start = parse_format(format), x.new_zeros(x.shape[0], codes.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:  # no other matrix is made float
            packed = Packed(codes[expert], scale[expert], None if zero is None else zero[expert])
            out[start:end] = wide_linear(x[start:end], form.dequantize(packed, x.shape[-1], torch.float32), None)
        start = end
    return out


@packed_grouped_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, ends: Tensor, format: str) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])
