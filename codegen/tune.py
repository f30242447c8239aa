"""The launch configuration that is fastest on this GPU, searched in bounded time and kept in the cache folder.

    configs(sizes) -> search -> keep: tuned_<kernel>_<hash>.json -> find

A result holds for a kernel (its text), a device, and a class of shapes. launcher.py decides when to search.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from triton.compiler.errors import CompilationError

from llmcomp.codegen.build import Source
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.launch import Config, power

# Seconds of a launch; raises what Triton raises for a configuration that the device cannot run.
Timer = Callable[[Callable[[], None]], float]
REPETITIONS = 20
# What Triton raises for a configuration that does not compile, or that the device has no room for.
UNFIT = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, CompilationError)


@dataclass(frozen=True)
class Tuning:
    """What a search found: the best configuration, its time, and how many of the candidates were timed."""

    config: Config
    seconds: float
    timed: int
    candidates: int


@dataclass(frozen=True)
class ShapeClass:
    """Shapes that share a result: equal but for rounding up to powers of two, with the same default.

    The default decides the form of the kernel and the blocks that have to cover something whole: a configuration
    that is right for one shape of a class is right for all.
    """

    extents: tuple[int, ...]
    default: Config

    def __str__(self) -> str:
        return "-".join(map(str, self.extents))


def shape_class(extents: Sequence[int], default: Config) -> ShapeClass:
    """The class of a shape.

    >>> str(shape_class((5, 2048, 1), Config(())))
    '8-2048-1'
    """
    return ShapeClass(tuple(power(n) for n in extents), default)


def search(
    candidates: Sequence[Config],
    launch: Callable[[Config], None],
    timer: Timer,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning | None:
    """Time the candidates in order for at most `budget` seconds (the one under way is finished).

    Candidates that do not compile or do not fit on the device are passed over. None if there was none to time.
    """
    best: tuple[float, Config] | None = None
    timed, end = 0, clock() + budget
    for config in candidates:
        if clock() >= end:
            break
        seconds = _time(config, launch, timer)
        if seconds is None:
            continue
        timed += 1
        if best is None or seconds < best[0]:
            best = seconds, config
    return Tuning(best[1], best[0], timed, len(candidates)) if best else None


def _time(config: Config, launch: Callable[[Config], None], timer: Timer) -> float | None:
    try:
        return timer(lambda: launch(config))
    except UNFIT:
        return None


def gpu_timer(device: torch.device) -> Timer:
    """Median time of a launch on the current stream, the L2 cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def timer(launch: Callable[[], None]) -> float:
        launch()  # compiles
        times = []
        for _ in range(REPETITIONS):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize(device)
        return float(sorted(start.elapsed_time(end) for start, end in times)[REPETITIONS // 2]) / 1e3

    return timer


def find(source: Source, shape: ShapeClass, cache: Cache, device: str) -> Config | None:
    """The configuration that an earlier search kept, or None; a damaged file counts as none."""
    path = cache.find(_filename(source, shape, device), lambda data: _parse(data) is not None)
    return _parse(path.read_bytes()) if path else None


def keep(source: Source, shape: ShapeClass, cache: Cache, device: str, config: Config) -> None:
    """Write the result of a search. Raises CacheError where no folder takes it."""
    record = {
        "kernel": source.name,
        "device": device,
        "shape": str(shape),
        "blocks": dict(config.blocks),
        "warps": config.warps,
        "stages": config.stages,
        "form": config.form,
        "registers": config.registers,
    }
    cache.write(_filename(source, shape, device), json.dumps(record, indent=1).encode())


def _filename(source: Source, shape: ShapeClass, device: str) -> str:
    parts = (source.text, device, shape, triton.__version__, torch.__version__)
    return f"tuned_{source.name}_{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.json"


def _parse(data: bytes) -> Config | None:
    try:
        record = json.loads(data)
        blocks = tuple((str(k), int(v)) for k, v in record["blocks"].items())
        warps, stages, registers = (int(record[n]) for n in ("warps", "stages", "registers"))
        return Config(blocks, warps, stages, str(record["form"]), registers)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
