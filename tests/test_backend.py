"""The backend as a user meets it: every way to ask for it, every kind of input and output, equal to eager."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

import llmcomp.backend


class Block(nn.Module):
    """Linear layers, a norm and an activation: small, and all of it compiled."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def compiled(fn, **settings):
    return torch.compile(fn, backend="llmcomp", **settings)


# Every way to ask for the backend.


@pytest.mark.parametrize("settings", [{}, {"fullgraph": True}, {"dynamic": True}, {"dynamic": False}])
def test_compile_a_module(graphs, settings):
    model, x = Block(), torch.randn(2, 3, 8)
    with torch.no_grad():
        assert_close(compiled(model, **settings)(x), model(x))
    assert [g.kind for g in graphs] == ["inference"]


def test_compile_in_place(graphs):
    model, x = Block(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        model.compile(backend="llmcomp")
        assert_close(model(x), expected)
    assert len(graphs) == 1


def test_compile_the_forward_method(graphs):
    model, x = Block(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        model.forward = compiled(model.forward)
        assert_close(model(x), expected)
    assert len(graphs) == 1


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="a later torch has it")
def test_default_backend(graphs):
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("llmcomp")
    try:
        assert_close(torch.compile(torch.sin)(torch.ones(3)), torch.ones(3).sin())
    finally:
        torch.compiler.set_default_backend(before)
    assert len(graphs) == 1


def test_backend_given_as_a_function(graphs):
    x = torch.randn(3)
    assert_close(torch.compile(torch.sin, backend=llmcomp.backend.llmcomp)(x), x.sin())
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(graphs, mode):
    x = torch.randn(3)
    assert_close(compiled(torch.sin, mode=mode)(x), x.sin())
    assert len(graphs) == 1


def test_options(graphs):
    x = torch.randn(3)
    assert_close(compiled(torch.sin, options={"target": "reference", "threads": 1})(x), x.sin())
    assert [g.program.target for g in graphs] == ["reference"]


def test_the_backend_returns_a_module_and_is_listed():
    modules = []

    def backend(gm, inputs):
        modules.append(llmcomp.backend.llmcomp(gm, inputs))
        return modules[0]

    torch.compile(torch.sin, backend=backend)(torch.ones(2))
    assert isinstance(modules[0], nn.Module)
    assert "llmcomp" in torch._dynamo.list_backends()


# Every mode of execution, every dtype.


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_execution_modes(graphs, context):
    model, x = Block(), torch.randn(2, 8)
    with context():
        got = compiled(model)(x)
    assert_close(got, model(x))
    assert [g.kind for g in graphs] == ["forward" if context is nullcontext else "inference"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(graphs, dtype):
    model, x = Block(), torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        got, expected = compiled(model)(x), model(x)
    assert got.dtype is expected.dtype
    assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(graphs, dtype):
    model, x = Block().to(dtype), torch.randn(2, 8, dtype=dtype)
    with torch.no_grad():
        got = compiled(model)(x)
        assert got.dtype is dtype
        assert_close(got, model(x), **({} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-2}))
    assert graphs


# Training.


def gradients(model, x):
    model.zero_grad()
    x = x.detach().requires_grad_()
    model(x).square().sum().backward()
    return {"input": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_equal_those_of_eager(graphs, dynamic):
    model, x = Block(), torch.randn(2, 8)
    expected = gradients(model, x)
    got = gradients(compiled(model, dynamic=dynamic), x)
    got = {name.removeprefix("_orig_mod."): grad for name, grad in got.items()}
    assert all(grad is not None for grad in expected.values())
    assert [name for name in expected if got[name] is None] == []
    for name in expected:
        assert_close(got[name], expected[name])
    assert [g.kind for g in graphs] == ["forward", "backward"]


def test_training_steps_equal_those_of_eager(graphs):
    data = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
    model = Block()
    twin = copy.deepcopy(model)
    for run, m in ((compiled(model), model), (twin, twin)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(run(x), y).backward()
            optimizer.step()
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(got, expected)
    assert [g.kind for g in graphs] == ["forward", "backward"]


def test_inference_after_training_sees_the_new_weights(graphs):
    model, x = Block(), torch.randn(2, 8)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.up.weight.mul_(2)
        assert_close(fast(x), model(x))
    assert len(graphs) == 1


# One program, several models and shapes.


def test_two_instances_share_a_program(graphs):
    one, two, x = Block(), Block(), torch.randn(2, 8)
    with torch.no_grad():
        fast_one, fast_two = compiled(one), compiled(two)
        for _ in range(2):
            assert_close(fast_one(x), one(x))
            assert_close(fast_two(x), two(x))
    assert len(graphs) == 1


def test_a_new_size_is_one_dynamic_graph_and_then_none(graphs):
    model = Block()
    fast = compiled(model)
    with torch.no_grad():
        for length in (3, 4, 5, 9, 17):
            x = torch.randn(2, length, 8)
            assert_close(fast(x), model(x))
    assert len(graphs) == 2


def test_marked_dynamic_sizes_take_one_graph(graphs):
    model = Block()
    with torch.no_grad():
        fast = compiled(model, dynamic=True)
        for shape in ((2, 3, 8), (5, 4, 8), (3, 11, 8)):
            x = torch.randn(shape)
            assert_close(fast(x), model(x))
    assert len(graphs) == 1


# Every kind of input and output.


def check(fn, *inputs, **settings):
    """Compiled and eager agree on outputs and on inputs after: values, layouts and shared memory."""
    copies = copy.deepcopy(inputs)
    expected, spec = tree_flatten((fn(*inputs), inputs))
    got, spec_got = tree_flatten((compiled(fn, **settings)(*copies), copies))
    assert spec == spec_got
    for a, b in zip(expected, got, strict=True):
        assert type(b) is type(a)
        if isinstance(a, torch.Tensor):
            assert_close(b, a)
            assert b.stride() == a.stride()
        else:
            assert b == a
    assert sharing(got) == sharing(expected)


def sharing(values):
    """Pairs of positions whose tensors share memory."""
    tensors = {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.numel()}
    where = {i: t.untyped_storage().data_ptr() for i, t in tensors.items()}
    return {(i, j) for i in where for j in where if i < j and where[i] == where[j]}


X = torch.arange(12.0).reshape(3, 4)


def mutate_and_read(x):
    y = x * 2
    x.add_(1)
    return y + x


OUTPUTS = {
    "tuple of everything": lambda x: (x + 1, None, x.shape[0], "text", 2.5, True, {"a": [x * 2]}),
    "none": lambda x: (None, x + 1),
    "input itself": lambda x: (x, x + 1),
    "view of an input": lambda x: (x[1:], x.t(), x + 1),
    "view of a result": lambda x: (x * 2)[1:].t(),
    "two views of a result": lambda x: (lambda y: (y[0], y[1:], y))(x * 2),
    "same result twice": lambda x: (lambda y: (y, y))(x * 2),
    "expanded": lambda x: (x[:, :1] + 1).expand(3, 5),
    "mutation": lambda x: x.mul_(2),
    "mutation of a view": lambda x: x[0].mul_(2).sum(),
    "mutation and reads": mutate_and_read,
    "slice assignment": lambda x: x.index_fill_(0, torch.tensor([1]), 7.0) + 1,
    "constant": lambda x: torch.tensor([1.0, 2.0]).sum() + x,
    "only a constant": lambda x: torch.ones(3),
    "scalar": lambda x: x.sum(),
    "empty result": lambda x: x[:0] * 2,
    "integers": lambda x: (x.to(torch.int64) // 5, x > 3),
    "shape arithmetic": lambda x: x.reshape(x.shape[0] * 2, -1) * x.shape[1],
    "nothing to compute": lambda x: x,
    "item": lambda x: x + x.sum().item(),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x + 1) * 2),
    "sort": lambda x: x.sort(descending=True),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name, dynamic):
    torch._dynamo.reset()
    with torch.no_grad():
        check(OUTPUTS[name], X.clone(), dynamic=dynamic)


def test_nested_inputs(graphs):
    check(lambda tree, scale: tree["a"][0] * scale + tree["b"], {"a": [X], "b": X + 1}, 2.5)
    assert len(graphs) == 1


def test_inputs_that_share_memory(graphs):
    def f(a, b):
        a.add_(1)
        return a + b

    base, other = X.clone(), X.clone()
    assert_close(compiled(f)(other[0], other[0]), f(base[0], base[0]))
    assert_close(compiled(f)(other.view(-1)[:8], other.view(-1)[4:]), f(base.view(-1)[:8], base.view(-1)[4:]))
    assert_close(other, base)
    assert graphs


@pytest.mark.parametrize("x", [X.t(), X[:, ::2], X.expand(2, 3, 4), X[1:].view(-1)[1:5], X[:0]])
def test_layouts_of_inputs(graphs, x):
    assert_close(compiled(lambda x: x * 2 + 1)(x), x * 2 + 1)
    assert len(graphs) == 1


def test_sizes_zero_and_one(graphs):
    fast = compiled(Block())
    with torch.no_grad():
        for n in (4, 1, 0, 7, 1, 0):
            assert fast(torch.randn(n, 8)).shape == (n, 8)
    assert graphs


def test_graph_breaks(graphs):
    def f(x):
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    check(f, X)
    assert len(graphs) == 2


def test_data_dependent_branch(graphs):
    def f(x):
        return x + 1 if x.sum() > 0 else x - 1

    check(f, X)
    check(f, -X)
    assert len(graphs) >= 2


def test_graph_without_a_computation():
    assert compiled(lambda x: x)(X) is X
    assert compiled(lambda: 3)() == 3


def test_global_state_is_left_as_it_was():
    before = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_rng_state(),
    )
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    compiled(lambda x: x * 2)(x)
    after = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_rng_state(),
    )
    assert before[:3] == after[:3] and torch.equal(before[3], after[3])


def test_random_numbers_are_those_of_eager():
    def f(x):
        return nn.functional.dropout(x, 0.5) + torch.rand_like(x)

    torch.manual_seed(3)
    expected = f(X)
    torch.manual_seed(3)
    assert_close(compiled(f)(X), expected)


def test_a_copied_module_still_runs(graphs):
    fast = compiled(Block())
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = fast(x)
        assert_close(copy.deepcopy(fast)(x), expected)
    assert graphs
