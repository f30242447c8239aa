"""Quantized weights through transformers' own from_pretrained and save_pretrained."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.quantizers.auto import AutoHfQuantizer

import llmcomp
from llmcomp.errors import FormatError, OptionError
from llmcomp.quantized import QuantizedTensor
from tests.quantizable import llama, logits

TIED = {"lm_head": None, "*embed_tokens": "int8", "*_proj": "int8"}


def formats(model: torch.nn.Module) -> dict[str, str]:
    return {n: str(p.format) for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "weights", ["int8", "int4", {"*.mlp.*": "nf4", "*.self_attn.*": "int4_g32", "lm_head": None}, TIED]
)
def test_loading_a_float_checkpoint_equals_quantizing_the_model(
    tmp_path: Path, tied: bool, weights: str | Mapping[str, str | None]
) -> None:
    model = llama(tied)
    model.save_pretrained(tmp_path)
    llmcomp.quantize_(model, weights)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=llmcomp.QuantizationConfig(weights), dtype=torch.float32
    )
    assert formats(loaded) == formats(model) and len(formats(model)) >= 14
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["int4", "fp8"])
def test_saving_and_loading_what_was_quantized(tmp_path: Path, tied: bool, weights: str) -> None:
    model = llama(tied)
    llmcomp.quantize_(model, weights)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.up_proj.weight_codes" in names and "model.layers.0.mlp.up_proj.weight" not in names
    noted = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert noted["quant_method"] == "llmcomp" and noted["formats"]["model.layers.0.mlp.up_proj.weight"] == weights
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert formats(loaded) == formats(model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_the_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    llmcomp.quantize_(model, "int8")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_loaded_model_runs_compiled(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    config = llmcomp.QuantizationConfig("int8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    eager = logits(loaded)
    torch._dynamo.reset()
    loaded.compile(backend="llmcomp")
    torch.testing.assert_close(logits(loaded), eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    model = llama()
    llmcomp.quantize_(model, "int4")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :1].repeat(1, 3).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    says = "the checkpoint is incomplete" if damage == "missing" else "does not belong to this model"
    with pytest.raises(FormatError, match=rf"model.layers.1.mlp.up_proj.weight.*{says}"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("weights", ["int5", {"lm_head": "int5"}, {"lm_head": 4}, 4])
def test_unknown_formats_are_refused_where_they_are_written(weights: object) -> None:
    with pytest.raises(OptionError, match="int4|int8"):
        llmcomp.QuantizationConfig(weights)  # type: ignore[arg-type]


def test_registering_twice_changes_nothing() -> None:
    llmcomp.QuantizationConfig()
    merge = AutoHfQuantizer.merge_quantization_configs
    llmcomp.QuantizationConfig()
    assert AutoHfQuantizer.merge_quantization_configs is merge


def test_a_config_may_load_two_models(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = llmcomp.QuantizationConfig("int4")
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32) for _ in "ab"
    )
    first.config.quantization_config.formats["other"] = "int8"
    assert "other" not in second.config.quantization_config.formats and config.formats == {}


def test_the_config_of_a_quantized_model_says_what_became_of_it() -> None:
    model = llama(tied=False)
    llmcomp.quantize_(model, {"*.mlp.*": "int4"})
    llmcomp.quantize_(model, {"lm_head": "int8"})
    noted = model.config.quantization_config
    assert noted.weights["lm_head"] == "int8" and noted.weights["model.layers.0.mlp.up_proj"] == "int4"
    assert len(noted.weights) == 7 == len(noted.formats)
    again = llama(tied=False)
    llmcomp.quantize_(again, noted.weights)
    assert formats(again) == formats(model)
