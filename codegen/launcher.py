"""How a program launches a Triton kernel: with which configuration.

    kept from an earlier search  ->  the default for the shape, from the tables of launch.py
    with seconds left to search  ->  kept  ->  searched on copies of what the kernel writes, and kept

Nothing is searched unless the program was given seconds for it, and never for longer than that, but for the
candidate that is under way. Where a configuration does not fit on the device, the first that does is taken; where
registers spill, the first limit of registers under which they do not.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from llmcomp.codegen.build import Source
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.launch import REGISTERS, Config
from llmcomp.codegen.tune import UNFIT, ShapeClass, Timer, find, gpu_timer, keep, search, shape_class

# Of one kernel and class of shapes: candidates compile in about a second each.
KERNEL_SECONDS = 10.0
REMEMBERED = 1024  # sizes for which a launcher knows its configuration by heart


def gpu_of(buffers: Sequence[torch.Tensor]) -> torch.device | None:
    """The GPU on which the buffers of a kernel lie."""
    return next((b.device for b in buffers if b.device.type == "cuda"), None)


def gpu_name(device: torch.device) -> str:
    """The model of a GPU: results of searches hold for it."""
    return torch.cuda.get_device_name(device)


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph: nothing may be timed then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def spilled(compiled: Sequence[Any]) -> bool:
    """Whether a compiled kernel keeps registers in memory (the interpreter compiles nothing)."""
    return any(getattr(k, "n_spills", 0) for k in compiled)


def copied(buffer: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    return torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=buffer.device).copy_(buffer)


@dataclass
class Tuner:
    """What the launchers of a program share: where results are kept, and the seconds left to search."""

    cache: Cache
    seconds: float = 0.0
    name: Callable[[torch.device], str] = gpu_name
    timer: Callable[[torch.device], Timer] = gpu_timer
    clock: Callable[[], float] = time.monotonic
    lock: threading.Lock = field(default_factory=threading.Lock)


class Launcher:
    """Launches one kernel: `launcher(buffers, sizes, status)`. `written` are the positions of what it writes."""

    def __init__(self, source: Source, module: ModuleType, written: Sequence[int], tuner: Tuner) -> None:
        self._source = source
        self._module = module
        self._written = frozenset(written)
        self._tuner = tuner
        self._classes: dict[ShapeClass, Config] = {}
        self._configs: dict[tuple[int, ...], Config] = {}

    def __call__(
        self, buffers: Sequence[torch.Tensor], sizes: Sequence[int], status: torch.Tensor | None = None
    ) -> None:
        """Launch on the current stream.

        Raises:
            triton.OutOfResources: no configuration fits on the device.
        """
        key = tuple(sizes)
        config = self._configs.get(key)
        if config is not None:
            self._module.launch(buffers, sizes, config, status)
            return
        default: Config = self._module.default(sizes)
        shape = shape_class(self._module.extents(sizes), default)
        with self._tuner.lock:
            config = self._classes.get(shape)
            if config is None:
                config = self._classes[shape] = self._first_launch(shape, buffers, sizes, status)
            else:
                self._module.launch(buffers, sizes, config, status)
        if len(self._configs) >= REMEMBERED:
            self._configs.clear()
        self._configs[key] = config

    def _first_launch(
        self, shape: ShapeClass, buffers: Sequence[torch.Tensor], sizes: Sequence[int], status: torch.Tensor | None
    ) -> Config:
        """Choose a configuration for a class of shapes and launch with the first that the device has room for."""
        candidates = [self._choose(shape, buffers, sizes), *self._module.configs(sizes)]
        while True:
            config = candidates.pop(0)
            try:
                compiled = self._module.launch(buffers, sizes, config, status)
            except UNFIT:
                if candidates:
                    continue
                raise
            return self._without_spills(config, buffers, sizes) if spilled(compiled) else config

    def _without_spills(self, config: Config, buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> Config:
        """`config` with the first limit of registers under which none is spilled; as it is where there is none."""
        if capturing():
            return config
        copies = self._copies(buffers)
        for registers in REGISTERS:
            limited = replace(config, registers=registers)
            try:
                if not spilled(self._module.launch(copies, sizes, limited, None)):
                    return limited
            except UNFIT:
                pass
        return config

    def _copies(self, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Buffers on which a launch can be repeated."""
        return [copied(b) if i in self._written else b for i, b in enumerate(buffers)]

    def _choose(self, shape: ShapeClass, buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> Config:
        """The configuration that was kept for a class of shapes, or searched, or the default."""
        device = gpu_of(buffers)
        if device is None:
            return shape.default
        kept = find(self._source, shape, self._tuner.cache, self._tuner.name(device))
        return kept or self._search(shape, buffers, sizes, device)

    def _search(
        self, shape: ShapeClass, buffers: Sequence[torch.Tensor], sizes: Sequence[int], device: torch.device
    ) -> Config:
        tuner = self._tuner
        if tuner.seconds <= 0 or capturing():
            return shape.default
        copies = self._copies(buffers)
        candidates = [shape.default, *(c for c in self._module.configs(sizes) if c != shape.default)]
        start, budget = tuner.clock(), min(KERNEL_SECONDS, tuner.seconds)
        found = search(
            candidates,
            lambda config: self._module.launch(copies, sizes, config, None),
            tuner.timer(device),
            budget,
            tuner.clock,
        )
        tuner.seconds -= tuner.clock() - start
        if found is None:
            return shape.default
        if tuner.seconds > 0:  # else the search was cut short: another process may do better
            keep(self._source, shape, tuner.cache, tuner.name(device), found.config)
        return found.config
