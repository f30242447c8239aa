"""llmcomp/unit_blocks.py: channels of experts, whose matrices share a parameter; layers with experts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from llmcomp.errors import PruneError
from llmcomp.masks import masks
from llmcomp.pruning import prune_
from llmcomp.sparsity import Structured
from llmcomp.unit_blocks import mlp_blocks

WIDTH = 48
SIZES = dict(
    hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=100, num_experts_per_tok=2,
)  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=32)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16)),
}
IDS = torch.randint(1, 100, (2, 9), generator=torch.Generator().manual_seed(0))
WEAK = {0: list(range(12)), 1: list(range(12, 24)), 2: list(range(24, 36)), 3: list(range(36, 48))}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[kind]().eval().double()
    model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def rows_of(kind: str, channels: list[int]) -> list[int]:
    """The outputs of gate and up that make these channels."""
    if kind == "gpt_oss":  # one after the other
        return [row for c in channels for row in (2 * c, 2 * c + 1)]
    return sorted([*channels, *(WIDTH + c for c in channels)])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_each_expert_loses_its_weakest_channels(kind: str, criterion: str) -> None:
    model = model_of(kind)
    experts = model.model.layers[1].mlp.experts
    transposed = kind == "gpt_oss"
    up, down = (p.mT if transposed else p for p in (experts.gate_up_proj, experts.down_proj))
    with torch.no_grad():
        for expert, weak in WEAK.items():
            up[expert, rows_of(kind, weak)] *= 1e-3
            down[expert][:, weak] *= 1e-6
    done = prune_(model, Structured(channels=0.25, criterion=criterion), [IDS])
    for expert, weak in WEAK.items():
        assert (up[expert] == 0).all(1).nonzero().flatten().tolist() == rows_of(kind, weak)
        assert (down[expert] == 0).all(0).nonzero().flatten().tolist() == weak
        if transposed:
            assert (experts.gate_up_proj_bias[expert] == 0).nonzero().flatten().tolist() == rows_of(kind, weak)
    assert "model.layers.1.mlp.experts.down_proj" in {row.name for row in done.pruned}
    shared = kind == "qwen2_moe"
    assert ("model.layers.1.mlp.shared_expert.up_proj.weight" in masks(model)) == shared


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_channels_are_read_by_nobody(kind: str) -> None:
    model, pruned = model_of(kind), model_of(kind)
    prune_(pruned, Structured(channels=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name and not name.endswith("bias"):
                parameter.masked_fill_(pruned.get_parameter(name) == 0, 0)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(model), logits(model_of(kind)))


def test_a_layer_goes_with_its_experts() -> None:
    model = model_of("mixtral")
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter *= 1e-3
    prune_(model, Structured(layers=1))
    assert not any(bool(p.any()) for p in model.model.layers[0].mlp.experts.parameters())
    assert all(bool(p.all()) for p in model.model.layers[1].mlp.experts.parameters())


def test_experts_that_train_stay_pruned() -> None:
    model = model_of("mixtral").train()
    prune_(model, Structured(channels=0.25))
    before = model.model.layers[0].mlp.experts.down_proj == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj == 0, before)


def test_what_is_refused() -> None:
    model = model_of("mixtral")
    with pytest.raises(PruneError, match="magnitude.*or.*taylor"):
        prune_(model, Structured(channels=0.25, criterion="activation"), [IDS])
    model.model.layers[1].mlp.experts._apply_gate = lambda x: x.sum(-1, keepdim=True).expand(-1, WIDTH)
    with pytest.raises(PruneError, match="1 of 1 to go"):
        prune_(model, Structured(channels=1))
    model.model.layers[1].mlp.experts._apply_gate = lambda x: x[..., :WIDTH]
    with pytest.raises(PruneError, match="layers.1.mlp.experts.gate_up_proj.*count in nothing"):
        prune_(model, Structured(channels=1))
    assert not masks(model) and len(mlp_blocks(model_of("mixtral"))) == 8
