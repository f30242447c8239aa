"""`prune_`: what is pruned, what is left, refusals; masks hold in training and are found again after saving."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import llmcomp
from llmcomp import prune_data
from llmcomp.errors import FormatError, LlmcompError, OptionError, PruneError
from llmcomp.masks import masks
from llmcomp.pruning import prune_
from llmcomp.pruning_schedule import PruningSchedule
from llmcomp.quantization import quantize_
from llmcomp.sparsegpt import sparsegpt
from llmcomp.sparsity import NM, Block, Magnitude, Movement, SparseGPT, Wanda, Zeros
from tests.quantizable import IDS, llama, logits

DATA = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def of_pattern(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    return bool(((weight != 0).unflatten(1, (-1, m)).sum(-1) <= n).all())


def test_all_layers_but_the_head() -> None:
    model = llama(tied=False)
    done = prune_(model, "50%")
    assert len(done.pruned) == 14 and {r.sparsity for r in done.pruned} == {0.5}
    assert {r.name: r.reason for r in done.left} == {
        "model.embed_tokens": "it is an embedding",
        "lm_head": "it gives logits",
    }
    assert "50.00% zero" in str(done) and "left alone: it gives logits" in str(done)


def test_the_smallest_go() -> None:
    model, before = llama(), llama()
    prune_(model, Magnitude(0.3))
    weight, original = model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight[weight != 0], original[weight != 0])
    assert original[weight == 0].abs().max() <= weight[weight != 0].abs().min()


def test_global_takes_more_where_weights_are_small() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.mul_(0.1)
    done = prune_(model, Magnitude(0.5, scope="global"))
    assert done.sparsity == 0.5 and done.rows[0].sparsity > 0.8 > 0.2 > done.rows[1].sparsity


def test_blocks_go_as_a_whole() -> None:
    model = llama()
    done = prune_(model, Block(0.5, 8, 16))
    assert all(abs(r.sparsity - 0.5) < 0.02 for r in done.pruned)
    for layer in model.model.layers:
        for weight in (layer.mlp.down_proj.weight, layer.self_attn.q_proj.weight):
            zero = (weight == 0).unflatten(1, (-1, 16)).unflatten(0, (-1, 8))
            assert torch.equal(zero.all(3).all(1), zero.any(3).any(1))
    convs = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300))
    prune_(convs, Block(0.5, 32, 1))
    zero = convs.transformer.h[0].attn.c_attn.weight == 0
    assert 32 * zero.unflatten(1, (-1, 32)).all(2).sum() == zero.sum()
    done = prune_(llama(), Block(0.5, 1024, 16))
    assert not done.pruned and "smaller than a block of 1024 x 16" in done.left[1].reason


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_along_the_inputs(criterion: str) -> None:
    model = llama()
    prune_(model, NM(2, 4, criterion), DATA)
    for layer in model.model.layers:
        assert of_pattern(layer.mlp.down_proj.weight) and of_pattern(layer.self_attn.q_proj.weight)
    convs = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300))
    prune_(convs, NM(2, 4, criterion), DATA)
    assert of_pattern(convs.transformer.h[0].attn.c_attn.weight.t())


@pytest.mark.parametrize("spec", [Wanda(0.5), SparseGPT(0.5)])
def test_data_makes_the_output_closer(spec: Wanda | SparseGPT) -> None:
    dense = llama(spread=0.1)
    with torch.no_grad():  # a few channels are large, as in trained models
        for layer in dense.model.layers:
            layer.input_layernorm.weight[::8] *= 10
            layer.post_attention_layernorm.weight[::8] *= 10
    errors = []
    for by in (spec, Magnitude(0.5)):
        model = copy.deepcopy(dense)
        assert prune_(model, by, [IDS] if by is spec else None).pruned[0].sparsity == pytest.approx(0.5, abs=0.01)
        errors.append(float((logits(model) - logits(dense)).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_patterns_of_names_and_functions_choose() -> None:
    model = llama(tied=False)
    done = prune_(model, {"*.mlp.down_proj": None, "*.mlp.*": "2:4", "model.embed_tokens": "25%"})
    by = {r.name.split(".")[-1]: r.by for r in done.rows}
    assert by["up_proj"] == NM(2, 4) and by["embed_tokens"] == Magnitude(0.25) and by["down_proj"] is None
    assert by["q_proj"] is None
    done = prune_(llama(), lambda name, module: "50%" if name.endswith("q_proj") else None)
    assert len(done.pruned) == 2


def test_what_does_not_fit_is_left_and_listed() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(6, 4), nn.Linear(128, 4))
    quantize_(model, {"2": "int8"})
    done = prune_(model, "2:4")
    assert [r.name for r in done.pruned] == ["0"]
    assert "does not divide its 6 inputs" in done.left[0].reason and "int8" in done.left[1].reason


REMOVE = r"torch.nn.utils.prune.remove\(module, \"weight\"\)"


def test_what_torch_prunes_is_left_and_listed() -> None:
    model = llama(tied=False)
    mlp = model.model.layers[0].mlp
    torch_prune.l1_unstructured(mlp.gate_proj, "weight", 0.5)
    name = "model.layers.0.mlp.gate_proj"
    for spec in ("2:4", Zeros(), Wanda(0.5)):
        done = prune_(model, spec, DATA)
        reason = {row.name: row.reason for row in done.left}[name]
        assert re.search(REMOVE, reason) and name not in {row.name for row in done.pruned}
    schedule = PruningSchedule(model, Movement(0.5), 5)
    assert name in {row.name for row in schedule.report().left}
    for spec in ({"*.gate_proj": "2:4"}, lambda name, module: "2:4", llmcomp.Structured(channels=0.25)):
        with pytest.raises(PruneError, match=REMOVE):
            prune_(model, spec)
    torch_prune.remove(mlp.gate_proj, "weight")
    assert name in {row.name for row in prune_(model, Zeros()).pruned}
    prune_(model, llmcomp.Structured(channels=0.25))


def test_a_schedule_of_nothing() -> None:
    model = nn.Linear(8, 8)
    torch_prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(PruneError, match=REMOVE):
        PruningSchedule(model, Movement(0.5), 5)


def test_weights_that_are_parametrized_are_left_and_listed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    done = prune_(model, "50%")
    assert [row.name for row in done.pruned] == ["1"] and "remove_parametrizations" in done.left[0].reason


@pytest.mark.parametrize(
    "spec,error,says",
    [
        ("2-4", OptionError, '"2:4"'),
        ({"nothing.*": "2:4"}, OptionError, "matches none"),
        ({"0": "2:4", "1": "2:4"}, PruneError, "1: 4 does not divide"),
        ({"0": 4}, OptionError, "its name or None"),
        ({"0": llmcomp.Structured(channels=0.5)}, OptionError, "whole model"),
        (4, OptionError, "mapping"),
        (Zeros, OptionError, r"pass Zeros\(\)"),
        (lambda name: "2:4", OptionError, "function of .name, module."),
        (Wanda(0.5), PruneError, "batches"),
        ({"0": "50%", "1": Wanda(0.5)}, PruneError, "batches"),
    ],
)
def test_refusals_leave_the_model_untouched(spec: object, error: type[LlmcompError], says: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(6, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        prune_(model, spec)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and not masks(model)


@pytest.mark.parametrize(
    "model,says",
    [
        (5, "found 5"),
        (None, "found None"),
        (nn.Linear, "the class Linear"),
        (nn.Linear(8, 4, device="meta"), "weight, which is on the meta device"),
        (nn.Sequential(nn.LazyLinear(4)), "0.weight, which is lazy"),
    ],
)
@pytest.mark.parametrize("spec", ["50%", Zeros(), llmcomp.Structured(channels=0.5)])
def test_what_is_no_model_with_values(model: Any, says: str, spec: Any) -> None:
    with pytest.raises(PruneError, match=says):
        prune_(model, spec)


def test_batches_that_are_none() -> None:
    for spec in (Wanda(0.5), llmcomp.Structured(channels=0.5, criterion="taylor")):
        with pytest.raises(FormatError, match="found 5"):
            prune_(llama(), spec, 5)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_and_bad_data() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    for batches in ([], [torch.randn(2, 8)], [torch.full((1, 4), 300)]):
        with pytest.raises(FormatError, match="batch"):
            prune_(model, SparseGPT(0.5), batches)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(PruneError, match="up_proj: expected finite"):
        prune_(model, "50%")
    assert not masks(model)


def test_what_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before, done = copy.deepcopy(model.state_dict()), []

    def failing(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        if len(done) == 10:
            raise FormatError("expected more data")
        done.append(weight.shape)
        return sparsegpt(weight, *rest)

    monkeypatch.setattr(prune_data, "sparsegpt", failing)
    with pytest.raises(FormatError):
        prune_(model, SparseGPT(0.5), DATA)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and not masks(model)


def test_training_keeps_zeros_and_a_second_call_adds_to_them() -> None:
    model = llama().train()
    prune_(model, {"*.mlp.*": "50%"})
    prune_(model, {"*.mlp.*": "2:4"})
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert of_pattern(weight) and float((weight == 0).float().mean()) >= 0.5


def test_saved_by_transformers_and_trained_again(tmp_path: Path) -> None:
    model = llama()
    prune_(model, "2:4")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))
    done = prune_(loaded, Zeros())
    assert len(done.pruned) == 14 and {r.sparsity for r in done.pruned} == {0.5}
    optimizer = torch.optim.AdamW(loaded.parameters(), 0.01, weight_decay=0.1)
    loaded(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = dict(loaded.named_parameters())
    assert set(masks(loaded)) == {f"{r.name}.weight" for r in done.pruned}
    for name, mask in masks(model).items():
        assert bool((trained[name][~mask] == 0).all()) and bool((trained[name][mask] != 0).any())


def test_pruned_weights_quantize_to_zeros() -> None:
    model = llama()
    prune_(model, "2:4")
    quantize_(model, "int4")
    assert of_pattern(model.model.layers[0].mlp.up_proj.weight.dequantize())  # type: ignore[operator]
