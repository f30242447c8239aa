"""`options={"verify": True}`: find the pass that changed the result.

Passes run when a model is compiled, before any real input exists. So the graph is kept as it was captured and
after every pass that touched it, and the first real call runs them all, on copies of its inputs. The captured
graph in eager ATen is the measure of the others, and its run in float64 is the measure of its own error:

    rms(stage - float64)  <=  1.5 * rms(eager - float64)  +  one rounding of the dtype

A pass that loses something because an option asked for it (quantize_cache) makes the measure of what follows. Where
codes are computed, what lies close to the middle between two of them may go either way, and results may differ by a
hundredth (QUANTIZED).

The kernels are the last stage. Programs that reuse what earlier calls computed (llmcomp/reuse.py) are checked
when each first runs. The work of one call is done once per stage: slow, and meant to be.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from llmcomp.cache_ops import LEVELS
from llmcomp.errors import VerifyError
from llmcomp.passes.base import Pass, PassResult
from llmcomp.quantized_cache import QuantizedCacheTensor
from llmcomp.report import Program

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LOSSY = ("quantize_cache",)
QUANTIZED = 0.01


@dataclass(frozen=True)
class Stage:
    """The graph as `name` (a pass, or "captured") left it."""

    name: str
    gm: GraphModule


class Stages:
    """Collects the graph after every pass that touched it."""

    def __init__(self, gm: GraphModule) -> None:
        self.stages = [Stage("captured", _snapshot(gm))]

    def after_pass(self, p: Pass, gm: GraphModule, result: PassResult) -> None:
        """Keep the graph: a Watcher of run_passes."""
        if result.report.rewrites or result.nodes_before != result.nodes_after:
            self.stages.append(Stage(p.name, _snapshot(gm)))


def _snapshot(gm: GraphModule) -> GraphModule:
    """A copy of the graph; constants are shared."""
    return GraphModule(gm, copy.deepcopy(gm.graph))


class VerifiedProgram:
    """A program that checks its stages and itself on its first call."""

    def __init__(self, program: Program, stages: Sequence[Stage]) -> None:
        self._program = program
        self._stages = list(stages)
        self._lock = threading.Lock()
        self.report, self.source = program.report, program.source

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        with self._lock:
            if self._stages:
                verify(self._stages, self._program, inputs)
                self._stages.clear()
        return self._program(*inputs)


def verify(stages: Sequence[Stage], program: Callable[..., tuple[Any, ...]], inputs: Sequence[Any]) -> None:
    """Check every stage and the program against the first stage, on copies of `inputs`.

    Raises:
        VerifyError: the first stage that differs, and its first node that does.
    """
    captured = stages[0].gm
    eager, exact = _run(captured, inputs), _run_exactly(captured, inputs)
    names, loss = _result_names(captured), _loss(captured)
    for before, after in zip(stages, stages[1:], strict=False):
        if after.name in LOSSY:
            eager, exact, loss = _run(after.gm, inputs), _run_exactly(after.gm, inputs), _loss(after.gm)
        elif wrong := _first_wrong(names, _run(after.gm, inputs), eager, exact, loss):
            where = _first_differing_node(before.gm, after.gm, inputs) or wrong
            raise VerifyError(f"pass {after.name} changed the result at {where}")
    if wrong := _first_wrong(names, _run(program, inputs), eager, exact, loss):
        raise VerifyError(f"the generated kernels changed the result at {wrong}")


def verify_results(gm: GraphModule, inputs: Sequence[Any], results: Sequence[Any], maker: str) -> None:
    """Check `results`, which `maker` computed from parts, against the whole graph `gm` in eager ATen.

    Raises:
        VerifyError: the first result that differs.
    """
    eager, exact = _run(gm, inputs), _run_exactly(gm, inputs)
    if wrong := _first_wrong(_result_names(gm), [*results, *inputs], eager, exact):
        raise VerifyError(f"{maker} changed the result at {wrong}")


# ---- running


def _run(fn: Callable[..., tuple[Any, ...]], inputs: Sequence[Any]) -> list[Any]:
    """The outputs of `fn` on copies of `inputs`, then those copies as it left them."""
    copies = [_clone(x) for x in inputs]
    with torch.no_grad(), _same_random_numbers(copies):
        return [*fn(*copies), *copies]


def _same_random_numbers(inputs: Sequence[Any]) -> Any:
    """Leave the generators as they are: every run draws the same numbers, and the user's own call too."""
    return torch.random.fork_rng({x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda})


def _clone(value: Any) -> Any:
    """A copy with the same layout, also where elements overlap."""
    if not isinstance(value, Tensor):
        return value
    flat = value.detach().as_strided((_extent(value),), (1,), value.storage_offset()).clone()
    return flat.as_strided(value.shape, value.stride(), 0)


def _extent(t: Tensor) -> int:
    """Elements from the first to the last in memory."""
    if t.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


class _InFloat64(Interpreter):
    """Runs a captured graph in double precision, whatever the dtypes that it names."""

    def run_node(self, n: Node) -> Any:
        return tree_map(_widened, super().run_node(n))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in FLOATS else value
    return torch.float64 if value in FLOATS else value


def _run_exactly(gm: GraphModule, inputs: Sequence[Any]) -> list[Any] | None:
    """The results in float64; None where the graph does not run, or means another thing, in float64."""
    if any(_depends_on_dtype(n) for n in gm.graph.nodes):
        return None
    wide = [_widened(_clone(x)) for x in inputs]
    try:
        with torch.no_grad():
            return [*_InFloat64(gm).run(*wide), *wide]
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # an operator without a float64 kernel


def _depends_on_dtype(n: Node) -> bool:
    """Random numbers and bit casts give other values in another dtype."""
    tags = getattr(n.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or n.target is torch.ops.aten.view.dtype


# ---- comparing


def _result_names(gm: GraphModule) -> list[str]:
    """What the results of `_run` are called: the output nodes, then the inputs."""
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, list | tuple)
    named = [f"output {i} ({getattr(n, 'name', n)})" for i, n in enumerate(outputs)]
    return named + [f"input {n.name} after the call" for n in gm.graph.find_nodes(op="placeholder")]


def _loss(gm: GraphModule) -> float:
    """What results may be off by, relatively, because codes are computed that lie close to others."""
    return QUANTIZED if any(n.target is torch.ops.llmcomp.cache_quantize.default for n in gm.graph.nodes) else 0.0


def _first_wrong(
    names: Sequence[str], got: Sequence[Any], eager: Sequence[Any], exact: Sequence[Any] | None, loss: float = 0.0
) -> str | None:
    """The name of the first result that is not as right as eager's, and how far it is off."""
    if len(got) != len(eager):
        return f"its results: expected {len(eager)}, found {len(got)}"
    for i, name in enumerate(names):
        if complaint := difference(got[i], eager[i], None if exact is None else exact[i], loss):
            return f"{name}: {complaint}"
    return None


def difference(got: Any, eager: Any, exact: Any = None, loss: float = 0.0) -> str | None:
    """How `got` is worse than `eager` (see the head of this file), or None. `exact` is the float64 result.

    `loss` is a relative error that is allowed in any case.
    """
    if not isinstance(eager, Tensor):
        return None if type(got) is type(eager) and got == eager else f"expected {eager!r}, found {got!r}"
    if not isinstance(got, Tensor) or (got.shape, got.dtype) != (eager.shape, eager.dtype):
        return f"expected {_about(eager)}, found {_about(got)}"
    if loss:
        got, eager, exact = (t.float() if isinstance(t, Tensor) and _is_coded(t) else t for t in (got, eager, exact))
    if not torch.equal(got.isfinite(), eager.isfinite()):
        return f"expected {_strange(eager)} infinities and NaNs, found {_strange(got)}"
    finite = eager.isfinite() if exact is None else eager.isfinite() & exact.isfinite()
    return _too_far(got[finite], eager[finite], None if exact is None else exact[finite], loss)


def _about(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _strange(t: Tensor) -> int:
    return int((~t.isfinite()).sum())


def _is_coded(t: Tensor) -> bool:
    """Whether a tensor holds codes, or has them inside."""
    return t.dtype in LEVELS or isinstance(t, QuantizedCacheTensor)


def _too_far(got: Tensor, eager: Tensor, exact: Tensor | None, loss: float) -> str | None:
    rounding = torch.finfo(eager.dtype).eps if eager.is_floating_point() or eager.is_complex() else 0.0
    if exact is None:
        # Without a float64 result eager's own error is not known: allow what long sums lose.
        error, bar = _rms(got, eager), (32 * rounding + loss) * _rms(eager)
    else:
        # The error of few elements is a matter of luck: allow for that.
        luck = 1 + 3 / max(1, eager.numel()) ** 0.5
        error, bar = _rms(got, exact), luck * (1.5 * _rms(eager, exact) + (rounding + loss) * _rms(exact))
    return None if error <= bar else f"expected a root-mean-square error of at most {bar:.3g}, found {error:.3g}"


def _rms(a: Tensor, b: Tensor | None = None) -> float:
    wide = torch.complex128 if a.is_complex() else torch.float64
    apart = a.to(wide) if b is None else a.to(wide) - b.to(wide)
    return float(apart.abs().square().mean().sqrt()) if apart.numel() else 0.0


# ---- locating


class _Recorder(Interpreter):
    """Keeps a copy of every value, by the name of its node."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = tree_map(_clone, value)
        return value


def _first_differing_node(before: GraphModule, after: GraphModule, inputs: Sequence[Any]) -> str | None:
    """The first node, of those that both graphs have, whose value changed."""
    values = _values(before, inputs)
    for n, value in _values(after, inputs).items():
        if n in values and n != "output" and (complaint := _changed(value, values[n])):
            return f"node {n}: {complaint}"
    return None


def _values(gm: GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    recorder = _Recorder(gm)
    _run(recorder.run, inputs)
    return recorder.values


def _changed(got: Any, expected: Any) -> str | None:
    return next((c for a, b in zip(_leaves(got), _leaves(expected), strict=True) if (c := difference(a, b))), None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)
    else:
        yield value
