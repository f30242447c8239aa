"""The multiple-choice knapsack problem: one option of each choice, least value in all, weights within a capacity.

By dynamic programming over the capacity (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, section 11.5).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNITS = 50_000  # that the room above the lightest options is counted in, each weight rounded up


def best_options(
    values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], capacity: float
) -> list[int] | None:
    """The option of each choice: the least sum of values whose weights add up to `capacity` at most.

    None where the lightest options are too heavy.
    """
    lightest = [min(of_choice) for of_choice in weights]
    room = capacity - sum(lightest)
    if room < -1e-9 * abs(capacity):
        return None
    taken: list[Tensor] = []
    steps: list[list[int]] = []
    best = torch.zeros(UNITS + 1, dtype=torch.float64)  # the least value for each room
    for of_choice, heavy, light in zip(values, weights, lightest, strict=True):
        steps.append([_units(weight - light, room) for weight in heavy])
        best, chosen = torch.stack([_behind(best, n) + v for v, n in zip(of_choice, steps[-1], strict=True)]).min(0)
        taken.append(chosen.to(torch.uint8))
    found: list[int] = []
    at = UNITS
    for chosen, of_choice in zip(reversed(taken), reversed(steps), strict=True):
        found.append(int(chosen[at]))
        at -= of_choice[found[-1]]
    return found[::-1]


def _units(weight: float, room: float) -> int:
    if weight <= 0:
        return 0
    return min(UNITS + 1, math.ceil(weight / room * UNITS - 1e-6)) if room > 0 else UNITS + 1


def _behind(best: Tensor, units: int) -> Tensor:
    """The values where `units` of the room are gone."""
    gone = best.new_full((min(units, len(best)),), math.inf)
    return torch.cat([gone, best[: max(len(best) - units, 0)]])
