"""Unusual input and unlucky circumstances: right results, or an error that says what to do."""

import ast
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import llmcomp.backend
from llmcomp.errors import CaptureError

DENSE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
COMPLEX = torch.complex(DENSE, DENSE.flip(0))


class Plain(torch.Tensor):
    """A subclass without behaviour of its own."""


INPUTS = {
    "complex": (lambda: COMPLEX, lambda x: (x @ x.mT, x.abs(), torch.view_as_real(x) * 2)),
    "complex half": (lambda: COMPLEX.to(torch.complex32), lambda x: torch.view_as_real(x) * 2),
    "conjugate": (lambda: COMPLEX.conj(), lambda x: (x * 2, x.imag + 1)),
    "conjugate inside": (lambda: COMPLEX, lambda x: x.conj().imag * 2),
    "negative bit": (lambda: COMPLEX.conj().imag, lambda x: (x * 2, x.t() + 1)),
    "sparse coo": (lambda: DENSE.relu().to_sparse(), lambda x: (x * 2).to_dense() + 1),
    "sparse csr": (lambda: DENSE.relu().to_sparse_csr(), lambda x: x @ torch.ones(4, 2)),
    "quantized": (
        lambda: torch.quantize_per_tensor(DENSE, 0.1, 0, torch.qint8),
        lambda x: x.dequantize() + 1,
    ),
    "subclass": (lambda: DENSE.as_subclass(Plain), lambda x: x * 2 + 1),
    "wrapper subclass": (
        lambda: TwoTensor(DENSE, DENSE + 1),
        lambda x: nn.functional.linear(x, torch.ones(2, 4)),
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([DENSE, DENSE[:2]], layout=torch.jagged),
        lambda x: (x.sin() * 2).values(),
    ),
    "fp8": (lambda: DENSE.to(torch.float8_e4m3fn), lambda x: x.float() + 1),
    "uint16": (lambda: torch.arange(6).to(torch.uint16), lambda x: x.to(torch.int32) + 1),
    "float64": (lambda: DENSE.double(), lambda x: x.softmax(-1) * 2),
    "bool": (lambda: DENSE > 0, lambda x: ~x & (x.sum() > 2)),
    "numpy": (lambda: torch.from_numpy(DENSE.numpy().copy()), lambda x: x.numpy() * 2),
    "inference tensor": (lambda: torch.inference_mode()(lambda: DENSE + 0)(), lambda x: x * 2),
    "overflow": (lambda: torch.tensor([2**62, -1]), lambda x: x * 4),
    "not a number": (lambda: DENSE / 0, lambda x: (x - x, x.max(), torch.relu(x))),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", INPUTS)
def test_unusual_tensors(name):
    make, fn = INPUTS[name]
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(fn, backend="llmcomp")(make()), fn(make()), equal_nan=True)


def block(**settings):
    """Layers for inputs (3, 4)."""
    return nn.Sequential(
        nn.LayerNorm(4, **settings), nn.Linear(4, 6, **settings), nn.GELU(), nn.Linear(6, 4, **settings)
    )


def with_weight(convert):
    """A linear layer whose weight is `convert(weight)`."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)
    return layer


class Narrow(nn.Module):
    """Weights and activations that are stored in 8 bits and computed with in more."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(DENSE.abs().to(dtype), requires_grad=False)

    def forward(self, x):
        y = nn.functional.linear(x, self.weight.to(x.dtype))
        return y.abs().to(self.weight.dtype).to(torch.float32) + 1


MODELS = {
    "float64": (lambda: block(dtype=torch.float64), lambda: DENSE.double()),
    "complex": (lambda: nn.Linear(4, 5, dtype=torch.complex64), lambda: COMPLEX),
    "fp8 e4m3": (lambda: Narrow(torch.float8_e4m3fn), lambda: DENSE),
    "fp8 e5m2": (lambda: Narrow(torch.float8_e5m2), lambda: DENSE),
    "fp8 e8m0": (lambda: Narrow(torch.float8_e8m0fnu), lambda: DENSE),
    "dynamic quantization": (
        lambda: torch.ao.quantization.quantize_dynamic(block(), {nn.Linear}, dtype=torch.qint8),
        lambda: DENSE,
    ),
    "sparse csr weight": (lambda: with_weight(lambda w: w.relu().to_sparse_csr()), lambda: DENSE),
    "subclass weight": (lambda: with_weight(lambda w: TwoTensor(w, w + 1)), lambda: DENSE),
    "parametrized weight": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), lambda: DENSE),
    "sparse embedding": (lambda: nn.Embedding(9, 4, sparse=True), lambda: torch.tensor([[1, 8]])),
}

# Dynamo itself leaves these in eager, whatever the backend.
LEFT_TO_EAGER = ("dynamic quantization", "sparse csr weight")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_unusual_models(name, graphs):
    torch.manual_seed(0)
    model, x = MODELS[name][0](), MODELS[name][1]()
    with torch.no_grad():
        got, expected = torch.compile(model, backend="llmcomp")(x), model(x)
    assert_close(got, expected)
    assert got.dtype == expected.dtype
    assert graphs or name in LEFT_TO_EAGER


class Spelled(TwoTensor):
    """A class that writes its sizes down as text, which those of a graph that is traced are not."""

    def __tensor_flatten__(self):
        return ["a", "b"], str(tuple(self.a.shape))

    @staticmethod
    def __tensor_unflatten__(inner, meta, shape, strides):
        assert ast.literal_eval(meta)
        return Spelled(inner["a"], inner["b"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return Spelled(out.a, out.b) if type(out) is TwoTensor else out


def test_a_class_that_cannot_be_traced_runs_as_it_is(graphs):
    x = Spelled(DENSE, DENSE + 1)
    compiled = torch.compile(lambda x: x * 2, backend="llmcomp", dynamic=True)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"Spelled.* ValueError.*runs in eager PyTorch"):
        got = compiled(x)
    assert not graphs and isinstance(got, Spelled) and torch.equal(got.b, x.b * 2)


REFUSED = {
    "fp8 arithmetic": (lambda: block().to(torch.float8_e4m3fn), lambda: DENSE.to(torch.float8_e4m3fn)),
    "two dtypes": (lambda: block().half(), lambda: DENSE),
    "two devices": (lambda: block().to("meta"), lambda: DENSE),
    "sparse weight": (lambda: with_weight(lambda w: w.relu().to_sparse()), lambda: DENSE),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_refuses_is_refused(name, graphs):
    model, x = REFUSED[name][0](), REFUSED[name][1]()
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype|device|layout|not implemented"):
        model(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype|device|layout|not implemented"):
        torch.compile(model, backend="llmcomp")(x)


def test_meta_tensors(graphs):
    x = DENSE.to("meta")
    y = torch.compile(lambda x: x @ x.t(), backend="llmcomp")(x)
    assert (y.device.type, y.shape) == ("meta", (3, 3))
    assert [g.program.target for g in graphs] == ["reference"]


def test_mutation_of_a_negative_view():
    def negate(x):
        return x.mul_(-2) + 1

    base, expected = COMPLEX.clone(), COMPLEX.clone()
    assert_close(torch.compile(negate, backend="llmcomp")(base.conj().imag), negate(expected.conj().imag))
    assert_close(base, expected)


def test_the_negative_bit_is_guarded(graphs):
    fast = torch.compile(lambda x: x * 2, backend="llmcomp")
    for x in (DENSE, COMPLEX.conj().imag, DENSE):
        assert_close(fast(x), x * 2)


@pytest.mark.parametrize(
    ("make", "advice"),
    [(DENSE.to_mkldnn, "to_dense"), (lambda: torch._efficientzerotensor(3), "torch.zeros")],
)
def test_tensors_without_readable_memory(make, advice):
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=f"expected .* found .*{advice}") as caught:
        torch.compile(lambda x: x + 1, backend="llmcomp")(make())
    assert isinstance(caught.value.inner_exception, CaptureError)


def test_errors_of_the_model_are_those_of_eager():
    def f(x, i):
        return x[i] + 1

    with pytest.raises(IndexError):
        torch.compile(f, backend="llmcomp")(DENSE, torch.tensor([7]))
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError)):
        torch.compile(lambda a, b: a @ b, backend="llmcomp")(DENSE, DENSE)


def test_two_threads_compile_at_once(graphs):
    models = [nn.Sequential(nn.Linear(4, n), nn.GELU(), nn.Linear(n, 4)) for n in (3, 5, 7, 9)]
    results: dict[int, torch.Tensor] = {}
    start = threading.Barrier(len(models))

    def work(i):
        start.wait()
        with torch.no_grad():
            results[i] = torch.compile(models[i], backend="llmcomp")(DENSE)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    with torch.no_grad():
        for i, model in enumerate(models):
            assert_close(results[i], model(DENSE))
    assert graphs


def test_one_program_in_many_threads(graphs):
    model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4), nn.LayerNorm(4))
    fast = torch.compile(model, backend="llmcomp", dynamic=True)
    inputs = [torch.randn(n, 4) for n in range(2, 10)]
    with torch.no_grad():
        fast(inputs[0])
        expected = [model(x) for x in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(fast(inputs[i]), expected[i], atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_interrupted_compile(monkeypatch, graphs):
    compile_program = llmcomp.backend.compile_program

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(llmcomp.backend, "compile_program", interrupted)
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        fast = torch.compile(layer, backend="llmcomp")
        with pytest.raises(KeyboardInterrupt):
            fast(DENSE)
        monkeypatch.setattr(llmcomp.backend, "compile_program", compile_program)
        assert_close(fast(DENSE), layer(DENSE))
    assert graphs


def test_a_failing_compile_is_reported_and_forgotten(monkeypatch, graphs):
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        fast = torch.compile(layer, backend="llmcomp", options={"target": "triton"})
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(BackendCompilerFailed, match="OptionError: expected tensors on a CUDA device"):
            fast(DENSE)
        assert_close(torch.compile(layer, backend="llmcomp")(DENSE), layer(DENSE))


FORK = """
import os, sys, torch
fast = torch.compile(lambda x: torch.sigmoid(x) * x.sin() + x.cos(), backend="llmcomp")
x = torch.linspace(-3, 3, 1 << 20)
expected = fast(x)
child = os.fork()
if child == 0:
    # A kernel that asked for two threads would hang here, as eager torch does.
    same = (fast(x).numpy() == expected.numpy()).all()
    fresh = torch.compile(lambda x: (x * 3).tanh() - 1, backend="llmcomp")(x[:100])
    os._exit(0 if same and torch.allclose(fresh, (x[:100] * 3).tanh() - 1, atol=1e-6) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_compile():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.strip() == "0", done.stderr


MINIFIED = """
import sys, torch
import llmcomp.backend as backend
from llmcomp.passes.base import Pass

def sin_to_cos(graph, report):
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
        node.target = torch.ops.aten.cos.default

if sys.argv[1] == "wrong":
    pipeline = backend.pipeline
    backend.pipeline = lambda *args: (Pass("sin_to_cos", sin_to_cos), *pipeline(*args))
layer = torch.nn.Linear(4, 4)
torch.compile(lambda x: layer(x).sin(), backend="llmcomp")(torch.randn(2, 4)).sum().backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["right", "wrong"])
def test_accuracy_minifier_flags_a_wrong_backend(program, tmp_path):
    environment = os.environ | {
        "TORCHDYNAMO_REPRO_AFTER": "dynamo",
        "TORCHDYNAMO_REPRO_LEVEL": "4",
        "TORCH_COMPILE_DEBUG_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", MINIFIED, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    written = list(tmp_path.rglob("minifier_launcher.py"))
    if program == "right":
        assert done.returncode == 0 and not written, done.stderr
    else:
        assert "Bad accuracy detected" in done.stderr and len(written) == 1
