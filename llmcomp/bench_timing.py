"""How long a device takes for a call, without what launching it costs the host; and the device's own limits.

    seconds = device_time([lambda: f(x, w0), lambda: f(x, w1), ...], "cuda")

The calls are captured into one CUDA graph, which is replayed; several with weights of their own keep these out of the
cache. Without a GPU they are timed one after the other.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Call = Callable[[], object]
ROUNDS = 15
COLD_BYTES = 512 << 20  # weights that are read in turns: many times what the caches of a GPU hold


@dataclass(frozen=True)
class Limits:
    """What a device reaches: bytes read per second, and floating point operations of a bfloat16 product."""

    read: float
    flops: float


def device_time(calls: Sequence[Call], device: str) -> float:
    """Seconds of one of `calls`, which run in turns: the median of ROUNDS rounds.

    Raises:
        RuntimeError: a call cannot be captured.
    """
    if device != "cuda":
        return statistics.median(_host_seconds(calls) for _ in range(3)) / len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, *calls[:2]):
            call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_replay_seconds(graph) for _ in range(ROUNDS)) / len(calls)


def _host_seconds(calls: Sequence[Call]) -> float:
    for call in calls[:1]:
        call()
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def copies(tensor_bytes: int, device: str) -> int:
    """How many weights of a size are read in turns."""
    return max(2, min(64, -(-COLD_BYTES // max(tensor_bytes, 1)))) if device == "cuda" else 2


@cache
def limits(device: str, tiny: bool = False) -> Limits:
    """The best of a few ways to read a large tensor, and a product of large matrices of random numbers."""
    count = (1 << 16) if tiny else (1 << 30)
    data = torch.ones(count, dtype=torch.bfloat16, device=device)
    floats, matrix, vector = data.view(torch.float32), data.view(-1, 4096), data[:4096]
    ways: list[Call] = [floats.sum, floats.amax, lambda: torch.mv(matrix, vector)]
    read = min(device_time([way], device) for way in ways)
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Limits(2 * count / read, 2 * n**3 / device_time([lambda: a @ b], device))


def error(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference, relative to that of `exact`."""
    found, exact = found.double(), exact.double()
    scale = exact.square().mean().sqrt().clamp_min(1e-30)
    return float((found - exact).square().mean().sqrt() / scale)
