"""canonicalize: no-ops go, chains merge, and what the caller can tell apart stays apart."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.graph import text
from llmcomp.passes.base import run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from tests.graphs import Function, capture, rewrite

Tensors = tuple[Tensor, ...]


def canonical(fn: Function, *inputs: object, dynamic: bool | None = None) -> str:
    return rewrite(fn, inputs, CANONICALIZE, dynamic=dynamic)[0]


@pytest.mark.parametrize("dynamic", [None, True])
def test_what_changes_nothing_goes(dynamic: bool | None) -> None:
    def fn(x: Tensor, i: Tensor) -> Tensors:
        y = F.dropout(x.exp(), 0.3, training=False).detach().clone() * 1.0 / 1
        y = y.transpose(0, 1).transpose(1, 0).expand(y.shape)[0:].unsqueeze(0).squeeze(0).to(x.dtype)
        return y.view(x.shape).sin(), ((i + 0) * 1 - 0).abs()

    printed = canonical(fn, torch.randn(3, 4), torch.arange(3), dynamic=dynamic)
    assert [line.split(" = ")[1].split("(")[0] for line in printed.splitlines()[1:-1]] == [
        "aten.exp",
        "aten.sin",
        "aten.abs",
    ]


def test_a_constant_index_is_a_slice() -> None:
    def fn(x: Tensor) -> Tensors:
        return x[:, [1]].sin(), x[:, [-1]].sin(), x[[0]].sin()

    assert_expected_inline(
        canonical(fn, torch.randn(3, 4)),
        """\
def (x0: f32[3, 4])
slice: f32[3, 1] = aten.slice(x0, 1, 1, 2)
clone: f32[3, 1] = aten.clone(slice, memory_format=torch.contiguous_format)
sin: f32[3, 1] = aten.sin(clone)
slice_1: f32[3, 1] = aten.slice(x0, 1, -1, 9223372036854775807)
clone_1: f32[3, 1] = aten.clone(slice_1, memory_format=torch.contiguous_format)
sin_1: f32[3, 1] = aten.sin(clone_1)
slice_2: f32[1, 4] = aten.slice(x0, 0, 0, 1)
sin_2: f32[1, 4] = aten.sin(slice_2)
return (sin, sin_1, sin_2)""",
    )


def test_other_indices_stay() -> None:
    def fn(x: Tensor, i: Tensor) -> Tensors:
        return x[:, [1, 2]].sin(), x[:, i].sin(), x[[0], [1]].sin(), x[:, :1][:, torch.tensor([[0]])].sin()

    assert canonical(fn, torch.randn(3, 4), torch.tensor([1])).count("aten.index(") == 4


def test_what_only_looks_like_nothing_stays() -> None:
    def fn(x: Tensor, i: Tensor) -> Tensors:
        square = x.t().exp()
        return square.t().sin(), (x + 0).sin(), (i * 1.0).sin(), x[:, 1:].sin(), x.view(torch.int32).abs()

    assert_expected_inline(
        canonical(fn, torch.randn(4, 4), torch.arange(3)),
        """\
def (x0: f32[4, 4], x1: i64[3])
t: f32[4, 4] = aten.t(x0)
exp: f32[4, 4] = aten.exp(t)
t_1: f32[4, 4] = aten.t(exp)
sin: f32[4, 4] = aten.sin(t_1)
add: f32[4, 4] = aten.add(x0, 0)
sin_1: f32[4, 4] = aten.sin(add)
mul: f32[3] = aten.mul(x1, 1.0)
sin_2: f32[3] = aten.sin(mul)
slice: f32[4, 3] = aten.slice(x0, 1, 1, 9223372036854775807)
sin_3: f32[4, 3] = aten.sin(slice)
view: i32[4, 4] = aten.view(x0, i32)
abs: i32[4, 4] = aten.abs(view)
return (sin, sin_1, sin_2, sin_3, abs)""",
    )


def test_views_of_views_merge() -> None:
    def fn(x: Tensor) -> Tensors:
        y = x.exp().view(-1, 4).view(2, 12).view(6, 4)
        return y.sin(), (y.view(24) @ torch.ones(24)).view(1), y.t().reshape(3, 8).view(24).sin()

    assert_expected_inline(
        canonical(fn, torch.randn(2, 3, 4)),
        """\
def (x0: f32[2, 3, 4])
exp: f32[2, 3, 4] = aten.exp(x0)
view: f32[6, 4] = aten.view(exp, [6, 4])
sin: f32[6, 4] = aten.sin(view)
view_1: f32[24] = aten.view(exp, [24])
ones: f32[24] = aten.ones([24], device=cpu, pin_memory=False)
dot: f32[] = aten.dot(view_1, ones)
view_2: f32[1] = aten.view(dot, [1])
t: f32[4, 6] = aten.t(view)
clone: f32[4, 6] = aten.clone(t, memory_format=torch.contiguous_format)
view_3: f32[24] = aten.view(clone, [24])
sin_1: f32[24] = aten.sin(view_3)
return (sin, view_2, sin_1)""",
    )


def test_views_of_memory_that_is_not_contiguous_stay_valid() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.transpose(0, 1).view(4, 3, 1, 2).view(4, 3, 2).sin()

    assert "aten.view" not in canonical(fn, torch.randn(3, 4, 2))

    def split(x: Tensor) -> Tensor:
        return x.t().view(2, 2, 3).view(2, 2, 3, 1).sin()

    assert canonical(split, torch.randn(3, 4)).count("aten.view") == 2


def test_casts_merge_where_nothing_is_lost() -> None:
    def fn(x: Tensor, y: Tensor, i: Tensor) -> Tensors:
        kept = x.float().bfloat16().sin(), x.float().double().sin(), i.long().int().abs()
        return *kept, y.bfloat16().float().sin(), y.half().bfloat16().sin(), i.float().int().abs()

    inputs = torch.randn(3).bfloat16(), torch.randn(3), torch.arange(3).int()
    assert_expected_inline(
        canonical(fn, *inputs),
        """\
def (x0: bf16[3], x1: i32[3], x2: f32[3])
sin: bf16[3] = aten.sin(x0)
_to_copy: f64[3] = aten._to_copy(x0, dtype=f64)
sin_1: f64[3] = aten.sin(_to_copy)
abs: i32[3] = aten.abs(x1)
_to_copy_1: bf16[3] = aten._to_copy(x2, dtype=bf16)
_to_copy_2: f32[3] = aten._to_copy(_to_copy_1, dtype=f32)
sin_2: f32[3] = aten.sin(_to_copy_2)
_to_copy_3: f16[3] = aten._to_copy(x2, dtype=f16)
_to_copy_4: bf16[3] = aten._to_copy(_to_copy_3, dtype=bf16)
sin_3: bf16[3] = aten.sin(_to_copy_4)
_to_copy_5: f32[3] = aten._to_copy(x1, dtype=f32)
_to_copy_6: i32[3] = aten._to_copy(_to_copy_5, dtype=i32)
abs_1: i32[3] = aten.abs(_to_copy_6)
return (sin, sin_1, abs, sin_2, sin_3, abs_1)""",
    )


def test_appending_to_an_empty_cache_is_the_value() -> None:
    def fn(x: Tensor) -> Tensors:
        key = torch.cat([torch.tensor([]), x.exp()], dim=-2)
        moved = torch.cat([torch.tensor([]), x.sin().transpose(1, 2)], dim=-2)
        return key, moved, (key + 1).sum()

    assert_expected_inline(
        canonical(fn, torch.randn(2, 3, 4)),
        """\
def (x0: f32[2, 3, 4])
exp: f32[2, 3, 4] = aten.exp(x0)
sin: f32[2, 3, 4] = aten.sin(x0)
transpose: f32[2, 4, 3] = aten.transpose(sin, 1, 2)
clone: f32[2, 4, 3] = aten.clone(transpose, memory_format=torch.contiguous_format)
add: f32[2, 3, 4] = aten.add(exp, 1)
sum: f32[] = aten.sum(add)
return (exp, clone, sum)""",
    )


def test_joins_of_several_parts_stay() -> None:
    def fn(x: Tensor) -> Tensors:
        y = x.exp()
        return torch.cat([y, y]), torch.cat([y[:0], y, x[:0], x])

    assert canonical(fn, torch.randn(2, 3)).count("aten.cat") == 2


def aliases(outputs: Tensors, *inputs: Tensor) -> list[int]:
    """For each result the index of the first input or result that has its memory."""
    storages = [t.untyped_storage().data_ptr() for t in (*inputs, *outputs)]
    return [storages.index(s) for s in storages[len(inputs) :]]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x.clone(),),
        lambda x: (x * 1.0,),
        lambda x: (x.view(-1).clone().view(3, 4),),
        lambda x: (y := x.exp(), y.clone()),
        lambda x: (y := x.exp(), y.t().clone().t()),
        lambda x: ((y := x.exp()).clone(), y * 1.0),
        lambda x: (torch.cat([x, torch.tensor([])]), torch.cat([torch.tensor([]), x])),
        lambda x: (x.exp()[1].clone(),),
    ],
)
def test_results_share_memory_only_where_they_did(fn: Function) -> None:
    gm = capture(fn, x := torch.randn(3, 4))
    before = gm(x)
    run_passes(gm, [CANONICALIZE], frozenset({SHAPES}))
    after = gm(x)
    assert aliases(after, x) == aliases(before, x), text(gm.graph)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()


def test_results_are_tensors_of_their_own() -> None:
    gm = capture(lambda x: (x.detach(), y := x.exp(), y.detach()), torch.randn(3))
    run_passes(gm, [CANONICALIZE], frozenset({SHAPES}))
    x = torch.randn(3)
    assert len({id(x), *map(id, gm(x))}) == len(gm(x)) + 1, text(gm.graph)


def test_copies_of_memory_that_is_written_stay() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        old = x.clone()
        x.copy_(y)
        return old.sin()

    printed, _ = rewrite(fn, (torch.randn(3), torch.randn(3)), CANONICALIZE)
    assert_expected_inline(
        printed,
        """\
def (x0: f32[3], x1: f32[3])
clone: f32[3] = aten.clone(x0)
sin: f32[3] = aten.sin(clone)
copy_: f32[3] = aten.copy_(x0, x1)
return (sin)""",
    )


def test_rewrites_are_counted_and_repeat_finds_none() -> None:
    def fn(x: Tensor) -> Tensor:
        return (x.clone().exp() * 1.0).sin()

    gm = capture(fn, torch.randn(3))
    first, second = run_passes(gm, [CANONICALIZE, CANONICALIZE], frozenset({SHAPES}))
    assert (first.report.rewrites, second.report.rewrites) == (2, 0)
