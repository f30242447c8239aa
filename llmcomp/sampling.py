"""Logits -> the next token of every row, as one function that is compiled: filters, the draw, the end.

    scores = logits, tokens seen before penalized, tokens that may not come yet at -inf
    floor  = the lowest score that top_k, top_p and min_p let pass
    token  = argmax(scores)                                   greedy
    token  = argmax(scores / temperature + gumbel noise)      sampling, among the scores above the floor

argmax of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison, Tarlow and Minka 2014), so
there is no softmax, no cumulative sum and no second look at the vocabulary. The noise is computed where it is
used (llmcomp/philox.py) from the row's key and the number of the token: a row gives the same tokens whoever
else is in its batch, and whether its tokens come one by one or several at once (prompt lookup).

Each filter does what its namesake in transformers does, in the same order and in float32. Where the edge of top_p
falls among tokens of exactly equal logits, all of them are kept, as with top_k; transformers keeps some.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmcomp import philox


@dataclass(frozen=True)
class Rule:
    """What is done to logits: a program is compiled for each. Numbers are left to `Numbers`, but for `top_k`."""

    sample: bool = False
    repetition: bool = False  # tokens that were seen are penalized
    delayed: bool = False  # some tokens may not come before a certain step
    top_k: int = 0  # 0: all
    top_p: bool = False
    min_p: bool = False
    ends: bool = False  # some tokens end a row
    scores: bool = False  # the processed logits are asked for too


class Numbers(NamedTuple):
    """The numbers of a rule, on the device: changing one compiles nothing."""

    penalty: Tensor  # float32 (), > 1 makes repetition less likely
    temperature: Tensor  # float32 (), > 0
    top_p: Tensor  # float32 (), 0 to 1
    min_p: Tensor  # float32 (), 0 to 1
    delayed: Tensor  # bool (vocabulary), tokens that have to wait
    until: Tensor  # int64 (), for this step
    ending: Tensor  # bool (vocabulary), tokens that end a row
    pad: Tensor  # int64 (), what rows that ended are filled with


class State(NamedTuple):
    """What goes from one step to the next, on the device."""

    step: Tensor  # int64 (rows), how many tokens were generated before
    finished: Tensor  # bool (rows)
    factor: Tensor  # float32 (rows, vocabulary), the penalty of tokens that were seen, else 1; (rows, 0) without one


class Chosen(NamedTuple):
    """What a step gives; None where the rule needs no such thing."""

    token: Tensor  # int64 (rows)
    step: Tensor
    finished: Tensor | None
    ended: Tensor | None  # bool (), whether every row has finished
    factor: Tensor | None
    scores: Tensor | None  # float32 (rows, vocabulary), the processed logits


def choose(rule: Rule, numbers: Numbers, keys: Tensor, logits: Tensor, *state: Tensor) -> Chosen:
    """The next token of every row of `logits` (rows, vocabulary), of any floating-point dtype.

    `keys` int64 (rows, 2) are those of the random numbers, `state` the fields of a State.
    """
    before = State(*state)
    scores = _penalized(rule, logits.float(), before, numbers)
    if rule.sample:
        scores = _filtered(rule, scores / numbers.temperature, numbers)
    token = (scores + _noise(scores, before.step, keys) if rule.sample else scores).argmax(-1)
    finished = ended = factor = None
    if rule.ends:
        token = torch.where(before.finished, numbers.pad, token)
        finished = before.finished | numbers.ending[token]
        ended = finished.all()
    if rule.repetition:
        factor = torch.where(_vocabulary(scores) == token[:, None], numbers.penalty, before.factor)
    # A copy, for they may be the logits themselves.
    return Chosen(token, before.step + 1, finished, ended, factor, scores.clone() if rule.scores else None)


def _vocabulary(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1], device=scores.device)


def _penalized(rule: Rule, scores: Tensor, state: State, numbers: Numbers) -> Tensor:
    if rule.repetition:
        # Multiplied below 0 and divided above: the smaller of the two for penalties above 1, else the larger one.
        multiplied, divided = scores * state.factor, scores / state.factor
        less, more = torch.minimum(multiplied, divided), torch.maximum(multiplied, divided)
        scores = torch.where(numbers.penalty >= 1, less, more)
    if rule.delayed:
        early = (state.step < numbers.until)[:, None]
        scores = torch.where(numbers.delayed & early, -torch.inf, scores)
    return scores


def _filtered(rule: Rule, scores: Tensor, numbers: Numbers) -> Tensor:
    floors = _floors(rule, scores, numbers)
    for floor in floors:
        scores = torch.where(scores < floor, -torch.inf, scores)
    return scores


def _floors(rule: Rule, scores: Tensor, numbers: Numbers) -> list[Tensor]:
    """The lowest score (rows, 1) that each filter lets pass."""
    floors = []
    highest = scores.amax(-1, keepdim=True)
    if rule.top_k or rule.top_p:
        ordered = _ordered(rule, scores)
        floors.append(_nucleus(scores, ordered, numbers.top_p) if rule.top_p else ordered[:, -1:])
    if rule.min_p:
        floors.append(highest + numbers.min_p.log())
    return floors


def _ordered(rule: Rule, scores: Tensor) -> Tensor:
    """The scores that top_k lets pass, the highest first: (rows, k)."""
    if not rule.top_k:
        return scores.sort(-1, descending=True).values
    return scores.topk(min(rule.top_k, scores.shape[-1])).values


def _nucleus(scores: Tensor, ordered: Tensor, top_p: Tensor) -> Tensor:
    """The score (rows, 1) at which the probabilities of higher ones add up to `top_p`.

    Probabilities are those among the scores from the last of `ordered` up, which may be more than it holds where
    several are equal to it.
    """
    highest, lowest = ordered[:, :1], ordered[:, -1:]
    weight = (ordered - highest).exp()
    total = torch.where(scores < lowest, 0.0, (scores - highest).exp()).sum(-1, keepdim=True)
    above = (weight.cumsum(-1) - weight) / total
    floor = torch.where(above < top_p, ordered, torch.inf).amin(-1, keepdim=True)
    return torch.minimum(floor, highest)


def _noise(scores: Tensor, step: Tensor, keys: Tensor) -> Tensor:
    key, offset = keys[:, :1], keys[:, 1:]
    return philox.gumbel(_vocabulary(scores)[None], (offset + step[:, None]) & philox.MASK, key)


def row_keys(rows: int, seed: int | tuple[int, ...] | None, device: torch.device) -> Tensor:
    """The keys (rows, 2) of `rows` rows.

    A tuple holds the seed of each row. None takes from torch's default generator, so that torch.manual_seed
    decides.
    """
    if isinstance(seed, tuple):
        drawn = torch.cat([_words(1, s) for s in seed])
    else:
        drawn = _words(rows, seed)
    return drawn.to(device)


def _words(rows: int, seed: int | None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randint(philox.MASK + 1, (rows, 2), generator=generator)
