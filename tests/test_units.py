"""llmcomp/units.py: heads, channels and layers go whole, and the least important first."""

import copy

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from llmcomp.errors import PruneError
from llmcomp.pruning import prune_
from llmcomp.quantization import quantize_
from llmcomp.sparsity import Structured, Zeros
from tests.quantizable import IDS, llama, logits

DATA = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def gone(weight: torch.Tensor, dim: int) -> list[int]:
    """The rows (dim 0) or columns (dim 1) that are zero."""
    return [int(i) for i in (weight == 0).all(1 - dim).nonzero().flatten()]


def test_channels_go_from_both_sides() -> None:
    model = llama()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight[:64], mlp.up_proj.weight[:64], mlp.down_proj.weight[:, :64]):
            weight.mul_(0.01)
    prune_(model, Structured(channels=0.25))
    assert gone(mlp.gate_proj.weight, 0) == gone(mlp.up_proj.weight, 0) == gone(mlp.down_proj.weight, 1)
    assert gone(mlp.down_proj.weight, 1) == list(range(64))
    assert not gone(model.model.layers[0].self_attn.q_proj.weight, 0)


def test_a_key_head_goes_with_the_query_heads_that_read_it() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[32:].mul_(0.01)
        attention.k_proj.weight[32:].mul_(0.01)
    prune_(model, Structured(heads=1))
    assert gone(attention.k_proj.weight, 0) == gone(attention.v_proj.weight, 0) == list(range(32, 64))
    assert gone(attention.q_proj.weight, 0) == gone(attention.o_proj.weight, 1) == list(range(64, 128))


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor"])
def test_a_layer_that_adds_nothing_goes_first(criterion: str) -> None:
    model = llama()
    with torch.no_grad():
        for module in model.model.layers[0].modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(0.01)
    expected = logits(model)
    prune_(model, Structured(layers=1, criterion=criterion), DATA)
    assert all(not bool(m.weight.any()) for m in model.model.layers[0].modules() if isinstance(m, nn.Linear))
    assert bool(model.model.layers[1].mlp.up_proj.weight.any())
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_channels_that_the_data_does_not_use_go_first(criterion: str) -> None:
    model = llama()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate_proj.weight[::2] *= 1e-5  # what they are multiplied with is large
            layer.mlp.down_proj.weight[:, ::2] *= 10
            layer.mlp.up_proj.weight[::2] *= 10
    prune_(model, Structured(channels=0.5, criterion=criterion), DATA)
    for layer in model.model.layers:
        assert gone(layer.mlp.down_proj.weight, 1) == list(range(0, 256, 2))
    assert all(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())
    assert not model.training


def test_data_is_seen_where_no_gradients_are_recorded_and_layers_are_not_used() -> None:
    model = llama()
    model.model.layers[0].unused = nn.Linear(4, 4)
    with torch.no_grad():
        prune_(model, Structured(layers=1, criterion="taylor"), DATA)


def test_a_share_of_channels_is_not_cut_down_by_rounding() -> None:
    config = OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=100, num_hidden_layers=1, num_attention_heads=2)
    model = OPTForCausalLM(config)
    prune_(model, Structured(channels=0.29))
    assert len(gone(model.model.decoder.layers[0].fc2.weight, 1)) == 29


def test_biases_go_too_and_are_found_again() -> None:
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, word_embed_proj_dim=32
    )
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    prune_(model, Structured(heads=0.5, channels=0.5))
    layer = model.model.decoder.layers[0]
    dropped = gone(layer.fc2.weight, 1)
    assert len(dropped) == 32 and not bool(layer.fc1.bias[dropped].any()) and bool(layer.fc2.bias.all())
    again = copy.deepcopy(model)
    fresh = OPTForCausalLM(config)
    fresh.load_state_dict(again.state_dict())
    prune_(fresh, Zeros())
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    fresh(IDS, labels=IDS).loss.backward()
    optimizer.step()
    layer = fresh.model.decoder.layers[0]
    assert gone(layer.fc2.weight, 1) == dropped and not bool(layer.fc1.bias[dropped].any())


@pytest.mark.parametrize(
    "spec,says",
    [
        (Structured(heads=2), "heads of model.layers.0.self_attn to stay"),
        (Structured(channels=256), "channels of .* to stay"),
        (Structured(layers=2), "layers to stay"),
        (Structured(layers=1, criterion="taylor"), "batches"),
    ],
)
def test_something_has_to_stay(spec: Structured, says: str) -> None:
    model = llama()
    with pytest.raises(PruneError, match=says):
        prune_(model, spec)
    assert all(bool(p.all()) or p.dim() == 1 for p in model.parameters())


def test_less_than_one_unit_is_said() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    done = prune_(model, Structured(heads=0.1))
    assert not done.pruned and len(done.left) == 8
    assert {row.reason for row in done.left} == {"0.1 of its 2 heads is less than one"}
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    both = prune_(model, Structured(heads=0.1, channels=0.25))
    assert len(both.left) == 8 and len(both.pruned) == 6


def test_weights_of_units_are_finite() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(PruneError, match="finite .*layers.1.mlp.up_proj.weight"):
        prune_(model, Structured(channels=0.25))
    assert not any(bool((p == 0).all(-1).any()) for p in model.parameters())


def test_unknown_forms_are_said() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.query = layer.self_attn.__dict__["_modules"].pop("q_proj")
    with pytest.raises(PruneError, match="no block of these forms: q_proj"):
        prune_(model, Structured(heads=1))
    with pytest.raises(PruneError, match="list of them"):
        prune_(nn.Linear(4, 4), Structured(layers=1))
    quantized = llama()
    quantize_(quantized, "int8")
    with pytest.raises(PruneError, match="before quantizing"):
        prune_(quantized, Structured(channels=0.5))
