"""Products of batches of matrices become grouped products, and kernels."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Node

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_bmm import recognize_bmm
from tests.graphs import rewrite
from tests.grouping import fusing, grouped, never

PASS = recognize_bmm(never)
A, B = torch.randn(3, 2, 4), torch.randn(3, 4, 5)


def test_a_batched_product_is_a_grouped_one() -> None:
    text, (result, _) = rewrite(torch.bmm, (A, B), PASS, CANONICALIZE, dynamic=False)
    assert_expected_inline(
        text,
        """\
def (x0: f32[3, 2, 4], x1: f32[3, 4, 5])
arange: i64[3] = aten.arange(3, device=cpu)
add: i64[3] = aten.add(arange, 1)
mul: i64[3] = aten.mul(add, 2)
reshape: f32[6, 4] = aten.reshape(x0, [6, 4])
grouped_linear: f32[6, 5] = llmcomp.grouped_linear(reshape, x1, mul, True)
view: f32[3, 2, 5] = aten.view(grouped_linear, [3, 2, 5])
return (view)""",
    )
    assert result.report.rewrites == 1


def test_symbolic_sizes_and_transposed_operands() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a.transpose(1, 2), b.transpose(1, 2)) + torch.bmm(b, a).transpose(1, 2)

    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(3, 4, 7, dtype=dtype), torch.randn(3, 6, 4, dtype=dtype)
        rewrite(fn, (a, b), PASS, CANONICALIZE, dynamic=True)


def test_products_with_the_same_offsets_share_them() -> None:
    text, (result,) = rewrite(lambda a, b: (a @ b) @ b.transpose(1, 2) @ b, (A, B), PASS)
    assert result.report.rewrites == 3 and text.count("aten.arange(") == 1


def test_doubles_are_left_alone() -> None:
    text, (result,) = rewrite(torch.bmm, (A.double(), B.double()), PASS, dynamic=False)
    assert "grouped_linear" not in text and result.report.near_misses


def test_what_the_library_takes_is_left_to_it() -> None:
    asked: list[Node] = []

    def library(node: Node) -> bool:
        asked.append(node)
        return True

    text, (result,) = rewrite(torch.bmm, (A, B), recognize_bmm(library), dynamic=False)
    assert "grouped_linear" not in text and len(asked) == 1
    assert asked[0].meta["extern_reason"] == "a matrix product of many rows is left to the library"


def test_scale_and_bias_are_its_epilogue() -> None:
    text, _ = grouped(lambda a, b: torch.bmm(a, b) * 0.5 + 1, A, B, passes=lambda fits: (PASS, *fusing(fits)))
    assert_expected_inline(
        text,
        """\
map: mul_tensor -> mul_tensor
contract: grouped_linear_default mul add -> add""",
    )


def test_a_product_that_is_added_is_a_product() -> None:
    text, _ = grouped(torch.baddbmm, B[:, :2], A, B, passes=lambda fits: (PASS, *fusing(fits)))
    assert_expected_inline(
        text,
        """\
map: mul_tensor -> mul_tensor
contract: grouped_linear_default add_tensor -> add_tensor""",
    )
    for scales in ({"beta": 2, "alpha": 0.5}, {"beta": 0}):
        left = rewrite(lambda x, a, b, s=scales: torch.baddbmm(x, a, b, **s), (B[:, :1], A, B), PASS)[0]
        assert ("baddbmm" in left) == (scales["beta"] == 0)


def test_it_equals_eager_at_every_size() -> None:
    compiled = torch.compile(lambda a, b: torch.bmm(a, b).relu(), backend="llmcomp", dynamic=True)
    for batch, rows, depth, columns in ((3, 2, 4, 5), (1, 7, 3, 2), (40, 1, 16, 33), (2, 30, 5, 6)):
        a, b = torch.randn(batch, rows, depth), torch.randn(batch, depth, columns)
        torch.testing.assert_close(compiled(a, b), torch.bmm(a, b).relu())
