"""llmcomp/pruning_schedule.py: a little more at every step; movement lets weights come back."""

import copy

import pytest
import torch
from torch import nn

import llmcomp
from llmcomp.errors import LlmcompError, OptionError, PruneError
from llmcomp.masks import masks
from llmcomp.pruning import PruneSpec
from llmcomp.pruning_schedule import PruningSchedule, cubic
from llmcomp.sparsity import NM, Magnitude, Movement, Sparsity


def zeros(module: nn.Module) -> float:
    return float((module.weight == 0).float().mean())  # type: ignore[operator, union-attr]


def test_the_cubic() -> None:
    assert cubic(0, 0.1, 0.9) == pytest.approx(0.1) and cubic(1, 0.1, 0.9) == 0.9
    assert cubic(0.5, 0.0, 0.8) == pytest.approx(0.8 * 7 / 8)


def test_magnitude_rises_to_the_target_and_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = PruningSchedule(model, {"0": Magnitude(0.75)}, steps=8, begin=2, every=4)
    seen = []
    for _ in range(14):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        schedule.step()
        seen.append(zeros(model[0]))
    assert seen[:5] == [0.0] * 5 and seen[5:9] == [int(256 * cubic(0.5, 0, 0.75)) / 256] * 4
    assert seen[9:] == [0.75] * 5 and schedule.done and zeros(model[1]) == 0
    assert [r.name for r in schedule.report().pruned] == ["0"]


def test_movement_keeps_what_grows_whatever_its_size() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 0.1, 0.1]]))
    goal = torch.tensor([[0.0, 0.5, 1.0, 0.8]])  # the small weights grow, the large ones shrink
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    schedule = PruningSchedule(model, Movement(0.5), steps=5)
    for _ in range(10):
        optimizer.zero_grad()
        (model.weight - goal).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert (model.weight != 0).tolist() == [[False, False, True, True]]


def test_what_moves_away_from_zero_comes_back() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.5]]))
    schedule = PruningSchedule(model, Movement(0.5), steps=3, initial=0.5)
    for gradient, stays in (([1.0, -1.0], 1), ([1.0, -1.0], 1), ([-9.0, 9.0], 0)):
        model.zero_grad()
        (model.weight * torch.tensor([gradient])).sum().backward()
        schedule.step()
        assert float(model.weight.detach()[0, stays]) == 0.5 and zeros(model) == 0.5


@pytest.mark.parametrize(
    "spec,settings,error",
    [
        (Magnitude(0.5), {"steps": 0}, OptionError),
        (Magnitude(0.5), {"steps": float("inf")}, OptionError),
        (Magnitude(0.5), {"steps": 5, "every": 6}, OptionError),
        (Magnitude(0.5), {"steps": 5, "begin": -1}, OptionError),
        (Magnitude(0.5), {"steps": 5, "initial": 1.0}, OptionError),
        (NM(2, 3), {"steps": 5}, PruneError),
        (llmcomp.Structured(layers=1), {"steps": 5}, PruneError),
        ("4-2", {"steps": 5}, OptionError),
    ],
)
def test_refusals(spec: object, settings: dict[str, int], error: type[LlmcompError]) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(error, match="expected"):
        PruningSchedule(model, spec, **settings)  # type: ignore[arg-type]
    assert zeros(model) == 0


@pytest.mark.parametrize(
    "spec,says",
    [
        (llmcomp.Wanda(0.5), "calibration data to choose"),
        (llmcomp.SparseGPT(0.5), "calibration data to choose"),
        (NM(2, 4, criterion="wanda"), "calibration data to choose"),
        (llmcomp.Structured(layers=1, criterion="taylor"), "calibration data to choose"),
        ({"": llmcomp.Wanda(0.5)}, "calibration data to choose"),
        (llmcomp.Zeros(), "a part that rises"),
    ],
)
def test_what_cannot_rise_says_why(spec: PruneSpec, says: str) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(OptionError, match=says):
        PruningSchedule(model, spec, steps=5)
    assert zeros(model) == 0 and not masks(model)


def test_names_of_specs() -> None:
    model = nn.Linear(4, 4)
    schedule = PruningSchedule(model, "50%", 2)
    schedule.step()
    schedule.step()
    assert zeros(model) == 0.5 and schedule.report().pruned[0].by == Magnitude(0.5)


def test_frozen_weights_and_movement_without_a_schedule() -> None:
    with pytest.raises(PruneError, match="frozen"):
        PruningSchedule(nn.Linear(4, 4).requires_grad_(False), Movement(0.5), steps=5)
    with pytest.raises(OptionError, match="PruningSchedule"):
        llmcomp.prune_(nn.Linear(4, 4), Movement(0.5))


@pytest.mark.parametrize(
    "spec", [Magnitude(0.75), Magnitude(0.5, "global"), NM(1, 4), llmcomp.Block(0.5, 4, 4), Movement(0.5)], ids=str
)
def test_going_on_from_a_state(spec: Sparsity) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    batches = torch.randn(8, 4, 16)

    def train(model: nn.Module, schedule: PruningSchedule, some: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for batch in some:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
            schedule.step()

    first = copy.deepcopy(whole)
    train(whole, schedule := PruningSchedule(whole, spec, steps=8), batches)
    assert schedule.done
    train(first, half := PruningSchedule(first, spec, steps=8), batches[:5])
    again = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    again.load_state_dict(first.state_dict())
    rest = PruningSchedule(again, spec, steps=8)
    rest.load_state_dict(half.state_dict())
    assert rest.count == 5
    train(again, rest, batches[5:])
    for name, parameter in again.state_dict().items():
        assert torch.equal(parameter, whole.state_dict()[name]), name


@pytest.mark.parametrize("spec", [Magnitude(0.5), Movement(0.5)])
def test_weights_that_are_assigned_go_on_to_be_pruned(spec: Magnitude | Movement) -> None:
    torch.manual_seed(0)
    model, goal = nn.Linear(16, 8, bias=False), torch.randn(8, 16)
    schedule = PruningSchedule(model, spec, steps=4)
    for step in range(6):
        if step == 2:
            model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        optimizer.zero_grad()
        (model.weight - goal).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert zeros(model) == 0.5


def test_movement_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    schedule = PruningSchedule(model, Movement(0.5), steps=3)
    with pytest.raises(PruneError, match="gradients of 0"):
        schedule.step()
    assert schedule.count == 0 and zeros(model[0]) == 0
    with pytest.warns(UserWarning, match="0 is not pruned yet") as told:
        for _ in range(3):
            model[1](torch.randn(2, 4)).sum().backward()
            schedule.step()
    assert len(told) == 1 and zeros(model[0]) == 0 and zeros(model[1]) == 0.5
    schedule = PruningSchedule(model, {"0": Movement(0.5)}, steps=2, begin=3)
    for _ in range(3):
        schedule.step()  # nothing is due


def test_states_that_are_none() -> None:
    schedule = PruningSchedule(nn.Linear(4, 4), Movement(0.5), steps=3)
    good = schedule.state_dict()
    matrices = {"": {**good["matrices"][""], "mask": None}}
    for change in ({"count": "x"}, {"count": -3}, {"count": None}, {"count": True}, {"matrices": None}):
        with pytest.raises(PruneError, match="state of a schedule"):
            schedule.load_state_dict({**good, **change})
    for state in (None, [1], {"count": 1, "matrices": {"": None}}, {"count": 1, "matrices": matrices}):
        with pytest.raises(PruneError, match="state of a schedule"):
            schedule.load_state_dict(state)  # type: ignore[arg-type]
    schedule.load_state_dict({**good, "count": 2})
    assert schedule.count == 2


def test_the_state_of_another_schedule_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    schedule = PruningSchedule(model, Magnitude(0.5), steps=8)
    other = PruningSchedule(nn.Sequential(nn.Linear(16, 16)), Magnitude(0.5), steps=8).state_dict()
    moved = PruningSchedule(copy.deepcopy(model), Movement(0.5), steps=8).state_dict()
    for state in (other, moved, {}):
        with pytest.raises(PruneError, match="state of a schedule of 0, 1"):
            schedule.load_state_dict(state)
    assert schedule.count == 0 and zeros(model[0]) == 0
