"""Which configuration a launcher takes: kept, default, or searched in bounded time. Timer and device are injected."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from llmcomp.codegen import launcher as subject
from llmcomp.codegen.build import Source
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.launch import REGISTERS, Config, Points, power
from llmcomp.codegen.launcher import KERNEL_SECONDS, REMEMBERED, Launcher, Tuner

CANDIDATES = tuple(Config((("BLOCK", block),)) for block in (128, 256, 512, 1024))
DEFAULT, BEST = CANDIDATES[3], CANDIDATES[2]
SECONDS = {128: 4.0, 256: 2.0, 512: 1.0, 1024: 3.0}
SOURCE = Source("kernel", "triton", "text")


class Gpu:
    """A module whose launches take the time that SECONDS says; measuring one takes `measuring` seconds."""

    def __init__(self, measuring: float = 0.1, too_large: Sequence[int] = ()) -> None:
        self.now, self.measuring, self.too_large = 0.0, measuring, too_large
        self.launches: list[tuple[int, Any]] = []

    def launch(
        self, buffers: Sequence[torch.Tensor], sizes: Sequence[int], config: Config, status: torch.Tensor | None
    ) -> list[SimpleNamespace]:
        if config["BLOCK"] in self.too_large:
            raise triton.OutOfResources(2, 1, "shared memory")
        self.launches.append((config["BLOCK"], status))
        buffers[0].add_(1)
        return [SimpleNamespace(n_spills=self.spills(config))]

    def spills(self, config: Config) -> int:
        return 0

    def timer(self, device: torch.device) -> Callable[[Callable[[], None]], float]:
        def time(launch: Callable[[], None]) -> float:
            launch()
            self.now += self.measuring
            return SECONDS[self.launches[-1][0]]

        return time

    @property
    def blocks(self) -> list[int]:
        """The configurations launched so far, by their block."""
        return [block for block, _ in self.launches]

    def module(self) -> Any:
        return SimpleNamespace(
            extents=lambda sizes: Points(sizes[0]),
            default=lambda sizes: DEFAULT,
            configs=lambda sizes: CANDIDATES,
            launch=self.launch,
        )

    def tuner(self, cache: Path, seconds: float) -> Tuner:
        return Tuner(Cache(cache), seconds, lambda device: "H100", self.timer, lambda: self.now)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "gpu_of", lambda buffers: torch.device("cuda"))


def launcher(gpu: Gpu, cache: Path, seconds: float) -> Launcher:
    return Launcher(SOURCE, gpu.module(), [0], gpu.tuner(cache, seconds))


def test_nothing_is_searched_unless_asked(tmp_path: Path) -> None:
    gpu, x = Gpu(), torch.zeros(3)
    launch = launcher(gpu, tmp_path, 0.0)
    for size in (5, 5, 900):
        launch([x], [size])
    assert gpu.blocks == [1024] * 3 and x[0] == 3 and not list(tmp_path.iterdir())


def test_a_search_is_kept_and_works_on_copies(tmp_path: Path) -> None:
    gpu, x = Gpu(), torch.zeros(3)
    word = torch.zeros(1)
    launcher(gpu, tmp_path, 60.0)([x], [1000], word)
    assert gpu.blocks == [1024, 128, 256, 512, 512], "the default first, then the others, then the best on x itself"
    assert x[0] == 1 and gpu.launches[-1][1] is word
    other = Gpu()
    launcher(other, tmp_path, 0.0)([x], [600])  # another process, the same class, no time to search
    assert other.blocks == [512]
    launcher(other, tmp_path, 0.0)([x], [3000])
    assert other.blocks == [512, 1024]


def test_a_class_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(subject, "find", lambda source, shape, cache, device: looked.append(str(shape)))
    launch = launcher(Gpu(), tmp_path, 0.0)
    for size in (513, 600, 700, 600, 1025):
        launch([torch.zeros(1)], [size])
    assert looked == ["1024", "2048"]


def test_a_program_stops_when_its_seconds_are_spent(tmp_path: Path) -> None:
    gpu, x = Gpu(measuring=1.0), torch.zeros(1)
    tuner = gpu.tuner(tmp_path, 6.5)
    one, two = (Launcher(Source(name, "triton", name), gpu.module(), [0], tuner) for name in ("one", "two"))
    one([x], [100])
    assert gpu.blocks == [1024, 128, 256, 512, 512] and len(list(tmp_path.iterdir())) == 1
    two([x], [100])
    assert gpu.blocks[5:] == [1024, 128, 256, 256], "what was found in the time left"
    assert len(list(tmp_path.iterdir())) == 1, "but not kept: it was cut short"
    two([x], [5000])
    assert gpu.blocks[-1] == 1024 and tuner.seconds <= 0


def test_a_kernel_may_not_take_all_the_time(tmp_path: Path) -> None:
    gpu = Gpu(measuring=0.7 * KERNEL_SECONDS)
    launcher(gpu, tmp_path, 1000.0)([torch.zeros(1)], [100])
    assert gpu.blocks == [1024, 128, 1024], "two candidates, then the better"


def test_what_does_not_fit_is_replaced(tmp_path: Path) -> None:
    gpu = Gpu(too_large=(1024, 128))
    launch = launcher(gpu, tmp_path, 0.0)
    launch([torch.zeros(1)], [100])
    launch([torch.zeros(1)], [100])
    assert gpu.blocks == [256, 256]
    none = Gpu(too_large=(128, 256, 512, 1024))
    with pytest.raises(triton.OutOfResources):
        launcher(none, tmp_path, 0.0)([torch.zeros(1)], [100])


class Spilling(Gpu):
    """Spills but under a limit of 168 registers, and does not run under one of 255."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always, self.limits = always, []

    def spills(self, config: Config) -> int:
        self.limits.append(config.registers)
        if config.registers == 255:
            raise triton.OutOfResources(2, 1, "registers")
        return 4 if self.always or config.registers != 168 else 0


def test_registers_are_limited_where_they_spill(tmp_path: Path) -> None:
    gpu, x = Spilling(), torch.zeros(1)
    launch = launcher(gpu, tmp_path, 0.0)
    launch([x], [100])
    launch([x], [100])
    assert gpu.limits == [0, 0, 255, 168, 168] and x[0] == 2, "tried on copies"
    none = Spilling(always=True)
    launch = launcher(none, tmp_path, 0.0)
    launch([x], [100])
    launch([x], [100])
    assert none.limits == [0, *REGISTERS, 0], "nothing helps: as it was"


def test_nothing_is_timed_while_a_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "capturing", lambda: True)
    gpu = Gpu()
    launcher(gpu, tmp_path, 60.0)([torch.zeros(1)], [100])
    assert gpu.blocks == [1024]


def test_memory_does_not_grow_with_the_sizes_seen(tmp_path: Path) -> None:
    launch = launcher(Gpu(), tmp_path, 0.0)
    for size in range(3 * REMEMBERED):
        launch([torch.zeros(1)], [size])
    assert len(launch._configs) <= REMEMBERED and len(launch._classes) <= power(3 * REMEMBERED).bit_length()


def test_copies_keep_their_strides() -> None:
    x = torch.arange(24.0).view(4, 6)[:, ::2]
    copy = subject.copied(x)
    assert copy.stride() == x.stride() and torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()


def test_without_a_gpu_the_default_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gpu = Gpu()
    launcher(gpu, tmp_path, 60.0)([torch.zeros(1)], [100])
    assert gpu.blocks == [1024] and not list(tmp_path.iterdir())
