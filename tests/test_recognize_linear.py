"""recognize_linear: every product with a matrix on the right becomes llmcomp.linear."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_linear import RECOGNIZE_LINEAR
from tests.graphs import rewrite

PASSES = (RECOGNIZE_LINEAR, CANONICALIZE)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@BOTH
def test_linear_layers_of_every_spelling(dtype: torch.dtype) -> None:
    layer, conv = nn.Linear(4, 6).to(dtype), Conv1D(5, 6).to(dtype)
    matrix = torch.randn(5, 3).to(dtype)

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = conv(layer(x))
        return y @ matrix, F.linear(y[0, 0], matrix.t()), torch.addmm(matrix[0], y[0], matrix)

    printed, results = rewrite(fn, (torch.randn(2, 3, 4).to(dtype),), *PASSES)
    assert results[0].report.rewrites == 5
    if dtype == torch.float32:
        assert_expected_inline(
            printed,
            """\
def (w0: f32[6, 4], w1: f32[6], x0: f32[2, 3, 4], w2: f32[5], w3: f32[6, 5], x1: f32[5, 3])
linear: f32[2, 3, 6] = llmcomp.linear(x0, w0, w1, False)
linear_1: f32[2, 3, 5] = llmcomp.linear(linear, w3, w2, True)
linear_2: f32[2, 3, 3] = llmcomp.linear(linear_1, x1, None, True)
select: f32[3, 5] = aten.select(linear_1, 0, 0)
select_1: f32[5] = aten.select(select, 0, 0)
linear_3: f32[3] = llmcomp.linear(select_1, x1, None, True)
select_2: f32[3] = aten.select(x1, 0, 0)
select_3: f32[3, 5] = aten.select(linear_1, 0, 0)
linear_4: f32[3, 3] = llmcomp.linear(select_3, x1, select_2, True)
return (linear_2, linear_3, linear_4)""",
        )


@pytest.mark.parametrize(
    "turned",
    [
        lambda w: w.t(),
        lambda w: w.mT,
        lambda w: w.transpose(0, 1),
        lambda w: w.permute(1, 0),
        lambda w: w.permute(-1, 0),
    ],
)
def test_a_matrix_may_be_transposed_in_any_spelling(turned: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(5, 4)
    printed, _ = rewrite(lambda x: x @ turned(weight), (torch.randn(3, 4),), *PASSES)
    assert "llmcomp.linear(x1, x0, None, False)" in printed and "transpose" not in printed


def test_sizes_may_be_symbolic() -> None:
    conv = Conv1D(5, 4)

    def fn(x: Tensor) -> Tensor:
        return conv(x).sin()

    printed, _ = rewrite(fn, (torch.randn(2, 3, 4),), *PASSES, dynamic=True)
    assert_expected_inline(
        printed,
        """\
def (x0: s0, x1: s1, x2: f32[s0, s1, 4], w0: f32[5], w1: f32[4, 5])
linear: f32[s0, s1, 5] = llmcomp.linear(x2, w1, w0, True)
sin: f32[s0, s1, 5] = aten.sin(linear)
return (sin)""",
    )


def test_a_view_that_splits_the_last_axis_stays_before_the_product() -> None:
    weight = torch.randn(6, 5)

    def fn(x: Tensor) -> Tensor:
        return (x.view(2, 6) @ weight).sin()

    printed, _ = rewrite(fn, (torch.randn(2, 2, 3),), *PASSES)
    assert_expected_inline(
        printed,
        """\
def (x0: f32[2, 2, 3], x1: f32[6, 5])
view: f32[2, 6] = aten.view(x0, [2, 6])
linear: f32[2, 5] = llmcomp.linear(view, x1, None, True)
sin: f32[2, 5] = aten.sin(linear)
return (sin)""",
    )


def test_other_products_stay_with_the_reason() -> None:
    def fn(i: Tensor, x: Tensor, wide: Tensor, scaled: Tensor) -> tuple[Tensor, ...]:
        plain = i @ i, torch.addmm(wide, x, x), torch.addmm(scaled, x, x, beta=2)
        return *plain, x[None] @ x[None], x @ scaled

    inputs = torch.arange(9).view(3, 3), torch.randn(3, 3), torch.randn(3, 3), torch.randn(3)
    printed, results = rewrite(fn, inputs, *PASSES)
    assert "llmcomp" not in printed
    assert [miss.reason for miss in results[0].report.near_misses] == [
        "the product is of torch.int64",
        "the bias is not a vector of one number per output",
    ]
