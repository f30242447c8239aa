"""Decoding without anybody's generate: a compiled step on transformers' static cache, its tokens fed back.

    token = step(model, cache, token)        the same function for every peer; only the backend and its mode differ

The device is waited for once in CHUNK steps, so that what is measured is the longer of launching and computing.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from llmcomp.bench_model import Setup

CHUNK = 8  # steps
WARM = 6  # steps, in which everything is compiled and recorded


def step(model: Any, cache: StaticCache, token: Tensor) -> Tensor:
    """The next token (rows, 1) of every row, greedily."""
    logits: Tensor = model.forward(input_ids=token, past_key_values=cache, use_cache=True).logits
    return logits[:, -1:].argmax(-1)


class Steps:
    """Step loops of one peer; each batch and context has a cache that stays where it is."""

    def __init__(self, model: Any, setup: Setup, backend: str | None, mode: str | None) -> None:
        self.model, self.setup = model, setup
        self.backend, self.mode = backend, mode
        self.run: Callable[..., Tensor] = step
        self._caches: dict[tuple[int, int, int], tuple[StaticCache, Tensor, list[tuple[Tensor, Tensor]]]] = {}

    def measure(self, batch: int, context: int, count: int) -> dict[str, Any]:
        """Seconds of a step behind `context` tokens, a median for each CHUNK of `count` steps; the first row's tokens.

        `host` is how long the host takes to launch a step.
        """
        with torch.no_grad():
            cache, first, state = self._begin(batch, context, count)
            for position, value in state:
                position.copy_(value)
            token, tokens = first, [first]
            seconds: list[float] = []
            host: list[float] = []
            while len(tokens) < WARM + count:
                wait(self.setup.device)
                start = time.perf_counter()
                for _ in range(CHUNK):
                    torch.compiler.cudagraph_mark_step_begin()
                    token = self.run(self.model, cache, token).clone()
                    tokens.append(token)
                launched = time.perf_counter()
                wait(self.setup.device)
                if len(tokens) > WARM + CHUNK:
                    seconds.append((time.perf_counter() - start) / CHUNK)
                    host.append((launched - start) / CHUNK)
        row = torch.cat(tokens, 1)[0, : WARM + count].tolist()
        return {"seconds": seconds, "host": statistics.median(host), "tokens": row}

    def _begin(self, batch: int, context: int, count: int) -> tuple[StaticCache, Tensor, list[tuple[Tensor, Tensor]]]:
        """A cache that holds a prompt, the token behind it, and how the cache's positions were then."""
        key = (batch, context, count)
        if key not in self._caches:
            self._caches.clear()
            torch._dynamo.reset()  # every size is compiled for itself, as the only one
            if self.backend is not None:
                self.run = torch.compile(step, backend=self.backend, mode=self.mode, fullgraph=True)
            cache = StaticCache(config=self.model.config, max_cache_len=context + count + WARM + CHUNK)
            first = step(self.model, cache, self.setup.prompt(batch, context))
            counters = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
            state = [(t, t.clone()) for t in counters if not t.is_floating_point()]
            self._caches[key] = cache, first, state
        return self._caches[key]


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
