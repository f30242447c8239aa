"""Tokens are chosen as transformers would: the same filters, the same distribution."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmcomp.decoding import compiled_choice
from llmcomp.options import read_options
from llmcomp.processors import read_processors
from llmcomp.sampling import Chosen, Numbers, Rule, State, choose, row_keys

VOCABULARY = 37
CPU = torch.device("cpu")
PROMPT = torch.tensor([[3, 5, 5, 9], [0, 0, 7, 3]])


def logits(rows: int, seed: int = 0, size: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def state(rows: int, step: int = 0, factor: Tensor | None = None) -> State:
    factor = torch.ones(rows, 0) if factor is None else factor
    return State(torch.full((rows,), step), torch.zeros(rows, dtype=torch.bool), factor)


def settings(*processors: object, sample: bool = True, ending: tuple[int, ...] = ()) -> tuple[Rule, Numbers]:
    """The rule of these processors of transformers, with the scores asked for, and its numbers."""
    processing = read_processors(LogitsProcessorList(processors), sample)
    assert not processing.called
    return processing.rule(bool(ending), True), processing.numbers(VOCABULARY, PROMPT.shape[1], ending, 0, CPU)


FILTERS = [
    (TemperatureLogitsWarper(0.7),),
    (TopKLogitsWarper(5),),
    (TopKLogitsWarper(500),),
    (TopPLogitsWarper(0.8),),
    (TopPLogitsWarper(0.0),),
    (MinPLogitsWarper(0.1),),
    (TemperatureLogitsWarper(1.7), TopKLogitsWarper(9), TopPLogitsWarper(0.7), MinPLogitsWarper(0.2)),
    (TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.95), MinPLogitsWarper(0.01)),
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(type(x).__name__ for x in f))
def test_filters_are_those_of_transformers(filters: tuple[object, ...]) -> None:
    x = logits(50)
    rule, numbers = settings(*filters)
    ours = choose(rule, numbers, row_keys(50, 0, CPU), x, *state(50)).scores
    torch.testing.assert_close(ours, LogitsProcessorList(filters)(PROMPT, x.clone()))


def test_top_p_behind_a_top_k_that_ends_among_equals() -> None:
    """All the equals count towards the sum that top_p is a part of."""
    x = torch.tensor([[4.0, 3.0, 2.0, 2.0, 2.0, 2.0, -5.0]])
    filters = (TopKLogitsWarper(3), TopPLogitsWarper(0.6))
    rule, numbers = settings(*filters)
    expected = LogitsProcessorList(filters)(PROMPT[:1], x.clone())
    torch.testing.assert_close(choose(rule, numbers, row_keys(1, 0, CPU), x, *state(1)).scores, expected)


@pytest.mark.parametrize("value", [1.3, 0.6])
@pytest.mark.parametrize("start", [None, 2, torch.tensor([0, 2])])
def test_repeated_tokens_are_penalized_as_in_transformers(start: int | Tensor | None, value: float) -> None:
    try:
        penalty = RepetitionPenaltyLogitsProcessor(value, prompt_ignore_length=start)
    except ValueError:
        pytest.skip("this transformers knows only one length for all rows")
    x = logits(2)
    processing = read_processors(LogitsProcessorList([penalty]), False)
    rule, numbers = settings(penalty, sample=False)
    before = state(2, factor=processing.factor(PROMPT, VOCABULARY))
    chosen = choose(rule, numbers, row_keys(2, 0, CPU), x, *before)
    assert torch.equal(chosen.scores, penalty(PROMPT, x.clone()))
    longer = torch.cat([PROMPT, chosen.token[:, None]], 1)
    again = choose(rule, numbers, row_keys(2, 0, CPU), x, *before._replace(factor=chosen.factor))
    assert torch.equal(again.scores, penalty(longer, x.clone()))


@pytest.mark.parametrize("delay", [MinLengthLogitsProcessor(7, 4), MinNewTokensLengthLogitsProcessor(4, 3, [4, 6])])
def test_an_end_that_has_to_wait(delay: MinLengthLogitsProcessor) -> None:
    rule, numbers = settings(delay, sample=False)
    for step in range(5):
        text = torch.cat([PROMPT, PROMPT.new_zeros(2, step)], 1)
        ours = choose(rule, numbers, row_keys(2, 0, CPU), logits(2), *state(2, step)).scores
        assert torch.equal(ours, delay(text, logits(2)))


def test_rows_end_and_are_padded() -> None:
    rule, numbers = settings(sample=False, ending=(4, 6))
    numbers = numbers._replace(pad=torch.tensor(1))
    x = torch.nn.functional.one_hot(torch.tensor([4, 5, 6, 4]), VOCABULARY).float()
    before = state(4)._replace(finished=torch.tensor([False, False, False, True]))
    chosen = choose(rule, numbers, row_keys(4, 0, CPU), x, *before)
    assert chosen.token.tolist() == [4, 5, 6, 1]
    assert chosen.finished is not None and chosen.finished.tolist() == [True, False, True, True]
    assert chosen.ended is not None and not chosen.ended


def plausible(tokens: Tensor, probabilities: Tensor) -> bool:
    """Whether drawn `tokens` may follow `probabilities`: the chi-square test at one in a thousand."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    tail = torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2)
    return bool(tail > 1e-3) and not counts[~kept].any()


@pytest.mark.parametrize("filters", [(), *FILTERS[:2], FILTERS[-1]], ids=len)
def test_tokens_follow_the_distribution(filters: tuple[object, ...]) -> None:
    rows = 20_000
    x = logits(1, seed=3, size=VOCABULARY) / 2
    rule, numbers = settings(*filters)
    chosen = choose(rule, numbers, row_keys(rows, 1, CPU), x.expand(rows, -1), *state(rows))
    probabilities = LogitsProcessorList(filters)(PROMPT[:1], x.clone()).softmax(-1)[0]
    assert plausible(chosen.token, probabilities)
    # The steps of one row are as independent as the rows.
    steps = torch.arange(rows)
    chosen = choose(rule, numbers, row_keys(1, 1, CPU), x.expand(rows, -1), *state(rows)._replace(step=steps))
    assert plausible(chosen.token, probabilities)
    assert not plausible(chosen.token, (probabilities * torch.linspace(0.9, 1.1, VOCABULARY)))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rule, numbers = settings()
    x, keys = logits(3), row_keys(3, (11, 12, 13), CPU)
    together = choose(rule, numbers, keys, x, *state(3, step=5)).token
    for i in range(3):
        alone = choose(rule, numbers, row_keys(1, (11 + i,), CPU), x[i : i + 1], *state(1, step=5)).token
        assert alone == together[i]


def test_seeds() -> None:
    assert torch.equal(row_keys(3, 5, CPU), row_keys(3, 5, CPU))
    assert not torch.equal(row_keys(3, 5, CPU), row_keys(3, 6, CPU))
    torch.manual_seed(0)
    first, second = row_keys(2, None, CPU), row_keys(2, None, CPU)
    torch.manual_seed(0)
    assert torch.equal(row_keys(2, None, CPU), first) and not torch.equal(first, second)
    assert torch.equal(row_keys(2, (7, 8), CPU)[1], row_keys(1, 8, CPU)[0])


EVERYTHING = Rule(sample=True, repetition=True, delayed=True, top_k=20, top_p=True, min_p=True, ends=True)


@pytest.mark.parametrize("rule", [Rule(), EVERYTHING, replace(EVERYTHING, top_k=0, scores=True)], ids=["", "k", "p"])
def test_compiled_is_eager(rule: Rule) -> None:
    """By generated kernels, for several rows at several steps."""
    waiting = torch.arange(VOCABULARY) % 5 == 0
    half, many = torch.tensor(0.9), torch.tensor(1.2)
    numbers = Numbers(many, half, half, torch.tensor(0.01), waiting, torch.tensor(3), waiting, torch.tensor(1))
    keys, program = row_keys(4, 3, CPU), compiled_choice(rule, read_options())
    before = State(torch.arange(4), torch.arange(4) == 2, torch.where(logits(4, seed=1) > 2, many, 1.0))
    for step in range(3):
        x = logits(4, seed=step).bfloat16()
        ours, expected = (Chosen(*f(numbers, keys, x, *before)) for f in (program, lambda *a: choose(rule, *a)))
        for name, value in expected._asdict().items():
            found = getattr(ours, name)
            assert (found is None) == (value is None), name
            assert value is None or torch.allclose(found, value), name
        finished, factor = (
            a if b is None else b for a, b in zip(before[1:], (expected.finished, expected.factor), strict=True)
        )
        before = State(expected.step, finished, factor)
