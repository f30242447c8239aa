"""PyTorch's own database of operators and modules, through the backend, against eager.

    case = op_cases()["softmax"]
    result = run(case, "llmcomp", limit=4)     a Result: samples by verdict, and the failures

Verdicts of one sample:
    equal        values, types, strides, written inputs and what aliases what are those of eager
    raises       both raise
    random       the operator draws random numbers, and another stream of them: shapes and types are equal
    eager        equal, but Dynamo handed the backend no graph (graph break, or nothing to compute)
    traced       equal to Dynamo and AOTAutograd alone, which differ from eager (aliases, strides, an error)
    wrong        a difference that is ours
    error        ours raises where eager does not
    silent       eager raises where ours does not

An operator is random if eager gives two results under two seeds. Both are then run under one seed.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_leaves, tree_map

from tests.checks import CountingBackend

CONTROL = "aot_eager"
BAD = ("wrong", "error", "silent")
# One function may be compiled for many samples; Dynamo is reset when it has been.
SAMPLES_PER_FUNCTION = 50


@dataclass(frozen=True)
class Sample:
    """One call: `function(*args, **kwargs)`; copied for every run, because a call may write its arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class OpCase:
    """An operator or a module with its samples."""

    name: str
    samples: Callable[[], Iterator[tuple[Callable[..., Any], Sample]]]


@dataclass
class Result:
    """What became of the samples of one case."""

    name: str
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"name": self.name, "verdicts": dict(self.verdicts), "failures": self.failures}


@dataclass(frozen=True)
class Ran:
    """One run: what it returned or raised, and its arguments afterwards."""

    output: object
    error: Exception | None
    inputs: list[Any]


def dtype_of(op: OpInfo) -> torch.dtype | None:
    """float32, or for operators on integers int64."""
    supported = op.supported_dtypes("cpu")
    return next((t for t in (torch.float32, torch.int64) if t in supported), None)


def op_samples(op: OpInfo, dtype: torch.dtype) -> Iterator[tuple[Callable[..., Any], Sample]]:
    """The sample inputs of an operator, then its inputs that must raise."""
    torch.manual_seed(0)
    for s in op.sample_inputs("cpu", dtype, requires_grad=False):
        yield op.op, Sample((s.input, *s.args), s.kwargs)
    if op.error_inputs_func is not None:
        for e in op.error_inputs("cpu"):
            s = e.sample_input
            yield op.op, Sample((s.input, *s.args), s.kwargs)


def module_samples(info: Any) -> Iterator[tuple[Callable[..., Any], Sample]]:
    """The inputs of a module, in eval mode."""
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    for s in inputs:
        made = info.module_cls(*s.constructor_input.args, **s.constructor_input.kwargs).eval()
        yield made, Sample(tuple(s.forward_input.args), s.forward_input.kwargs)


def op_cases() -> dict[str, OpCase]:
    """Every operator that eager has in float32 or int64 on the CPU."""
    cases = {}
    for op in op_db:
        if (dtype := dtype_of(op)) is not None:
            name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
            cases[name] = OpCase(name, lambda op=op, dtype=dtype: op_samples(op, dtype))
    return cases


def module_cases() -> dict[str, OpCase]:
    """Every module, in float32 and eval mode."""
    return {i.name: OpCase(i.name, lambda i=i: module_samples(i)) for i in module_db}


class Compiler:
    """Compiles the function of one sample after another, once while it stays the same; `past` are the calls."""

    def __init__(self, backend: str) -> None:
        torch._dynamo.reset()
        self.counting = CountingBackend(backend)
        self.past: list[tuple[Callable[..., Any], Sample]] = []
        self.function: Callable[..., Any] | None = None
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.compiled is None or function is not self.function:
            self.function = function
            self.compiled = torch.compile(lambda *a, **k: function(*a, **k), backend=self.counting)
        return self.compiled


def plain_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What replaces the database's own seeding: it breaks the graph, and `execute` sets the seed."""
    return function(*args, **kwargs)


@patch.object(common_methods_invocations, "wrapper_set_seed", plain_call)
def run(case: OpCase, backend: str, limit: int | None = None) -> Result:
    """Run the samples of a case (`limit` of them, evenly spread)."""
    result = Result(case.name)
    ours = Compiler(backend)
    for index, (function, sample) in enumerate(spread(list(case.samples()), limit)):
        if index % SAMPLES_PER_FUNCTION == 0:
            ours = Compiler(backend)
        verdict, detail = judge(function, sample, ours)
        result.verdicts[verdict] += 1
        if verdict in BAD:
            result.failures.append(f"{verdict} #{index} {shown(sample)}: {detail}"[:500])
    torch._dynamo.reset()
    return result


def spread(samples: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of the samples, evenly spread."""
    if limit is None or len(samples) <= limit:
        return samples
    return [samples[(2 * i + 1) * len(samples) // (2 * limit)] for i in range(limit)]


def judge(function: Callable[..., Any], sample: Sample, compiler: Compiler) -> tuple[str, str]:
    """The verdict on one sample, and what differs."""
    calls = compiler.counting.calls
    eager, ours = execute(function, sample, seed=0), execute(compiler(function), sample, seed=0)
    compiler.past.append((function, sample))
    compiled = compiler.counting.calls > calls
    verdict, detail = judge_runs(ours, eager)
    if verdict == "wrong" and is_random(function, sample, eager):
        verdict, detail = judge_runs(ours, eager, values=False)
        verdict = "random" if verdict == "equal" else verdict
    if verdict in BAD:
        # With the same past, because Dynamo makes sizes and numbers dynamic that it has seen change.
        control = Compiler(CONTROL)
        traced = [execute(control(f), s, seed=0) for f, s in compiler.past][-1]
        if judge_runs(traced, eager)[0] in BAD:
            verdict, detail = judge_runs(ours, traced)
            verdict = verdict if verdict in BAD else "traced"
    return "eager" if verdict == "equal" and not compiled else verdict, detail


def judge_runs(ours: Ran, eager: Ran, values: bool = True) -> tuple[str, str]:
    """The verdict on one run against another."""
    if eager.error is not None or ours.error is not None:
        return judge_errors(ours, eager)
    difference = compare(ours, eager, values)
    return ("wrong" if difference else "equal"), difference


def is_random(function: Callable[..., Any], sample: Sample, eager: Ran) -> bool:
    """Whether another seed gives another result, or the operator returns memory as it finds it."""
    called = (getattr(function, "__name__", ""), *getattr(getattr(function, "__code__", None), "co_names", ()))
    return any("empty" in name for name in called) or bool(compare(execute(function, sample, seed=1), eager))


def judge_errors(ours: Ran, eager: Ran) -> tuple[str, str]:
    """The verdict where at least one of the two raised."""
    if eager.error is None:
        inner = getattr(ours.error, "inner_exception", None) or ours.error
        return "error", f"{type(inner).__name__}: {' '.join(str(inner).split())}"
    if ours.error is None:
        return "silent", f"eager raises {type(eager.error).__name__}: {eager.error}"
    return "raises", ""


def execute(function: Callable[..., Any], sample: Sample, seed: int) -> Ran:
    """Call the function on a copy of the sample."""
    mine = copied(sample)
    inputs = tree_leaves((mine.args, mine.kwargs))
    torch.manual_seed(seed)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        try:
            return Ran(function(*mine.args, **mine.kwargs), None, inputs)
        except Exception as error:
            return Ran(None, error, inputs)


def copied(sample: Sample) -> Sample:
    """A copy with tensors of its own; sparse rows, which cannot be deep-copied, by their own clone."""
    try:
        return copy.deepcopy(sample)
    except NotImplementedError:
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (sample.args, sample.kwargs))
        return Sample(args, kwargs)


def compare(ours: Ran, eager: Ran, values: bool = True) -> str:
    """What differs, or nothing: outputs, then the inputs as the call left them, then what aliases what."""
    a, b = tree_leaves(ours.output), tree_leaves(eager.output)
    if len(a) != len(b):
        return f"{len(a)} outputs, eager gives {len(b)}"
    pairs = [*zip(a, b, strict=True), *zip(ours.inputs, eager.inputs, strict=True)]
    for x, y in pairs:
        if difference := unlike(x, y) or (values and unequal(x, y)):
            return difference
    if aliases(a, ours.inputs) != aliases(b, eager.inputs):
        return f"aliases {aliases(a, ours.inputs)}, eager's {aliases(b, eager.inputs)}"
    return ""


def unlike(x: object, y: object) -> str:
    """How two leaves differ in type, shape, element type, layout or strides."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "" if type(x) is type(y) else f"{type(x).__name__}, eager gives {type(y).__name__}"
    for name in ("shape", "dtype", "layout", "device"):
        if getattr(x, name) != getattr(y, name):
            return f"{name} {getattr(x, name)}, eager's {getattr(y, name)}"
    if x.layout is torch.strided and steps(x) != steps(y):
        return f"strides {x.stride()}, eager's {y.stride()} for {tuple(x.shape)}"
    return ""


def steps(x: Tensor) -> list[int]:
    """The strides that mean something."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def unequal(x: object, y: object) -> str:
    """How two leaves differ in value."""
    if not isinstance(x, Tensor):
        return "" if x == y or (x != x and y != y) else f"{x}, eager gives {y}"
    try:
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def aliases(outputs: Sequence[object], inputs: Sequence[object]) -> list[tuple[int, int]]:
    """The pairs (output, input) that share memory."""
    made, given = memory(outputs), memory(inputs)
    return [(i, j) for i, p in made.items() for j, q in given.items() if p == q]


def memory(values: Sequence[object]) -> dict[int, int]:
    """The address of the memory of each tensor that has any, by position."""
    dense = {i: v for i, v in enumerate(values) if isinstance(v, Tensor) and v.layout is torch.strided}
    return {i: v.untyped_storage().data_ptr() for i, v in dense.items() if v.numel()}


def shown(sample: Sample) -> str:
    """The arguments, tensors as their shapes."""
    return ", ".join([text(a) for a in sample.args] + [f"{k}={text(v)}" for k, v in sample.kwargs.items()])


def text(value: object) -> str:
    """One argument for a report."""
    if isinstance(value, Tensor):
        steps = "" if value.layout is not torch.strided or value.is_contiguous() else f":{value.stride()}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{steps}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    return str(value)[:60]
