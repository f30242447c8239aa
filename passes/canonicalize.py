"""One spelling for what can be written in many ways: no-ops go, casts and views of views merge.

    detach(x), alias(x), lift_fresh_copy(x)      ->  x
    clone(x), x * 1.0, i + 0, copy(y, x)         ->  x                          where the layout stays
    view(x, shape of x), x[0:], transpose twice  ->  x
    view(view(x, a), b)                          ->  view(x, b)
    _unsafe_view(x, a)                           ->  view(x, a)
    bf16(f32(x)), x of bf16                      ->  x
    cat([empty, x])                              ->  x, or a contiguous clone
    stack([x, y])                                ->  cat([unsqueeze(x), unsqueeze(y)])
    x[:, [1]]                                    ->  clone(x[:, 1:2])
    add.Scalar(x, 1)                             ->  add.Tensor(x, 1)

A result of the graph keeps memory of its own: what the caller gets never starts to share memory with an
input or with another result, and copies of memory that the graph writes into stay.
"""

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import Argument

from llmcomp.graph import (
    argument,
    base,
    insert,
    is_contiguous,
    is_returned,
    is_tensor,
    mutated,
    replace,
    same_layout,
    same_size,
    source,
    tensors,
    val,
)
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.constants import number
from llmcomp.passes.facts import CANONICAL, SHAPES
from llmcomp.passes.match import is_cast, uncast

aten = torch.ops.aten

# Operators whose result shows memory of the first argument, element for element.
VIEWS = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten._unsafe_view.default,
        aten.view.default,
    }
)
INPUTS = ("placeholder", "get_attr")
END = 2**63 - 1  # of a slice: all that is left

Written = frozenset[Node]
Rule = Callable[[Node, Written], Node | None]


def _run(graph: Graph, report: Report) -> None:
    writes = mutated(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and is_tensor(node):
            report.rewrites += _simplify(node, writes)


CANONICALIZE = Pass("canonicalize", _run, needs=frozenset({SHAPES}), gives=frozenset({CANONICAL}))


def _simplify(node: Node, writes: Written) -> int:
    """Apply rules to `node`, and to what takes its place, until none fits; returns how many did."""
    new = next((n for rule in RULES if (n := rule(node, writes)) is not None), None)
    if new is None:
        return 0
    replace(node, new)
    return 1 + (_simplify(new, writes) if new.op == "call_function" else 0)


def merge_views(node: Node, writes: Written) -> Node | None:
    """view(view(x, a), b) -> view(x, b); _unsafe_view becomes view."""
    if node.target not in (aten.view.default, aten._unsafe_view.default):
        return None
    start = source(node)
    while start.target is aten.view.default and is_contiguous(val(source(start))):
        start = source(start)
    if start is source(node) and node.target is aten.view.default:
        return None
    return _before(node, aten.view.default, start, node.args[1])


NUMBERS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
}


def number_operand(node: Node, writes: Written) -> Node | None:
    """add.Scalar(x, 1) -> add.Tensor(x, 1): models call this one, decompositions the other."""
    if node.target not in NUMBERS:
        return None
    return _before(node, NUMBERS[node.target], *node.args, **node.kwargs)


def stack_as_cat(node: Node, writes: Written) -> Node | None:
    """stack([x, y], dim) -> cat([unsqueeze(x, dim), unsqueeze(y, dim)], dim)."""
    if node.target is not aten.stack.default:
        return None
    dim = argument(node, "dim")
    parts = [_before(node, aten.unsqueeze.default, part, dim) for part in tensors(node)]
    new = _before(node, aten.cat.default, parts, dim)
    return new if same_layout(val(new), val(node)) else None


def index_as_slice(node: Node, writes: Written) -> Node | None:
    """index(x, [None, c]) -> clone(slice(x, 1, 1, 2)), where c is a constant that holds nothing but 1."""
    if node.target is not aten.index.Tensor or not is_contiguous(val(node)):
        return None
    x, indices = source(node), argument(node, "indices")
    assert isinstance(indices, list | tuple)
    (dim, constant), *others = [(d, c) for d, c in enumerate(indices) if c is not None]
    at = number(constant) if not others else None
    if at is None or val(constant).dim() != 1 or val(constant).dtype != torch.int64:
        return None
    part = _before(node, aten.slice.Tensor, x, dim, int(at), int(at) + 1 or END)
    return _before(node, aten.clone.default, part, memory_format=torch.contiguous_format)


def merge_casts(node: Node, writes: Written) -> Node | None:
    """f64(f32(x)) -> f64(x) where the inner cast loses nothing; convert_element_type becomes _to_copy."""
    if node.target is torch.ops.prims.convert_element_type.default:
        return _before(node, aten._to_copy.default, node.args[0], dtype=node.args[1])
    if not is_cast(node):
        return None
    x = uncast(source(node))
    return None if x is source(node) else _before(node, aten._to_copy.default, x, dtype=val(node).dtype)


def drop_view(node: Node, writes: Written) -> Node | None:
    """A view that shows the same elements at the same indices as something it was made from."""
    x = node
    while x.target in VIEWS:
        x = source(x)
        if _shows_the_same(node, x) and not _gives_second_result(node, x):
            return x
    return None


def _shows_the_same(view: Node, x: Node) -> bool:
    a, b = val(view), val(x)
    return same_layout(a, b) and same_size(a.storage_offset(), b.storage_offset())


def _gives_second_result(node: Node, x: Node) -> bool:
    """Whether dropping `node` would return an input, or return `x` twice, as one tensor object."""
    return _is_result(node) and (x.op in INPUTS or _is_result(x))


def _is_result(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def drop_copy(node: Node, writes: Written) -> Node | None:
    """A copy of the same values in the same layout, where nobody can tell it from its source."""
    if node.target not in COPIES and not is_cast(node) and not _is_neutral(node):
        return None
    # copy(destination, x) is what x is after it was written over the destination.
    x, a = source(node, 1 if node.target is aten.copy.default else 0), val(node)
    same = a.dtype == val(x).dtype and a.device == val(x).device and same_layout(a, val(x))
    return x if same and _may_share(node, x, writes) else None


COPIES = (aten.clone.default, aten.lift_fresh_copy.default, aten.copy.default)


def _is_neutral(node: Node) -> bool:
    """x * 1 and x / 1; x + 0 and x - 0 for integers only, for -0.0 + 0 is 0.0."""
    if len(node.args) != 2 or node.kwargs or isinstance(node.args[1], Node):
        return False
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return bool(node.args[1] == 1)
    integer = not val(node).dtype.is_floating_point and not val(node).dtype.is_complex
    return node.target in (aten.add.Tensor, aten.sub.Tensor) and integer and bool(node.args[1] == 0)


def _may_share(copy: Node, x: Node, writes: Written) -> bool:
    """Whether `copy` may become `x`: neither is written into, and no result starts to share memory."""
    memory = base(x)
    if memory in writes or copy in writes:
        return False
    if not is_returned(copy):
        return True
    return memory is x and x.op not in INPUTS and not is_returned(x)


def drop_empty(node: Node, writes: Written) -> Node | None:
    """cat([empty, x]) -> clone(x): the first append to a cache that holds nothing."""
    if node.target is not aten.cat.default:
        return None
    parts = [part for part in tensors(node) if not _is_empty(part)]
    if len(parts) != 1 or val(parts[0]).dtype != val(node).dtype or not is_contiguous(val(node)):
        return None
    return _before(node, aten.clone.default, parts[0], memory_format=torch.contiguous_format)


def _is_empty(node: Node) -> bool:
    return any(same_size(n, 0) for n in val(node).shape)


RULES: tuple[Rule, ...] = (
    number_operand,
    stack_as_cat,
    index_as_slice,
    merge_views,
    merge_casts,
    drop_empty,
    drop_view,
    drop_copy,
)


def _before(node: Node, target: OpOverload, *args: Argument, **kwargs: Argument) -> Node:
    with node.graph.inserting_before(node):
        return insert(node.graph, target, *args, **kwargs)
