"""The contracts with torch that llmcomp stands on, one test each."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

import llmcomp.backend
from llmcomp import compat
from llmcomp.errors import LlmcompError

aten = torch.ops.aten


def targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def trace(fn, *inputs, keep=(), grad=False):
    """Return the graphs that AOTAutograd makes of `fn`, by kind, and what the compiled function returns."""
    graphs = {}

    def compiler(kind):
        def compile_graph(gm, fake_inputs):
            graphs[kind] = gm
            graphs[f"static {kind}"] = compat.static_inputs()
            return gm.forward

        return compile_graph

    def backend(gm, example_inputs):
        with compat.keep_whole(keep):
            return compat.aot_autograd(
                gm,
                example_inputs,
                forward=compiler("forward"),
                backward=compiler("backward"),
                inference=compiler("inference"),
            )

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        return graphs, torch.compile(fn, backend=backend)(*inputs)


def test_kept_operators_stay_single_nodes():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    plain, _ = trace(layer, x)
    kept, got = trace(layer, x, keep=[aten.linear.default])
    assert aten.linear.default not in targets(plain["inference"])
    assert targets(kept["inference"])[0] is aten.linear.default
    torch.testing.assert_close(got, layer(x))


def test_keeping_leaves_no_trace_in_the_operator():
    before = dict(aten.linear.default.py_kernels)
    trace(torch.nn.Linear(4, 4), torch.randn(2, 4), keep=[aten.linear.default])
    assert dict(aten.linear.default.py_kernels) == before
    layer = torch.nn.Linear(4, 4)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_keeping_is_undone_after_an_error():
    before = dict(aten.linear.default.py_kernels)
    with pytest.raises(KeyboardInterrupt), compat.keep_whole([aten.linear.default]):
        raise KeyboardInterrupt
    assert dict(aten.linear.default.py_kernels) == before


def test_mutation_of_an_input_is_a_copy_in_an_inference_graph():
    x = torch.zeros(3)
    graphs, _ = trace(lambda x: x.add_(1), x)
    assert aten.copy_.default in targets(graphs["inference"])
    assert x.tolist() == [1, 1, 1]


def test_training_has_a_forward_graph_and_later_a_backward_graph():
    layer = torch.nn.Linear(4, 4)
    graphs, y = trace(layer, torch.randn(2, 4), grad=True)
    assert set(graphs) == {"forward", "static forward"}
    y.sum().backward()
    assert "backward" in graphs and layer.weight.grad is not None


@pytest.mark.parametrize("grad", [False, True])
def test_the_graph_of_dynamo_ends_with_its_compilation(grad):
    seen = []

    def backend(gm, inputs):
        seen.append(weakref.ref(gm))
        same = {kind: lambda graph, fake_inputs: graph.forward for kind in ("forward", "backward", "inference")}
        return compat.aot_autograd(gm, inputs, **same)

    torch._dynamo.reset()
    layer = torch.nn.Linear(4, 4)
    with torch.set_grad_enabled(grad):
        fast = torch.compile(layer, backend=backend)
        fast(torch.randn(2, 4)).sum().backward() if grad else fast(torch.randn(2, 4))
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def test_static_inputs_are_parameters_and_buffers():
    module = torch.nn.BatchNorm1d(3).eval()
    graphs, _ = trace(module, torch.randn(2, 3))
    names = [n.meta["val"].shape for n in graphs["inference"].graph.find_nodes(op="placeholder")]
    static = graphs["static inference"]
    assert sorted(static) == [i for i, shape in enumerate(names) if shape == (3,)]
    assert len(static) == 4
    assert compat.static_inputs() == frozenset(), "outside a trace nothing is static"


def test_default_recompile_limit_is_raised_for_every_thread_and_user_values_stay():
    script = """
import threading, torch, torch._dynamo
from torch._dynamo import config
from llmcomp import compat
from llmcomp.errors import LlmcompError
compat.raise_default_recompile_limit(100)
assert config.recompile_limit == 100
compat.raise_default_recompile_limit(50)
assert config.recompile_limit == 100, "lowered"
seen = []
thread = threading.Thread(target=lambda: seen.append(config.recompile_limit))
thread.start(); thread.join()
assert seen == [100], seen
config.recompile_limit = 3
compat.raise_default_recompile_limit(200)
assert config.recompile_limit == 3, "a value of the user's was lost"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_backend_of_a_compiled_module():
    layer = torch.nn.Linear(4, 4)
    assert compat.backend_of(torch.compile(layer, backend="llmcomp")) is llmcomp.backend.llmcomp
    assert compat.backend_of(torch.compile(layer, backend="eager")) is not llmcomp.backend.llmcomp
    assert isinstance(torch.compile(layer, backend="eager"), compat.optimized_module())
    assert compat.backend_of(layer) is None


def test_compiler_of_a_function_and_a_module():
    layer, settings = torch.nn.Linear(4, 4), {"options": {"target": "reference"}}
    layer.compile(backend="llmcomp", **settings)
    for compiled in (layer._compiled_call_impl, torch.compile(layer, backend="llmcomp", **settings)):
        assert compat.compiler_of(compiled) == (llmcomp.backend.llmcomp, settings)
    mode = torch.compile(layer.forward, backend="llmcomp", mode="max-autotune")
    assert compat.compiler_of(mode) == (llmcomp.backend.llmcomp, {"mode": "max-autotune"})
    assert compat.compiler_of(torch.compile(layer.forward, backend="eager"))[0] is not llmcomp.backend.llmcomp
    assert compat.compiler_of(layer.forward) == compat.compiler_of(None) == (None, {})


def test_bisector_tries_us_before_inductor():
    from torch._inductor.compiler_bisector import BACKENDS

    before = {name: list(subsystems) for name, subsystems in BACKENDS.items()}
    try:
        compat.add_bisect_subsystems("llmcomp", ["one", "two"])
        names = list(BACKENDS)
        assert names.index("llmcomp") == names.index("inductor") - 1
        assert [s.name for s in BACKENDS["llmcomp"]] == ["one", "two"]
        assert not compat.bisect_disables("llmcomp", "one", lambda: "")
    finally:
        BACKENDS.clear()
        BACKENDS.update(before)


def test_real_tensors_can_be_read_among_fake_ones():
    real = torch.tensor(-3.0)
    with FakeTensorMode():
        with compat.real_tensors():
            assert real.item() == -3.0
        assert isinstance(torch.zeros(2), FakeTensor)


def test_errors_that_dynamo_answers_with_eager_are_errors():
    with FakeTensorMode(), pytest.raises(LlmcompError, match="found a need for one"), compat.no_fallback():
        torch.ones(2).sum().item()
    with pytest.raises(KeyError), compat.no_fallback():
        raise KeyError


def test_compiling_is_accounted_for_by_part():
    def backend(gm, inputs):
        with compat.timed("llmcomp"):
            time.sleep(0.1)
        time.sleep(0.2)
        return gm.forward

    torch._dynamo.reset()
    before = compat.compile_seconds()
    torch.compile(lambda x: x + 1, backend=backend)(torch.randn(2))
    spent = {part: seconds - before[part] for part, seconds in compat.compile_seconds().items()}
    assert 0.1 <= spent["llmcomp"] < spent["backend"] and spent["backend"] >= 0.3 and spent["dynamo"] > 0


def test_a_name_that_torch_lost_gives_a_readable_error():
    with pytest.raises(compat.CompatError, match=r"torch\._guards\.Lost .*counts sheep.*2\.11 to 2\.15"):
        compat.private("torch._guards", "Lost", "counts sheep")
    with pytest.raises(compat.CompatError, match="torch._no_such_module"):
        compat.private("torch._no_such_module", "Name", "does nothing")


def test_functions_compiled_apart_do_not_share_a_memory_of_sizes():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    for n in (2, 3):  # one code object, as the steps of two models are
        assert torch.equal(compat.compile_apart(lambda x: x + 1, backend)(torch.ones(n)), torch.full((n,), 2.0))
    assert [[n.meta["example_value"].shape[0] for n in g.graph.nodes if n.op == "placeholder"] for g in graphs] == [
        [2],
        [3],
    ]


def test_two_threads_that_keep_operators_take_turns():
    inside, most = [], []

    def work():
        with compat.keep_whole([aten.linear.default]):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert max(most) == 1


def test_sizes_of_our_own_are_symbols_with_examples():
    mode, sizes = compat.fresh_sizes({"past": 8, "new": 24})
    total = compat.sized(mode, sizes["past"].node.expr + sizes["new"].node.expr, 32)
    with mode:
        x = torch.empty(2, total)
    assert str(x.shape[1]) == str(total) != "32" and total.node.hint == 32
    assert compat.sized(mode, sizes["past"].node.expr * 0 + 3, 3) == 3
    assert total > 31  # answered by the example


def test_what_grows_is_traced_once_for_all_sizes():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    f = torch.compile(lambda x: x + 1, backend=backend)
    for n in (4, 5, 6):
        x = torch.ones(2, n)
        compat.mark_growing(x, 1)
        assert torch.equal(f(x), x + 1)
    assert len(graphs) == 1 and compat.growing(x) == (1,) and compat.growing(torch.ones(2)) == ()
