"""QuantizedTensor: eager code, saving, copying, moving and writing, with packed data all the way."""

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcomp.formats import Int4, Int8, names, parse_format
from llmcomp.quantized import QuantizedTensor


def layer(form: str = "int4", k: int = 128, n: int = 20) -> nn.Linear:
    made = nn.Linear(k, n)
    made.weight = nn.Parameter(QuantizedTensor.quantize(made.weight, parse_format(form)), requires_grad=False)
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)
    parts = [(getattr(a, p), getattr(b, p)) for p in ("codes", "scale", "zero")]
    equal = all((x is None and y is None) or torch.equal(x.float(), y.float()) for x, y in parts)
    return equal and (a.format, a.shape, a.dtype) == (b.format, b.shape, b.dtype)


@pytest.mark.parametrize("name", [name for name in names() if not parse_format(name).dynamic])
def test_eager_multiplies_with_what_it_stands_for(name: str) -> None:
    made, x = layer(name), torch.randn(3, 128, requires_grad=True)
    weight = made.weight
    assert isinstance(weight, QuantizedTensor) and isinstance(weight, nn.Parameter)
    assert weight.shape == (20, 128) and weight.dtype == torch.float32
    expected = nn.functional.linear(x, weight.dequantize(), made.bias)
    torch.testing.assert_close(made(x), expected)
    made(x).sum().backward()  # activations get gradients, the weight has none
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 128))


def test_other_operators_see_a_float_matrix() -> None:
    weight = layer().weight
    assert torch.equal(weight + 1, weight.dequantize() + 1)
    assert torch.equal(weight[3:5], weight.dequantize()[3:5])
    assert weight.t().shape == (128, 20) and isinstance(weight.t(), QuantizedTensor)
    assert torch.equal(weight.t() @ torch.eye(20), weight.dequantize().t())


def test_rows_of_a_table_are_looked_up_packed() -> None:
    table = nn.Embedding(30, 64)
    table.weight = nn.Parameter(QuantizedTensor.quantize(table.weight, Int4(32)), requires_grad=False)
    ids = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(table(ids), table.weight.dequantize()[ids])


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "mxfp4"])
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    made = layer(name)
    assert same(copy.deepcopy(made).weight, made.weight)
    if name != "fp8":  # torch 2.13 can't unpickle any float8 tensor, only load what torch.save wrote
        assert same(pickle.loads(pickle.dumps(made)).weight, made.weight)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    assert len(buffer.getvalue()) < 20 * 128 * 2 + 4000  # nothing is saved as floats
    buffer.seek(0)
    other = layer(name)
    other.load_state_dict(torch.load(buffer, weights_only=False))
    assert same(other.weight, made.weight)


def test_a_change_of_dtype_and_of_device_keeps_the_codes() -> None:
    made = layer()
    before = copy.deepcopy(made.weight)
    made.to(torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16 and isinstance(made.weight, QuantizedTensor)
    assert torch.equal(made.weight.codes, before.codes)
    assert made(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    made.to("meta")
    assert made.weight.device.type == "meta" and made.weight.codes.device.type == "meta"


def test_writing_quantizes() -> None:
    made, new = layer(), torch.randn(20, 128)
    codes = made.weight.codes
    with torch.no_grad():
        made.weight.copy_(new)
    assert made.weight.codes is codes  # in place
    assert same(made.weight, QuantizedTensor.quantize(new, Int4()))
    plain = nn.Linear(128, 20)
    made.load_state_dict(plain.state_dict())
    assert same(made.weight, QuantizedTensor.quantize(plain.weight, Int4()))
    with torch.no_grad():
        made.weight.copy_(QuantizedTensor.quantize(new, Int8()))  # another format
    assert same(made.weight, QuantizedTensor.quantize(QuantizedTensor.quantize(new, Int8()).dequantize(), Int4()))


def test_the_float_weight_is_freed() -> None:
    made = nn.Linear(256, 256)
    gone = weakref.ref(made.weight)
    made.weight = nn.Parameter(QuantizedTensor.quantize(made.weight, Int8()), requires_grad=False)
    gc.collect()
    assert gone() is None
    assert made.weight.nbytes == 256 * 256 + 256 * 4


def test_what_is_written_in_place_is_quantized() -> None:
    weight = layer("int8").weight
    before = weight.dequantize()
    with torch.no_grad():
        weight.mul_(0.5)
    torch.testing.assert_close(weight.dequantize(), before / 2, rtol=0.02, atol=1e-4)
    nn.init.zeros_(weight)
    assert not bool(weight.dequantize().any())


def test_lists_of_tensors_and_other_dtypes() -> None:
    weight = layer().weight
    assert torch.equal(torch.cat([weight, weight]), torch.cat([weight.dequantize()] * 2))
    assert torch.empty_like(weight, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("name", ["int8", "fp8", "int4_g32"])
def test_indices_out_of_range_are_refused(name: str) -> None:
    table = nn.Embedding(30, 64)
    table.weight = nn.Parameter(QuantizedTensor.quantize(table.weight, parse_format(name)), requires_grad=False)
    assert torch.equal(table(torch.tensor([29])), table.weight.dequantize()[[29]])
    for index in (-1, 30):
        with pytest.raises(IndexError):
            table(torch.tensor([index]))


def test_memory_may_be_shared() -> None:
    made = layer()
    assert not made.weight.is_shared()
    made.share_memory()
    assert made.weight.is_shared() and made.weight.scale.is_shared()
