"""Experts whose weights are quantized: several matrices in one parameter, rows that pick theirs."""

import copy
from pathlib import Path

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the grouped product)
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
)

import llmcomp
from llmcomp.errors import FormatError
from llmcomp.formats import Int4, Int8, names, parse_format
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.quantize import QUANTIZE
from llmcomp.passes.recognize_experts import RECOGNIZE_EXPERTS
from llmcomp.quantized import QuantizedTensor
from llmcomp.report import GraphReport
from tests.graphs import rewrite
from tests.numerics import assert_equal_float32
from tests.quantizable import gpt_oss, mixtral

E, N, K = 4, 48, 64
FORMATS = [name for name in names() if not parse_format(name).dynamic and parse_format(name).group <= K]
GROUPED = torch.ops.transformers.grouped_mm_fallback
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Rows (T, K) times the matrices of their experts (E, N, K), kept as (E, K, N) where `transposed`."""

    def __init__(self, form: str, transposed: bool) -> None:
        super().__init__()
        weight = torch.randn(E, N, K) / 8
        weight = weight.mT.contiguous() if transposed else weight
        made = QuantizedTensor.quantize(weight, parse_format(form), transposed)
        self.weight, self.transposed = nn.Parameter(made, requires_grad=False), transposed

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight if self.transposed else self.weight.transpose(-2, -1)
        result: Tensor = GROUPED(x, weight, ends)
        return torch.nn.functional.silu(result)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


# ---- the tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_several_matrices_are_each_as_one_alone(name: str, transposed: bool) -> None:
    form, weight = parse_format(name), torch.randn(3, 64, 128 if not transposed else 64)
    made = QuantizedTensor.quantize(weight, form, transposed)
    alone = [QuantizedTensor.quantize(one, form, transposed).dequantize() for one in weight]
    whole = made.dequantize()
    assert made.shape == weight.shape and torch.equal(whole, torch.stack(alone))
    assert isinstance(made[1], QuantizedTensor) and torch.equal(made[1].dequantize(), alone[1])
    for turned in (made.transpose(-2, -1), made.transpose(1, 2), made.permute(0, 2, 1), made.mT):
        assert isinstance(turned, QuantizedTensor) and torch.equal(turned.dequantize(), whole.mT)
    assert torch.equal(made.transpose(0, 1), whole.transpose(0, 1))
    picked = made[torch.tensor([2, 0, 0])]
    assert torch.equal(picked.dequantize() if isinstance(picked, QuantizedTensor) else picked, whole[[2, 0, 0]])
    table = torch.tensor([[2, 0], [0, 1]])
    assert torch.equal(made[table], whole[table])
    assert torch.equal(made[:, 1], whole[:, 1]) and torch.equal(made[torch.tensor(2)].dequantize(), alone[2])
    written = QuantizedTensor.quantize(torch.zeros_like(weight), form, transposed)
    written.copy_(weight)
    assert torch.equal(written.dequantize(), whole) and torch.equal(copy.deepcopy(made).dequantize(), whole)


# ---- the pass -------------------------------------------------------------------------------------------------------

PASSES = (RECOGNIZE_EXPERTS, CANONICALIZE, QUANTIZE)
ROWS = (torch.randn(5, K), torch.tensor([1, 1, 4, 4], dtype=torch.int32))


def test_rows_read_the_codes_of_their_experts() -> None:
    printed, results = rewrite(Experts("int4_g32", False), ROWS, *PASSES, rtol=1e-5)
    assert results[-1].report.rewrites == 1 and not results[-1].report.near_misses
    assert_expected_inline(
        printed.split("\n", 1)[1],
        """\
packed_grouped_linear: f32[5, 48] = llmcomp.packed_grouped_linear(x0, w0, w1, w2, x1, 'int4_g32')
silu: f32[5, 48] = aten.silu(packed_grouped_linear)
return (silu)""",
    )
    other, _ = rewrite(Experts("int4_g32", True), ROWS, *PASSES, rtol=1e-5)
    assert other.split("\n", 1)[1] == printed.split("\n", 1)[1]


def test_what_no_kernel_reads_is_told() -> None:
    _, results = rewrite(Experts("int8_dynamic", False), ROWS, *PASSES, rtol=1e-5)
    reasons = [miss.reason for miss in results[-1].report.near_misses]
    assert results[-1].report.rewrites == 0 and "int8_dynamic" in reasons[0] and "made float" in reasons[1]

    layer = Experts("int8", False)
    square = QuantizedTensor.quantize(torch.randn(E, K, K), Int8())
    layer.weight = nn.Parameter(square, requires_grad=False)
    layer.transposed = True  # multiplied as if it were kept the other way around
    _, results = rewrite(layer, ROWS, *PASSES, rtol=1e-5)
    assert "other side" in results[-1].report.near_misses[0].reason and results[-1].report.rewrites == 0


# ---- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n if n in ("int8", "int4_g32") else pytest.param(n, marks=pytest.mark.slow) for n in FORMATS]
)
@pytest.mark.parametrize("ends, rows", [((0, 1, 1, 2), 2), ((10, 11, 37, 40), 43)])
def test_cpp_kernels(graphs: list[GraphReport], name: str, ends: tuple[int, ...], rows: int) -> None:
    layer, x = Experts(name, False), torch.randn(rows, K)
    weight, expected, start = layer.weight.dequantize().double(), torch.zeros(rows, N, dtype=torch.float64), 0
    for expert, end in enumerate(ends):
        expected[start:end] = x[start:end].double() @ weight[expert].t()
        start = end
    with torch.no_grad():
        found = torch.compile(layer, backend="llmcomp")(x, torch.tensor(ends, dtype=torch.int32))
    assert_equal_float32(found, torch.nn.functional.silu(expected).float())
    (kernel,) = graphs[0].program.kernels
    assert not graphs[0].program.externs and kernel.name == "packed_grouped_linear_silu"
    assert layer.weight.nbytes <= kernel.weight_bytes < layer.weight.nbytes + 64


@pytest.mark.parametrize("make", [mixtral, pytest.param(gpt_oss, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["int4_g32", pytest.param("int8_dynamic", marks=pytest.mark.slow)])
def test_models(graphs: list[GraphReport], make: type, name: str) -> None:
    model = make()
    table = llmcomp.quantize_(model, name)
    assert sum(row.name.endswith(("experts.gate_up_proj", "experts.down_proj")) for row in table.quantized) == 4
    fast = torch.compile(model, backend="llmcomp")
    assert_equal_float32(logits(fast), logits(model))
    with torch.no_grad():
        expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
        assert torch.equal(fast.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    missed = [m.reason for g in graphs for p in g.passes if p.name == "quantize" for m in p.report.near_misses]
    assert graphs and not [reason for reason in missed if "made float" in reason]


# ---- ways in --------------------------------------------------------------------------------------------------------


def test_what_becomes_of_experts() -> None:
    model = mixtral()
    rows = {row.name: row for row in llmcomp.quantize_(model, "int8_dynamic").rows}
    experts = rows["model.layers.0.mlp.experts.down_proj"]
    assert experts.format == Int8() and experts.shape == (4, 64, 96), "rows of experts are not quantized"
    assert experts.bytes_after == 4 * 64 * 96 + 4 * 64 * 4
    rows = {row.name: row for row in llmcomp.quantize_(mixtral(), "int4").rows}
    assert "does not divide its 96 inputs" in rows["model.layers.0.mlp.experts.down_proj"].reason
    chosen = llmcomp.quantize_(mixtral(), {"*.1.mlp.experts.gate_up_proj": "int4_g32"})
    assert [(row.name, row.format) for row in chosen.quantized] == [
        ("model.layers.1.mlp.experts.gate_up_proj", Int4(group=32))
    ]
    named: list[str] = []
    llmcomp.quantize_(mixtral(), lambda name, module: named.append(name))
    assert "model.layers.0.mlp.experts.gate_up_proj" in named
    with pytest.raises(FormatError, match="2:4 sparse"):
        llmcomp.quantize_(mixtral(), {"*.experts.*": "int8_2:4"})
    broken = mixtral()
    broken.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = torch.nan
    with pytest.raises(FormatError, match="layers.1.mlp.experts.down_proj"):
        llmcomp.quantize_(broken, "int8")
    assert not any(isinstance(p, QuantizedTensor) for p in broken.parameters())


def test_the_option_quantizes_experts_too() -> None:
    model, expected = mixtral(), mixtral()
    expected.load_state_dict(model.state_dict())
    llmcomp.quantize_(expected, "int4_g32")
    fast = torch.compile(model, backend="llmcomp", options={"weights": "int4_g32"})
    assert_equal_float32(logits(fast), logits(expected))
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QuantizedTensor)


@pytest.mark.slow
def test_training_in_a_format_leaves_experts_as_floats() -> None:
    rows = {row.name: row for row in llmcomp.train_quantized_(mixtral(), "int8").rows}
    assert "trained as floats" in rows["model.layers.0.mlp.experts.down_proj"].reason


@pytest.mark.parametrize("make", [mixtral, pytest.param(gpt_oss, marks=pytest.mark.slow)])
def test_loading_and_saving(make: type, tmp_path: Path) -> None:
    model, config = make(), llmcomp.QuantizationConfig("int4_g32")
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    llmcomp.quantize_(model, "int4_g32")
    assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again.model.layers[0].mlp.experts.down_proj, QuantizedTensor)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        fresh.model.layers[0].mlp.experts.down_proj.mul_(0)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
