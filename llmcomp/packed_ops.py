"""Operators on weights in a storage format (llmcomp/formats.py): `llmcomp::dequantize` and `llmcomp::packed_linear`.

`format` is the name of a format. Importing this module registers the operators, as importing `llmcomp.ops` does for
the others.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.dynamic import multiply
from llmcomp.formats import Packed, parse_format


@custom_op("llmcomp::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int, dtype: torch.dtype
) -> Tensor:
    """The matrix (..., columns) of `dtype` that a quantized one stands for, or some of its rows."""
    return parse_format(format).dequantize(Packed(codes, scale, zero), columns, dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], columns, dtype=dtype)


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
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = form.dequantize(packed, x.shape[-1], wide)
    product = torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    return product.to(x.dtype).contiguous()


@packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])
