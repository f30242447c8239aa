"""passes/parts.py: what shows a part of a linear layer, computed as a layer of its own, is what it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmcomp.capture import capture
from llmcomp.graph import replace, text, val
from llmcomp.passes import recognizing
from llmcomp.passes.base import run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.narrow import Indices, alone
from llmcomp.passes.parts import part_of, parts_of
from llmcomp.products import LINEAR
from tests.graphs import close, run

torch.manual_seed(0)
QKV = nn.Linear(8, 96).double()
X = torch.randn(2, 5, 8, dtype=torch.float64)
Tensors = tuple[Tensor, ...]


def halves(x: Tensor) -> Tensors:
    gate, up = QKV(x).chunk(2, -1)
    return gate.sin(), up.cos()


def bloom(x: Tensor) -> Tensors:
    made = QKV(x).view(*x.shape[:2], 4, 3, 8)
    return made[..., 0, :].transpose(1, 2).sin(), made[..., 1, :].sin(), made[..., 2, :].sin()


def neox(x: Tensor) -> Tensors:
    q, k, v = QKV(x).view(*x.shape[:2], 4, 24).transpose(1, 2).chunk(3, -1)
    return q[..., :3].sin(), q[..., 3:].sin(), k.sin(), v.sin()


def falcon(x: Tensor) -> Tensors:
    made = QKV(x).view(*x.shape[:2], 2, 6, 8)
    return made[:, :, :, :-2].flatten(2, 3).sin(), made[:, :, :, -2].sin(), made[:, :, :, [-1]].sin()


def moved(x: Tensor) -> Tensors:
    """A permutation of three axes."""
    made = QKV(x).view(*x.shape[:2], 4, 3, 8).transpose(2, 4).transpose(1, 2)
    return tuple(made.select(3, i).sin() for i in range(3))


def unbound(x: Tensor) -> Tensors:
    q, k, v = QKV(x).view(*x.shape[:2], 4, 3, 8).unbind(-2)
    return q.transpose(1, 2).sin(), k.sin(), v.sin()


def steps(x: Tensor) -> Tensors:
    made = QKV(x)
    return made[..., ::2].sin(), made[..., 1::2].sin()


def scalar(x: Tensor) -> Tensors:
    """A gate of one number for each token beside the rest."""
    made = QKV(x)
    return made[..., :95].sin(), made[..., -1].sin()


def returned(x: Tensor) -> Tensors:
    made = QKV(x)
    return made[..., :32].sin(), made[..., 32:].unflatten(-1, (4, 16))


def pieces(fn: Callable[[Tensor], Tensors], dynamic: bool = False) -> tuple[str, list[int] | None]:
    """The graph with a layer for each part, checked; and how many outputs each part has."""
    gm = capture(fn, X, dynamic=dynamic)
    before = run(gm)
    run_passes(gm, recognizing(), frozenset({SHAPES}))
    (linear,) = gm.graph.find_nodes(op="call_function", target=LINEAR)
    found = parts_of(linear)
    for node in found or ():
        part = part_of(node)
        assert part is not None
        with gm.graph.inserting_before(node):
            new = alone(part, Indices(gm.graph))
        assert val(new).shape == val(node).shape
        replace(node, new)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    for a, b in zip(run(gm), before, strict=True):
        close(a, b, 1e-13)
    sizes = [val(n).shape[-1] for n in gm.graph.find_nodes(op="call_function", target=LINEAR)]
    return text(gm.graph), None if found is None else sorted(int(n) for n in sizes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn,sizes",
    [
        (halves, [48, 48]),
        (bloom, [32, 32, 32]),
        (neox, [32, 32, 32]),
        (falcon, [16, 16, 64]),
        (moved, [32, 32, 32]),
        (unbound, [32, 32, 32]),
        (steps, [48, 48]),
        (scalar, [1, 95]),
    ],
)
def test_parts_are_layers(fn: Callable[[Tensor], Tensors], sizes: list[int], dynamic: bool) -> None:
    assert pieces(fn, dynamic)[1] == sizes


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (QKV(x)[..., :32].sin(), QKV(x).sin()),
        lambda x: (QKV(x).view(2, 5, 4, 24)[..., :8].sin(), QKV(x).view(10, 96).sum(0)),
        lambda x: (QKV(x).view(10, 96)[:, :8].sin(), QKV(x)[..., 8:].sin()),
        lambda x: (QKV(x).view(5, 2, 96)[..., :8].sin(), QKV(x)[..., 8:].sin()),
        lambda x: (QKV(x)[:, :2].sin(), QKV(x)[:, 2:].sin()),
        returned,
    ],
    ids=[
        "all of it",
        "the other view",
        "rows and columns",
        "other rows",
        "some tokens",
        "strides that the caller sees",
    ],
)
def test_what_is_read_whole(fn: Callable[[Tensor], Tensors]) -> None:
    assert pieces(fn)[1] is None


def test_only_the_first_is_a_part() -> None:
    """What is cut off a part is left to what computes the part."""
    gm = capture(neox, X)
    run_passes(gm, recognizing(), frozenset({SHAPES}))
    assert sum(part_of(node) is not None for node in gm.graph.nodes) == 3
