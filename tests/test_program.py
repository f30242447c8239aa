"""A compiled program is called again and again: nothing piles up."""

import gc
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcomp.report import GraphReport

CALLS, WINDOWS = 10_000, 4


class Model(nn.Module):
    """All that a call may do: planned buffers, results, an eager call, a written input, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        self.seen += y.sum(0)
        order = y.sort(-1)
        return y, order.indices, order.values * torch.tensor([0.5, 2.0] * 4)


def blocks() -> int:
    """Live allocations of Python objects."""
    gc.collect()
    return sys.getallocatedblocks()


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_leaks(graphs: list[GraphReport]) -> None:
    fast = torch.compile(Model(), backend="llmcomp", dynamic=True)
    inputs = [torch.randn(n, 8) for n in (2, 3, 7, 40, 300)]

    def call(times: int) -> None:
        for i in range(times):
            fast(inputs[i % len(inputs)])

    # A leak grows in every window; what other tests of this process left behind comes and goes in some.
    seen = []
    with torch.no_grad():
        call(CALLS // 10)
        for _ in range(WINDOWS + 1):
            seen.append((blocks(), tensors(), resident()))
            call(CALLS // WINDOWS)
    objects, held, memory = (min(b - a for a, b in pairwise(numbers)) for numbers in zip(*seen, strict=True))
    assert len(graphs) == 1 and graphs[0].program.kernels and graphs[0].program.externs
    assert objects < CALLS / WINDOWS / 10, "Python objects"
    assert held <= 0, "tensors"
    assert memory < 100 * CALLS / WINDOWS, "bytes of memory"
