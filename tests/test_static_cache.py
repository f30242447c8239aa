"""llmcomp/static_cache.py: with `kv_dtype`, caches of fixed size hold codes and scales, whoever made their memory."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from llmcomp import static_cache
from llmcomp.cache_ops import quantized
from llmcomp.errors import MemoryFullError
from llmcomp.quantized_cache import QuantizedCacheTensor
from llmcomp.report import GraphReport
from tests.test_kv_cache import GREEDY, MORE, gemma2, gpt2, left_padded, llama, mistral, tokens
from tests.test_kv_dtype import KV_DTYPES, Rounding, memory, pair, rounded

Make = Callable[[], PreTrainedModel]
CAPACITY = 24


class RoundingStatic(Rounding, StaticLayer):
    pass


class RoundingStaticWindow(Rounding, StaticSlidingWindowLayer):
    pass


def rounding(model: PreTrainedModel, kv_dtype: str, capacity: int) -> StaticCache:
    """An empty cache of fixed size for an eager model, which rounds as one of `kv_dtype` does."""
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    for at, layer in enumerate(cache.layers):
        slides = isinstance(layer, StaticSlidingWindowLayer)
        window = {"sliding_window": model.config.sliding_window} if slides else {}
        cache.layers[at] = (RoundingStaticWindow if slides else RoundingStatic)(max_cache_len=capacity, **window)
        cache.layers[at].kv_dtype = kv_dtype
    return cache


def empty(model: PreTrainedModel, capacity: int = CAPACITY, early: bool = False, rows: int = 1) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    if early:
        config = model.config
        cache.early_initialization(rows, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


def held(cache: StaticCache) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def holds_codes(cache: StaticCache) -> bool:
    return all(isinstance(t, QuantizedCacheTensor) for t in held(cache))


def loop(model: PreTrainedModel, cache: Any, prompt: Tensor, steps: int = 4) -> list[Tensor]:
    """The logits of a prompt and of a few tokens after it, one by one; the same tokens for every model."""
    following = tokens(len(prompt), steps, seed=7)
    with torch.no_grad():
        results = [model(prompt, past_key_values=cache, use_cache=True).logits[:, -1]]
        for at in range(steps):
            results.append(model(following[:, at : at + 1], past_key_values=cache).logits[:, -1])
    return results


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    "make",
    [llama, *(pytest.param(m, marks=MORE) for m in (gemma2, gpt2)), pytest.param(mistral, marks=pytest.mark.slow)],
)
def test_generate_holds_codes(graphs: list[GraphReport], make: Make, kv_dtype: str) -> None:
    eager, compiled = pair(make, kv_dtype)
    found = compiled.generate(
        tokens(1, 9), **GREEDY, cache_implementation="static", return_dict_in_generate=True, output_logits=True
    )
    cache = found.past_key_values
    expected = eager.generate(
        tokens(1, 9),
        past_key_values=rounding(eager, kv_dtype, cache.get_max_length()),
        **GREEDY,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert graphs and torch.equal(found.sequences, expected.sequences) and holds_codes(cache)
    close(list(found.logits), list(expected.logits))


EARLY = pytest.mark.parametrize(
    "early", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["made by the graph", "made by the caller"]
)


@pytest.mark.slow
@EARLY
@pytest.mark.parametrize("make", [llama, mistral])
def test_a_loop_has_no_graph_too_many(graphs: list[GraphReport], make: Make, early: bool) -> None:
    counts = []
    for kv_dtype in (None, "int8"):
        graphs.clear()
        eager, compiled = pair(make, kv_dtype)
        for turn in range(3):
            cache, prompt = empty(compiled, early=early), tokens(1, 4, turn)
            found = loop(compiled, cache, prompt)
            counts.append(len(graphs))
            if kv_dtype is not None:
                close(found, loop(eager, rounding(eager, "int8", CAPACITY), prompt))
                assert holds_codes(cache)
    assert counts[:3] == counts[3:] and counts[0] == counts[2]


def test_a_second_generation_builds_nothing(graphs: list[GraphReport]) -> None:
    _, compiled = pair(llama, "int8")
    for seed in range(3):
        compiled.generate(tokens(1, 9, seed), **GREEDY, cache_implementation="static")
        assert len(graphs) == 2


@EARLY
def test_memory_halves_and_stays_where_it_is(graphs: list[GraphReport], early: bool) -> None:
    def wide() -> PreTrainedModel:
        config = copy.deepcopy(llama().config)
        config.head_dim, config.torch_dtype = 64, torch.bfloat16
        return type(llama())(config).bfloat16()

    eager, compiled = pair(wide, "int8")
    caches = [empty(eager, early=early, rows=2), empty(compiled, early=early, rows=2)]
    loop(eager, caches[0], tokens(2, 4))
    with torch.no_grad():
        compiled(tokens(2, 4), past_key_values=caches[1])
        places = [(t.codes.data_ptr(), t.scale.data_ptr()) for t in held(caches[1])]
        compiled(tokens(2, 1), past_key_values=caches[1])
        compiled(tokens(2, 1), past_key_values=caches[1])
    assert places == [(t.codes.data_ptr(), t.scale.data_ptr()) for t in held(caches[1])]
    assert memory(caches[1]) == 2 * 2 * 2 * CAPACITY * (64 + 4) and memory(caches[1]) / memory(caches[0]) == 68 / 128
    for graph in graphs:  # attention reads codes, and every key is written once
        assert not any("dequantize" in k.name for k in graph.program.kernels)
        assert {k.family for k in graph.program.kernels} >= {"attend"}
        assert {e.op for e in graph.program.externs} <= {"llmcomp.linear.default"}


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_prompts_longer_than_a_window_and_chunks(graphs: list[GraphReport], kv_dtype: str) -> None:
    eager, compiled = pair(mistral, kv_dtype)
    results = []
    for model, cache in ((eager, rounding(eager, kv_dtype, CAPACITY)), (compiled, empty(compiled))):
        with torch.no_grad():
            results.append([
                model(tokens(1, count, seed), past_key_values=cache).logits[:, -1]
                for seed, count in enumerate((3, 5, 1, 4, 1, 1))  # fills the window of 6, then slides
            ])  # fmt: skip
    close(*reversed(results))
    assert holds_codes(cache)


@pytest.mark.slow
def test_rows_are_reordered_and_a_cache_is_emptied() -> None:
    eager, compiled = pair(llama, "int8")
    results = []
    for model, cache in ((eager, rounding(eager, "int8", CAPACITY)), (compiled, empty(compiled))):
        found = loop(model, cache, tokens(2, 5), 2)
        cache.reorder_cache(torch.tensor([1, 1]))
        with torch.no_grad():
            found.append(model(tokens(2, 1), past_key_values=cache).logits)
        cache.reset()
        assert all(not t.any() for t in held(cache))
        results.append(found + loop(model, cache, tokens(2, 5, 3), 2))
    close(*reversed(results))
    assert holds_codes(cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [{"num_beams": 2}, pytest.param({"prefill_chunk_size": 4}, marks=MORE)], ids=["beams", "chunks"]
)
def test_ways_of_generating(way: dict[str, object]) -> None:
    eager, compiled = pair(llama, "int8")
    expected = eager.generate(tokens(1, 9), past_key_values=rounding(eager, "int8", 21), **GREEDY, **way)
    assert torch.equal(compiled.generate(tokens(1, 9), **GREEDY, cache_implementation="static", **way), expected)


@pytest.mark.slow
def test_left_padding() -> None:
    eager, compiled = pair(llama, "int8")
    prompt = left_padded((3, 9, 6))
    expected = eager.generate(**prompt, past_key_values=rounding(eager, "int8", 21), **GREEDY)
    assert torch.equal(compiled.generate(**prompt, **GREEDY, cache_implementation="static"), expected)


@pytest.mark.slow
def test_the_same_as_a_cache_that_grows() -> None:
    _, compiled = pair(llama, "int8")
    grown = DynamicCache(config=compiled.config)
    close(loop(compiled, empty(compiled), tokens(2, 6)), loop(compiled, grown, tokens(2, 6)))


def test_a_cache_that_eager_filled_is_taken_over(graphs: list[GraphReport]) -> None:
    eager, compiled = pair(llama, "int8")
    caches = [empty(eager), empty(eager)]
    for cache in caches:
        loop(eager, cache, tokens(1, 4), 1)
    before = [t.clone() for t in held(caches[0])]
    with torch.no_grad():
        found, expected = (
            m(tokens(1, 1), past_key_values=c).logits for m, c in zip((compiled, eager), caches, strict=True)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert holds_codes(caches[0]) and len(graphs) == 1
    assert all(hasattr(t, "_dynamo_static_input_type") for t in held(caches[0]))  # CUDA graphs need no copy of them
    for t, was in zip(held(caches[0]), before, strict=True):
        close([t.dequantized()[:, :, :5]], [rounded(was, "int8")[:, :, :5]])


@pytest.mark.slow
def test_a_full_device_leaves_a_cache_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(llama, "int8")
    cache, same = empty(compiled, early=True), rounding(eager, "int8", CAPACITY)
    made: list[None] = []

    def full(memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        made.append(None)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no more")
        return quantized(memory, dtype)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(static_cache, "quantized", full)
        with pytest.raises(MemoryFullError, match=r"KV cache of shape \(1, 2, 24, 8\)"):
            compiled(tokens(1, 4), past_key_values=cache)
    assert not any(isinstance(t, QuantizedCacheTensor) or t.any() for t in held(cache))
    cache.reset()
    close(loop(compiled, cache, tokens(1, 4)), loop(eager, same, tokens(1, 4)))


@pytest.mark.slow
def test_memory_of_nobody_that_is_found_is_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(llama, "int8")
    cache, same = empty(compiled, early=True), empty(eager, early=True)
    monkeypatch.setattr(static_cache, "_places", _once(static_cache._places))
    found = loop(compiled, cache, tokens(1, 4), 0)
    torch.testing.assert_close(found, loop(eager, same, tokens(1, 4), 0), rtol=0, atol=0.01)
    assert type(cache.layers[0].keys) is Tensor
    torch.testing.assert_close(cache.layers[0].keys, same.layers[0].keys, rtol=0, atol=0.02)


def _once(find: Callable[..., dict[int, object]]) -> Callable[..., dict[int, object]]:
    """`find` when it is called first; then nothing is found."""
    calls: list[None] = []

    def found(tensors: Any) -> dict[int, object]:
        calls.append(None)
        return find(tensors) if len(calls) == 1 else {}

    return found


@pytest.mark.slow
def test_what_stays_in_full_is_said_once(graphs: list[GraphReport]) -> None:
    class Own(nn.Module):
        """Attention that holds its cache in buffers of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(1, 2, 16, 8))

        def forward(self, q: Tensor, k: Tensor, position: Tensor) -> Tensor:
            self.keys.index_copy_(2, position, k)
            return F.scaled_dot_product_attention(q, self.keys, self.keys)

    static_cache._warn.cache_clear()
    q = torch.randn(1, 2, 1, 8)
    for turn in range(2):
        call = torch.compile(Own(), backend="llmcomp", options={"kv_dtype": "int8"})
        with warnings.catch_warnings(record=True) as seen, torch.no_grad():
            warnings.simplefilter("always")
            call(q, q, torch.tensor([3]))
        told = [str(w.message) for w in seen if "kv_dtype" in str(w.message)]
        assert len(told) == (1 if turn == 0 else 0)
        if told:
            assert "float32 and has the graph write into them" in told[0]
        torch._dynamo.reset()
    (miss, *_) = [m for g in graphs for p in g.passes if p.name == "quantize_cache" for m in p.report.near_misses]
    assert "write into them" in miss.reason


def test_gradients_leave_a_cache_as_it_is() -> None:
    _, compiled = pair(llama, "int8")
    cache = empty(compiled, early=True)
    compiled(tokens(1, 4), past_key_values=cache)
    assert type(cache.layers[0].keys) is Tensor
