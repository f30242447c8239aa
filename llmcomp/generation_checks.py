"""What a generation can't be asked for: each check says what was expected, what was found and what to do."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, StaticCache

from llmcomp.errors import GenerationError
from llmcomp.forward import Forward

# What another loop is needed for, and the values that ask for nothing.
OTHER_LOOPS: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "dola_layers": (None,),
    "use_mtp": (None, False),
    "assistant_early_exit": (None,),
    "is_assistant": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


def check_prompt(ids: object) -> None:
    """Refuse what is no prompt of tokens."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise GenerationError(
            f"expected input_ids to be an int64 tensor (rows, length), found {found}: "
            "pass tokenizer(text, return_tensors='pt').input_ids"
        )
    if not ids.numel():
        raise GenerationError(
            f"expected a prompt of at least one token, found input_ids of shape {list(ids.shape)}: "
            "begin with the model's bos_token_id"
        )


def check_mask(mask: object, ids: Tensor, goes_on: bool) -> None:
    """Refuse a mask that does not cover `ids`; behind a cache, whose tokens `goes_on` tells of, it may cover more."""
    if mask is None:
        return
    found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    rows, length = ids.shape
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows
    if not fits or mask.shape[1] < length or (mask.shape[1] > length and not goes_on):  # type: ignore[attr-defined]
        raise GenerationError(
            f"expected attention_mask (rows, length), {list(ids.shape)} as input_ids, found {found}: pass the mask of "
            "the tokenizer"
        )


def check_settings(config: GenerationConfig | None, settings: Mapping[str, object]) -> None:
    """Refuse what is no setting, and settings of two sources."""
    if config is not None and not isinstance(config, GenerationConfig):
        raise GenerationError(
            f"expected a GenerationConfig, found {type(config).__name__}: pass GenerationConfig(...), or the settings "
            "as arguments of their own: max_new_tokens=64"
        )
    known = vars(GenerationConfig())
    for name in settings:
        if name not in known or name.startswith("_"):
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise GenerationError(
                f"expected fields of GenerationConfig, found {name!r}: {hint}inputs of the model other than "
                "tokens are for model.generate(..., custom_generate=llmcomp.custom_generate)"
            )
    if config is not None and settings:
        raise GenerationError(
            f"expected a generation_config or single settings, found both ({', '.join(settings)}): "
            "set them in the generation_config"
        )


def check_length(config: GenerationConfig | None, settings: Mapping[str, object], prompt: int) -> None:
    """Refuse lengths that contradict each other, or leave no token to generate."""
    given = settings if config is None else vars(config)
    check_whole(given, {"max_new_tokens": 1, "max_length": 1})
    new, length = (cast("int | None", given.get(name)) for name in ("max_new_tokens", "max_length"))
    if new is not None and length is not None:
        raise GenerationError(
            f"expected max_new_tokens or max_length, found both ({new} and {length}): leave one of them out"
        )
    if length is not None and length <= prompt:
        raise GenerationError(
            f"expected max_length above the prompt's {prompt} tokens, found {length}: it counts the prompt too; "
            "pass max_new_tokens to count only new tokens"
        )


def check_whole(given: Mapping[str, object], least: Mapping[str, int]) -> None:
    """Refuse settings that are no whole numbers, or less than `least` of them."""
    for name, lowest in least.items():
        value = given.get(name)
        if value is not None and (not isinstance(value, Integral) or int(value) < lowest):
            raise GenerationError(f"expected {name} to be an int of at least {lowest}, found {value!r}: pass {name}=4")


def check_loop(config: GenerationConfig) -> None:
    """Refuse what this loop does not do."""
    for name, neutral in OTHER_LOOPS.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise GenerationError(
                f"expected greedy decoding, sampling or prompt lookup, found {name}={value!r}: call "
                "model.generate(...) for it, without custom_generate; the model's calls run compiled there too if "
                "it was compiled with model.compile(backend='llmcomp')"
            )


def read_seed(seed: object, rows: int) -> int | tuple[int, ...] | None:
    """`seed` as one number, one a row, or none."""
    if seed is None:
        return None
    if _is_seed(seed):
        return int(cast(int, seed))
    if not isinstance(seed, Sequence) or not all(map(_is_seed, seed)):
        raise GenerationError(
            f"expected a seed of 64 bits, int or one int a row, found {seed!r}: pass seed=3, or [3, 5] for two rows"
        )
    if len(seed) != rows:
        raise GenerationError(
            f"expected one seed or one for each of the {rows} rows that are generated, found {len(seed)}: rows are "
            "those of input_ids, each num_return_sequences times"
        )
    return tuple(map(int, seed))


def _is_seed(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**64


def check_lookup(forward: Forward, ids: Tensor) -> None:
    """Refuse prompt lookup where the model's calls cannot be taken back."""
    cache = forward.cache
    takes_back = isinstance(cache, Cache) and hasattr(cache, "crop") and not isinstance(cache, StaticCache)
    if len(ids) != 1:
        found, do = f"{len(ids)} rows", "generate them one by one, or leave prompt_lookup_num_tokens out"
    elif forward.model.config.is_encoder_decoder or not forward.inputs.get("use_cache") or not takes_back:
        found, do = f"the cache {type(cache).__name__}", "leave prompt_lookup_num_tokens out"
    elif getattr(forward.model, "_is_stateful", False):
        found, do = "a model whose state cannot be taken back", "leave prompt_lookup_num_tokens out"
    else:
        return
    raise GenerationError(f"expected one row and a cache that grows for prompt lookup, found {found}: {do}")
