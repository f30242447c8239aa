"""The launch configuration that is fastest on this GPU, searched once and kept in the cache folder.

    configs(sizes) -> search (bounded in time) -> tuned_<kernel>_<hash>.json -> launch(buffers, sizes, config)

A result holds for a kernel (its text), a device, and a class of shapes: all sizes rounded up to powers of two.
Nothing here runs by itself: a launcher without a configuration takes its default, with no search.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import triton

from llmcomp.codegen.build import Cache, Source
from llmcomp.codegen.launch import Config, power
from llmcomp.errors import BuildError

# Seconds of a launch; raises what Triton raises for a configuration that the device cannot run.
Timer = Callable[[Callable[[], None]], float]
REPETITIONS = 20


@dataclass(frozen=True)
class Tuning:
    """What a search found: the best configuration, its time, and how many of the candidates were timed."""

    config: Config
    seconds: float
    timed: int
    candidates: int


def shape_class(extents: Sequence[int]) -> str:
    """The class of shapes that share a result.

    >>> shape_class((5, 2048, 1))
    '8-2048-1'
    """
    return "-".join(str(power(n)) for n in extents)


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
    except (triton.OutOfResources, triton.compiler.errors.CompilationError, BuildError):
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


def tune(
    source: Source,
    module: ModuleType,
    buffers: Sequence[torch.Tensor],
    sizes: Sequence[int],
    cache: Cache,
    device: str,
    timer: Timer,
    budget: float,
) -> Config:
    """The configuration for a kernel and a class of shapes: the one in the cache, else searched and kept.

    `device` names the model of the device. The buffers are written; their values do not matter but for indices.
    """
    known = find(source, module.extents(sizes), cache, device)
    if known is not None:
        return known
    default, candidates = module.default(sizes), module.configs(sizes)
    ordered = [default, *(c for c in candidates if c != default)]
    found = search(ordered, lambda config: module.launch(buffers, sizes, config), timer, budget)
    config = found.config if found else default
    keep(source, module.extents(sizes), cache, device, config)
    return config


def find(source: Source, extents: Sequence[int], cache: Cache, device: str) -> Config | None:
    """The configuration that an earlier search kept, or None; a damaged file counts as none."""
    path = cache.find(_filename(source, extents, device), lambda data: _parse(data) is not None)
    return _parse(path.read_bytes()) if path else None


def keep(source: Source, extents: Sequence[int], cache: Cache, device: str, config: Config) -> None:
    """Write the result of a search. Raises CacheError where no folder takes it."""
    record = {
        "kernel": source.name,
        "device": device,
        "shape": shape_class(extents),
        "blocks": dict(config.blocks),
        "warps": config.warps,
        "stages": config.stages,
        "form": config.form,
    }
    cache.write(_filename(source, extents, device), json.dumps(record, indent=1).encode())


def _filename(source: Source, extents: Sequence[int], device: str) -> str:
    parts = (source.text, device, shape_class(extents), triton.__version__, torch.__version__)
    return f"tuned_{source.name}_{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.json"


def _parse(data: bytes) -> Config | None:
    try:
        record = json.loads(data)
        blocks = tuple((str(k), int(v)) for k, v in record["blocks"].items())
        return Config(blocks, int(record["warps"]), int(record["stages"]), str(record["form"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
