"""passes/layout.py: a node takes the place of another that has the same elements in other memory."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from llmcomp.graph import insert, same_layout, val
from llmcomp.passes.layout import adopt
from tests.graphs import capture, close, run

aten = torch.ops.aten


def moved(gm: GraphModule) -> tuple[Tensor, ...]:
    """The results of a graph whose `cos` is replaced by one that is stored with its last two axes swapped."""
    (old,) = gm.graph.find_nodes(op="call_function", target=aten.cos.default)
    with gm.graph.inserting_after(old):
        new = insert(gm.graph, aten.transpose.int, old.args[0], 1, 2)
    with gm.graph.inserting_after(new):
        new = insert(gm.graph, aten.clone.default, new, memory_format=torch.contiguous_format)
    with gm.graph.inserting_after(new):
        new = insert(gm.graph, aten.transpose.int, new, 1, 2)
    with gm.graph.inserting_after(new):
        new = insert(gm.graph, aten.cos.default, new)
    adopt(old, new)
    gm.graph.lint()
    gm.recompile()
    return run(gm)


def check(gm: GraphModule) -> GraphModule:
    """That a graph computes the same in the same layout after the move, and knows the layout of each node."""
    expected = run(gm)
    for a, b in zip(moved(gm), expected, strict=True):
        close(a, b)
    for node in gm.graph.find_nodes(op="call_function", target=aten.transpose.int):
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            again = torch.empty_strided(val(node.args[0]).shape, val(node.args[0]).stride()).transpose(1, 2)
        assert same_layout(val(node), again)
    return gm


def copies(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=aten.clone.default)) - 1


def test_a_result_is_copied_back():
    assert copies(check(capture(lambda x: x.cos(), torch.randn(2, 3, 4)))) == 1


def test_a_view_that_the_layout_does_not_allow_reads_a_copy():
    assert copies(check(capture(lambda x: x.cos().view(2, 12) + 1, torch.randn(2, 3, 4)))) == 1


def test_what_does_not_care_about_layout_is_left_alone():
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.cos()
        return y.transpose(1, 2).contiguous() + 1, y @ y.transpose(1, 2)

    # `contiguous` finds contiguous memory now; it is not our business to remove it.
    assert copies(check(capture(fn, torch.randn(2, 3, 4)))) == 1


def test_the_layout_is_followed_through_operators():
    """The layout of `sin` follows that of `cos`, and so do its views."""

    def fn(x: Tensor) -> Tensor:
        return x.cos().sin().view(2, 12) * 2

    gm = check(capture(fn, torch.randn(2, 3, 4)))
    assert copies(gm) == 1
