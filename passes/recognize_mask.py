"""Masks of attention: causal and sliding windows become arguments, what depends on data stays a mask.

    le(arange(n), unsqueeze(arange(m) + p, 1)) & padding[:, None, None, :]  ->  causal from p on, and padding
    where(le(arange(n), unsqueeze(arange(n), 1)), 0, finfo.min) + bias      ->  causal, and bias

Eager models hide a key by adding the lowest finite number to its score. Where a row sees some key that equals
hiding it by -inf, since the exponential of the difference is zero; but a row whose keys are all hidden gives
the mean of all values, not zeros. So finite masks become structure only where every row provably sees a key
(causal rows see their own) and no other finite mask stays; otherwise, with padding for example, they stay
float masks that are added, and equal eager on all rows. A bias that is added is taken to hide nothing. A row
that -inf hides altogether is zeros, as in scaled_dot_product_attention; written-out eager attention gives NaN.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from llmcomp.graph import insert, val
from llmcomp.passes.mask_band import CAUSAL, FULL, Band, Shape, arguments, every_row_sees, narrow
from llmcomp.passes.mask_parts import Added, Change, Conjunct, boolean, changes, conjuncts, replayed
from llmcomp.passes.sizes import size_node

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """The arguments of llmcomp::attention that say which keys are visible."""

    causal: bool
    offset: int | Node
    window: int
    mask: Node | None


@dataclass(frozen=True)
class Reading:
    """The structure of a mask, and what is not structure: changes and conjuncts that stay."""

    band: Band
    changes: tuple[Change, ...]
    visible: tuple[Conjunct, ...]


def read(parts: Iterable[Change], shape: Shape, band: Band = FULL) -> Reading:
    """Narrow `band` by all that is structure in the `parts` of a mask for scores of `shape`."""
    added: list[Change] = []
    visible: list[Conjunct] = []
    finite: list[Change] = []
    lowered: list[Conjunct] = []
    for part in parts:
        if isinstance(part, Added):
            added.append(part)
        elif part.by > -inf:
            finite.append(part)
            lowered += conjuncts(part, shape.index)
        else:
            visible += conjuncts(part, shape.index)
    band, visible = _narrowed(band, visible, shape)
    whole, rest = _narrowed(band, lowered, shape)
    if rest or (lowered and not every_row_sees(whole, shape)):
        return Reading(band, (*added, *finite), tuple(visible))
    return Reading(whole, tuple(added), tuple(visible))


def _narrowed(band: Band, conditions: list[Conjunct], shape: Shape) -> tuple[Band, list[Conjunct]]:
    """The band with those of `conditions` in it that are structure, and the others.

    The order does not matter: that no key further back than 8 is seen is a window only beside a limit above.
    """
    rest = []
    for condition in conditions:
        narrowed = narrow(band, condition.terms, shape)
        rest += [condition] if narrowed is None else []
        band = narrowed or band
    return (band, rest) if len(rest) in (0, len(conditions)) else _narrowed(band, rest, shape)


class MaskWriter:
    """Gives the mask arguments of attention calls; calls with equal masks share the nodes that compute them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._written: dict[object, Mask] = {}

    def write(self, given: Sequence[Change], shape: Shape, causal: bool = False) -> Mask:
        """The arguments for scores of `shape` changed by `given`, and limited to j <= i where `causal`.

        Nodes are inserted at the graph's insertion point.
        """
        parts = tuple(part for change in given for part in changes(change))
        key = (parts, causal, str(shape))
        if key not in self._written:
            self._written[key] = self._write(read(parts, shape, CAUSAL if causal else FULL), shape)
        return self._written[key]

    def _write(self, reading: Reading, shape: Shape) -> Mask:
        structure = arguments(reading.band, shape)
        assert structure is not None
        causal, offset, window = structure
        return Mask(causal, size_node(self._graph, offset), window, self._combined(reading))

    def _combined(self, reading: Reading) -> Node | None:
        """One mask of four axes of all that is no structure."""
        added = self._fold(aten.add.Tensor, [self._added(c) for c in reading.changes])
        mask = visible = self._fold(aten.bitwise_and.Tensor, [self._condition(c) for c in reading.visible])
        if added is not None:
            split = visible is not None
            mask = insert(self._graph, aten.where.ScalarOther, visible, added, -inf) if split else added
        while mask is not None and val(mask).dim() < 4:
            mask = insert(self._graph, aten.unsqueeze.default, mask, 0)
        return mask

    def _fold(self, target: OpOverload, nodes: Sequence[Node]) -> Node | None:
        return reduce(lambda a, b: insert(self._graph, target, a, b), nodes) if nodes else None

    def _condition(self, condition: Conjunct) -> Node:
        node = replayed(boolean(condition.node), condition.path)
        return insert(self._graph, aten.bitwise_not.default, node) if condition.negate else node

    def _added(self, change: Change) -> Node:
        if isinstance(change, Added):
            node = replayed(change.node, change.path)
            return node if change.factor == 1.0 else insert(self._graph, aten.mul.Tensor, node, change.factor)
        device = val(change.visible).device
        zero = insert(self._graph, aten.full.default, [], 0.0, dtype=torch.float32, device=device)
        visible = replayed(boolean(change.visible), change.path)
        if change.negate:
            return insert(self._graph, aten.where.ScalarSelf, visible, change.by, zero)
        return insert(self._graph, aten.where.ScalarOther, visible, zero, change.by)
