"""passes/recognize_append.py: caches that grow by concatenation are appended to in place."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.graph import text
from llmcomp.passes.base import Report, run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.recognize_append import RECOGNIZE_APPEND
from llmcomp.passes.recognize_attention import RECOGNIZE_ATTENTION
from tests.graphs import capture, run

B, H, S, D = 2, 3, 5, 4
PASSES = (CANONICALIZE, RECOGNIZE_ATTENTION, RECOGNIZE_APPEND, CANONICALIZE)


def values(count: int = S) -> Tensor:
    return torch.randn(B, H, count, D)


def rewritten(fn: Callable[..., object], *inputs: object, dynamic: bool | None = None) -> tuple[str, Report]:
    """The graph after the pass, which computes the same values, and the report."""
    gm = capture(fn, *inputs, dynamic=dynamic)
    before = run(gm)
    results = run_passes(gm, PASSES, frozenset({SHAPES}))
    for a, b in zip(run(gm), before, strict=True):
        assert a == b if not isinstance(b, Tensor) else torch.allclose(a, b, atol=1e-6)
    return text(gm.graph), results[2].report


def decode(q: Tensor, past: Tensor, k: Tensor, past_values: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    keys, contents = torch.cat([past, k * 2], 2), torch.cat([past_values, v], 2)
    return F.scaled_dot_product_attention(q, keys, contents), keys, contents


def step() -> tuple[Tensor, ...]:
    return values(1), values(), values(1), values(), values(1)


def test_decode_appends() -> None:
    printed, report = rewritten(decode, *step())
    assert_expected_inline(
        printed,
        """\
def (x0: f32[2, 3, 1, 4], x1: f32[2, 3, 5, 4], x2: f32[2, 3, 5, 4], x3: f32[2, 3, 1, 4], x4: f32[2, 3, 1, 4])
cache_grow: f32[2, 3, 6, 4] = llmcomp.cache_grow(x1, 1, 2)
cache_grow_1: f32[2, 3, 6, 4] = llmcomp.cache_grow(x2, 1, 2)
mul: f32[2, 3, 1, 4] = aten.mul(x0, 2)
arange: i64[1] = aten.arange(5, 6, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_grow, mul, arange, 2)
arange_1: i64[1] = aten.arange(5, 6, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_grow_1, x3, arange_1, 2)
attention: f32[2, 3, 1, 4] = llmcomp.attention(x4, cache_grow, cache_grow_1, None, None, 0.5, False, 0, 0, 0.0)
return (attention, cache_grow, cache_grow_1)""",
    )
    assert report.rewrites == 2 and not report.near_misses


def test_symbolic_lengths() -> None:
    inputs = step()
    for past in inputs[1], inputs[3]:
        torch._dynamo.mark_dynamic(past, 2)
    printed, report = rewritten(decode, *inputs)
    assert report.rewrites == 2 and "s0 + 1" in printed and "aten.cat" not in printed


def test_prefill_makes_caches() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        empty = torch.tensor([])
        keys, contents = torch.cat([empty, k * 2], -2), torch.cat([empty, v * 3], -2)
        return F.scaled_dot_product_attention(q, keys, contents, is_causal=True), keys, contents

    printed, report = rewritten(fn, values(), values(), values())
    assert_expected_inline(
        printed,
        """\
def (x0: f32[2, 3, 5, 4], x1: f32[2, 3, 5, 4], x2: f32[2, 3, 5, 4])
cache_room: f32[2, 3, 5, 4] = llmcomp.cache_room([2, 3, 5, 4], 2, f32, cpu)
cache_room_1: f32[2, 3, 5, 4] = llmcomp.cache_room([2, 3, 5, 4], 2, f32, cpu)
mul: f32[2, 3, 5, 4] = aten.mul(x0, 2)
arange: i64[5] = aten.arange(0, 5, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_room, mul, arange, 2)
mul_1: f32[2, 3, 5, 4] = aten.mul(x1, 3)
arange_1: i64[5] = aten.arange(0, 5, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_room_1, mul_1, arange_1, 2)
attention: f32[2, 3, 5, 4] = llmcomp.attention(x2, cache_room, cache_room_1, None, None, 0.5, True, 0, 0, 0.0)
clone: f32[2, 3, 5, 4] = aten.clone(attention, memory_format=torch.contiguous_format)
return (clone, cache_room, cache_room_1)""",
    )
    assert report.rewrites == 2


def test_a_window_is_a_view_of_the_cache() -> None:
    def fn(q: Tensor, past: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        keys = torch.cat([past, k], 2)
        return F.scaled_dot_product_attention(q, keys, keys + v), keys[:, :, -S:]

    printed, report = rewritten(fn, values(1), values(), values(1), values(S + 1))
    assert report.rewrites == 1 and "cat" not in printed and "slice" in printed


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, past, k: F.scaled_dot_product_attention(q, torch.cat([past, k], 2), torch.cat([past, k], 2)),
        lambda q, past, k: torch.cat([past, k], 2),
        lambda q, past, k: (torch.cat([past, k], 2), F.scaled_dot_product_attention(q, past, past)),
        lambda q, past, k: (F.scaled_dot_product_attention(q, past, past), past),
    ],
    ids=["not returned", "no attention", "attention reads the past alone", "nothing new"],
)
def test_what_is_no_cache_is_left_alone(fn: Callable[..., object]) -> None:
    printed, report = rewritten(fn, values(1), values(), values(1))
    assert "cache_" not in printed and report.rewrites == 0


def test_keys_of_an_encoder_get_no_room() -> None:
    def fn(q: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        keys = states * 2
        return F.scaled_dot_product_attention(q, keys, keys), keys

    printed, report = rewritten(fn, values(1), values())
    assert "cache_room" not in printed and report.rewrites == 0


def test_a_past_that_is_written_into_is_left_alone() -> None:
    def fn(q: Tensor, past: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        keys = torch.cat([past, k], 2)
        out = F.scaled_dot_product_attention(q, keys, keys)
        past.mul_(2)
        return out, keys

    printed, report = rewritten(fn, values(1), values(), values(1))
    assert "cache_" not in printed
    (miss,) = report.near_misses
    assert "is written into" in miss.reason


def test_a_cache_is_made_by_the_kernel_that_computes_the_keys(graphs) -> None:
    weight = torch.randn(H * D, 8)

    def fn(x: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        k = F.linear(x, weight).view(B, 1, H, D).transpose(1, 2)
        keys = torch.cat([past, k], 2)
        return F.scaled_dot_product_attention(k, keys, keys), keys

    x, past = torch.randn(B, 1, 8), values()
    with torch.no_grad():
        compiled = torch.compile(fn, backend="llmcomp")
        for _ in range(3):
            for ours, eager in zip(compiled(x, past), fn(x, past), strict=True):
                torch.testing.assert_close(ours, eager)
    (graph,) = graphs
    assert [k.family for k in graph.program.kernels][:1] == ["contract"]
    assert [e.op for e in graph.program.externs] == ["llmcomp.cache_grow.default"]
