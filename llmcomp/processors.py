"""What transformers prepared for a generation -> what the program does, and what stays Python.

    [bad words, repetition, my own, temperature, top_k, top_p]   LogitsProcessorList
         called one by one, as they are    the program: Rule(sample, top_k=50, top_p)

The program takes the longest tail of the list that it can do in the order that it has; the order of the rest is
kept. Stopping criteria are sorted likewise: a length and tokens that end a row belong to the loop, others are called.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from llmcomp.sampling import Numbers, Rule

# The program's order. The two minimal lengths are one step, and only sampling filters.
ORDER: dict[type[LogitsProcessor], int] = {
    RepetitionPenaltyLogitsProcessor: 0,
    MinLengthLogitsProcessor: 1,
    MinNewTokensLengthLogitsProcessor: 2,
    TemperatureLogitsWarper: 3,
    TopKLogitsWarper: 4,
    TopPLogitsWarper: 5,
    MinPLogitsWarper: 6,
}
FILTERS = 3


@dataclass(frozen=True)
class Processing:
    """The processors of a generation: `called` in Python, then `compiled` ones, of which none comes twice."""

    called: LogitsProcessorList
    compiled: tuple[LogitsProcessor, ...]
    sample: bool

    @cached_property
    def by_type(self) -> dict[type[LogitsProcessor], Any]:
        """The compiled processors."""
        return {type(p): p for p in self.compiled}

    def rule(self, ends: bool, scores: bool) -> Rule:
        """What the program does; `ends`: some tokens end a row, `scores`: the processed logits are asked for."""
        found = self.by_type
        top_k = found.get(TopKLogitsWarper)
        return Rule(
            sample=self.sample,
            repetition=RepetitionPenaltyLogitsProcessor in found,
            delayed=bool(self._delays()),
            top_k=0 if top_k is None else int(top_k.top_k),
            top_p=TopPLogitsWarper in found,
            min_p=MinPLogitsWarper in found,
            ends=ends,
            scores=scores,
        )

    def numbers(self, vocabulary: int, prompt: int, ending: Iterable[int], pad: int, device: torch.device) -> Numbers:
        """The numbers of that rule, for logits of `vocabulary` tokens behind `prompt` tokens."""
        delays = self._delays()
        waiting = _ids(delays[0].eos_token_id) if delays else []
        return Numbers(
            penalty=torch.tensor(self.penalty, dtype=torch.float32, device=device),
            temperature=self._number(TemperatureLogitsWarper, "temperature", device),
            top_p=self._number(TopPLogitsWarper, "top_p", device),
            min_p=self._number(MinPLogitsWarper, "min_p", device),
            delayed=one_hot(waiting, vocabulary, device),
            until=torch.tensor(max([0, *(_until(d, prompt) for d in delays)]), device=device),
            ending=one_hot(ending, vocabulary, device),
            pad=torch.tensor(pad, device=device),
        )

    @property
    def penalty(self) -> float:
        """What tokens that come again are penalized by; 1 where they are not."""
        processor = self.by_type.get(RepetitionPenaltyLogitsProcessor)
        return 1.0 if processor is None else float(processor.penalty)

    def factor(self, ids: Tensor, vocabulary: int) -> Tensor:
        """float32 (rows, vocabulary): the penalty for tokens of `ids` (rows, length) that count, else 1."""
        penalty = self.by_type.get(RepetitionPenaltyLogitsProcessor)
        if penalty is None:
            return torch.ones(len(ids), 0, device=ids.device)
        start = penalty.prompt_ignore_length
        start = torch.as_tensor(0 if start is None else start, device=ids.device).view(-1, 1)
        counts = torch.arange(ids.shape[1], device=ids.device) >= start
        # Tokens that do not count, and those that the head has no logit for, go to a column that is cut off.
        columns = torch.where(counts, ids, vocabulary).clamp(max=vocabulary)
        factor = torch.ones(len(ids), vocabulary + 1, device=ids.device)
        return factor.scatter_(1, columns, self.penalty)[:, :-1].contiguous()

    def _delays(self) -> list[Any]:
        return [
            self.by_type[t] for t in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor) if t in self.by_type
        ]

    def _number(self, kind: type[LogitsProcessor], name: str, device: torch.device) -> Tensor:
        processor = self.by_type.get(kind)
        value = 1.0 if processor is None else float(getattr(processor, name))
        return torch.tensor(value, dtype=torch.float32, device=device)


def read_processors(processors: LogitsProcessorList, sample: bool) -> Processing:
    """Split the processors of a generation; `sample`: tokens are drawn."""
    compiled: list[Any] = []
    for processor in reversed(processors):
        if not _fits(processor, compiled, sample):
            break
        compiled.insert(0, processor)
    called = processors[: len(processors) - len(compiled)]
    return Processing(LogitsProcessorList(called), tuple(compiled), sample)


def _fits(processor: Any, behind: list[Any], sample: bool) -> bool:
    """Whether the program can do `processor` before those `behind` it."""
    place = ORDER.get(type(processor))
    if place is None or (place >= FILTERS and not sample):
        return False
    if behind and place >= ORDER[type(behind[0])]:
        return False
    if behind and type(processor) is MinLengthLogitsProcessor and type(behind[0]) is MinNewTokensLengthLogitsProcessor:
        return _ids(processor.eos_token_id) == _ids(behind[0].eos_token_id)
    keeps, value = getattr(processor, "min_tokens_to_keep", 1), getattr(processor, "filter_value", -torch.inf)
    return bool(keeps == 1 and value == -torch.inf)


def _until(delay: Any, prompt: int) -> int:
    if isinstance(delay, MinNewTokensLengthLogitsProcessor):
        return int(delay.min_new_tokens) - prompt + int(delay.prompt_length_to_skip)
    return int(delay.min_length) - prompt


def _ids(tokens: Tensor | int | Iterable[int]) -> list[int]:
    return torch.as_tensor(tokens).flatten().tolist()


def one_hot(tokens: Iterable[int], vocabulary: int, device: torch.device) -> Tensor:
    """bool (vocabulary), true at `tokens`; ids that the vocabulary does not have are left out."""
    found = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    found[[t for t in tokens if 0 <= t < vocabulary]] = True
    return found


@dataclass(frozen=True)
class Stopping:
    """When a generation ends: at a length, when every row had one of `ending`, or when a criterion says so."""

    length: int
    ending: tuple[int, ...]
    pads: bool  # whether rows that have finished are filled with padding
    called: StoppingCriteriaList


def read_criteria(criteria: StoppingCriteriaList, longest: int) -> Stopping:
    """Split the stopping criteria of a generation of at most `longest` tokens, the prompt among them."""
    lengths = [int(c.max_length) for c in criteria if type(c) is MaxLengthCriteria]
    ending = [t for c in criteria if type(c) is EosTokenCriteria for t in _ids(c.eos_token_id)]
    called = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    pads = any(hasattr(c, "eos_token_id") for c in criteria)
    return Stopping(min([longest, *lengths]), tuple(ending), pads, StoppingCriteriaList(called))
