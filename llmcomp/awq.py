"""AWQ: scales that spare the channels with large inputs, and clipping, by how far the products are off.

Lin et al. 2023 (arXiv:2306.00978). The matrices W (N, K) that read one x (K,) are quantized as W * s and read x / s:
channels with large s are rounded more finely. s = mean|x| ** a, a searched in 0 .. 1 (section 3.2). Then each group of
weights is clipped to a part of its range, searched too. What is minimized, the error of W x summed over calibration
data, comes from its second moment H = sum x x^T: that of a row of errors e is e H e^T.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcomp.formats import AT_ONCE, Format, grouped, rounded
from llmcomp.moments import Moments

GRID = 20  # exponents that are tried
PARTS = tuple(1 - i / 20 for i in range(11))  # of the range of a group, that are tried as clips


def awq_scales(weights: Sequence[Tensor], forms: Sequence[Format], moments: Moments, channels: Tensor) -> Tensor:
    """The scale of each channel, for matrices (N, K) whose column k reads channel `channels[k]`; 1 where it is best."""
    magnitude = _of_channels(moments.magnitude, channels)
    magnitude = (magnitude / magnitude.mean().clamp(min=1e-20)).clamp(min=1e-4)
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(GRID):
        scales = magnitude ** (step / GRID)
        scales /= (scales.max() * scales.min()).sqrt()
        columns = scales[channels]
        loss = sum(_loss(w, rounded(w * columns, f) / columns, moments) for w, f in zip(weights, forms, strict=True))
        if loss < least:
            best, least = scales, loss
    return best


def _of_channels(values: Tensor, channels: Tensor) -> Tensor:
    """The mean over the columns that read a channel: several do where heads share keys and values."""
    size = int(channels.max()) + 1
    total = values.new_zeros(size).index_add_(0, channels, values)
    return total / torch.bincount(channels, minlength=size)


def _loss(weight: Tensor, found: Tensor, moments: Moments) -> float:
    """The squared error of the products of a matrix, for one that stands for it."""
    error = found - weight
    return float(((error @ moments.second) * error).sum())


def clipped(weight: Tensor, form: Format, second: Tensor) -> Tensor:
    """A matrix (N, K), float32, each group of which lies in the part of its range that quantizes best."""
    group = form.group or weight.shape[1]
    blocks = torch.stack([second[k : k + group, k : k + group] for k in range(0, weight.shape[1], group)])
    return torch.cat([_clipped(rows, form, blocks) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))])


def _clipped(rows: Tensor, form: Format, blocks: Tensor) -> Tensor:
    parts = grouped(rows, form.group)
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    best, least = parts, torch.full_like(low, float("inf"))
    for part in PARTS:
        candidate = parts.clamp(low * part, high * part)
        error = grouped(rounded(candidate.flatten(-2), form), form.group) - parts
        loss = (torch.einsum("ngi,gij->ngj", error, blocks) * error).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, candidate, best), torch.minimum(loss, least)
    return best.flatten(-2)
