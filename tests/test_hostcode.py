"""The printed host function of a program."""

import torch

from llmcomp.report import GraphReport


def test_operators_called_like_what_the_text_calls(graphs: list[GraphReport]) -> None:
    """The node of aten.empty is called `empty`, as is what the host function makes its memory with."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.empty(2, 3).exponential_()
        return noise, (x @ x.t()).softmax(-1) @ x  # kernels, with results that only they see

    x = torch.randn(4, 8)
    noise, y = torch.compile(f, backend="llmcomp", fullgraph=True)(x)
    assert len(graphs) == 1 and any("empty" in e.op for e in graphs[0].program.externs) and graphs[0].program.kernels
    assert noise.shape == (2, 3) and bool((noise >= 0).all())
    torch.testing.assert_close(y, f(x)[1])
