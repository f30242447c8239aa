"""Every llmcomp:: operator is a well-formed torch operator and computes what plain torch or transformers
does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rope
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import llmcomp.blocks
import llmcomp.cache_ops
import llmcomp.masked
import llmcomp.packed_ops
import llmcomp.two_four  # noqa: F401  (all register operators)
from llmcomp.formats import Int4, Int8
from llmcomp.ops import (
    ACTIVATIONS,
    attention,
    cache_write_,
    gated,
    grouped_linear,
    layer_norm,
    linear,
    rms_norm,
    rope,
)

ops = torch.ops.llmcomp


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Sample:
    op: Callable[..., object]
    args: Sequence[object]


half = torch.bfloat16
_packed = Int4(32).quantize(normal(5, 64))
PACKED = (_packed.codes, _packed.scale, _packed.zero)
SCALES = normal(2, 3, 4, 1).abs() + 0.1
CODES = torch.randint(-127, 128, (2, 3, 4, 8), dtype=torch.int8)
SPARSE = normal(5, 64, dtype=half) * torch.tensor([1.0, 0, 0, 1]).repeat(16).to(half)
_eight = Int8().quantize(SPARSE)
MASKED = llmcomp.masked.pack(SPARSE, llmcomp.masked.room(SPARSE))
BLOCKY = normal(5, 70) * (torch.arange(70) // 16 != 1)
BLOCKS = llmcomp.blocks.pack(BLOCKY, 8, 16, 4096)
SAMPLES = {
    "pack_blocks": Sample(ops.pack_blocks.default, (BLOCKY, 8, 16, 4096)),
    "block_linear": Sample(ops.block_linear.default, (normal(2, 3, 70), BLOCKS, normal(5), 5, 8, 16)),
    "pack_masked": Sample(ops.pack_masked.default, (SPARSE, MASKED.numel())),
    "masked_linear": Sample(
        ops.masked_linear.default, (normal(2, 3, 64, dtype=half), MASKED, normal(5, dtype=half), 5)
    ),
    "pack_codes": Sample(ops.pack_codes.default, (_eight.codes, _eight.scale, None, "int8", 64)),
    "pack_two_four": Sample(ops.pack_two_four.default, (SPARSE,)),
    "two_four_linear": Sample(
        ops.two_four_linear.default, (normal(2, 3, 64, dtype=half), llmcomp.two_four.pack(SPARSE), None)
    ),
    "cache_grow": Sample(ops.cache_grow.default, (normal(2, 3, 4, 8), 2, 2)),
    "cache_grow_outermost": Sample(ops.cache_grow.default, (normal(4, 8, dtype=half), 1, 0)),
    "cache_room": Sample(ops.cache_room.default, ([2, 3, 4, 8], 2, torch.float32, torch.device("cpu"))),
    "cache_scale": Sample(ops.cache_scale.default, (normal(2, 3, 4, 8), torch.int8)),
    "cache_quantize": Sample(ops.cache_quantize.default, (normal(2, 3, 4, 8), SCALES, torch.int8)),
    "cache_dequantize": Sample(ops.cache_dequantize.default, (CODES, SCALES, torch.bfloat16)),
    "dequantize": Sample(ops.dequantize.default, (*PACKED, "int4_g32", 64, torch.bfloat16)),
    "packed_linear": Sample(ops.packed_linear.default, (normal(2, 3, 64), *PACKED, normal(5), "int4_g32")),
    "packed_grouped_linear": Sample(
        ops.packed_grouped_linear.default,
        (normal(6, 64), *(part.expand(2, *part.shape) for part in PACKED), torch.tensor([1, 4]), "int4_g32"),
    ),
    "linear": Sample(ops.linear.default, (normal(2, 3, 8), normal(5, 8), normal(5), False)),
    "linear_kn": Sample(ops.linear.default, (normal(3, 8), normal(8, 5), None, True)),
    "linear_vector": Sample(ops.linear.default, (normal(8, dtype=half), normal(5, 8, dtype=half), None, False)),
    "grouped_linear": Sample(
        ops.grouped_linear.default, (normal(6, 8), normal(3, 5, 8), torch.tensor([2, 2, 6]), False)
    ),
    "grouped_linear_kn": Sample(
        ops.grouped_linear.default, (normal(6, 8), normal(2, 8, 5), torch.tensor([1, 4]).int(), True)
    ),
    "attention": Sample(
        ops.attention.default,
        (normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 6), None, None, 0.3, True, 2),
    ),
    "attention_all": Sample(
        ops.attention.default,
        (
            normal(2, 4, 3, 8, dtype=half),
            normal(2, 2, 5, 8, dtype=half),
            normal(2, 2, 5, 8, dtype=half),
            normal(2, 1, 3, 5, dtype=half),
            normal(4, dtype=half),
            0.3,
            False,
            2,
            2,
            5.0,
        ),
    ),
    "rms_norm": Sample(ops.rms_norm.default, (normal(2, 3, 8), normal(8), 1e-6, False, True)),
    "rms_norm_cast": Sample(ops.rms_norm.default, (normal(2, 8), None, 1e-6, False, False, half)),
    "layer_norm": Sample(ops.layer_norm.default, (normal(2, 3, 8), normal(8), normal(8), 1e-5)),
    "layer_norm_plain": Sample(ops.layer_norm.default, (normal(2, 8, dtype=half), None, None, 1e-5)),
    "rope": Sample(ops.rope.default, (normal(2, 4, 3, 8), normal(1, 1, 3, 8), normal(1, 1, 3, 8), False)),
    "rope_interleaved": Sample(
        ops.rope.default, (normal(2, 3, 4, 8).transpose(1, 2), normal(3, 8), normal(3, 8), True, half)
    ),
    "gated": Sample(ops.gated.default, (normal(2, 8), normal(2, 16)[:, ::2], "silu")),
    "cache_write_": Sample(
        ops.cache_write_.default, (torch.zeros(2, 3, 8, 4), normal(2, 3, 2, 4), torch.tensor([5, 1]), 2)
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_is_well_formed(name: str) -> None:
    sample = SAMPLES[name]
    torch.library.opcheck(sample.op, tuple(sample.args))


def test_caches_lie_slice_after_slice() -> None:
    past = normal(2, 3, 4, 8)
    grown = ops.cache_grow(past, 2, 2)
    assert grown.shape == (2, 3, 6, 8) and grown.stride() == (24, 8, 48, 1) and torch.equal(grown[:, :, :4], past)
    assert ops.cache_room([2, 5, 3], 1, torch.float32, torch.device("cpu")).stride() == (3, 6, 1)


def test_every_operator_has_a_sample() -> None:
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "llmcomp::" in name}
    assert names == {str(s.op).split(".")[1] for s in SAMPLES.values()}


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(normal(*p.shape, seed=7) * 0.3)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, Olmo2RMSNorm])
def test_rms_norm_is_that_of_transformers(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module, x = noisy(kind(16, eps=1e-5)).to(dtype), normal(2, 3, 16, dtype=dtype)
    plus_one, round_first = kind is GemmaRMSNorm, kind is LlamaRMSNorm
    with torch.no_grad():
        ours = rms_norm(x, module.weight, 1e-5, plus_one, round_first)
        assert torch.equal(ours, module(x))


def test_rms_norm_without_weight_casts_once() -> None:
    x = normal(3, 16)
    expected = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, None, 0.1, False, False, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_that_of_torch_and_cohere(dtype: torch.dtype) -> None:
    x, weight, bias = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(2, 3, 16), (16,), (16,)]))
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5))
    module = noisy(CohereLayerNorm(16, eps=1e-5)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer_norm(x, module.weight, None, 1e-5), module(x))


def angles(dtype: torch.dtype, repeat: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    angle = repeat(torch.arange(5)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.02]))[None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def test_rope_is_that_of_llama() -> None:
    q, k = normal(2, 4, 5, 8), normal(2, 2, 5, 8, seed=1)
    cos, sin = angles(torch.float32, lambda a: torch.cat([a, a], -1))
    for ours, theirs in zip((q, k), llama_rope(q, k, cos, sin), strict=True):
        assert torch.equal(rope(ours, cos[:, None], sin[:, None], False), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_rope_is_that_of_cohere(dtype: torch.dtype) -> None:
    q, k = normal(2, 4, 5, 8, dtype=dtype), normal(2, 2, 5, 8, dtype=dtype, seed=1)
    cos, sin = angles(torch.float32, lambda a: a.repeat_interleave(2, -1))
    for ours, theirs in zip((q, k), cohere_rope(q, k, cos, sin), strict=True):
        assert torch.equal(rope(ours, cos[:, None], sin[:, None], True), theirs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_applies_its_activation(name: str) -> None:
    x, up = normal(50) * 3, normal(50, seed=1)
    expected = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "relu": lambda x: x.clamp(min=0),
        "relu2": lambda x: x.clamp(min=0) ** 2,
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
        "identity": lambda x: x,
    }[name]
    torch.testing.assert_close(gated(x, up, name), expected(x) * up)


def test_linear_agrees_with_torch_in_both_orders() -> None:
    x, weight, bias = normal(2, 3, 8), normal(5, 8, seed=1), normal(5, seed=2)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias, False), expected)
    torch.testing.assert_close(linear(x, weight.t(), bias, True), expected)
    torch.testing.assert_close(linear(x, weight.t(), None, True), expected - bias)
    transposed = linear(x.transpose(0, 1), weight, bias, False)
    assert transposed.is_contiguous() and torch.allclose(transposed, expected.transpose(0, 1))


def test_grouped_linear_gives_each_expert_its_rows() -> None:
    x, weight = normal(6, 8), normal(4, 5, 8, seed=1)
    out = grouped_linear(x, weight, torch.tensor([0, 2, 5, 5]), False)
    torch.testing.assert_close(out[:2], x[:2] @ weight[1].t())
    torch.testing.assert_close(out[2:5], x[2:5] @ weight[2].t())
    assert out[5].eq(0).all()
    torch.testing.assert_close(grouped_linear(x, weight.transpose(1, 2), torch.tensor([0, 2, 5, 5]), True), out)


def qkv(queries: int = 4, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 4, queries, 8), normal(2, 2, keys, 8, seed=1), normal(2, 2, keys, 8, seed=2)


def test_attention_is_that_of_torch() -> None:
    q, k, v = qkv()
    mask = normal(2, 4, 4, 6, seed=3)
    for given in (mask, mask > -0.5):
        expected = F.scaled_dot_product_attention(q, k, v, given, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(attention(q, k, v, given, None, 0.3, False), expected)
    expected = F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4], is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attention(q, k[:, :, :4], v[:, :, :4], None, None, 0.3, True), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 2])
def test_attention_sees_by_position(causal: bool, window: int) -> None:
    q, k, v = qkv()
    position, key = torch.arange(4)[:, None] + 1, torch.arange(6)[None]
    mask = torch.ones(4, 6, dtype=torch.bool)
    if causal:
        mask &= key <= position
    if window:
        mask &= (key - position).abs() < window if not causal else position - key < window
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    ours = attention(q, k, v, None, None, 0.3, causal, offset=1, window=window)
    torch.testing.assert_close(ours, expected)


def test_attention_of_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = qkv()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    out = attention(q, k, v, mask, None, 0.3, False)
    assert out[:, :, 1].eq(0).all() and out.isfinite().all()


def test_attention_soft_cap_and_sinks() -> None:
    q, k, v = qkv()
    sinks = normal(4, seed=3)
    scores = 0.7 * torch.tanh((q @ k.repeat_interleave(2, 1).transpose(2, 3)) * 2.0 / 0.7)
    total = scores.exp().sum(-1, keepdim=True) + sinks.exp()[None, :, None, None]
    expected = scores.exp() / total @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attention(q, k, v, None, sinks, 2.0, False, softcap=0.7), expected)


def test_attention_lies_in_memory_as_the_projection_reads_it() -> None:
    q, k, v = qkv()
    out = attention(q, k, v, None, None, 1.0, False)
    assert out.transpose(1, 2).is_contiguous()


def test_cache_write_changes_the_cache_in_place() -> None:
    cache, value = torch.zeros(2, 3, 8, 4), normal(2, 3, 2, 4)
    assert cache_write_(cache, value, torch.tensor([5, 1]), 2) is None
    assert torch.equal(cache[:, :, [5, 1]], value) and cache.count_nonzero() == value.numel()
