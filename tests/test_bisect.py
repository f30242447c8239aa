"""The passes as subsystems of torch's CompilerBisector: it finds a planted fault."""

import pytest
import torch
from torch._inductor.compiler_bisector import BACKENDS, CompilerBisector

import llmcomp.backend
from llmcomp import bisect, compat
from llmcomp.passes.base import Fact, Pass
from tests.test_verify import RIGHT, WRONG

FACT = Fact("fact", lambda graph: True)


def test_passes_that_others_need_stay_on():
    def nothing(graph, report): ...

    passes = [
        Pass("gives", nothing, gives=frozenset({FACT})),
        Pass("needs", nothing, needs=frozenset({FACT})),
        Pass("partition", nothing),
    ]
    assert bisect.optional(passes) == ["needs"]


def test_registered_in_order_before_inductor():
    names = [s.name for s in BACKENDS["llmcomp"]]
    assert "fuse_epilogue" in names and "partition" not in names
    assert list(BACKENDS).index("llmcomp") == list(BACKENDS).index("inductor") - 1


def test_a_planted_fault_is_found(monkeypatch):
    pipeline = llmcomp.backend.pipeline
    planted = (RIGHT, WRONG)
    monkeypatch.setattr(llmcomp.backend, "pipeline", lambda *a: (*planted, *pipeline(*a)))
    monkeypatch.setitem(BACKENDS, "llmcomp", BACKENDS["llmcomp"])
    compat.add_bisect_subsystems("llmcomp", [p.name for p in planted])
    x = torch.randn(3)

    def right():
        torch._dynamo.reset()
        fns = (torch.relu, torch.sin)
        return all(torch.allclose(torch.compile(f, backend="llmcomp")(x), f(x)) for f in fns)

    found = CompilerBisector.do_bisect(right)
    assert (found.backend, found.subsystem, found.bisect_number) == ("llmcomp", WRONG.name, 1)
    assert found.debug_info.startswith(WRONG.name)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    before = dict(BACKENDS)
    yield
    BACKENDS.clear()
    BACKENDS.update(before)
