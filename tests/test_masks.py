"""llmcomp/masks.py: what is pruned stays zero, whatever updates it."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmcomp.masks import held, hold, masks, release

pytestmark = pytest.mark.usefixtures("fresh")

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: list[Optimizers] = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    lambda p: torch.optim.Adafactor(p, 0.1),
    lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
    lambda p: torch.optim.Muon(p, 0.1),  # mixes all elements of a matrix
]


def layer() -> tuple[nn.Linear, Tensor]:
    module, mask = nn.Linear(8, 6, bias=False), torch.rand(6, 8) > 0.5
    return module, mask


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_through_optimizers(make: Optimizers) -> None:
    module, mask = layer()
    hold((module,), "weight", mask)
    before = module.weight.detach().clone()
    train(module, make([module.weight]))
    assert bool((module.weight[~mask] == 0).all()) and bool((module.weight != before)[mask].all())


def test_momentum_of_before_does_not_move_it() -> None:
    module, mask = layer()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    train(module, optimizer)
    hold((module,), "weight", mask)
    train(module, optimizer)
    assert bool((module.weight[~mask] == 0).all())


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_a_masked_weight(compiled: bool) -> None:
    module, mask = layer()
    x = torch.randn(4, 8)
    original = module.weight.detach().clone().requires_grad_(True)
    nn.functional.linear(x, original * mask).square().sum().backward()
    hold((module,), "weight", mask)
    run = torch.compile(module, backend="llmcomp") if compiled else module
    run(x).square().sum().backward()
    assert module.weight.grad is not None and original.grad is not None
    torch.testing.assert_close(module.weight.grad, original.grad)
    assert bool((module.weight.grad[~mask] == 0).all())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_hold_by_themselves(how: str) -> None:
    module, mask = layer()
    hold((module,), "weight", mask)
    if how == "deepcopy":
        made = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert made.weight is not module.weight and held(made.weight) is not None
    assert held(made.weight) is not held(module.weight)
    train(made, torch.optim.Muon([made.weight], 0.1))
    assert bool((made.weight[~mask] == 0).all())


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_held(assign: bool) -> None:
    module, mask = layer()
    hold((module,), "weight", mask)
    old = module.weight
    module.load_state_dict({"weight": torch.randn(6, 8)}, assign=assign)
    assert (module.weight is not old) == assign
    train(module, torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.1))
    assert bool((module.weight[~mask] == 0).all()) and bool((module.weight[mask] != 0).all())
    assert torch.equal(masks(module)["weight"], mask)
    assert (held(old) is None) == assign  # what was there is let go


def test_assigned_weights_that_are_shared_are_held_once() -> None:
    model, mask = nn.Sequential(nn.Linear(8, 8, False), nn.Linear(8, 8, False)), torch.rand(8, 8) > 0.5
    model[1].weight = model[0].weight
    hold((model[0], model[1]), "weight", mask)
    weight = nn.Parameter(torch.randn(8, 8))
    model.load_state_dict({"0.weight": weight, "1.weight": weight}, assign=True)
    assert model[0].weight is model[1].weight is weight
    train(model, torch.optim.AdamW(model.parameters(), 0.1))
    assert bool((weight[~mask] == 0).all())
    release(model)
    assert held(weight) is None


def test_a_change_of_dtype_keeps_it() -> None:
    module, mask = layer()
    hold((module,), "weight", mask)
    train(module.double().float(), torch.optim.Muon([module.weight], 0.1))
    assert bool((module.weight[~mask] == 0).all())


def test_replaced_and_released() -> None:
    module, mask = layer()
    hold((module,), "weight", mask)
    hold((module,), "weight", ~mask)
    assert bool((module.weight == 0).all()) and torch.equal(masks(module)["weight"], ~mask)
    module.weight.grad = None
    module(torch.randn(4, 8)).sum().backward()
    assert bool((module.weight.grad[~mask] != 0).all())  # type: ignore[index]
    release(module)
    assert not masks(module) and held(module.weight) is None
    train(module, torch.optim.SGD(module.parameters(), 0.1))
    nn.init.normal_(module.weight)
    train(module, torch.optim.SGD(module.parameters(), 0.1))
    assert bool((module.weight != 0).all())
