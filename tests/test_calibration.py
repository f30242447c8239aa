"""`llmcomp.calibrate`: a decoder quantized on data, layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

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


@pytest.mark.parametrize(
    "model,data,spec,raised,says",
    [
        (llama, [], "int4", FormatError, "batches of token ids"),
        (llama, batches(1), "int5", OptionError, "int4"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), batches(1), "int8", FormatError, "decoder"),
    ],
)
def test_refusals_leave_the_model_untouched(
    model: object, data: list[Tensor], spec: str, raised: type[Exception], says: str
) -> None:
    made = model()  # type: ignore[operator]
    with pytest.raises(raised, match=says):
        llmcomp.calibrate(made, data, spec)
    assert not any(isinstance(p, QuantizedTensor) for p in made.parameters())
