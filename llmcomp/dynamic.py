"""Products of quantized weights with activations that are quantized too, token by token.

    codes, scale = quantize_tokens(x)              scale = max |x| / 127 (fp8: 448), codes = round(x / scale)
    sums = codes . weight codes                    int32, exact (fp8: float32)
    result = sums * scale * weight scale           float32

Codes are those of `Format.round`: to nearest, ties to even, clipped. A token of zeros gives zeros; one that holds NaN
or infinity gives NaN, in all of its results.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmcomp.formats import Format, Fp8, Packed

EXACT = 1024  # products of two codes of int8 that float32 adds up without rounding: 127 * 127 * 1024 < 2 ** 24


def quantize_tokens(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """The codes of tokens (..., K), and the scale of each: (..., 1) float32."""
    tokens = x.float()
    scale = form.scales(tokens)[0]
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return form.round(tokens, scale, None), scale.unsqueeze(-1)


def multiply(x: Tensor, packed: Packed, form: Format) -> Tensor:
    """Tokens x (..., K) times a weight (N, K) of a dynamic format: (..., N) float32."""
    assert form.dynamic
    codes, scale = quantize_tokens(x, form)
    return _sums(codes, packed.codes, form).float() * scale * packed.scale


def _sums(x: Tensor, weight: Tensor, form: Format) -> Tensor:
    """Sums of products of codes along the last dimension: int32, which few devices multiply matrices of, or float32."""
    if isinstance(form, Fp8):
        return linear(x.float(), weight.float())
    parts = zip(x.split(EXACT, -1), weight.split(EXACT, -1), strict=True)
    total = torch.zeros(*x.shape[:-1], len(weight), dtype=torch.int32, device=x.device)
    for some, rows in parts:
        total += linear(some.float(), rows.float()).int()
    return total
