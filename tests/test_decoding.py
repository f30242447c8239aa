"""The parts of the loop that whole generations would hide: text that grows, states behind a guess."""

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from llmcomp.decoding import LookupDecoding, Task, Text
from llmcomp.processors import read_criteria, read_processors
from llmcomp.sampling import State


def test_text_grows() -> None:
    text = Text(torch.zeros(2, 3, dtype=torch.int64), 1000)
    for n in range(1, 998):
        text.add(torch.tensor([n, -n]))
    assert text.length == 1000 and text.ids[0].tolist() == [0, 0, 0, *range(1, 998)]
    assert torch.equal(text.ids[1], -text.ids[0])
    text.cut(900)
    assert text.ids.shape == (2, 100)


def test_text_takes_no_more_memory_than_it_may_need() -> None:
    text = Text(torch.zeros(1, 3, dtype=torch.int64), 5)
    assert text.ids.untyped_storage().nbytes() == 5 * 8


def test_states_behind_a_guess() -> None:
    """In each row the tokens of the guess before it have been seen, and it is that much later."""
    decoding = object.__new__(LookupDecoding)
    processing = read_processors(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]), False)
    decoding.task = Task(processing, read_criteria(StoppingCriteriaList(), 9), 0)
    decoding.state = State(torch.tensor([4]), torch.tensor([False]), torch.tensor([[1.5, 1, 1, 1, 1]]))
    rows = decoding._behind([3, 1])
    assert rows.step.tolist() == [4, 5, 6] and rows.finished.tolist() == [False] * 3
    assert (rows.factor == 1.5).int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 1, 0]]
    assert decoding._behind([]) is decoding.state
