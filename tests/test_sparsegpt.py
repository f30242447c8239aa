"""llmcomp/sparsegpt.py: what stays makes up for what goes."""

import pytest
import torch
from torch import Tensor

from llmcomp.saliency import keep_largest, keep_of_groups
from llmcomp.sparsegpt import sparsegpt


def data() -> tuple[Tensor, Tensor]:
    """A matrix, and inputs that depend on each other."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 192, generator=source)
    mix = torch.randn(192, 192, generator=source) + 2 * torch.randn(192, 1, generator=source)
    return weight, torch.randn(600, 192, generator=source) @ mix


@pytest.mark.parametrize("keep", [0.5, (2, 4), (4, 8)])
def test_the_output_is_closer_than_by_magnitude(keep: float | tuple[int, int]) -> None:
    weight, inputs = data()
    left, mask = sparsegpt(weight, inputs.t() @ inputs, keep)
    worth = weight.abs()
    plain = keep_largest(worth, keep) if isinstance(keep, float) else keep_of_groups(worth, *keep)
    assert bool((left[~mask] == 0).all()) and float(mask.float().mean()) == pytest.approx(0.5, abs=0.01)
    if not isinstance(keep, float):
        assert bool((mask.unflatten(1, (-1, keep[1])).sum(-1) == keep[0]).all())
    exact = inputs @ weight.t()
    error, other = ((inputs @ w.t() - exact).norm() for w in (left, weight * plain))
    assert error < 0.5 * other


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(8, 16)
    left, mask = sparsegpt(weight, torch.eye(16), 0.25, damping=0.0)
    torch.testing.assert_close(left, weight * mask)
    assert torch.equal(mask, keep_largest(weight.abs(), 0.25))
