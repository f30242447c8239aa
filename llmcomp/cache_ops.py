"""The operators of a quantized KV cache: one scale for every row of channels, that is for each (batch, head, token).

    scale = max(|x|) / LEVELS                        float32 (..., 1)
    codes = round(x / scale)                         int8, to the nearest integer; float8, to the nearest float8
    x     ~ codes * scale                            off by at most half a step: scale / 2 for int8

A row that holds an infinity or a NaN comes back as NaN. Importing this module registers the operators.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.ops import laid_out_like, wide

KV_DTYPES: Mapping[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What the option `kv_dtype` may name, and how keys and values are held then."""

LEVELS: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest code of a dtype."""

# Rows of zeros have a scale too. A number that float16 cannot hold, far below what float32 can divide by.
LEAST = 2.0**-100


@custom_op("llmcomp::cache_scale", mutates_args=())
def cache_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales (..., 1) of x (..., D) for codes of `dtype`, in float32, contiguous."""
    largest = x.abs().amax(-1, keepdim=True).to(wide(x.dtype))
    return (largest.clamp_min(LEAST) / LEVELS[dtype]).contiguous()


@cache_scale.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=wide(x.dtype))


@custom_op("llmcomp::cache_quantize", mutates_args=())
def cache_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of x (..., D), laid out as x, given the scales (..., 1) of its rows."""
    steps = (x.to(scale.dtype) / scale).clamp(-LEVELS[dtype], LEVELS[dtype])
    if not dtype.is_floating_point:
        steps = steps.round().nan_to_num(0.0)
    return laid_out_like(x, steps.to(dtype))


@cache_quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@custom_op("llmcomp::cache_dequantize", mutates_args=())
def cache_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes (..., D) with scales (..., 1) stand for, in `dtype`, contiguous."""
    return (codes.to(scale.dtype) * scale).to(dtype).contiguous()


@cache_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(codes.dim() == scale.dim())
    for n, m in zip(codes.shape[:-1], scale.shape[:-1], strict=True):
        torch._check(n == m)
    return codes.new_empty(codes.shape, dtype=dtype)


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes and the scales of x (..., D)."""
    scale: Tensor = torch.ops.llmcomp.cache_scale.default(x, dtype)
    return torch.ops.llmcomp.cache_quantize.default(x, scale, dtype), scale
