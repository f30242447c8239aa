"""SmoothQuant: the formula of the paper, and a search that never does worse than nothing."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from llmcomp.dynamic import multiply
from llmcomp.formats import Format, Fp8, Int4, Int8
from llmcomp.moments import Moments
from llmcomp.smoothquant import smoothing_scales

EACH = torch.arange(64)
W8A8 = Int8(dynamic=True)


def error(rows: Tensor, weight: Tensor, scales: Tensor, form: Format) -> float:
    return float((multiply(rows / scales, form.quantize(weight * scales), form) - linear(rows, weight)).norm())


def example(outlier: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(200, 64, generator=generator), torch.randn(16, 64, generator=generator)
    rows[:, 7] *= outlier
    return rows, weight


def test_the_formula() -> None:
    rows, weight = example(50)
    other = torch.randn(4, 64)
    scales = smoothing_scales([weight, other], [W8A8, W8A8], Moments.of(rows), EACH, 0.75)
    most = torch.cat([weight, other]).abs().amax(0)
    torch.testing.assert_close(scales, rows.abs().amax(0) ** 0.75 / most**0.25)


@pytest.mark.parametrize("form", [W8A8, Fp8(dynamic=True)])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_the_search_helps_where_it_can(form: Format, outlier: float) -> None:
    rows, weight = example(outlier)
    scales = smoothing_scales([weight], [form], Moments.of(rows), EACH)
    smoothed, plain = error(rows, weight, scales, form), error(rows, weight, torch.ones(64), form)
    assert smoothed <= plain
    if form is W8A8 and outlier > 1:
        assert smoothed < 0.2 * plain


def test_channels_that_hold_nothing_keep_their_scale() -> None:
    rows, weight = example(50)
    rows[:, 3], weight[:, 4] = 0, 0
    scales = smoothing_scales([weight], [W8A8], Moments.of(rows), EACH, 0.5)
    assert scales[3] == scales[4] == 1 and bool(scales.isfinite().all() & (scales > 0).all())


def test_readers_whose_operands_stay_float_count_too() -> None:
    rows, weight = example(100)
    scales = smoothing_scales([weight, torch.randn(8, 64)], [W8A8, Int4(32)], Moments.of(rows), EACH)
    assert error(rows, weight, scales, W8A8) < 0.5 * error(rows, weight, torch.ones(64), W8A8)
