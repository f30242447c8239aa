"""Explain: what it collects, how it prints, and that it leaves the model as it was."""

import pytest
import torch
from torch import nn

import llmcomp
from llmcomp.errors import OptionError
from llmcomp.explanation import quantity


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, shift=0.0):
        x = torch.relu(self.one(x) + shift)
        torch._dynamo.graph_break()
        return self.two(x).cumsum(0)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A cache that the tests of this file share."""
    return {"cache": tmp_path_factory.mktemp("cache")}


@pytest.fixture
def cold(tmp_path):
    """An empty cache."""
    return {"cache": tmp_path}


def test_contents(cold):
    with torch.no_grad():
        e = llmcomp.explain(Model(), torch.randn(3, 8), options=cold)
    assert [g.kind for g in e.graphs] == ["inference", "inference"]
    assert len(e.breaks) == 1 and "graph_break" in e.breaks[0] and "test_explanation.py" in e.breaks[0]
    assert e.kernels and all(k.bytes > 0 and k.nodes for k in e.kernels)
    assert "aten.cumsum.default" in [x.op for x in e.externs]
    assert sum(g.program.built for g in e.graphs) >= 1
    stages = {s.stage for g in e.graphs for s in g.stages}
    assert {"passes", "lower", "render", "build", "plan"} <= stages
    assert e.seconds > sum(s.seconds for g in e.graphs for s in g.stages)


def test_print(options):
    with torch.no_grad():
        text = str(llmcomp.explain(Model(), torch.randn(3, 8), options=options))
    for part in (
        "0 inference (cpp)",
        "graph breaks",
        "canonicalize",
        "near misses",
        "kernels",
        "aten.cumsum.default",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_second_compilation_finds_its_kernels_on_disk(cold):
    with torch.no_grad():
        first = llmcomp.explain(Model(), torch.randn(3, 8), options=cold)
        second = llmcomp.explain(Model(), torch.randn(3, 8), options=cold)
    built = [sum(g.program.built for g in e.graphs) for e in (first, second)]
    assert built[0] > 0 and built[1] == 0
    assert sum(g.program.cached for g in second.graphs) > 0


def test_training_is_told_from_inference(options):
    e = llmcomp.explain(Model(), torch.randn(3, 8), options=options)
    assert [g.kind for g in e.graphs] == ["forward", "forward"]
    assert "torch.no_grad()" in str(e)


def test_keyword_inputs(options):
    assert llmcomp.explain(Model(), torch.randn(3, 8), shift=1.0, options=options).graphs


@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
def test_a_compiled_model_is_explained_and_stays_compiled(how, options, graphs):
    model, x = Model(), torch.randn(3, 8)
    with torch.no_grad():
        if how == "in place":
            model.compile(backend="llmcomp", options=options)
        fast = (
            model
            if how == "in place"
            else torch.compile(model if how == "wrapped" else model.forward, backend="llmcomp", options=options)
        )
        fast(x)
        before = len(graphs)
        assert len(llmcomp.explain(fast, x, options=options).graphs) == 2
        count = len(graphs)
        fast(x)
    assert before == 2 and len(graphs) == count, "the user's own graphs are still there"


def test_nothing_to_compile():
    e = llmcomp.explain(lambda: 3)
    assert e.graphs == () and "graph breaks: none" in str(e)


def test_unknown_option():
    with pytest.raises(OptionError, match="did you mean 'verify'"):
        llmcomp.explain(Model(), torch.randn(3, 8), options={"verfy": True})


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (999, "999"), (1234, "1.23 k"), (5 * 10**9, "5 G")])
def test_quantity(n, text):
    assert quantity(n) == text
