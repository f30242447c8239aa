"""Lowering of linear layers that share an operand: prologue, accumulators, epilogues, one kernel.

Each stored result is traced back to the linear layer at a symbolic index; that tells which of its dimensions
are rows of the operand and which are columns of the weight. Pulling the result then asks for accumulators:
one for a plain layer, two for gate and up or for the two halves of a rotary embedding.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from llmcomp.blocks import Blocks
from llmcomp.codegen import kernel as K
from llmcomp.codegen.index import ZERO, Index, Space, axis_symbol, size, sizes
from llmcomp.codegen.lowered import (
    Lowered,
    channel_points,
    destination,
    finish_all,
    kernel_name,
    members,
    rotation,
    write,
)
from llmcomp.codegen.pull import Inner, Puller, Special, compute_dtype, fake
from llmcomp.codegen.rules import rules
from llmcomp.formats import Format, parse_format
from llmcomp.graph import is_contiguous
from llmcomp.masked import ENTRY, Masked
from llmcomp.products import BLOCKS, MASKED, PACKED, PACKED_GROUPED, TWO_FOUR, bias_of, ends_of, is_product, operand_of
from llmcomp.region import Region, Unfit
from llmcomp.two_four import TwoFour

STORED = (PACKED, PACKED_GROUPED)  # weights in a format, with scales


def linears(region: Region) -> list[Node]:
    """The linear layers of a region."""
    return [n for n in region.nodes if is_product(n)]


@dataclass(frozen=True)
class Trace:
    """How an output reads the linear layers: their indices at the output's own index symbols."""

    output: Node
    index: Index
    extents: dict[sympy.Symbol, sympy.Expr]
    reads: tuple[tuple[Node, Index], ...]


def lower_contract(region: Region, inlined: Set[Node]) -> Lowered:
    """One Contract for all linear layers of a region."""
    layers = linears(region)
    operand, ends_node = operand_of(layers[0]), ends_of(layers[0])
    if any((operand_of(n), ends_of(n)) != (operand, ends_node) for n in layers):
        raise Unfit("linear layers of different operands")
    if len({storage(n) for n in layers}) > 1:
        raise Unfit("weights in different formats")
    inside = members(region, inlined)
    lead, depth = sizes(fake(operand).shape[:-1]), size(fake(operand).shape[-1])
    rows = K.Axis(axis_symbol("m"), sympy.expand(sympy.Mul(*lead)))
    k = K.Axis(axis_symbol("k"), depth)

    prologue = Puller(
        Space({rows.symbol: rows.size, k.symbol: depth}),
        inside.__contains__,
        rules(),
        inner=Inner(k.symbol, (k.symbol,), depth),
    )
    row_index = prologue.space.unflatten(rows.symbol, lead)
    value = prologue.named(prologue.at(operand, (*row_index, k.symbol)), compute_dtype(fake(operand).dtype))
    buffers = prologue.buffers
    pullers, sections = [prologue], []
    for segment in _segments(region, layers, inside, lead, rows):
        p, section = _section(segment, region, layers, inside, lead, rows, prologue, k)
        pullers.append(p)
        sections.append(section)
    ends = None
    count: sympy.Expr = sympy.Integer(1)
    if ends_node is not None:
        ends, count = prologue.buffer(ends_node, "ends").name, size(fake(ends_node).shape[0])
    return finish_all(
        pullers,
        buffers,
        lambda given, symbols: K.Contract(
            kernel_name(region), given, symbols, rows, k, tuple(prologue.statements), value,
            fake(operand).dtype, tuple(sections), ends, count,
        ),
    )  # fmt: skip


def _trace(output: Node, layers: Sequence[Node], inside: Set[Node]) -> Trace:
    """Where an output reads the linear layers, with rotary embeddings and norms seen as the identity."""
    _, value = destination(output)
    extents: dict[sympy.Symbol, sympy.Expr] = {}
    index: list[sympy.Expr] = []
    for d, n in enumerate(fake(value).shape):
        symbol = axis_symbol(f"i{d}")
        if isinstance(n, int) and n == 1:
            index.append(ZERO)
        else:
            index.append(symbol)
            extents[symbol] = size(n)
    reads: list[tuple[Node, Index]] = []

    def read(p: Puller, node: Node, at: Index) -> K.Argument:
        if (node, at) not in reads:
            reads.append((node, at))
        return 0.0

    ops = torch.ops.llmcomp
    special: dict[Node, Special] = {n: read for n in layers}
    for node in inside:
        if node.target in (ops.rope.default, ops.rms_norm.default, ops.layer_norm.default):
            special[node] = _through
    Puller(Space(extents), inside.__contains__, rules(), special).at(value, tuple(index))
    return Trace(output, tuple(index), extents, tuple(reads))


def _through(p: Puller, node: Node, index: Index) -> K.Argument:
    source = node.args[0]
    assert isinstance(source, Node)
    return p.at(source, index)


def _digits(
    expr: sympy.Expr, extents: dict[sympy.Symbol, sympy.Expr], why: str
) -> list[tuple[sympy.Symbol, sympy.Expr]]:
    """The symbols of a mixed-radix number with their weights, most significant first."""
    free = [s for s in extents if expr.has(s)]
    weights = [(s, expr.coeff(s)) for s in free]
    if sympy.expand(expr - sympy.Add(*(s * w for s, w in weights))).has(*free) if free else False:
        raise Unfit(f"{why} are not a product of dimensions")
    if any(w == 0 or w.has(*free) for _, w in weights):
        raise Unfit(f"{why} are not a product of dimensions")
    ordered: list[tuple[sympy.Symbol, sympy.Expr]] = []
    step: sympy.Expr = sympy.Integer(1)
    rest = list(weights)
    while rest:
        found = next((pair for pair in rest if sympy.expand(pair[1] - step) == 0), None)
        if found is None:
            raise Unfit(f"{why} are not a product of dimensions")
        rest.remove(found)
        ordered.insert(0, found)
        step = sympy.expand(step * extents[found[0]])
    return ordered


@dataclass(frozen=True)
class Columns:
    """What an output reads: columns [start, start + extent) of the result, enumerated by `digits`, of all rows."""

    trace: Trace
    rows: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    digits: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    start: sympy.Expr
    extent: sympy.Expr

    @property
    def shape(self) -> tuple[tuple[sympy.Expr, sympy.Expr], ...]:
        """(extent, weight) of every digit, most significant first."""
        return tuple((self.trace.extents[s], w) for s, w in self.digits)


@dataclass(frozen=True)
class Segment:
    """Columns [start, start + extent) of the result, and the outputs that read them."""

    start: sympy.Expr
    extent: sympy.Expr
    outputs: tuple[Columns, ...]

    @property
    def layout(self) -> tuple[tuple[sympy.Expr, sympy.Expr], ...]:
        """How the columns are enumerated: as the output with the most dimensions enumerates them.

        Raises:
            Unfit: the outputs enumerate them in different ways.
        """
        found = {c.shape for c in self.outputs if len(c.digits) != 1}
        if len(found) > 1 or any(
            (c.start, c.extent) != (self.start, self.extent) for c in self.outputs if c.shape in found
        ):
            raise Unfit(f"{self.outputs[-1].trace.output.name} has another layout of columns")
        return found.pop() if found else ((self.extent, sympy.Integer(1)),)


def _columns(trace: Trace, lead: Index, rows: K.Axis) -> Columns:
    """Which columns an output reads.

    Raises:
        Unfit: it reads some of the rows, mixes them, or repeats results.
    """
    name, extents = trace.output.name, trace.extents
    positions = {sympy.expand(Space(extents).flatten(at[:-1], lead)) for _, at in trace.reads}
    if len(positions) != 1:
        raise Unfit(f"{name} mixes rows")
    row_digits = _digits(positions.pop(), extents, "rows")
    if sympy.expand(sympy.Mul(*(extents[s] for s, _ in row_digits))) != rows.size:
        raise Unfit(f"{name} uses some of the rows")
    column = sympy.expand(trace.reads[0][1][-1])
    start = column.as_independent(*extents, as_Add=True)[0] if extents else column
    digits = _digits(sympy.expand(column - start), extents, "columns")
    symbols = [s for s, _ in (*row_digits, *digits)]
    if len(set(symbols)) != len(symbols) or set(symbols) != set(extents):
        raise Unfit(f"{name} repeats the result")
    extent = sympy.expand(sympy.Mul(*(extents[s] for s, _ in digits)))
    return Columns(trace, tuple(row_digits), tuple(digits), start, extent)


def _segments(region: Region, layers: Sequence[Node], inside: Set[Node], lead: Index, rows: K.Axis) -> list[Segment]:
    """Sections of the kernel: outputs of the same layers together, cut where one of them begins or ends."""
    groups: list[tuple[set[Node], list[Columns]]] = []
    for output in region.outputs:
        trace = _trace(output, layers, inside)
        used = {n for n, _ in trace.reads}
        if not used:
            raise Unfit(f"{output.name} does not depend on the linear layer")
        outputs = [_columns(trace, lead, rows)]
        for other in [g for g in groups if g[0] & used]:
            used |= other[0]
            outputs = other[1] + outputs
            groups.remove(other)
        groups.append((used, outputs))
    return [segment for _, outputs in groups for segment in _cut(outputs)]


def _cut(outputs: Sequence[Columns]) -> list[Segment]:
    if len({(c.start, c.extent) for c in outputs}) == 1:
        return [Segment(outputs[0].start, outputs[0].extent, tuple(outputs))]
    if not all(c.start.is_Integer and c.extent.is_Integer for c in outputs):
        raise Unfit(f"{outputs[-1].trace.output.name} reads other columns, their number is symbolic")
    bounds = sorted({int(x) for c in outputs for x in (c.start, c.start + c.extent)})
    segments = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        readers = tuple(c for c in outputs if c.start <= low and high <= c.start + c.extent)
        if readers:
            segments.append(Segment(sympy.Integer(low), sympy.Integer(high - low), readers))
    return segments


def _section(
    segment: Segment,
    region: Region,
    layers: Sequence[Node],
    inside: Set[Node],
    lead: Index,
    rows: K.Axis,
    prologue: Puller,
    k: K.Axis,
) -> tuple[Puller, K.Section]:
    """The section that computes one segment."""
    layout = segment.layout
    names = [f"h{i}" for i in range(len(layout) - 1)] + ["n"]
    axes = tuple(K.Axis(axis_symbol(n), extent) for n, (extent, _) in zip(names, layout, strict=False))
    points: tuple[sympy.Expr, ...] = (axes[-1].symbol,) if axes else (ZERO,)
    inner: Inner | None = None
    turn = rotation(region)
    rotated = turn is not None and len(axes) > 0 and axes[-1].size == turn[0]
    if turn is not None and rotated and any(_rotated(c.trace, region) for c in segment.outputs):
        points = channel_points(axes[-1].symbol, *turn)
    if len(axes) > 1:  # a norm within a head; over a whole row it would leave one tile, so one thread
        inner = Inner(axes[-1].symbol, points, axes[-1].size)
    if len(points) > 1:
        axes = (*axes[:-1], K.Axis(axes[-1].symbol, axes[-1].size / len(points)))
    extents = {rows.symbol: rows.size, k.symbol: k.size, **{a.symbol: a.size for a in axes}}
    if (ends := ends_of(layers[0])) is not None:
        extents[K.MATRIX] = size(fake(ends).shape[0])
    accumulators: dict[tuple[Node, sympy.Expr], K.Accumulator] = {}
    p = _accumulating(Space(extents), inside, layers, lead, rows, k, accumulators, prologue, inner)
    for columns in segment.outputs:
        for point in points:
            position = (*(a.symbol for a in axes[:-1]), point)
            write(p, columns.trace.output, _output_index(p, columns, segment, position, rows))
    for node, row in accumulators:
        if axes and not _evenly_spaced(row, axes[-1].symbol):
            raise Unfit(f"{node.name} is read at columns that are not evenly spaced")
    if not accumulators:
        raise Unfit(f"{segment.outputs[-1].trace.output.name} has columns that no linear layer computes")
    section_axes = axes or (K.Axis(axis_symbol("n"), sympy.Integer(1)),)
    return p, K.Section(section_axes, tuple(accumulators.values()), tuple(p.statements))


def _evenly_spaced(row: sympy.Expr, symbol: sympy.Symbol) -> bool:
    """Whether an expression grows by the same amount whenever `symbol` grows by 1."""
    return not sympy.expand(row.subs(symbol, symbol + 1) - row).has(symbol)


def _output_index(
    p: Puller, columns: Columns, segment: Segment, position: tuple[sympy.Expr, ...], rows: K.Axis
) -> Index:
    """Where in an output the result of a row and of a column of the segment belongs."""
    extents, chosen = columns.trace.extents, {}
    for symbol, weight in columns.rows:
        high = p.space.split(rows.symbol, weight)[0]
        top = symbol == columns.rows[0][0]
        chosen[symbol] = high if top else p.space.split(high, extents[symbol])[1]
    if columns.shape == segment.layout:
        chosen |= {s: at for (s, _), at in zip(columns.digits, position, strict=False)}
    else:
        flat = sympy.Add(*(at * weight for at, (_, weight) in zip(position, segment.layout, strict=False)))
        chosen[columns.digits[0][0]] = sympy.expand(segment.start - columns.start + flat)
    return tuple(i.xreplace(chosen) for i in columns.trace.index)


def _rotated(trace: Trace, region: Region) -> bool:
    """Whether a rotary embedding lies between the linear layer and an output."""
    _, value = destination(trace.output)
    seen, stack = set(), [value]
    members_ = set(region.nodes)
    while stack:
        node = stack.pop()
        if node in seen or node not in members_:
            continue
        seen.add(node)
        if node.target is torch.ops.llmcomp.rope.default:
            return True
        stack.extend(node.all_input_nodes)
    return False


def _accumulating(
    space: Space,
    inside: Set[Node],
    layers: Sequence[Node],
    lead: Index,
    rows: K.Axis,
    k: K.Axis,
    accumulators: dict[tuple[Node, sympy.Expr], K.Accumulator],
    prologue: Puller,
    inner: Inner | None,
) -> Puller:
    """A puller for an epilogue: linear layers become accumulators."""

    def accumulate(p: Puller, node: Node, at: Index) -> K.Argument:
        expected = ZERO if rows.size == 1 else rows.symbol
        if sympy.expand(p.space.flatten(at[:-1], lead) - expected) != 0:
            raise Unfit(f"{node.name} is read at another row")
        if not (p.space.at_least(at[-1], ZERO) and p.space.below(at[-1], size(fake(node).shape[-1]))):
            raise Unfit(f"{node.name} is a part of the columns")  # the rest would be products with no weight
        key = (node, sympy.expand(at[-1]))
        if key not in accumulators:
            name = p.name("acc")
            p.dtypes[name] = torch.float32
            accumulators[key] = K.Accumulator(name, _weight(node, prologue, k), key[1])
        result = compute_dtype(fake(node).dtype)
        if result != torch.float32:
            raise Unfit(f"{node.name} computes in {result}")
        value: K.Argument = accumulators[key].name
        saved, p.dtype = p.dtype, torch.float32
        try:
            if (scale := row_scale(node)) is not None:
                of = (K.MATRIX,) if ends_of(node) is not None else ()
                value = p.op("mul", value, p.at(scale, (*of, at[-1]), "scale"))
            if (bias := bias_of(node)) is not None:
                value = p.op("add", value, p.convert(p.at(bias, at[-1:], "bias"), torch.float32))
            return value
        finally:
            p.dtype = saved

    p = Puller(space, inside.__contains__, rules(), {n: accumulate for n in layers}, inner)
    p.buffers, p._names = prologue.buffers, prologue._names
    return p


def storage(layer: Node) -> Format | None:
    """The format in which the weight of a layer is stored, None where it is dense."""
    if layer.target is TWO_FOUR:
        return TwoFour()
    if layer.target is MASKED:
        return Masked()
    if layer.target is BLOCKS:
        return Blocks(height=int(str(layer.args[4])), width=int(str(layer.args[5])))
    return parse_format(str(layer.args[5])) if layer.target in STORED else None


def row_scale(layer: Node) -> Node | None:
    """The scales of a quantized weight, where there is one for each row."""
    form = storage(layer)
    if form is None or form.group or layer.target not in STORED:
        return None
    scale = layer.args[2]
    assert isinstance(scale, Node)
    return scale


def _packed(layer: Node, form: Format, prologue: Puller) -> K.Weight:
    """The matrix of a layer whose weight is quantized; its parts lie in memory, row after row."""
    codes, scale, zero = layer.args[1:4] if layer.target in STORED else (layer.args[1], None, None)
    for part in (codes, scale, zero):
        if isinstance(part, Node) and (not prologue.in_memory(part) or not is_contiguous(fake(part))):
            raise Unfit(f"the quantized weight of {layer.name} is computed")
    assert isinstance(codes, Node)
    row = sympy.Integer(ENTRY) if isinstance(form, Masked | Blocks) else size(fake(codes).shape[-1])
    experts = row * size(fake(codes).shape[1]) if ends_of(layer) is not None else ZERO
    buffer = prologue.buffer(codes, "weight").name
    if not form.group:
        return K.Weight(buffer, row, sympy.Integer(1), ZERO, experts, K.Packing(form))
    assert isinstance(scale, Node)
    zeros = prologue.buffer(zero, "zero").name if isinstance(zero, Node) else None
    packing = K.Packing(form, size(fake(scale).shape[-1]), prologue.buffer(scale, "scale").name, zeros)
    return K.Weight(buffer, row, sympy.Integer(1), ZERO, experts, packing)


def _weight(layer: Node, prologue: Puller, k: K.Axis) -> K.Weight:
    """The matrix of a linear layer, through whatever views lie between it and memory."""
    if (form := storage(layer)) is not None:
        return _packed(layer, form, prologue)
    weight = layer.args[1]
    assert isinstance(weight, Node)
    kn = bool(layer.args[3])
    e, n = axis_symbol("weight_e"), axis_symbol("weight_n")
    shape = sizes(fake(weight).shape)
    row_dim = -1 if kn else -2
    probe = Puller(Space({e: shape[0], n: shape[row_dim], k.symbol: k.size}), prologue.inside, rules())
    probe.buffers, probe._names = prologue.buffers, prologue._names
    matrix = (k.symbol, n) if kn else (n, k.symbol)
    probe.at(weight, matrix if len(shape) == 2 else (e, *matrix), "weight")
    if len(probe.statements) != 1 or not isinstance(load := probe.statements[0], K.Load):
        raise Unfit(f"the weight of {layer.name} is computed")
    if load.dtype != torch.float32:
        raise Unfit(f"the weight of {layer.name} is {load.dtype}")
    step, across, experts = (load.index.coeff(s) for s in (n, k.symbol, e))
    offset = sympy.expand(load.index - step * n - across * k.symbol - experts * e)
    if offset.has(n, k.symbol, e):
        raise Unfit(f"the weight of {layer.name} is not strided")
    return K.Weight(load.buffer, step, across, offset, experts)
