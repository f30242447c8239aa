"""Experts calibrated on the tokens that are routed to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    NemotronHConfig,
    PreTrainedModel,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import llmcomp
from llmcomp.calibration_method import Method
from llmcomp.errors import FormatError
from llmcomp.expert_calibration import Given, quantized_experts, shrunk, watched
from llmcomp.formats import Int4, names, parse_format
from llmcomp.gptq import gptq
from llmcomp.moments import Moments
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, experts
from tests.quantizable import gpt_oss as any_gpt_oss
from tests.quantizable import mixtral as any_mixtral

FORMATS = [name for name in names() if not parse_format(name).dynamic and parse_format(name).group <= 32]
SPEC = {"*.experts.*": "int4_g32"}
DOWN = "model.layers.{}.mlp.experts.down_proj"


def batches(seed: int = 1, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (4, 64), generator=generator) for _ in range(count)]


def mixtral() -> PreTrainedModel:
    return any_mixtral(spread=0.15)


def gpt_oss() -> PreTrainedModel:
    return any_gpt_oss(spread=0.15)


def nemotron() -> NemotronHExperts:
    """Without a gate."""
    return NemotronHExperts(NemotronHConfig(hidden_size=64, n_routed_experts=4, moe_intermediate_size=96))


@torch.no_grad()
def error(model: nn.Module, exact: nn.Module, data: Sequence[Tensor]) -> float:
    return sum(float((model(ids).logits - exact(ids).logits).norm()) for ids in data)


# ---- what experts are given -----------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes the rows of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.rows.append(args[0].clone())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
def test_inputs_are_the_rows_that_are_multiplied(make: Any) -> None:
    module = next(experts(make())).holders[0]
    module.config._experts_implementation = "eager"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 1]])
    with watched([module]) as given, torch.no_grad(), Products() as products:
        module(torch.randn(5, 64), chosen, torch.rand(5, 2))
    first = "gate_up_proj" if module.has_gate else "up_proj"
    found = [given[module].inputs(key, expert) for expert in (0, 1, 3) for key in (first, "down_proj")]
    assert [len(rows) for rows in products.rows] == [3, 3, 4, 4, 3, 3]
    for rows, expected in zip(found, products.rows, strict=True):  # their order is nobody's concern
        torch.testing.assert_close(rows.t() @ rows, expected.t() @ expected)
    assert given[module].inputs("down_proj", 2).shape == (0, 96)
    module(torch.randn(5, 64), chosen, torch.rand(5, 2))
    assert len(given[module].rows) == 1


# ---- codes ----------------------------------------------------------------------------------------------------------


def site_and_rows(tokens: int) -> tuple[Site, Given]:
    """A site whose expert 0 is given so many rows, and expert 1 a thousand that go together."""
    torch.manual_seed(0)
    site = next(experts(mixtral().requires_grad_(False)))
    mixed = torch.randn(tokens + 1000, 4) @ torch.randn(4, 64) + 0.1 * torch.randn(tokens + 1000, 64)
    chosen = torch.tensor([0] * tokens + [1] * 1000)[:, None]
    return site, Given(site.holders[0], [mixed], [chosen])


@pytest.mark.parametrize("name", FORMATS)
def test_each_expert_is_calibrated_by_itself(name: str) -> None:
    site, given = site_and_rows(0)
    form, rows = parse_format(name), given.rows[0]
    made, told = quantized_experts(site, form, given, Method("gptq"))
    rounded = QuantizedTensor.quantize(site.weight, form)
    off, least = (float(((m.dequantize()[1] - site.weight[1]) @ rows.t()).norm()) for m in (made, rounded))
    assert off < 0.7 * least
    for other in (0, 2, 3):
        assert torch.equal(made[other].codes.view(torch.uint8), rounded[other].codes.view(torch.uint8))
    assert made.shape == rounded.shape and made.codes.shape == rounded.codes.shape
    assert made.scale.shape == rounded.scale.shape and (made.zero is None) == (rounded.zero is None)
    assert told == "3 of 4 experts were given fewer than 4 tokens: 0, 2, 3"


def test_few_tokens_count_for_little() -> None:
    """What few of them have in common is taken for chance: codes are no worse for others than rounded ones."""
    form = Int4(group=32)
    for tokens in (8, 32, 128):
        site, given = site_and_rows(tokens)
        own, others = torch.randn(tokens, 64), torch.randn(4000, 64)  # nothing goes together
        given.rows[0][:tokens] = own
        made, _ = quantized_experts(site, form, given, Method("gptq"))
        weight = site.weight[0]
        codes = form.quantize(weight), gptq(weight, own.t() @ own, form)
        rounded, trusting = (form.dequantize(packed, 64, torch.float32) for packed in codes)
        found, base, bold = (
            float(((m - weight) @ others.t()).norm()) for m in (made.dequantize()[0], rounded, trusting)
        )
        assert found < 1.05 * base and bold > 1.1 * base


def test_what_many_rows_have_in_common_is_kept() -> None:
    _, given = site_and_rows(0)
    moments = Moments.of(given.rows[0])
    torch.testing.assert_close(shrunk(moments).second, moments.second, rtol=0.01, atol=0.01)
    few = shrunk(Moments.of(torch.randn(8, 64))).second
    assert float(few.fill_diagonal_(0).abs().max()) < 0.3 * 8
    dead = torch.randn(100, 64)
    dead[:, 5:] = dead[:, :1]  # all of them one
    dead[:, 40:] = 0
    torch.testing.assert_close(shrunk(Moments.of(dead)).second, dead.t() @ dead, rtol=0.01, atol=0.5)


def test_smoothquant_rounds_and_awq_clips() -> None:
    site, given = site_and_rows(0)
    form = Int4(group=32)
    rounded = QuantizedTensor.quantize(site.weight, form)
    smooth, told = quantized_experts(site, form, given, Method("smoothquant"))
    assert torch.equal(smooth.codes, rounded.codes) and not told
    clipped, _ = quantized_experts(site, form, given, Method("awq"))
    off, least = (float(((m.dequantize()[1] - site.weight[1]) @ given.rows[0].t()).norm()) for m in (clipped, rounded))
    assert off < least


def test_inputs_that_are_not_finite_are_named() -> None:
    site, given = site_and_rows(0)
    given.rows[0][7, 3] = torch.inf
    with pytest.raises(FormatError, match="expert 1 of .*experts.gate_up_proj"):
        quantized_experts(site, Int4(group=32), given, Method("gptq"))


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("method,most", [("gptq", 0.95), ("awq", 0.99), ("awq+gptq", 0.95)])
def test_calibrated_experts_are_nearer_to_the_model(make: type, method: str, most: float) -> None:
    exact, rounded, calibrated = make(), make(), make()
    llmcomp.quantize_(rounded, SPEC)
    done = llmcomp.calibrate(calibrated, batches(), SPEC, method)
    for data in (batches(), batches(seed=2)):  # what it was calibrated on, and other tokens
        assert error(calibrated, exact, data) < most * error(rounded, exact, data)
    sizes = {row.name: (row.shape, str(row.format), row.bytes_after) for row in done.quantized}
    again = llmcomp.quantize_(make(), SPEC)
    assert sizes == {row.name: (row.shape, str(row.format), row.bytes_after) for row in again.quantized}
    assert len(sizes) == 4 and not done.rounded


def uneven() -> PreTrainedModel:
    """Some channels are large where experts and their router read them, and the weights that read them small."""
    model = mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[::16] *= 60
            layer.mlp.experts.gate_up_proj[..., ::16] /= 60
            layer.mlp.gate.weight[:, ::16] /= 60
            layer.mlp.experts.gate_up_proj[:, 96::12] *= 30  # as what the second matrices read
            layer.mlp.experts.down_proj[..., ::12] /= 30
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_scales_spare_large_channels(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact, rounded, calibrated, read = (uneven().to(dtype) for _ in range(4))
    llmcomp.quantize_(rounded, SPEC)
    done = llmcomp.calibrate(calibrated, batches(), SPEC, method, checkpoint=tmp_path)
    assert error(calibrated, exact, batches()) < 0.7 * error(rounded, exact, batches()) and not done.unscaled
    layer, before = calibrated.model.layers[0], exact.model.layers[0]
    assert not torch.equal(layer.post_attention_layernorm.weight, before.post_attention_layernorm.weight)
    steps = (layer.mlp.gate.weight / before.mlp.gate.weight).float().log2()
    assert bool((steps != 0).any()) and (dtype == torch.float32 or torch.equal(steps, steps.round()))
    llmcomp.calibrate(read, batches(), SPEC, method, checkpoint=tmp_path)
    assert error(read, calibrated, batches()) == 0.0


def test_scales_go_into_experts_that_stay_float(tmp_path: Path) -> None:
    exact, rounded, calibrated, read = (uneven() for _ in range(4))
    spec = {"*.experts.down_proj": "int4_g32"}
    llmcomp.quantize_(rounded, spec)
    done = llmcomp.calibrate(calibrated, batches(), spec, "awq", checkpoint=tmp_path)
    assert error(calibrated, exact, batches()) < 0.7 * error(rounded, exact, batches())
    assert len(done.quantized) == 2 and not done.unscaled
    first, before = (m.model.layers[0].mlp.experts.gate_up_proj for m in (calibrated, exact))
    assert not torch.equal(first, before) and torch.equal(first[:, :96], before[:, :96])
    llmcomp.calibrate(read, batches(), spec, "awq", checkpoint=tmp_path)
    assert error(read, calibrated, batches()) == 0.0


def test_what_no_scale_goes_into_is_told() -> None:
    done = llmcomp.calibrate(gpt_oss(), batches(count=1), SPEC, "awq")
    assert done.unscaled == {DOWN.format(i): "its gate does more than multiply" for i in range(2)}
    shared = mixtral()
    norms = [layer.post_attention_layernorm for layer in shared.model.layers]
    norms[1].weight = norms[0].weight
    done = llmcomp.calibrate(shared, batches(count=1), SPEC, "awq")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert "shares a weight" in done.unscaled[name] and f"{name:40} not scaled: " in str(done)


def test_what_is_rounded_is_told(tmp_path: Path) -> None:
    data = [torch.arange(3, 9)[None]]
    done, again = (llmcomp.calibrate(mixtral(), data, SPEC, checkpoint=tmp_path) for _ in range(2))
    assert done.rounded[DOWN.format(1)].split(": ")[0].endswith("experts were given fewer than 6 tokens")
    assert f"{DOWN.format(1):40} rounded: " in str(done) and again == done


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    model = mixtral()
    llmcomp.calibrate(model, batches(), SPEC)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert error(loaded, model, batches()) == 0.0
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, QuantizedTensor)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_a_checkpoint_keeps_them(make: type, tmp_path: Path) -> None:
    models = [make() for _ in range(3)]
    spec = SPEC | {"*.self_attn.*": "int8"}
    whole = llmcomp.calibrate(models[0], batches(), spec, "awq+gptq", checkpoint=tmp_path)
    read = llmcomp.calibrate(models[1], batches(), spec, "awq+gptq", checkpoint=tmp_path)
    (tmp_path / "layer_00001.safetensors").unlink()
    resumed = llmcomp.calibrate(models[2], batches(), spec, "awq+gptq", checkpoint=tmp_path)
    assert whole == read == resumed and any("experts" in row.name for row in read.quantized)
    for model in models[1:]:
        assert error(model, models[0], batches()) == 0.0


def test_dynamic_formats_read_rows_of_experts_as_floats() -> None:
    done = llmcomp.calibrate(mixtral(), batches(count=1), "int8_dynamic", "smoothquant+gptq")
    formats = {row.name: str(row.format) for row in done.quantized}
    assert formats[DOWN.format(0)] == "int8" and formats["model.layers.0.self_attn.q_proj"] == "int8_dynamic"
