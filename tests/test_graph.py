"""Graph helpers: fake values, layouts, text, and the order that reads and writes of memory ask for."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from llmcomp.graph import (
    argument,
    base,
    dependencies,
    insert,
    is_contiguous,
    is_returned,
    is_view,
    mutated,
    only_user,
    replace_by,
    same_layout,
    same_shape,
    same_size,
    source,
    text,
    val,
    views,
    written,
)
from llmcomp.ops import OPS
from tests.graphs import capture, run

aten = torch.ops.aten


def find(gm: GraphModule, name: str) -> Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def calls(gm: GraphModule, target: object) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def test_text_is_the_same_whatever_nodes_are_called() -> None:
    gm = capture(lambda x, w: torch.relu(x @ w) + 1.5, torch.randn(2, 3), torch.randn(3, 4))
    printed = text(gm.graph)
    assert_expected_inline(
        printed,
        """\
def (x0: f32[2, 3], x1: f32[3, 4])
mm: f32[2, 4] = aten.mm(x0, x1)
relu: f32[2, 4] = aten.relu(mm)
add: f32[2, 4] = aten.add(relu, 1.5)
return (add)""",
    )
    for i, node in enumerate(gm.graph.nodes):
        node.name = f"n{i}"
    assert text(gm.graph) == printed


def test_text_names_parameters_and_symbols_by_first_use() -> None:
    gm = capture(torch.nn.Linear(4, 2), torch.randn(3, 4), dynamic=True)
    assert_expected_inline(
        text(gm.graph),
        """\
def (w0: f32[2, 4], w1: f32[2], x0: s0, x1: f32[s0, 4])
linear: f32[s0, 2] = aten.linear(x1, w0, w1)
return (linear)""",
    )


def test_argument_knows_names_positions_and_defaults() -> None:
    gm = capture(lambda x: torch.nn.functional.gelu(x.sum(1), approximate="tanh"), torch.randn(2, 3))
    (gelu,), (total,) = calls(gm, aten.gelu.default), calls(gm, aten.sum.dim_IntList)
    assert argument(gelu, "approximate") == "tanh" and argument(gelu, "self") is total
    assert argument(total, "dim") == [1] and argument(total, "keepdim") is False
    with pytest.raises(KeyError, match="no argument dims"):
        argument(total, "dims")


def test_inserted_nodes_know_their_value_and_run() -> None:
    gm = capture(lambda x: x.exp(), torch.randn(2, 3), dynamic=True)
    (exp,) = calls(gm, aten.exp.default)
    expected = run(gm)[0].sin().unsqueeze(0)
    with gm.graph.inserting_after(exp):
        sin = insert(gm.graph, aten.sin.default, source(exp))
    sin.replace_input_with(source(exp), exp)
    exp.replace_all_uses_with(sin, delete_user_cb=lambda user: user is not sin)
    row = replace_by(sin, aten.unsqueeze.default, exp, 0)
    with gm.graph.inserting_after(row):
        out = insert(gm.graph, aten.sin.default, row)
    row.replace_all_uses_with(out, delete_user_cb=lambda user: user is not out)
    gm.recompile()
    assert same_shape(val(out).shape, (1, *val(exp).shape))
    assert torch.equal(run(gm)[0], expected) and only_user(exp) is row


def test_equal_calls_of_our_operators_share_a_value() -> None:
    def f(x, y, cos, sin):
        return x + 1, y + 1, cos + 1, sin + 1

    gm = capture(f, torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3, 8).transpose(1, 2), torch.randn(8), torch.randn(8))
    x, y, cos, sin = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(find(gm, "output")):
        first, second = (insert(gm.graph, OPS.rope.default, x, cos, sin, False) for _ in range(2))
        other = insert(gm.graph, OPS.rope.default, y, cos, sin, False)
        wide = insert(gm.graph, OPS.rope.default, x, cos, sin, False, torch.float64)
        view, again = (insert(gm.graph, aten.view.default, x, [2, 3, 32]) for _ in range(2))
    assert val(first) is val(second)
    assert val(other).stride() == val(y).stride() != val(first).stride()
    assert val(wide).dtype == torch.float64
    assert val(view) is not val(again), "views of different tensors differ"


def test_sizes_are_compared_without_guards() -> None:
    gm = capture(lambda x: (x.exp(), torch.cat([x, x]), x.view(-1)), torch.randn(3, 5), dynamic=True)
    (exp,), (cat,), (flat,) = (calls(gm, getattr(aten, n).default) for n in ("exp", "cat", "view"))
    environment = val(exp).shape[0].node.shape_env
    guards = len(environment.guards)
    s0, s1 = val(exp).shape
    assert same_size(s0, s0) and same_size(s0 * s1, s1 * s0) and same_size(val(flat).shape[0], s0 * s1)
    assert not same_size(s0, s1) and not same_size(s0, 3) and same_size(4, 4)
    assert not same_shape(val(exp).shape, val(cat).shape) and not same_shape(val(flat).shape, val(exp).shape)
    assert is_contiguous(val(exp)) and not is_contiguous(val(exp).t())
    assert same_layout(val(exp), val(exp)) and not same_layout(val(exp), val(exp).t())
    assert len(environment.guards) == guards


def test_strides_of_single_elements_do_not_count() -> None:
    a, b = torch.empty(1, 3), torch.empty(3, 1).t()
    assert a.stride() != b.stride() and same_layout(a, b) and is_contiguous(b)


def test_views_share_memory_and_copies_do_not() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.t().split(2)
        return first[:, 0].unsqueeze(0), second.clone()

    gm = capture(fn, torch.randn(3, 4))
    (x,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    (unsqueeze,), (clone,) = calls(gm, aten.unsqueeze.default), calls(gm, aten.clone.default)
    assert base(unsqueeze) is x and is_view(unsqueeze) and unsqueeze in set(views(x))
    assert base(clone) is clone and not is_view(clone) and clone not in set(views(x))
    assert is_returned(x) and is_returned(clone)
    (split,) = calls(gm, aten.split.Tensor)
    assert is_view(split) and is_returned(split)


def test_writes_come_after_earlier_reads_and_before_later_ones() -> None:
    graph = Graph()
    cache, value, position = (graph.placeholder(n) for n in ("cache", "value", "position"))
    early = graph.call_function(aten.exp.default, (cache,))
    view = graph.call_function(aten.transpose.int, (cache, 0, 1))
    write = graph.call_function(OPS.cache_write_.default, (cache, value, position, 1))
    late = graph.call_function(aten.sin.default, (view,))
    other = graph.call_function(aten.cos.default, (value,))
    again = graph.call_function(aten.copy_.default, (view, late))
    graph.output((early, late, other, again))
    before = dependencies(graph)
    assert written(write) == (cache,) and mutated(graph) == {cache} and base(again) is cache
    assert early in before[write] and write in before[late] and view in before[late]
    assert before[view] == {cache} and before[other] == {value} and write not in before[early]
    assert {write, late} <= before[again] and early not in before[again]


def test_random_numbers_are_drawn_in_order() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.rand_like.default, (x,))
    second = graph.call_function(aten.bernoulli.default, (x,))
    graph.output((first, second))
    assert dependencies(graph)[second] == {x, first}
