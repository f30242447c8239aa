"""The best options are those that trying all gives."""

import itertools
import random

import pytest

from llmcomp.knapsack import best_options


@pytest.mark.parametrize("seed", range(20))
def test_it_is_as_good_as_trying_all(seed: int) -> None:
    draw = random.Random(seed)
    shape = [draw.randint(1, 4) for _ in range(6)]
    values, weights = ([[draw.uniform(0, 10) for _ in range(n)] for n in shape] for _ in range(2))
    capacity = sum(map(min, weights)) + draw.uniform(0, 15)
    every = itertools.product(*map(range, shape))

    def total(of: list[list[float]], taken: tuple[int, ...] | list[int]) -> float:
        return sum(of_choice[i] for of_choice, i in zip(of, taken, strict=True))

    best = min(total(values, taken) for taken in every if total(weights, taken) <= capacity)
    found = best_options(values, weights, capacity)
    assert found is not None and total(weights, found) <= capacity
    assert total(values, found) == pytest.approx(best, rel=1e-3)


def test_the_ends() -> None:
    values, weights = [[3.0, 1.0], [2.0, 0.0]], [[1.0, 2.0], [1.0, 5.0]]
    assert best_options(values, weights, 1.9) is None
    assert best_options(values, weights, 2.0) == [0, 0]
    assert best_options(values, weights, 1e9) == [1, 1]
    assert best_options([[3.0, 1.0], [2.5, 0.0]], weights, 6.0) == [0, 1]
    assert best_options([], [], 1.0) == []
