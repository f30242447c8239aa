"""`options={"kv_dtype": ...}`: generation with a quantized cache, against eager with one of the same arithmetic."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import llmcomp
from llmcomp import fixed_forward
from llmcomp.headroom import owners
from llmcomp.passes.quantize_cache import NOT_RETURNED
from llmcomp.quantized_cache import QuantizedCacheTensor
from llmcomp.report import GraphReport
from tests.test_kv_cache import GREEDY, MORE, gemma2, gpt2, left_padded, llama, mistral, tokens

HELD = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
KV_DTYPES = ["int8", "fp8"]
Make = Callable[[], PreTrainedModel]


def rounded(x: Tensor, kv_dtype: str) -> Tensor:
    """What a cache of `kv_dtype` gives back for x (..., D)."""
    dtype, most = HELD[kv_dtype]
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
    codes = x.float() / scale
    codes = codes.round() if dtype == torch.int8 else codes.to(dtype).float()
    return (codes * scale).to(x.dtype)


class Rounding:
    """A layer of an eager cache that rounds what it is given, and keeps it as it was otherwise."""

    kv_dtype: str

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(rounded(keys, self.kv_dtype), rounded(values, self.kv_dtype), *args, **kwargs)  # type: ignore[misc]


class RoundingLayer(Rounding, DynamicLayer):
    pass


class RoundingWindow(Rounding, DynamicSlidingWindowLayer):
    pass


def rounding(model: PreTrainedModel, kv_dtype: str) -> DynamicCache:
    """An empty cache for an eager model, which rounds as one of `kv_dtype` does."""
    cache = DynamicCache(config=model.config)
    for at, layer in enumerate(cache.layers):
        slides = isinstance(layer, DynamicSlidingWindowLayer)
        cache.layers[at] = RoundingWindow(sliding_window=layer.sliding_window) if slides else RoundingLayer()
        cache.layers[at].kv_dtype = kv_dtype
    return cache


def pair(make: Make, kv_dtype: str, **options: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(eager model, the same compiled)."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = make().eval()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="llmcomp", options={"kv_dtype": kv_dtype, **options})
    return eager, compiled


def memory(cache: DynamicCache) -> int:
    """Bytes of what a cache holds, without the room behind it."""
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.codes.nbytes + t.scale.nbytes if isinstance(t, QuantizedCacheTensor) else t.nbytes for t in held)


def generated(model: PreTrainedModel, kv_dtype: str | None = None, **inputs: object) -> Any:
    cache = {} if kv_dtype is None else {"past_key_values": rounding(model, kv_dtype)}
    return model.generate(**inputs, **cache, **GREEDY, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        llama,
        pytest.param(mistral, marks=pytest.mark.slow),
        pytest.param(gemma2, marks=MORE),
        pytest.param(gpt2, marks=MORE),
    ],
)
def test_generation_gives_the_tokens_of_an_eager_cache_that_rounds_alike(
    graphs: list[GraphReport], make: Make, kv_dtype: str
) -> None:
    eager, compiled = pair(make, kv_dtype)
    ids = tokens(1, 9)
    expected = generated(eager, kv_dtype, input_ids=ids)
    found = generated(compiled, input_ids=ids)
    assert torch.equal(found.sequences, expected.sequences)
    exact = generated(eager, input_ids=ids)
    for ours, same, other in zip(found.logits, expected.logits, exact.logits, strict=True):
        torch.testing.assert_close(ours, same, rtol=0, atol=2e-4)
        assert not torch.allclose(ours, other, rtol=0, atol=1e-6), "nothing was rounded"
    assert len(graphs) == 2
    assert all(isinstance(t, QuantizedCacheTensor) for x in found.past_key_values.layers for t in (x.keys, x.values))


@pytest.mark.slow
def test_memory_halves_and_no_copy_is_dequantized(graphs: list[GraphReport]) -> None:
    def wide() -> PreTrainedModel:
        model = llama()
        config = copy.deepcopy(model.config)
        config.head_dim, config.torch_dtype = 64, torch.bfloat16
        return type(model)(config).bfloat16()

    eager, compiled = pair(wide, "int8")
    ids = tokens(2, 40)
    plain = memory(generated(eager, input_ids=ids).past_key_values)
    found = generated(compiled, input_ids=ids).past_key_values
    positions = found.get_seq_length()
    assert memory(found) == 2 * 2 * positions * (64 + 4) * 2 and memory(found) / plain == (64 + 4) / 128
    for graph in graphs:
        (attention,) = (k for k in graph.program.kernels if k.family == "attend")
        assert not any("dequantize" in k.name for k in graph.program.kernels)
        externs = {e.op for e in graph.program.externs}
        assert externs <= {"llmcomp.cache_grow.default", "llmcomp.cache_room.default", "llmcomp.linear.default"}
    # Codes and scales of 41 or 42 positions, the query, the result, and the mask of one call.
    rows = (attention.bytes - 2 * 2 * 4 * 64 * 2) / (2 * 2 * 2 * (64 + 4))
    assert 41 <= rows <= 43


def test_a_step_copies_nothing(graphs: list[GraphReport]) -> None:
    _, compiled = pair(llama, "int8")
    with torch.no_grad():
        out = compiled(tokens(1, 9), use_cache=True)
        layer = out.past_key_values.layers[0]
        places = [(layer.keys.codes.data_ptr(), layer.keys.scale.data_ptr(), layer.values.codes.data_ptr())]
        for _ in range(5):
            out = compiled(tokens(1, 1), past_key_values=out.past_key_values)
            places.append((layer.keys.codes.data_ptr(), layer.keys.scale.data_ptr(), layer.values.codes.data_ptr()))
    assert len(set(places)) == 1 and len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"num_beams": 2}, id="beams"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt lookup"),
        pytest.param({"prefill_chunk_size": 4}, id="chunks", marks=MORE),
    ],
)
def test_ways_of_generating(way: dict[str, object]) -> None:
    eager, compiled = pair(llama, "int8")
    ids = tokens(1, 9)
    expected = eager.generate(ids, past_key_values=rounding(eager, "int8"), **GREEDY, **way)
    assert torch.equal(compiled.generate(ids, **GREEDY, **way), expected)


@pytest.mark.slow
def test_left_padding() -> None:
    eager, compiled = pair(llama, "int8")
    prompt = left_padded((3, 9, 6))
    expected = eager.generate(**prompt, past_key_values=rounding(eager, "int8"), **GREEDY)
    assert torch.equal(compiled.generate(**prompt, **GREEDY), expected)


@pytest.mark.slow
def test_a_loop_without_a_cache_keeps_codes(graphs: list[GraphReport]) -> None:
    eager, compiled = pair(llama, "int8")
    ids = tokens(1, 5)
    with torch.no_grad():
        for call in range(8):
            expected = eager(ids, past_key_values=rounding(eager, "int8"))
            found = compiled(ids)
            keys, same = (out.past_key_values.layers[0].keys for out in (found, expected))
            assert isinstance(keys, QuantizedCacheTensor)
            torch.testing.assert_close(keys.dequantized(), same, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-4)
            if call == 6:
                keys.mul_(2)  # which the next call notices
            ids = torch.cat([ids, found.logits[:, -1:].argmax(-1)], 1)
    step = graphs[-1]
    assert step.kind == "cached" and {e.op for e in step.program.externs} == {"llmcomp.cache_grow.default"}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_other_readers_of_a_key_see_what_is_kept(graphs: list[GraphReport], kv_dtype: str) -> None:
    def fn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = k * 2
        return F.scaled_dot_product_attention(q, keys, keys), keys, keys + 1

    q, k = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 4, 8)  # of another length: no cache is written in place
    with torch.no_grad():
        out, keys, other = torch.compile(fn, backend="llmcomp", options={"kv_dtype": kv_dtype})(q, k)
    expected = rounded(k * 2, kv_dtype)
    assert isinstance(keys, QuantizedCacheTensor) and len(graphs) == 1
    torch.testing.assert_close(keys.dequantized(), expected)
    torch.testing.assert_close(other, expected + 1)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, expected, expected))


@pytest.mark.slow
def test_verify(graphs: list[GraphReport]) -> None:
    """Passes and kernels are measured against the graph that quantizes."""
    eager, compiled = pair(llama, "int8", verify=True)
    expected = generated(eager, "int8", input_ids=tokens(1, 9))
    assert torch.equal(generated(compiled, input_ids=tokens(1, 9)).sequences, expected.sequences) and len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=MORE)])
def test_llmcomp_generate_keeps_codes(
    graphs: list[GraphReport], monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    eager, compiled = pair(llama, kv_dtype)
    monkeypatch.setattr(fixed_forward, "ROOM", 8)  # so that the cache is full once
    ids, longer = tokens(2, 9), {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = eager.generate(ids, past_key_values=rounding(eager, kv_dtype), **longer)
    found = llmcomp.generate(compiled, ids, **longer, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert isinstance(found.past_key_values.layers[0].values, QuantizedCacheTensor)
    steps = [g for g in graphs if any("cache_write" in k.name for k in g.program.kernels)][1:]
    assert steps and all(p.report.near_misses == [] for g in steps for p in g.passes if p.name == "quantize_cache")


@pytest.mark.slow
def test_crops_reorders_and_a_returned_cache_go_on() -> None:
    eager, compiled = pair(llama, "int8")
    results = []
    for model, cache in ((eager, rounding(eager, "int8")), (compiled, DynamicCache(config=compiled.config))):
        with torch.no_grad():
            first = model(tokens(2, 9), past_key_values=cache, use_cache=True)
            cache.crop(-3)
            cropped = model(tokens(2, 2, 1), past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 1]))
            reordered = model(tokens(2, 1, 2), past_key_values=cache)
            fork = copy.deepcopy(cache)
            forked = model(tokens(2, 1, 3), past_key_values=fork)
            after = model(tokens(2, 1, 4), past_key_values=cache)
        results.append([out.logits for out in (first, cropped, reordered, forked, after)])
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)
    assert isinstance(cache.layers[0].keys, QuantizedCacheTensor)


@pytest.mark.slow
def test_a_cache_of_the_model_s_dtype_is_taken_over(graphs: list[GraphReport]) -> None:
    eager, compiled = pair(llama, "int8")
    with torch.no_grad():
        cache = eager(tokens(1, 9), use_cache=True).past_key_values
        compiled(tokens(1, 1), past_key_values=cache)
    assert isinstance(cache.layers[0].keys, QuantizedCacheTensor) and graphs


def test_what_holds_no_cache_says_why(graphs: list[GraphReport]) -> None:
    _, compiled = pair(llama, "int8")
    with torch.no_grad():
        compiled(tokens(1, 9), use_cache=False)
    reasons = [m.reason for g in graphs for p in g.passes if p.name == "quantize_cache" for m in p.report.near_misses]
    assert reasons and all(r == NOT_RETURNED for r in reasons)


@MORE
def test_memory_is_given_back() -> None:
    _, compiled = pair(llama, "int8")
    storages = []
    for _ in range(2):  # what traced the first is kept until garbage is collected
        codes = generated(compiled, input_ids=tokens(1, 9)).past_key_values.layers[0].keys.codes
        storages.append(codes.untyped_storage())
        del codes
    assert owners(torch.empty(0, dtype=torch.int8).set_(storages[1])) == 1
