"""The calls of a model behind its prompt, on a cache that does not move: every step is a replay of the one before."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmcomp import compat
from llmcomp.fixed_cache import FixedCache, empty, fixed, restore
from llmcomp.forward import Forward
from llmcomp.options import Options
from llmcomp.replay import Replay, Results, any_rows, recording

# Capacities are multiples of this; a cache that is full is replaced by one of twice the length.
ROOM = 256


class FixedForward:
    """Goes on where a Forward has taken the prompt; the same calls, but for the cache, which is copied once."""

    def __init__(
        self, forward: Forward, model: torch.nn.Module, options: Options, more: int, keeps_cache: bool
    ) -> None:
        """There will be at most `more` positions more. Unless it is kept, the cache of `forward` is emptied."""
        self.forward, self.model, self.options = forward, model, options
        self.start = self.length = int(forward.cache.get_seq_length())
        self.longest = self.length + more
        self.inputs = dict(forward.inputs)
        if "position_ids" in self.inputs:
            self.inputs["position_ids"] = any_rows(self.inputs["position_ids"].clone())
        self._make_room(forward.cache)
        if not keeps_cache:
            empty(forward.cache)

    def more(self, tokens: Tensor, text: Tensor) -> Tensor:
        """The logits (rows, count, vocabulary) behind each of `tokens` (rows, count), as those of a Forward.

        Raises:
            torch._dynamo.exc.Unsupported: the model cannot be compiled as one graph; nothing has happened yet.
        """
        count = tokens.shape[1]
        if self.length + count > self.cache.capacity:
            self._make_room(self.cache)
        (logits,) = self.replay(tokens)
        assert logits is not None
        self.length += count
        return logits

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count:
            self.length -= count
            self.cache.position.sub_(count)
            if "position_ids" in self.inputs:
                self.inputs["position_ids"].sub_(count)

    def back(self) -> Forward:
        """The Forward that this began with, its cache brought up to date."""
        restore(self.forward.cache, self.cache, self.length)
        self.forward.skip(self.length - self.start)
        return self.forward

    def _make_room(self, past: Any) -> None:
        """Move the content of the cache `past` to a new one."""
        wanted = min(self.longest, max(2 * self.length, self.length + ROOM))
        capacity = -(-wanted // ROOM) * ROOM
        self.cache: FixedCache = fixed(past, self.length, capacity)
        self.inputs["past_key_values"] = self.cache
        if "attention_mask" in self.inputs:
            mask = self.inputs["attention_mask"][:, : self.length]
            # The future is hidden by its position, so that this mask never changes.
            mask = torch.nn.functional.pad(mask, (0, capacity - self.length), value=1)
            torch._dynamo.maybe_mark_dynamic(mask, 1)
            self.inputs["attention_mask"] = any_rows(mask)
        self.replay = Replay(compiled_step(self.options), self.model, self.inputs)


@cache
def compiled_step(options: Options) -> Callable[..., Results]:
    """`step`, compiled; one function for all models, as their calls are anyway."""
    return compat.compile_apart(step, recording(options), fullgraph=True)


def step(model: Any, inputs: dict[str, Any], ids: Tensor) -> tuple[Tensor]:
    """One call of `model`: the logits (rows, count, vocabulary) behind `ids` (rows, count).

    `inputs` hold the cache and, where the model has them, a mask and the next position of every row. Positions
    are counted up in place.
    """
    count, positions = ids.shape[1], inputs.get("position_ids")
    changed: dict[str, Any] = {}
    if positions is not None:
        changed["position_ids"] = positions + torch.arange(count, device=ids.device)
    if "logits_to_keep" in inputs:
        changed["logits_to_keep"] = 1 if count == 1 else 0
    logits: Tensor = model(input_ids=ids, **{**inputs, **changed}, return_dict=True).logits
    if positions is not None:
        positions.add_(count)
    inputs["past_key_values"].position.add_(count)
    return (logits[:, -count:],)
