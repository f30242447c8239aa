"""llmcomp/saliency.py: which weights stay."""

import pytest
import torch

from llmcomp.saliency import keep_blocks, keep_largest, keep_largest_of_rows, keep_of_groups, wanda


def test_the_largest_stay() -> None:
    worth = torch.tensor([[4.0, 1.0, 3.0], [2.0, 6.0, 5.0]])
    assert keep_largest(worth, 0.5).tolist() == [[True, False, False], [False, True, True]]
    assert keep_largest_of_rows(worth, 0.5).tolist() == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9])
def test_equals_are_pruned_to_the_number(sparsity: float) -> None:
    assert int((~keep_largest(torch.ones(10, 8), sparsity)).sum()) == int(80 * sparsity)


@pytest.mark.parametrize("n,m", [(2, 4), (4, 8), (1, 2)])
def test_n_of_m_stay_in_every_group(n: int, m: int) -> None:
    worth = torch.randn(5, 16)
    mask = keep_of_groups(worth, n, m)
    groups = mask.unflatten(1, (-1, m))
    assert bool((groups.sum(-1) == n).all())
    kept, gone = (worth.unflatten(1, (-1, m)).masked_fill(g, x) for g, x in ((~groups, 9.0), (groups, -9.0)))
    assert bool((kept.amin(-1) >= gone.amax(-1)).all())


def test_wanda_weighs_by_the_input() -> None:
    worth = wanda(torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([100.0, 4.0, 0.0]))
    assert worth.tolist() == [[10.0, 4.0, 0.0]]


def test_blocks_of_least_mean() -> None:
    worth = torch.ones(5, 7)
    worth[:2, 3:6], worth[4, 6] = 0.5, 0.1
    mask = keep_blocks(worth, 2 / 9, 2, 3)
    assert not mask[:2, 3:6].any() and not mask[4, 6] and mask.sum() == 35 - 7
