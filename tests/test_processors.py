"""What transformers prepared is split between Python and the program, in order."""

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from llmcomp.processors import read_criteria, read_processors
from llmcomp.sampling import Rule

CPU = torch.device("cpu")
PENALTY, LENGTH, NEW = (
    RepetitionPenaltyLogitsProcessor(1.2),
    MinLengthLogitsProcessor(9, 2),
    MinNewTokensLengthLogitsProcessor(4, 3, 2),
)
HEAT, TOP_K, TOP_P, MIN_P = (
    TemperatureLogitsWarper(0.5),
    TopKLogitsWarper(3),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.1),
)
WORDS = NoBadWordsLogitsProcessor([[1, 2]], 2)


class Mine(LogitsProcessor):
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Warmer(TemperatureLogitsWarper):
    pass


@pytest.mark.parametrize(
    ("processors", "sample", "called"),
    [
        ([], False, 0),
        ([PENALTY, LENGTH, NEW, HEAT, TOP_K, TOP_P, MIN_P], True, 0),
        ([PENALTY, WORDS, NEW, HEAT], True, 2),
        ([PENALTY, NEW, Mine(), HEAT, TOP_K], True, 3),
        ([PENALTY, NEW, Mine()], False, 3),
        ([PENALTY, HEAT], False, 2),
        ([HEAT, PENALTY], True, 1),
        ([HEAT, HEAT], True, 1),
        ([TOP_P, TOP_K], True, 1),
        ([Warmer(0.5), TOP_K], True, 1),
        ([TopKLogitsWarper(3, min_tokens_to_keep=2), TOP_P], True, 1),
        ([TopKLogitsWarper(3, filter_value=-1.0), TOP_P], True, 1),
        ([MinLengthLogitsProcessor(9, 3), NEW], False, 1),
    ],
)
def test_the_program_does_the_tail_that_it_can(processors: list[LogitsProcessor], sample: bool, called: int) -> None:
    found = read_processors(LogitsProcessorList(processors), sample)
    assert [*found.called, *found.compiled] == processors
    assert len(found.called) == called
    assert isinstance(found.called, LogitsProcessorList)


def test_rule_and_numbers() -> None:
    found = read_processors(LogitsProcessorList([PENALTY, LENGTH, NEW, HEAT, TOP_K, TOP_P, MIN_P]), True)
    assert found.rule(True, False) == Rule(True, True, True, 3, True, True, True, False)
    numbers = found.numbers(5, 4, (1, 99), 3, CPU)
    values = [float(x) for x in (numbers.penalty, numbers.temperature, numbers.top_p, numbers.min_p)]
    assert values == pytest.approx([1.2, 0.5, 0.9, 0.1])
    assert numbers.delayed.tolist() == [False, False, True, False, False] and numbers.until == 5
    assert numbers.ending.tolist() == [False, True, False, False, False] and numbers.pad == 3
    assert read_processors(LogitsProcessorList(), False).rule(False, True) == Rule(scores=True)


def test_tokens_that_the_head_does_not_have_are_not_seen() -> None:
    found = read_processors(LogitsProcessorList([PENALTY]), False)
    assert (found.factor(torch.tensor([[0, 7, 2], [1, 1, 3]]), 4) > 1).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert read_processors(LogitsProcessorList(), False).factor(torch.tensor([[0]]), 4).shape == (1, 0)


def test_stopping_criteria() -> None:
    time = MaxTimeCriteria(9.0)
    criteria = [MaxLengthCriteria(30), time, EosTokenCriteria([3, 4]), MaxLengthCriteria(20), EosTokenCriteria(5)]
    found = read_criteria(StoppingCriteriaList(criteria), 25)
    assert (found.length, found.ending, found.pads, list(found.called)) == (20, (3, 4, 5), True, [time])
    assert read_criteria(StoppingCriteriaList(), 7).length == 7


def test_a_criterion_that_knows_tokens_pads_too() -> None:
    class Own(EosTokenCriteria):
        pass

    own = Own(4)
    found = read_criteria(StoppingCriteriaList([own]), 9)
    assert (found.ending, found.pads, list(found.called)) == ((), True, [own])
