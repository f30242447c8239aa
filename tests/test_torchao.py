"""Models that torchao quantized: compiled as they are, and repacked by quantize_ with the same values."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llmcomp
from llmcomp.quantized import QuantizedTensor

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def configs() -> dict[str, tuple[Callable[[], object], str]]:
    """How torchao is asked, and the format of ours that holds what it makes."""
    ao, rows, groups = torchao, torchao.PerAxis(0), torchao.PerGroup(32)
    return {
        "int8": (lambda: ao.Int8WeightOnlyConfig(), "int8"),
        "w8a8": (lambda: ao.Int8DynamicActivationInt8WeightConfig(), "int8_dynamic"),
        "fp8": (lambda: ao.Float8WeightOnlyConfig(), "fp8"),
        "intx4": (lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups), "int4_g32_symmetric"),
        "intx8": (lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=rows), "int8"),
    }


NAMES = ("int8", "w8a8", "fp8", "intx4", "intx8")


def quantized(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 64)).to(dtype).eval()
    try:
        torchao.quantize_(model, configs()[name][0]())
    except ImportError as missing:
        pytest.skip(f"torchao needs more for this: {missing}")
    return model


def outputs(model: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return model(x)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return bool((a - b).float().norm() < b.float().norm() * {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_they_are(name: str, dtype: torch.dtype) -> None:
    model = quantized(name, dtype)
    torch._dynamo.reset()
    assert close(outputs(torch.compile(model, backend="llmcomp"), dtype), outputs(model, dtype), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_repacked_with_the_same_values(name: str) -> None:
    model, form = quantized(name, torch.float32), configs()[name][1]
    eager = outputs(model, torch.float32)
    weights = [model[i].weight.dequantize() for i in (0, 2)]
    done = llmcomp.quantize_(model, "int4")
    assert [str(row.format) for row in done.rows] == [form, form]
    for i, weight in zip((0, 2), weights, strict=True):
        assert isinstance(model[i].weight, QuantizedTensor)
        torch.testing.assert_close(model[i].weight.dequantize(), weight, rtol=1e-6, atol=0)
    torch._dynamo.reset()
    bar = 0.03 if name == "w8a8" else 1e-5  # torchao divides activations by max / 127.5, we by max / 127
    for run in (model, torch.compile(model, backend="llmcomp")):
        assert (outputs(run, torch.float32) - eager).norm() < eager.norm() * bar


def test_what_no_format_holds_is_left_to_torchao() -> None:
    model = quantized("int8", torch.float32)
    model[0].weight.data.zero_point.fill_(1)
    before = outputs(copy.deepcopy(model), torch.float32)
    done = llmcomp.quantize_(model, "int8")
    assert "torchao's Int8Tensor" in done.left[0].reason and str(done.quantized[0].format) == "int8"
    torch.testing.assert_close(outputs(model, torch.float32), before)


def test_the_option_repacks_too() -> None:
    model = quantized("int8", torch.float32)
    eager = outputs(model, torch.float32)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="llmcomp", options={"weights": "int4"})
    assert close(outputs(fast, torch.float32), eager, torch.float32)
    assert str(model[0].weight.format) == "int8"


def test_they_are_not_trained() -> None:
    model = quantized("int8", torch.float32)
    before = model[0].weight
    (told, _) = llmcomp.train_quantized_(model, "int8").left
    assert "torchao" in told.reason and model[0].weight is before
