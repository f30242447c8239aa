"""codegen/lower_contract.py: where the columns of a layer are cut for those who read some of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcomp.codegen.describe import describe
from llmcomp.codegen.fit import Lowerer
from llmcomp.passes import pipeline
from llmcomp.passes.base import run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.partition import read_partition
from llmcomp.target import H100
from tests.graphs import capture


def test_columns_are_cut_where_a_reader_begins() -> None:
    def fn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, weight)
        return y, torch.relu(y[:, 16:])

    gm, lowerer = capture(fn, torch.randn(5, 24), torch.randn(48, 24)), Lowerer()
    run_passes(gm, pipeline(H100, lowerer.fits), frozenset({SHAPES}))
    found = read_partition(gm.graph)
    (kernel,) = [lowerer.lower(r, found.inlined).kernel for r in found.regions if r.family == "contract"]
    text = describe(kernel)
    assert "section n < 16\n    acc = operand . weight_ptr[row n]\n" in text
    assert "section n < 32\n    acc_1 = operand . weight_ptr[row n + 16]\n" in text
    assert text.count("operand . weight_ptr") == 2, "no column is computed twice"


@pytest.mark.parametrize("first", [True, False])
def test_columns_that_no_layer_computes_are_of_another_kernel(first: bool) -> None:
    def fn(x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, weight)
        return torch.relu(z), torch.cat([z, y] if first else [y, z], -1)

    inputs = torch.randn(5, 24), torch.randn(48, 24), torch.randn(5, 48)
    gm, lowerer = capture(fn, *inputs), Lowerer()
    run_passes(gm, pipeline(H100, lowerer.fits), frozenset({SHAPES}))
    found = read_partition(gm.graph)
    (kernel,) = [lowerer.lower(r, found.inlined).kernel for r in found.regions if r.family == "contract"]
    assert "section n < 48\n    acc = operand . weight_ptr[row n]\n" in describe(kernel)
    assert [r.family for r in found.regions] == ["contract", "map"]
    for ours, eager in zip(torch.compile(fn, backend="llmcomp")(*inputs), fn(*inputs), strict=True):
        torch.testing.assert_close(ours, eager)
