"""The calls of a model in a generation: the prompt, then one or more tokens behind what its cache holds.

Transformers prepares the inputs of every call anew from all tokens so far. Where a model leaves that to
transformers and has a growing cache, its inputs are known: the new tokens, their positions, and the padding mask
if there is one. Then nothing else is touched between two calls.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer

from llmcomp.errors import GenerationError

# What the calls after the prompt may be given for their inputs to be known.
KNOWN = frozenset({"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})


class Forward:
    """A model with the cache of one generation."""

    def __init__(self, model: PreTrainedModel, config: GenerationConfig, inputs: dict[str, Any]) -> None:
        """`config` and `inputs` are what transformers prepared."""
        self.model: Any = model
        self.config = config
        self.inputs = inputs
        self.room = _room(self.cache)  # positions that the cache can hold, None where it grows
        self.known = False  # whether the inputs of calls behind the prompt are known

    @property
    def cache(self) -> Any:
        """The cache, None where the model returned none."""
        for name in ("past_key_values", "cache_params", "state"):
            if self.inputs.get(name) is not None:
                return self.inputs[name]
        return None

    def prompt(self, ids: Tensor) -> Tensor:
        """The logits (rows, vocabulary) behind the prompt `ids` (rows, length).

        Raises:
            GenerationError: the cache is of fixed size, and too small; `more` raises it too.
        """
        self._check_room(ids.shape[1])
        outputs = self.model._prefill(ids, self.config, self.inputs)
        self._update(outputs)
        self.known = self._is_known(ids)
        if self.known:
            self._keep_last_position()
        # A copy of the last position, so that the logits of all others can go.
        logits: Tensor = outputs.logits[:, -1].to(ids.device).clone(memory_format=torch.contiguous_format)
        return logits

    def more(self, tokens: Tensor, text: Tensor) -> Tensor:
        """The logits (rows, count, vocabulary) behind each of `tokens` (rows, count).

        The first of them is the last of `text` (rows, length), all tokens so far.
        """
        count = tokens.shape[1]
        self._check_room(text.shape[1] + count - 1)
        if self.known:
            outputs = self.model(**self._next(tokens), return_dict=True)
            self._extend(1)
        else:
            outputs = self.model(**self._prepared(torch.cat([text, tokens[:, 1:]], 1), count), return_dict=True)
            self._update(outputs)
        logits: Tensor = outputs.logits[:, -count:].to(tokens.device)
        return logits

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens; to be called after every `more` once `record` was."""
        self.cache.crop(-count)
        self.skip(-count)

    def skip(self, count: int) -> None:
        """Note that the cache was given `count` tokens more, or fewer, by somebody else."""
        if count:
            self._extend(count)

    def record(self) -> None:
        """Have caches with a window keep what `take_back` needs."""
        self.cache.activate_past_recording()

    def _check_room(self, length: int) -> None:
        if self.room is not None and length > self.room:
            raise GenerationError(
                f"expected a cache with room for {length} tokens, found a {type(self.cache).__name__} of {self.room}: "
                "make it with max_cache_len of the prompt's length and max_new_tokens, or end earlier"
            )

    def _is_known(self, ids: Tensor) -> bool:
        kind, cache = type(self.model), self.inputs.get("past_key_values")
        own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
        positions = self.inputs.get("position_ids")
        return (
            all(getattr(kind, name) is getattr(GenerationMixin, name) for name in own)
            and type(cache) is DynamicCache
            and not cache.is_compileable
            and not self.model.config.is_encoder_decoder
            and not self.model.is_remote_code()
            and bool(self.inputs.get("use_cache"))
            and {k for k, v in self.inputs.items() if v is not None} <= KNOWN
            and (positions is None or positions.dim() == 2)
            and ids.device == self.model.device
        )

    def _keep_last_position(self) -> None:
        if self.inputs.get("position_ids") is not None:
            self.inputs["position_ids"] = self.inputs["position_ids"][:, -1:].clone()
        self.inputs = {k: v for k, v in self.inputs.items() if v is not None}

    def _next(self, tokens: Tensor) -> dict[str, Any]:
        """The inputs of a call where they are known; masks and positions have room for one token."""
        inputs, count = self.inputs, tokens.shape[1]
        if count > 1:
            self._extend(count - 1)
            inputs = self._all_logits({**self.inputs})
            if "position_ids" in inputs:
                start = inputs["position_ids"] - (count - 1)
                inputs["position_ids"] = start + torch.arange(count, device=start.device)
        return {**inputs, "input_ids": tokens}

    def _prepared(self, ids: Tensor, count: int) -> dict[str, Any]:
        """The inputs of a call that transformers prepares from all tokens."""
        if count > 1:
            self._extend(count - 1)
        kept = count if self.inputs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=kept, **self.inputs)
        prepared: dict[str, Any] = self._all_logits(inputs) if count > 1 else inputs
        return prepared

    def _all_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0  # those of every token
        return inputs

    def _update(self, outputs: Any) -> None:
        """Note the cache, and make masks and positions one longer."""
        self.inputs = self.model._update_model_kwargs_for_generation(
            outputs, self.inputs, is_encoder_decoder=self.model.config.is_encoder_decoder
        )

    def _extend(self, count: int) -> None:
        """Make masks and positions `count` tokens longer, or shorter where it is negative."""
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        if mask is not None:
            self.inputs["attention_mask"] = _resized(mask, count, mask.new_ones(1))
        if positions is not None and self.known:
            self.inputs["position_ids"] = positions + count
        elif positions is not None:
            ahead = torch.arange(1, max(count, 0) + 1, device=positions.device)
            self.inputs["position_ids"] = _resized(positions, count, positions[..., -1:] + ahead)


def _room(cache: Any) -> int | None:
    """How many positions fit into the layers of `cache` that are of fixed size and keep all of them."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return min((x.max_cache_len for x in layers if isinstance(x, StaticLayer) and not x.is_sliding), default=None)


def _resized(x: Tensor, count: int, more: Tensor) -> Tensor:
    """`x` with `count` more columns of `more`, or without its last ones."""
    return x[..., :count] if count < 0 else torch.cat([x, more.expand(*x.shape[:-1], count)], -1)
