"""Putting a node in the place of another that has the same elements in a different memory layout."""

import torch
from torch import Tensor
from torch.fx import Node

from llmcomp.graph import fake_result, insert, is_contiguous, replace, same_layout, val, written

aten = torch.ops.aten


def adopt(old: Node, new: Node) -> None:
    """Let every user of `old` read `new`, and remove `old`.

    Fake values downstream follow the layout of `new` as far as it reaches. What does not allow it, a view
    or a result of the graph, reads a contiguous copy where it read contiguous memory before.
    """
    moved = {} if same_layout(val(old), val(new)) else {new: val(old)}
    ahead = {user for user in old.users if moved}
    replace(old, new)
    node = new
    while ahead:
        node = node.next
        if node not in ahead:
            continue
        ahead.remove(node)
        before = node.meta.get("val")
        if not _follow(node):
            _copy_inputs(node, moved)
        elif isinstance(before, Tensor) and not same_layout(before, val(node)):
            moved[node] = before
            ahead.update(node.users)


def _follow(node: Node) -> bool:
    """Recompute the fake value of a call; False where its arguments no longer allow the call."""
    if node.op == "output":
        return False
    if not written(node):
        try:
            node.meta["val"] = fake_result(node)
        except (RuntimeError, ValueError):
            return False
    return True


def _copy_inputs(node: Node, moved: dict[Node, Tensor]) -> None:
    for source in node.all_input_nodes:
        if source in moved and is_contiguous(moved[source]):
            with node.graph.inserting_before(node):
                copy = insert(node.graph, aten.clone.default, source, memory_format=torch.contiguous_format)
            node.replace_input_with(source, copy)
