"""`llmcomp.calibrate`: a decoder quantized on data, layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import llmcomp
from llmcomp.errors import FormatError, OptionError
from llmcomp.quantized import QuantizedTensor
from tests.quantizable import llama as any_llama


def llama() -> LlamaForCausalLM:
    return any_llama(spread=0.2)  # so that what the layers compute is felt in the logits


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, 48), generator=generator) for _ in range(count)]


@torch.no_grad()
def error(model: nn.Module, exact: nn.Module) -> float:
    ids = batches()[0]
    return float((model(ids).logits - exact(ids).logits).norm())


def test_calibrated_weights_are_nearer_to_the_model() -> None:
    exact, rounded, calibrated = llama(), llama(), llama()
    llmcomp.quantize_(rounded, "int4")
    done = llmcomp.calibrate(calibrated, batches(), "int4")
    assert error(calibrated, exact) < 0.9 * error(rounded, exact)
    formats = {row.name: str(row.format) for row in done.quantized}
    assert formats.pop("lm_head") == "int8" and len(formats) == 14 and set(formats.values()) == {"int4"}
    assert calibrated.lm_head.weight is calibrated.model.embed_tokens.weight


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    model = llama()
    llmcomp.calibrate(model, batches(2), {"*.mlp.*": "int4_g32"})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert error(loaded, model) == 0.0
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert not isinstance(loaded.model.layers[0].self_attn.q_proj.weight, QuantizedTensor)


def test_the_transposed_weights_of_gpt2() -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(n_embd=128, n_layer=2, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval()

    exact, rounded, calibrated = gpt2(), gpt2(), gpt2()
    llmcomp.quantize_(rounded, "int4_g32")
    llmcomp.calibrate(calibrated, batches(), "int4_g32")
    assert error(calibrated, exact) < error(rounded, exact)


def test_layers_that_see_different_masks() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=300, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    seen: list[Tensor] = []
    last = model.model.layers[3].mlp.up_proj

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    hook = last.register_forward_pre_hook(note)
    model(batches(1)[0])
    llmcomp.calibrate(model, batches(1), {"model.layers.3.mlp.up_proj": "int8"})
    hook.remove()
    for inputs in seen[1:]:
        torch.testing.assert_close(inputs, seen[0], rtol=1e-4, atol=1e-5)


def uneven() -> LlamaForCausalLM:
    """A Llama some of whose channels are large where matrices read them, and the weights that read them small."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[::16] *= 60
                for reader in readers:
                    reader.weight[:, ::16] /= 60
    return model


@pytest.mark.parametrize(
    "method,form",
    [("awq", "int4"), ("awq+gptq", "int4"), ("smoothquant", "int8_dynamic"), ("smoothquant+gptq", "int8_dynamic")],
)
def test_scales_spare_large_channels(method: str, form: str) -> None:
    exact, rounded, calibrated = uneven(), uneven(), uneven()
    llmcomp.quantize_(rounded, {"model.layers.*": form})
    done = llmcomp.calibrate(calibrated, batches(2), {"model.layers.*": form}, method)
    assert error(calibrated, exact) < 0.6 * error(rounded, exact)
    assert len(done.quantized) == 14 and not done.unscaled
    assert not torch.equal(
        calibrated.model.layers[0].input_layernorm.weight, exact.model.layers[0].input_layernorm.weight
    )


def test_what_no_scale_goes_into_is_told() -> None:
    config = GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    done = llmcomp.calibrate(GPT2LMHeadModel(config).eval(), batches(1), {"*.mlp.*": "int4_g32"}, "awq")
    assert done.unscaled.keys() == {"transformer.h.0.mlp.c_proj"} and "not scaled: what it reads" in str(done)


def test_a_reader_that_stays_in_half_precision_is_scaled_without_loss() -> None:
    model = uneven().bfloat16()
    before = model.model.layers[0].self_attn.k_proj.weight.clone()
    llmcomp.calibrate(model, batches(1), {"*.q_proj": "int4"}, "awq")
    ratio = model.model.layers[0].self_attn.k_proj.weight.float() / before.float()
    assert bool((ratio != 1).any()) and torch.equal(ratio.log2().round().exp2(), ratio)


def test_what_no_token_reaches_is_rounded_and_told() -> None:
    model = llama()
    model.model.layers[1].mlp.spare = nn.Linear(128, 128)
    done = llmcomp.calibrate(model, batches(1), "int4")
    assert done.rounded == {"model.layers.1.mlp.spare": "no token reached it"}
    assert isinstance(model.model.layers[1].mlp.spare.weight, QuantizedTensor)


def test_a_budget_is_spent_before() -> None:
    model = llama()
    done = llmcomp.calibrate(model, iter(batches(2)), llmcomp.Budget(bits=5.0, formats=("int4", "int8")))
    formats = {str(row.format) for row in done.quantized}
    assert formats == {"int4", "int8"} and not done.left[1:]  # the embedding is the head's


def test_dropout_is_off_meanwhile() -> None:
    model = llama().train()
    llmcomp.calibrate(model, batches(1), "int8")
    assert model.training and model.model.layers[0].training


def test_weights_that_layers_share_stay_shared() -> None:
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    llmcomp.calibrate(model, batches(1), "int4")
    assert isinstance(first.up_proj.weight, QuantizedTensor) and second.up_proj.weight is first.up_proj.weight


def test_a_weight_that_is_not_finite_is_named_before_anything_is_done() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj"):
        llmcomp.calibrate(model, batches(1), "int4")
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


@pytest.mark.parametrize(
    "model,data,spec,method,raised,says",
    [
        (llama, [], "int4", "gptq", FormatError, "batches of token ids"),
        (llama, [torch.ones(3)], "int4", "gptq", FormatError, "float32 of shape"),
        (llama, batches(1), "int5", "gptq", OptionError, "int4"),
        (llama, batches(1), "int4", "gtpq", OptionError, "smoothquant.*found 'gtpq'"),
        (llama, batches(1), "int4", "smoothquant", OptionError, "int8_dynamic"),
        (llama, batches(1), llmcomp.Budget(bits=2), "gptq", OptionError, "at least 4"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), batches(1), "int8", "gptq", FormatError, "decoder"),
    ],
)
def test_refusals_leave_the_model_untouched(
    model: object, data: list[Tensor], spec: str, method: str, raised: type[Exception], says: str
) -> None:
    made = model()  # type: ignore[operator]
    with pytest.raises(raised, match=says):
        llmcomp.calibrate(made, data, spec, method)
    assert not any(isinstance(p, QuantizedTensor) for p in made.parameters())
