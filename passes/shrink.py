"""Layers, heads and hidden channels that count for nothing are left out: matrices become smaller.

    channels   linear(gated(linear(x, a), linear(x, b)), c)     ->  the same of a[kept], b[kept], c[:, kept]
               linear(y, c), y computed whole                   ->  linear(y[..., kept], c[:, kept])
    heads      linear(attention(q, k, v), c)                    ->  the same of the heads of q, k and v that stay
               ... k and v of a cache that the caller owns      ->  attention(q', k[:, s:e], v[:, s:e]), ...
    hidden     norms, layers and embeddings of a stream         ->  the same of the channels that somebody writes

Parts of passes/prune.py; passes/narrow.py says how a node is computed for some of its slices.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from llmcomp.graph import insert, is_tensor, replace, same_size, source, val
from llmcomp.passes.base import Report
from llmcomp.passes.narrow import (
    ATTENTION,
    Indices,
    Narrowing,
    Run,
    Slices,
    Whole,
    alone,
    take,
)
from llmcomp.passes.parts import VIEWS, part_of, parts_of
from llmcomp.passes.relations import is_pointwise
from llmcomp.passes.zero_structure import CASTS, Values
from llmcomp.products import LINEAR, bias_of, operand_of

aten = torch.ops.aten
# Two cores with AVX-512, bfloat16, one row: an MLP takes time in proportion to the channels that are left (0.97 of it
# without 2.3 % of 1408, 0.86 without 9 %), whether their number is a multiple of 16 or not; GPUs want that it is. So
# few channels are left in for the sake of memory alone: the smaller matrices are kept beside the whole ones.
LEAST = 16  # channels: kept ones are a multiple of it
PART = 0.02  # of the channels: less is not worth another copy of the weights
# A gather takes 9 us, its launch and the norm that is no longer fused: without 5 % of 2048 channels (590 KB) it gained
# 1 to 10 %, without 25 % of 512 (197 KB) it lost 10 to 15 %, without 37 % (295 KB) it gained 5 to 9 %.
GATHER = 2**18  # bytes of weights: where it saves less, layers read channels of an operand that is computed whole
MOST_RUNS = 4  # attention over the heads of a cache is split into no more parts than these
TURNS = (aten.transpose.int, aten.permute.default, aten.clone.default, aten.contiguous.default)


def pays(dropped: int, width: int) -> bool:
    """Whether layers without so many of their channels are worth a copy of their weights."""
    return dropped >= max(LEAST, PART * width)


# ---- channels -------------------------------------------------------------------------------------------------------


def shrink_operands(
    graph: Graph, values: Values, indices: Indices, report: Report, reasons: Mapping[Node, str]
) -> None:
    """Leave out the channels that no layer reads, of every operand of layers. `reasons`: why they are computed."""
    for operand, layers in _by_operand(graph).items():
        unread = [values.unread(layer) for layer in layers]
        known = [x for x in unread if x is not None]
        if len(known) < len(layers):
            continue
        dropped = torch.stack(known).all(0)
        kept = kept_channels(dropped)
        if not pays(len(dropped) - len(kept), len(dropped)):
            if bool(dropped.any()):
                report.miss(
                    layers[0], f"{int(dropped.sum())} of its {len(dropped)} inputs do not count: too few to pay"
                )
            continue
        try:
            made = _narrowed(operand, layers, kept, values).make(graph, indices)[operand]
        except Whole as problem:
            reason = f"computed whole, for {reasons.get(operand, problem)}"
            if _bytes_read(layers) * (len(dropped) - len(kept)) // len(dropped) < GATHER:
                report.miss(operand, f"{reason}; read whole: to gather the {len(kept)} that count costs more")
                continue
            report.miss(operand, reason)
            made = _gathered(operand, min(layers), kept, indices)
        for layer in layers:
            _read_less(layer, made, kept, indices)
            report.rewrites += 1


def _bytes_read(layers: Sequence[Node]) -> int:
    weights = (val(source(layer, 1)) for layer in layers)
    return sum(w.numel() * w.dtype.itemsize for w in weights)


def _gathered(operand: Node, first: Node, kept: Sequence[int], indices: Indices) -> Node:
    with operand.graph.inserting_before(first):
        return insert(operand.graph, aten.index_select.default, operand, -1, indices.node(kept, val(operand)))


def _by_operand(graph: Graph) -> dict[Node, list[Node]]:
    found: dict[Node, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        found.setdefault(operand_of(node), []).append(node)
    return found


def kept_channels(dropped: Tensor) -> list[int]:
    """The channels that stay: those that count, and some others, to make a multiple of LEAST."""
    order = torch.argsort(dropped.to(torch.int8), stable=True)
    count = int((~dropped).sum())
    number = min(max(LEAST, -(-count // LEAST) * LEAST), len(dropped))
    return [int(i) for i in order[:number].sort().values]


def _narrowed(operand: Node, layers: Sequence[Node], kept: Sequence[int], values: Values) -> Narrowing:
    """Some channels of an operand, which only these layers read.

    Raises:
        Whole: all of it, or of what it is computed of, is needed.
    """
    narrowing = Narrowing(values)
    narrowing.want(operand, -1, kept)
    narrowing.check_readers(set(layers))
    return narrowing


def _read_less(layer: Node, operand: Node, kept: Sequence[int], indices: Indices) -> None:
    """Let a layer read some channels only."""
    weight, bias, kn = layer.args[1], bias_of(layer), bool(layer.args[3])
    assert isinstance(weight, Node)
    with layer.graph.inserting_before(layer):
        less = take(weight, Slices(0 if kn else 1, tuple(kept)), indices)
        new = insert(layer.graph, LINEAR, operand, less, bias, kn)
    replace(layer, new)


# ---- heads ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Attention whose output one layer reads; `live` (groups, each) tells which query heads count, by the key/value
    head that they read.
    """

    attention: Node
    layer: Node
    live: Tensor

    @property
    def operand(self) -> Node:
        return operand_of(self.layer)

    def channels(self, heads: Sequence[int]) -> list[int]:
        """The channels of the operand that belong to query heads."""
        depth = val(self.attention).shape[3]
        assert isinstance(depth, int)
        return [head * depth + i for head in heads for i in range(depth)]

    def numbers(self, first: int, last: int, each: int) -> list[int]:
        """`each` query heads of every one of the groups: those that count, and others to make up the number."""
        found = []
        for group in range(first, last):
            order = torch.argsort((~self.live[group]).to(torch.int8), stable=True)[:each]
            found += [group * self.live.shape[1] + int(i) for i in order.sort().values]
        return found


def shrink_heads(graph: Graph, values: Values, indices: Indices, report: Report) -> None:
    """Leave out heads of attention that nobody reads, or whose values are zero."""
    for layer in list(graph.find_nodes(op="call_function", target=LINEAR)):
        found = _heads(layer, values)
        if found is None or bool(found.live.all()) or not bool(found.live.any()):
            continue
        reason = _leave_out(found, values, indices)
        if reason is None:
            report.rewrites += 1
        else:
            report.miss(layer, f"{int((~found.live).sum())} of its {found.live.numel()} heads do not count: {reason}")


def _heads(layer: Node, values: Values) -> Heads | None:
    attention = _attention_of(operand_of(layer))
    if attention is None:
        return None
    heads, depth, groups = *(val(attention).shape[i] for i in (1, 3)), val(source(attention, 1)).shape[1]
    width = val(operand_of(layer)).shape[-1]
    if not all(isinstance(n, int) for n in (heads, depth, groups, width)) or width != heads * depth:
        return None
    dead = torch.zeros(int(heads), dtype=torch.bool)
    if (unread := values.unread(layer)) is not None:
        dead |= unread.cpu().view(int(heads), int(depth)).all(1)
    if _is_zero_with(operand_of(layer), attention):
        dead |= _silent(attention, values).repeat_interleave(int(heads) // int(groups))
    return Heads(attention, layer, ~dead.view(int(groups), -1))


def _attention_of(operand: Node) -> Node | None:
    """The one attention node that an operand shows, perhaps multiplied by something."""
    stack, seen, found = [operand], set[Node](), []
    while stack:
        node = stack.pop()
        if node in seen or not is_tensor(node):
            continue
        seen.add(node)
        if node.target is ATTENTION:
            found.append(node)
        elif node.target in (*VIEWS, *TURNS) or is_pointwise(node):
            stack += node.all_input_nodes
    return found[0] if len(found) == 1 else None


def _is_zero_with(operand: Node, attention: Node) -> bool:
    """Whether an operand is zero wherever what attention gives is."""
    node = operand
    while node is not attention:
        if node.target in (*VIEWS, *TURNS, *CASTS):
            node = source(node)
        elif node.target is aten.mul.Tensor:
            node = next(n for n in node.all_input_nodes if _attention_of(n) is attention)
        else:
            return False
    return True


def _silent(attention: Node, values: Values) -> Tensor:
    """The key/value heads all of whose values are zero."""
    v = source(attention, 2)
    silent = torch.zeros(int(val(v).shape[1]), dtype=torch.bool)
    linear = v
    while linear.target in (*VIEWS, *TURNS):
        linear = source(linear)
    zero = values.channels(linear)
    if zero is None:
        return silent
    for group in range(len(silent)):
        narrowing = Narrowing(values)
        try:
            narrowing.want(v, 1, (group,))
        except Whole:
            return silent
        silent[group] = bool(zero[list(narrowing.wanted[linear].kept)].all())
    return silent


def _leave_out(heads: Heads, values: Values, indices: Indices) -> str | None:
    """Compute the heads that count; or why that is not done."""
    counts = heads.live.sum(1)
    some, each = [int(g) for g in counts.nonzero().flatten()], int(counts.max())
    evenly = [n for g in some for n in heads.numbers(g, g + 1, each)]
    reason = "those that share their keys do"
    if len(evenly) < heads.live.numel():
        try:
            return _write(heads, evenly, Narrowing(values), indices)
        except Whole as problem:
            reason = str(problem)
    runs = _runs(counts)
    kept = [n for run in runs for n in heads.numbers(run.start, run.end, run.each)]
    if len(kept) == heads.live.numel():
        return reason
    try:
        return _write(heads, kept, Narrowing(values, runs={heads.attention: runs}), indices)
    except Whole as problem:
        return str(problem)


def _runs(counts: Tensor) -> list[Run]:
    """Neighbouring key/value heads with as many query heads that count; all from the first to the last of them where
    these would be too many.
    """
    runs: list[Run] = []
    for group, count in enumerate(counts.tolist()):
        if runs and runs[-1].end == group and runs[-1].each == count:
            runs[-1] = Run(runs[-1].start, group + 1, count)
        elif count:
            runs.append(Run(group, group + 1, count))
    return runs if len(runs) <= MOST_RUNS else [Run(runs[0].start, runs[-1].end, int(counts.max()))]


def _write(heads: Heads, kept: Sequence[int], narrowing: Narrowing, indices: Indices) -> str | None:
    layer, operand = heads.layer, heads.operand
    channels = heads.channels(kept)
    if not pays(int(val(operand).shape[-1]) - len(channels), int(val(operand).shape[-1])):
        return "too few to pay"
    narrowing.want(operand, -1, channels)
    narrowing.check_readers({layer})
    linears = {part.linear for node in narrowing.wanted if (part := part_of(node)) is not None}
    made = narrowing.make(layer.graph, indices)
    _read_less(layer, made[operand], channels, indices)
    layer.graph.eliminate_dead_code()
    for linear in linears:
        _split_rest(linear, indices)
    return None


def _split_rest(linear: Node, indices: Indices) -> None:
    """Parts of a layer whose other parts have become layers do so too: else all of it would still be computed."""
    for node in parts_of(linear) or ():
        part = part_of(node)
        assert part is not None
        with node.graph.inserting_before(node):
            new = alone(part, indices)
        replace(node, new)


# ---- the hidden channels --------------------------------------------------------------------------------------------


def shrink_streams(graph: Graph, values: Values, indices: Indices, report: Report) -> dict[Node, str]:
    """Leave out channels that are zero in all that norms, sums and layers hand on to one another; returns where that
    can't be done, and why.
    """
    values.learn(graph)
    reasons: dict[Node, str] = {}
    while (found := next(_streams(graph, values, reasons), None)) is not None:
        operand, kept = found
        try:
            report.rewrites += _leave_out_of_stream(operand, kept, values, indices)
            graph.eliminate_dead_code()
        except Whole as reason:
            reasons[operand] = str(reason)
    return reasons


def _streams(graph: Graph, values: Values, tried: Container[Node]) -> Iterator[tuple[Node, list[int]]]:
    """Operands of layers with channels that are zero, which are not to be had for these layers alone."""
    for operand, layers in _by_operand(graph).items():
        zero = values.channels(operand) if operand not in tried else None
        if zero is None or not pays(len(zero) - len(kept := kept_channels(zero)), len(zero)):
            continue
        try:
            _narrowed(operand, layers, kept, values)
        except Whole:
            yield operand, kept


def _leave_out_of_stream(operand: Node, kept: Sequence[int], values: Values, indices: Indices) -> int:
    """Compute the channels that are kept, of everything that is tied to an operand; returns the layers that read it.

    Raises:
        Whole: somebody needs all of them.
    """
    narrowing, readers = Narrowing(values), dict[Node, None]()
    narrowing.want(operand, -1, kept)
    while others := [pair for pair in narrowing.others() if pair[0] not in readers]:
        for user, node in others:
            if user.target is LINEAR and operand_of(user) is node and node not in user.args[1:]:
                _require_unread(user, kept, values)
                readers[user] = None
            else:
                _follow(narrowing, user, node)
    made = narrowing.make(operand.graph, indices)
    for reader in readers:
        _read_less(made.get(reader, reader), made[operand_of(reader)], kept, indices)
    return len(readers)


def _require_unread(layer: Node, kept: Sequence[int], values: Values) -> None:
    unread = values.unread(layer)
    gone = set(range(int(val(operand_of(layer)).shape[-1]))) - set(kept)
    if values.of(layer.args[1]) is None:
        raise Whole(f"the weight of {layer.name} is computed")
    if unread is None or not bool(unread[sorted(gone)].all()):
        raise Whole(f"{layer.name} reads them")


def _follow(narrowing: Narrowing, user: Node, node: Node) -> None:
    """Want of a user what is wanted of a node."""
    if user.op == "output":
        raise Whole("it is returned")
    slices = narrowing.wanted[node]
    alike = is_tensor(user) and val(user).dim() > 0 and same_size(val(user).shape[-1], val(node).shape[-1])
    if not alike or slices.dim != val(node).dim() - 1:
        raise Whole(f"{user.name} reads all of it")
    if user not in narrowing.wanted:
        narrowing.want(user, -1, slices.kept)
    if not narrowing.reads(user, node):
        raise Whole(f"{user.name} reads all of it")
