"""SmoothQuant: scales that move large activations into weights, for formats that quantize both.

Xiao et al. 2022 (arXiv:2211.10438), equation 4: a channel that matrices W read is divided by
s = max |x| ** alpha / max |W[:, k]| ** (1 - alpha), the maxima over calibration data and over all rows of the matrices.
Where alpha is not given it is searched for, s = 1 among what is tried: what is minimized is the error of the products
of a sample of the inputs, as the format computes them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmcomp.dynamic import multiply
from llmcomp.formats import Format, rounded
from llmcomp.moments import Moments

ALPHAS = tuple(i / 10 for i in range(11))


def smoothing_scales(
    weights: Sequence[Tensor],
    forms: Sequence[Format],
    moments: Moments,
    channels: Tensor,
    alpha: float | None = None,
) -> Tensor:
    """The scale of each channel, for matrices (N, K) whose column k reads channel `channels[k]`.

    Channels that are always zero, and those that no weight reads, get 1.
    """
    size = int(channels.max()) + 1
    of_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    x, w = (torch.zeros_like(v[:size]).scatter_reduce_(0, channels, v, "amax") for v in (moments.largest, of_weights))

    def scales(alpha: float) -> Tensor:
        return torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), 1.0)

    if alpha is not None:
        return scales(alpha)
    best, least = torch.ones_like(x), _loss(weights, forms, moments.sample, torch.ones_like(channels))
    for tried in map(scales, ALPHAS):
        if (loss := _loss(weights, forms, moments.sample, tried[channels])) < least:
            best, least = tried, loss
    return best


def _loss(weights: Sequence[Tensor], forms: Sequence[Format], rows: Tensor, columns: Tensor) -> float:
    """The squared error of the products of inputs (some, K) and matrices whose columns are scaled."""
    errors = [
        _product(rows / columns, w * columns, form) - linear(rows, w) for w, form in zip(weights, forms, strict=True)
    ]
    return sum(float((error**2).sum()) for error in errors)


def _product(rows: Tensor, weight: Tensor, form: Format) -> Tensor:
    return multiply(rows, form.quantize(weight), form) if form.dynamic else linear(rows, rounded(weight, form))
