"""passes/insert_kv_cache.py: which graphs can be computed piece by piece, and the cached graphs made of them."""

# ruff: noqa: E501

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import llmcomp.passes
from llmcomp.graph import text
from llmcomp.passes.base import Report, run_passes
from llmcomp.passes.cached_graph import insert_cache
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.insert_kv_cache import NAME, PLAN, Plan
from llmcomp.target import cpu
from tests import models
from tests import sequence_models as sm
from tests.graphs import capture, close

LENGTH = 9
Function = Callable[..., object]


def analysed(fn: Function, *inputs: Tensor) -> tuple[GraphModule, Report]:
    """The graph as insert_kv_cache leaves it in the pipeline, with symbolic sizes, and the report."""
    gm = capture(fn, *inputs, dynamic=True)
    passes = llmcomp.passes.pipeline(cpu(), lambda region, inlined: None)
    upto = passes[: [p.name for p in passes].index(NAME) + 1]
    return gm, run_passes(gm, upto, frozenset({SHAPES}))[-1].report


def ids(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(sm.VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def obstacle(fn: Function, *inputs: Tensor) -> str:
    """Why a graph gets no cache."""
    gm, report = analysed(fn, *inputs)
    assert PLAN not in gm.meta and report.rewrites == 0
    (miss,) = report.near_misses
    assert miss.node in {n.name for n in gm.graph.nodes}
    return miss.reason


def check(gm: GraphModule, pieces: tuple[int, ...]) -> None:
    """The cached graphs, called with `pieces` of the sequence one after the other, give what the whole gives."""
    plan: Plan = gm.meta[PLAN]
    flat = gm.meta["inputs"]
    done, slots = 0, ()
    for piece in pieces:
        end = done + piece
        cached = insert_cache(plan, 0 if done == 0 else None, 1 if done and piece == 1 else None)
        inputs = [cut(plan, i, x, end) for i, x in enumerate(flat)]
        whole = gm(*inputs)
        if done:
            inputs += [done] if piece == 1 else [done, piece]
        results = cached(*inputs, *slots)
        for a, b in zip(results, whole, strict=False):
            close(a.contiguous(), b.contiguous(), 1e-5) if isinstance(b, Tensor) else None
        slots, done = results[len(whole) :], end
        assert len(slots) == len(plan.slots)


def cut(plan: Plan, position: int, x: object, length: int) -> object:
    """An input of the graph for a shorter sequence."""
    for sequence in plan.sequences:
        if sequence.position == position:
            assert isinstance(x, Tensor)
            return x.narrow(sequence.axis, 0, length)
    node = plan.gm.graph.find_nodes(op="placeholder")[position]
    value = node.meta.get("val")
    return length if isinstance(value, torch.SymInt) and value.node.expr == plan.length else x


POSITIVE: dict[str, sm.Design] = {
    "sdpa": sm.Design(),
    "written out": sm.Design(attention=sm.written_out),
    "sliding window": sm.Design(attention=sm.windowed, layers=2),
    "alibi": sm.Design(attention=sm.alibi),
    "a table of positions": sm.Design(positions=sm.learned),
    "the last token": sm.Design(last=1),
    "the last three": sm.Design(last=3),
    "keys and values": sm.Design(keys_too=True, layers=2),
    "running sum": sm.Design(before=lambda x: x + x.detach().cumsum(1) * 0.01),
}
FAST = ("sdpa", "alibi", "the last three")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in POSITIVE])
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    with torch.no_grad():
        gm, report = analysed(sm.Decoder(POSITIVE[name]), ids(batch=2))
        assert report.rewrites == 1
        check(gm, (4, 1, 3, 1))


NEGATIVE: dict[str, tuple[sm.Design, str]] = {
    "bidirectional": (sm.Design(attention=sm.bidirectional), "it is attention that is not causal"),
    "a mean over the sequence": (sm.Design(before=lambda x: x - x.mean(1, keepdim=True)), "it mixes the positions of"),
    "a reversed scan": (sm.Design(before=lambda x: x.flip(1).cumsum(1).flip(1)), "it reverses the sequence"),
    "a normalisation over the sequence": (sm.Design(before=lambda x: x.softmax(1)), "it mixes the positions of"),
    "a look ahead": (sm.Design(before=lambda x: F.pad(x, (0, 0, 0, 1))[:, 1:]), "it mixes the positions of"),
    "a convolution that looks ahead": (
        sm.Design(before=lambda x: F.conv1d(x.mT, torch.ones(sm.WIDTH, 1, 3), padding=1, groups=sm.WIDTH).mT),
        "it mixes the positions of",
    ),
    "the last token everywhere": (sm.Design(before=lambda x: x + x[:, -1:]), "it brings the end of the sequence"),
    "the length": (sm.Design(before=lambda x: x * x.shape[1]), "it computes with the length"),
    "positions from the end": (
        sm.Design(before=lambda x: x + torch.arange(x.shape[1] - 1, -1, -1)[:, None]),
        "it counts from the end of the sequence",
    ),
    "random numbers": (sm.Design(before=lambda x: F.dropout(x, 0.5, True)), "it draws random numbers"),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_is_not_causal_is_left_alone(name: str) -> None:
    design, reason = NEGATIVE[name]
    with torch.no_grad():
        assert obstacle(sm.Decoder(design), ids()).startswith(reason)


def test_static_shapes_are_left_alone() -> None:
    gm = capture(sm.Decoder(sm.Design()), ids(), dynamic=False)
    run_passes(gm, llmcomp.passes.pipeline(cpu(), lambda region, inlined: None)[:12], frozenset({SHAPES}))
    assert PLAN not in gm.meta


@pytest.mark.slow
def test_encoders_are_left_alone() -> None:
    case = next(c for c in models.encoder_cases() if c.name.startswith("bert"))
    model = case.build(torch.float32)
    inputs = case.inputs(batch=1, length=LENGTH)
    with torch.no_grad():
        assert "not causal" in obstacle(lambda i: model(input_ids=i)[0], inputs["input_ids"])


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma2", "mixtral"))]
)
def test_architectures_of_transformers(name: str) -> None:
    model = models.causal_lm(name).build(torch.float32)
    with torch.no_grad():
        gm, report = analysed(lambda i: model(input_ids=i, use_cache=False).logits, ids(length=11) + 3)
        assert report.rewrites == 1
        check(gm, (4, 6, 1))


def test_several_rows_of_which_none_is_packed() -> None:
    """A mask that says which tokens belong together, which transformers reads off positions that only count up."""
    model = models.causal_lm("llama").build(torch.float32)
    with torch.no_grad():
        gm, report = analysed(lambda i: model(input_ids=i, use_cache=False).logits, ids(3, 11) + 3)
        assert report.rewrites == 1
        check(gm, (5, 5, 1))


@pytest.mark.slow
def test_padding_is_read_by_position() -> None:
    model = models.causal_lm("llama").build(torch.float32)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        gm, report = analysed(
            lambda i, m: model(input_ids=i, attention_mask=m, use_cache=False).logits, ids(2, 11) + 3, mask
        )
        assert report.rewrites == 1
        check(gm, (5, 5, 1))


@pytest.mark.slow
def test_sizes_of_computed_tensors_are_not_cut() -> None:
    model = models.causal_lm("axk1").build(torch.float32)
    mask = torch.ones(2, 11, dtype=torch.int64)
    with torch.no_grad():
        reason = obstacle(
            lambda i, m: model(input_ids=i, attention_mask=m, use_cache=False).logits, ids(2, 11) + 3, mask
        )
        assert reason == "it is a size of something computed"


def printed(design: sm.Design, past: int | None, new: int | None) -> str:
    with torch.no_grad():
        gm, _ = analysed(sm.Decoder(design), ids())
    return text(insert_cache(gm.meta[PLAN], past, new).graph)


def test_a_step_of_a_gpt() -> None:
    assert_expected_inline(
        printed(sm.Design(), None, 1),
        """\
def (w0: f32[64, 16], w1: f32[37, 16], x0: s0 + 1, x1: i64[1, s0 + 1], w2: f32[16], w3: f32[16], w4: f32[48, 16], w5: f32[48], w6: f32[16, 16], w7: f32[16], w8: f32[37, 16], x2: s0, x3: f32[1, 2, s0, 8], x4: f32[1, 2, s0, 8], x5: f32[1, s0, 37])
cache_grow: f32[1, 2, s0 + 1, 8] = llmcomp.cache_grow(x3, 1, 2)
cache_grow_1: f32[1, 2, s0 + 1, 8] = llmcomp.cache_grow(x4, 1, 2)
cache_grow_2: f32[1, s0 + 1, 37] = llmcomp.cache_grow(x5, 1, 1)
add: s0 + 1 = add(1, x2)
slice: i64[1, 1] = aten.slice(x1, 1, x2, add)
embedding: f32[1, 1, 16] = aten.embedding(w1, slice)
arange: i64[1] = aten.arange(x2, add, device=cpu, pin_memory=False)
embedding_1: f32[1, 16] = aten.embedding(w0, arange)
add_1: f32[1, 1, 16] = aten.add(embedding, embedding_1)
layer_norm: f32[1, 1, 16] = llmcomp.layer_norm(add_1, w2, w3, 1e-05)
linear: f32[1, 1, 48] = llmcomp.linear(layer_norm, w4, w5, False)
split = aten.split(linear, 16, -1)
getitem: f32[1, 1, 16] = getitem(split, 0)
getitem_1: f32[1, 1, 16] = getitem(split, 1)
getitem_2: f32[1, 1, 16] = getitem(split, 2)
view: f32[1, 1, 2, 8] = aten.view(getitem, [1, 1, 2, 8])
transpose: f32[1, 2, 1, 8] = aten.transpose(view, 1, 2)
view_1: f32[1, 1, 2, 8] = aten.view(getitem_1, [1, 1, 2, 8])
transpose_1: f32[1, 2, 1, 8] = aten.transpose(view_1, 1, 2)
arange_1: i64[1] = aten.arange(x2, add, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_grow, transpose_1, arange_1, 2)
view_2: f32[1, 1, 2, 8] = aten.view(getitem_2, [1, 1, 2, 8])
transpose_2: f32[1, 2, 1, 8] = aten.transpose(view_2, 1, 2)
arange_2: i64[1] = aten.arange(x2, add, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_grow_1, transpose_2, arange_2, 2)
attention: f32[1, 2, 1, 8] = llmcomp.attention(transpose, cache_grow, cache_grow_1, None, None, 0.35355339059327373, False, 0, 0, 0.0)
transpose_3: f32[1, 1, 2, 8] = aten.transpose(attention, 1, 2)
view_3: f32[1, 1, 16] = aten.view(transpose_3, [1, 1, 16])
linear_1: f32[1, 1, 16] = llmcomp.linear(view_3, w6, w7, False)
add_2: f32[1, 1, 16] = aten.add(add_1, linear_1)
linear_2: f32[1, 1, 37] = llmcomp.linear(add_2, w8, None, False)
arange_3: i64[1] = aten.arange(x2, add, device=cpu)
cache_write__2 = llmcomp.cache_write_(cache_grow_2, linear_2, arange_3, 1)
return (cache_grow_2, cache_grow, cache_grow_1, cache_grow_2)""",
    )


def test_the_first_pieces_of_a_gpt() -> None:
    assert_expected_inline(
        printed(sm.Design(), 0, None),
        """\
def (w0: f32[64, 16], w1: f32[37, 16], x0: s0, x1: i64[1, s0], w2: f32[16], w3: f32[16], w4: f32[48, 16], w5: f32[48], w6: f32[16, 16], w7: f32[16], w8: f32[37, 16])
cache_room: f32[1, 2, s0, 8] = llmcomp.cache_room([1, 2, x0, 8], 2, f32, cpu)
cache_room_1: f32[1, 2, s0, 8] = llmcomp.cache_room([1, 2, x0, 8], 2, f32, cpu)
cache_room_2: f32[1, s0, 37] = llmcomp.cache_room([1, x0, 37], 1, f32, cpu)
embedding: f32[1, s0, 16] = aten.embedding(w1, x1)
arange: i64[s0] = aten.arange(0, x0, device=cpu, pin_memory=False)
embedding_1: f32[s0, 16] = aten.embedding(w0, arange)
add: f32[1, s0, 16] = aten.add(embedding, embedding_1)
layer_norm: f32[1, s0, 16] = llmcomp.layer_norm(add, w2, w3, 1e-05)
linear: f32[1, s0, 48] = llmcomp.linear(layer_norm, w4, w5, False)
split = aten.split(linear, 16, -1)
getitem: f32[1, s0, 16] = getitem(split, 0)
getitem_1: f32[1, s0, 16] = getitem(split, 1)
getitem_2: f32[1, s0, 16] = getitem(split, 2)
view: f32[1, s0, 2, 8] = aten.view(getitem, [1, x0, 2, 8])
transpose: f32[1, 2, s0, 8] = aten.transpose(view, 1, 2)
view_1: f32[1, s0, 2, 8] = aten.view(getitem_1, [1, x0, 2, 8])
transpose_1: f32[1, 2, s0, 8] = aten.transpose(view_1, 1, 2)
arange_1: i64[s0] = aten.arange(0, x0, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_room, transpose_1, arange_1, 2)
view_2: f32[1, s0, 2, 8] = aten.view(getitem_2, [1, x0, 2, 8])
transpose_2: f32[1, 2, s0, 8] = aten.transpose(view_2, 1, 2)
arange_2: i64[s0] = aten.arange(0, x0, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_room_1, transpose_2, arange_2, 2)
attention: f32[1, 2, s0, 8] = llmcomp.attention(transpose, cache_room, cache_room_1, None, None, 0.35355339059327373, True, 0, 0, 0.0)
transpose_3: f32[1, s0, 2, 8] = aten.transpose(attention, 1, 2)
view_3: f32[1, s0, 16] = aten.view(transpose_3, [1, x0, 16])
linear_1: f32[1, s0, 16] = llmcomp.linear(view_3, w6, w7, False)
add_1: f32[1, s0, 16] = aten.add(add, linear_1)
linear_2: f32[1, s0, 37] = llmcomp.linear(add_1, w8, None, False)
arange_3: i64[s0] = aten.arange(0, x0, device=cpu)
cache_write__2 = llmcomp.cache_write_(cache_room_2, linear_2, arange_3, 1)
return (cache_room_2, cache_room, cache_room_1, cache_room_2)""",
    )


def test_a_piece_with_a_sliding_window() -> None:
    assert_expected_inline(
        printed(sm.Design(attention=sm.windowed), None, None),
        """\
def (w0: f32[64, 16], w1: f32[37, 16], x0: s0 + s1, x1: i64[1, s0 + s1], w2: f32[16], w3: f32[16], w4: f32[48, 16], w5: f32[48], w6: f32[16, 16], w7: f32[16], w8: f32[37, 16], x2: s1, x3: s0, x4: f32[1, 2, s1, 8], x5: f32[1, 2, s1, 8], x6: f32[1, s1, 37])
cache_grow: f32[1, 2, s0 + s1, 8] = llmcomp.cache_grow(x4, x3, 2)
cache_grow_1: f32[1, 2, s0 + s1, 8] = llmcomp.cache_grow(x5, x3, 2)
cache_grow_2: f32[1, s0 + s1, 37] = llmcomp.cache_grow(x6, x3, 1)
add: s0 + s1 = add(x3, x2)
slice: i64[1, s0] = aten.slice(x1, 1, x2, add)
embedding: f32[1, s0, 16] = aten.embedding(w1, slice)
arange: i64[s0] = aten.arange(x2, add, device=cpu, pin_memory=False)
embedding_1: f32[s0, 16] = aten.embedding(w0, arange)
add_1: f32[1, s0, 16] = aten.add(embedding, embedding_1)
layer_norm: f32[1, s0, 16] = llmcomp.layer_norm(add_1, w2, w3, 1e-05)
linear: f32[1, s0, 48] = llmcomp.linear(layer_norm, w4, w5, False)
split = aten.split(linear, 16, -1)
getitem: f32[1, s0, 16] = getitem(split, 0)
getitem_1: f32[1, s0, 16] = getitem(split, 1)
getitem_2: f32[1, s0, 16] = getitem(split, 2)
view: f32[1, s0, 2, 8] = aten.view(getitem, [1, x3, 2, 8])
transpose: f32[1, 2, s0, 8] = aten.transpose(view, 1, 2)
view_1: f32[1, s0, 2, 8] = aten.view(getitem_1, [1, x3, 2, 8])
transpose_1: f32[1, 2, s0, 8] = aten.transpose(view_1, 1, 2)
arange_1: i64[s0] = aten.arange(x2, add, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_grow, transpose_1, arange_1, 2)
view_2: f32[1, s0, 2, 8] = aten.view(getitem_2, [1, x3, 2, 8])
transpose_2: f32[1, 2, s0, 8] = aten.transpose(view_2, 1, 2)
arange_2: i64[s0] = aten.arange(x2, add, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_grow_1, transpose_2, arange_2, 2)
attention: f32[1, 2, s0, 8] = llmcomp.attention(transpose, cache_grow, cache_grow_1, None, None, 0.35355339059327373, True, x2, 3, 0.0)
transpose_3: f32[1, s0, 2, 8] = aten.transpose(attention, 1, 2)
view_3: f32[1, s0, 16] = aten.view(transpose_3, [1, x3, 16])
linear_1: f32[1, s0, 16] = llmcomp.linear(view_3, w6, w7, False)
add_2: f32[1, s0, 16] = aten.add(add_1, linear_1)
linear_2: f32[1, s0, 37] = llmcomp.linear(add_2, w8, None, False)
arange_3: i64[s0] = aten.arange(x2, add, device=cpu)
cache_write__2 = llmcomp.cache_write_(cache_grow_2, linear_2, arange_3, 1)
return (cache_grow_2, cache_grow, cache_grow_1, cache_grow_2)""",
    )


def test_a_step_with_alibi() -> None:
    assert_expected_inline(
        printed(sm.Design(attention=sm.alibi), None, 1),
        """\
def (w0: f32[64, 16], w1: f32[37, 16], x0: s0 + 1, x1: i64[1, s0 + 1], w2: f32[16], w3: f32[16], w4: f32[48, 16], w5: f32[48], w6: f32[16, 16], w7: f32[16], w8: f32[37, 16], x2: s0, x3: f32[1, 2, s0, 8], x4: f32[1, 2, s0, 8], x5: f32[1, s0, 37])
cache_grow: f32[1, 2, s0 + 1, 8] = llmcomp.cache_grow(x3, 1, 2)
cache_grow_1: f32[1, 2, s0 + 1, 8] = llmcomp.cache_grow(x4, 1, 2)
cache_grow_2: f32[1, s0 + 1, 37] = llmcomp.cache_grow(x5, 1, 1)
add: s0 + 1 = add(1, x2)
slice: i64[1, 1] = aten.slice(x1, 1, x2, add)
embedding: f32[1, 1, 16] = aten.embedding(w1, slice)
arange: i64[s0 + 1] = aten.arange(0, add, device=cpu, pin_memory=False)
arange_1: i64[1] = aten.arange(x2, add, device=cpu, pin_memory=False)
embedding_1: f32[1, 16] = aten.embedding(w0, arange_1)
add_1: f32[1, 1, 16] = aten.add(embedding, embedding_1)
layer_norm: f32[1, 1, 16] = llmcomp.layer_norm(add_1, w2, w3, 1e-05)
linear: f32[1, 1, 48] = llmcomp.linear(layer_norm, w4, w5, False)
split = aten.split(linear, 16, -1)
getitem: f32[1, 1, 16] = getitem(split, 0)
getitem_1: f32[1, 1, 16] = getitem(split, 1)
getitem_2: f32[1, 1, 16] = getitem(split, 2)
view: f32[1, 1, 2, 8] = aten.view(getitem, [1, 1, 2, 8])
transpose: f32[1, 2, 1, 8] = aten.transpose(view, 1, 2)
view_1: f32[1, 1, 2, 8] = aten.view(getitem_1, [1, 1, 2, 8])
transpose_1: f32[1, 2, 1, 8] = aten.transpose(view_1, 1, 2)
arange_2: i64[1] = aten.arange(x2, add, device=cpu)
cache_write_ = llmcomp.cache_write_(cache_grow, transpose_1, arange_2, 2)
view_2: f32[1, 1, 2, 8] = aten.view(getitem_2, [1, 1, 2, 8])
transpose_2: f32[1, 2, 1, 8] = aten.transpose(view_2, 1, 2)
arange_3: i64[1] = aten.arange(x2, add, device=cpu)
cache_write__1 = llmcomp.cache_write_(cache_grow_1, transpose_2, arange_3, 2)
unsqueeze: i64[1, 1] = aten.unsqueeze(arange_1, 1)
unsqueeze_1: i64[1, s0 + 1] = aten.unsqueeze(arange, 0)
constant: f32[s1] = self._tensor_constant0
unsqueeze_2: f32[s1, 1] = aten.unsqueeze(constant, 1)
unsqueeze_3: f32[s1, 1, 1] = aten.unsqueeze(unsqueeze_2, 2)
sub: i64[1, s0 + 1] = aten.sub(unsqueeze_1, unsqueeze)
mul: f32[s1, 1, s0 + 1] = aten.mul(unsqueeze_3, sub)
unsqueeze_4: f32[1, s1, 1, s0 + 1] = aten.unsqueeze(mul, 0)
attention: f32[1, 2, 1, 8] = llmcomp.attention(transpose, cache_grow, cache_grow_1, unsqueeze_4, None, 0.3535533905932738, False, 0, 0, 0.0)
transpose_3: f32[1, 1, 2, 8] = aten.transpose(attention, 1, 2)
clone: f32[1, 1, 2, 8] = aten.clone(transpose_3, memory_format=torch.contiguous_format)
view_3: f32[1, 1, 16] = aten.view(clone, [1, 1, 16])
linear_1: f32[1, 1, 16] = llmcomp.linear(view_3, w6, w7, False)
add_2: f32[1, 1, 16] = aten.add(add_1, linear_1)
linear_2: f32[1, 1, 37] = llmcomp.linear(add_2, w8, None, False)
arange_4: i64[1] = aten.arange(x2, add, device=cpu)
cache_write__2 = llmcomp.cache_write_(cache_grow_2, linear_2, arange_4, 1)
return (cache_grow_2, cache_grow, cache_grow_1, cache_grow_2)""",
    )


BEFORE = (
    lambda x: x,
    F.silu,
    lambda x: F.layer_norm(x, (sm.WIDTH,)),
    lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),
    lambda x: x + x.cumsum(1) * 0.1,
    lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
    lambda x: x.view(-1, sm.WIDTH).sin().view(x.shape),
    lambda x: x + torch.arange(x.shape[1])[:, None] * 0.01,
    lambda x: torch.cat([torch.zeros(x.shape[0], 1, sm.WIDTH), x], 1)[:, :-1],
    lambda x: x.transpose(1, 2).tanh().transpose(1, 2),
)
DESIGNS = st.builds(
    sm.Design,
    attention=st.sampled_from([sm.sdpa, sm.written_out, sm.windowed, sm.alibi]),
    positions=st.sampled_from([sm.learned, sm.counted]),
    before=st.sampled_from(BEFORE),
    last=st.sampled_from([None, 1, 2]),
    keys_too=st.booleans(),
)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(design=DESIGNS, batch=st.integers(1, 2), first=st.integers(2, 5), split=st.integers(0, 2))
def test_random_decoders(design: sm.Design, batch: int, first: int, split: int) -> None:
    rest = LENGTH - first
    pieces = [(1,) * rest, (rest - 1, 1), (2, *(1,) * (rest - 2))][split]
    with torch.no_grad():
        gm, report = analysed(sm.Decoder(design), ids(batch))
        assert report.rewrites == 1, report.near_misses
        check(gm, (first, *pieces))
