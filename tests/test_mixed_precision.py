"""Formats that a budget chooses: it is held, it goes where it matters, and beats one format for all."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcomp
from llmcomp.errors import OptionError
from llmcomp.formats import Format, bits_per_weight, parse_format
from llmcomp.quantized import QuantizedTensor
from tests.quantizable import llama, mixtral

DATA = [torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]
FOLDER = Path(__file__).parent.parent / "examples" / "tiny_llama"


def bits(model: nn.Module, formats: Mapping[str, Format]) -> float:
    """Bits for each weight, tied ones once."""
    held = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(held[name] if name in held else held[f"{name}.weight"], form) for name, form in formats.items()]
    weights = {id(weight): (weight, form) for weight, form in pairs}
    total = sum(w.numel() * bits_per_weight(f, w.shape) for w, f in weights.values())
    return total / sum(w.numel() for w, _ in weights.values())


@torch.no_grad()
def loss(model: nn.Module, batches: list[Tensor]) -> float:
    return sum(float(model(ids, labels=ids).loss) for ids in batches) / len(batches)


@pytest.mark.parametrize("most", [4.3, 5.0, 6.5, 20.0])
def test_a_budget_in_bits_is_held(most: float) -> None:
    model = llama(spread=0.2)
    before = {name: p for name, p in model.named_parameters()}
    found = llmcomp.assign(model, DATA, llmcomp.Budget(bits=most, formats=("int4", "int4_g32", "int8")))
    assert bits(model, found) <= most and len(found) == 16 and found["lm_head"] == found["model.embed_tokens"]
    assert all(p is before[name] for name, p in model.named_parameters())
    for layer in ("model.layers.0.", "model.layers.1."):
        assert len({found[f"{layer}self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({found[f"{layer}mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    if most > 9:
        assert set(map(str, found.values())) == {"int8"}


def test_it_is_saved_where_it_matters_least() -> None:
    model = llama(tied=False, spread=0.2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)  # what its layer computes in between is hardly felt
    found = llmcomp.assign(model, DATA, llmcomp.Budget(bits=7.0, formats=("int4", "int8")))
    small = {name for name, form in found.items() if str(form) == "int4"}
    assert small >= {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")} and len(small) < 6
    assert "model.embed_tokens" not in found


def test_experts_of_a_layer_are_chosen_for(tmp_path: Path) -> None:
    model, data = mixtral(spread=0.15, hidden=128, intermediate=128), [ids % 100 for ids in DATA]
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1e-4)  # what its experts compute in between is hardly felt
    before = dict(model.named_parameters())
    budget = llmcomp.Budget(bits=6.5, formats=("int4_g32", "int8_dynamic", "int8"))
    found = llmcomp.assign(model, data, budget)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert 6 < bits(model, found) <= 6.5 and len(found) == 2 * 4 + 1 + 2 * 2
    formats = {name: str(form) for name, form in found.items() if "experts" in name}
    assert {formats[f"model.layers.1.mlp.experts.{n}_proj"] for n in ("gate_up", "down")} == {"int4_g32"}
    assert set(formats.values()) == {"int4_g32", "int8"}
    done = llmcomp.calibrate(model, data, budget)
    assert {row.name: row.format for row in done.quantized} == found
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(again.model.layers[1].mlp.experts.down_proj.format) == "int4_g32"
    assert not llmcomp.assign(again, data, budget)


@pytest.mark.slow
def test_it_beats_one_format_for_all() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = torch.tensor([tokenizer((FOLDER / "heldout.txt").read_text())["input_ids"][:4096]]).view(-1, 256)
    data, measured = [ids[:1]], list(ids[10:].split(3))

    def model() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()  # type: ignore[no-any-return]

    exact, uniform, mixed = model(), model(), model()
    linear = {n: parse_format("int4_g64") for n, m in exact.named_modules() if isinstance(m, nn.Linear)}
    budget = llmcomp.Budget(bits=bits(exact, linear), formats=("int4", "int4_g64", "int4_g32", "int8"))
    found = llmcomp.assign(exact, data, budget)
    assert bits(exact, found) <= bits(exact, linear)
    llmcomp.quantize_(uniform, linear)
    llmcomp.quantize_(mixed, found)
    rises = [loss(m, measured) - loss(exact, measured) for m in (uniform, mixed)]
    assert 0 < rises[1] < 0.9 * rises[0]


def test_a_budget_in_perplexity_is_held() -> None:
    model = llama(spread=0.2)
    # What it predicts itself.
    data = [model.generate(ids[:, :4], max_new_tokens=20, do_sample=False, pad_token_id=299) for ids in DATA]
    found = llmcomp.assign(model, data, llmcomp.Budget(rise=0.02, formats=("int4", "int8")))
    assert 4.3 < bits(model, found) < 8.0
    with pytest.raises(OptionError, match=r"found 1e-06: the best of them reach .* on this data"):
        llmcomp.assign(model, data, llmcomp.Budget(rise=1e-6, formats=("int4",)))
    exact = loss(model, data)
    llmcomp.quantize_(model, found)
    assert math.expm1(loss(model, data) - exact) <= 0.0201


def test_weights_that_no_format_fits_stay_float_and_count() -> None:
    model = llama(spread=0.2)
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Linear(128, 200, bias=False)
        layer.mlp.gate_proj, layer.mlp.down_proj = nn.Linear(128, 200, bias=False), nn.Linear(200, 128, bias=False)
    found = llmcomp.assign(model, DATA, llmcomp.Budget(bits=12.0, formats=("int4_g32",)))
    assert len(found) == 14 - 2 + 2 and not any("down_proj" in name for name in found)
    floats = 2 * 200 * 128
    rest = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2) - floats
    least = (32 * floats + 4.75 * rest) / (floats + rest)
    with pytest.raises(OptionError, match=f"at least {least:.3f} bits"):
        llmcomp.assign(model, DATA, llmcomp.Budget(bits=6.0, formats=("int4_g32",)))


def test_quantized_weights_and_training_modes_are_left_alone() -> None:
    model = llama(spread=0.2).train()
    llmcomp.quantize_(model, {"model.layers.0.mlp.up_proj": "int8"})
    found = llmcomp.assign(model, DATA, llmcomp.Budget(bits=8.5, formats=("int4", "int8")))
    assert "model.layers.0.mlp.up_proj" not in found and model.training
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)


@pytest.mark.parametrize(
    "given,says",
    [
        ({}, "bits=None and rise=None"),
        ({"bits": 4.5, "rise": 0.1}, "pass one"),
        ({"bits": 0.0}, "above 0"),
        ({"bits": float("nan")}, "above 0"),
        ({"bits": 4.5, "formats": ()}, "several formats"),
        ({"bits": 4.5, "formats": "int4"}, "several formats"),
        ({"bits": 4.5, "formats": ("int5",)}, "int5"),
        ({"bits": 4.0}, "at least 4.188"),
    ],
)
def test_impossible_budgets(given: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        llmcomp.assign(llama(spread=0.2), DATA, llmcomp.Budget(**given))  # type: ignore[arg-type]
