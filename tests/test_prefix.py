"""llmcomp/prefix.py: how far two sequences agree."""

import torch
from torch import Tensor

from llmcomp.prefix import common_prefix

A = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def changed(row: int, column: int) -> Tensor:
    b = A.clone()
    b[row, column] = 0
    return b


def test_equal_up_to_the_first_difference_in_any_row() -> None:
    assert common_prefix([A], [A.clone()], [1]) == 4
    assert common_prefix([A], [changed(1, 2)], [1]) == 2
    assert common_prefix([A], [changed(0, 0)], [1]) == 0


def test_equal_again_later_does_not_count() -> None:
    assert common_prefix([A], [changed(0, 1)], [1]) == 1


def test_the_shorter_one_may_be_all_of_it() -> None:
    assert common_prefix([A], [A[:, :3]], [1]) == common_prefix([A[:, :3]], [A], [1]) == 3


def test_every_pair_has_to_agree() -> None:
    mask = torch.ones(4, 1)
    other = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    assert common_prefix([A, mask], [changed(1, 2), other], [1, 0]) == 2
    assert common_prefix([A, mask], [A, other], [1, 0]) == 3


def test_nan_agrees_with_nothing() -> None:
    x = torch.tensor([[1.0, torch.nan]])
    assert common_prefix([x], [x], [1]) == 1


def test_other_shapes_and_dtypes_agree_nowhere() -> None:
    assert common_prefix([A], [A[:1]], [1]) == 0
    assert common_prefix([A], [A.int()], [1]) == 0
    assert common_prefix([A[:, :0]], [A], [1]) == 0
