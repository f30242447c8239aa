"""Generation with the caches of transformers: tokens of eager, no copy of the past, no graph too many."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from llmcomp import headroom
from llmcomp.errors import MemoryFullError
from llmcomp.headroom import owners
from llmcomp.report import GraphReport

VOCABULARY = 64
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**TINY))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=6))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**TINY | {"num_hidden_layers": 2}, sliding_window=6))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, eos_token_id=None))


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                      decoder_start_token_id=0, eos_token_id=None)  # fmt: skip
    return T5ForConditionalGeneration(config)


def pair(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(eager model, the same compiled)."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = make().eval()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="llmcomp")
    return eager, compiled


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: Sequence[int]) -> dict[str, Tensor]:
    """A batch of prompts of these lengths."""
    width = max(lengths)
    ids, mask = tokens(len(lengths), width), torch.ones(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
WAYS: dict[str, dict[str, object]] = {
    "greedy": {},
    "two beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
}
FAST = ((mistral, "greedy"),)
SLOW = ((llama, "prompt lookup"),)


MORE = pytest.mark.sweep


def marks_of(make: object, way: str) -> tuple[pytest.MarkDecorator, ...]:
    """When a case runs: always, with what is slow, or with everything."""
    return () if (make, way) in FAST else (pytest.mark.slow,) if (make, way) in SLOW else (MORE,)


CASES = [
    pytest.param(make, way, marks=marks_of(make, way), id=f"{make.__name__}-{way}")
    for make in (llama, mistral, gemma2, gpt2)
    for way in WAYS
]


@pytest.mark.parametrize(("make", "way"), CASES)
def test_generation_gives_the_tokens_of_eager(graphs: list[GraphReport], make, way: str) -> None:
    eager, compiled = pair(make)
    prompt = {"input_ids": tokens(1, 9)}
    ours, expected = (m.generate(**prompt, **GREEDY, **WAYS[way]) for m in (compiled, eager))
    assert graphs and torch.equal(ours, expected)


@pytest.mark.parametrize("make", [llama, pytest.param(mistral, marks=MORE), pytest.param(gpt2, marks=MORE)])
@pytest.mark.parametrize(
    "way", [pytest.param("two beams", marks=pytest.mark.slow), "static", pytest.param("greedy", marks=MORE)]
)
def test_left_padded_batches(graphs: list[GraphReport], make, way: str) -> None:
    eager, compiled = pair(make)
    prompt = left_padded([9, 4, 7])
    ours, expected = (m.generate(**prompt, **GREEDY, **WAYS[way]) for m in (compiled, eager))
    assert graphs and torch.equal(ours, expected)


@pytest.mark.sweep
@pytest.mark.parametrize("way", ["greedy", "two beams"])
def test_encoder_and_decoder(graphs: list[GraphReport], way: str) -> None:
    eager, compiled = pair(t5)
    ours, expected = (m.generate(input_ids=tokens(2, 7), **GREEDY, **WAYS[way]) for m in (compiled, eager))
    assert graphs and torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_quantized_caches_of_transformers(graphs: list[GraphReport], kind: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package}, which holds the cache, is not installed")
    eager, compiled = pair(lambda: LlamaForCausalLM(LlamaConfig(**TINY | {"head_dim": 16})))
    settings = {"backend": kind, "nbits": 4, "q_group_size": 16, "residual_length": 4, "axis_key": 1, "axis_value": 1}
    if kind == "quanto":
        settings |= {"axis_key": 0, "axis_value": 0}
    how = {**GREEDY, "cache_implementation": "quantized", "cache_config": settings}
    ours, expected = (m.generate(tokens(2, 9), **how) for m in (compiled, eager))
    assert graphs and torch.equal(ours, expected)


def test_graphs_are_counted(graphs: list[GraphReport]) -> None:
    """A prompt and a step for the first call, the step at once for all lengths; then at most what is said here."""
    _, compiled = pair(llama)

    def added(batch: int, length: int) -> tuple[int, int]:
        before = len(graphs)
        compiled.generate(tokens(batch, length), **GREEDY)
        return len(graphs) - before, sum(g.program.built for g in graphs[before:])

    assert added(1, 9)[0] == 2
    assert added(1, 14)[0] <= 1  # another prompt length
    assert added(1, 30) == (0, 0) and added(1, 150) == (0, 0)  # across the capacity
    assert added(3, 9)[0] <= 2  # the first batch above 1
    assert added(5, 20) == (0, 0) and added(1, 9) == (0, 0)


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """One call; returns the logits of the last position."""
    return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_past_stays_where_it_is() -> None:
    eager, compiled = pair(llama)
    caches = [DynamicCache(config=m.config) for m in (eager, compiled)]
    addresses = set()
    for step in range(150):
        ids = tokens(1, 9 if step == 0 else 1, seed=step)
        logits = [decode(m, ids, c) for m, c in zip((eager, compiled), caches, strict=True)]
        addresses.add(caches[1].layers[0].keys.data_ptr())
    close(logits[1], logits[0])
    close(caches[1].layers[0].keys, caches[0].layers[0].keys)
    assert len(addresses) == 2  # the first buffer has room for 128 more; the second for all that follow
    assert owners(caches[1].layers[0].values) <= 2


def test_a_forked_cache_goes_on_both_ways() -> None:
    eager, compiled = pair(llama)
    results = []
    for model in (eager, compiled):
        cache = DynamicCache(config=model.config)
        decode(model, tokens(1, 9), cache)
        decode(model, tokens(1, 1), cache)
        shared, copied = copy.copy(cache), copy.deepcopy(cache)
        shared.layers = [copy.copy(layer) for layer in cache.layers]
        first = [decode(model, tokens(1, 1, seed=s), c) for s, c in enumerate((cache, shared, copied))]
        again = [decode(model, tokens(1, 1, seed=s + 5), c) for s, c in enumerate((cache, shared, copied))]
        results.append((*first, *again))
    for ours, expected in zip(*reversed(results), strict=True):
        close(ours, expected)


@pytest.mark.slow
def test_a_cropped_cache_goes_on_in_place() -> None:
    eager, compiled = pair(llama)
    caches = [DynamicCache(config=m.config) for m in (eager, compiled)]
    addresses = set()
    for step in range(6):
        for cache in caches if step else ():
            cache.crop(-2)
        ids = tokens(1, 9 if step == 0 else 4, seed=step)
        ours, expected = (decode(m, ids, c) for m, c in zip((compiled, eager), reversed(caches), strict=True))
        close(ours, expected)
        addresses.add(caches[1].layers[0].keys.untyped_storage().data_ptr())
    assert len(addresses) <= 2  # a call that compiles holds the past in one more place, so that it is copied


def test_a_returned_cache_is_continued_in_a_second_generate() -> None:
    eager, compiled = pair(llama)
    results = []
    for model in (eager, compiled):
        first = model.generate(tokens(1, 9), **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, tokens(1, 3, seed=1)], 1)
        results.append(model.generate(longer, **GREEDY, past_key_values=first.past_key_values))
    assert torch.equal(*results)


@pytest.mark.slow
def test_an_exception_in_the_middle_leaves_the_next_call_right() -> None:
    eager, compiled = pair(llama)

    class Stop(Exception):
        pass

    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 12:
            raise Stop
        return scores

    with pytest.raises(Stop):
        compiled.generate(tokens(1, 9), **GREEDY, logits_processor=[stop])
    ours, expected = (m.generate(tokens(1, 9), **GREEDY) for m in (compiled, eager))
    assert torch.equal(ours, expected)


def test_a_full_device_is_told_and_leaves_the_next_call_right(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(llama)
    with monkeypatch.context() as full:
        full.setattr(headroom, "capacity", lambda count: 1 << 48)
        with pytest.raises(MemoryFullError, match=r"MiB on cpu for a KV cache of shape \(1, 2, 9, 8\).*'kv_dtype'"):
            compiled.generate(tokens(1, 9), **GREEDY)
    ours, expected = (m.generate(tokens(1, 9), **GREEDY) for m in (compiled, eager))
    assert torch.equal(ours, expected)


def test_inference_mode_and_writing_into_a_result() -> None:
    eager, compiled = pair(llama)
    results = []
    for model in (eager, compiled):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            decode(model, tokens(1, 9), cache)
            for layer in cache.layers:
                layer.keys[:, :, -1] *= 2
            decode(model, tokens(1, 1), cache)
            results.append(decode(model, tokens(1, 1, seed=1), cache))
    close(results[1], results[0])


@pytest.mark.sweep
def test_a_thousand_generations_leave_nothing_behind() -> None:
    _, compiled = pair(llama)
    lengths = [3 + n % 7 for n in range(1000)]
    for n in range(50):
        compiled.generate(tokens(1, lengths[n]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    before = resident()
    for n, length in enumerate(lengths):
        compiled.generate(tokens(1, length, seed=n), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert resident() - before < 8 * 2**20


def resident() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.sweep
def test_a_context_of_32_thousand_tokens() -> None:
    eager, compiled = pair(llama)
    caches = [DynamicCache(config=m.config) for m in (eager, compiled)]
    for start in range(0, 32 * 1024, 2048):
        ids = tokens(1, 2048, seed=start)
        logits = [decode(m, ids, c) for m, c in zip((eager, compiled), caches, strict=True)]
    close(logits[1], logits[0])
    for step in range(3):
        ids = tokens(1, 1, seed=step)
        ours, expected = (decode(m, ids, c) for m, c in zip((compiled, eager), reversed(caches), strict=True))
        close(ours, expected)
    assert caches[1].get_seq_length() == 32 * 1024 + 3
