"""Capture graphs as the backend sees them, and check what passes do to them: their text and their numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from llmcomp.capture import capture as capture_function
from llmcomp.graph import same_layout, text
from llmcomp.passes.base import Pass, PassResult, run_passes
from llmcomp.passes.facts import SHAPES

Function = Callable[..., Any]


def capture(fn: Function, *inputs: Any, dynamic: bool | None = None) -> GraphModule:
    """The inference graph of `fn(*inputs)`; `gm.meta["inputs"]` are its real inputs."""
    return capture_function(fn, *inputs, dynamic=dynamic)


def run(gm: GraphModule) -> tuple[Any, ...]:
    """Execute a captured graph on copies of its real inputs."""
    inputs = [x.clone() if isinstance(x, Tensor) else x for x in gm.meta["inputs"]]
    with torch.no_grad():
        return tuple(gm(*inputs))


def rewrite(
    fn: Function, inputs: Sequence[Any], *passes: Pass, dynamic: bool | None = None, rtol: float | None = None
) -> tuple[str, tuple[PassResult, ...]]:
    """Run `passes` over the graph of `fn(*inputs)`, check that it computes the same, return (text, reports).

    Results must agree in value, shape, dtype and strides. `rtol` is relative to the largest element; by
    default one rounding of the dtype for float32, and for narrower dtypes what a float64 evaluation allows
    (see `close`).
    """
    gm = capture(fn, *inputs, dynamic=dynamic)
    before = run(gm)
    results = run_passes(gm, passes, frozenset({SHAPES}))
    after = run(gm)
    assert len(before) == len(after)
    for a, b in zip(after, before, strict=True):
        if isinstance(b, Tensor):
            close(a, b, rtol)
        else:
            assert a == b
    return text(gm.graph), results


def close(actual: Tensor, expected: Tensor, rtol: float | None = None) -> None:
    """Assert agreement to a few roundings of the dtype, measured against the largest element."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert same_layout(actual, expected), f"strides {actual.stride()}, not {expected.stride()}"
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected)
        return
    largest = expected.abs().max().item() if expected.numel() else 0.0
    allowed = (4 * torch.finfo(expected.dtype).eps if rtol is None else rtol) * largest
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=allowed, equal_nan=True)
