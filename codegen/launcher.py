"""How a program launches a Triton kernel: with which configuration.

    kept from an earlier search  ->  the default for the shape, from the tables of launch.py
    with seconds left to search  ->  kept  ->  searched on copies of what the kernel writes, and kept

Nothing is searched unless the program was given seconds for it, and never for longer than that, but for the
candidate that is under way.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch

from llmcomp.codegen.build import Cache, Source
from llmcomp.codegen.launch import Config
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
        config = self._launch_fitting(self._choose(buffers, sizes), buffers, sizes, status)
        if len(self._configs) >= REMEMBERED:
            self._configs.clear()
        self._configs[key] = config

    def _launch_fitting(
        self, config: Config, buffers: Sequence[torch.Tensor], sizes: Sequence[int], status: torch.Tensor | None
    ) -> Config:
        """Launch, with another configuration where the device has no room for `config`."""
        try:
            self._module.launch(buffers, sizes, config, status)
            return config
        except UNFIT:
            candidates: Sequence[Config] = self._module.configs(sizes)
            for other in candidates:
                if self._runs(other, buffers, sizes, status):
                    return other
            raise

    def _runs(
        self, config: Config, buffers: Sequence[torch.Tensor], sizes: Sequence[int], status: torch.Tensor | None
    ) -> bool:
        try:
            self._module.launch(buffers, sizes, config, status)
        except UNFIT:
            return False
        return True

    def _choose(self, buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> Config:
        """The configuration for a class of shapes, looked up or searched when it is met first."""
        default: Config = self._module.default(sizes)
        shape, device = shape_class(self._module.extents(sizes), default), gpu_of(buffers)
        if device is None:
            return default
        with self._tuner.lock:
            if shape not in self._classes:
                kept = find(self._source, shape, self._tuner.cache, self._tuner.name(device))
                self._classes[shape] = kept or self._search(shape, buffers, sizes, device)
            return self._classes[shape]

    def _search(
        self, shape: ShapeClass, buffers: Sequence[torch.Tensor], sizes: Sequence[int], device: torch.device
    ) -> Config:
        tuner = self._tuner
        if tuner.seconds <= 0 or capturing():
            return shape.default
        copies = [copied(b) if i in self._written else b for i, b in enumerate(buffers)]
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
