"""A replay gives what the function gives, and is taken up only where nothing but its arguments can matter."""

import threading

import pytest
import torch
from torch import Tensor, nn

from llmcomp import compat, replay
from llmcomp.options import read_options
from llmcomp.replay import Replay, Results, recording

pytestmark = pytest.mark.usefixtures("fresh")

OPTIONS = read_options({"target": "reference"})


def compiled(function: object) -> object:
    return compat.compile_apart(function, recording(OPTIONS), fullgraph=True)  # type: ignore[arg-type]


def dynamo_calls(monkeypatch: pytest.MonkeyPatch, made: Replay) -> list[int]:
    """Grows with every call of `made` that is not replayed."""
    calls: list[int] = []
    function = made.function
    monkeypatch.setattr(made, "function", lambda *a: calls.append(1) or function(*a))
    return calls


def affine(layer: nn.Linear, total: Tensor, x: Tensor, y: Tensor) -> Results:
    total.add_(x.sum())
    return layer(x) * 2, None, y + 1


def test_the_third_call_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, total = nn.Linear(3, 3), torch.zeros(())
    made = Replay(compiled(affine), layer, total)
    calls = dynamo_calls(monkeypatch, made)
    expected = 0.0
    with torch.no_grad():
        for step in range(6):
            x, y = torch.randn(2, 3), torch.randn(4)
            first, nothing, last = made(x, y)
            expected += float(x.sum())
            torch.testing.assert_close(first, layer(x) * 2)
            assert nothing is None and torch.equal(last, y + 1)
            assert total.item() == pytest.approx(expected, abs=1e-4)
            layer.weight.mul_(0.5)  # what is in the weights may change, where they are may not
            assert len(calls) == min(step + 1, 2)


def test_every_layout_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Replay(compiled(lambda x: (x * 2,)))
    calls = dynamo_calls(monkeypatch, made)
    for x in (torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(2, 3).double(), torch.ones(5, 3)):
        before = len(calls)
        for _ in range(4):
            (found,) = made(x)
            assert torch.equal(found, x * 2) and found.dtype == x.dtype
        assert len(calls) == before + 2


class Counting(nn.Module):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_a_function_with_state_in_python_is_never_replayed() -> None:
    module = Counting()
    made = Replay(compiled(lambda m, x: (m(x),)), module)
    for step in range(6):
        (found,) = made(torch.ones(2))
        assert found.tolist() == [step + 1] * 2
    assert not made._trusted


def test_a_result_that_is_an_argument_is_never_replayed() -> None:
    made = Replay(compiled(lambda x: (x.view(-1), x + 1)))
    for step in range(4):
        x = torch.full((2, 2), float(step))
        view, more = made(x)
        assert torch.equal(view, x.view(-1)) and torch.equal(more, x + 1)
    assert not made._trusted


def test_inputs_that_move_are_never_replayed() -> None:
    """A tensor that is reached by an attribute, and replaced between calls."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.requires_grad_(False)
    made = Replay(compiled(lambda m, x: (m(x),)), layer)
    x = torch.ones(1, 2)
    for _ in range(2):
        layer.weight = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        (found,) = made(x)
        torch.testing.assert_close(found, layer(x))
    assert not made._trusted


def test_two_programs_are_never_replayed() -> None:
    total = torch.zeros(3)
    count, double = compiled(lambda t, x: (t.add_(x).sum(),)), compiled(lambda x: (x * 2,))
    made = Replay(lambda x: (count(total, x), double(x))[1])  # type: ignore[operator]
    for _ in range(5):
        (found,) = made(torch.ones(3))
    assert found.tolist() == [2, 2, 2] and total.tolist() == [5, 5, 5] and not made._trusted


def test_threads_do_not_hear_each_other() -> None:
    function = compiled(lambda x: (x + 1,))
    made = Replay(function)

    def other(*tensors: Tensor) -> Results:
        thread = threading.Thread(target=function, args=(torch.zeros(3),))
        thread.start()
        thread.join()
        results: Results = function(*tensors)
        return results

    made.function = other
    for step in range(3):
        (found,) = made(torch.full((3,), float(step)))
        assert found.tolist() == [step + 1.0] * 3
    assert made._trusted
    assert replay._calls.get() is None
