"""What is left after fusion becomes Map and Rows kernels; what no kernel can compute becomes an eager call."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.passes.groups import Fits, Groups
from llmcomp.passes.partition import partition, read_partition
from tests.graphs import capture
from tests.grouping import grouped


def only_partition(fits: Fits):  # type: ignore[no-untyped-def]
    return (partition(fits),)


def test_a_chain_is_one_kernel() -> None:
    text, (result,) = grouped(lambda x: (x * 2).relu().sum(-1), torch.randn(3, 4), passes=only_partition)
    assert_expected_inline(text, """rows: mul relu sum_1 -> sum_1""")
    assert result.report.rewrites == 2 and not result.report.near_misses


def test_a_value_in_between_is_stored_where_others_need_it() -> None:
    text, _ = grouped(lambda x: (x.exp(), x.exp().sum(-1)), torch.randn(3, 4), passes=only_partition)
    assert "-> exp" in text


def test_reductions_along_different_axes_stay_apart() -> None:
    text, _ = grouped(lambda x: x.sum(-1) * x.sum((-2, -1))[:, None], torch.randn(2, 3, 4), passes=only_partition)
    assert text.count("rows") == 2


def test_what_is_costly_is_not_repeated_for_a_broadcast() -> None:
    text, _ = grouped(lambda x, y: x.sin() * y, torch.randn(1, 8), torch.randn(64, 8), passes=only_partition)
    assert_expected_inline(
        text,
        """\
map: sin -> sin
map: mul -> mul""",
    )


def test_an_operator_without_a_rule_is_an_eager_call_with_the_reason() -> None:
    text, (result,) = grouped(lambda x: x.cumsum(0) + 1, torch.randn(4), passes=only_partition)
    assert_expected_inline(
        text,
        """\
extern: cumsum -> cumsum
map: add -> add""",
    )
    assert [m.reason for m in result.report.near_misses] == ["no rule for aten.cumsum.default; no reduction"]


def test_a_write_runs_after_the_reads_before_it() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.flip(0) * 2
        x.copy_(y + 1)
        return y

    text, _ = grouped(fn, torch.randn(4), passes=only_partition)
    assert text.splitlines()[-1].endswith("copy_")


@pytest.mark.parametrize("width", [1, 7])
def test_the_graph_is_unchanged(width: int) -> None:
    from llmcomp.codegen.fit import Lowerer
    from llmcomp.passes.base import run_passes
    from llmcomp.passes.facts import SHAPES
    from tests.graphs import run

    gm = capture(lambda x: torch.softmax(x * 2, -1), torch.randn(3, width))
    before, nodes = run(gm), len(gm.graph.nodes)
    run_passes(gm, (partition(Lowerer().fits),), frozenset({SHAPES}))
    torch.testing.assert_close(run(gm), before, rtol=0, atol=0)
    assert len(gm.graph.nodes) == nodes
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [n for r in read_partition(gm.graph).regions for n in r.nodes] == calls


def everything_assigned(fn: Callable[..., object], *inputs: object) -> Groups:
    gm = capture(fn, *inputs)
    return Groups(gm.graph)


def test_positions_are_recomputed_not_stored() -> None:
    groups = everything_assigned(lambda x: x + torch.arange(4)[None, :], torch.randn(3, 4))
    assert {n.name for n in groups.inlined} >= {"arange"}
