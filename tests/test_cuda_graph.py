"""llmcomp/cuda_graph.py on a device that is not there: what is launched is noted instead of run while it records."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from llmcomp import cuda_graph
from llmcomp.cuda_graph import ATTEMPTS, GRAPHS, WORTH, GraphedProgram, GraphedStep, Inputs, capturable, movable
from llmcomp.program import Executable
from llmcomp.quantized_cache import QuantizedCacheTensor
from llmcomp.replay import _Bound
from llmcomp.report import ProgramReport

Launch = Callable[[], object]


class Device:
    """A device whose launches happen at once, or are noted."""

    def __init__(self) -> None:
        self.captured, self.current, self.memory, self.refuses = False, 0, 0, False
        self.noted: list[Launch] | None = None
        self.replays = 0
        self.reported: Exception | None = None

    def check(self) -> None:
        if self.reported is not None:
            raise self.reported

    def launch(self, work: Launch) -> None:
        work() if self.noted is None else self.noted.append(work)

    def capturing(self) -> bool:
        return self.captured

    def stream(self) -> int:
        return self.current

    def record(self, run: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Launch, int]:
        self.noted = []
        try:
            outputs = run()
        finally:
            noted, self.noted = self.noted, None
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.replays += 1
            for work in noted:
                work()

        return outputs, replay, self.memory


class Program:
    """(total, x, length) -> (2 x, total, x without its first row, length): adds the sum of x to total."""

    report, source = ProgramReport("triton"), "text"

    def __init__(self, device: Device) -> None:
        self.device, self.calls = device, 0

    def __call__(self, total: Tensor, x: Tensor, length: int) -> tuple[Any, ...]:
        self.calls += 1
        y = torch.empty_like(x)
        self.device.launch(lambda: y.copy_(x * 2))
        self.device.launch(lambda: total.add_(x.sum()))
        return y, total, x[1:], length


INPUTS = Inputs(written=frozenset({0}), static=frozenset())


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def program(device: Device) -> Program:
    return Program(device)


@pytest.fixture
def graphed(device: Device, program: Program) -> GraphedProgram:
    return GraphedProgram(program, INPUTS, device)


def check(run: Callable[..., tuple[Any, ...]], total: Tensor, x: Tensor, length: int = 7) -> tuple[Any, ...]:
    """One call, compared with what the program gives; its results."""
    expected = total + x.sum()
    y, same, rest, number = run(total, x, length)
    assert torch.equal(y, x * 2) and torch.equal(rest, x[1:]) and number == length
    assert torch.equal(total, expected) and same.data_ptr() == total.data_ptr()
    assert rest.data_ptr() == x[1:].data_ptr()  # a view of what the caller gave
    return y, same, rest, number


def test_the_third_call_is_one_replay(graphed: GraphedProgram, program: Program, device: Device) -> None:
    total, x = torch.zeros(()), torch.randn(3, 4)
    for calls, replays in ((1, 0), (3, 0), (3, 1), (3, 2)):
        check(graphed, total, x.copy_(torch.randn(3, 4)))
        assert (program.calls, device.replays) == (calls, replays)
    assert graphed.report is program.report and graphed.source == "text"


def test_results_belong_to_the_caller(graphed: GraphedProgram) -> None:
    total = torch.zeros(())
    given = [torch.randn(3, 4) for _ in range(6)]  # all alive: every one elsewhere
    found = [check(graphed, total, x) for x in given]
    for x, (y, *_) in zip(given, found, strict=True):
        assert torch.equal(y, 2 * x)


def test_what_moves_is_copied(graphed: GraphedProgram, program: Program, device: Device) -> None:
    total, wide = torch.zeros(()), torch.randn(6, 20)
    kept = [wide[n : n + 3, n : n + 8 : 2] for n in range(4)]  # other strides than a copy of them would have
    for x in kept:
        check(graphed, total, x)
    assert (program.calls, device.replays) == (3, 2)


def test_what_is_written_is_never_copied(graphed: GraphedProgram, program: Program, device: Device) -> None:
    x, totals = torch.randn(3, 4), [torch.zeros(()) for _ in range(3)]
    for total in totals:
        before, at = program.calls, device.replays
        for _ in range(WORTH + 3):
            check(graphed, total, x)
        assert (program.calls - before, device.replays - at) == (3, WORTH + 1)


def test_a_program_whose_caches_always_move_is_left_alone(graphed: GraphedProgram, program: Program) -> None:
    x, totals = torch.randn(3, 4), [torch.zeros(()) for _ in range(12)]
    for total in totals:
        check(graphed, total, x)
        check(graphed, total, x)
    assert program.calls <= 2 * len(totals) + ATTEMPTS


def test_layouts_numbers_and_streams_have_graphs_of_their_own(
    graphed: GraphedProgram, program: Program, device: Device
) -> None:
    total, x, longer = torch.zeros(()), torch.randn(3, 4), torch.randn(5, 4)
    for _ in range(4):
        for stream in (0, 1):
            device.current = stream
            for given, length in ((x, 7), (longer, 7), (x, 8)):
                check(graphed, total, given, length)
    assert (program.calls, device.replays) == (6 * 3, 6 * 2)


def test_graphs_are_few(graphed: GraphedProgram) -> None:
    total = torch.zeros(())
    for length in range(3 * GRAPHS):
        for _ in range(3):
            check(graphed, total, torch.randn(2, 2), length)
    assert len(graphed._states) == GRAPHS


def test_a_caller_who_captures_gets_the_launches(graphed: GraphedProgram, program: Program, device: Device) -> None:
    total, x = torch.zeros(()), torch.randn(3, 4)
    for _ in range(3):
        check(graphed, total, x)
    device.captured = True
    check(graphed, total, x)
    assert (program.calls, device.replays) == (4, 1)


@pytest.mark.parametrize("reason", ["refused", "memory", "results"])
def test_what_cannot_be_recorded_runs(
    graphed: GraphedProgram, program: Program, device: Device, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.refuses = reason == "refused"
    device.memory = cuda_graph.KEPT_BYTES + 1 if reason == "memory" else 0
    if reason == "results":
        monkeypatch.setattr(cuda_graph, "RESULT_BYTES", 8)
    total, x = torch.zeros(()), torch.randn(3, 4)
    for _ in range(5):
        check(graphed, total, x)
    assert device.replays == 0 and program.calls == (5 if reason == "results" else 6)


def test_large_and_expanded_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert movable(torch.ones(3, 4).t()) and movable(torch.ones(1, 4).expand(1, 4))
    assert not movable(torch.ones(1, 4).expand(3, 4)) and not movable(7)
    monkeypatch.setattr(cuda_graph, "MOVED_BYTES", 40)
    assert not movable(torch.ones(3, 4))


@pytest.mark.parametrize("modes", [(False, False, True, False, True), (True, True, True)])
def test_buffers_outlive_the_mode_that_they_are_made_in(graphed: GraphedProgram, modes: tuple[bool, ...]) -> None:
    total = torch.zeros(())
    for inference in modes:
        with torch.inference_mode(inference):
            check(graphed, total, torch.randn(3, 4))


def test_what_kernels_report_is_raised_by_the_next_replay(graphed: GraphedProgram, device: Device) -> None:
    total, x = torch.zeros(()), torch.randn(3, 4)
    for _ in range(3):
        check(graphed, total, x)
    device.reported = IndexError("out of range")
    with pytest.raises(IndexError):
        graphed(total, x, 7)
    device.reported = None
    check(graphed, total, x)


def test_a_result_that_shows_an_input_as_another_dtype_is_not_recorded(device: Device) -> None:
    step = GraphedStep(lambda x: (x.view(torch.int32),), (0,), device)
    given = [torch.randn(4) for _ in range(4)]
    found = [step(x)[0] for x in given]
    assert device.replays == 0
    for x, y in zip(given, found, strict=True):
        assert torch.equal(y, x.view(torch.int32))


def test_a_step_records_at_once(program: Program, device: Device) -> None:
    step, total = GraphedStep(program, (1,), device), torch.zeros(())
    for calls, replays in ((2, 0), (2, 1), (2, 2)):
        check(step, total, torch.randn(3, 4))
        assert (program.calls, device.replays) == (calls, replays)
    device.current = 1
    check(step, total, torch.randn(3, 4))
    assert (program.calls, device.replays) == (3, 2)


def bound(executable: object) -> _Bound:
    return _Bound(executable, (None, None), ((0, 0),), (0,))  # type: ignore[arg-type]


def test_a_replay_becomes_a_graph_where_its_program_may(program: Program) -> None:
    free = Executable(program, "", program.report, Inputs(frozenset(), frozenset()))
    assert isinstance(bound(free).graphed([torch.ones(2)]).program, GraphedStep)
    assert isinstance(bound(GraphedProgram(free, INPUTS)).graphed([torch.ones(2)]).program, GraphedStep)
    assert bound(free).graphed([torch.ones(1).expand(3)]).program is free
    writing = Executable(program, "", program.report, INPUTS)
    assert bound(writing).graphed([torch.ones(2)]).program is writing
    silent = Executable(program, "", program.report)
    assert bound(silent).graphed([torch.ones(2)]).program is silent
    assert replace(bound(silent)) == bound(silent)


def graph_of(device: str) -> tuple[Graph, dict[str, Node]]:
    """x, cache and weight; a copy into a view of the cache; eager calls."""
    graph, ops = Graph(), torch.ops.aten
    with FakeTensorMode():
        value = torch.empty(2, 2, device=device)
    nodes = {name: graph.placeholder(name) for name in ("x", "cache", "weight")}
    nodes["view"] = graph.call_function(ops.t.default, (nodes["cache"],))
    nodes["write"] = graph.call_function(ops.copy_.default, (nodes["view"], nodes["x"]))
    nodes["sort"] = graph.call_function(ops.sort.default, (nodes["x"],))
    nodes["draw"] = graph.call_function(ops.bernoulli.default, (nodes["x"],))
    nodes["nonzero"] = graph.call_function(ops.nonzero.default, (nodes["x"],))
    nodes["grow"] = graph.call_function(torch.ops.llmcomp.cache_grow.default, (nodes["cache"], 1, 0))
    for node in graph.nodes:
        node.meta["val"] = value
    nodes["weight"].meta["static"] = True
    graph.output((nodes["write"],))
    return graph, nodes


def test_which_programs_can_be_captured() -> None:
    graph, nodes = graph_of("cuda")
    assert capturable(graph, [nodes["sort"]]) == Inputs(frozenset({1}), frozenset({2}))
    for name in ("draw", "nonzero", "grow"):
        assert capturable(graph, [nodes["sort"], nodes[name]]) is None
    nodes["sort"].meta["val"] = QuantizedCacheTensor(nodes["x"].meta["val"], nodes["x"].meta["val"], torch.float32)
    assert capturable(graph, [nodes["sort"]]) is None
    graph, nodes = graph_of("cpu")
    assert capturable(graph, []) is None
