"""Capture: what becomes of a Dynamo graph before any pass sees it."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import linear, scaled_dot_product_attention

from llmcomp.capture import capture, capture_graph, needs_grad
from llmcomp.errors import CaptureError

aten = torch.ops.aten


def targets(gm):
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_linear_and_attention_are_single_nodes():
    def f(x, w):
        return scaled_dot_product_attention(linear(x, w), x, x, is_causal=True)

    gm = capture(f, torch.randn(2, 3, 4), torch.randn(4, 4))
    assert targets(gm) == [aten.linear.default, aten.scaled_dot_product_attention.default]


def test_captured_graph_runs_on_its_inputs():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 4)
    gm = capture(model, x)
    with torch.no_grad():
        torch.testing.assert_close(gm(*gm.meta["inputs"])[0], model(x))


def test_capture_executes_nothing():
    x = torch.zeros(3)
    gm = capture(lambda x: x.add_(1), x)
    assert x.tolist() == [0, 0, 0]
    gm(*gm.meta["inputs"])
    assert x.tolist() == [1, 1, 1]


def test_parameters_and_buffers_are_static():
    gm = capture(nn.BatchNorm1d(3).eval(), torch.randn(2, 3))
    static = {tuple(n.meta["val"].shape): n.meta["static"] for n in gm.graph.find_nodes(op="placeholder")}
    assert static == {(3,): True, (2, 3): False}


def test_sizes_are_symbols_under_dynamic():
    gm = capture(lambda x: (x * 2, x.shape[0]), torch.randn(5, 4), dynamic=True)
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    assert any(isinstance(v, torch.SymInt) for v in values)
    assert gm(*gm.meta["inputs"])[1] == 5


def test_more_captures_than_dynamo_allows_graphs_for_one_function():
    assert [targets(capture(torch.sin, torch.randn(n))) for n in range(2, 14)] == [[aten.sin.default]] * 12


def test_capture_of_nothing():
    with pytest.raises(CaptureError, match="computes on tensors"):
        capture(lambda x: x, 3)


def test_capture_refuses_a_graph_break():
    def breaks(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    with pytest.raises(torch._dynamo.exc.Unsupported):
        capture(breaks, torch.ones(2))


def grad_kinds(fn, *inputs, grad=True):
    """The kinds of graph that a call and its backward pass are compiled as, and whether linear was kept."""
    kinds = []

    def compile_graph(gm, fake_inputs):
        kinds.append((gm.meta["kind"], aten.linear.default in targets(gm)))
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        out = torch.compile(fn, backend=lambda gm, inputs: capture_graph(gm, inputs, compile_graph))(*inputs)
    return kinds, out


def test_inference_keeps_linear():
    layer = nn.Linear(4, 4)
    assert grad_kinds(layer, torch.ones(2, 4), grad=False)[0] == [("inference", True)]


def test_frozen_parameters_are_inference_even_with_gradients_on():
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert grad_kinds(layer, torch.ones(2, 4))[0] == [("inference", True)]


def test_training_gives_forward_and_backward_and_eager_gradients():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    kinds, y = grad_kinds(layer, x)
    got = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert kinds == [("forward", False), ("backward", False)]
    torch.testing.assert_close(got, expected)


def test_gradients_that_are_only_enabled_inside_the_graph():
    layer = nn.Linear(4, 4)

    def f(x):
        with torch.enable_grad():
            return layer(x)

    _, y = grad_kinds(f, torch.randn(2, 4), grad=False)
    y.sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_gradients_of_an_input_of_frozen_parameters():
    layer, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    _, y = grad_kinds(layer, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))


def test_the_compiler_works_on_real_tensors():
    def compile_graph(gm, fake_inputs):
        assert torch.ones(2).sum().item() == 2
        return gm.forward

    def backend(gm, inputs):
        return capture_graph(gm, inputs, compile_graph)

    torch.compile(torch.sin, backend=backend)(torch.ones(3))


def test_a_compiler_that_asks_for_values_is_no_silent_fallback():
    def compile_graph(gm, fake_inputs):
        return gm.graph.output_node().args[0][0].meta["val"].item()

    def backend(gm, inputs):
        return capture_graph(gm, inputs, compile_graph)

    with pytest.raises(BackendCompilerFailed, match="LlmcompError: expected .* LLMCOMP_DUMP"):
        torch.compile(torch.sum, backend=backend, dynamic=False)(torch.ones(3))


def test_needs_grad():
    gm = torch.fx.symbolic_trace(nn.Identity())
    wants, does_not = torch.ones(1, requires_grad=True), torch.ones(1)
    assert needs_grad(gm, [wants, 3])
    assert not needs_grad(gm, [does_not, 3])
    with torch.no_grad():
        assert not needs_grad(gm, [wants])
