"""share: equal calls become one, unless something outside or in memory tells them apart."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.graph import insert, source, text
from llmcomp.passes.base import run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.share import SHARE
from tests.graphs import capture, rewrite

Tensors = tuple[Tensor, ...]


def test_equal_calls_become_one() -> None:
    def fn(x: Tensor) -> Tensor:
        mask = torch.arange(4)[None, :] <= torch.arange(4)[:, None]
        return torch.where(mask, x.exp() + x.exp(), x.exp().mean(1, keepdim=True))

    printed, (result,) = rewrite(fn, (torch.randn(4, 4),), SHARE)
    assert_expected_inline(
        printed,
        """\
def (x0: f32[4, 4])
arange: i64[4] = aten.arange(4, device=cpu, pin_memory=False)
unsqueeze: i64[1, 4] = aten.unsqueeze(arange, 0)
unsqueeze_1: i64[4, 1] = aten.unsqueeze(arange, 1)
le: bool[4, 4] = aten.le(unsqueeze, unsqueeze_1)
exp: f32[4, 4] = aten.exp(x0)
add: f32[4, 4] = aten.add(exp, exp)
mean: f32[4, 1] = aten.mean(exp, [1], True)
where: f32[4, 4] = aten.where(le, add, mean)
return (where)""",
    )
    assert result.report.rewrites == 3


def test_arguments_of_another_type_are_other_arguments() -> None:
    def fn(i: Tensor) -> Tensor:
        return (i * 1).sum() + (i * 1.0).sum() + (i * True).sum()

    assert rewrite(fn, (torch.arange(3),), SHARE)[0].count("aten.mul") == 3


def test_results_stay_two() -> None:
    printed, _ = rewrite(lambda x: (x.exp(), x.exp()), (torch.randn(3),), SHARE)
    assert printed.count("aten.exp") == 2


def test_a_result_may_serve_inside() -> None:
    printed, _ = rewrite(lambda x: (x.exp(), x.exp().sin()), (torch.randn(3),), SHARE)
    assert printed.count("aten.exp") == 1


def test_buffers_and_random_numbers_stay_two() -> None:
    def fn(x: Tensor) -> Tensors:
        keys, values = torch.zeros(8), torch.zeros(8)
        return keys + x, values - x, torch.rand_like(x) - torch.rand_like(x)

    gm = capture(fn, torch.randn(8))
    (result,) = run_passes(gm, [SHARE], frozenset({SHAPES}))
    assert result.report.rewrites == 0, text(gm.graph)


def test_copies_are_shared_unless_one_is_written() -> None:
    gm = capture(lambda x: (x.clone() + 1, x.clone() + 2, x.clone() + 3), torch.randn(8))
    third = [n for n in gm.graph.nodes if n.target is torch.ops.aten.clone.default][2]
    with gm.graph.inserting_before(next(iter(third.users))):
        insert(gm.graph, torch.ops.aten.copy_.default, third, source(third))
    (result,) = run_passes(gm, [SHARE], frozenset({SHAPES}))
    assert result.report.rewrites == 1, text(gm.graph)


def test_what_reads_written_memory_stays_two() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        before = x.exp()
        x.add_(y)
        return before + x.exp()

    printed, _ = rewrite(fn, (torch.randn(3), torch.randn(3)), SHARE)
    assert printed.count("aten.exp") == 2
