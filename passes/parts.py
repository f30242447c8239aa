"""Which outputs of a linear layer a node shows: q, k or v of one layer that makes all three, in whatever order.

linear(x, a)[..., s:e]                             rows s to e of a
select(view(linear(x, a), [B, S, H, 3, D]), 3, 0)  rows (3 h) D to (3 h + 1) D of every head h
"""

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from llmcomp.graph import argument, is_returned, is_tensor, known, same_size, source, val
from llmcomp.products import LINEAR

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
COPIES = (aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True)
class Part:
    """A node that shows outputs of `linear`, by their numbers `rows`, whose axes come behind those of the rows of x.

    `axes` says which of all these axes each axis of the node is; `leads` are sizes of the first ones, as a view names
    them, where there was one.
    """

    linear: Node
    rows: Tensor
    axes: tuple[int, ...]
    leads: tuple[Argument, ...] = ()

    @property
    def lead(self) -> int:
        """How many axes come first."""
        return val(self.linear).dim() - 1

    @property
    def is_whole(self) -> bool:
        """Whether it shows all of the layer."""
        return self.rows.numel() == val(self.linear).shape[-1]

    def shows(self, dim: int) -> bool:
        """Whether outputs lie along an axis of the node."""
        return self.axes[dim] >= self.lead

    def along(self, dim: int, kept: tuple[int, ...]) -> "Part":
        """Some slices of it along an axis of the node."""
        return replace(self, rows=self.rows.index_select(self.axes[dim] - self.lead, torch.tensor(kept)))


def part_of(node: Node) -> Part | None:
    """What a node shows of a linear layer, where it is the first that does not show all of it."""
    found = _shown(node)
    if found is None or found.is_whole:
        return None
    above = source(source(node)) if node.target is operator.getitem else source(node)
    before = _shown(above)
    return found if before is not None and before.is_whole else None


def parts_of(linear: Node) -> list[Node] | None:
    """All nodes that are the first to show a part of a layer; None where somebody reads it as a whole, or is given a
    part with its strides.
    """
    found, stack = [], list(linear.users)
    while stack:
        node = stack.pop()
        if node.target in (*SPLITS, aten.unbind.int):
            stack += node.users
        elif (shown := _shown(node)) is None or is_returned(node):
            return None
        elif shown.is_whole:
            stack += node.users
        else:
            found.append(node)
    return found


def _shown(node: Node) -> Part | None:
    if not is_tensor(node):
        return None
    if node.target is LINEAR:
        width = val(node).shape[-1]
        return Part(node, torch.arange(width), tuple(range(val(node).dim()))) if isinstance(width, int) else None
    if node.target in COPIES:
        return _shown(source(node))
    if node.target in VIEWS:
        return _viewed(node)
    if node.target is aten.transpose.int:
        return _turned(node)
    if node.target in (aten.slice.Tensor, aten.select.int):
        return _picked(node)
    if node.target is operator.getitem and source(node).target is aten.unbind.int:
        return _unbound(node)
    place = place_in_split(node)
    return None if place is None else _cut(*place)


def _viewed(node: Node) -> Part | None:
    inner = _shown(source(node))
    if inner is None or val(node).dim() <= inner.lead or inner.axes != tuple(range(len(inner.axes))):
        return None
    before, after = val(inner.linear).shape, val(node).shape
    behind = after[inner.lead :]
    if not all(map(same_size, before[: inner.lead], after)) or not all(isinstance(n, int) for n in behind):
        return None
    sizes = node.args[1]
    assert isinstance(sizes, list | tuple)
    return Part(inner.linear, inner.rows.reshape(behind), tuple(range(len(after))), tuple(sizes[: inner.lead]))


def _turned(node: Node) -> Part | None:
    inner = _shown(source(node))
    if inner is None:
        return None
    axes = list(inner.axes)
    a, b = (int(n) for n in node.args[1:])  # type: ignore[arg-type]
    axes[a], axes[b] = axes[b], axes[a]
    return replace(inner, axes=tuple(axes))


def _picked(node: Node) -> Part | None:
    """Of a slice, or of what is selected, along an axis."""
    inner = _shown(source(node))
    dim, *rest = (known(argument(node, a.name)) for a in node.target._schema.arguments[1:])  # type: ignore[union-attr]
    if inner is None or not isinstance(dim, int) or not all(isinstance(n, int | None) for n in rest):
        return None
    return _taken(inner, dim, node.target, *rest)


def _unbound(node: Node) -> Part | None:
    inner, dim = _shown(source(source(node))), argument(source(node), "dim")
    assert isinstance(dim, int)
    return None if inner is None else _taken(inner, dim, aten.select.int, node.args[1])


def _taken(inner: Part, dim: int, operator: object, *rest: object) -> Part | None:
    """What a slice or select along an axis of a node leaves."""
    if not inner.shows(dim):
        return None
    axis, axes = inner.axes[dim], inner.axes
    assert callable(operator)
    rows = operator(inner.rows, axis - inner.lead, *rest)
    if rows.dim() < inner.rows.dim():
        axes = tuple(other - (other > axis) for other in axes if other != axis)
    return replace(inner, rows=rows, axes=axes)


def _cut(whole: Node, dim: int, start: int, end: int) -> Part | None:
    """Of a part of a split."""
    inner = _shown(whole)
    if inner is None or not inner.shows(dim):
        return None
    return replace(inner, rows=inner.rows.narrow(inner.axes[dim] - inner.lead, start, end - start))


def place_in_split(node: Node) -> tuple[Node, int, int, int] | None:
    """What a part of a split tensor is a part of, along which axis, from where to where."""
    if node.target is not operator.getitem or source(node).target not in SPLITS:
        return None
    split, at = source(node), int(node.args[1])  # type: ignore[arg-type]
    dim = int(argument(split, "dim")) % val(node).dim()  # type: ignore[arg-type]
    sizes = [part.shape[dim] for part in split.meta["val"][: at + 1]]
    if not all(isinstance(n, int) for n in sizes):
        return None
    return source(split), dim, sum(sizes[:-1]), sum(sizes)
