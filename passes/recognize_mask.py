"""Masks of attention: causal and sliding-window parts become arguments, what depends on data stays a mask.

    le(arange(n), unsqueeze(arange(m) + p, 1)) & padding[:, None, None, :]  ->  causal from p on, and padding
    where(le(arange(n), unsqueeze(arange(n), 1)), 0, finfo.min) + bias      ->  causal, and bias

Eager models hide a key by adding the lowest finite number to its score. Where a row sees some key that
equals hiding it by -inf, since the exponential of the difference is zero; but a row whose keys are all
hidden gives the mean of all values, not zeros. So a finite mask becomes structure only where every row
provably sees a key (causal rows see their own); otherwise, with padding for example, it stays a float mask
that is added, and equals eager on all rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from llmcomp.graph import Size, argument, insert, is_tensor, same_shape, same_size, val
from llmcomp.passes.constants import number
from llmcomp.passes.positions import (
    KEY,
    QUERY,
    ZERO,
    Affine,
    Index,
    Terms,
    broadcast,
    constant,
    known_true,
    moves_elements,
    negated,
    through_view,
    truth,
)
from llmcomp.passes.sizes import size_node, writable

aten = torch.ops.aten

# Adding this or less hides a key: the lowest number of float16, the narrowest dtype that masks come in.
HIDING = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class Added:
    """`factor` times `node` is added to the scores."""

    node: Node
    factor: float = 1.0


@dataclass(frozen=True)
class Hidden:
    """Where `visible` is false (true, where `negate`), the score is, or is lowered by, `by`: -inf or hardly
    less.
    """

    visible: Node
    negate: bool
    by: float


Change = Added | Hidden


@dataclass(frozen=True)
class Band:
    """Query i sees the keys from i - below to i + above; None is no limit."""

    above: Size | None = None
    below: Size | None = None


FULL = Band()


@dataclass(frozen=True)
class Shape:
    """Sizes of the scores."""

    batch: Size
    heads: Size
    queries: Size
    keys: Size


@dataclass(frozen=True)
class Mask:
    """The arguments of llmcomp::attention that say which keys are visible."""

    causal: bool
    offset: int | Node
    window: int
    mask: Node | None


# ---- splitting


@dataclass(frozen=True)
class Conjunct:
    """One operand of a conjunction, seen through `path`, the nodes from the whole to it; `terms` say where
    it holds.
    """

    node: Node
    negate: bool
    path: tuple[Node, ...]
    terms: Terms | None


_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_AND = (aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default)


def conjuncts(
    node: Node, index: Index, negate: bool = False, path: tuple[Node, ...] = ()
) -> Iterator[Conjunct]:
    """Split a boolean node into operands of which all must hold, through views, `and`, `not` and `not or`."""
    deeper = (*path, node)
    if (seen := through_view(node, index)) is not None:
        yield from conjuncts(*seen, negate, deeper)
    elif node.target in _NOT and val(_first(node)).dtype == torch.bool:
        yield from conjuncts(_first(node), index, not negate, deeper)
    elif node.target in (_OR if negate else _AND) and all(map(_is_bool, node.args[:2])):
        for operand in node.args[:2]:
            assert isinstance(operand, Node)
            yield from conjuncts(operand, broadcast(index, val(operand)), negate, deeper)
    else:
        terms = truth(node, index)
        yield Conjunct(node, negate, path, negated(terms) if negate else terms)


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _is_bool(value: object) -> bool:
    return isinstance(value, Node) and is_tensor(value) and val(value).dtype == torch.bool


def changes(change: Change) -> Iterator[Change]:
    """Split what is added to scores into sums, and read `where(visible, 0, lowest)` as hiding."""
    if isinstance(change, Hidden):
        yield change
        return
    node, factor = change.node, change.factor
    if node.target is aten.add.Tensor and all(map(is_tensor, node.args)) and argument(node, "alpha") == 1:
        for operand in node.args:
            assert isinstance(operand, Node)
            yield from changes(Added(operand, factor))
    elif (hidden := _hidden(node, factor)) is not None:
        yield hidden
    else:
        yield change


WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)


def _hidden(node: Node, factor: float) -> Hidden | None:
    """where(visible, 0, low), where(hidden, low, 0), or triu(low, 1), which is low in the future and 0
    elsewhere.
    """
    if node.target in (aten.clone.default, aten.expand.default, aten._to_copy.default):
        return _hidden(_first(node), factor)
    if (
        node.target is aten.triu.default
        and (low := number(node.args[0])) is not None
        and low * factor <= HIDING
    ):
        return Hidden(node, True, low * factor)
    if node.target not in WHERE:
        return None
    condition, (yes, no) = _first(node), map(number, node.args[1:3])
    if yes is None or no is None or sorted((yes, no))[1] != 0 or min(yes, no) * factor > HIDING:
        return None
    return Hidden(condition, yes != 0, min(yes, no) * factor)


# ---- the band


@dataclass(frozen=True)
class Reading:
    """The structure of a mask, and what is not structure: changes and conjuncts that stay."""

    band: Band
    changes: tuple[Change, ...] = ()
    visible: tuple[Conjunct, ...] = ()


def read(given: Iterable[Change], shape: Shape, band: Band = FULL) -> Reading:
    """Narrow `band` by all that is structure in the changes `given` to scores of `shape`."""
    left, visible, finite = [], [], []
    for change in given:
        if isinstance(change, Added):
            left.append(change)
        elif change.by > -inf:
            finite.append(change)
        else:
            for part in _conjuncts(change, shape):
                narrowed = narrow(band, part.terms, shape)
                visible += [part] if narrowed is None else []
                band = narrowed or band
    narrowed = _narrow_by_all(band, [part for change in finite for part in _conjuncts(change, shape)], shape)
    if narrowed is None:
        return Reading(band, (*left, *finite), tuple(visible))
    return Reading(narrowed, tuple(left), tuple(visible))


def _conjuncts(change: Hidden, shape: Shape) -> Iterator[Conjunct]:
    index: Index = (None, None, ZERO if same_size(shape.queries, 1) else QUERY, KEY)
    return conjuncts(change.visible, broadcast(index, val(change.visible)), change.negate)


def _narrow_by_all(band: Band, finite: Sequence[Conjunct], shape: Shape) -> Band | None:
    """The band with all of `finite` in it, if each is structure and every row keeps a key."""
    for part in finite:
        narrowed = narrow(band, part.terms, shape)
        if narrowed is None:
            return None
        band = narrowed
    return band if not finite or every_row_sees(band, shape) else None


def narrow(band: Band, terms: Terms | None, shape: Shape) -> Band | None:
    """What the conjunction `terms` leaves of `band`, or None where it is unknown or no band of a fixed
    width.
    """
    if terms is None:
        return None
    for term in terms:
        slopes = (-term.key, term.key) if same_size(shape.queries, 1) else (term.query, term.key)
        if _holds_everywhere(term, shape):
            continue
        if slopes == (1, -1) and (above := _smaller(band.above, term.rest)) is not None:
            band = replace(band, above=above)
        elif slopes == (-1, 1) and (below := _smaller(band.below, term.rest)) is not None:
            band = replace(band, below=below)
        else:
            return None
    return None if _arguments(band, shape) is None else band


def _smaller(a: Size | None, b: Size) -> Size | None:
    if a is None or known_true(b <= a):
        return b
    return a if known_true(a <= b) else None


def _holds_everywhere(term: Affine, shape: Shape) -> bool:
    least = term.rest
    for slope, size in ((term.query, shape.queries), (term.key, shape.keys)):
        least = least + slope * (size - 1) if slope < 0 else least
    return known_true(least >= 0)


def every_row_sees(band: Band, shape: Shape) -> bool:
    """Whether each query provably sees at least one key."""
    above = band.above is None or known_true(band.above >= 0)
    below = band.below is None or known_true(shape.keys - shape.queries + band.below >= 0)
    both = band.above is None or band.below is None or known_true(band.above + band.below >= 0)
    return above and below and both and known_true(shape.keys >= 1)


def _arguments(band: Band, shape: Shape) -> tuple[bool, Size, int] | None:
    """(causal, offset, window) of a band, or None where its width depends on the input."""
    if band.above is not None and not writable(band.above):
        return None
    if band.below is None:
        return (False, 0, 0) if band.above is None else (True, band.above, 0)
    if band.above is not None and same_size(band.above, band.below) and known_true(band.below > 0):
        width = constant(band.below)
        return None if width is None else (False, 0, width + 1)
    # Without a limit above, the last key is one.
    above = shape.keys - 1 if band.above is None else band.above
    window = constant(above + band.below + 1)
    return None if window is None or window <= 0 or not writable(above) else (True, above, window)


# ---- writing


class MaskWriter:
    """Gives the mask arguments of attention calls; calls with equal masks share the nodes that compute
    them.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._written: dict[object, Mask] = {}

    def write(self, given: Sequence[Change], shape: Shape, causal: bool = False) -> Mask:
        """The arguments for scores of `shape` changed by `given`, and limited to j <= i where `causal`.

        Nodes are inserted at the graph's insertion point.
        """
        split = tuple(c for change in given for c in changes(change))
        key = (split, causal, str(shape))
        if key not in self._written:
            self._written[key] = self._write(read(split, shape, Band(above=0) if causal else FULL), shape)
        return self._written[key]

    def _write(self, reading: Reading, shape: Shape) -> Mask:
        arguments = _arguments(reading.band, shape)
        assert arguments is not None
        causal, offset, window = arguments
        return Mask(causal, size_node(self._graph, offset), window, self._combined(reading))

    def _combined(self, reading: Reading) -> Node | None:
        added = self._fold(aten.add.Tensor, [self._added(c) for c in reading.changes])
        mask = visible = self._fold(aten.bitwise_and.Tensor, [self._replayed(c) for c in reading.visible])
        if added is not None:
            mask = (
                added
                if visible is None
                else insert(self._graph, aten.where.ScalarOther, visible, added, -inf)
            )
        while mask is not None and val(mask).dim() < 4:
            mask = insert(self._graph, aten.unsqueeze.default, mask, 0)
        return mask

    def _fold(self, target: OpOverload, nodes: Sequence[Node]) -> Node | None:
        return reduce(lambda a, b: insert(self._graph, target, a, b), nodes) if nodes else None

    def _added(self, change: Change) -> Node:
        if isinstance(change, Added):
            same = change.factor == 1.0
            return change.node if same else insert(self._graph, aten.mul.Tensor, change.node, change.factor)
        device = val(change.visible).device
        zero = insert(self._graph, aten.full.default, [], 0.0, dtype=torch.float32, device=device)
        visible = self._boolean(change.visible)
        if change.negate:
            return insert(self._graph, aten.where.ScalarSelf, visible, change.by, zero)
        return insert(self._graph, aten.where.ScalarOther, visible, zero, change.by)

    def _boolean(self, node: Node) -> Node:
        return node if val(node).dtype == torch.bool else insert(self._graph, aten.ne.Scalar, node, 0)

    def _replayed(self, part: Conjunct) -> Node:
        """The conjunct alone, under the views that the whole was seen through; left broadcast where that
        serves.
        """
        node = self._boolean(part.node)
        for step in reversed(part.path):
            if not moves_elements(step):
                continue
            shape = val(_first(step)).shape
            if not same_shape(val(node).shape, shape):
                node = insert(
                    self._graph, aten.expand.default, node, [size_node(self._graph, n) for n in shape]
                )
            node = _again(step, node)
        return insert(self._graph, aten.bitwise_not.default, node) if part.negate else node


def _again(step: Node, node: Node) -> Node:
    """The view `step`, of `node`."""
    assert isinstance(step.target, OpOverload)
    return insert(node.graph, step.target, node, *step.args[1:], **step.kwargs)
