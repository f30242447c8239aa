"""Compiled functions that are called again and again, without what torch.compile does around each call.

    the first two calls    Dynamo checks its guards, gathers parameters, calls the program     milliseconds
    every other call       program(inputs)                                                     microseconds

A program reads nothing but its flat inputs. The first two calls go through Dynamo, which answers for everything:
that the code, the weights and the shapes are those that the program was compiled for. What it hands to the program
is noted. If the second call brings the same program the same inputs, but for the arguments, then nothing else can
matter to a third one, as long as nobody changes the model meanwhile. A replay belongs to one generation; the next one
asks Dynamo again. On a GPU the third call is recorded as a CUDA graph (llmcomp/cuda_graph.py), which is all that the
others launch.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from llmcomp import backend, compat
from llmcomp.capture import capture_graph
from llmcomp.cuda_graph import GraphedProgram, GraphedStep, movable
from llmcomp.options import Options
from llmcomp.prepared import weights_of
from llmcomp.program import Executable

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
Results = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Call:
    """A call of a program: what it was given and what it gave."""

    program: Callable[..., tuple[Any, ...]]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


_calls: ContextVar[list[Call] | None] = ContextVar("llmcomp_calls", default=None)


@cache
def recording(options: Options) -> Callable[..., torch.nn.Module]:
    """The backend with `options`, whose programs note their calls where a Replay listens."""

    def compile_graph(
        given: Sequence[Any], gm: GraphModule, fake_inputs: Sequence[Any]
    ) -> Callable[..., tuple[Any, ...]]:
        with compat.real_tensors():
            program, _ = backend.compile_aten(gm, options, weights_of(gm, given))

        def run(*inputs: Any) -> tuple[Any, ...]:
            outputs = program(*inputs)
            calls = _calls.get()
            if calls is not None:
                calls.append(Call(program, inputs, outputs))
            return outputs

        return run

    def compile_recording(gm: GraphModule, inputs: Sequence[Any]) -> torch.nn.Module:
        return backend.Compiled(capture_graph(gm, inputs, partial(compile_graph, inputs)))

    return compile_recording


def any_rows(tensor: Tensor) -> Tensor:
    """`tensor` (rows, ...), marked so that a program compiled with it serves every number of rows above one."""
    if tensor.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


class Replay:
    """A function of tensors, compiled by `recording`. It may be called with tensors of several layouts."""

    def __init__(self, function: Callable[..., Results], *fixed: object) -> None:
        """`function(*fixed, *tensors)` gives new tensors or None, and changes nothing but tensors.

        The first dimension of its tensors are rows, of which there may be any number.
        """
        self.function, self.fixed = function, fixed
        self._seen: dict[tuple[Layout, ...], _Bound | None] = {}
        self._trusted: dict[tuple[Layout, ...], _Bound] = {}

    def __call__(self, *tensors: Tensor) -> Results:
        """Call the function."""
        layouts = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        bound = self._trusted.get(layouts)
        if bound is not None:
            return bound.replay(tensors)
        calls: list[Call] = []
        listening = _calls.set(calls)
        try:
            results = self.function(*self.fixed, *map(any_rows, tensors))
        finally:
            _calls.reset(listening)
        self._note(layouts, _bind(calls, tensors, results), tensors)
        return results

    def _note(self, layouts: tuple[Layout, ...], bound: "_Bound | None", tensors: Sequence[Tensor]) -> None:
        before = self._seen.get(layouts)
        if bound is not None and before is not None and bound.equals(before):
            self._trusted[layouts] = bound.graphed(tensors)
        self._seen[layouts] = bound


@dataclass(frozen=True)
class _Bound:
    """A call, and where the function's arguments and results are among the program's inputs and outputs."""

    program: Callable[..., tuple[Any, ...]]
    inputs: tuple[Any, ...]  # None where an argument comes
    arguments: tuple[tuple[int, int], ...]  # (input, argument)
    results: tuple[int | None, ...]

    def equals(self, other: "_Bound") -> bool:
        mine, others = (self.program, self.arguments, self.results), (other.program, other.arguments, other.results)
        return mine == others and len(self.inputs) == len(other.inputs) and all(map(_same, self.inputs, other.inputs))

    def graphed(self, tensors: Sequence[Tensor]) -> "_Bound":
        """The same, replayed as a CUDA graph where it can be; `tensors` are examples of the arguments."""
        program = self.program.program if isinstance(self.program, GraphedProgram) else self.program
        known = program.inputs if isinstance(program, Executable) else None
        moving = tuple(place for place, _ in self.arguments)
        if known is None or known.written.intersection(moving) or not all(map(movable, tensors)):
            return self
        return replace(self, program=GraphedStep(program, moving))

    def replay(self, tensors: Sequence[Tensor]) -> Results:
        inputs = list(self.inputs)
        for place, argument in self.arguments:
            inputs[place] = tensors[argument]
        outputs = self.program(*inputs)
        return tuple(None if i is None else outputs[i] for i in self.results)


def _same(a: object, b: object) -> bool:
    return a is b if isinstance(a, Tensor) else a == b


def _bind(calls: list[Call], tensors: Sequence[Tensor], results: Results) -> _Bound | None:
    """What was called, if it was one program and every result is one of its outputs as it came."""
    if len(calls) != 1:
        return None
    (call,) = calls
    arguments = tuple((i, j) for i, x in enumerate(call.inputs) for j, t in enumerate(tensors) if x is t)
    places = tuple(None if r is None else _place(call.outputs, r) for r in results)
    if any(p is None and r is not None for p, r in zip(places, results, strict=True)):
        return None
    taken = {i for i, _ in arguments}
    inputs = tuple(None if i in taken else x for i, x in enumerate(call.inputs))
    return _Bound(call.program, inputs, arguments, places)


def _place(outputs: Sequence[Any], result: Tensor) -> int | None:
    return next((i for i, x in enumerate(outputs) if x is result), None)
