"""llmcomp/unit_layout.py: heads of fused queries, keys and values, channels of fused gates, in any order."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from llmcomp.errors import PruneError
from llmcomp.pruning import prune_
from llmcomp.sites import is_conv
from llmcomp.sparsity import Structured
from llmcomp.unit_blocks import attention_blocks, mlp_blocks
from llmcomp.unit_layout import AT_ONCE, layout

D = 16
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0)
OLD = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**OLD)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=96, num_key_value_heads=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=96)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=100)),
    "falcon, one head of q, k and v after the other": lambda: FalconForCausalLM(
        FalconConfig(**SIZES, multi_query=False, alibi=True)
    ),
    "falcon, by groups": lambda: FalconForCausalLM(
        FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=100)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**OLD, rotary_dim=8)),
    "bigcode": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**OLD, multi_query=False)),
}
IDS = torch.randint(1, 100, (1, 6), generator=torch.Generator().manual_seed(0))


def model_of(kind: str) -> PreTrainedModel:
    """A seeded one whose biases count."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def heads(*numbers: int) -> list[int]:
    return [head * D + i for head in numbers for i in range(D)]


# The rows of the fused layer that belong to unit 1, by what the sources of the models say.
SECOND: dict[str, list[int]] = {
    "gpt2": heads(1, 5, 9),  # all of q, all of k, all of v
    "phi3": heads(2, 3, 5, 7),  # 4 heads of q, 2 of k, 2 of v
    "neox": heads(3, 4, 5),  # q, k and v of a head
    "bloom": heads(3, 4, 5),
    "falcon, one head of q, k and v after the other": heads(3, 4, 5),
    "falcon, by groups": heads(4, 5, 6, 7),  # two of q, k and v of a group
    "mpt": heads(1, 5, 9),
    "codegen": heads(3, 4, 5),  # q, v and k of a quarter of the heads
    "bigcode": heads(3, 4, 5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_a_head(kind: str) -> None:
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    blocks = attention_blocks(model)
    assert len(blocks) == 2
    for block in blocks:
        each = 64 // block.count
        assert sorted(block.makers[0].units[1].tolist()) == SECOND[kind]
        assert block.reader.units.tolist() == torch.arange(64).view(-1, each).tolist()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())


def readers_alone(model: PreTrainedModel, pruned: PreTrainedModel) -> PreTrainedModel:
    """The model with the zeros of `pruned` in its output projections only."""
    readers = ("c_proj", "o_proj", "out_proj", "dense", "down_proj")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in readers:
                module.weight.masked_fill_(pruned.get_submodule(name).weight == 0, 0)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", MODELS)
def test_what_goes_is_read_by_nobody(kind: str) -> None:
    """Rows of a head do nothing once the columns that read the head are zero, if they are the right ones."""
    model, pruned = model_of(kind), model_of(kind)
    done = prune_(pruned, Structured(heads=0.5))
    assert {row.sparsity for row in done.pruned} == {0.5}
    expected = logits(readers_alone(model, pruned))
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, logits(model_of(kind)))


def test_the_weakest_head_goes() -> None:
    model = model_of("neox")
    attention = model.gpt_neox.layers[1].attention
    with torch.no_grad():
        attention.query_key_value.weight[heads(6, 7, 8)] *= 0.01
        attention.dense.weight[:, heads(2)] *= 0.01
    prune_(model, Structured(heads=1))
    assert (attention.query_key_value.weight == 0).all(1).nonzero().flatten().tolist() == heads(6, 7, 8)
    assert (attention.query_key_value.bias == 0).nonzero().flatten().tolist() == heads(6, 7, 8)
    assert (attention.dense.weight == 0).all(0).nonzero().flatten().tolist() == heads(2)


FUSED_MLPS: dict[str, Callable[[], PreTrainedModel]] = {
    "phi3": MODELS["phi3"],
    "glm": lambda: GlmForCausalLM(GlmConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, head_dim=16)),
}


@pytest.mark.parametrize("kind", FUSED_MLPS)
@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor"])
def test_channels_of_a_fused_gate(kind: str, criterion: str) -> None:
    torch.manual_seed(0)
    model = FUSED_MLPS[kind]().eval().double()
    mlp = model.model.layers[1].mlp
    weak = list(range(0, 96, 4))
    with torch.no_grad():
        mlp.gate_up_proj.weight[weak] *= 1e-3
        mlp.gate_up_proj.weight[[96 + i for i in weak]] *= 1e-3
    block = mlp_blocks(model)[1]
    assert block.makers[0].units.tolist() == [[i, 96 + i] for i in range(96)]
    prune_(model, Structured(channels=0.25, criterion=criterion), [IDS, IDS.flip(1)])
    assert (mlp.down_proj.weight == 0).all(0).nonzero().flatten().tolist() == weak
    assert (mlp.gate_up_proj.weight == 0).all(1).nonzero().flatten().tolist() == weak + [96 + i for i in weak]


# ---- what can't be known --------------------------------------------------------------------------------------------


def test_a_cache_that_the_model_makes_is_left_out() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of("phi3")

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids).logits
            return logits

    for block in attention_blocks(Wrapped().eval()):
        assert block.makers[0].units[1].tolist() == SECOND["phi3"]


def test_heads_that_share_their_keys_are_one() -> None:
    model = FalconForCausalLM(FalconConfig(**SIZES, multi_query=True)).eval()
    assert [block.count for block in attention_blocks(model)] == [1, 1]
    with pytest.raises(PruneError, match="1 of 1 to go"):
        prune_(model, Structured(heads=1))
    assert "less than one" in prune_(model, Structured(heads=0.5)).left[0].reason


class Mixed(nn.Module):
    """Something between the fused layer and its reader that a test chooses."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj, self.between = nn.Linear(32, 96), nn.Linear(32, 32), between

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(self.between(self.qkv_proj(x)))[:, : x.shape[1]]


class Decoder(nn.Module):
    """Some of them on an embedding."""

    def __init__(self, *between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.layers = nn.ModuleList(map(Mixed, between))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def unfit(x: Tensor) -> Tensor:
    raise ValueError("no attention here")


def twice(x: Tensor) -> Tensor:
    return torch.cat([x[..., :32], x[..., 32:64]], 1)


@pytest.mark.parametrize(
    "between,says",
    [
        (lambda x: x[..., :32], "count in nothing"),
        (lambda x: x[..., :32] * x[..., 32:].sum(-1, keepdim=True), "1 of 1 to go"),
        (twice, "not called once"),
        (unfit, "runs for token ids"),
    ],
)
def test_what_cannot_be_told_apart_is_said(between: Callable[[Tensor], Tensor], says: str) -> None:
    torch.manual_seed(0)
    model = Decoder(between, between)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match=says):
        prune_(model, Structured(heads=1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.layers[0].qkv_proj.__dict__


def test_layers_may_lie_differently() -> None:
    model = Decoder(lambda x: sum(x.split(32, -1)), lambda x: x.unflatten(-1, (32, 3)).sum(-1))  # type: ignore[arg-type,return-value]
    first, second = attention_blocks(model)
    assert first.makers[0].units[1].tolist() == [1, 33, 65] and second.makers[0].units[1].tolist() == [3, 4, 5]


def by_sums(first: int) -> Callable[[Tensor], Tensor]:
    """What reaches columns as `x` (B, 8) does: its first sum takes `first` of them, the other the rest."""

    def reach(x: Tensor) -> Tensor:
        return torch.stack([x[:, :first].sum(1), x[:, first:].sum(1)], 1).isnan()

    return reach


def test_units_of_one_size() -> None:
    found = layout(by_sums(4), 8, 2)
    assert found.rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and found.columns.tolist() == [[0], [1]]
    with pytest.raises(PruneError, match="differ in size"):
        layout(by_sums(3), 8, 2)


@pytest.mark.parametrize("unit", [0, 1])
def test_outputs_that_only_cross_over_together(unit: int) -> None:
    """One at a time nothing reaches the other unit: all of one at once do."""

    def reach(x: Tensor) -> Tensor:
        nan = by_sums(4)(x)
        nan[:, 1 - unit] |= x[:, 4 * unit : 4 * unit + 4].isnan().all(1)
        return nan

    with pytest.raises(PruneError, match="not apart"):
        layout(reach, 8, 2)


def test_more_rows_than_run_at_once() -> None:
    rows = 2 * AT_ONCE + 6
    found = layout(lambda x: x.unflatten(1, (2, -1)).sum(1).isnan(), rows, rows // 2)
    assert found.rows.tolist() == [[i, i + rows // 2] for i in range(rows // 2)]


def test_layers_that_keep_their_weights_transposed() -> None:
    model = model_of("gpt2")
    attention = model.transformer.h[0].attn
    assert is_conv(attention.c_attn)
    prune_(model, Structured(heads=2, channels=0.5))
    assert (attention.c_attn.weight == 0).all(0).sum() == 96 and (attention.c_proj.weight == 0).all(1).sum() == 32
    assert (model.transformer.h[0].mlp.c_fc.weight == 0).all(0).sum() == 128
