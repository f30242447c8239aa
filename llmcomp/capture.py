"""Dynamo graph -> flat ATen graphs, by AOTAutograd.

    inference       ->  one graph; linear and attention are single nodes, mutations of inputs are copy_ nodes
    with gradients  ->  a forward graph and a backward graph, in AOTAutograd's plain ATen

A captured graph is flat: tensors and integers in, a tuple out. Every node has its fake value in
`meta["val"]`; placeholders have `meta["static"]`, true for parameters and buffers, which stay where they are.
`gm.meta["kind"]` is inference, forward or backward.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llmcomp import compat
from llmcomp.errors import CaptureError
from llmcomp.specialize import specialize_attributes

KEPT_WHOLE = (torch.ops.aten.linear.default, torch.ops.aten.scaled_dot_product_attention.default)

# Flat inputs in, the tuple of flat outputs out. `None` outputs stay None.
GraphFunction = Callable[..., tuple[Any, ...]]
CompileGraph = Callable[[GraphModule, Sequence[Any]], GraphFunction]


def capture_graph(gm: GraphModule, inputs: Sequence[Any], compile_graph: CompileGraph) -> Callable[..., Any]:
    """Capture the Dynamo graph `gm`, compile its ATen graphs with `compile_graph`, return what is called.

    `compile_graph(graph, fake_inputs)` is called once for inference. When gradients are needed it is called
    for the forward graph, and for the backward graph during the first `backward()`. A graph that AOTAutograd can't
    trace because of tensors of somebody else's class runs as it is, with a warning.

    Raises:
        CaptureError: an input has no memory that anyone can read.
    """
    for x in inputs:
        _refuse_unreadable(x)
    trains, traced = needs_grad(gm, inputs), False

    def compile_traced(graph: GraphModule, fake_inputs: Sequence[Any]) -> GraphFunction:
        nonlocal traced
        traced = True
        return compile_graph(graph, fake_inputs)

    if not trains:
        specialize_attributes(gm)
    with nullcontext() if trains else compat.keep_whole(KEPT_WHOLE):
        try:
            return compat.aot_autograd(
                gm,
                inputs,
                forward=_marking("forward", compile_traced),
                backward=_marking("backward", compile_graph),
                inference=_marking("inference", compile_traced),
            )
        except Exception as error:
            kind = _foreign(gm, inputs)
            if traced or kind is None:
                raise
            warnings.warn(
                f"expected tensors that AOTAutograd can trace, found {kind.__module__}.{kind.__qualname__}, for which "
                f"it raises {type(error).__name__}: {error}. A graph that reads it runs in eager PyTorch; pass plain "
                "tensors to have it compiled",
                stacklevel=2,
            )
            return gm.forward


def _foreign(gm: GraphModule, inputs: Sequence[Any]) -> type | None:
    """The class of the first input or value of a graph that is made of other tensors by code that is not ours."""
    values = (*inputs, *(n.meta.get("example_value") for n in gm.graph.nodes))
    kinds = (type(x) for x in values if isinstance(x, torch.Tensor) and is_traceable_wrapper_subclass(x))
    return next((kind for kind in kinds if kind.__module__.split(".")[0] != "llmcomp"), None)


def _refuse_unreadable(x: Any) -> None:
    """Refuse what AOTAutograd traces as if it were an ordinary tensor, and what then crashes when run."""
    if not isinstance(x, torch.Tensor):
        return
    if x.is_mkldnn:
        raise CaptureError("expected dense tensors, found one in oneDNN's layout: pass x.to_dense() instead")
    if torch._is_zerotensor(x):
        raise CaptureError("expected tensors with memory, found a ZeroTensor: pass torch.zeros(...) instead")


def needs_grad(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether running `gm` may record a gradient: some input wants one and gradient mode is on somewhere."""
    tensors = (*(x for x in inputs if isinstance(x, torch.Tensor)), *gm.parameters())
    records = torch.is_grad_enabled() or any(map(_enables_grad, gm.modules()))
    return records and any(t.requires_grad for t in tensors)


def _enables_grad(module: torch.nn.Module) -> bool:
    return isinstance(module, GraphModule) and any(
        n.target is torch._C._set_grad_enabled and n.args[0] for n in module.graph.nodes
    )


def _marking(kind: str, compile_graph: CompileGraph) -> CompileGraph:
    """Note on a graph what it is and which inputs are static, then compile it."""

    def compile_marked(gm: GraphModule, inputs: Sequence[Any]) -> GraphFunction:
        # Torch knows the static inputs of the forward graph only.
        static = frozenset() if kind == "backward" else compat.static_inputs()
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            node.meta["static"] = i in static
        gm.meta["kind"] = kind
        # The compiler is called in the middle of tracing, but works on constants and tables of its own.
        with compat.timed("llmcomp"), compat.real_tensors(), compat.no_fallback():
            return compile_graph(gm, inputs)

    return compile_marked


class _Captured(BaseException):
    """Carries a graph out of the call that would have run it; no handler of ordinary errors may stop it."""

    def __init__(self, gm: GraphModule, inputs: tuple[Any, ...]) -> None:
        self.gm, self.inputs = gm, inputs


def capture(fn: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> GraphModule:
    """Return the ATen graph that the passes get for `fn(*inputs)` without gradients; nothing is executed.

    `gm.meta["inputs"]` holds the real flat inputs: `gm(*gm.meta["inputs"])` gives the tuple of flat outputs.
    Sizes are numbers, or symbols where `dynamic`.

    Raises:
        torch._dynamo.exc.Unsupported: `fn` is not one graph.
        CaptureError: `fn` computes nothing.
    """

    def compile_graph(gm: GraphModule, fake_inputs: Sequence[Any]) -> GraphFunction:
        def run(*flat: Any) -> NoReturn:
            raise _Captured(gm, flat)

        return run

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture_graph(gm, example_inputs, compile_graph)

    try:
        with torch.no_grad():
            compat.compile_apart(fn, backend, fullgraph=True, dynamic=dynamic)(*inputs)
    except _Captured as captured:
        captured.gm.meta["inputs"] = captured.inputs
        return captured.gm
    raise CaptureError("expected a function that computes on tensors, found one that leaves no graph to compile")
