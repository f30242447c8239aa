"""Floats that a model keeps as attributes are constants of its graph; floats it is called with are not."""

import torch
from torch import Tensor, nn

from llmcomp.backend import llmcomp
from llmcomp.capture import capture
from llmcomp.graph import text


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 3.5

    def forward(self, x: Tensor, temperature: float) -> Tensor:
        return x * (self.scale * 2) / temperature


def test_attribute_is_constant_and_argument_is_input() -> None:
    printed = text(capture(Scaled(), torch.ones(3), 0.7, dynamic=True).graph)
    assert "aten.mul(x1, 7.0)" in printed, printed
    assert "0.7" not in printed


def test_changed_attribute_is_seen() -> None:
    torch._dynamo.reset()
    model, x = Scaled(), torch.ones(3)
    fast = torch.compile(model, backend=llmcomp, dynamic=True)
    with torch.no_grad():
        assert torch.equal(fast(x, 0.5), model(x, 0.5))
        model.scale = 4.0
        assert torch.equal(fast(x, 0.5), model(x, 0.5))
