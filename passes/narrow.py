"""Some slices of a node along an axis, computed of some slices of what feeds it, down to the weights.

    gated(linear(x, a), linear(x, b)), channels kept   ->  gated(linear(x, a[kept]), linear(x, b[kept]))
    view(linear(x, a), [B, S, H, D]), heads kept       ->  view(linear(x, a[rows of kept]), [B, S, h, D])
    linear(x, a)[..., s:e], channels kept              ->  linear(x, a[s + kept]); passes/parts.py has all such parts
    rms_norm(x, w), x zero in the other channels       ->  rms_norm(x', w[kept], count=N)
    attention(q, k, v), heads kept                     ->  attention(q', k', v')
    arange(4), 1 and 3 kept                            ->  the constant [1, 3]

A `Narrowing` first collects what is wanted, and finds out whether all of it can be had, then makes it.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg

from llmcomp.graph import Size, argument, insert, is_tensor, same_size, source, val, written
from llmcomp.passes.axis_maps import MAPS, axis_map
from llmcomp.passes.parts import SPLITS, VIEWS, Part, part_of, place_in_split
from llmcomp.passes.relations import is_pointwise
from llmcomp.passes.zero_structure import PREPARED, Values
from llmcomp.products import LINEAR, operand_of

aten, ops = torch.ops.aten, torch.ops.llmcomp
ATTENTION = ops.attention.default
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


class Whole(Exception):
    """Why a node can't be computed for some of its slices alone."""


@dataclass(frozen=True)
class Slices:
    """Slices along an axis, by their numbers in ascending order."""

    dim: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Neighbouring key/value heads, `start` to `end`, each read by `each` of the query heads that stay."""

    start: int
    end: int
    each: int

    @property
    def heads(self) -> int:
        """The query heads that stay."""
        return (self.end - self.start) * self.each


Want = tuple[Node, Slices]


@dataclass
class Narrowing:
    """What is wanted of the nodes of a graph whose weights have these values.

    `runs`: attention whose keys and values stay as they are (a cache of the caller): it is split into several.
    """

    values: Values
    runs: Mapping[Node, Sequence[Run]] = field(default_factory=dict)
    wanted: dict[Node, Slices] = field(default_factory=dict)
    _edges: set[tuple[Node, Node]] = field(default_factory=set)

    def want(self, node: Node, dim: int, kept: Sequence[int]) -> None:
        """Note slices of a node that are wanted, and what they are computed of.

        Raises:
            Whole: all of some node is needed.
        """
        stack = [(node, Slices(dim % val(node).dim(), tuple(kept)))]
        while stack:
            node, slices = stack.pop()
            if node in self.wanted:
                if self.wanted[node] != slices:
                    raise Whole(f"{node.name} is read in two ways")
                continue
            if not isinstance(val(node).shape[slices.dim], int):
                raise Whole(f"{node.name} has no fixed size")
            operands = [] if self._is_weight(node) else self._operands(node, slices)
            self.wanted[node] = slices
            self._edges |= {(node, operand) for operand, _ in operands}
            stack += operands

    def _is_weight(self, node: Node) -> bool:
        return self.values.of(node) is not None

    def others(self) -> Iterator[tuple[Node, Node]]:
        """(user, node) for every use of what is wanted that is not among what it was wanted for."""
        for node in self.wanted:
            if not self._is_weight(node):
                users = (part for user in node.users for part in (user.users if user.target in SPLITS else (user,)))
                yield from ((user, node) for user in users if (user, node) not in self._edges)

    def reads(self, user: Node, node: Node) -> bool:
        """Whether slices of a node are wanted for slices of a user."""
        return (user, node) in self._edges

    def check_readers(self, readers: Set[Node]) -> None:
        """Refuse other uses than by `readers`, but of what costs little to compute twice.

        Raises:
            Whole: names the user.
        """
        for user, node in self.others():
            if user not in readers and not self._is_cheap(node):
                raise Whole("it is returned" if user.op == "output" else f"{user.name} reads all of it")

    def _is_cheap(self, node: Node) -> bool:
        """Whether no layer is computed for it, as for the biases of heads that are made of their numbers."""
        if self._is_weight(node) or range_of(node) is not None:
            return True
        operands = [operand for user, operand in self._edges if user is node]
        return (
            node.target not in (LINEAR, aten.embedding.default)
            and bool(operands)
            and all(map(self._is_cheap, operands))
        )

    # ---- what it takes ----------------------------------------------------------------------------------------------

    def _operands(self, node: Node, slices: Slices) -> list[Want]:
        last = slices.dim == val(node).dim() - 1
        if node.target is ATTENTION:
            return self._of_attention(node, slices)
        if range_of(node) is not None:
            return []
        if (part := part_of(node)) is not None and part.shows(slices.dim):
            self._of_linear(part.linear, Slices(part.lead, ()))
            return []
        if node.target in VIEWS:
            return [(source(node), through_view(val(source(node)).shape, val(node).shape, slices, node))]
        if last and node.target is LINEAR:
            return self._of_linear(node, slices)
        if (place := place_in_split(node)) is not None and place[1] != slices.dim:
            return [(place[0], slices)]
        if last and node.target is ops.rms_norm.default:
            return self._of_norm(node, slices)
        if last and node.target is aten.embedding.default:
            return [self._weight(node, source(node), Slices(1, slices.kept))]
        return _by_axis(node, slices)

    def _of_linear(self, node: Node, slices: Slices) -> list[Want]:
        weight, bias, kn = node.args[1:4]
        assert isinstance(weight, Node)
        wanted = [self._weight(node, weight, Slices(1 if kn else 0, slices.kept))]
        return wanted + ([self._weight(node, bias, Slices(0, slices.kept))] if isinstance(bias, Node) else [])

    def _weight(self, node: Node, weight: Node, slices: Slices) -> Want:
        if not self._is_weight(weight):
            raise Whole(f"the weight of {node.name} is computed")
        return weight, slices

    def _of_norm(self, node: Node, slices: Slices) -> list[Want]:
        """The statistic is that of the whole row where what goes is zero; the number of channels is kept."""
        x, weight = source(node), node.args[1]
        zero = self.values.channels(x)
        if zero is None or not bool(_without(zero, slices.kept).all()):
            raise Whole(f"the mean square of {node.name} counts channels that are not zero")
        return [(x, slices), *([(weight, Slices(0, slices.kept))] if isinstance(weight, Node) else [])]

    def _of_attention(self, node: Node, slices: Slices) -> list[Want]:
        if slices.dim != 1:
            raise Whole(f"{node.name} is not wanted head by head")
        q, k, v = (source(node, i) for i in range(3))
        per_head: list[Want] = [(q, slices)]
        per_head += [(operand, Slices(axis, slices.kept)) for operand, axis in _per_head(node)]
        if node in self.runs:
            return per_head
        heads, groups = (val(x).shape[1] for x in (q, k))
        assert isinstance(heads, int) and isinstance(groups, int)
        read = [head // (heads // groups) for head in slices.kept]
        some = tuple(sorted(set(read)))
        if len({read.count(group) for group in some}) > 1:
            raise Whole(f"the heads of {node.name} that stay do not share keys evenly")
        return per_head + ([(k, Slices(1, some)), (v, Slices(1, some))] if len(some) < groups else [])

    # ---- making it --------------------------------------------------------------------------------------------------

    def make(self, graph: Graph, indices: "Indices") -> dict[Node, Node]:
        """The smaller nodes by those that they stand for, each inserted before it."""
        made: dict[Node, Node] = {}
        for node in sorted(n for n in self.wanted if not self._is_weight(n)):
            with graph.inserting_before(node):
                made[node] = self._made(node, made, indices)
        return made

    def _made(self, node: Node, made: Mapping[Node, Node], indices: "Indices") -> Node:
        slices = self.wanted[node]
        last = slices.dim == val(node).dim() - 1

        def smaller(operand: Node) -> Node:
            if (node, operand) not in self._edges:
                return operand
            return made[operand] if operand in made else take(operand, self.wanted[operand], indices)

        if (part := part_of(node)) is not None and part.shows(slices.dim):
            return alone(part.along(slices.dim, slices.kept), indices)
        if (numbers := range_of(node)) is not None:
            some = indices.node([numbers[k] for k in slices.kept], val(node))
            same = val(node).dtype == torch.int64
            return some if same else insert(node.graph, aten._to_copy.default, some, dtype=val(node).dtype)
        if (place := place_in_split(node)) is not None:
            return insert(node.graph, aten.slice.Tensor, smaller(place[0]), *place[1:])
        if node in self.runs:
            return _made_in_runs(node, self.runs[node], smaller)
        given, named = map_arg((node.args, node.kwargs), smaller)
        args, kwargs = _resized(node, slices, given, dict(named), last)
        assert callable(node.target)
        return insert(node.graph, node.target, *args, **kwargs)


def range_of(node: Node) -> range | None:
    """The whole numbers that a node holds, where they are written into the graph."""
    if node.target not in RANGES or not all(isinstance(n, int) for n in node.args):
        return None
    return None if val(node).dtype.is_floating_point else range(*node.args)  # type: ignore[arg-type]


def _without(zero: Tensor, kept: Sequence[int]) -> Tensor:
    """The entries of a vector that are not kept."""
    gone = torch.ones_like(zero)
    gone[list(kept)] = False
    return zero[gone]


def _by_axis(node: Node, slices: Slices) -> list[Want]:
    """The operands of operators that keep the axis as it is: pointwise ones, transposes, norms along another one."""
    if node.target is operator.getitem or not (node.target in MAPS or is_pointwise(node)) or written(node):
        raise Whole(f"{node.name} is not computed slice by slice")
    found = []
    for use in axis_map(node):
        axis = next((a for a, b in use.axes.items() if b == slices.dim), None)
        if axis is None:
            continue
        if not same_size(val(use.operand).shape[axis], val(node).shape[slices.dim]):
            raise Whole(f"{node.name} takes a part of {use.operand.name}")
        found.append((use.operand, Slices(axis, slices.kept)))
    covered = {operand for operand, _ in found}
    first = next((n for n in node.all_input_nodes if is_tensor(n)), None)
    if first is None or (first not in covered and not is_pointwise(node)):
        raise Whole(f"{node.name} is not computed slice by slice")
    return found


def _resized(
    node: Node, slices: Slices, args: Sequence[Argument], kwargs: dict[str, Argument], last: bool
) -> tuple[Sequence[Argument], dict[str, Argument]]:
    """The arguments of a smaller node: sizes that name the axis, and the count of a norm."""
    if node.target in (*VIEWS, aten.expand.default):
        sizes = list(args[1])  # type: ignore[arg-type]
        sizes[slices.dim - (val(node).dim() - len(sizes))] = len(slices.kept)
        return (args[0], sizes), kwargs
    if last and node.target is ops.rms_norm.default:
        count = argument(node, "count") or val(node).shape[-1]
        names = ("x", "weight", "eps", "plus_one", "round_first", "dtype")
        given = dict(zip(names, args, strict=False)) | kwargs
        return tuple(given.get(name) for name in names) + (count,), {}
    return args, kwargs


# ---- weights --------------------------------------------------------------------------------------------------------


class Indices:
    """Constants of the module that owns a graph, each registered once."""

    def __init__(self, graph: Graph) -> None:
        assert graph.owning_module is not None
        self.graph, self.module = graph, graph.owning_module
        self.names: dict[tuple[tuple[int, ...], torch.device], str] = {}

    def node(self, kept: Sequence[int], like: Tensor) -> Node:
        """A constant, where the graph stands."""
        key = (tuple(kept), like.device)
        if key not in self.names:
            name = next(n for i in range(1 << 30) if not hasattr(self.module, n := f"kept_{i}"))
            self.module.register_buffer(name, torch.tensor(kept, device=like.device), persistent=False)
            self.names[key] = name
        index = self.graph.get_attr(self.names[key])
        mode = torch._guards.detect_fake_mode([like])
        assert mode is not None
        with mode:
            index.meta["val"] = torch.empty(len(kept), dtype=torch.int64, device=like.device)
        return index


def take(weight: Node, slices: Slices, indices: Indices) -> Node:
    """The part of a weight that counts, made where the graph stands and prepared."""
    index = indices.node(slices.kept, val(weight))
    part = insert(weight.graph, aten.index_select.default, weight, slices.dim, index)
    part.meta[PREPARED] = True
    return part


def alone(part: Part, indices: Indices) -> Node:
    """A part of a linear layer as a layer of its own, made where the graph stands."""
    linear, kept = part.linear, tuple(part.rows.flatten().tolist())
    weight, bias, kn = linear.args[1:4]
    assert isinstance(weight, Node)
    some = take(weight, Slices(1 if kn else 0, kept), indices)
    less = take(bias, Slices(0, kept), indices) if isinstance(bias, Node) else None
    made = insert(linear.graph, LINEAR, operand_of(linear), some, less, bool(kn))
    if part.rows.dim() == 0:  # a number for each row of x
        made = insert(linear.graph, aten.select.int, made, part.lead, 0)
    elif part.rows.dim() > 1:
        made = insert(linear.graph, aten.view.default, made, [*part.leads, *part.rows.shape])
    moved = [dim for dim, axis in enumerate(part.axes) if dim != axis]
    if len(moved) == 2:
        return insert(linear.graph, aten.transpose.int, made, *moved)
    return insert(linear.graph, aten.permute.default, made, list(part.axes)) if moved else made


# ---- attention ------------------------------------------------------------------------------------------------------


def _per_head(node: Node) -> list[tuple[Node, int]]:
    """The mask and the sinks of attention where they differ from head to head, and the axis along which they do."""
    mask, sinks = node.args[3:5]
    found = [(sinks, 0)] if isinstance(sinks, Node) else []
    if isinstance(mask, Node):
        axis = val(mask).dim() - 3  # of (heads, queries, keys), which may lack the first
        if axis >= 0 and not same_size(val(mask).shape[axis], 1):
            found.append((mask, axis))
    return found


def _made_in_runs(node: Node, runs: Sequence[Run], smaller: Callable[[Node], Node]) -> Node:
    """Attention over parts of keys and values that stay as they are."""
    graph, parts, first = node.graph, [], 0
    q = smaller(source(node))
    for run in runs:
        heads = (first, first + run.heads)
        k, v = (_cut(source(node, i), 1, run.start, run.end) for i in (1, 2))
        cut = {operand: _cut(smaller(operand), axis, *heads) for operand, axis in _per_head(node)}
        mask, sinks = (cut.get(n, n) if isinstance(n, Node) else n for n in node.args[3:5])
        part = insert(graph, ATTENTION, _cut(q, 1, *heads), k, v, mask, sinks, *node.args[5:], **node.kwargs)
        parts.append(insert(graph, aten.transpose.int, part, 1, 2) if len(runs) > 1 else part)
        first = heads[1]
    if len(parts) == 1:
        return parts[0]
    return insert(graph, aten.transpose.int, insert(graph, aten.cat.default, parts, 2), 1, 2)


def _cut(node: Node, dim: int, start: int, end: int) -> Node:
    """A part of a node along an axis; the node itself where that is all of it."""
    if start == 0 and same_size(val(node).shape[dim], end):
        return node
    return insert(node.graph, aten.slice.Tensor, node, dim, start, end)


# ---- views ----------------------------------------------------------------------------------------------------------


def through_view(before: Sequence[Size], after: Sequence[Size], slices: Slices, node: Node) -> Slices:
    """The slices of what is viewed that are wanted of a view.

    Raises:
        Whole: they do not lie along one of its axes.
    """
    olds, news = next((g for g in view_groups(before, after) if slices.dim in g[1]), ((), ()))
    inner_axes = [after[d] for d in news if d > slices.dim]
    outer_axes = [after[d] for d in news if d < slices.dim]
    old = [d for d in olds if not same_size(before[d], 1)] or list(olds[:1])
    if any(isinstance(n, SymInt) for n in inner_axes) or not all(same_size(n, 1) for n in outer_axes) or not old:
        raise Whole(f"{node.name} mixes the axis with others")
    inner = _product(inner_axes)
    flat = [k * inner + i for k in slices.kept for i in range(inner)]
    below_axes = [before[d] for d in old[1:]]
    if any(isinstance(n, SymInt) for n in below_axes):
        raise Whole(f"{node.name} mixes the axis with others")
    below = _product(below_axes)
    blocks = tuple(dict.fromkeys(f // below for f in flat))
    if [b * below + i for b in blocks for i in range(below)] != flat:
        raise Whole(f"{node.name} is wanted in parts that are not whole heads")
    return Slices(old[0], blocks)


def _product(sizes: Sequence[Size]) -> int:
    total = 1
    for n in sizes:
        assert isinstance(n, int)
        total *= n
    return total


def view_groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The axes of a tensor and those of a view of it that stand for each other, from the last ones on."""
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    old, new = len(before), len(after)
    while old and new:
        i, j, a, b = old - 1, new - 1, before[old - 1], after[new - 1]
        while not same_size(a, b):
            if not isinstance(a, int) or not isinstance(b, int):
                return [*groups, (tuple(range(old)), tuple(range(new)))]
            if a < b and i:
                i, a = i - 1, a * before[i - 1]
            elif b < a and j:
                j, b = j - 1, b * after[j - 1]
            else:
                return [*groups, (tuple(range(old)), tuple(range(new)))]
        groups.append((tuple(range(i, old)), tuple(range(j, new))))
        old, new = i, j
    return [*groups, (tuple(range(old)), tuple(range(new)))] if old or new else groups
