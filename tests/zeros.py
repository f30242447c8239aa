"""Modules with zeros in their weights, and the pass that finds them: what the tests of pruning share."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from llmcomp.capture import capture
from llmcomp.graph import text
from llmcomp.passes import recognizing, shrink
from llmcomp.passes.base import Report, run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.prune import prune
from llmcomp.prepared import Split, split
from tests.graphs import Function, close, run


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), with residual."""

    def __init__(self, hidden: int = 32, inner: int = 64, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner, bias), nn.Linear(hidden, inner, bias)
        self.down = nn.Linear(inner, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return result


def drop(mlp: Mlp, channels: slice) -> None:
    """Set channels of an MLP to zero."""
    with torch.no_grad():
        mlp.down.weight[:, channels] = 0
        for maker in (mlp.gate, mlp.up):
            maker.weight[channels] = 0
            if maker.bias is not None:
                maker.bias[channels] = 0


def pruned(
    fn: Function,
    inputs: Sequence[Any],
    *,
    dynamic: bool = False,
    packs: bool = False,
    skips: int | None = None,
    rtol: float | None = None,
    gathers: bool = True,
) -> tuple[str, Report, Split]:
    """The text of the graph of `fn` after the pass, its report, the parts; all checked against the captured graph.

    `gathers`: however little that saves.
    """
    gm = capture(fn, *inputs, dynamic=dynamic)
    given = gm.meta["inputs"]
    names = (n.name for n in gm.graph.find_nodes(op="placeholder"))
    weights = {
        name: x
        for name, x in zip(names, given, strict=True)
        if isinstance(x, Tensor) and not any(x is i for i in inputs)
    }
    before, skips = run(gm), (2**31 if packs else 0) if skips is None else skips
    with patch.object(shrink, "GATHER", 0 if gathers else shrink.GATHER):
        results = run_passes(gm, (*recognizing(), prune(weights, packs, skips)), frozenset({SHAPES}))
    printed = text(gm.graph)
    same(run(gm), before, rtol)
    parts = split(gm)
    made = [piece.gm(*(given[i] for i in piece.positions)) for piece in parts.pieces]
    with torch.no_grad():
        same(parts.main(*given, *made), before, rtol)
    return printed.split("\n", 1)[1], results[-1].report, parts


def same(after: Sequence[Any], before: Sequence[Any], rtol: float | None = None) -> None:
    """Equal but for the order of sums, which float64 shows best (models of transformers round to float32 within)."""
    for a, b in zip(after, before, strict=True):
        close(a, b, rtol if rtol is not None or b.dtype != torch.float64 else 1e-13)
