"""Contract -> C++: pack the operand, then for each tile of columns multiply and run the epilogue over the tile.

    for each block of rows:
        for each row:            operand body -> line, packed            (shared among the threads, or each its own)
        for each section:
            for each tile of columns of this thread:
                for each panel of rows:
                    accumulator tiles = panel . weight rows              (contract.h, micro.h)
                    for each row: epilogue over the columns of the tile

Weights are read from memory once per block of rows, in order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from llmcomp.codegen.build import Source
from llmcomp.codegen.cpp_body import (
    Scope,
    Writer,
    checks,
    expand_argmax,
    loop,
    make_scope,
    parameter,
    print_phases,
)
from llmcomp.codegen.cpp_expr import MEMORY_TYPES, index
from llmcomp.codegen.cpp_packed import header, numbers, operand_type, tile, weights_type
from llmcomp.codegen.cpp_parts import function_head, positive_sizes, print_span, unused
from llmcomp.codegen.kernel import (
    MATRIX,
    Accumulator,
    Axis,
    Body,
    Buffer,
    Contract,
    Packing,
    Reduce,
    Section,
    Store,
    packing_of,
)

TILE = 32  # contract::TILE
# Columns of a section whose epilogue reduces along them: they are one tile, in arrays on the stack.
LONGEST_REDUCTION = 512
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def render_contract(kernel: Contract, comment: Sequence[str] = ()) -> Source:
    """The C++ source of `kernel`; `comment` names the graph nodes that it computes.

    Raises ValueError where the weights have different dtypes, or one that is not float32, bfloat16 or float16.
    """
    return Source(kernel.name, "cpp", _Printer(kernel).text(), tuple(comment))


@dataclass(frozen=True)
class Locals:
    """Names of the printer's own variables; one that the kernel uses too gets an underscore."""

    rows: str = "rows"
    depth: str = "depth"
    columns: str = "columns"
    team: str = "team"
    memory: str = "memory"
    operand: str = "operand"
    line: str = "line"
    expert: str = "expert"
    block: str = "block"
    first_row: str = "first_row"
    end: str = "end"
    stop_row: str = "stop_row"
    packing: str = "packing"
    tiles: str = "tiles"
    share: str = "share"
    piece: str = "piece"
    first: str = "first"
    stop: str = "stop"
    panel: str = "panel"
    row: str = "row"

    @staticmethod
    def avoiding(taken: frozenset[str]) -> "Locals":
        """The names, other than those taken."""
        return Locals(*(unused(f.name, taken) for f in fields(Locals)))


@dataclass(frozen=True)
class _Tiles:
    """How the columns of a section are cut: tiles of `width` columns, `run` of them along the last axis."""

    section: Section
    width: sympy.Expr
    ldo: sympy.Expr
    """Elements from one row of a tile of products to the next."""
    room: str
    """Elements of such a tile."""
    whole: bool
    """A tile is all of the last axis: the epilogue reduces along it."""

    @property
    def last(self) -> Axis:
        return self.section.axes[-1]

    @property
    def run(self) -> sympy.Expr:
        return sympy.Integer(1) if self.whole else FloorDiv(self.last.size + self.width - 1, self.width)

    @property
    def count(self) -> sympy.Expr:
        return sympy.Mul(*(a.size for a in self.section.axes[:-1]), self.run)

    @property
    def cost(self) -> sympy.Expr:
        """Weight rows of a tile."""
        return self.width * len(self.section.accumulators)

    def outer(self, piece: sympy.Symbol) -> Iterator[tuple[sympy.Symbol, sympy.Expr]]:
        """The outer axes at a tile, by its number."""
        axes = self.section.axes[:-1]
        for i, axis in enumerate(axes):
            inner = sympy.Mul(*(a.size for a in axes[i + 1 :]), self.run)
            position = FloorDiv(piece, inner)
            yield axis.symbol, position if i == 0 else Mod(position, axis.size)

    def first(self, piece: sympy.Symbol) -> sympy.Expr:
        """The first column of a tile, by its number."""
        along = piece if len(self.section.axes) == 1 else Mod(piece, self.run)
        return along * self.width

    def stop(self, first: sympy.Symbol) -> sympy.Expr:
        """The column behind the last one of a tile."""
        size = self.last.size
        even = size.is_Integer and self.width.is_Integer and size % self.width == 0
        return first + self.width if even else sympy.Min(first + self.width, size)


class _Printer:
    """Prints one kernel."""

    def __init__(self, kernel: Contract) -> None:
        self.kernel = kernel
        epilogues = (expand_argmax(s.epilogue, s.axes[-1].symbol) for s in kernel.sections)
        self.operand_body = expand_argmax(kernel.operand, kernel.depth.symbol)
        self.epilogues: tuple[Body, ...] = tuple(epilogues)
        self.taken = names_of(kernel, (self.operand_body, *self.epilogues))
        self.names = Locals.avoiding(self.taken)
        self.failing = checks(self.bodies, self.scope)

    # ---- what is known before anything is printed ----

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.operand_body, *self.epilogues)

    @cached_property
    def scope(self) -> Scope:
        seeds = {a.name: torch.float32 for s in self.kernel.sections for a in s.accumulators}
        line = Buffer(self.names.line, torch.float32, written=True)
        return make_scope([*self.kernel.buffers, line], self.bodies, seeds)

    @cached_property
    def weight_type(self) -> str:
        buffers = {b.name: b.dtype for b in self.kernel.buffers}
        found = {buffers[a.weight.buffer] for s in self.kernel.sections for a in s.accumulators}
        if len(found) != 1 or not found <= set(WEIGHTS):
            raise ValueError(f"expected weights of one dtype out of {WEIGHTS}, found {sorted(map(str, found))}")
        return MEMORY_TYPES[found.pop()]

    @cached_property
    def packing(self) -> Packing | None:
        """How the weights are stored, None where they are dense."""
        return packing_of(self.kernel)

    @cached_property
    def wide(self) -> bool:
        """Whether all weights are stored (K, N): consecutive columns are neighbours in memory."""
        found = [steps(s, a) for s in self.kernel.sections for a in s.accumulators]
        return all(across == 1 and along != 1 for across, along in found)

    @cached_property
    def operand_type(self) -> str:
        graph = MEMORY_TYPES[self.kernel.operand_dtype]
        if self.packing is not None:
            return operand_type(self.kernel, self.packing)
        kind = "ColumnOperand" if self.wide else "Operand"
        return f"contract::{kind}<{self.weight_type}, {graph}>"

    @cached_property
    def tiles(self) -> tuple[_Tiles, ...]:
        return tuple(self.cut(n, s) for n, s in enumerate(self.kernel.sections))

    def cut(self, n: int, section: Section) -> _Tiles:
        size = section.axes[-1].size
        if any(isinstance(s, Reduce) for s in section.epilogue):
            assert size.is_Integer and size <= LONGEST_REDUCTION, f"a reduction over {size} columns"
            ldo = -(-size // TILE) * TILE
            return _Tiles(section, size, ldo, f"{self.names.operand}.PANEL * {ldo}", True)
        if self.wide:
            width = _symbol(unused(f"tile_{n}", self.taken))
            return _Tiles(section, width, width, f"{self.names.operand}.PRODUCTS", False)
        tile = sympy.Integer(TILE)
        return _Tiles(section, tile, tile, f"{self.names.operand}.PANEL * {TILE}", False)

    # ---- the text ----

    def text(self) -> str:
        w = Writer()
        w.line(f'#include "{header(self.packing)}.h"')
        w.line()
        if self.packing is not None and self.packing.format.bits == 4:
            w.line(numbers(self.kernel, self.packing.format))
            w.line()
        self.print_part(w)
        w.line()
        self.print_entry(w)
        return w.text()

    @property
    def arguments(self) -> list[str]:
        return [*map(parameter, self.kernel.buffers), *(f"int64_t {s}" for s in self.kernel.sizes)]

    def print_entry(self, w: Writer) -> None:
        """The exported function: decides on a team, and runs the part in each of its threads."""
        k, v = self.kernel, self.names
        columns = sympy.Add(*(_points(s.axes) * len(s.accumulators) for s in k.sections))
        passed = [*(b.name for b in k.buffers), *map(str, k.sizes), f"{v.memory}.aligned()", v.team, "status"]
        part = f"{k.name}_part({', '.join(passed)});"
        head = [*self.arguments, "int64_t threads", "int64_t* status"]
        with w.block(function_head(f'extern "C" void {k.name}', head)):
            w.line(f"const int64_t {v.rows} = {index(k.rows.size)}, {v.depth} = {index(k.depth.size)};")
            w.line(f"const int64_t {v.columns} = {index(columns)};  // of all weights")
            w.line(f"if ({v.rows} <= 0 || {v.columns} <= 0) return;")
            for size in positive_sizes(self.bodies):
                w.line(f"if ({index(size)} <= 0) return op::report(status, 1);  // nothing to index")
            items = f"({v.columns} + {TILE - 1}) / {TILE}"
            w.line(f"const int64_t {v.team} = op::team(threads, {items}, {v.rows} * {v.depth} * {v.columns});")
            w.line(f"const work::Memory {v.memory}({self.operand_type}::bytes({v.rows}, {v.depth}, {v.team}));")
            w.line(f"if ({v.team} == 1) return {part}")
            w.line(f"#pragma omp parallel num_threads({v.team})")
            w.line(part)

    def print_part(self, w: Writer) -> None:
        """What one thread does."""
        k, v = self.kernel, self.names
        head = [*self.arguments, f"char* {v.memory}", f"int64_t {v.team}", "int64_t* status"]
        with w.block(function_head(f"static void {k.name}_part", head)):
            w.line(f"const int64_t {v.rows} = {index(k.rows.size)}, {v.depth} = {index(k.depth.size)};")
            w.line(f"{self.operand_type} {v.operand}({v.memory}, {v.rows}, {v.depth}, {v.team});")
            for tiles in self.tiles:
                if tiles.width.is_Symbol:
                    arguments = f"{index(tiles.last.size)}, {v.rows}, {v.team}"
                    w.line(f"const int64_t {tiles.width} = contract::wide_tile({arguments});")
            if self.failing:
                w.line("int64_t failed = 0;")
            with self.print_blocks(w):
                self.print_operand(w)
                self.print_sections(w)
            if self.failing:
                w.line("op::report(status, failed);")

    @contextmanager
    def print_blocks(self, w: Writer) -> Iterator[None]:
        """The loops over experts and over the blocks of their rows; rows beyond those of the last one are zeros."""
        k, v = self.kernel, self.names
        if k.experts is None:
            head = f"for (int64_t {v.block} = 0; {v.block} < {v.rows}; {v.block} += contract::BLOCK)"
            with w.block(head):
                w.line(f"const int64_t {v.stop_row} = op::minimum({v.block} + contract::BLOCK, {v.rows});")
                yield
            return
        count = index(k.expert_count)
        with w.block(f"for (int64_t {v.expert} = 0; {v.expert} <= {count}; ++{v.expert})"):
            ends = f"op::clamp_index({k.experts}[{v.expert}{{}}], {v.rows} + 1)"
            w.line(f"const int64_t {MATRIX} = op::minimum({v.expert}, {count} - int64_t(1));")
            w.line(f"const int64_t {v.first_row} = {v.expert} == 0 ? 0 : {ends.format(' - 1')};")
            w.line(f"const int64_t {v.end} = {v.expert} == {count} ? {v.rows} : {ends.format('')};")
            head = f"for (int64_t {v.block} = {v.first_row}; {v.block} < {v.end}; {v.block} += contract::BLOCK)"
            with w.block(head):
                w.line(f"const int64_t {v.stop_row} = op::minimum({v.block} + contract::BLOCK, {v.end});")
                yield

    def print_operand(self, w: Writer) -> None:
        """Pack this thread's share of the rows of a block."""
        k, v = self.kernel, self.names
        body = (*self.operand_body, Store(v.line, k.depth.symbol, k.operand_value))
        w.line(f"const op::Share {v.packing} = {v.operand}.start({v.stop_row} - {v.block});")
        w.line(f"float* const {v.line} = {v.operand}.line;")
        with w.block(f"for (int64_t {v.row} = {v.packing}.first; {v.row} < {v.packing}.last; ++{v.row})"):
            w.line(f"const int64_t {k.rows.symbol} = {v.block} + {v.row};")
            if k.experts is None:
                print_phases(w, body, k.depth, self.scope)
            else:
                with w.block(f"if ({v.expert} < {index(k.expert_count)})"):
                    print_phases(w, body, k.depth, self.scope)
                w.printed[-1] += f" else __builtin_memset({v.line}, 0, {v.depth} * sizeof(float));"
            w.line(f"{v.operand}.pack({v.row});")
        w.line(f"{v.operand}.finish();")

    def print_sections(self, w: Writer) -> None:
        """This thread's share of the columns, section by section."""
        v = self.names
        total = sympy.Add(*(t.count * t.cost for t in self.tiles))
        w.line(f"contract::Tiles {v.tiles} = {{{v.operand}.member.share({index(total)})}};")
        for tiles, epilogue in zip(self.tiles, self.epilogues, strict=True):
            with w.block():
                w.line(f"const op::Share {v.share} = {v.tiles}.next({index(tiles.count)}, {index(tiles.cost)});")
                with w.block(f"for (int64_t {v.piece} = {v.share}.first; {v.piece} < {v.share}.last; ++{v.piece})"):
                    self.print_tile(w, tiles, epilogue)

    def print_tile(self, w: Writer, tiles: _Tiles, epilogue: Body) -> None:
        """One tile of columns: where it is, its weights, and the rows of the operand, panel by panel."""
        v, piece = self.names, _symbol(self.names.piece)
        for axis, position in tiles.outer(piece):
            w.line(f"const int64_t {axis} = {index(position)};")
        if not tiles.whole:
            w.line(f"const int64_t {v.first} = {index(tiles.first(piece))};")
            w.line(f"const int64_t {v.stop} = {index(tiles.stop(_symbol(v.first)))};")
        for a in tiles.section.accumulators:
            self.print_weight(w, tiles, a)
        with w.block(f"for (int64_t {v.panel} = 0; {v.panel} < {v.operand}.count; {v.panel} += {v.operand}.PANEL)"):
            self.print_products(w, tiles)
            self.print_epilogue(w, tiles, epilogue)

    def width(self, tiles: _Tiles) -> str:
        """The number of columns of the tile at hand."""
        first = _symbol(self.names.first)
        if tiles.whole or tiles.stop(first) == first + tiles.width:
            return index(tiles.width)
        return f"{self.names.stop} - {first}"

    def print_weight(self, w: Writer, tiles: _Tiles, a: Accumulator) -> None:
        """The pointer to the first weight row of the tile."""
        v, weight = self.names, a.weight
        first = sympy.Integer(0) if tiles.whole else _symbol(v.first)
        if self.packing is not None:
            return self.print_packed(w, tiles, a, first)
        ctype = self.weight_type
        row = a.row.subs(tiles.last.symbol, first)
        at = weight.offset + row * weight.row_stride
        if self.kernel.experts is not None:
            at += MATRIX * weight.expert_stride
        text = f"{weight.buffer} + {index(sympy.expand(at))}"
        across, along = steps(tiles.section, a)
        if along != 1 and not self.wide:
            room, width = self.name(a, "copy"), self.width(tiles)
            w.line(f"const work::Memory {room}(({width}) * {v.depth} * sizeof({ctype}));")
            strides = f"{index(across)}, {index(along)}"
            text = f"contract::gather(({ctype}*){room}.aligned(), {text}, {strides}, {width}, {v.depth})"
        w.line(f"const {ctype}* const {self.name(a, 'weight')} = {text};")

    def print_packed(self, w: Writer, tiles: _Tiles, a: Accumulator, first: sympy.Expr) -> None:
        """The weights of the tile where they are stored in a format, and unpacked where many rows meet them."""
        assert self.packing is not None
        weight, room, width = self.name(a, "weight"), self.name(a, "copy"), self.width(tiles)
        start = tile(self.kernel, tiles.section, a, first)
        w.line(f"const {weights_type(self.kernel, self.packing)} {weight} = {start};")
        w.line(f"const work::Memory {room}({self.names.operand}.room_for({width}));")
        unpacked = f"{self.names.operand}.unpack({room}.aligned(), {weight}, {width})"
        w.line(f"const auto* const {self.name(a, 'dense')} = {unpacked};")

    def name(self, a: Accumulator, what: str) -> str:
        return unused(f"{a.name}_{what}", self.taken)

    def ld(self, section: Section, a: Accumulator) -> sympy.Expr:
        """Elements from one weight row (where they are stored (K, N): from one k) to the next."""
        across, along = steps(section, a)
        if self.wide:
            return along
        return across if along == 1 else _symbol(self.names.depth)

    def print_products(self, w: Writer, tiles: _Tiles) -> None:
        """The accumulators of the tile, for all rows of a panel."""
        v, accumulators = self.names, tiles.section.accumulators
        for a in accumulators:
            w.line(f"alignas(64) float {self.name(a, 'tile')}[{tiles.room}];")
        for i, a in enumerate(accumulators):
            passed = [v.panel, self.name(a, "tile"), index(tiles.ldo), self.name(a, "weight")]
            passed += [index(self.ld(tiles.section, a)) if self.packing is None else self.name(a, "dense")]
            passed.append(self.width(tiles))
            if not self.wide:
                passed.append(self.follows(tiles, i))
            w.line(f"{v.operand}.multiply({', '.join(passed)});")

    def follows(self, tiles: _Tiles, i: int) -> str:
        """Where the weights are that are read after accumulator `i` of a tile: they are fetched meanwhile."""
        accumulators, start = tiles.section.accumulators, "" if self.packing is None else ".codes"
        if i + 1 < len(accumulators):
            return self.name(accumulators[i + 1], "weight") + start
        # The next tile begins with the first accumulator, further on; or behind the last one, in the next run.
        a = accumulators[i] if tiles.run == 1 else accumulators[0]
        return f"{self.name(a, 'weight')}{start} + {index(tiles.width * self.ld(tiles.section, a))}"

    def print_epilogue(self, w: Writer, tiles: _Tiles, body: Body) -> None:
        """The epilogue over the rows of the panel and the columns of the tile."""
        v, last = self.names, tiles.last
        count = f"op::minimum({v.operand}.PANEL, {v.operand}.count - {v.panel})"
        with w.block(loop(v.row, count)):
            w.line(f"const int64_t {self.kernel.rows.symbol} = {v.block} + {v.panel} + {v.row};")
            seeds = {}
            for a in tiles.section.accumulators:
                values, products = self.name(a, "row"), self.name(a, "tile")
                w.line(f"const float* const {values} = {products} + {v.row} * {index(tiles.ldo)};")
                seeds[a.name] = f"{values}[{last.symbol if tiles.whole else f'{last.symbol} - {v.first}'}]"
            if tiles.whole:
                print_phases(w, body, last, self.scope, seeds)
            else:
                print_span(w, body, last, self.scope, seeds, loop(last.symbol, v.stop, v.first))


def steps(section: Section, a: Accumulator) -> tuple[sympy.Expr, sympy.Expr]:
    """Elements of memory from one column of a section to the next, and from one k to the next."""
    last = section.axes[-1].symbol
    step = sympy.expand(a.row.subs(last, last + 1) - a.row)
    assert last not in step.free_symbols, f"the rows of {a.name} are not affine in {last}"
    return sympy.expand(step * a.weight.row_stride), sympy.sympify(a.weight.k_stride)


def names_of(kernel: Contract, bodies: Sequence[Body]) -> frozenset[str]:
    """Every name that a kernel gives to something."""
    axes = [kernel.rows, kernel.depth, *(a for s in kernel.sections for a in s.axes)]
    values = {s.out for body in bodies for s in body if not isinstance(s, Store)}
    accumulators = {a.name for s in kernel.sections for a in s.accumulators}
    others = {*(a.symbol for a in axes), *kernel.sizes, *(b.name for b in kernel.buffers)}
    return frozenset(values | accumulators | {str(name) for name in others})


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _points(axes: Sequence[Axis]) -> sympy.Expr:
    return sympy.Mul(*(a.size for a in axes))
