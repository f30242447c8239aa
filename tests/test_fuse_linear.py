"""Kernels around linear layers: what joins them, and what does not and why."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.passes.base import Pass
from llmcomp.passes.fuse_linear import fuse_epilogue, fuse_prologue, fuse_siblings
from llmcomp.passes.groups import Fits
from tests.grouping import grouped, never

ops = torch.ops.llmcomp


def only_siblings(fits: Fits) -> tuple[Pass, ...]:
    return (fuse_siblings(fits, never),)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x, weight, None, False)  # type: ignore[no-any-return]


def test_layers_of_one_operand_share_a_kernel() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear(x, a), linear(x, b), linear(x, c)

    weights = [torch.randn(n, 8) for n in (8, 4, 4)]
    text, (result,) = grouped(fn, torch.randn(1, 8), *weights, passes=only_siblings)
    assert_expected_inline(text, """contract: linear linear_1 linear_2 -> linear linear_1 linear_2""")
    assert result.report.rewrites == 2


def test_layers_of_different_operands_do_not() -> None:
    def fn(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, a), linear(y, b)

    x, w = torch.randn(1, 8), torch.randn(4, 8)
    text, (result,) = grouped(fn, x, x.clone(), w, w.clone(), passes=only_siblings)
    assert text.count("contract") == 2 and result.report.rewrites == 0


def test_a_layer_left_to_the_library_is_not_taken() -> None:
    def fn(x: Tensor, a: Tensor) -> Tensor:
        return linear(x, a)

    text, _ = grouped(
        fn, torch.randn(1, 8), torch.randn(4, 8), passes=lambda fits: (fuse_siblings(fits, lambda n: True),)
    )
    assert text == "free: linear"


def block(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    normed = ops.rms_norm(x, norm, 1e-6, False, True)
    return x + linear(ops.gated(linear(normed, gate), linear(normed, up), "silu"), down)  # type: ignore[no-any-return]


BLOCK = (torch.randn(1, 8), torch.randn(8), torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12))


def test_norm_and_activation_and_residual_join_their_layers() -> None:
    text, results = grouped(block, *BLOCK)
    assert_expected_inline(
        text,
        """\
contract: rms_norm linear linear_1 gated -> gated
contract: linear_2 add -> add""",
    )
    assert [r.report.rewrites for r in results] == [1, 2, 1, 0]


def test_many_rows_keep_the_norm_apart() -> None:
    text, results = grouped(
        block,
        *BLOCK,
        passes=lambda f: (*only_siblings(f), fuse_epilogue(f), fuse_prologue(f, lambda n: 64, 16)),
    )
    assert "free: rms_norm" in text
    assert [m.reason for m in results[-1].report.near_misses] == ["64 rows: a kernel of its own is cheaper"]


def test_a_norm_that_others_read_stays_apart() -> None:
    def fn(x: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed = ops.rms_norm(x, norm, 1e-6, False, True)
        return normed, normed + linear(normed, weight)

    text, results = grouped(fn, torch.randn(1, 8), torch.randn(8), torch.randn(8, 8))
    assert_expected_inline(
        text,
        """\
rows: rms_norm -> rms_norm
contract: linear add -> add""",
    )
    assert "others read it too" in [m.reason for m in results[2].report.near_misses]


def test_what_needs_another_row_is_refused_with_the_reason() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight).flip(0)

    text, results = grouped(fn, torch.randn(3, 8), torch.randn(4, 8))
    assert text.startswith("contract: linear -> linear")
    (miss,) = results[1].report.near_misses
    assert miss.node == "flip" and "rows" in miss.reason


def test_a_kernel_never_waits_for_itself() -> None:
    """sort stands between the two sums: taking the second into the layer's kernel would be a circle."""

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        y = linear(x, weight)
        return y + torch.sort(y + 1.0)[0]

    text, results = grouped(fn, torch.randn(1, 8), torch.randn(4, 8))
    assert_expected_inline(
        text,
        """\
contract: linear add -> linear add
extern: sort -> sort
extern: getitem -> getitem
map: add_1 -> add_1""",
    )
    assert "it waits for something that needs this kernel" in [m.reason for m in results[1].report.near_misses]
