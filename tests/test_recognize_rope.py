"""recognize_rope: the rotary embeddings of transformers become llmcomp.rope."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from transformers.models.codegen.modeling_codegen import apply_rotary_pos_emb as codegen
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb as deepseek_v2
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as deepseek
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.gpt_oss.modeling_gpt_oss import _apply_rotary_emb as gpt_oss
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb as llama4
from transformers.models.nanochat.modeling_nanochat import apply_rotary_pos_emb as nanochat
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision as vision

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_rope import RECOGNIZE_ROPE
from llmcomp.passes.share import SHARE
from tests.graphs import Function, rewrite

PASSES = (CANONICALIZE, SHARE, RECOGNIZE_ROPE)
B, H, S, D = 2, 3, 5, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(channels: int = D) -> tuple[Tensor, Tensor]:
    angle = normal(1, S, channels // 2, seed=1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def two(apply: Function) -> Function:
    """Queries and keys as linear layers leave them, rotated by `apply`."""
    return lambda q, k, cos, sin: apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def inputs(dtype: torch.dtype, channels: int = D) -> tuple[Tensor, ...]:
    cos, sin = angles(channels)
    tensors = tuple(t.to(dtype) for t in (normal(B, S, H, D), normal(B, S, 1, D, seed=2), cos, sin))
    for t in tensors:
        # The size of a head is that of a weight.
        torch._dynamo.mark_static(t, t.dim() - 1)
    return tensors


# (function of (q, k, cos, sin), what the calls end in, channels of cos and sin)
FORMS: dict[str, tuple[Function, str, int]] = {
    "llama": (two(llama), ", False)", D),
    "cohere": (two(cohere), ", True)", D),
    "glm": (two(glm), ", True)", D),
    "glm_partial": (two(glm), ", True)", D // 2),
    "deepseek": (two(deepseek), ", False)", D),
    "nanochat": (two(nanochat), ", False)", D),
    "vision": (
        lambda q, k, cos, sin: vision(q[0], k[0], cos[0], sin[0]),
        ", False)",
        D,
    ),
    "codegen": (
        lambda q, k, cos, sin: (
            codegen(q, sin[0, :, : D // 2][None], cos[0, :, : D // 2][None]),
            codegen(k, sin[0, :, : D // 2][None], cos[0, :, : D // 2][None]),
        ),
        ", True)",
        D,
    ),
    "gpt_oss": (
        lambda q, k, cos, sin: tuple(
            gpt_oss(x.transpose(1, 2), cos[:, None, :, : D // 2], sin[:, None, :, : D // 2]) for x in (q, k)
        ),
        ", False)",
        D,
    ),
}


@pytest.mark.parametrize("dtype, dynamic", [(torch.float32, True), (torch.bfloat16, None)])
@pytest.mark.parametrize("name", FORMS)
def test_rotations_of_transformers(name: str, dtype: torch.dtype, dynamic: bool | None) -> None:
    apply, ending, channels = FORMS[name]
    printed, results = rewrite(apply, inputs(dtype, channels), *PASSES, dynamic=dynamic)
    calls = [line for line in printed.splitlines() if "llmcomp.rope" in line]
    assert len(calls) == 2 and results[2].report.rewrites == 2, printed
    assert all(call.endswith(ending) for call in calls), printed
    assert not results[2].report.near_misses
    # Queries and keys read the same angles.
    assert len({call.partition("llmcomp.rope(")[2].split(", ", 1)[1] for call in calls}) == 1, printed


def test_llama_before_and_after() -> None:
    printed, _ = rewrite(two(llama), inputs(torch.float32), *PASSES, dynamic=True)
    assert_expected_inline(
        printed,
        """\
def (x0: s0, x1: s1, x2: s2, x3: f32[s0, s1, s2, 8], x4: f32[s0, s1, 1, 8], x5: f32[1, s1, 8], x6: f32[1, s1, 8])
transpose: f32[s0, s2, s1, 8] = aten.transpose(x3, 1, 2)
transpose_1: f32[s0, 1, s1, 8] = aten.transpose(x4, 1, 2)
unsqueeze: f32[1, 1, s1, 8] = aten.unsqueeze(x5, 1)
unsqueeze_1: f32[1, 1, s1, 8] = aten.unsqueeze(x6, 1)
rope: f32[s0, s2, s1, 8] = llmcomp.rope(transpose, unsqueeze, unsqueeze_1, False)
rope_1: f32[s0, 1, s1, 8] = llmcomp.rope(transpose_1, unsqueeze, unsqueeze_1, False)
return (rope, rope_1)""",
    )


def complex_llama4(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return llama4(q, k, torch.complex(cos[..., : D // 2].float(), sin[..., : D // 2].float()))


def complex_deepseek(q: Tensor, k: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return deepseek_v2(q.transpose(1, 2), k.transpose(1, 2), torch.polar(torch.ones_like(angle), angle) * 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_numbers(dtype: torch.dtype) -> None:
    printed, results = rewrite(complex_llama4, inputs(dtype), *PASSES)
    assert results[2].report.rewrites == 2 and printed.count("llmcomp.rope") == 2
    q, k = inputs(dtype)[:2]
    printed, results = rewrite(complex_deepseek, (q, k, normal(B, S, D // 2)), *PASSES)
    assert results[2].report.rewrites == 2 and "complex" not in printed
    assert printed.count("aten.cos") == 1  # queries and keys read the same angles


def test_complex_before_and_after() -> None:
    q, k = normal(1, S, H, D), normal(1, S, 1, D, seed=2)
    printed, _ = rewrite(complex_deepseek, (q, k, normal(1, S, D // 2)), *PASSES)
    assert_expected_inline(
        printed,
        """\
def (x0: f32[1, 5, 3, 8], x1: f32[1, 5, 1, 8], x2: f32[1, 5, 4])
transpose: f32[1, 3, 5, 8] = aten.transpose(x0, 1, 2)
transpose_1: f32[1, 1, 5, 8] = aten.transpose(x1, 1, 2)
cos: f32[1, 5, 4] = aten.cos(x2)
sin: f32[1, 5, 4] = aten.sin(x2)
mul: f32[1, 5, 4] = aten.mul(cos, 1.5)
mul_1: f32[1, 5, 4] = aten.mul(sin, 1.5)
unsqueeze: f32[1, 1, 5, 4] = aten.unsqueeze(mul, 1)
unsqueeze_1: f32[1, 1, 5, 4] = aten.unsqueeze(mul_1, 1)
unsqueeze_2: f32[1, 1, 5, 4, 1] = aten.unsqueeze(unsqueeze, -1)
cat: f32[1, 1, 5, 4, 2] = aten.cat([unsqueeze_2, unsqueeze_2], -1)
view: f32[1, 1, 5, 8] = aten.view(cat, [1, 1, 5, -1])
unsqueeze_3: f32[1, 1, 5, 4, 1] = aten.unsqueeze(unsqueeze_1, -1)
cat_1: f32[1, 1, 5, 4, 2] = aten.cat([unsqueeze_3, unsqueeze_3], -1)
view_1: f32[1, 1, 5, 8] = aten.view(cat_1, [1, 1, 5, -1])
rope: f32[1, 3, 5, 8] = llmcomp.rope(transpose, view, view_1, True)
rope_1: f32[1, 1, 5, 8] = llmcomp.rope(transpose_1, view, view_1, True)
return (rope, rope_1)""",
    )


def test_other_products_of_complex_numbers_stay() -> None:
    def fn(x: Tensor, angle: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.view(S, D // 2, 2)) * torch.polar(angle, angle)
        return torch.view_as_real(turned)  # the pairs stay apart

    printed, results = rewrite(fn, (normal(S, D), normal(S, D // 2)), *PASSES)
    assert "llmcomp.rope" not in printed and results[2].report.rewrites == 0


def test_casts_are_taken_in() -> None:
    """Angles in float32 make the products float32, which is rounded once at the end."""

    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        kept, _ = llama(q.transpose(1, 2), k.transpose(1, 2), cos.float(), sin.float())
        cast, _ = llama(q.float().transpose(1, 2), k.transpose(1, 2), cos.float(), sin.float())
        return kept, cast.to(q.dtype)

    printed, _ = rewrite(fn, inputs(torch.bfloat16), *PASSES)
    assert_expected_inline(
        printed,
        """\
def (x0: bf16[2, 5, 3, 8], x1: bf16[2, 5, 1, 8], x2: bf16[1, 5, 8], x3: bf16[1, 5, 8])
transpose: bf16[2, 3, 5, 8] = aten.transpose(x0, 1, 2)
_to_copy: f32[1, 5, 8] = aten._to_copy(x2, dtype=f32)
_to_copy_1: f32[1, 5, 8] = aten._to_copy(x3, dtype=f32)
unsqueeze: f32[1, 1, 5, 8] = aten.unsqueeze(_to_copy, 1)
unsqueeze_1: f32[1, 1, 5, 8] = aten.unsqueeze(_to_copy_1, 1)
rope: f32[2, 3, 5, 8] = llmcomp.rope(transpose, unsqueeze, unsqueeze_1, False, f32)
_to_copy_2: f32[2, 5, 3, 8] = aten._to_copy(x0, dtype=f32)
transpose_1: f32[2, 3, 5, 8] = aten.transpose(_to_copy_2, 1, 2)
rope_1: bf16[2, 3, 5, 8] = llmcomp.rope(transpose_1, unsqueeze, unsqueeze_1, False, bf16)
return (rope, rope_1)""",
    )


def test_halves_of_every_spelling() -> None:
    def joined(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, sin * first + cos * second], -1)

    def in_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos[:, :, None, : D // 2], sin[:, :, None, : D // 2]
        return joined(q, cos, sin), in_turn(q, cos, sin)

    printed, _ = rewrite(fn, inputs(torch.float32), *PASSES, dynamic=True)
    assert_expected_inline(
        printed,
        """\
def (x0: s0, x1: f32[1, s0, 8], x2: f32[1, s0, 8], x3: s1, x4: s2, x5: f32[s1, s0, s2, 8])
unsqueeze: f32[1, s0, 1, 8] = aten.unsqueeze(x1, 2)
slice: f32[1, s0, 1, 4] = aten.slice(unsqueeze, 3, 0, 4)
unsqueeze_1: f32[1, s0, 1, 8] = aten.unsqueeze(x2, 2)
slice_1: f32[1, s0, 1, 4] = aten.slice(unsqueeze_1, 3, 0, 4)
cat: f32[1, s0, 1, 8] = aten.cat([slice, slice], -1)
cat_1: f32[1, s0, 1, 8] = aten.cat([slice_1, slice_1], -1)
rope: f32[s1, s0, s2, 8] = llmcomp.rope(x5, cat, cat_1, False)
unsqueeze_2: f32[1, s0, 1, 4, 1] = aten.unsqueeze(slice, -1)
cat_2: f32[1, s0, 1, 4, 2] = aten.cat([unsqueeze_2, unsqueeze_2], -1)
view: f32[1, s0, 1, 8] = aten.view(cat_2, [1, x0, 1, -1])
unsqueeze_3: f32[1, s0, 1, 4, 1] = aten.unsqueeze(slice_1, -1)
cat_3: f32[1, s0, 1, 4, 2] = aten.cat([unsqueeze_3, unsqueeze_3], -1)
view_1: f32[1, s0, 1, 8] = aten.view(cat_3, [1, x0, 1, -1])
rope_1: f32[s1, s0, s2, 8] = llmcomp.rope(x5, view, view_1, True)
return (rope, rope_1)""",
    )


Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


def test_near_misses_say_why() -> None:
    def turned(x: Tensor) -> Tensor:
        return torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)

    def other_value(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x.exp() * cos + turned(x) * sin

    def one_angle(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos[..., :1] + turned(x) * sin

    def spread(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x[:, :1] * cos + turned(x[:, :1]) * sin

    def halves_in_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = cos[..., : D // 2], sin[..., : D // 2]
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)

    def reason(fn: Rotation) -> list[str]:
        results = rewrite(fn, (normal(B, S, D), *angles()), *PASSES)[1]
        assert results[2].report.rewrites == 0
        return [miss.reason for miss in results[2].report.near_misses]

    assert reason(other_value) == ["mul is not arg0_1 times its cosines"]
    assert reason(one_angle) == ["slice_1 is not as wide as arg1_1"]
    assert reason(spread) == ["the result has another shape than slice_1"]
    assert reason(halves_in_turn) == ["channels of the two halves are joined in turn"]


def test_other_joins_of_halves_stay() -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        a, b = x.chunk(2, -1)
        both = torch.cat([-b, -a], -1) * sin + x * cos
        mirrored = torch.cat([-a, b], -1) * sin + x * cos
        third = torch.cat([-x[..., 3:], x[..., :3]], -1) * sin + x * cos
        c, s = cos[..., : D // 2], sin[..., : D // 2]
        return both, mirrored, third, torch.cat([a * c - b * s, b * c - a * s], -1)

    printed, _ = rewrite(fn, (normal(B, S, D), *angles()), *PASSES)
    assert "llmcomp" not in printed
