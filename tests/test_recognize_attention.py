"""passes/recognize_attention.py: attention in its whole and its written-out forms."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

import llmcomp.ops  # noqa: F401
from llmcomp.passes.base import NearMiss, run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.recognize_attention import RECOGNIZE_ATTENTION
from tests.graphs import capture, rewrite

B, H, K, S, D = 2, 4, 2, 6, 8


def qkv(heads: int = H, keys: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(B, H, S, D)
    k, v = (torch.randn(B, heads, keys, D) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def repeated(x: Tensor) -> Tensor:
    """Each head twice, as transformers repeats them."""
    batch, heads, length, channels = x.shape
    return x[:, :, None].expand(batch, heads, 2, length, channels).reshape(batch, heads * 2, length, channels)


def recognized(fn: Callable[..., object], *inputs: object, rtol: float | None = None, **kwargs: bool) -> str:
    """The graph of `fn` with attention recognized, which computes the same."""
    passes = (CANONICALIZE, RECOGNIZE_ATTENTION, CANONICALIZE)
    printed, results = rewrite(fn, inputs, *passes, rtol=rtol, **kwargs)
    assert results[1].report.near_misses == []
    assert "softmax" not in printed and "scaled_dot_product" not in printed and "bmm" not in printed
    return printed


def misses(fn: Callable[..., object], *inputs: object) -> list[NearMiss]:
    gm = capture(fn, *inputs)
    results = run_passes(gm, (CANONICALIZE, RECOGNIZE_ATTENTION), frozenset({SHAPES}))
    assert results[1].report.rewrites == 0
    return results[1].report.near_misses


# ---- whole


def test_scaled_dot_product_attention_with_repeated_heads():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True, scale=0.5)
        return out.transpose(1, 2).reshape(B, S, H * D)

    assert_expected_inline(
        recognized(fn, *qkv(K)),
        """\
def (x0: f32[2, 2, 6, 8], x1: f32[2, 2, 6, 8], x2: f32[2, 4, 6, 8])
attention: f32[2, 4, 6, 8] = llmcomp.attention(x2, x0, x1, None, None, 0.5, True, 0, 0, 0.0)
transpose: f32[2, 6, 4, 8] = aten.transpose(attention, 1, 2)
clone: f32[2, 6, 4, 8] = aten.clone(transpose, memory_format=torch.contiguous_format)
view: f32[2, 6, 32] = aten.view(clone, [2, 6, 32])
return (view)""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_of_scaled_dot_product_attention(dtype: torch.dtype):
    attend = F.scaled_dot_product_attention

    def fn(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor) -> list[Tensor]:
        whole = [attend(q, k, v), attend(q, k, v, scale=0.3), attend(q, k, v, is_causal=True)]
        return [*whole, attend(q, k, v, seen), attend(q, k, v, bias, 0.0, False)]

    masks = torch.rand(S, S) > 0.3, torch.randn(B, 1, S, S, dtype=dtype)
    printed = recognized(fn, *qkv(dtype=dtype), *masks, rtol=1e-6 if dtype == torch.float32 else 0.02)
    assert printed.count("llmcomp.attention") == 5


def test_fewer_axes():
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return heads, F.scaled_dot_product_attention(x[0], x[1], x[2])

    assert recognized(fn, torch.randn(H, S, D)).count("llmcomp.attention") == 2


def test_group_query_attention_by_flag():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert re.search(r"attention\(x\d, x\d, x\d, None, None", recognized(fn, *qkv(K)))


def test_repeat_interleave_is_a_repeat_of_heads():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(q, k, v)

    assert re.search(r"attention\(x\d, x\d, x\d, None, None", recognized(fn, *qkv(K)))


def test_one_head_of_keys_for_all_queries():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.expand(B, H, S, D), v.expand(B, H, S, D))

    assert re.search(r"attention\(x\d, x\d, x\d, None, None", recognized(fn, *qkv(1)))


def test_heads_that_alternate_are_not_shared():
    """repeat(1, 2, 1, 1) gives heads k0 k1 k0 k1, not k0 k0 k1 k1."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    assert not re.search(r"attention\(x\d, x\d", recognized(fn, *qkv(K)))


def test_keys_alone_are_not_shared():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeated(k), v)

    q, k, _ = qkv(K)
    printed = recognized(fn, q, k, torch.randn(B, H, S, D))
    assert re.search(r"attention\(x\d, view, x\d", printed)


def test_layout_of_a_result_stays():
    """The graph returns what eager computes in contiguous memory in contiguous memory."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.softmax(q @ k.transpose(2, 3), -1) @ v
        return out, out.view(B, -1)

    assert "clone" in recognized(fn, *qkv())


# ---- written out

PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]


def causal_mask(dtype: torch.dtype) -> Tensor:
    visible = torch.arange(S) <= torch.arange(S)[:, None]
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def scale_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + causal_mask(q.dtype)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.1, training=False), v).transpose(1, 2).contiguous()


def scale_by_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT / D**0.5, dim=-1) @ v


def scale_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * 0.25) @ k.transpose(-1, -2), -1) @ v


def scale_of_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * 0.5) @ (k / 2).permute(0, 1, 3, 2), -1) @ v


def scale_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ (v * 3)


def scale_of_scores_and_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT + torch.arange(S)) * 0.25, -1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.25 / 2.0) * 2.0
    return torch.softmax(scores + causal_mask(q.dtype), -1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-Neo: scores of float32 queries and keys."""
    scores = q.float() @ k.float().transpose(-1, -2)
    hidden = torch.tensor(torch.finfo(scores.dtype).min)
    weights = torch.softmax(torch.where(PADDING, scores, hidden), -1)
    return weights.to(v.dtype) @ v


def all_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q.float() @ k.float().mT, -1) @ v.float()).to(q.dtype)


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM: heads and batches merged, the bias added by the product."""
    bias = (torch.arange(S) * torch.tensor([0.5, 0.25, 0.125, 0.1])[:, None]).repeat(B, 1)[:, None]
    q, k, v = q.reshape(-1, S, D), k.reshape(-1, S, D).mT, v.reshape(-1, S, D)
    scores = torch.baddbmm(bias.to(q.dtype), q, k, beta=1.0, alpha=0.25).view(B, H, S, S)
    weights = F.softmax(scores + causal_mask(q.dtype), dim=-1).view(B * H, S, S)
    return torch.bmm(weights, v).view(B, H, S, D).permute(0, 2, 1, 3).reshape(B, S, H * D)


def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads one axis from the beginning to the end."""
    q, k, v = (x.reshape(-1, S, D) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) + causal_mask(q.dtype), -1), v)


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT).masked_fill(future, -torch.inf), -1) @ v


def largest_taken_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return torch.softmax(scores - scores.amax(-1, keepdim=True), -1) @ v


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k[:, :K]), repeated(v[:, :K])
    return torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v


def head_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MPT: a bias of three axes."""
    return torch.softmax(q @ k.mT + torch.arange(H * S, dtype=q.dtype).view(H, 1, S) * 0.1, -1) @ v


WRITTEN = [
    scale_after, scale_by_division, scale_of_queries, scale_of_both, scale_of_values,
    scale_of_scores_and_bias, soft_cap, upcast, all_in_float32, alibi, merged_heads, masked_fill,
    largest_taken_off, repeated_heads, head_bias,
]  # fmt: skip


def test_written_out_forms():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [form(q, k, v) for form in WRITTEN]

    assert recognized(fn, *qkv(), rtol=2e-6).count("llmcomp.attention") == len(WRITTEN)


def test_written_out_forms_in_bfloat16():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [form(q, k, v) for form in WRITTEN]

    printed = recognized(fn, *qkv(dtype=torch.bfloat16), rtol=0.03)
    assert len(re.findall(r"attention.*: bf16.* = llmcomp.attention", printed)) == len(WRITTEN)


def test_sizes_may_be_symbolic():
    def shorter(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        length = x.shape[0]
        causal = torch.arange(length) <= torch.arange(length)[:, None]
        mask = torch.where(causal, 0.0, torch.finfo(q.dtype).min)
        q, k, v = (t[:, :, :length] for t in (q, k, v))
        scores = q @ k.mT * 0.25 + mask
        return torch.softmax(scores, -1) @ v

    printed = recognized(shorter, *qkv(), torch.zeros(S - 1), dynamic=True, rtol=2e-6)
    assert "True, 0, 0, 0.0)" in printed


def test_gpt_2_in_full():
    def fn(x: Tensor) -> Tensor:
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in x.split(H * D, dim=2))
        return scale_after(q, k, v).reshape(B, S, H * D)

    assert_expected_inline(
        recognized(fn, torch.randn(B, S, 3 * H * D), rtol=2e-6),
        """\
def (x0: f32[2, 6, 96])
split = aten.split(x0, 32, 2)
getitem: f32[2, 6, 32] = getitem(split, 0)
getitem_1: f32[2, 6, 32] = getitem(split, 1)
getitem_2: f32[2, 6, 32] = getitem(split, 2)
view: f32[2, 6, 4, 8] = aten.view(getitem, [2, 6, 4, 8])
transpose: f32[2, 4, 6, 8] = aten.transpose(view, 1, 2)
view_1: f32[2, 6, 4, 8] = aten.view(getitem_1, [2, 6, 4, 8])
transpose_1: f32[2, 4, 6, 8] = aten.transpose(view_1, 1, 2)
view_2: f32[2, 6, 4, 8] = aten.view(getitem_2, [2, 6, 4, 8])
transpose_2: f32[2, 4, 6, 8] = aten.transpose(view_2, 1, 2)
attention: f32[2, 4, 6, 8] = llmcomp.attention(transpose, transpose_1, transpose_2, None, None, 0.25, True, 0, 0, 0.0)
transpose_3: f32[2, 6, 4, 8] = aten.transpose(attention, 1, 2)
clone: f32[2, 6, 4, 8] = aten.clone(transpose_3, memory_format=torch.contiguous_format)
view_3: f32[2, 6, 32] = aten.view(clone, [2, 6, 32])
return (view_3)""",  # noqa: E501
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_join_the_softmax(dtype: torch.dtype):
    def fn(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = q @ repeated(k).transpose(2, 3) * 0.25 + causal_mask(dtype)
        both = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        weights = F.softmax(both, dim=-1)[..., :-1]
        return weights @ repeated(v)

    printed = recognized(fn, *qkv(K, dtype=dtype), torch.randn(H, dtype=dtype), rtol=0.03)
    assert re.search(r"attention\(x\d, x\d, x\d, None, x\d, 0.25, True, 0, 0, 0.0\)", printed)


def test_sinks_that_gate_the_result():
    """Granite: the part of the softmax that the sink would take is taken off after it."""

    def fn(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * 0.25 + causal_mask(q.dtype)
        gate = torch.sigmoid(torch.logsumexp(scores, -1) - sinks.view(1, -1, 1))
        return (torch.softmax(scores, -1) @ v) * gate.unsqueeze(-1)

    printed = recognized(fn, *qkv(), torch.randn(H), rtol=2e-6)
    assert re.search(r"attention\(x\d, x\d, x\d, None, x\d, 0.25, True, 0, 0, 0.0\)", printed)


def test_hidden_keys_that_are_zeroed_after_the_softmax_too():
    """CPM-Ant: a row that sees nothing gives zeros, as in llmcomp::attention."""

    def fn(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(padding, torch.finfo(q.dtype).min)
        return torch.softmax(scores, -1).masked_fill(padding, 0) @ v

    padding = torch.zeros(B, 1, S, S, dtype=torch.bool)
    padding[0, :, 2] = True
    assert "bitwise_not" in recognized(fn, *qkv(), padding, rtol=2e-6)


# ---- left alone


def test_weights_that_are_returned_stay():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights

    (miss,) = misses(fn, *qkv())
    assert miss.reason == "the attention weights are used elsewhere"


def test_scores_that_are_used_twice_stay():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        return torch.softmax(scores, -1) @ v, scores.sum()

    (miss,) = misses(fn, *qkv())
    assert miss.reason == "the scores view_2 are used elsewhere, by sum_1"


def test_an_operator_on_the_scores_that_attention_lacks():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).relu() * 2, -1) @ v

    (miss,) = misses(fn, *qkv())
    assert miss.reason == "relu is between the product and the softmax"


def test_an_operator_on_the_weights_that_attention_lacks():
    def fn(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return (torch.softmax(q @ k.mT, -1) * gate) @ v

    (miss,) = misses(fn, *qkv(), torch.rand(H, 1, 1))
    assert miss.reason == "mul is between the softmax and the values"


def test_weights_that_are_zeroed_for_keys_that_the_softmax_counts():
    def fn(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1).masked_fill(padding, 0) @ v

    (miss,) = misses(fn, *qkv(), torch.rand(S) > 0.5)
    assert miss.reason == "the softmax counts keys whose weights are set to zero after it"


def test_a_mask_before_the_soft_cap():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(q @ k.mT + causal_mask(q.dtype)) * 5, -1) @ v

    (miss,) = misses(fn, *qkv())
    assert miss.reason == "tanh is between the product and the softmax"


def test_dropout_is_left_to_eager():
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    (miss,) = misses(fn, *qkv())
    assert miss.reason == "dropout"


def test_other_softmaxes_are_not_attention():
    def fn(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        router = torch.softmax(F.linear(x, weight), -1)
        over_queries = torch.softmax(x @ x.mT, 1) @ x
        return *router.topk(2), over_queries

    assert misses(fn, torch.randn(3, 5, 8), torch.randn(4, 8)) == []
