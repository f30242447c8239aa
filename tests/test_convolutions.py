"""passes/convolutions.py: convolutions along a sequence are sums of products, or linear layers."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_linear import RECOGNIZE_LINEAR
from tests.graphs import rewrite
from tests.grouping import fusing, grouped

PASSES = (RECOGNIZE_LINEAR, CANONICALIZE)
X = torch.randn(2, 6, 9)


def test_a_filter_for_each_channel_is_a_sum() -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x, weight, bias, padding=1, groups=6)

    text, _ = rewrite(fn, (X, torch.randn(6, 1, 2), torch.randn(6)), *PASSES)
    assert_expected_inline(
        text,
        """\
def (x0: f32[2, 6, 9], x1: f32[6, 1, 2], x2: f32[6])
constant_pad_nd: f32[2, 6, 11] = aten.constant_pad_nd(x0, [1, 1], 0.0)
unsqueeze: f32[6, 1] = aten.unsqueeze(x2, 1)
slice: f32[2, 6, 10] = aten.slice(constant_pad_nd, 2, 0, 10)
select: f32[6, 1] = aten.select(x1, 2, 0)
mul: f32[2, 6, 10] = aten.mul(slice, select)
add: f32[2, 6, 10] = aten.add(unsqueeze, mul)
slice_1: f32[2, 6, 10] = aten.slice(constant_pad_nd, 2, 1, 11)
select_1: f32[6, 1] = aten.select(x1, 2, 1)
mul_1: f32[2, 6, 10] = aten.mul(slice_1, select_1)
add_1: f32[2, 6, 10] = aten.add(add, mul_1)
return (add_1)""",
    )


def test_a_convolution_of_all_channels_is_a_linear_layer() -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x, weight, bias, stride=2, padding=1)

    text, _ = rewrite(fn, (X, torch.randn(4, 6, 3), torch.randn(4)), *PASSES)
    assert_expected_inline(
        text,
        """\
def (x0: f32[2, 6, 9], x1: f32[4, 6, 3], x2: f32[4])
constant_pad_nd: f32[2, 6, 11] = aten.constant_pad_nd(x0, [1, 1], 0.0)
unfold: f32[2, 6, 5, 3] = aten.unfold(constant_pad_nd, 2, 3, 2)
permute: f32[2, 5, 6, 3] = aten.permute(unfold, [0, 2, 1, 3])
reshape: f32[2, 5, 18] = aten.reshape(permute, [2, 5, 18])
reshape_1: f32[4, 18] = aten.reshape(x1, [4, 18])
linear: f32[2, 5, 4] = llmcomp.linear(reshape, reshape_1, x2, False)
permute_1: f32[2, 4, 5] = aten.permute(linear, [0, 2, 1])
clone: f32[2, 4, 5] = aten.clone(permute_1, memory_format=torch.contiguous_format)
return (clone)""",
    )


def test_windows_are_read_where_the_padded_sequence_lies() -> None:
    text, _ = grouped(
        lambda x, w: F.conv1d(x, w, padding=1).relu(),
        X,
        torch.randn(4, 6, 3),
        passes=lambda fits: (*PASSES, *fusing(fits)),
    )
    assert_expected_inline(
        text, """contract: constant_pad_nd_default linear_default relu clone_default -> clone_default"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symbolic_lengths(dtype: torch.dtype) -> None:
    wide, deep = (nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 6, 3), (6, 1, 4)))

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        filtered = F.conv1d(x.transpose(1, 2), deep, padding=6, groups=6, dilation=2)[..., : x.shape[1]]
        return F.silu(filtered), F.conv1d(x.transpose(1, 2), wide, stride=2)

    rewrite(fn, (X.transpose(1, 2).to(dtype),), *PASSES, dynamic=True)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="llmcomp", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 5, 30):
            x = torch.randn(2, length, 6, dtype=dtype)
            for ours, eager in zip(compiled(x), fn(x), strict=True):
                assert ours.stride() == eager.stride()
                torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((6, 1, 9), {"groups": 6}),
        ((6, 1, 2), {"groups": 6, "stride": 2}),
        ((6, 2, 2), {"groups": 3}),
        ((12, 1, 2), {"groups": 6}),
        ((6, 6, 2), {"dilation": 2}),
    ],
)
def test_other_convolutions_are_left_alone(shape: tuple[int, ...], settings: dict[str, int]) -> None:
    text, (result, _) = rewrite(lambda x, w: F.conv1d(x, w, **settings), (X, torch.randn(shape)), *PASSES)
    assert "aten.convolution(" in text and result.report.near_misses


def test_convolutions_of_images_and_of_doubles_are_left_alone() -> None:
    for x, w in ((X[None], torch.randn(3, 2, 2, 2)), (X.double(), torch.randn(3, 6, 2).double())):
        f = F.conv1d if x.dim() == 3 else F.conv2d
        text, (result, _) = rewrite(f, (x, w), *PASSES)
        assert "aten.convolution(" in text and result.report.near_misses
