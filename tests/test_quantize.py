"""passes/quantize.py: linear layers read quantized weights as they are stored."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcomp.formats import Int4, Int8, names, parse_format
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.quantize import QUANTIZE
from llmcomp.passes.recognize_linear import RECOGNIZE_LINEAR
from llmcomp.quantized import QuantizedTensor
from tests.graphs import rewrite

PASSES = (RECOGNIZE_LINEAR, CANONICALIZE, QUANTIZE)


def quantized(weight: Tensor, name: str = "int4", transposed: bool = False) -> nn.Parameter:
    made = QuantizedTensor.quantize(weight, parse_format(name), transposed)
    return nn.Parameter(made, requires_grad=False)


def test_layers_of_both_orientations_and_a_table() -> None:
    table, layer, conv = nn.Embedding(10, 128), nn.Linear(128, 6, bias=False), Conv1D(3, 128)
    table.weight = quantized(table.weight, "int8")
    layer.weight = quantized(layer.weight)
    conv.weight = quantized(conv.weight, "int8", transposed=True)

    def fn(ids: Tensor) -> tuple[Tensor, Tensor]:
        x = table(ids)
        return layer(x), conv(x)

    printed, results = rewrite(fn, (torch.tensor([[1, 9]]),), *PASSES, rtol=1e-5)
    assert results[-1].report.rewrites == 2 and not results[-1].report.near_misses
    _, body = printed.split("\n", 1)
    assert_expected_inline(
        body,
        """\
embedding: i8[1, 2, 128] = aten.embedding(w0, x0)
unsqueeze: f32[10, 1] = aten.unsqueeze(w1, 1)
embedding_1: f32[1, 2, 1] = aten.embedding(unsqueeze, x0)
squeeze: f32[1, 2] = aten.squeeze(embedding_1, -1)
dequantize: f32[1, 2, 128] = llmcomp.dequantize(embedding, squeeze, None, 'int8', 128, f32)
packed_linear: f32[1, 2, 6] = llmcomp.packed_linear(dequantize, w2, w3, w4, None, 'int4')
packed_linear_1: f32[1, 2, 3] = llmcomp.packed_linear(dequantize, w6, w7, None, w5, 'int8')
return (packed_linear, packed_linear_1)""",
    )


@pytest.mark.parametrize("name", [name for name in names() if not parse_format(name).dynamic])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_computes_the_same(name: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(128, 5).to(dtype)
    layer.weight = quantized(layer.weight, name)
    rtol = 1e-5 if dtype == torch.float32 else 0.02  # the pass spares the weight a rounding
    _, results = rewrite(layer, (torch.randn(2, 3, 128).to(dtype),), *PASSES, rtol=rtol)
    assert results[-1].report.rewrites == 1


@pytest.mark.parametrize("name", ["int8_dynamic", "fp8_dynamic"])
def test_layers_that_quantize_their_operand_are_captured_as_such(name: str) -> None:
    layer, table = nn.Linear(128, 6), nn.Embedding(10, 128)
    layer.weight, table.weight = quantized(layer.weight, name), quantized(table.weight, name)

    def fn(ids: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return layer(table(ids)), wide @ layer.weight

    printed, results = rewrite(fn, (torch.tensor([[1, 9]]), torch.randn(2, 6)), *PASSES, rtol=1e-5)
    assert f"packed_linear: f32[1, 2, 6] = llmcomp.packed_linear(dequantize, w2, w3, None, w4, '{name}')" in printed
    assert printed.count("packed_linear(") == 1
    assert "other side" in results[-1].report.near_misses[0].reason


def test_floats_are_not_made_to_round() -> None:
    weight = quantized(torch.randn(6, 128), "int8_dynamic")

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return torch.addmm(y, x, weight.t(), beta=2)

    _, results = rewrite(fn, (torch.randn(2, 128), torch.randn(2, 6)), *PASSES, rtol=1e-5)
    assert results[-1].report.rewrites == 0


def test_what_else_reads_the_matrix_is_reported() -> None:
    layer = nn.Linear(128, 6, bias=False)
    layer.weight = quantized(layer.weight)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), layer.weight.sum(0)

    _, results = rewrite(fn, (torch.randn(2, 128),), *PASSES, rtol=1e-5)
    assert results[-1].report.rewrites == 1
    (miss,) = results[-1].report.near_misses
    assert "made float for aten.sum" in miss.reason


def test_from_the_other_side_it_stays_a_float_matrix() -> None:
    weight = quantized(torch.randn(6, 128))

    def fn(x: Tensor) -> Tensor:
        return x @ weight

    printed, results = rewrite(fn, (torch.randn(2, 6),), *PASSES, rtol=1e-5)
    assert results[-1].report.rewrites == 0
    assert "other side" in results[-1].report.near_misses[0].reason
    assert "packed_linear" not in printed


def test_a_float_weight_is_left_alone() -> None:
    printed, results = rewrite(nn.Linear(128, 6), (torch.randn(2, 128),), *PASSES)
    assert results[-1].report.rewrites == 0 and not results[-1].report.near_misses
    assert "packed_linear" not in printed


def test_sizes_may_be_symbolic() -> None:
    layer = nn.Linear(64, 6)
    layer.weight = nn.Parameter(QuantizedTensor.quantize(layer.weight, Int4(32)), requires_grad=False)
    assert Int8().group == 0

    def fn(x: Tensor) -> Tensor:
        return layer(x).relu()

    printed, _ = rewrite(fn, (torch.randn(3, 64),), *PASSES, dynamic=True, rtol=1e-5)
    assert "packed_linear: f32[s0, 6] = llmcomp.packed_linear(" in printed
