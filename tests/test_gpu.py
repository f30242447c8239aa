"""What only a GPU can show: streams that are not the default one, and a caller who captures us."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmcomp.report import GraphReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Block(nn.Module):
    """A norm, linear layers and an activation: several kernels that depend on each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block(256).to("cuda", torch.bfloat16)


def test_kernels_run_on_the_stream_of_the_caller(block: Block, graphs: list[GraphReport]) -> None:
    fast, x = torch.compile(block, backend="llmcomp"), torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        fast(x)
        expected = block(x + 1)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)  # a kernel on another stream would read the input before it is there
            late = x + 1
            got = fast(late)
            torch.cuda.current_stream().synchronize()
    assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert [g.program.target for g in graphs] == ["triton"] and graphs[0].program.kernels


def test_a_caller_captures_us(block: Block, graphs: list[GraphReport]) -> None:
    fast, x = torch.compile(block, backend="llmcomp"), torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fast(x)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = fast(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            captured.replay()
            assert_close(y, block(x), rtol=2e-2, atol=2e-2)
    assert [g.program.target for g in graphs] == ["triton"] and graphs[0].program.kernels


def test_a_caller_captures_us_in_mode_reduce_overhead(block: Block, graphs: list[GraphReport]) -> None:
    """Where we replay graphs of our own, a capture around us has to hold the kernels and not the replay."""
    fast = torch.compile(block, backend="llmcomp", mode="reduce-overhead")
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = fast(x)
        x.copy_(torch.randn_like(x))
        captured.replay()
        assert_close(y, block(x), rtol=2e-2, atol=2e-2)
    assert graphs
