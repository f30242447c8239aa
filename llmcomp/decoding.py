"""A generation under way: logits of the model -> tokens, step by step, until something says stop.

    prompt -> logits -> [processors in Python] -> program(logits, state) -> tokens -> model -> logits -> ...

The program is the compiled half of a step (llmcomp/sampling.py); its state stays on the device. A step reads from
the device only what a stop condition, a streamer or a processor needs; where nobody looks at single tokens and the
device works on its own, several steps are checked together and what came after the end is cut off.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llmcomp import compat, sampling
from llmcomp.debug import log
from llmcomp.fixed_cache import can_fix
from llmcomp.fixed_forward import FixedForward
from llmcomp.forward import Forward
from llmcomp.options import Options
from llmcomp.processors import Processing, Stopping
from llmcomp.prompt_lookup import NGRAM, Lookup
from llmcomp.replay import Replay, Results, any_rows, recording
from llmcomp.sampling import Chosen, Rule, State

# Steps between two looks at a device that works on its own, where nobody else needs the tokens.
UNCHECKED = 8


@dataclass(frozen=True)
class Engine:
    """How calls are compiled."""

    options: Options
    model: torch.nn.Module | None  # whose steps may be replayed; None where the user compiled it by other means


@dataclass(frozen=True)
class Task:
    """What a generation is to do."""

    processing: Processing
    stopping: Stopping
    pad: int
    seed: int | tuple[int, ...] | None = None
    streamer: BaseStreamer | None = None
    scores: bool = False  # keep the processed logits of every step
    logits: bool = False  # keep the logits of every step
    guess: int = 0  # tokens that prompt lookup may guess at once
    ngram: int = NGRAM  # the longest n-gram that it looks for
    stepwise: bool = False  # tokens are handed out one by one: no step beyond the end
    keeps_cache: bool = False  # somebody has the cache, or will get it


class Text:
    """The tokens of all rows, in a buffer that grows."""

    def __init__(self, ids: Tensor, longest: int) -> None:
        self.longest = longest
        self.length = ids.shape[1]
        self._buffer = ids.new_empty(len(ids), min(longest, self.length + 256))
        self._buffer[:, : self.length] = ids

    @property
    def ids(self) -> Tensor:
        """All tokens (rows, length); a view."""
        return self._buffer[:, : self.length]

    def add(self, tokens: Tensor) -> None:
        """Append a token (rows) to every row."""
        if self.length == self._buffer.shape[1]:
            room = min(self.longest, 2 * self.length) - self.length
            self._buffer = torch.cat([self._buffer, self._buffer.new_empty(len(self._buffer), room)], 1)
        self._buffer.select(1, self.length).copy_(tokens)
        self.length += 1

    def cut(self, count: int) -> None:
        """Forget the last `count` tokens of every row."""
        self.length -= count


class Decoding:
    """One generation. `advance` makes one call of the model and adds its tokens to `text`, until `done`."""

    def __init__(self, forward: Forward, ids: Tensor, task: Task, engine: Engine) -> None:
        """`ids` (rows, length) is the prompt, that `forward` has not seen yet."""
        self.task, self.engine = task, engine
        self.begun = forward
        self.forward: Forward | FixedForward = forward
        self.text = Text(ids, task.stopping.length)
        self.prompt = ids.shape[1]
        self.done = False
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._unchecked: list[Tensor] = []

    def advance(self) -> None:
        """One call of the model, and the tokens that follow from it."""
        logits = self._begin() if self.text.length == self.prompt else self._more(self.token[:, None])[:, -1]
        self._take(self._choose(logits, self.state), logits)

    def tokens(self) -> Iterator[Tensor]:
        """The generated tokens (rows) of every position, each as soon as it is known."""
        given = self.prompt
        try:
            while not self.done:
                with torch.no_grad():
                    self.advance()
                for position in range(given, self.text.length):
                    yield self.text.ids[:, position].clone()
                given = self.text.length
        finally:
            self._give_back()

    def finish(self) -> Tensor:
        """Run to the end; the tokens (rows, length) with those of the prompt."""
        try:
            while not self.done:
                self.advance()
        finally:
            self._give_back()
        return self.text.ids.clone()

    def _give_back(self) -> None:
        """Bring a cache that somebody keeps up to date."""
        if self.task.keeps_cache and isinstance(self.forward, FixedForward):
            self.forward = self.forward.back()

    def _begin(self) -> Tensor:
        """The logits behind the prompt; everything for what follows."""
        logits = self.begun.prompt(self.text.ids)
        rows, self.vocabulary = logits.shape
        task, device = self.task, logits.device
        self.state = State(
            step=torch.zeros(rows, dtype=torch.int64, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            factor=task.processing.factor(self.text.ids, self.vocabulary),
        )
        keys = any_rows(sampling.row_keys(rows, task.seed, device))
        numbers = task.processing.numbers(self.vocabulary, self.prompt, task.stopping.ending, task.pad, device)
        rule = task.processing.rule(task.stopping.pads, task.scores)
        self.program = Replay(compiled_choice(rule, self.engine.options), numbers, keys)
        model, more = self.engine.model, task.stopping.length - self.prompt
        if model is not None and more > 1 and self._replays(model):
            options = self.engine.options
            self.forward = FixedForward(self.begun, model, options, more, task.keeps_cache)
        return logits

    def _replays(self, model: torch.nn.Module) -> bool:
        """Whether steps may be replayed: all of their inputs are tensors that do not move, and they are one graph."""
        # Transformers' word for models that compute the same with a cache of fixed size.
        compiles = getattr(model, "_can_compile_fullgraph", False)
        return bool(compiles) and self.begun.known and can_fix(self.begun.cache)

    def _more(self, tokens: Tensor) -> Tensor:
        """The logits (rows, count, vocabulary) behind `tokens` (rows, count), of which the first ends the text."""
        try:
            return self.forward.more(tokens, self.text.ids)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError) as reason:
            if not isinstance(self.forward, FixedForward):
                raise
            log.info("generate: steps are not replayed, for the model is not one graph: %s", reason)
            self.forward = self.forward.back()
            return self.forward.more(tokens, self.text.ids)

    def _choose(self, logits: Tensor, state: State, guess: Sequence[int] = ()) -> Chosen:
        """The next token of every row of `logits` (rows, vocabulary)."""
        if self.task.processing.called:
            logits = self._processed(logits, guess)
        return Chosen(*self.program(logits, *state))  # type: ignore[arg-type]

    def _processed(self, logits: Tensor, guess: Sequence[int]) -> Tensor:
        """`logits` after the processors that are called in Python; each row but the first is behind a guess."""
        called: Callable[[Any, Tensor], Tensor] = self.task.processing.called
        ids = self.text.ids
        # Processors may write into what they are given, and compute in float32.
        logits = logits.to(torch.float32, copy=True)
        if not guess:
            return called(ids, logits)
        behind = torch.cat([ids, ids.new_tensor([guess])], 1)
        rows = [called(behind[:, : self.text.length + i], x) for i, x in enumerate(logits.split(1))]
        return torch.cat(rows)

    def _take(self, chosen: Chosen, logits: Tensor) -> None:
        """Add the chosen tokens to the text, and see whether that was the end."""
        finished = self.state.finished if chosen.finished is None else chosen.finished
        self.state = State(chosen.step, finished, self.state.factor if chosen.factor is None else chosen.factor)
        self.token = chosen.token
        self.text.add(self.token)
        if chosen.scores is not None:
            self.scores.append(chosen.scores)
        if self.task.logits:
            self.logits.append(logits.to(torch.float32, copy=True))
        if self.task.streamer is not None:
            self.task.streamer.put(chosen.token.cpu())
        ended = self._ask_criteria() if self.task.stopping.called else chosen.ended
        full = self.text.length >= self.task.stopping.length
        self.done = full if ended is None else self._is_over(ended, full)

    def _ask_criteria(self) -> Tensor:
        """Whether every row has finished, by the criteria that are called in Python too."""
        scores = tuple(self.scores) if self.task.scores else None
        finished: Tensor = self.state.finished | self.task.stopping.called(self.text.ids, scores)
        self.state = self.state._replace(finished=finished)
        return finished.all()

    def _is_over(self, ended: Tensor, full: bool) -> bool:
        """Whether all rows have finished or the text is `full`; tokens beyond the end are cut off."""
        self._unchecked.append(ended)
        if len(self._unchecked) < self._patience() and not full:
            return False
        over = torch.stack(self._unchecked).tolist() if len(self._unchecked) > 1 else [bool(ended)]
        self._unchecked.clear()
        if True in over:
            self._cut(len(over) - 1 - over.index(True))
        return full or True in over

    def _cut(self, count: int) -> None:
        """Forget the last `count` tokens."""
        self.text.cut(count)
        if self.task.keeps_cache:
            self.forward.take_back(count)

    def _patience(self) -> int:
        """How many steps may pass before somebody looks."""
        task = self.task
        watched = task.streamer or task.stopping.called or task.processing.called or task.scores or task.logits
        on_its_own = self.text.ids.device.type != "cpu" and isinstance(self.forward, FixedForward)
        return UNCHECKED if on_its_own and not watched and not task.stepwise else 1


@cache
def compiled_choice(rule: Rule, options: Options) -> Callable[..., Results]:
    """The compiled function that chooses tokens by `rule`."""

    def choice(*tensors: Any) -> Chosen:
        return sampling.choose(rule, *tensors)

    return compat.compile_apart(choice, recording(options), fullgraph=True)


class LookupDecoding(Decoding):
    """A generation of one row in which the model checks tokens that prompt lookup guessed, several in a call.

    Its tokens are those that the model would choose one by one: a guess is kept as far as the program chooses
    the same. That holds for sampling too, since the random numbers of a step do not depend on when it is computed.
    """

    def __init__(self, forward: Forward, ids: Tensor, task: Task, engine: Engine) -> None:
        super().__init__(forward, ids, task, engine)
        self.lookup = Lookup(task.ngram)
        self.lookup.extend(ids[0].tolist())
        forward.record()

    def advance(self) -> None:
        """One call of the model, and the part of a guess that it confirms, and one token more."""
        guess: list[int] = []
        if self.text.length == self.prompt:
            logits = self._begin()
        else:
            guess = self._guess()
            logits = self._more(torch.tensor([[self.lookup.tokens[-1], *guess]], device=self.token.device))[0]
        chosen = self._choose(logits, self._behind(guess), guess)
        tokens, taken = chosen.token.tolist(), 0
        for token, expected in zip(tokens, [*guess, None], strict=True):
            self._take(_row(chosen, taken), logits[taken : taken + 1])
            self.lookup.extend([token])
            taken += 1
            if self.done or token != expected:
                break
        self.forward.take_back(len(tokens) - taken)

    def _guess(self) -> list[int]:
        """Tokens that may come next: none, or as many as are allowed, so that calls have two shapes and no more."""
        count = self.task.guess
        if self.text.length + count >= self.task.stopping.length:
            return []
        guess = self.lookup.guess(count, self.task.stopping.ending)
        # Some prompts hold tokens that the model has no logit for.
        if not guess or max(guess) >= self.vocabulary:
            return []
        return guess + guess[-1:] * (count - len(guess))

    def _behind(self, guess: list[int]) -> State:
        """The states, one a row, in which the token at each position of the guess and the one after it are chosen."""
        state, count = self.state, 1 + len(guess)
        if count == 1:
            return state
        factor = state.factor.expand(count, -1).clone()
        for i, token in enumerate(guess, 1) if factor.numel() else ():
            factor[i:, token] = self.task.processing.penalty
        step = state.step + torch.arange(count, device=state.step.device)
        return State(step, state.finished.repeat(count), factor)


def _row(chosen: Chosen, i: int) -> Chosen:
    """What was chosen in row `i`, as the choice of one row."""
    row = Chosen(*(None if x is None or x.dim() == 0 else x[i : i + 1] for x in chosen))  # type: ignore[arg-type]
    return row if row.finished is None else row._replace(ended=row.finished.all())
