"""Verify: a wrong pass is named, a right one is not, whatever the dtype and the inputs."""

import pytest
import torch
from torch import nn

import llmcomp.backend
from llmcomp.capture import capture
from llmcomp.errors import VerifyError
from llmcomp.passes.base import Pass, run_passes
from llmcomp.verify import Stages, VerifiedProgram, difference, verify

aten = torch.ops.aten


def replace(old, new):
    """A pass that calls another operator."""

    def run(graph, report):
        for node in graph.find_nodes(op="call_function", target=old):
            node.target = new
            report.rewrites += 1

    return Pass(f"{old.__name__}_to_{new.__name__}", run)


RIGHT = replace(aten.relu.default, aten.relu.default)
WRONG = replace(aten.sin.default, aten.cos.default)


def f(x):
    return torch.relu(x), torch.sin(torch.relu(x) + 1) * 2


def stages_of(fn, *inputs, passes=(RIGHT,), dynamic=False):
    gm = capture(fn, *inputs, dynamic=dynamic)
    stages = Stages(gm)
    run_passes(gm, passes, watch=stages.after_pass)
    return gm, stages.stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_right_passes_pass(dtype):
    gm, stages = stages_of(f, torch.randn(4, 5, dtype=dtype))
    verify(stages, gm, gm.meta["inputs"])


def test_the_wrong_pass_and_node_are_named():
    gm, stages = stages_of(f, torch.randn(4, 5), passes=(RIGHT, WRONG, RIGHT))
    with pytest.raises(VerifyError, match=r"pass sin.default_to_cos.default .*node sin: .*root-mean-square"):
        verify(stages, gm, gm.meta["inputs"])


def test_wrong_kernels_are_told_from_wrong_passes():
    gm, stages = stages_of(f, torch.randn(4, 5))
    with pytest.raises(VerifyError, match=r"generated kernels .*output 1 \(mul\)"):
        verify(stages, lambda x: (torch.relu(x), torch.sin(x)), gm.meta["inputs"])


def test_a_lost_mutation_is_found():
    def mutates(x):
        x.mul_(3)
        return x + 1

    def drop(graph, report):
        for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
            graph.erase_node(node)
            report.rewrites += 1

    gm, stages = stages_of(mutates, torch.randn(4), passes=(Pass("drop", drop),))
    with pytest.raises(VerifyError, match=r"pass drop .*input arg0_1 after the call"):
        verify(stages, gm, gm.meta["inputs"])


def test_inputs_are_left_alone():
    x = torch.zeros(3)
    gm, stages = stages_of(lambda x: x.add_(1), x)
    verify(stages, gm, gm.meta["inputs"])
    assert x.tolist() == [0, 0, 0]


def test_a_program_is_verified_once_and_then_runs():
    gm, stages = stages_of(lambda x: x.add_(1), torch.zeros(3))
    calls = []

    class Counted(llmcomp.backend.ReferenceProgram):
        def __call__(self, *inputs):
            calls.append(1)
            return super().__call__(*inputs)

    program, x = VerifiedProgram(Counted(gm, ""), stages), torch.zeros(3)
    for _ in range(3):
        program(x)
    assert x.tolist() == [3, 3, 3] and len(calls) == 4


def test_symbolic_sizes_random_numbers_and_casts():
    def g(x):
        y = nn.functional.dropout(x, 0.5, training=True).to(torch.bfloat16)
        return y.view(torch.int16), x.sum(0) / x.shape[0], None, x.shape[0]

    gm, stages = stages_of(g, torch.randn(4, 6), dynamic=True)
    before = torch.get_rng_state()
    verify(stages, gm, gm.meta["inputs"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("x", [torch.ones(2, 1).expand(2, 3), torch.ones(6, 6).t()[1:, ::2], torch.ones(0, 3)])
def test_layouts(x):
    gm, stages = stages_of(f, x)
    verify(stages, gm, gm.meta["inputs"])


EXACT = torch.linspace(0, 1, 1000, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bar(dtype):
    rounded, eps = EXACT.to(dtype), torch.finfo(dtype).eps
    assert difference(rounded, rounded, EXACT) is None
    assert difference((EXACT * (1 + 0.4 * eps)).to(dtype), rounded, EXACT) is None
    assert difference((EXACT * (1 + 8 * eps)).to(dtype), rounded, EXACT) is not None


def test_differences_that_are_not_of_size():
    ones, nan = torch.ones(3), torch.full((3,), torch.nan)
    assert "infinities and NaNs" in str(difference(nan, ones, ones.double()))
    assert difference(nan, nan, nan.double()) is None
    assert "torch.float64" in str(difference(ones.double(), ones))
    assert "(2,)" in str(difference(ones[:2], ones))
    assert difference(None, None) is None and difference(3, 3) is None
    assert "expected 3, found 4" in str(difference(4, 3))
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3])) is not None


def test_option(monkeypatch):
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, backend="llmcomp", options={"verify": True})(x), f(x))
        pipeline = llmcomp.backend.pipeline
        monkeypatch.setattr(llmcomp.backend, "pipeline", lambda *a: (WRONG, *pipeline(*a)))
        torch._dynamo.reset()
        with pytest.raises(VerifyError, match="sin.default_to_cos.default"):
            torch.compile(f, backend="llmcomp", options={"verify": True})(x)


def test_option_in_training():
    layer = nn.Linear(4, 4)
    torch.compile(layer, backend="llmcomp", options={"verify": True})(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
