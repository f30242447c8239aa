"""passes/recognize_cache.py: caches are written in place where nobody can tell."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import GraphModule

import llmcomp.ops  # noqa: F401
from llmcomp.graph import text
from llmcomp.passes.base import Report, run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.recognize_cache import RECOGNIZE_CACHE
from tests.graphs import capture

B, H, S, N, D = 2, 2, 8, 3, 4


def new(n: int = N) -> Tensor:
    return torch.arange(1.0, B * H * n * D + 1).view(B, H, n, D)


def cache(*shape: int) -> Tensor:
    return -torch.arange(1.0, B * H * S * D + 1).view(shape or (B, H, S, D))


def rewritten(fn: Callable[..., object], *inputs: object, dynamic: bool | None = None) -> tuple[GraphModule, Report]:
    """The graph of `fn` after the pass, which leaves the same results and the same inputs."""
    gm = capture(fn, *inputs, dynamic=dynamic)
    expected, results = called(gm), run_passes(gm, (RECOGNIZE_CACHE, CANONICALIZE), frozenset({SHAPES}))
    for a, b in zip(called(gm), expected, strict=True):
        assert a == b if not isinstance(b, Tensor) else torch.equal(a, b)
    return gm, results[0].report


def called(gm: GraphModule) -> Sequence[object]:
    """The results of a graph and its inputs after the call."""
    inputs = [x.clone() if isinstance(x, Tensor) else x for x in gm.meta["inputs"]]
    return [*gm(*inputs), *inputs]


def printed(fn: Callable[..., object], *inputs: object, dynamic: bool | None = None) -> str:
    gm, report = rewritten(fn, *inputs, dynamic=dynamic)
    assert report.near_misses == [] and report.rewrites > 0
    assert "scatter" not in text(gm.graph) and "index_" not in text(gm.graph)
    return text(gm.graph)


def missed(fn: Callable[..., object], *inputs: object) -> str:
    gm, report = rewritten(fn, *inputs)
    assert "cache_write_" not in text(gm.graph)
    (miss,) = report.near_misses
    return miss.reason


def test_static_cache_of_transformers():
    def fn(keys: Tensor, values: Tensor, length: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(N) + length
        length.add_(N)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, keys, values)

    assert_expected_inline(
        printed(fn, cache(), cache(), torch.tensor(2), new(), new(), new() + 1),
        """\
def (x0: i64[], x1: f32[2, 2, 8, 4], x2: f32[2, 2, 3, 4], x3: f32[2, 2, 8, 4], x4: f32[2, 2, 3, 4], x5: f32[2, 2, 3, 4])
arange: i64[3] = aten.arange(3, device=cpu, pin_memory=False)
add: i64[3] = aten.add(arange, x0)
add_1: i64[] = aten.add(x0, 3)
cache_write_ = llmcomp.cache_write_(x1, x2, add, 2)
cache_write__1 = llmcomp.cache_write_(x3, x4, add, 2)
scaled_dot_product_attention: f32[2, 2, 3, 4] = aten.scaled_dot_product_attention(x5, x1, x3)
copy_: i64[] = aten.copy_(x0, add_1)
return (scaled_dot_product_attention)""",
    )


def test_cache_that_the_graph_makes():
    def fn(k: Tensor, position: Tensor) -> Tensor:
        keys = torch.zeros(B, H, S, D)
        keys.index_copy_(2, position, k)
        return keys

    assert_expected_inline(
        printed(fn, new(), torch.tensor([2, 3, 4])),
        """\
def (x0: i64[3], x1: f32[2, 2, 3, 4])
zeros: f32[2, 2, 8, 4] = aten.zeros([2, 2, 8, 4], device=cpu, pin_memory=False)
cache_write_ = llmcomp.cache_write_(zeros, x1, x0, 2)
return (zeros)""",
    )


def test_assignment_at_positions_wraps_negative_ones():
    def fn(keys: Tensor, k: Tensor, position: Tensor) -> Tensor:
        keys[:, :, position] = k
        return keys.sum()

    assert_expected_inline(
        printed(fn, cache(), new(), torch.tensor([5, 2, -1])),
        """\
def (x0: f32[2, 2, 8, 4], x1: f32[2, 2, 3, 4], x2: i64[3])
add: i64[3] = aten.add(x2, 8)
lt: bool[3] = aten.lt(x2, 0)
where: i64[3] = aten.where(lt, add, x2)
cache_write_ = llmcomp.cache_write_(x0, x1, where, 2)
sum: f32[] = aten.sum(x0)
return (sum)""",
    )
    assert "cache_write_" in printed(fn, cache(), new(), torch.tensor([5, 2, -1]), dynamic=True)


def test_assignment_to_a_range():
    """As Llama's reference implementation writes its cache, (batch, position, head, channel)."""

    def fn(keys: Tensor, k: Tensor, start: int) -> Tensor:
        keys[:B, start : start + N] = k
        return keys[:B, : start + N].sum()

    assert_expected_inline(
        printed(fn, cache(4, 8, 1, 4), new().view(B, N, 2, 4)[:, :, :1], 2, dynamic=True),
        """\
def (x0: s0, x1: s1, x2: s2, x3: f32[s1, s2, 1, s1], x4: f32[2, 3, 1, s1])
add: s0 + 3 = add(x0, 3)
slice: f32[2, s2, 1, s1] = aten.slice(x3, 0, 0, 2)
add_1: s0 + 3 = add(3, x0)
arange: i64[3] = aten.arange(x0, add_1, device=cpu)
cache_write_ = llmcomp.cache_write_(slice, x4, arange, 1)
slice_1: f32[2, s2, 1, s1] = aten.slice(x3, 0, 0, 2)
slice_2: f32[2, s0 + 3, 1, s1] = aten.slice(slice_1, 1, 0, add)
sum: f32[] = aten.sum(slice_2)
return (sum)""",
    )


def test_assignment_at_one_position():
    def fn(keys: Tensor, k: Tensor) -> Tensor:
        keys[:, :, 3] = k
        return keys.sum()

    assert "cache_write_(x0, unsqueeze, arange, 2)" in printed(fn, cache(), new(1)[:, :, 0])


def test_values_are_cast_and_expanded():
    def fn(keys: Tensor, k: Tensor) -> Tensor:
        keys[:, :, 2:5] = k
        return keys.sum()

    assert "_to_copy" in printed(fn, cache().bfloat16(), new()[:, :1])


def test_two_writes_follow_each_other():
    def fn(keys: Tensor, k: Tensor, position: Tensor) -> Tensor:
        keys.index_copy_(2, position, k)
        seen = keys.sum()
        keys.index_copy_(2, position + 1, k)
        return seen + keys.cos().sum()

    assert printed(fn, cache(), new(), torch.tensor([0, 2, 4])).count("cache_write_(") == 2


def test_full_sliding_window_of_transformers():
    """StaticSlidingWindowLayer: the window moves on by one, in one copy and not in four."""

    def fn(keys: Tensor, k: Tensor) -> Tensor:
        moved = keys.roll(-1, dims=-2)
        moved[:, :, torch.tensor([-1])] = k
        keys.copy_(moved)
        return keys.sum()

    assert_expected_inline(
        printed(fn, cache(), new(1)),
        """\
def (x0: f32[2, 2, 8, 4], x1: f32[2, 2, 1, 4])
slice: f32[2, 2, 7, 4] = aten.slice(x0, 2, 1, 9223372036854775807)
cat: f32[2, 2, 8, 4] = aten.cat([slice, x1], 2)
sum: f32[] = aten.sum(cat)
copy_: f32[2, 2, 8, 4] = aten.copy_(x0, cat)
return (sum)""",
    )


def test_content_that_moves_within_a_cache_is_copied_first():
    def fn(keys: Tensor, values: Tensor) -> Tensor:
        keys[:, :, 1:4] = keys[:, :, 0:3]
        values[:, :, 1:4] = values[:, :, 0:1]
        return keys.sum() + values.sum()

    assert printed(fn, cache(), cache()).count("clone(") == 2


# ---- left alone


def test_old_content_that_is_read_later():
    def fn(keys: Tensor, k: Tensor, position: Tensor) -> Tensor:
        old = keys[:, :, 1:]
        out = torch.index_copy(keys, 2, position, k)
        result = out.sum() + old.clone().sum()
        keys.copy_(out)
        return result

    assert missed(fn, cache(), new(), torch.tensor([0, 1, 2])) == "clone reads the old content later"


def test_a_result_of_its_own():
    def fn(keys: Tensor, k: Tensor, position: Tensor) -> Tensor:
        out = torch.index_copy(keys, 2, position, k)
        keys.copy_(out)
        return out

    reason = "the result is returned as a tensor of its own"
    assert missed(fn, cache(), new(), torch.tensor([0, 1, 2])) == reason


def test_a_cache_that_is_not_updated():
    def fn(keys: Tensor, k: Tensor, position: Tensor) -> Tensor:
        return torch.index_copy(keys, 2, position, k).sum()

    reason = "the result is not copied back into the cache"
    assert missed(fn, cache(), new(), torch.tensor([0, 1, 2])) == reason


def test_results_get_memory_of_their_own():
    """A window that is filled at once is a copy of part of the keys, which are a result too."""

    def fn(k: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.zeros(B, H, 2, D)
        whole = k + 1
        keys.copy_(whole[:, :, -2:])
        return keys, whole

    gm, _ = rewritten(fn, new())
    (keys, whole, *_) = called(gm)
    assert isinstance(keys, Tensor) and isinstance(whole, Tensor)
    assert keys.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
