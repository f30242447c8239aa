"""AWQ: scales and clips that bring quantized products nearer to the exact ones, and change nothing where they can't."""

import pytest
import torch
from torch import Tensor

from llmcomp.awq import awq_scales, clipped
from llmcomp.formats import Int4, names, parse_format, rounded
from llmcomp.moments import Moments


def loss(rows: Tensor, weight: Tensor, found: Tensor) -> float:
    return float((rows @ (found - weight).t()).norm())


def test_large_inputs_get_large_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(500, 128, generator=generator), torch.randn(32, 128, generator=generator)
    rows[:, 5], rows[:, 77] = rows[:, 5] * 40, rows[:, 77] * 40
    scales = awq_scales([weight, weight[:8]], [Int4(), Int4()], Moments.of(rows), torch.arange(128))
    assert scales.topk(2).indices.sort().values.tolist() == [5, 77]
    folded = rounded(weight * scales, Int4()) / scales
    assert loss(rows, weight, folded) < 0.6 * loss(rows, weight, rounded(weight, Int4()))


def test_inputs_that_are_alike_need_none() -> None:
    rows = torch.ones(4, 128) * torch.tensor([[1.0], [-1.0], [1.0], [1.0]])
    scales = awq_scales([torch.randn(8, 128)], [Int4()], Moments.of(rows), torch.arange(128))
    assert torch.equal(scales, torch.ones(128))
    assert torch.equal(awq_scales([torch.randn(8, 128)], [Int4()], Moments.of(rows * 0), torch.arange(128)), scales)


def test_columns_that_read_one_channel_share_its_scale() -> None:
    rows = torch.randn(300, 128)
    rows[:, 3] *= 100
    channels = torch.arange(64).repeat(2)
    scales = awq_scales([torch.randn(16, 128)], [Int4()], Moments.of(rows), channels)
    assert scales.shape == (64,) and int(scales.argmax()) == 3


@pytest.mark.parametrize("name", [n for n in names() if not n.startswith("fp8")])
def test_clipping_is_for_the_better(name: str) -> None:
    form, generator = parse_format(name), torch.Generator().manual_seed(0)
    rows, weight = torch.randn(400, 256, generator=generator), torch.randn(16, 256, generator=generator) * 0.02
    weight[:, ::32] *= 8
    rows[:, ::32] = 0.01  # large weights that meet next to nothing
    moments = Moments.of(rows)
    better = rounded(clipped(weight, form, moments.second), form)
    limit = 0.999 if form.bits == 8 else 0.9
    assert loss(rows, weight, better) < limit * loss(rows, weight, rounded(weight, form))
