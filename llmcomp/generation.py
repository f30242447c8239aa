"""Generation without the cost of transformers' loop, with its configuration: `generate`, `stream`, `custom_generate`.

    llmcomp.generate(model, ids, max_new_tokens=64)                        the tokens that model.generate gives
    for token in llmcomp.stream(model, ids, max_new_tokens=64): ...        as they come
    model.generate(ids, custom_generate=llmcomp.custom_generate)           the same loop, called by transformers

Transformers reads the configuration and prepares inputs, cache, processors and stopping criteria, once; the steps are
those of llmcomp/decoding.py. A model of which nothing is compiled is compiled for the calls, and left as it is.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from llmcomp import compat, integrate
from llmcomp.backend import llmcomp
from llmcomp.caller import argument_of_generate
from llmcomp.decoding import Decoding, Engine, LookupDecoding, Task
from llmcomp.errors import GenerationError
from llmcomp.forward import Forward
from llmcomp.generation_checks import (
    check_length,
    check_lookup,
    check_loop,
    check_mask,
    check_prompt,
    check_settings,
    check_whole,
    read_seed,
)
from llmcomp.options import read_options
from llmcomp.processors import read_criteria, read_processors
from llmcomp.prompt_lookup import NGRAM

Output = GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput


@dataclass(frozen=True)
class Asked:
    """What a caller asks of the loop beyond what transformers knows."""

    seed: int | Sequence[int] | None = None
    streamer: BaseStreamer | None = None
    stepwise: bool = False  # tokens are handed out one by one
    settings: Mapping[str, object] = field(default_factory=dict)


def generate(
    model: nn.Module,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | Sequence[int] | None = None,
    **settings: object,
) -> Tensor | Output:
    """Generate tokens behind a prompt: what `model.generate` gives, by a loop that costs less.

    Greedy tokens are those of `model.generate`. Sampled ones have its distribution, but come from other random
    numbers; they are the same on every device.

    Args:
        model: a causal language model of transformers, compiled (by any backend) or not.
        input_ids: (rows, length), integers.
        generation_config: what to do; `model.generation_config` gives what it leaves open.
        attention_mask: (rows, length), 0 at padding, which has to be on the left.
        past_key_values: a cache to go on from; `input_ids` then hold its tokens and new ones.
        logits_processor, stopping_criteria: run in addition to those of the configuration.
        streamer: its `put` gets the prompt and then the tokens (rows) of each step.
        tokenizer: needed for `stop_strings`.
        seed: of the random numbers. Several numbers, one a row: a row then gives the same tokens in any batch.
            None: `torch.manual_seed` decides.
        settings: fields of GenerationConfig, in place of `generation_config`: max_new_tokens, do_sample, ...

    Returns:
        Tokens (rows * num_return_sequences, length) with those of the prompt, padded where a row ended before
        others; with `return_dict_in_generate` the output of transformers that holds them.

    Raises:
        GenerationError: what was asked for needs another loop, contradicts itself, or is not a prompt.
    """
    asked = Asked(seed, streamer, settings=settings)
    decoding = _prepare(model, input_ids, generation_config, asked, tokenizer, stopping_criteria, {
        "attention_mask": attention_mask, "past_key_values": past_key_values, "logits_processor": logits_processor,
    })  # fmt: skip
    with torch.no_grad():
        return _finished(decoding)


def stream(
    model: nn.Module,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | Sequence[int] | None = None,
    **settings: object,
) -> Iterator[Tensor]:
    """Generate tokens one by one: an iterator over tensors (rows) of the tokens of each position.

    Arguments are those of `generate`. Nothing is computed before it is asked for. Leaving the loop early, or
    `close()`, frees the cache and everything else that the generation holds.

    Raises:
        GenerationError: as `generate`, and before the first token is asked for.
    """
    asked = Asked(seed, stepwise=True, settings=settings)
    decoding = _prepare(model, input_ids, generation_config, asked, tokenizer, stopping_criteria, {
        "attention_mask": attention_mask, "past_key_values": past_key_values, "logits_processor": logits_processor,
    })  # fmt: skip
    return decoding.tokens()


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    seed: int | Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    **model_kwargs: Any,
) -> Tensor | Output:
    """The loop in the form that transformers calls: `model.generate(ids, custom_generate=llmcomp.custom_generate)`.

    `streamer`, `seed` and `stop_strings` are arguments of `generate` then. The tokenizer that stop strings need has to
    be bound, `functools.partial(llmcomp.custom_generate, tokenizer=tokenizer)`, for transformers keeps it to itself.
    A streamer may be bound too; it gets the prompt and the tokens.

    Raises:
        GenerationError: what was asked for needs another loop, or contradicts itself.
    """
    if argument_of_generate("assistant_model") is not None:
        raise GenerationError(
            "expected no assistant_model for this loop, found one: leave custom_generate out, or guess with "
            "prompt_lookup_num_tokens"
        )
    shown = cast("BaseStreamer | None", argument_of_generate("streamer"))  # transformers put the prompt there
    if streamer is not None and streamer is not shown:
        streamer.put(input_ids.cpu())
    if stop_strings is not None:
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, _stop_strings(stop_strings, tokenizer)])
    asked = Asked(seed, shown if streamer is None else streamer)
    return _finished(
        _begin(model, input_ids, logits_processor, stopping_criteria, generation_config, asked, **model_kwargs)
    )


def _prepare(
    model: nn.Module,
    input_ids: Tensor,
    config: GenerationConfig | None,
    asked: Asked,
    tokenizer: PreTrainedTokenizerBase | None,
    criteria: StoppingCriteriaList | None,
    others: dict[str, object],
) -> Decoding:
    """Have transformers prepare a generation, and stop before its first step."""
    runnable: Any = _runnable(model)
    check_prompt(input_ids)
    check_mask(others["attention_mask"], input_ids, goes_on=others["past_key_values"] is not None)
    check_settings(config, asked.settings)
    check_length(config, asked.settings, input_ids.shape[1])
    settings = dict(asked.settings)
    strings = settings.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if config is not None and config.stop_strings is not None:
        config = copy.deepcopy(config)
        config.stop_strings = None
    criteria = StoppingCriteriaList(criteria or ())
    if strings is not None:
        # Transformers would keep the tokenizer from a loop that is not its own.
        criteria.append(_stop_strings(strings, tokenizer))
    given = {name: value for name, value in others.items() if value is not None}
    begun: Decoding = runnable.generate(
        input_ids,
        config,
        stopping_criteria=criteria,
        streamer=asked.streamer,
        custom_generate=partial(_begin, asked=asked),
        **given,
        **settings,
    )
    return begun


def _begin(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    asked: Asked,
    **model_kwargs: Any,
) -> Decoding:
    """The generation of what transformers prepared, before its first step."""
    config = generation_config
    check_loop(config)
    check_whole(vars(config), {"max_length": 1, "prompt_lookup_num_tokens": 0, "max_matching_ngram_size": 0})
    seed = read_seed(asked.seed, len(input_ids))
    sample, whole = bool(config.do_sample), bool(config.return_dict_in_generate)
    task = Task(
        processing=read_processors(logits_processor, sample),
        stopping=read_criteria(stopping_criteria, config.max_length),
        pad=_pad(config),
        seed=seed,
        streamer=asked.streamer,
        scores=whole and bool(config.output_scores),
        logits=whole and bool(config.output_logits),
        guess=config.prompt_lookup_num_tokens or 0,
        ngram=config.max_matching_ngram_size or NGRAM,
        stepwise=asked.stepwise,
        keeps_cache=whole or getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False),
    )
    model = _runnable(model)
    forward, engine = Forward(model, config, model_kwargs), _engine(model)
    if not task.guess:
        return Decoding(forward, input_ids, task, engine)
    check_lookup(forward, input_ids)
    return LookupDecoding(forward, input_ids, task, engine)


def _engine(model: PreTrainedModel) -> Engine:
    """How a model that `_runnable` returned is compiled: by this backend as a whole, or in some other way."""
    original, call = integrate.behind(model) or (model, model._compiled_call_impl)
    function, settings = compat.compiler_of(call)
    if function is not llmcomp:
        return Engine(read_options(), None)
    return Engine(read_options(settings.get("options"), settings.get("mode")), original)


def _pad(config: GenerationConfig) -> int:
    pad = config._pad_token_tensor
    return 0 if pad is None else int(pad)


def _finished(decoding: Decoding) -> Tensor | Output:
    """Run a generation to its end; what `generate` returns."""
    task, config = decoding.task, decoding.begun.config
    sequences = decoding.finish()
    if task.streamer is not None:
        task.streamer.end()
    if not config.return_dict_in_generate:
        return sequences
    kept = {
        "sequences": sequences,
        "scores": tuple(decoding.scores) if task.scores else None,
        "logits": tuple(decoding.logits) if task.logits else None,
        "past_key_values": decoding.begun.cache,
    }
    encodes = decoding.begun.model.config.is_encoder_decoder
    return GenerateEncoderDecoderOutput(**kept) if encodes else GenerateDecoderOnlyOutput(**kept)


def _runnable(model: nn.Module) -> PreTrainedModel:
    """`model` with calls that run compiled: itself where anything of it is compiled, else a stand-in for it."""
    original: Any = model._orig_mod if isinstance(model, compat.optimized_module()) else model
    if not isinstance(original, GenerationMixin):
        raise GenerationError(
            f"expected a model of transformers that generates, found {type(original).__name__}: "
            "call it in a loop of your own, compiled with model.compile(backend='llmcomp')"
        )
    found: Any = model
    if isinstance(model, compat.optimized_module()):
        found = integrate.stand_in(original, model)
    elif integrate.behind(model) is None and not _is_compiled(model):
        # As model.compile does, which would leave its mark on the model; so does torch.compile(model).
        found = integrate.stand_in(model, torch.compile(model._call_impl, backend="llmcomp"))
    return cast(PreTrainedModel, found)


def _is_compiled(model: nn.Module) -> bool:
    """Whether the user compiled the model, its forward or a part of it."""
    compiled = compat.optimized_module()
    parts = any(m._compiled_call_impl is not None or isinstance(m, compiled) for m in model.modules())
    return parts or compat.uncompiled(model.forward) != model.forward


def _stop_strings(strings: object, tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria:
    if tokenizer is None:
        raise GenerationError(
            f"expected a tokenizer for stop_strings={strings!r}, found none: pass tokenizer= to llmcomp.generate, or "
            "custom_generate=functools.partial(llmcomp.custom_generate, tokenizer=...) to generate of transformers"
        )
    return StopStringCriteria(tokenizer, cast("str | list[str]", strings))
