"""Grouped products of experts become one operator, and one kernel."""

import torch
import transformers.integrations.moe  # noqa: F401  (registers transformers::grouped_mm_fallback)
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_experts import RECOGNIZE_EXPERTS
from tests.graphs import rewrite
from tests.grouping import grouped


def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)  # type: ignore[no-any-return]


ROWS, WEIGHT, ENDS = torch.randn(7, 4), torch.randn(3, 4, 6), torch.tensor([2, 2, 7], dtype=torch.int32)


def test_a_grouped_product_is_recognized() -> None:
    text, (result,) = rewrite(product, (ROWS, WEIGHT, ENDS), RECOGNIZE_EXPERTS)
    assert_expected_inline(
        text,
        """\
def (x0: f32[7, 4], x1: f32[3, 4, 6], x2: i32[3])
grouped_linear: f32[7, 6] = llmcomp.grouped_linear(x0, x1, x2, True)
return (grouped_linear)""",
    )
    assert result.report.rewrites == 1


def test_transposed_weights_and_any_number_of_rows() -> None:
    def fn(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return product(x, weight.transpose(1, 2), ends)

    weight = torch.randn(3, 6, 4)
    for dtype in (torch.float32, torch.bfloat16):
        rewrite(fn, (ROWS.to(dtype), weight.to(dtype), ENDS), RECOGNIZE_EXPERTS, CANONICALIZE, dynamic=True)


def test_a_product_of_batches_is_left_alone() -> None:
    text, (result,) = rewrite(torch.bmm, (torch.randn(3, 2, 4), WEIGHT), RECOGNIZE_EXPERTS, dynamic=False)
    assert "grouped_linear" not in text and result.report.rewrites == 0


def test_it_is_one_kernel_that_equals_eager() -> None:
    def fn(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.llmcomp.grouped_linear(x, weight, ends, True).relu()

    text, _ = grouped(fn, ROWS, WEIGHT, ENDS)
    assert text.startswith("contract: grouped_linear relu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: product(*a).relu(), backend="llmcomp")(ROWS, WEIGHT, ENDS)
    torch.testing.assert_close(compiled, product(ROWS, WEIGHT, ENDS).relu())


def test_rows_beyond_the_last_expert_are_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        x, weight, ends = torch.randn(9, 4, dtype=dtype), torch.randn(3, 4, 6, dtype=dtype), torch.tensor([2, 2, 7])
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: product(*a) + 1, backend="llmcomp")
        for _ in range(2):  # the second time in memory that the first has written
            result = compiled(x, weight, ends.to(torch.int32))
            torch.testing.assert_close(result, product(x, weight, ends.to(torch.int32)) + 1, atol=2e-2, rtol=2e-2)
            assert (result[7:] == 1).all()
            result.fill_(torch.nan)
            del result
