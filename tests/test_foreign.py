"""Checkpoints of GPTQ, AWQ and compressed-tensors through from_pretrained: the same values, and clear refusals."""

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import llmcomp
from llmcomp.errors import FormatError
from llmcomp.quantized import QuantizedTensor
from tests.foreign_checkpoints import Tensors, awq, coded, gptq, packed, write
from tests.numerics import assert_equal_float32
from tests.quantizable import IDS, llama, logits

Pack = Callable[[str, nn.Linear], tuple[Tensors, Tensor]]
F16, BF16 = torch.float16, torch.bfloat16
GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(format: str, **group: object) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], **group}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


def ints(
    pack: Callable[..., Tensors], bits: int, group: int, symmetric: bool, dtype: torch.dtype = F16, act: bool = False
) -> Pack:
    def make(name: str, layer: nn.Linear) -> tuple[Tensors, Tensor]:
        w = coded(layer.weight.detach(), bits, group, symmetric, dtype, act)
        return pack(w), w.numbers()

    return make


def eights(dtype: torch.dtype, whole: bool = False) -> Pack:
    """compressed-tensors with 8 bits and a scale for each row, or one for all of them."""
    most = 127 if dtype == torch.int8 else 448

    def make(name: str, layer: nn.Linear) -> tuple[Tensors, Tensor]:
        weight = layer.weight.detach()
        largest = weight.abs().max().reshape(1) if whole else weight.abs().amax(1, keepdim=True)
        scale = (largest / most).to(BF16)
        codes = (weight / scale.float()).clamp(-most, most)
        codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()

    return make


CASES: dict[str, tuple[dict[str, object], Pack, str]] = {
    "gptq": (GPTQ, ints(gptq, 4, 128, True), "int4_symmetric"),
    "gptq asymmetric": (GPTQ, ints(gptq, 4, 32, False), "int4_g32"),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, ints(partial(gptq, version=2), 4, 64, False), "int4_g64"),
    "gptq desc_act": ({**GPTQ, "desc_act": True}, ints(gptq, 4, 32, True, act=True), "int4_g32_symmetric"),
    "gptq rows": ({**GPTQ, "group_size": -1}, ints(gptq, 4, -1, True), "int4_symmetric"),
    "gptq 8 bits": ({**GPTQ, "bits": 8}, ints(gptq, 8, 32, True), "int8_g32"),
    "gptq 8 bits rows": ({**GPTQ, "bits": 8}, ints(gptq, 8, -1, True), "int8"),
    "awq": (AWQ, ints(awq, 4, 64, False), "int4_g64"),
    "packed": (compressed("pack-quantized"), ints(packed, 4, 128, True, BF16), "int4_symmetric"),
    "packed asymmetric": (compressed("pack-quantized"), ints(packed, 4, 32, False, BF16), "int4_g32"),
    "packed 8 bits": (compressed("pack-quantized"), ints(packed, 8, -1, True), "int8"),
    "int8": (compressed("int-quantized"), eights(torch.int8), "int8"),
    "fp8": (compressed("float-quantized"), eights(torch.float8_e4m3fn), "fp8"),
    "fp8 of the whole": (compressed("float-quantized"), eights(torch.float8_e4m3fn, True), "fp8"),
}


def load(folder: Path, **kwargs: object) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=llmcomp.QuantizationConfig(), dtype=torch.float32, **kwargs
        )


def formats(model: nn.Module) -> dict[str, str]:
    return {n: str(p.format) for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    settings, pack, form = CASES[name]
    model = llama(tied=False)
    write(tmp_path, model, settings, pack)
    loaded = load(tmp_path)
    assert set(formats(loaded).values()) == {form} and len(formats(loaded)) == 14  # the head is float
    for key, value in model.state_dict().items():
        held = loaded.state_dict()[key]
        assert torch.equal(held.dequantize() if isinstance(held, QuantizedTensor) else held, value), key
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "gptq desc_act", "fp8"])
def test_compiled_and_saved_as_ours(tmp_path: Path, name: str) -> None:
    settings, pack, _ = CASES[name]
    write(tmp_path, llama(tied=True), settings, pack, files=3)
    loaded = load(tmp_path)
    eager = logits(loaded)
    loaded.save_pretrained(tmp_path / "ours")
    noted = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert noted["quant_method"] == "llmcomp" and "stored" not in noted
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert formats(again) == formats(loaded) and torch.equal(logits(again), eager)
    torch._dynamo.reset()
    with torch.no_grad():
        explained = llmcomp.explain(copy.deepcopy(loaded), IDS)
    (graph,) = explained.graphs
    read = sum(any("packed_linear" in node for node in k.nodes) for k in graph.program.kernels)
    assert read >= 8 and not any("linear" in x.op for x in graph.program.externs)
    torch._dynamo.reset()
    loaded.compile(backend="llmcomp")
    assert_equal_float32(logits(loaded), eager)


def test_activations_that_are_quantized_token_by_token(tmp_path: Path) -> None:
    write(tmp_path, llama(tied=False), compressed("int-quantized", input_activations=TOKEN), eights(torch.int8))
    assert set(formats(load(tmp_path)).values()) == {"int8_dynamic"}


def test_activations_that_are_not_quantized_as_ours_are_stay_float(tmp_path: Path) -> None:
    static = {**TOKEN, "strategy": "tensor", "dynamic": False}
    model = llama(tied=False)
    write(tmp_path, model, compressed("int-quantized", input_activations=static), eights(torch.int8))
    with pytest.warns(UserWarning, match="activations stay float"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=llmcomp.QuantizationConfig(), dtype=torch.float32
        )
    assert torch.equal(logits(loaded), logits(model))


def test_layers_that_are_left_float(tmp_path: Path) -> None:
    model, pack = llama(tied=False), CASES["gptq"][1]

    def some(name: str, layer: nn.Linear) -> tuple[Tensors, Tensor]:
        return ({"weight": layer.weight.detach()}, layer.weight.detach()) if "down" in name else pack(name, layer)

    write(tmp_path, model, {**GPTQ, "modules_to_not_convert": ["down_proj"]}, some)
    loaded = load(tmp_path)
    assert len(formats(loaded)) == 12 and not any("down" in name for name in formats(loaded))
    assert torch.equal(logits(loaded), logits(model))


def test_a_spec_is_not_asked_and_may_follow(tmp_path: Path) -> None:
    write(tmp_path, llama(tied=False), *CASES["gptq"][:2])
    with pytest.warns(UserWarning, match="'nf4' is not asked for"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=llmcomp.QuantizationConfig("nf4"))
    llmcomp.quantize_(loaded, {"lm_head": "int8"})
    assert formats(loaded)["lm_head.weight"] == "int8" and len(formats(loaded)) == 15


def test_configs_of_other_methods_are_still_those_of_transformers(tmp_path: Path) -> None:
    llmcomp.QuantizationConfig()
    write(tmp_path, llama(tied=False), *CASES["gptq"][:2])
    with pytest.raises(ImportError, match="optimum|gptqmodel"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- bad input ------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


def broken(tmp_path: Path, settings: dict[str, object], pack: Pack, change: Callable[[Tensors], object]) -> Path:
    write(tmp_path, llama(tied=False), settings, pack)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def shortened(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:1].clone()


@pytest.mark.parametrize(
    "case,change,says",
    [
        ("gptq", lambda t: t.pop(f"{UP}.qzeros"), rf"{UP}.qzeros, torch.int32 of shape .*found only"),
        ("gptq", lambda t: t.pop(f"{UP}.qweight"), rf"{UP}.qweight"),
        ("gptq", lambda t: [t.pop(f"{UP}.{k}") for k in gptq(coded(torch.ones(8, 128), 4, 128, True, F16, False))],
         rf"{UP}.weight, quantized or not, found nothing"),
        ("gptq", lambda t: shortened(t, f"{UP}.qweight"), "bits for each"),
        ("gptq", lambda t: t.update({f"{UP}.scales": torch.ones(1, 7, dtype=F16)}), r"any, 256\).*found.*\(1, 7\)"),
        ("gptq", lambda t: t.update({f"{UP}.scales": torch.ones(1, 256, dtype=torch.int8)}), "found torch.int8"),
        ("gptq", lambda t: t.update({f"{UP}.bias": torch.ones(256)}), f"no {UP}.bias"),
        ("gptq desc_act", lambda t: t.pop(f"{UP}.g_idx"), "g_idx where desc_act"),
        ("gptq desc_act", lambda t: t[f"{UP}.g_idx"].fill_(1), "groups of other sizes"),
        ("awq", lambda t: shortened(t, f"{UP}.qweight"), r"\(128, 32\), found.*\(1, 32\)"),
        ("packed", lambda t: t[f"{UP}.weight_shape"].add_(1), "weight_shape to say"),
        ("int8", lambda t: t.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale.*found None"),
        ("int8", lambda t: t.update({f"{UP}.weight_scale": torch.ones(2, 1)}), r"blocks are not supported"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_or_wrong(
    tmp_path: Path, case: str, change: Callable[[Tensors], object], says: str
) -> None:
    folder = broken(tmp_path, *CASES[case][:2], change)
    with pytest.raises(FormatError, match=says):
        load(folder)


def test_experts_that_the_model_fuses_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n or "_proj" in n]:
        made = gptq(coded(tensors.pop(name), 4, 128, True, F16, False))
        tensors |= {name.removesuffix("weight") + part: value for part, value in made.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": GPTQ}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="experts.*not read quantized"):
        load(tmp_path)


def test_the_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            w = coded(module.weight.detach().t(), 4, 64, False, F16, False)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": value for part, value in gptq(w).items()}
            module.weight = nn.Parameter(w.numbers().t())
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    settings = config.to_dict() | {"quantization_config": GPTQ, "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load(tmp_path)
    assert len(formats(loaded)) == 4
    torch.testing.assert_close(logits(loaded), logits(model))


def test_biases_of_zeros_are_no_trouble(tmp_path: Path) -> None:
    folder = broken(tmp_path, *CASES["gptq"][:2], lambda t: t.update({f"{UP}.bias": torch.zeros(256)}))
    assert len(formats(load(folder))) == 14


@pytest.mark.parametrize(
    "settings,pack,says",
    [
        ({**GPTQ, "bits": 3}, ints(gptq, 4, 16, True), "groups of 32, 64, 128"),
        (GPTQ, ints(gptq, 8, 32, False), "zero points.*Int8 is symmetric"),
        ({**GPTQ, "checkpoint_format": "marlin"}, CASES["gptq"][1], "checkpoint_format.*'gptq', 'gptq_v2'"),
        ({**AWQ, "version": "gemv"}, CASES["awq"][1], "'gemm', found 'gemv'"),
        (compressed("nvfp4-pack-quantized"), CASES["int8"][1], "found 'nvfp4-pack-quantized'"),
        ({**compressed("dense"), "sparsity_config": {"format": "sparse-24-bitmask"}}, CASES["int8"][1], "sparsity"),
        ({**compressed("dense"), "transform_config": {"a": 1}}, CASES["int8"][1], "transform"),
    ],
)
def test_what_is_not_supported(tmp_path: Path, settings: dict[str, object], pack: Pack, says: str) -> None:
    write(tmp_path, llama(tied=False), settings, pack)
    with pytest.raises(FormatError, match=says):
        load(tmp_path)
