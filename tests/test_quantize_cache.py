"""passes/quantize_cache.py: keys and values that a graph returns are quantized, and nothing else is."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.cache_ops import quantized
from llmcomp.graph import text
from llmcomp.passes.base import Report, run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.quantize_cache import quantize_cache
from llmcomp.passes.recognize_append import RECOGNIZE_APPEND
from llmcomp.passes.recognize_attention import RECOGNIZE_ATTENTION
from llmcomp.passes.recognize_cache import RECOGNIZE_CACHE
from llmcomp.quantized_cache import QuantizedCacheTensor
from tests.graphs import capture, run

B, H, S, D = 2, 3, 5, 4
PASSES = (CANONICALIZE, RECOGNIZE_ATTENTION, quantize_cache(torch.int8), RECOGNIZE_APPEND, CANONICALIZE)


def values(count: int = S) -> Tensor:
    return torch.randn(B, H, count, D)


def held(x: Tensor) -> QuantizedCacheTensor:
    return QuantizedCacheTensor(*quantized(x, torch.int8), x.dtype)


def plain(x: Tensor) -> Tensor:
    return x.dequantized() if isinstance(x, QuantizedCacheTensor) else x


def rewritten(fn: Callable[..., object], *inputs: object) -> tuple[str, Report, list[Tensor]]:
    """The graph after the pass, the report, and the results; tensors that hold codes agree with eager's to a step."""
    gm = capture(fn, *inputs)
    before = run(gm)
    results = run_passes(gm, PASSES, frozenset({SHAPES}))
    after = run(gm)
    for a, b in zip(after, before, strict=True):
        step = b.abs().amax() / 127
        assert a.shape == b.shape and (plain(a) - b).abs().max() <= (step / 2 * 1.001 if a is not after[0] else 0.1)
    return text(gm.graph), results[2].report, list(after)


def prefill(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    empty = torch.tensor([])
    keys, contents = torch.cat([empty, k * 2], -2), torch.cat([empty, v * 3], -2)
    return F.scaled_dot_product_attention(q, keys, contents), keys, contents


def test_the_first_call_returns_codes() -> None:
    printed, report, results = rewritten(prefill, values(), values(), values())
    assert_expected_inline(
        printed,
        """\
def (x0: f32[2, 3, 5, 4], x1: f32[2, 3, 5, 4], x2: f32[2, 3, 5, 4])
cache_room: i8[2, 3, 5, 4] = llmcomp.cache_room([2, 3, 5, 4], 2, i8, cpu)
cache_room_1: f32[2, 3, 5, 1] = llmcomp.cache_room([2, 3, 5, 1], 2, f32, cpu)
cache_room_2: i8[2, 3, 5, 4] = llmcomp.cache_room([2, 3, 5, 4], 2, i8, cpu)
cache_room_3: f32[2, 3, 5, 1] = llmcomp.cache_room([2, 3, 5, 1], 2, f32, cpu)
mul: f32[2, 3, 5, 4] = aten.mul(x0, 2)
cache_scale: f32[2, 3, 5, 1] = llmcomp.cache_scale(mul, i8)
arange: i64[5] = aten.arange(0, 5, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_room_1, cache_scale, arange, 2)
cache_quantize: i8[2, 3, 5, 4] = llmcomp.cache_quantize(mul, cache_scale, i8)
arange_1: i64[5] = aten.arange(0, 5, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_room, cache_quantize, arange_1, 2)
cache_dequantize: f32[2, 3, 5, 4] = llmcomp.cache_dequantize(cache_room, cache_room_1, f32)
mul_1: f32[2, 3, 5, 4] = aten.mul(x1, 3)
cache_scale_1: f32[2, 3, 5, 1] = llmcomp.cache_scale(mul_1, i8)
arange_2: i64[5] = aten.arange(0, 5, device=cpu)
cache_write__2 = llmcomp.cache_write_(cache_room_3, cache_scale_1, arange_2, 2)
cache_quantize_1: i8[2, 3, 5, 4] = llmcomp.cache_quantize(mul_1, cache_scale_1, i8)
arange_3: i64[5] = aten.arange(0, 5, device=cpu)
cache_write__3 = llmcomp.cache_write_(cache_room_2, cache_quantize_1, arange_3, 2)
cache_dequantize_1: f32[2, 3, 5, 4] = llmcomp.cache_dequantize(cache_room_2, cache_room_3, f32)
attention: f32[2, 3, 5, 4] = llmcomp.attention(x2, cache_dequantize, cache_dequantize_1, None, None, 0.5, False, 0, 0, 0.0)
clone: f32[2, 3, 5, 4] = aten.clone(attention, memory_format=torch.contiguous_format)
cache_tensor: f32[2, 3, 5, 4] = cache_tensor(cache_room, cache_room_1, f32)
cache_tensor_1: f32[2, 3, 5, 4] = cache_tensor(cache_room_2, cache_room_3, f32)
return (clone, cache_tensor, cache_tensor_1)""",  # noqa: E501
    )
    assert report.rewrites == 2 and not report.near_misses
    assert all(isinstance(r, QuantizedCacheTensor) for r in results[1:])


def test_attention_reads_what_the_caller_gets() -> None:
    q, k, v = values(), values(), values()
    _, _, (out, keys, contents) = rewritten(prefill, q, k, v)
    expected = F.scaled_dot_product_attention(q, plain(keys), plain(contents))
    torch.testing.assert_close(out, expected)


def test_the_next_call_appends_codes() -> None:
    def decode(q: Tensor, past: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        keys = torch.cat([past, k], 2)
        return F.scaled_dot_product_attention(q, keys, keys), keys

    gm = capture(decode, values(1), held(values()), values(1))
    results = run_passes(gm, PASSES, frozenset({SHAPES}))
    assert_expected_inline(
        text(gm.graph),
        """\
def (x0: i8[2, 3, 5, 4], x1: f32[2, 3, 5, 1], x2: f32[2, 3, 1, 4], x3: f32[2, 3, 1, 4])
cache_grow: i8[2, 3, 6, 4] = llmcomp.cache_grow(x0, 1, 2)
cache_grow_1: f32[2, 3, 6, 1] = llmcomp.cache_grow(x1, 1, 2)
cache_scale: f32[2, 3, 1, 1] = llmcomp.cache_scale(x2, i8)
cache_quantize: i8[2, 3, 1, 4] = llmcomp.cache_quantize(x2, cache_scale, i8)
arange: i64[1] = aten.arange(5, 6, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_grow, cache_quantize, arange, 2)
arange_1: i64[1] = aten.arange(5, 6, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_grow_1, cache_scale, arange_1, 2)
cache_dequantize: f32[2, 3, 6, 4] = llmcomp.cache_dequantize(cache_grow, cache_grow_1, f32)
cache_dequantize_1: f32[2, 3, 6, 4] = llmcomp.cache_dequantize(cache_grow, cache_grow_1, f32)
attention: f32[2, 3, 1, 4] = llmcomp.attention(x3, cache_dequantize, cache_dequantize_1, None, None, 0.5, False, 0, 0, 0.0)
return (attention, cache_grow, cache_grow_1)""",  # noqa: E501
    )
    assert results[2].report.rewrites == 0 and not results[2].report.near_misses
    assert results[3].report.rewrites == 2


def test_a_window_is_a_part_of_codes_and_scales() -> None:
    def fn(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        keys = k * 2
        return F.scaled_dot_product_attention(q, keys, keys), keys[:, :, -3:]

    printed, report, results = rewritten(fn, values(), values())
    assert report.rewrites == 1 and isinstance(results[1], QuantizedCacheTensor) and results[1].shape[2] == 3


def test_a_buffer_that_is_made_and_returned_holds_codes() -> None:
    def fn(q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        keys = torch.zeros(B, H, 8, D)
        keys.index_copy_(2, position, k * 2)
        return F.scaled_dot_product_attention(q, keys, keys), keys

    gm = capture(fn, values(1), values(2), torch.tensor([0, 1]))
    before = run(gm)
    results = run_passes(gm, (RECOGNIZE_CACHE, *PASSES), frozenset({SHAPES}))
    assert_expected_inline(
        text(gm.graph),
        """\
def (x0: f32[2, 3, 2, 4], x1: i64[2], x2: f32[2, 3, 1, 4])
full: i8[2, 3, 8, 4] = aten.full([2, 3, 8, 4], 0, dtype=i8, device=cpu)
full_1: f32[2, 3, 8, 1] = aten.full([2, 3, 8, 1], 0, dtype=f32, device=cpu)
mul: f32[2, 3, 2, 4] = aten.mul(x0, 2)
cache_scale: f32[2, 3, 2, 1] = llmcomp.cache_scale(mul, i8)
cache_quantize: i8[2, 3, 2, 4] = llmcomp.cache_quantize(mul, cache_scale, i8)
cache_write_ = llmcomp.cache_write_(full, cache_quantize, x1, 2)
cache_write__1 = llmcomp.cache_write_(full_1, cache_scale, x1, 2)
cache_dequantize: f32[2, 3, 8, 4] = llmcomp.cache_dequantize(full, full_1, f32)
attention: f32[2, 3, 1, 4] = llmcomp.attention(x2, cache_dequantize, cache_dequantize, None, None, 0.5, False, 0, 0, 0.0)
cache_tensor: f32[2, 3, 8, 4] = cache_tensor(full, full_1, f32)
return (attention, cache_tensor)""",  # noqa: E501
    )
    after = run(gm)
    assert results[3].report.rewrites == 1 and isinstance(after[1], QuantizedCacheTensor)
    torch.testing.assert_close(after[1].dequantized(), before[1], rtol=0, atol=0.05)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda keys: (keys[:, :, :4] + 0,), "does not return"),
        (lambda keys: (keys, keys[:, :, :4]), "a part of the memory"),
        (lambda keys: (keys,), "does not begin with zeros"),
    ],
    ids=["not returned", "a part", "not zeros"],
)
def test_a_buffer_that_is_no_cache_says_why(fn: Callable[[Tensor], tuple[Tensor, ...]], reason: str) -> None:
    def made(q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        keys = torch.full((B, H, 8, D), float("zeros" in reason))
        keys.index_copy_(2, position, k * 2)
        return F.scaled_dot_product_attention(q, keys, keys), *fn(keys)

    gm = capture(made, values(1), values(2), torch.tensor([0, 1]))
    report = run_passes(gm, (RECOGNIZE_CACHE, *PASSES), frozenset({SHAPES}))[3].report
    assert report.rewrites == 0 and any(re.search(reason, miss.reason) for miss in report.near_misses)


def test_a_copied_part_is_memory_of_its_own() -> None:
    def fn(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        keys = k * 2
        return F.scaled_dot_product_attention(q, keys, keys), keys[:, :, -3:].clone()

    _, report, results = rewritten(fn, values(), values())
    held = results[1]
    assert report.rewrites == 1 and isinstance(held, QuantizedCacheTensor)
    assert held.codes.is_contiguous() and held.codes.untyped_storage().nbytes() == B * H * 3 * D


def test_a_plain_past_is_quantized_once() -> None:
    def decode(q: Tensor, past: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        keys = torch.cat([past, k], 2)
        return F.scaled_dot_product_attention(q, keys, keys), keys

    _, report, results = rewritten(decode, values(1), values(), values(1))
    assert report.rewrites == 1 and isinstance(results[1], QuantizedCacheTensor)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda q, past, k: (F.scaled_dot_product_attention(q, k * 2, k * 2),), "does not return"),
        (lambda q, past, k: (F.scaled_dot_product_attention(q, past, past), past * 2), "their caller holds"),
        (lambda q, past, k: (F.scaled_dot_product_attention(q, k, (x := k * 2)), x.flatten(2)), "along the sequence"),
        (lambda q, past, k: (F.scaled_dot_product_attention(q, (x := k * 2), x), x[..., :2]), "along the sequence"),
    ],
    ids=["not returned", "an input", "another shape", "a part of the channels"],
)
def test_what_is_no_cache_is_left_alone_and_says_why(fn: Callable[..., object], reason: str) -> None:
    gm = capture(fn, values(1), values(), values())
    results = run_passes(gm, PASSES, frozenset({SHAPES}))
    report = results[2].report
    assert report.rewrites == 0 and "cache_quantize" not in text(gm.graph)
    assert any(re.search(reason, miss.reason) for miss in report.near_misses)


def test_double_precision_is_left_alone() -> None:
    gm = capture(prefill, *(values().double() for _ in range(3)))
    report = run_passes(gm, PASSES, frozenset({SHAPES}))[2].report
    assert report.rewrites == 0 and "float64" in report.near_misses[0].reason
