"""The one place for private torch APIs and for what differs between torch 2.11 and 2.15.

Each function below is a contract with torch, and tests/test_compat.py checks each of them. Names are looked
up when they are used, so importing this module is cheap and a name that moved gives a readable error.
"""

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule

from llmcomp.errors import LlmcompError

SUPPORTED = "2.11 to 2.15"

# `keep_whole` edits the kernel tables of torch operators, which all threads of the process share.
_keeping = threading.RLock()
_apart = count()


class CompatError(LlmcompError):
    """This version of torch lacks something that llmcomp relies on."""


def private(module: str, name: str, purpose: str) -> Any:
    """Return `module.name` from the insides of torch.

    Raises:
        CompatError: this torch has no such name.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CompatError(
            f"expected {module}.{name} ({purpose}), found none in torch {torch.__version__}: "
            f"install torch {SUPPORTED}, or report this to llmcomp"
        ) from error


def mark_growing(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo trace `tensor` with a symbol for its size along `dim` when it first sees it.

    It would learn from the second size that it meets, and trace a program twice.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def growing(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions for which `mark_growing` was called."""
    return tuple(getattr(tensor, "_dynamo_weak_dynamic_indices", ()))


@contextmanager
def keep_whole(ops: Sequence[torch._ops.OpOverload]) -> Iterator[None]:
    """Trace composite `ops` as single nodes instead of their decompositions.

    Right for inference graphs only: a kept operator has no derivative, and its gradient is silently lost.
    """
    override = private("torch.export.exported_program", "_override_composite_implicit_decomp", "keeps operators whole")
    preserve = private("torch.export.exported_program", "_special_op_to_preserve_cia", "keeps operators whole")
    with _keeping, override({op: preserve for op in ops}):
        yield


GraphCompiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def aot_autograd(
    gm: GraphModule,
    inputs: Sequence[Any],
    *,
    forward: GraphCompiler,
    backward: GraphCompiler,
    inference: GraphCompiler,
) -> Callable[..., Any]:
    """Make functional ATen graphs of a Dynamo graph and have each compiled; return the callable to run.

    Without gradients `inference` gets the one graph. With them `forward` gets its graph now and `backward`
    its own during the user's first `backward()`. An inference graph mutates inputs with `copy_` nodes.
    """
    aot = private("torch._functorch.aot_autograd", "aot_module_simplified", "captures ATen graphs")
    compiled: Callable[..., Any] = aot(
        gm,
        inputs,
        fw_compiler=_boxed(forward),
        bw_compiler=_undynamoed(_boxed(backward)),
        inference_compiler=_boxed(inference),
        keep_inference_input_mutations=True,
    )
    # These methods are of `gm`, which would live as long as what is compiled.
    for method in ("zero_grad", "named_parameters", "named_buffers"):
        vars(compiled).pop(method, None)
    return compiled


def _boxed(compile_graph: GraphCompiler) -> GraphCompiler:
    """AOTAutograd hands its inputs over in a list, so that it holds none of them during the call."""

    def compile_boxed(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]  # slow to import

        boxed: Callable[..., Any] = make_boxed_func(compile_graph(gm, inputs))
        return boxed

    return compile_boxed


def _undynamoed(compile_graph: GraphCompiler) -> GraphCompiler:
    """Keep Dynamo out of a backward pass: it compiles and runs wherever the user calls `backward()`."""

    def compile_undynamoed(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program: Callable[..., Any] = torch.compiler.disable(torch.compiler.disable(compile_graph)(gm, inputs))
        return program

    return compile_undynamoed


def static_inputs() -> frozenset[int]:
    """Positions of the graph inputs that keep their address: parameters and buffers.

    To be asked while AOTAutograd calls a forward or inference compiler; empty anywhere else.
    """
    context = private("torch._guards", "TracingContext", "knows which inputs are parameters").try_get()
    metadata = None if context is None else context.fw_metadata
    return frozenset() if metadata is None else frozenset(metadata.static_input_indices)


def owners(tensor: torch.Tensor) -> int:
    """How many tensors show the memory of `tensor`, itself included."""
    count = private("torch._C", "_storage_Use_Count", "counts the tensors that share memory")
    storage = tensor.untyped_storage()
    return int(count(storage._cdata)) - 1  # the storage object is an owner too


def real_tensors() -> AbstractContextManager[None]:
    """Let operators work on real tensors inside, also while AOTAutograd traces with fake ones."""
    disable = private("torch.utils._python_dispatch", "_disable_current_modes", "suspends fake tensors and tracing")
    context: AbstractContextManager[None] = disable()
    return context


def trace_again(reason: str) -> NoReturn:
    """Called by a backend: Dynamo drops the graph at hand and traces the same call once more, from the beginning.

    Of the restarts that Dynamo knows, this is the one that it lets through from a backend.
    """
    restart = private("torch._dynamo.exc", "TensorifyScalarRestartAnalysis", "makes Dynamo trace a call again")
    raise restart(restart_reason=reason)


@contextmanager
def no_fallback() -> Iterator[None]:
    """Keep Dynamo from running the graph in eager, with no more than a log line, where the compiler failed.

    It does so for errors about values that tracing does not know, wherever they come from.
    """
    purpose = "lets Dynamo run a graph in eager"
    falls_back = private("torch._dynamo.exc", "exceptions_allowed_to_be_fallback", purpose)
    try:
        yield
    except falls_back as error:
        raise LlmcompError(
            f"expected to compile without the values of tensors, found a need for one ({error}): "
            "please report this, with the folder that LLMCOMP_DUMP=folder writes"
        ) from error


def raise_default_recompile_limit(limit: int) -> None:
    """Raise Dynamo's default number of graphs for one function to `limit`; never lower it.

    The default is changed and not the setting: a value that the user sets wins, and torch's settings belong
    to a thread, while models are compiled in any thread.
    """
    import torch._dynamo.config as config

    entry = private("torch._dynamo.config", "_config", "holds Dynamo's default settings")["recompile_limit"]
    if entry.default < limit <= config.accumulated_recompile_limit:
        entry.default = limit


def add_bisect_subsystems(backend: str, subsystems: Sequence[str]) -> None:
    """Have CompilerBisector try `backend` before Inductor, and look for faults in its `subsystems`."""
    module = "torch._inductor.compiler_bisector"
    backends = private(module, "BACKENDS", "lists what the bisector tries")
    subsystem = private(module, "BisectSubsystem", "names a part that the bisector can switch off")
    inductor = backends.pop("inductor")
    backends[backend] = [subsystem(name) for name in subsystems]
    backends["inductor"] = inductor


def bisect_disables(backend: str, subsystem: str, detail: Callable[[], str]) -> bool:
    """Whether a running bisection wants this application of `subsystem` left out; counts it."""
    bisector = private("torch._inductor.compiler_bisector", "CompilerBisector", "looks for faulty passes")
    return bool(bisector.disable_subsystem(backend, subsystem, detail))


def optimized_module() -> Any:
    """The class of what `torch.compile(module)` returns."""
    return private("torch._dynamo.eval_frame", "OptimizedModule", "is what torch.compile returns")


def backend_of(compiled: Any) -> object:
    """The backend function that `torch.compile(module, backend=...)` was given or looked up.

    Asked about the modules of all backends, so it never raises: None where this torch keeps it elsewhere.
    """
    return compiler_of(compiled)[0]


def compiler_of(compiled: Any) -> tuple[object, dict[str, Any]]:
    """The backend function of what torch.compile returned for a module or a function, and its mode and options.

    It never raises: (None, {}) where this torch keeps them elsewhere.
    """
    found: Any = getattr(_context_of(compiled), "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return getattr(found, "compiler_fn", found), dict(getattr(found, "kwargs", {}))


def _context_of(compiled: Any) -> object:
    if hasattr(compiled, "dynamo_ctx"):
        return compiled.dynamo_ctx
    names = getattr(getattr(compiled, "__code__", None), "co_freevars", ())
    cells = getattr(compiled, "__closure__", None) or ()
    return next((c.cell_contents for n, c in zip(names, cells, strict=False) if n == "self"), None)


def compile_apart(fn: Callable[..., Any], backend: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`torch.compile(fn)` with a limit of graphs and a memory of sizes of its own.

    Dynamo counts graphs by code object, and what sizes it has seen by name, line and (since torch 2.13) closure.
    """

    def call(*args: Any, **keywords: Any) -> Any:
        return fn(*args, **keywords)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(_apart)}")
    compiled: Callable[..., Any] = torch.compile(call, backend=backend, **settings)
    return compiled


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was given to make `fn`; `fn` itself where it is not compiled."""
    if isinstance(fn, optimized_module()):
        fn = fn._orig_mod
    if isinstance(fn, torch.nn.Module):
        return fn._call_impl if fn._compiled_call_impl is not None else fn
    innermost = private("torch._dynamo.eval_frame", "innermost_fn", "finds the function that was compiled")
    original: Callable[..., Any] = innermost(fn)
    return original


def graph_break(gm: GraphModule) -> str | None:
    """Why and where Dynamo ended this graph early; None where the function was at its end."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    frame = ended.user_stack[-1] if ended.user_stack else None
    place = "" if frame is None else f" ({frame.filename}:{frame.lineno})"
    return str(ended.reason).strip().splitlines()[0] + place


def timed(name: str) -> AbstractContextManager[None]:
    """Book the time spent inside as `name` in torch's account of compiling."""
    context: AbstractContextManager[None] = private("torch._dynamo.utils", "dynamo_timed", "keeps account")(name)
    return context


def compile_seconds() -> dict[str, float]:
    """Seconds that this process has spent in Dynamo, in the backends that it called, and therein in llmcomp."""
    times = private("torch._dynamo.utils", "compile_times", "tells the account")
    names, seconds = times(repr="csv", aggregate=True)
    found = {name: float(value) for name, value in zip(names, seconds, strict=True)}
    backend = found.get("OutputGraph.call_user_compiler", 0.0)
    dynamo = found.get("_compile.compile_inner", 0.0) - backend
    return {"dynamo": dynamo, "backend": backend, "llmcomp": found.get("llmcomp", 0.0)}


def fresh_sizes(hints: Mapping[str, int]) -> tuple[Any, dict[str, torch.SymInt]]:
    """A fake tensor mode of its own, and in it one symbolic size for each name, of which `hints` is an example.

    A size made so is taken to be at least 2, as all symbolic sizes are.
    """
    purpose = "makes symbolic sizes"
    symbols = "torch.fx.experimental.symbolic_shapes"
    environment = private(symbols, "ShapeEnv", purpose)()
    dynamic = private(symbols, "DimDynamic", purpose).DYNAMIC
    named = private("torch._dynamo.source", "ConstantSource", purpose)
    mode = private("torch._subclasses.fake_tensor", "FakeTensorMode", purpose)(shape_env=environment)
    sizes = {}
    for name, hint in hints.items():
        source = named(name)
        symbol = environment.create_symbol(hint, source, dynamic_dim=dynamic, constraint_dim=None)
        sizes[name] = environment.create_symintnode(symbol, hint=hint, source=source)
    return mode, sizes


def sized(mode: Any, expression: Any, hint: int) -> int | torch.SymInt:
    """A size of the fake tensor mode `mode` that is a sympy expression of its symbols."""
    if expression.is_Integer:
        return int(expression)
    size: torch.SymInt = mode.shape_env.create_symintnode(expression, hint=hint)
    return size
