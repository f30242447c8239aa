"""The parts of a mask: what is added to attention scores as a sum, what is visible as a conjunction.

    unsqueeze(bias + where(seen & causal, 0, finfo.min), 0)    has the parts
        bias, added                 seen through unsqueeze
        seen, causal, both needed   seen through unsqueeze, or the key is hidden by finfo.min

Each part remembers its path, the nodes from the whole mask down to it, so that the views on the path can be
repeated on the part alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument

from llmcomp.graph import argument, insert, is_tensor, same_shape, val
from llmcomp.passes.constants import number
from llmcomp.passes.match import is_cast
from llmcomp.passes.positions import Index, Terms, broadcast, moves_elements, negated, through_view, truth
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten

Path = tuple[Node, ...]

# Adding this or less hides a key: the lowest number of float16, the narrowest dtype that masks come in.
HIDING = torch.finfo(torch.float16).min
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_AND = (aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default)


@dataclass(frozen=True)
class Added:
    """`factor` times `node` is added to the scores."""

    node: Node
    factor: float = 1.0
    path: Path = ()


@dataclass(frozen=True)
class Hidden:
    """`by`, which is -inf or a very low number, is added to the scores where `visible` is false.

    Where `negate`, that is where it is true. `visible` may be of any dtype: not zero is true.
    """

    visible: Node
    negate: bool
    by: float
    path: Path = ()


Change = Added | Hidden


@dataclass(frozen=True)
class Conjunct:
    """One of several conditions that must all hold; `terms` say where it does, if that is known."""

    node: Node
    negate: bool
    path: Path
    terms: Terms | None


# ---- what is added


def changes(change: Change) -> Iterator[Change]:
    """Split what is added to scores into the terms of its sum, and find those that hide keys."""
    parts = list(_parts(change)) if isinstance(change, Added) else [change]
    whole = len(parts) == 1 and isinstance(parts[0], Added)
    yield from (change,) if whole else parts


def _parts(change: Added) -> Iterator[Change]:
    node, deeper = change.node, (*change.path, change.node)
    if (hidden := _hidden(node, change.factor)) is not None:
        yield replace(hidden, path=deeper if hidden.visible is not node else change.path)
    elif change.factor > 0 and (split := _hidden_and_added(node)) is not None:
        condition, negate, added = split
        yield Hidden(condition, negate, -inf, deeper)
        yield from _parts(replace(change, node=added, path=deeper))
    elif through_view(node, (None,) * val(node).dim()) is not None or is_cast(node):
        for part in _parts(replace(change, node=_first(node), path=deeper)):
            yield _rounded(part, val(node).dtype)
    elif node.target is aten.add.Tensor and all(map(is_tensor, node.args)) and argument(node, "alpha") == 1:
        for operand in node.args:
            assert isinstance(operand, Node)
            yield from _parts(replace(change, node=operand, path=deeper))
    else:
        yield change


def _hidden(node: Node, factor: float) -> Hidden | None:
    """where(visible, 0, low), where(hidden, low, 0), or triu(low, 1): low in the future and 0 elsewhere."""
    if node.target is aten.triu.default:
        low = number(node.args[0])
        return None if low is None or low * factor > HIDING else Hidden(node, True, low * factor)
    choice = _choice(node)
    if choice is None:
        return None
    condition, (yes, no) = choice[0], map(number, choice[1:])
    if yes is None or no is None or max(yes, no) != 0 or min(yes, no) * factor > HIDING:
        return None
    return Hidden(condition, yes != 0, min(yes, no) * factor)


def _hidden_and_added(node: Node) -> tuple[Node, bool, Node] | None:
    """where(visible, bias, -inf), or where(hidden, -inf, bias): (condition, whether it hides, bias)."""
    choice = _choice(node)
    if choice is None:
        return None
    condition, yes, no = choice
    for bias, low in ((yes, no), (no, yes)):
        if number(low) == -inf and isinstance(bias, Node) and is_tensor(bias) and number(bias) is None:
            return condition, bias is no, bias
    return None


def _choice(node: Node) -> tuple[Node, Argument, Argument] | None:
    """(condition, what it gives where true, where false) of where and of masked_fill."""
    if node.target in WHERE:
        return _first(node), node.args[1], node.args[2]
    if node.target in FILLS and isinstance(node.args[1], Node):
        return node.args[1], node.args[2], node.args[0]
    return None


def _rounded(part: Change, dtype: torch.dtype) -> Change:
    """A part under a cast: the lowest number of a wider dtype becomes -inf."""
    lowest = torch.finfo(dtype).min if dtype.is_floating_point else -inf
    return replace(part, by=-inf) if isinstance(part, Hidden) and part.by < lowest else part


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


# ---- what is visible


def conjuncts(hidden: Hidden, index: Index) -> Iterator[Conjunct]:
    """Split what makes a key visible, at `index` of the scores, into conditions that must all hold."""
    index = broadcast(index, val((*hidden.path, hidden.visible)[0]))
    for step, inner in pairwise((*hidden.path, hidden.visible)):
        seen = through_view(step, index)
        index = broadcast(index, val(inner)) if seen is None else seen[1]
    yield from _conjuncts(hidden.visible, hidden.negate, hidden.path, index)


def _conjuncts(node: Node, negate: bool, path: Path, index: Index) -> Iterator[Conjunct]:
    """Through views, `and`, `not` and `not or`."""
    deeper = (*path, node)
    if (seen := through_view(node, index)) is not None:
        yield from _conjuncts(seen[0], negate, deeper, seen[1])
    elif node.target in _NOT and _is_bool(node.args[0]):
        yield from _conjuncts(_first(node), not negate, deeper, index)
    elif node.target in (_OR if negate else _AND) and all(map(_is_bool, node.args[:2])):
        for operand in node.args[:2]:
            assert isinstance(operand, Node)
            yield from _conjuncts(operand, negate, deeper, broadcast(index, val(operand)))
    else:
        terms = truth(node, index)
        yield Conjunct(node, negate, path, negated(terms) if negate else terms)


def _is_bool(value: object) -> bool:
    return isinstance(value, Node) and is_tensor(value) and val(value).dtype == torch.bool


# ---- parts as nodes


def boolean(node: Node) -> Node:
    """`node`, or whether it is not zero."""
    return node if val(node).dtype == torch.bool else insert(node.graph, aten.ne.Scalar, node, 0)


def replayed(node: Node, path: Path) -> Node:
    """A part alone under the views of its path; axes along which it repeats keep one element where that serves."""
    for step in reversed(path):
        if not moves_elements(step):
            continue
        shape = val(_first(step)).shape
        if not same_shape(val(node).shape, shape):
            node = insert(node.graph, aten.expand.default, node, [size_node(node.graph, n) for n in shape])
        assert isinstance(step.target, OpOverload)
        node = insert(node.graph, step.target, node, *step.args[1:], **step.kwargs)
    return node
