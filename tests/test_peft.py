"""Adapters of PEFT on quantized weights: training, merging, saving."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmcomp
from llmcomp.quantized import QuantizedTensor
from tests.quantizable import IDS, llama, logits

peft = pytest.importorskip("peft", reason="peft is not installed")


def adapted(form: str, model: nn.Module | None = None, trained: bool = True) -> nn.Module:
    """A quantized Llama with adapters; `trained`: they are not zero."""
    if model is None:
        model = llama()
        llmcomp.quantize_(model, form)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=not trained)
    made: nn.Module = peft.get_peft_model(model, config)
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int4", "int8_dynamic"])
def test_gradients_are_those_of_eager(form: str) -> None:
    model = adapted(form).train()
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, QuantizedTensor)
    other = copy.deepcopy(model)
    model(IDS, labels=IDS).loss.backward()
    torch._dynamo.reset()
    torch.compile(other, backend="llmcomp")(IDS, labels=IDS).loss.backward()
    eager, ours = gradients(model), gradients(other)
    assert len(eager) == 8 and eager.keys() == ours.keys()
    bar = 1e-4 if form != "int8_dynamic" else 0.05  # a code of an activation may fall on its neighbour
    for name, gradient in eager.items():
        assert (ours[name] - gradient).norm() <= bar * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_training_lowers_the_loss_and_moves_adapters_alone(compiled: bool) -> None:
    model = adapted("int4", trained=False).train()
    held = {n: p.detach().clone() for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    torch._dynamo.reset()
    run = torch.compile(model, backend="llmcomp") if compiled else model
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = run(IDS, labels=IDS).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        if name in held:
            assert isinstance(parameter, QuantizedTensor) and torch.equal(parameter.codes, held[name].codes)


def test_the_preparation_of_peft_for_few_bits() -> None:
    base = llama().to(torch.bfloat16)
    llmcomp.quantize_(base, "int4")
    model = adapted("int4", peft.prepare_model_for_kbit_training(base)).train()
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert isinstance(weight, QuantizedTensor) and weight.dtype == torch.float32
    model(IDS, labels=IDS).loss.backward()
    assert len(gradients(model)) == 8


@pytest.mark.slow
def test_compiled_with_adapters_reads_packed_weights() -> None:
    model = adapted("int8").eval()
    eager = logits(model)
    torch._dynamo.reset()
    with torch.no_grad():
        explained = llmcomp.explain(copy.deepcopy(model), IDS)
    packed = sum("packed_linear" in node for g in explained.graphs for k in g.program.kernels for node in k.nodes)
    assert packed >= 15
    torch.testing.assert_close(logits(torch.compile(model, backend="llmcomp")), eager, rtol=1e-3, atol=1e-4)


def test_merging_writes_into_the_quantized_weight() -> None:
    model = adapted("int8").eval()
    up = model.base_model.model.model.layers[0].mlp.up_proj
    wanted = up.base_layer.weight.dequantize() + up.get_delta_weight("default")
    before = logits(model)
    merged = model.merge_and_unload()
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, QuantizedTensor) and str(weight.format) == "int8"
    assert torch.equal(weight.dequantize(), QuantizedTensor.quantize(wanted, weight.format).dequantize())
    assert (logits(merged) - before).norm() < 0.02 * before.norm()


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted("int4").eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*"))  # the adapters alone
    base = llama()
    llmcomp.quantize_(base, "int4")
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_adapters_on_a_model_that_was_loaded_quantized(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=llmcomp.QuantizationConfig("int4"), dtype=torch.float32
    )
    assert torch.equal(logits(adapted("int4", base).eval()), logits(adapted("int4").eval()))
