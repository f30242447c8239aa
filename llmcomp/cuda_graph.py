"""The launches of a program as one CUDA graph, for calls whose tensors are where they were in the call before.

    first call       launches one by one; notes the addresses of its inputs
    second call      inputs that are elsewhere now get a buffer of the graph's own; launches one by one, then records
    other calls      copies those few inputs into their buffers, replays, copies the results out

Nothing runs twice: recording executes nothing, so the call that records has computed its results before. Graphs hold
addresses and no inputs: a tensor that came to lie where another lay is read, as it is the one that was given. What a
program writes into is never copied: where it moves, the program is recorded anew. A graph is left alone while the
caller captures us, on other streams than its own, and where its memory would be more than a program may keep.
"""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from llmcomp.graph import is_random, mutated
from llmcomp.quantized_cache import QuantizedCacheTensor
from llmcomp.report import Program, ProgramReport
from llmcomp.status import shared_status

log = logging.getLogger("llmcomp")

GRAPHS = 8  # of a program: for so many layouts of its inputs
ATTEMPTS = 3  # to record for one layout, each after inputs have moved; a recording that was worth it gives new ones
WORTH = 8  # replays
MOVED_BYTES = 16 << 20  # inputs that are copied for each call
RESULT_BYTES = 64 << 20  # results that are copied for each call
KEPT_BYTES = 512 << 20  # memory of one graph

Run = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Inputs:
    """The flat inputs of a program whose launches can be captured: which it writes into, which keep their address."""

    written: frozenset[int]
    static: frozenset[int]


def capturable(graph: Graph, externs: Sequence[Node]) -> Inputs | None:
    """What is to be known of the inputs of a program on a GPU, or None where a replay could differ from a call.

    `externs` are the nodes that the program calls in eager.
    """
    values = [n.meta.get("val") for n in graph.nodes]
    if any(isinstance(v, Tensor) and v.device.type != "cuda" for v in values) or not all(map(_replays, externs)):
        return None
    if any(isinstance(v, QuantizedCacheTensor) for v in values):
        return None  # results whose memory is that of their parts
    placeholders, targets = graph.find_nodes(op="placeholder"), mutated(graph)
    return Inputs(
        frozenset(i for i, n in enumerate(placeholders) if n in targets),
        frozenset(i for i, n in enumerate(placeholders) if n.meta.get("static")),
    )


def _replays(node: Node) -> bool:
    """Whether an eager call does the same when its launches are repeated."""
    if not isinstance(node.target, OpOverload):
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    decides = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    ops = torch.ops.llmcomp
    on_host = (ops.cache_grow.default, ops.cache_room.default)  # keep account of who was given which memory
    return not (is_random(node) or decides.intersection(node.target.tags) or node.target in on_host)


# ---- the device -----------------------------------------------------------------------------------------


class Device(Protocol):
    """What is asked of CUDA."""

    def capturing(self) -> bool:
        """Whether somebody captures the current stream."""

    def stream(self) -> int:
        """The current stream."""

    def check(self) -> None:
        """Raise for what kernels have reported so far."""

    def record(self, run: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Callable[[], None], int]:
        """Capture what `run` launches: its results, what replays it on the current stream, bytes of memory kept."""


class Cuda:
    """The current CUDA device."""

    def capturing(self) -> bool:
        """Whether somebody captures the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> int:
        """The current stream."""
        return int(torch.cuda.current_stream().cuda_stream)

    def check(self) -> None:
        """Raise for what kernels have reported so far: a program does so when it is called, a graph does not."""
        shared_status("cuda").check()

    def record(self, run: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Callable[[], None], int]:
        """Capture what `run` launches, as torch.cuda.graph does, but without emptying the allocator's cache.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph, side, before = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.memory_reserved()
        torch.cuda.synchronize()
        collects = gc.isenabled()
        gc.disable()  # what it frees might be the memory or the graph of somebody else
        try:
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    outputs = run()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return outputs, graph.replay, max(torch.cuda.memory_reserved() - before, 0)


# ---- one recorded call ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A result that shows the memory of an input; `offset` counts from the input's first element."""

    input: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Recording:
    """A call of a program that can be replayed for inputs at the same addresses, but for those with buffers."""

    stream: int
    buffers: dict[int, Tensor]
    results: tuple[Any, ...]  # tensors in the graph's memory, _Views, and other values
    launch: Callable[[], None]
    check: Callable[[], None]

    def replay(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What the program gives for `inputs`.

        Raises:
            IndexError: an index was out of range, in an earlier call.
        """
        self.check()
        for i, buffer in self.buffers.items():
            buffer.copy_(inputs[i])
        self.launch()
        return tuple(_given(r, inputs) for r in self.results)


def _given(result: object, inputs: Sequence[Any]) -> object:
    """A result as a tensor that later replays leave alone."""
    if isinstance(result, _View):
        x = inputs[result.input]
        return x.as_strided(result.size, result.stride, x.storage_offset() + result.offset)
    return result.clone() if isinstance(result, Tensor) else result


def record(
    program: Run, inputs: Sequence[Any], moving: Sequence[int], device: Device
) -> tuple[tuple[Any, ...], Recording | None]:
    """Call `program(*inputs)`, then record it with buffers for the inputs `moving`, which it must not write into.

    Returns its results, and None for a recording where it cannot be captured.
    """
    with torch.inference_mode(False), torch.no_grad():  # buffers outlive the mode of this call
        buffers = {i: _copied(inputs[i]) for i in moving}
    given = [buffers.get(i, x) for i, x in enumerate(inputs)]
    outputs = program(*given)  # also compiles what is not compiled yet, for buffers aligned as these are
    now = tuple(_at(o, given) for o in outputs)
    if _disguised(now, given):  # in the memory of a buffer, perhaps
        return tuple(_given(r, inputs) for r in now), None
    results = tuple(_given(r, inputs) if isinstance(r, _View) else r for r in now)
    if sum(_bytes(r) for r in now if isinstance(r, Tensor)) > RESULT_BYTES:
        return results, None
    try:
        captured, launch, kept = device.record(lambda: program(*given))
    except RuntimeError as error:
        log.info("llmcomp: launches are not replayed as a CUDA graph: %s", error)
        return results, None
    if kept > KEPT_BYTES:
        return results, None
    recorded = tuple(_at(o, given) for o in captured)
    return results, Recording(device.stream(), buffers, recorded, launch, device.check)


def _at(output: object, inputs: Sequence[object]) -> object:
    """`output`, or where it lies if that is in the memory of an input."""
    if not isinstance(output, Tensor) or not output.numel():
        return output
    memory = output.untyped_storage().data_ptr()
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.dtype == output.dtype and x.untyped_storage().data_ptr() == memory:
            offset = int(output.storage_offset()) - int(x.storage_offset())
            return _View(i, tuple(output.shape), tuple(output.stride()), offset)
    return output


def _disguised(outputs: Sequence[object], inputs: Sequence[object]) -> bool:
    """Whether an output shows the memory of an input as another dtype."""
    memory = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
    return any(isinstance(o, Tensor) and o.numel() and o.untyped_storage().data_ptr() in memory for o in outputs)


def _copied(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def movable(x: object) -> bool:
    """Whether an input may be copied into a buffer of the same strides for each call."""
    dense = isinstance(x, Tensor) and all(s or n == 1 for n, s in zip(x.shape, x.stride(), strict=True))
    return dense and _bytes(x) <= MOVED_BYTES  # type: ignore[arg-type]


# ---- a program of torch.compile -------------------------------------------------------------------------


@dataclass
class _State:
    """What is known of one layout of the inputs."""

    addresses: list[int]
    moving: set[int] = field(default_factory=set)
    recording: Recording | None = None
    attempts: int = ATTEMPTS
    replays: int = 0  # of this recording


class GraphedProgram:
    """A program whose launches are replayed where its inputs allow it. Safe to call from several threads."""

    def __init__(self, program: Program, inputs: Inputs, device: Device | None = None) -> None:
        self.program, self.inputs = program, inputs
        self.device: Device = device or Cuda()
        self.report: ProgramReport = program.report
        self.source: str = program.source
        self._states: OrderedDict[object, _State] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if self.device.capturing() or not self._lock.acquire(blocking=False):
            return self.program(*inputs)
        try:
            return self._call(inputs)
        finally:
            self._lock.release()

    def _call(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        addresses = [x.data_ptr() if isinstance(x, Tensor) else 0 for x in inputs]
        state = self._state(inputs, addresses)
        if state is None or state.attempts <= 0 or not self._still(state, inputs, addresses):
            return self.program(*inputs)
        if state.recording is not None:
            state.replays += 1
            state.attempts = ATTEMPTS if state.replays >= WORTH else state.attempts
            return state.recording.replay(inputs)
        state.attempts, state.replays = state.attempts - 1, 0
        results, state.recording = record(self.program, inputs, sorted(state.moving), self.device)
        if state.recording is None:
            state.attempts = 0
        return results

    def _state(self, inputs: Sequence[Any], addresses: list[int]) -> _State | None:
        """What is known of the layout of the inputs, on this stream; None where it is met for the first time."""
        static = self.inputs.static
        layout = tuple(_layout(x) for i, x in enumerate(inputs) if i not in static)
        key = (self.device.stream(), layout)
        state = self._states.get(key)
        if state is None:
            self._states[key] = _State(addresses)
            if len(self._states) > GRAPHS:
                self._states.popitem(last=False)
            return None
        self._states.move_to_end(key)
        return state

    def _still(self, state: _State, inputs: Sequence[Any], addresses: list[int]) -> bool:
        """Whether this call can be replayed or recorded: what has moved gets a buffer, or has to stay for a call."""
        pairs = zip(addresses, state.addresses, strict=True)
        moved = {i for i, (now, before) in enumerate(pairs) if now != before and i not in state.moving}
        if not moved:
            return True
        state.addresses, state.recording = addresses, None
        if any(i in self.inputs.written or not movable(inputs[i]) for i in moved):
            state.attempts -= 1
            return False
        state.moving |= moved
        return True


def _layout(x: object) -> object:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


# ---- a step of a generation -----------------------------------------------------------------------------


class GraphedStep:
    """Calls of a program with inputs that stay where they are, but for those at `moving`."""

    def __init__(self, program: Run, moving: Sequence[int], device: Device | None = None) -> None:
        self.program, self.moving = program, moving
        self.device: Device = device or Cuda()
        self._recording: Recording | None = None
        self._tried = False

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if self.device.capturing():
            return self.program(*inputs)
        if not self._tried:
            self._tried = True
            results, self._recording = record(self.program, inputs, self.moving, self.device)
            return results
        if self._recording is None or self._recording.stream != self.device.stream():
            return self.program(*inputs)
        return self._recording.replay(inputs)
