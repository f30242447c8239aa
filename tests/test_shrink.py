"""passes/shrink.py: heads of attention and hidden channels that count for nothing are left out, exactly."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.zeros import pruned

F = nn.functional


class Attention(nn.Module):
    """Attention with residual: `heads` query heads of 16 channels read `groups` key/value heads."""

    def __init__(self, heads: int = 4, groups: int = 2, hidden: int = 32, depth: int = 16) -> None:
        super().__init__()
        self.depth, self.groups = depth, groups
        self.q, self.o = nn.Linear(hidden, heads * depth), nn.Linear(heads * depth, hidden)
        self.k, self.v = (nn.Linear(hidden, groups * depth) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.depth)).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


X = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attention(heads: int = 4, groups: int = 2, dead: tuple[int, ...] = ()) -> Attention:
    torch.manual_seed(0)
    made = Attention(heads, groups).double()
    with torch.no_grad():
        for head in dead:
            made.o.weight[:, head * 16 : head * 16 + 16] = 0
    return made


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_a_group_goes_with_its_query_heads() -> None:
    printed, report, parts = pruned(attention(dead=(2, 3)), (X,))
    assert report.rewrites == 1 and not report.near_misses
    assert_expected_inline(
        printed,
        """\
constant: i64[32] = self.kept_0
index_select: f64[32, 32] = aten.index_select(w0, 0, constant)
constant_1: i64[32] = self.kept_0
index_select_1: f64[32] = aten.index_select(w1, 0, constant_1)
linear: f64[1, 5, 32] = llmcomp.linear(x0, index_select, index_select_1, False)
view: f64[1, 5, 2, 16] = aten.view(linear, [1, 5, 2, 16])
transpose: f64[1, 2, 5, 16] = aten.transpose(view, 1, 2)
constant_2: i64[16] = self.kept_1
index_select_2: f64[16, 32] = aten.index_select(w2, 0, constant_2)
constant_3: i64[16] = self.kept_1
index_select_3: f64[16] = aten.index_select(w3, 0, constant_3)
linear_1: f64[1, 5, 16] = llmcomp.linear(x0, index_select_2, index_select_3, False)
view_1: f64[1, 5, 1, 16] = aten.view(linear_1, [1, 5, 1, 16])
transpose_1: f64[1, 1, 5, 16] = aten.transpose(view_1, 1, 2)
constant_4: i64[16] = self.kept_1
index_select_4: f64[16, 32] = aten.index_select(w4, 0, constant_4)
constant_5: i64[16] = self.kept_1
index_select_5: f64[16] = aten.index_select(w5, 0, constant_5)
linear_2: f64[1, 5, 16] = llmcomp.linear(x0, index_select_4, index_select_5, False)
view_2: f64[1, 5, 1, 16] = aten.view(linear_2, [1, 5, 1, 16])
transpose_2: f64[1, 1, 5, 16] = aten.transpose(view_2, 1, 2)
attention: f64[1, 2, 5, 16] = llmcomp.attention(transpose, transpose_1, transpose_2, None, None, 0.25, True, 0, 0, 0.0)
transpose_3: f64[1, 5, 2, 16] = aten.transpose(attention, 1, 2)
view_3: f64[1, 5, 32] = aten.view(transpose_3, [1, 5, 32])
constant_6: i64[32] = self.kept_0
index_select_6: f64[32, 32] = aten.index_select(w6, 1, constant_6)
linear_3: f64[1, 5, 32] = llmcomp.linear(view_3, index_select_6, w7, False)
add: f64[1, 5, 32] = aten.add(x0, linear_3)
return (add)""",
    )


def test_query_heads_go_evenly() -> None:
    printed, report, _ = pruned(attention(8, 2, dead=(0, 1, 2, 4, 6)), (X,))
    assert "attention: f64[1, 4, 5, 16]" in printed  # of heads 3, 5, 7, and 0, which counts for nothing
    assert report.rewrites == 2 and "index_select(view_3, -1" in printed


def test_unevenly_attention_is_split() -> None:
    printed, report, _ = pruned(attention(4, 2, dead=(0,)), (X,))
    assert report.rewrites == 1
    assert_expected_inline(
        printed,
        """\
constant: i64[48] = self.kept_0
index_select: f64[48, 32] = aten.index_select(w0, 0, constant)
constant_1: i64[48] = self.kept_0
index_select_1: f64[48] = aten.index_select(w1, 0, constant_1)
linear: f64[1, 5, 48] = llmcomp.linear(x0, index_select, index_select_1, False)
view: f64[1, 5, 3, 16] = aten.view(linear, [1, 5, 3, 16])
transpose: f64[1, 3, 5, 16] = aten.transpose(view, 1, 2)
linear_1: f64[1, 5, 32] = llmcomp.linear(x0, w2, w3, False)
view_1: f64[1, 5, 2, 16] = aten.view(linear_1, [1, 5, 2, 16])
transpose_1: f64[1, 2, 5, 16] = aten.transpose(view_1, 1, 2)
linear_2: f64[1, 5, 32] = llmcomp.linear(x0, w4, w5, False)
view_2: f64[1, 5, 2, 16] = aten.view(linear_2, [1, 5, 2, 16])
transpose_2: f64[1, 2, 5, 16] = aten.transpose(view_2, 1, 2)
slice: f64[1, 1, 5, 16] = aten.slice(transpose_1, 1, 0, 1)
slice_1: f64[1, 1, 5, 16] = aten.slice(transpose_2, 1, 0, 1)
slice_2: f64[1, 1, 5, 16] = aten.slice(transpose, 1, 0, 1)
attention: f64[1, 1, 5, 16] = llmcomp.attention(slice_2, slice, slice_1, None, None, 0.25, True, 0, 0, 0.0)
transpose_3: f64[1, 5, 1, 16] = aten.transpose(attention, 1, 2)
slice_3: f64[1, 1, 5, 16] = aten.slice(transpose_1, 1, 1, 2)
slice_4: f64[1, 1, 5, 16] = aten.slice(transpose_2, 1, 1, 2)
slice_5: f64[1, 2, 5, 16] = aten.slice(transpose, 1, 1, 3)
attention_1: f64[1, 2, 5, 16] = llmcomp.attention(slice_5, slice_3, slice_4, None, None, 0.25, True, 0, 0, 0.0)
transpose_4: f64[1, 5, 2, 16] = aten.transpose(attention_1, 1, 2)
cat: f64[1, 5, 3, 16] = aten.cat([transpose_3, transpose_4], 2)
transpose_5: f64[1, 3, 5, 16] = aten.transpose(cat, 1, 2)
transpose_6: f64[1, 5, 3, 16] = aten.transpose(transpose_5, 1, 2)
view_3: f64[1, 5, 48] = aten.view(transpose_6, [1, 5, 48])
constant_2: i64[48] = self.kept_0
index_select_2: f64[32, 48] = aten.index_select(w6, 1, constant_2)
linear_3: f64[1, 5, 32] = llmcomp.linear(view_3, index_select_2, w7, False)
add: f64[1, 5, 32] = aten.add(x0, linear_3)
return (add)""",
    )


def test_values_that_are_zero() -> None:
    model = attention()
    with torch.no_grad():
        model.v.weight[:16], model.v.bias[:16] = 0, 0
    printed, report, parts = pruned(model, (X,))
    assert report.rewrites == 1 and "attention: f64[1, 2, 5, 16]" in printed and len(parts.checks) == 2
    with torch.no_grad():
        model.v.bias[3] = 1
    assert pruned(model, (X,))[1].rewrites == 0


def test_queries_that_are_zero_count() -> None:
    model = attention()
    with torch.no_grad():
        model.q.weight[:32], model.q.bias[:32] = 0, 0
    assert pruned(model, (X,))[1].rewrites == 0


def test_a_head_that_somebody_else_reads() -> None:
    model = attention(dead=(2, 3))

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = model.mixed(x)
        return model.o(mixed), mixed

    printed, report, _ = pruned(fn, (X,))
    assert "attention: f64[1, 4, 5, 16]" in printed
    assert "2 of its 4 heads do not count" in report.near_misses[0].reason
    assert "returned" in report.near_misses[0].reason


def test_parts_of_heads_are_gathered() -> None:
    model = attention()
    with torch.no_grad():
        model.o.weight[:, ::2] = 0
    printed, report, _ = pruned(model, (X,))
    assert "attention: f64[1, 4, 5, 16]" in printed and "index_select(view_3, -1" in printed
    assert "whole heads" in report.near_misses[0].reason


def test_a_mask_for_each_head_and_a_gate() -> None:
    model = attention(dead=(2, 3))
    slopes = torch.arange(4.0, dtype=torch.float64)
    gate = nn.Linear(32, 64).double()

    def fn(x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (model.q, model.k, model.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        bias = slopes[:, None, None] * torch.arange(5.0, dtype=torch.float64)
        out = F.scaled_dot_product_attention(q, k, v, bias[None])
        return model.o(out.transpose(1, 2).flatten(2) * gate(x).sigmoid())

    printed, report, _ = pruned(fn, (X,))
    assert report.rewrites == 1 and "attention: f64[1, 2, 5, 16]" in printed, report


def with_numbers(model: Attention, numbers: Callable[[], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Two layers with biases that are made of the numbers of their heads."""

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        bias = (numbers() * 0.5)[:, None, None] * torch.arange(5.0, dtype=torch.float64)
        for _ in range(2):
            q, k, v = (m(x).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (model.q, model.k, model.v))
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            x = x + model.o(F.scaled_dot_product_attention(q, k, v, bias[None]).transpose(1, 2).flatten(2))
        return (x,)

    return fn


def test_numbers_of_heads() -> None:
    """Biases of heads that both layers read: each gets a smaller one of its own."""
    printed, report, _ = pruned(with_numbers(attention(dead=(0, 1)), lambda: torch.arange(1, 5)), (X,))
    assert report.rewrites == 2 and printed.count("attention: f64[1, 2, 5, 16]") == 1, report
    lines = [line for line in printed.splitlines() if "i64[2]" in line or "mul" in line]
    assert_expected_inline(
        "\n".join(lines),
        """\
constant: i64[2] = self.kept_0
constant_1: i64[2] = self.kept_0
mul: f32[2] = aten.mul(constant, 0.5)
mul_1: f32[2] = aten.mul(constant_1, 0.5)
unsqueeze: f32[2, 1] = aten.unsqueeze(mul, 1)
unsqueeze_1: f32[2, 1] = aten.unsqueeze(mul_1, 1)
mul_2: f64[2, 1, 5] = aten.mul(unsqueeze_2, arange)
mul_3: f64[2, 1, 5] = aten.mul(unsqueeze_3, arange)
unsqueeze_4: f64[1, 2, 1, 5] = aten.unsqueeze(mul_2, 0)
unsqueeze_5: f64[1, 2, 1, 5] = aten.unsqueeze(mul_3, 0)""",
    )


def test_numbers_that_are_not_whole() -> None:
    def numbers() -> Tensor:
        return torch.arange(1.0, 5.0, dtype=torch.float64)

    report = pruned(with_numbers(attention(dead=(0, 1)), numbers), (X,))[1]
    assert "arange is not computed slice by slice" in report.near_misses[0].reason


@pytest.mark.parametrize("ours", [True, False], ids=["operator", "torch"])
@pytest.mark.parametrize("own", [True, False], ids=["own keys", "keys of a cache"])
@pytest.mark.parametrize("dead", [(2, 3), (1,)], ids=["a group", "a head"])
@pytest.mark.parametrize("lead", [(), (4,)], ids=str)
def test_masks_of_any_rank(lead: tuple[int, ...], dead: tuple[int, ...], own: bool, ours: bool) -> None:
    """Passes give our operator masks of four axes; it takes others too."""
    model, mask = attention(dead=dead), torch.randn(*lead, 5, 5, dtype=torch.float64)
    past = torch.randn(2, 1, 2, 5, 16, dtype=torch.float64).unbind()

    def fn(x: Tensor, *past: Tensor, ours: bool = ours) -> Tensor:
        q, *mine = (m(x).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (model.q, model.k, model.v))
        k, v = mine if own else past
        if ours:
            out = torch.ops.llmcomp.attention(q, k, v, mask, None, 0.25, False)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return model.o(out.transpose(1, 2).flatten(2))

    inputs = (X,) if own else (X, *past)
    torch.testing.assert_close(fn(*inputs), fn(*inputs, ours=not ours))
    _, report, _ = pruned(fn, inputs)
    assert [s.rewrite for s in report.savings] == ["heads of attention"], report


# ---- heads of models ------------------------------------------------------------------------------------------------

SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=100, pad_token_id=0,
)  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3: a norm for each head": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)),
    "phi3: one layer for q, k and v": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "olmo2: a norm over all heads": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL)),
    "gpt2: split, transposed": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)),
    "neox: heads of q, k and v side by side": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "bloom: biases by the numbers of heads": lambda: BloomForCausalLM(
        BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=100)
    ),
    "falcon: keys picked by a list, repeated": lambda: FalconForCausalLM(
        FalconConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=100,
            num_kv_heads=2,
            new_decoder_architecture=True,
        )  # fmt: skip
    ),
}


def made(kind: str) -> nn.Module:
    """A small model whose heads 2 and 3 (a group) are zero: their rows of q, k and v, their columns of o."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval().double()
    with torch.no_grad():
        for name, module in model.named_modules():
            matrix = getattr(module, "weight", None)
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("o_proj",) or name.endswith(("attn.c_proj", "attention.dense")):
                (matrix.t() if kind.startswith("gpt2") else matrix)[:, 32:] = 0
            elif leaf == "q_proj":
                matrix[32:] = 0
            elif leaf in ("k_proj", "v_proj"):
                matrix[16:] = 0
    return model


TOKENS = torch.randint(0, 100, (1, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_heads_of_models(kind: str) -> None:
    model = made(kind)
    printed, report, _ = pruned(lambda ids: model(ids, use_cache=False).logits, (TOKENS,), rtol=1e-6)
    assert report.rewrites == 2, report
    assert printed.count("f64[1, 2, 6, 16] = llmcomp.attention") == 2
    assert report.savings[0].rewrite == "heads of attention" and report.savings[0].weight_bytes > 0


def both(out: CausalLMOutputWithPast) -> tuple[Tensor, ...]:
    layers = out.past_key_values.layers
    return out.logits, *(t for layer in layers for t in (layer.keys, layer.values))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_keys_of_a_cache_stay(kind: str) -> None:
    model = made(kind)
    printed, report, _ = pruned(lambda ids: both(model(ids)), (TOKENS,), rtol=1e-6)
    assert report.rewrites == 2, report
    assert printed.count("f64[1, 2, 6, 16] = llmcomp.attention") == 2
    past = both(model(TOKENS))[1:]

    def step(ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        return both(model(ids, past_key_values=cache))

    printed, report, _ = pruned(step, (TOKENS[:, :1], *past), rtol=1e-6)
    assert report.rewrites == 2, report
    assert printed.count("f64[1, 2, 1, 16] = llmcomp.attention") == 2


def test_keys_that_are_returned_keep_their_strides() -> None:
    qkv, out = nn.Linear(32, 192).double(), nn.Linear(64, 32).double()
    with torch.no_grad():
        out.weight[:, 32:] = 0

    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in qkv(x).split(64, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out(mixed.transpose(1, 2).flatten(2)), k, v

    printed, report, _ = pruned(fn, (X,))
    assert report.rewrites == 1 and "attention: f64[1, 2, 5, 16]" in printed


def test_heads_of_a_first_call_may_be_split() -> None:
    """Keys and values are returned, and heads 0 and 5 of the queries gone: three parts, of one head, two and one."""
    model = attention(6, 3, dead=(0, 5))

    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (m(x).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (model.q, model.k, model.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return model.o(out.transpose(1, 2).flatten(2)), k, v

    printed, report, _ = pruned(fn, (X,))
    assert report.rewrites == 1
    assert [printed.count(f"f64[1, {n}, 5, 16] = llmcomp.attention") for n in (1, 2)] == [2, 1]
    assert "aten.cat" in printed


# ---- hidden channels ------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    """An embedding, two layers with norms before them, and a norm and a head behind."""

    def __init__(self, norm: Callable[[int], nn.Module], tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.norms = nn.ModuleList(norm(64) for _ in range(3))
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.square = nn.Linear(64, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.hidden(ids))
        return result

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.down(F.silu(self.up(self.norms[0](x))))
        x = x + self.square(self.norms[1](x))
        result: Tensor = self.norms[2](x)
        return result


def rms(width: int) -> nn.Module:
    made = nn.RMSNorm(width, eps=1e-3)
    nn.init.uniform_(made.weight)
    return made


def stream(norm: Callable[[int], nn.Module] = rms, gone: slice = slice(10, 42), tied: bool = False) -> Stream:
    """A stream in which nobody writes the channels `gone`."""
    torch.manual_seed(0)
    model = Stream(norm, tied).double()
    with torch.no_grad():
        model.embedding.weight[:, gone] = 0
        model.down.weight[gone], model.down.bias[gone] = 0, 0
        model.square.weight[gone] = 0
    return model


def test_hidden_channels() -> None:
    printed, report, parts = pruned(stream(), (TOKENS % 50,))
    assert report.rewrites == 3 and not report.near_misses
    assert [s.rewrite for s in report.savings] == ["hidden channels"]
    assert report.savings[0].weight_bytes == 8 * (50 * 32 + 6 * 32 + 3 * 32 + 2 * 96 * 32 + 32 + 64 * 64 - 32 * 32)
    assert_expected_inline(
        printed,
        """\
constant: i64[32] = self.kept_0
index_select: f64[50, 32] = aten.index_select(w0, 1, constant)
embedding: f64[1, 6, 32] = aten.embedding(index_select, x0)
constant_1: i64[32] = self.kept_0
index_select_1: f64[32] = aten.index_select(w1, 0, constant_1)
rms_norm: f64[1, 6, 32] = llmcomp.rms_norm(embedding, index_select_1, 0.001, False, False, None, 64)
constant_2: i64[32] = self.kept_0
index_select_2: f64[96, 32] = aten.index_select(w2, 1, constant_2)
linear: f64[1, 6, 96] = llmcomp.linear(rms_norm, index_select_2, w3, False)
silu: f64[1, 6, 96] = aten.silu(linear)
constant_3: i64[32] = self.kept_0
index_select_3: f64[32, 96] = aten.index_select(w4, 0, constant_3)
constant_4: i64[32] = self.kept_0
index_select_4: f64[32] = aten.index_select(w5, 0, constant_4)
linear_1: f64[1, 6, 32] = llmcomp.linear(silu, index_select_3, index_select_4, False)
add: f64[1, 6, 32] = aten.add(embedding, linear_1)
constant_5: i64[32] = self.kept_0
index_select_5: f64[32] = aten.index_select(w6, 0, constant_5)
rms_norm_1: f64[1, 6, 32] = llmcomp.rms_norm(add, index_select_5, 0.001, False, False, None, 64)
constant_6: i64[32] = self.kept_0
index_select_6: f64[32, 64] = aten.index_select(w7, 0, constant_6)
constant_7: i64[32] = self.kept_0
index_select_7: f64[32, 32] = aten.index_select(index_select_6, 1, constant_7)
linear_2: f64[1, 6, 32] = llmcomp.linear(rms_norm_1, index_select_7, None, False)
add_1: f64[1, 6, 32] = aten.add(add, linear_2)
constant_8: i64[32] = self.kept_0
index_select_8: f64[32] = aten.index_select(w8, 0, constant_8)
rms_norm_2: f64[1, 6, 32] = llmcomp.rms_norm(add_1, index_select_8, 0.001, False, False, None, 64)
constant_9: i64[32] = self.kept_0
index_select_9: f64[50, 32] = aten.index_select(w9, 1, constant_9)
linear_3: f64[1, 6, 50] = llmcomp.linear(rms_norm_2, index_select_9, None, False)
return (linear_3)""",
    )


def test_a_tied_head_shares_its_part_with_the_embedding() -> None:
    _, report, parts = pruned(stream(tied=True), (TOKENS % 50,))
    assert report.rewrites == 3
    given = [tuple(n.meta["val"].shape) for n in parts.main.graph.find_nodes(op="placeholder")]
    assert given.count((50, 32)) == 1


def test_norms_with_a_mean_are_left_whole() -> None:
    printed, report, _ = pruned(stream(nn.LayerNorm), (TOKENS % 50,))
    assert report.rewrites == 0 and "count" not in printed and "64]" in printed


def test_one_writer_is_enough_to_keep_them() -> None:
    model = stream()
    with torch.no_grad():
        model.square.weight[20:26] = 1
    printed, report, _ = pruned(model, (TOKENS % 50,))  # 26 others are gone
    assert "rms_norm_2: f64[1, 6, 48]" in printed and report.savings[0].count == 3
    with torch.no_grad():
        model.square.weight[:] = 1
    _, report, _ = pruned(model, (TOKENS % 50,))
    assert "computed whole" in report.near_misses[0].reason


def test_a_stream_that_is_returned_is_computed_whole() -> None:
    model = stream()

    def fn(ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(ids)
        return model.head(hidden), hidden

    printed, report, _ = pruned(fn, (TOKENS % 50,))
    assert "it is returned" in report.near_misses[0].reason
    assert "rms_norm: f64[1, 6, 64]" in printed and "index_select(rms_norm" in printed


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not kind.startswith(("gpt2", "neox", "bloom", "falcon"))])
def test_hidden_channels_of_models(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval().double()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :32] = 0
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.weight[:32] = 0
    printed, report, _ = pruned(lambda ids: model(ids, use_cache=False).logits, (TOKENS,), rtol=1e-6)
    assert not report.near_misses and report.savings[0].rewrite == "hidden channels"
    assert "f64[1, 6, 64] = aten.add" not in printed and "64)" in printed


def test_sizes_may_be_symbolic_and_sinks_go_with_their_heads() -> None:
    model = attention(dead=(2, 3))
    sinks = nn.Parameter(torch.randn(4).double())

    def fn(x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (model.q, model.k, model.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = torch.cat([q @ k.transpose(2, 3) * 0.25, sinks.view(1, 4, 1, 1).expand(len(x), 4, x.shape[1], 1)], -1)
        out = scores.softmax(-1)[..., :-1] @ v
        return model.o(out.transpose(1, 2).flatten(2))

    printed, report, _ = pruned(fn, (torch.randn(3, 5, 32, dtype=torch.float64),), dynamic=True)
    assert report.rewrites == 1 and "f64[s0, 2, s1, 16] = llmcomp.attention" in printed
    assert "f64[2] = aten.index_select" in printed
