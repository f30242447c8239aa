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

import llmcomp
from llmcomp.formats import Int4, Int8, Packed, names, parse_format
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


@pytest.mark.parametrize("name", [name for name in names() if name != "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_weights_stay_finite(name: str, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for signs in (torch.ones(4, 128), -torch.ones(4, 128), torch.tensor([1.0, -1.0]).repeat(4, 64)):
        weight = (signs * most).to(dtype)
        kept = QuantizedTensor.quantize(weight, parse_format(name)).dequantize()
        torch.testing.assert_close(kept.double(), weight.double(), rtol=0.13, atol=0)


def test_a_file_is_loaded_without_running_code_from_it(tmp_path: Path) -> None:
    made = layer("int4")
    torch.save(made.state_dict(), tmp_path / "layer.pt")
    with pytest.raises(pickle.UnpicklingError, match="safe_globals"):
        torch.load(tmp_path / "layer.pt")
    with torch.serialization.safe_globals(llmcomp.safe_globals()):
        assert same(torch.load(tmp_path / "layer.pt")["weight"], made.weight)


# ---- other dtypes of scales, other orders of columns ----------------------------------------------------------------


def ordered(name: str = "int4_g32", scale: torch.dtype = torch.float16) -> QuantizedTensor:
    """A weight whose columns are stored in another order, with scales as others store them."""
    made = QuantizedTensor.quantize(torch.randn(20, 128), parse_format(name))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    packed = Packed(made.codes, made.scale.to(scale), made.zero)
    return QuantizedTensor(packed, made.format, made.shape, made.dtype, order=order)


def test_columns_in_another_order() -> None:
    weight = ordered()
    matrix = weight.format.dequantize(weight.packed, 128, torch.float32)
    assert torch.equal(weight.dequantize()[:, weight.order], matrix)
    x = torch.randn(3, 128)
    torch.testing.assert_close(nn.functional.linear(x, weight), x @ weight.dequantize().t())
    ids = torch.tensor([3, 0])
    assert torch.equal(nn.functional.embedding(ids, weight), weight.dequantize()[ids])
    for copied in (copy.deepcopy(weight), weight.clone(), weight.t().t(), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(copied.dequantize(), weight.dequantize())


@pytest.mark.parametrize("scale", [torch.float16, torch.float32])
def test_writing_keeps_order_and_scales_as_they_are_stored(scale: torch.dtype) -> None:
    weight, new = ordered("int8_g32", scale), torch.randn(20, 128)
    weight.copy_(new)
    assert weight.scale.dtype == scale
    torch.testing.assert_close(weight.dequantize(), new, rtol=0, atol=0.02)
    other = ordered("int8_g32", scale)
    other.copy_(weight)
    assert torch.equal(other.dequantize(), weight.dequantize())
    weight.copy_(torch.full((20, 128), 1e-9))  # a scale that float16 can't hold
    assert bool(weight.dequantize().isfinite().all()) and float(weight.dequantize().abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["int4_g32", "int4_symmetric", "int8_g64"])
@pytest.mark.parametrize("scale", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [2, 20])
def test_kernels_read_other_scales_and_orders(name: str, scale: torch.dtype, rows: int) -> None:
    made, x = nn.Linear(128, 20).eval(), torch.randn(rows, 128)
    made.weight = nn.Parameter(ordered(name, scale), requires_grad=False)
    torch._dynamo.reset()
    with torch.no_grad():
        (graph,) = llmcomp.explain(made, x).graphs
        assert any("packed_linear" in node for k in graph.program.kernels for node in k.nodes)
        assert not graph.program.externs
        torch.testing.assert_close(torch.compile(made, backend="llmcomp")(x), made(x), rtol=1e-4, atol=1e-4)


def test_gradients_go_back_through_columns_in_another_order() -> None:
    made, eager = nn.Linear(128, 20), torch.randn(3, 128, requires_grad=True)
    made.weight = nn.Parameter(ordered(), requires_grad=False)
    ours = eager.detach().clone().requires_grad_()
    made(eager).square().sum().backward()
    torch._dynamo.reset()
    torch.compile(made, backend="llmcomp")(ours).square().sum().backward()
    torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-4, atol=1e-4)


def test_autocast_reads_packed_weights() -> None:
    made, x = layer("int8").eval(), torch.randn(2, 128)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (graph,) = llmcomp.explain(made, x).graphs
    assert any("packed_linear" in node for k in graph.program.kernels for node in k.nodes)
