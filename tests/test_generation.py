"""llmcomp.generate gives what model.generate gives, stops when it does, and keeps nothing."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.streamers import BaseStreamer

import llmcomp
import llmcomp.backend
from llmcomp import GenerationError, decoding
from llmcomp.report import GraphReport
from tests.models import VOCAB, Case, Kind, causal_lm, token_ids

# What is tested here does not depend on kernels, and building them takes longest.
OURS = {"backend": "llmcomp", "options": {"target": "reference"}}
PADDED = {"input_ids": token_ids(3, 9, 0), "attention_mask": (torch.arange(9) >= torch.tensor([[0], [4], [2]])).long()}


def built(model_type: str) -> PreTrainedModel:
    """A tiny model that never ends by itself."""
    model = causal_lm(model_type).build()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def llama() -> PreTrainedModel:
    """The same with one layer: most of the time here is Dynamo's."""
    case = Case("llama", "LlamaForCausalLM", "llama", Kind.CAUSAL, lambda: {"num_hidden_layers": 1})
    model = case.build()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def eager() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def compiled(eager: PreTrainedModel) -> PreTrainedModel:
    """The same weights, in a model that was compiled once for all tests of this module."""
    torch._dynamo.reset()
    model = copy.deepcopy(eager)
    model.compile(**OURS)
    return model


def replayed(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls of compiled functions were replayed and how many went through Dynamo, while `run` ran."""
    counts = [0, 0]
    call = decoding.Replay.__call__

    def counting(self: decoding.Replay, *tensors: Tensor) -> object:
        layouts = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        counts[layouts not in self._trusted] += 1
        return call(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr("llmcomp.replay.Replay.__call__", counting)
        run()
    return counts


def test_greedy_tokens(eager: PreTrainedModel, compiled: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(1, 9, 0)
    expected = eager.generate(ids, max_new_tokens=12)
    assert torch.equal(llmcomp.generate(compiled, ids, max_new_tokens=12), expected)
    steps = replayed(lambda: llmcomp.generate(compiled, ids, max_new_tokens=12), monkeypatch)
    assert steps == [19, 4], "11 calls of the model and 12 choices; the first two of each go through Dynamo"


@pytest.mark.slow
def test_left_padding(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    assert torch.equal(
        llmcomp.generate(compiled, **PADDED, max_new_tokens=8), eager.generate(**PADDED, max_new_tokens=8)
    )


CONFIGURATIONS = {
    "repetition": {"repetition_penalty": 1.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "delayed": {"eos_token_id": list(range(100)), "min_new_tokens": 5},
    "minimal length": {"eos_token_id": list(range(100)), "min_length": 12},
    "ends": {"eos_token_id": list(range(100)), "pad_token_id": 5},
    "suppressed": {"suppress_tokens": list(range(0, VOCAB, 2)), "begin_suppress_tokens": list(range(1, 99, 2))},
    "bad words": {"bad_words_ids": [[n] for n in range(50)], "repetition_penalty": 0.8},
    "forced end": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "length": {"max_length": 13, "max_new_tokens": None},
}


SLOW = ("chunked prefill", "static", "no cache")  # other shapes, for which Dynamo takes seconds


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.sweep if n in SLOW else ()) for n in CONFIGURATIONS]
)
def test_configurations(eager: PreTrainedModel, compiled: PreTrainedModel, name: str) -> None:
    settings = {"max_new_tokens": 8, **CONFIGURATIONS[name]}
    settings = {k: v for k, v in settings.items() if v is not None}
    expected = eager.generate(**PADDED, **settings)
    assert torch.equal(llmcomp.generate(compiled, **PADDED, **settings), expected)
    assert torch.equal(llmcomp.generate(compiled, **PADDED, generation_config=GenerationConfig(**settings)), expected)


def test_processors_and_criteria_of_the_user(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    seen: list[list[tuple[int, ...]]] = [[], []]

    class Even(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
            return ids[:, -1] % 8 == 0

    def odd(calls: list[tuple[int, ...]], ids: Tensor, scores: Tensor) -> Tensor:
        calls.append((*ids.shape, *ids[:, -1].tolist()))
        scores[:, ids[0, -1] % 4 :: 4] = -1e9  # in place, as some do
        return scores

    results = []
    for calls, run in zip(seen, (eager.generate, partial(llmcomp.generate, compiled)), strict=True):
        stopping = StoppingCriteriaList([Even()])
        results.append(
            run(**PADDED, max_new_tokens=20, logits_processor=[partial(odd, calls)], stopping_criteria=stopping)
        )
    assert torch.equal(*results) and seen[0] == seen[1] and results[0].shape[1] < 29


def test_outputs(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    settings = {"max_new_tokens": 5, "repetition_penalty": 1.3, "eos_token_id": 7, "return_dict_in_generate": True}
    settings |= {"output_scores": True, "output_logits": True}
    expected = eager.generate(**PADDED, **settings)
    ours = llmcomp.generate(compiled, **PADDED, **settings)
    assert type(ours) is type(expected)
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(expected[name]))
    caches = [x.past_key_values for x in (ours, expected)]
    assert [c.get_seq_length() for c in caches] == [13, 13]
    torch.testing.assert_close(caches[0].layers[0].keys, caches[1].layers[0].keys)


@pytest.mark.slow
def test_a_conversation_goes_on_with_its_cache(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    results = []
    for run in (eager.generate, partial(llmcomp.generate, compiled)):
        cache = DynamicCache(config=eager.config)
        first = run(token_ids(1, 9, 0), max_new_tokens=4, past_key_values=cache)
        longer = torch.cat([first, token_ids(1, 3, 1)], 1)
        results.append(run(longer, max_new_tokens=4, past_key_values=cache))
        assert cache.get_seq_length() == 9 + 4 + 3 + 3
    assert torch.equal(*results)


def test_a_stream_that_is_left_gives_the_cache_back(compiled: PreTrainedModel) -> None:
    cache = DynamicCache(config=compiled.config)
    tokens = llmcomp.stream(compiled, token_ids(1, 9, 0), max_new_tokens=20, past_key_values=cache)
    text = torch.cat([token_ids(1, 9, 0), *(next(tokens)[:, None] for _ in range(4))], 1)
    tokens.close()  # type: ignore[attr-defined]
    assert cache.get_seq_length() == 9 + 3
    again = llmcomp.generate(compiled, text, max_new_tokens=4, past_key_values=cache)
    assert torch.equal(again, llmcomp.generate(compiled, text[:, :9], max_new_tokens=8))


def test_more_tokens_than_there_was_room_for(
    eager: PreTrainedModel, compiled: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcomp.fixed_forward.ROOM", 8)
    expected = eager.generate(**PADDED, max_new_tokens=70)
    assert torch.equal(llmcomp.generate(compiled, **PADDED, max_new_tokens=70), expected)


@pytest.mark.slow
def test_sampling_follows_the_distribution_of_transformers(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    """The first two tokens of 2,000 rows, counted together: a chi-square test of two samples at one in a thousand."""
    settings = {"do_sample": True, "top_k": 4, "temperature": 1.5, "max_new_tokens": 2, "num_return_sequences": 2000}
    torch.manual_seed(0)
    expected = eager.generate(token_ids(1, 5, 0), **settings)[:, -2:]
    ours = llmcomp.generate(compiled, token_ids(1, 5, 0), **settings)[:, -2:]
    counts = torch.stack(
        [(x @ torch.tensor([VOCAB, 1])).bincount(minlength=VOCAB**2) for x in (ours, expected)]
    ).double()
    counts = counts[:, counts.sum(0) > 0]
    statistic = ((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum()
    assert counts.shape[1] == 16
    assert torch.special.gammaincc(torch.tensor(15 / 2), statistic / 2) > 1e-3


def test_seeds(compiled: PreTrainedModel) -> None:
    draw = partial(llmcomp.generate, compiled, max_new_tokens=6, do_sample=True)
    ids = token_ids(1, 9, 0)
    assert torch.equal(draw(ids, seed=3), draw(ids, seed=3))
    assert not torch.equal(draw(ids, seed=3), draw(ids, seed=4))
    torch.manual_seed(1)
    first = draw(ids)
    torch.manual_seed(1)
    assert torch.equal(draw(ids), first) and not torch.equal(draw(ids), first)
    together = draw(ids.repeat(3, 1), seed=[5, 6, 7])
    assert torch.equal(together[1:2], draw(ids, seed=[6]))


LOOKUPS = {
    "": {},
    "sample": {"do_sample": True, "temperature": 0.3},
    "penalty": {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=10)]},
    "called": {"no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("settings", LOOKUPS.values(), ids=LOOKUPS)
def test_prompt_lookup_changes_no_token(compiled: PreTrainedModel, settings: dict[str, object]) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    settings = {"max_new_tokens": 40, "seed": 0, "eos_token_id": 9, **settings}
    expected = llmcomp.generate(compiled, ids, **settings)
    assert torch.equal(llmcomp.generate(compiled, ids, prompt_lookup_num_tokens=3, **settings), expected)


def test_prompt_lookup_makes_fewer_calls(eager: PreTrainedModel, compiled: PreTrainedModel, monkeypatch) -> None:
    calls = []
    more = decoding.FixedForward.more
    monkeypatch.setattr(decoding.FixedForward, "more", lambda self, t, x: calls.append(t.shape[1]) or more(self, t, x))
    ids = eager.generate(token_ids(1, 9, 0), max_new_tokens=60)  # small models repeat themselves
    expected = eager.generate(ids, max_new_tokens=40)
    assert torch.equal(llmcomp.generate(compiled, ids, max_new_tokens=40, prompt_lookup_num_tokens=3), expected)
    assert len(calls) < 35 and set(calls) == {1, 4}, calls


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Tensor | str] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.got.append("end")


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}], ids=["", "lookup"])
def test_a_streamer_gets_prompt_and_tokens(eager: PreTrainedModel, compiled: PreTrainedModel, settings) -> None:
    ids, theirs, ours = token_ids(1, 9, 0), Recorder(), Recorder()
    eager.generate(ids, max_new_tokens=6, streamer=theirs)
    llmcomp.generate(compiled, ids, max_new_tokens=6, streamer=ours, **settings)
    assert [repr(x) for x in ours.got] == [repr(x) for x in theirs.got]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters."""
    tokenizer = Tokenizer(models.BPE({chr(97 + i): i for i in range(VOCAB)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    free = eager.generate(**PADDED, max_new_tokens=12)
    strings = ["".join(chr(97 + t) for t in free[row, end - 2 : end].tolist()) for row, end in enumerate((14, 13, 16))]
    settings = {"max_new_tokens": 12, "stop_strings": strings}
    expected = eager.generate(**PADDED, **settings, tokenizer=letters())
    assert 9 < expected.shape[1] < 21
    assert torch.equal(llmcomp.generate(compiled, **PADDED, **settings, tokenizer=letters()), expected)
    config = GenerationConfig(**settings)
    assert torch.equal(llmcomp.generate(compiled, **PADDED, generation_config=config, tokenizer=letters()), expected)
    assert config.stop_strings == strings


def test_tokens_one_by_one(compiled: PreTrainedModel) -> None:
    expected = llmcomp.generate(compiled, **PADDED, max_new_tokens=7)
    for settings in ({}, {"prompt_lookup_num_tokens": 3}):
        prompt = {k: v[:1] for k, v in PADDED.items()} if settings else PADDED
        found = list(llmcomp.stream(compiled, **prompt, max_new_tokens=7, **settings))
        assert all(t.shape == (len(prompt["input_ids"]),) for t in found)
        assert torch.equal(torch.stack(found, 1), expected[: len(found[0]), 9:])


def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[object]]:
    """The caches that are made from now on, without keeping them."""
    made: list[weakref.ref[object]] = []
    init = decoding.FixedForward.__init__

    def noting(self: decoding.FixedForward, *args: object) -> None:
        init(self, *args)
        made.extend(map(weakref.ref, (self, self.cache, self.cache.layers[0].keys)))

    monkeypatch.setattr(decoding.FixedForward, "__init__", noting)
    return made


def test_leaving_early_frees_everything(compiled: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = caches(monkeypatch)
    gc.collect()
    gc.disable()
    try:
        tokens: Iterator[Tensor] = llmcomp.stream(compiled, **PADDED, max_new_tokens=50)
        for _, _ in zip(range(4), tokens, strict=False):
            pass
        assert len(made) == 3 and all(r() is not None for r in made)
        tokens.close()  # type: ignore[attr-defined]
        assert not [r() for r in made if r() is not None]
        llmcomp.generate(compiled, **PADDED, max_new_tokens=4)
        assert len(made) == 6 and not [r() for r in made if r() is not None]
    finally:
        gc.enable()


def test_an_exception_in_the_middle_leaves_the_next_call_right(compiled: PreTrainedModel) -> None:
    class Stop(Exception):
        pass

    class Stopper(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.got) == 5:
                raise Stop

    expected = llmcomp.generate(compiled, **PADDED, max_new_tokens=8)
    with pytest.raises(Stop):
        llmcomp.generate(compiled, **PADDED, max_new_tokens=8, streamer=Stopper())
    assert torch.equal(llmcomp.generate(compiled, **PADDED, max_new_tokens=8), expected)


def test_transformers_calls_the_loop(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    expected = eager.generate(**PADDED, max_new_tokens=8)
    ours = compiled.generate(**PADDED, max_new_tokens=8, custom_generate=llmcomp.custom_generate)
    assert torch.equal(ours, expected)
    draw = partial(compiled.generate, **PADDED, max_new_tokens=4, do_sample=True)
    drawn = draw(custom_generate=llmcomp.custom_generate, seed=3)
    assert torch.equal(drawn, llmcomp.generate(compiled, **PADDED, max_new_tokens=4, do_sample=True, seed=3))


@pytest.mark.parametrize(("given", "bound"), [(True, False), (False, True), (True, True)])
def test_transformers_streams_the_loop(eager: PreTrainedModel, compiled: PreTrainedModel, given, bound) -> None:
    """The prompt once and every token, though transformers does not hand a streamer to functions of others."""
    ids, theirs, ours = token_ids(1, 9, 0), Recorder(), Recorder()
    eager.generate(ids, max_new_tokens=4, streamer=theirs)
    loop = partial(llmcomp.custom_generate, streamer=ours) if bound else llmcomp.custom_generate
    compiled.generate(ids, max_new_tokens=4, custom_generate=loop, **({"streamer": ours} if given else {}))
    assert [repr(x) for x in ours.got] == [repr(x) for x in theirs.got]


def test_transformers_stops_the_loop_at_strings(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    ids = token_ids(1, 9, 0)
    end = "".join(chr(97 + t) for t in eager.generate(ids, max_new_tokens=12)[0, 12:14].tolist())
    settings = {"max_new_tokens": 12, "stop_strings": end}
    expected = eager.generate(ids, **settings, tokenizer=letters())
    assert 9 < expected.shape[1] < 21
    loop = partial(llmcomp.custom_generate, tokenizer=letters())
    assert torch.equal(compiled.generate(ids, **settings, custom_generate=loop), expected)
    with pytest.raises(GenerationError, match="partial"):
        compiled.generate(ids, **settings, tokenizer=letters(), custom_generate=llmcomp.custom_generate)


def test_the_loop_refuses_an_assistant(eager: PreTrainedModel, compiled: PreTrainedModel) -> None:
    with pytest.raises(GenerationError, match="leave custom_generate out"):
        compiled.generate(token_ids(1, 9, 0), assistant_model=eager, custom_generate=llmcomp.custom_generate)


@pytest.mark.sweep
def test_a_model_compiled_by_another_backend_keeps_it(graphs: list[GraphReport]) -> None:
    model, calls = llama(), []
    expected = model.generate(**PADDED, max_new_tokens=6)

    def other(gm: GraphModule, inputs: object) -> Callable[..., object]:
        return lambda *args: calls.append(1) or gm(*args)

    model.compile(backend=other)
    assert torch.equal(llmcomp.generate(model, **PADDED, max_new_tokens=6), expected)
    assert len(calls) == 6 and len(graphs) == 1, "the choice of a token is ours"


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_beams": 2}, r"found num_beams=2: call model.generate"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "a prompt of at least one token"),
        ({"input_ids": torch.zeros(1, 3)}, r"found torch.float32 \[1, 3\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"found torch.int64 \[3\]"),
        ({"input_ids": [[1, 2]]}, "found list"),
        ({"max_new_tokens": 0}, "at least 1, found 0"),
        ({"max_new_tokens": "4"}, "max_new_tokens to be an int of at least 1, found '4'"),
        ({"max_new_tokens": 4.0}, "max_new_tokens to be an int of at least 1, found 4.0"),
        ({"max_new_tokens": None, "max_length": 9}, "above the prompt's 9 tokens, found 9"),
        ({"max_length": 30}, r"found both \(4 and 30\)"),
        ({"generation_config": GenerationConfig()}, r"found both \(max_new_tokens\)"),
        ({"max_new_token": 4}, "did you mean 'max_new_tokens'"),
        ({"stop_strings": "end"}, "pass tokenizer="),
        ({"seed": [1, 2]}, "each of the 3 rows that are generated, found 2"),
        ({"seed": "a"}, "int or one int a row, found 'a'"),
        ({"seed": 1.5}, "found 1.5"),
        ({"seed": [1.5, 1, 1]}, r"found \[1.5, 1, 1\]"),
        ({"seed": torch.tensor(3)}, r"found tensor\(3\)"),
        ({"seed": 2**64}, "a seed of 64 bits"),
        ({"prompt_lookup_num_tokens": 3}, "found 3 rows"),
        ({"prompt_lookup_num_tokens": -3}, "prompt_lookup_num_tokens to be an int of at least 0, found -3"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, r"found \[1, 1, 9, 9\]"),
        ({"attention_mask": torch.ones(3, 8)}, r"\[3, 9\] as input_ids, found \[3, 8\]"),
        ({"attention_mask": torch.ones(3, 10)}, r"found \[3, 10\]"),
        ({"attention_mask": torch.ones(2, 9)}, r"found \[2, 9\]"),
        ({"attention_mask": [[1] * 9] * 3}, "found list"),
        ({"generation_config": {"max_new_tokens": 4}, "max_new_tokens": None}, "a GenerationConfig, found dict"),
        ({"model": Odd()}, "a model of transformers that generates, found Odd"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_errors_say_what_to_do(compiled: PreTrainedModel, changes: dict[str, object], says: str) -> None:
    arguments = {"model": compiled, **PADDED, "max_new_tokens": 4, **changes}
    with pytest.raises(GenerationError, match=says):
        llmcomp.generate(**{k: v for k, v in arguments.items() if v is not None})


def test_no_model(compiled: PreTrainedModel) -> None:
    with pytest.raises(GenerationError, match="found NoneType"):
        llmcomp.generate(None, token_ids(1, 9, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, 9, 11, 12])
def test_a_cache_of_fixed_size_may_be_too_small(eager: PreTrainedModel, compiled: PreTrainedModel, size: int) -> None:
    """Nine tokens and four more, of which the last is not in the cache; fewer may fit."""

    def run(count: int) -> Tensor:
        cache = StaticCache(eager.config, max_cache_len=size)
        return llmcomp.generate(compiled, token_ids(1, 9, 0), past_key_values=cache, max_new_tokens=count)

    fits = size - 8
    if fits > 0:
        assert torch.equal(run(fits), eager.generate(token_ids(1, 9, 0), max_new_tokens=fits))
    if fits == 4:
        return
    needed = max(9, size + 1)
    with pytest.raises(GenerationError, match=f"room for {needed} tokens, found a StaticCache of {size}: make it"):
        run(4)


def test_errors_of_a_stream_come_before_its_first_token(compiled: PreTrainedModel) -> None:
    with pytest.raises(GenerationError, match="num_beams"):
        llmcomp.stream(compiled, **PADDED, num_beams=2)


def test_steps_are_checked_together_where_nobody_looks(
    eager: PreTrainedModel, compiled: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that works on its own: what was computed behind the end is cut off."""
    monkeypatch.setattr(decoding.Decoding, "_patience", lambda self: 8)
    some = list(range(80))
    for settings in (
        {"eos_token_id": 149},
        {"eos_token_id": some},
        {"eos_token_id": some, "return_dict_in_generate": True},
    ):
        settings |= {"max_new_tokens": 19, "pad_token_id": 1}
        expected = eager.generate(**PADDED, **settings)
        ours = llmcomp.generate(compiled, **PADDED, **settings)
        if "return_dict_in_generate" in settings:
            assert ours.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
            ours, expected = ours.sequences, expected.sequences
        assert torch.equal(ours, expected)


OTHERS = ["gpt2", "mistral", "gemma2", "phi3", "qwen3_moe", "bloom", "mamba", "bamba", "gpt_neo", "xlnet"]


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", OTHERS)
def test_other_models(model_type: str) -> None:
    """Learned positions, windows, inputs prepared by the model, experts, alibi, states and caches of other kinds."""
    model = built(model_type)
    expected = model.generate(**PADDED, max_new_tokens=12)
    torch._dynamo.reset()
    model.compile(**OURS)
    assert torch.equal(llmcomp.generate(model, **PADDED, max_new_tokens=12), expected)


@pytest.mark.sweep
def test_a_model_that_is_not_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps go through Dynamo, in pieces."""
    model = llama()
    expected = model.generate(**PADDED, max_new_tokens=6)
    forward = model.model.norm.forward

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    model.model.norm.forward = broken
    model.compile(**OURS)
    assert torch.equal(llmcomp.generate(model, **PADDED, max_new_tokens=6), expected)


@pytest.mark.sweep
def test_a_thousand_generations_leave_nothing_behind(compiled: PreTrainedModel) -> None:
    def run(n: int) -> None:
        llmcomp.generate(compiled, token_ids(1, 3 + n % 7, n), max_new_tokens=4)

    for n in range(50):
        run(n)
    gc.collect()
    before = len(gc.get_objects())
    for n in range(1000):
        run(n)
    gc.collect()
    assert len(gc.get_objects()) - before < 2000


@pytest.mark.slow
def test_a_model_that_is_not_compiled_is_left_as_it_is(graphs: list[GraphReport]) -> None:
    model = llama()
    before, names = dict(vars(model)), list(model.state_dict())
    options = {"max_new_tokens": 6}
    expected = model.generate(**PADDED, **options)
    assert torch.equal(llmcomp.generate(model, **PADDED, **options), expected)
    assert [g.kind for g in graphs] == ["inference"] * 3, "the prompt, the step, the choice"
    assert vars(model) == before and list(model.state_dict()) == names
    assert type(model).__module__.startswith("transformers") and model._compiled_call_impl is None
    model.generate(**PADDED, **options)
    assert len(graphs) == 3, "model.generate stays eager"
    # Neither another length nor another call compiles anything but what is special about one row.
    assert torch.equal(llmcomp.generate(model, **PADDED, max_new_tokens=300)[:, :15], expected)
    assert torch.equal(llmcomp.generate(torch.compile(model, backend="llmcomp"), **PADDED, **options), expected)
    assert len(graphs) == 3
