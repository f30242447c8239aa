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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch

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
    print_statements,
    simd_legal,
    simd_pragma,
)
from llmcomp.codegen.cpp_expr import MEMORY_TYPES, index
from llmcomp.codegen.kernel import (
    Accumulator,
    Axis,
    Body,
    Buffer,
    Check,
    Contract,
    Reduce,
    Section,
    Store,
    vectors,
)

TILE = 32
# Columns of a section whose epilogue reduces along them are one tile, in an array on the stack.
LONGEST_REDUCTION = 1024
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def render_contract(kernel: Contract, comment: Sequence[str] = ()) -> Source:
    """The C++ source of `kernel`; `comment` names the graph nodes that it computes.

    Raises ValueError where the weights have different dtypes or are not of a floating point type up to 32 bits.
    """
    return Source(kernel.name, "cpp", _Printer(kernel).text(), tuple(comment))


@dataclass(frozen=True)
class _Printer:
    kernel: Contract

    # ---- what is known before anything is printed ----

    @cached_property
    def scope(self) -> Scope:
        k = self.kernel
        seeds = {a.name: torch.float32 for s in k.sections for a in s.accumulators}
        return make_scope([*k.buffers, Buffer(self.line, torch.float32, True)], self.bodies, seeds)

    @cached_property
    def bodies(self) -> list[Body]:
        k = self.kernel
        epilogues = [expand_argmax(s.epilogue, s.axes[-1].symbol) for s in k.sections]
        return [expand_argmax(k.operand, k.depth.symbol), *epilogues]

    @cached_property
    def taken(self) -> frozenset[str]:
        k = self.kernel
        axes = [k.rows, k.depth, *(a for s in k.sections for a in s.axes)]
        values = {s.out for body in self.bodies for s in body if not isinstance(s, Store)}
        accumulators = {a.name for s in k.sections for a in s.accumulators}
        names = {str(n) for n in (*(a.symbol for a in axes), *k.sizes, *(b.name for b in k.buffers))}
        return frozenset(names | values | accumulators)

    def local(self, stem: str) -> str:
        """`stem`, or `stem_` where the kernel has a name like it."""
        return self.local(stem + "_") if stem in self.taken else stem

    @cached_property
    def line(self) -> str:
        return self.local("line")

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        buffers = {b.name: b.dtype for b in self.kernel.buffers}
        found = {buffers[a.weight.buffer] for s in self.kernel.sections for a in s.accumulators}
        if len(found) != 1 or not found <= set(WEIGHTS):
            raise ValueError(f"expected weights of one dtype out of {WEIGHTS}, found {sorted(map(str, found))}")
        return found.pop()

    @cached_property
    def wide(self) -> bool:
        """Whether all weights are stored (K, N): consecutive columns are neighbours in memory."""
        steps = [self.steps(s, a) for s in self.kernel.sections for a in s.accumulators]
        return all(across == 1 and along != 1 for across, along in steps)

    def steps(self, section: Section, accumulator: Accumulator) -> tuple[sympy.Expr, sympy.Expr]:
        """Elements of memory from one column of a tile to the next, and from one k to the next."""
        last = section.axes[-1].symbol
        step = sympy.expand(accumulator.row.subs(last, last + 1) - accumulator.row)
        assert last not in step.free_symbols, f"rows of {accumulator.name} are not affine in {last}"
        return sympy.expand(step * accumulator.weight.row_stride), accumulator.weight.k_stride

    # ---- the text ----

    def text(self) -> str:
        w = Writer()
        w.line('#include "contract.h"')
        w.line()
        self.print_part(w)
        w.line()
        self.print_entry(w)
        return w.text()

    @cached_property
    def operand_type(self) -> str:
        weight = MEMORY_TYPES[self.dtype]
        if self.wide:
            return f"contract::ColumnOperand<{weight}>"
        return f"contract::Operand<{weight}, {MEMORY_TYPES[self.kernel.operand_dtype]}>"

    @property
    def arguments(self) -> list[str]:
        return [*map(parameter, self.kernel.buffers), *(f"int64_t {s}" for s in self.kernel.sizes)]

    def print_entry(self, w: Writer) -> None:
        k = self.kernel
        rows, depth, columns, team, memory = map(self.local, ("rows", "depth", "columns", "team", "memory"))
        head = [*self.arguments, "int64_t threads", "int64_t* status"]
        passed = [*(b.name for b in k.buffers), *map(str, k.sizes), f"{memory}.aligned()", team, "status"]
        total = sympy.Add(*(_count(s.axes) * len(s.accumulators) for s in k.sections))
        with w.block(function_head(f'extern "C" void {k.name}', head)):
            w.line(f"const int64_t {rows} = {index(k.rows.size)}, {depth} = {index(k.depth.size)};")
            w.line(f"const int64_t {columns} = {index(total)};  // of all weights")
            w.line(f"if ({rows} <= 0 || {columns} <= 0) return;")
            for size in positive_sizes(self.bodies):
                w.line(f"if ({index(size)} <= 0) return op::report(status, 1);  // nothing to index")
            w.line(
                f"const int64_t {team} = op::team(threads, ({columns} + {TILE - 1}) / {TILE}, {rows} * {depth} * {columns});"
            )
            w.line(
                f"const contract::Memory {memory}({self.operand_type}::bytes({rows}, {depth}, {team}));"
            )
            w.line(f"if ({team} == 1) return {k.name}_part({', '.join(passed)});")
            w.line(f"#pragma omp parallel num_threads({team})")
            w.line(f"{k.name}_part({', '.join(passed)});")

    def print_part(self, w: Writer) -> None:
        k = self.kernel
        rows, depth, team, memory, operand = map(self.local, ("rows", "depth", "team", "memory", "operand"))
        head = [*self.arguments, f"char* {memory}", f"int64_t {team}", "int64_t* status"]
        failing = checks(self.bodies, self.scope)
        with w.block(function_head(f"static void {k.name}_part", head)):
            w.line(f"const int64_t {rows} = {index(k.rows.size)}, {depth} = {index(k.depth.size)};")
            w.line(f"{self.operand_type} {operand}({memory}, {rows}, {depth}, {team});")
            for n, section in enumerate(k.sections):
                self.print_counts(w, n, section)
            if failing:
                w.line("int64_t failed = 0;")
            with self.print_experts(w):
                self.print_operand(w)
                self.print_sections(w)
            if failing:
                w.line("op::report(status, failed);")

    @contextmanager
    def print_experts(self, w: Writer) -> Iterator[None]:
        """The loops over experts and over blocks of rows: `block` is the first row, `stop_row` ends the rows."""
        k = self.kernel
        rows, block, stop = map(self.local, ("rows", "block", "stop_row"))
        step = f"{block} += contract::BLOCK"
        if k.experts is None:
            with w.block(f"for (int64_t {block} = 0, {stop} = {rows}; {block} < {stop}; {step})"):
                yield
            return
        expert, first = self.local("expert"), self.local("first_row")
        with w.block(loop(expert, index(k.expert_count))):
            w.line(f"const int64_t {first} = {expert} ? op::clamp_index({k.experts}[{expert} - 1], {rows} + 1) : 0;")
            w.line(f"const int64_t {stop} = op::clamp_index({k.experts}[{expert}], {rows} + 1);")
            with w.block(f"for (int64_t {block} = {first}; {block} < {stop}; {step})"):
                yield

    def print_operand(self, w: Writer) -> None:
        """Pack this thread's share of the rows of a block."""
        k = self.kernel
        block, stop, operand, packing = map(self.local, ("block", "stop_row", "operand", "packing"))
        row, m = self.local("row"), k.rows.symbol
        body = (*self.bodies[0], Store(self.line, k.depth.symbol, k.operand_value))
        w.line(
            f"const op::Share {packing} = {operand}.start(op::minimum(contract::BLOCK, {stop} - {block}));"
        )
        w.line(f"float* const {self.line} = {operand}.line;")
        with w.block(f"for (int64_t {row} = {packing}.first; {row} < {packing}.last; ++{row})"):
            w.line(f"const int64_t {m} = {block} + {row};")
            print_phases(w, body, k.depth, self.scope)
            w.line(f"{operand}.pack({row});")
        w.line(f"{operand}.finish();")

    # ---- sections ----

    def print_counts(self, w: Writer, n: int, section: Section) -> None:
        """`tile_n` columns in a tile, `run_n` tiles along the last axis, `tiles_n` in the section."""
        tile, run, tiles = (self.local(f"{stem}_{n}") for stem in ("tile", "run", "tiles"))
        size = index(section.axes[-1].size)
        outer = _count(section.axes[:-1])
        w.line(f"const int64_t {tile} = {self.tile(section)};")
        w.line(f"const int64_t {run} = ({size} + {tile} - 1) / {tile};")
        w.line(f"const int64_t {tiles} = {f'{_atom(outer)} * ' if outer != 1 else ''}{run};")

    def tile(self, section: Section) -> str:
        """The number of columns of a tile."""
        size = section.axes[-1].size
        if self.reduces(section):
            assert size.is_Integer and size <= LONGEST_REDUCTION, f"a reduction over {size} columns"
            return str(size)
        if self.wide:
            return f"contract::wide_tile({index(size)}, {self.local('team')})"
        return "contract::TILE"

    def reduces(self, section: Section) -> bool:
        return any(isinstance(s, Reduce) for s in section.epilogue)

    def print_sections(self, w: Writer) -> None:
        k = self.kernel
        tiles = self.local("tiles")
        costs = [(self.local(f"tiles_{n}"), self.cost(n)) for n in range(len(k.sections))]
        total = " + ".join(f"{count} * {cost}" for count, cost in costs)
        w.line(f"contract::Tiles {tiles} = {{{self.local('operand')}.member.share({total})}};")
        for n, (section, (count, cost)) in enumerate(zip(k.sections, costs, strict=True)):
            share, piece = self.local(f"share_{n}"), self.local("piece")
            w.line(f"const op::Share {share} = {tiles}.next({count}, {cost});")
            with w.block(f"for (int64_t {piece} = {share}.first; {piece} < {share}.last; ++{piece})"):
                self.print_tile(w, n, section)

    def cost(self, n: int) -> str:
        weights = len(self.kernel.sections[n].accumulators)
        return f"{weights} * {self.local(f'tile_{n}')}" if weights > 1 else self.local(f"tile_{n}")

    def print_tile(self, w: Writer, n: int, section: Section) -> None:
        """One tile of columns: where it is, its weights, and the rows of the operand, panel by panel."""
        k = self.kernel
        *outer, last = section.axes
        first, stop, operand, panel = map(self.local, ("first", "stop", "operand", "panel"))
        tile, run, piece = self.local(f"tile_{n}"), self.local(f"run_{n}"), self.local("piece")
        position = f"{piece} / {run}"
        for i, axis in enumerate(outer):
            inner = _count(outer[i + 1 :])
            quotient = position if inner == 1 else f"{position} / {_atom(inner)}"
            w.line(f"const int64_t {axis.symbol} = {quotient}{f' % {_atom(axis.size)}' if i else ''};")
        whole = self.reduces(section)
        size = index(last.size)
        if not whole:
            w.line(f"const int64_t {first} = {f'{piece} % {run}' if outer else piece} * {tile};")
            w.line(f"const int64_t {stop} = {self.stop(section, first, tile, size)};")
        width = size if whole else f"{stop} - {first}"
        for a in section.accumulators:
            self.print_weight(w, section, a, sympy.Integer(0) if whole else _symbol(first), width)
        with w.block(
            f"for (int64_t {panel} = 0; {panel} < {operand}.count; {panel} += {operand}.PANEL)"
        ):
            self.print_products(w, n, section, width)
            self.print_epilogue(w, n, section)

    def stop(self, section: Section, first: str, tile: str, size: str) -> str:
        length = section.axes[-1].size
        if not self.wide and length.is_Integer and length % TILE == 0:
            return f"{first} + contract::TILE"
        return f"op::minimum<int64_t>({first} + {tile}, {size})"

    def print_weight(self, w: Writer, section: Section, a: Accumulator, first: sympy.Expr, width: str) -> None:
        """The pointer to the first weight row of the tile."""
        k, weight = self.kernel, a.weight
        ctype = MEMORY_TYPES[self.dtype]
        at = weight.offset + a.row.subs(section.axes[-1].symbol, first) * weight.row_stride
        if k.experts is not None:
            at += _symbol(self.local("expert")) * weight.expert_stride
        text = f"{weight.buffer} + {index(sympy.expand(at))}"
        across, along = self.steps(section, a)
        if along != 1 and not self.wide:
            room, depth = self.local(f"{a.name}_gathered"), self.local("depth")
            w.line(f"const contract::Memory {room}(({width}) * {depth} * sizeof({ctype}));")
            text = f"contract::gather(({ctype}*){room}.aligned(), {text}, {index(across)}, {index(along)}, {width}, {depth})"
        w.line(f"const {ctype}* const {self.weight_name(a)} = {text};")

    def weight_name(self, a: Accumulator) -> str:
        return self.local(f"{a.name}_weight")

    def ld(self, section: Section, a: Accumulator) -> str:
        """Elements from one weight row (or, where stored (K, N), from one k) to the next."""
        across, along = self.steps(section, a)
        if self.wide:
            return index(along)
        return index(across) if along == 1 else self.local("depth")

    def print_products(self, w: Writer, n: int, section: Section, width: str) -> None:
        """The accumulators of the tile, for all rows of a panel."""
        operand, panel, tile = map(self.local, ("operand", "panel", f"tile_{n}"))
        size = section.axes[-1].size
        single = size.is_Integer and size <= TILE or self.reduces(section)
        ldo = self.ldo(section)
        for i, a in enumerate(section.accumulators):
            products, ld = self.local(f"{a.name}_tile"), self.ld(section, a)
            w.line(f"alignas(64) float {products}[{operand}.PANEL * {ldo}];")
            if i + 1 < len(section.accumulators):
                follows = self.weight_name(section.accumulators[i + 1])
            else:
                # What is read next: the same tile further on, or where that ends the run, what lies behind.
                begin = a if single else section.accumulators[0]
                follows = f"{self.weight_name(begin)} + {_product(tile, self.ld(section, begin))}"
            passed = [panel, products, ldo, self.weight_name(a), ld, width, *([] if self.wide else [follows])]
            w.line(f"{operand}.multiply({', '.join(passed)});")

    def ldo(self, section: Section) -> str:
        """Elements from one row of an accumulator tile to the next."""
        if self.reduces(section):
            return str(-(-int(section.axes[-1].size) // TILE) * TILE)
        return "contract::WIDE_TILE" if self.wide else "contract::TILE"

    def print_epilogue(self, w: Writer, n: int, section: Section) -> None:
        """The epilogue body over the rows of the panel and the columns of the tile."""
        m, last = self.kernel.rows.symbol, section.axes[-1]
        block, panel, operand, row, stop = map(self.local, ("block", "panel", "operand", "row", "stop"))
        body, first = self.bodies[n + 1], self.local("first")
        count = f"op::minimum({operand}.PANEL, {operand}.count - {panel})"
        with w.block(f"for (int64_t {row} = 0; {row} < {count}; ++{row})"):
            w.line(f"const int64_t {m} = {block} + {panel} + {row};")
            whole = self.reduces(section)
            at = last.symbol if whole else f"{last.symbol} - {first}"
            seeds = {}
            for a in section.accumulators:
                values = self.local(f"{a.name}_row")
                w.line(
                    f"const float* const {values} = {self.local(f'{a.name}_tile')} + {row} * {self.ldo(section)};"
                )
                seeds[a.name] = f"{values}[{at}]"
            if whole:
                print_phases(w, body, last, self.scope, seeds)
            else:
                _print_span(w, body, last, self.scope, seeds, loop(last.symbol, stop, first))


def _print_span(
    w: Writer, body: Body, axis: Axis, scope: Scope, seeds: Mapping[str, str], head: str
) -> None:
    """A body without reductions along a part of `axis`: what is constant along it once, then the loop."""
    varying = vectors(body, axis.symbol, tuple(seeds))
    once = [s for s in body if not isinstance(s, Store) and s.out not in varying]
    rest = [s for s in body if s not in once]
    w.lines(print_statements(once, scope))
    if simd_legal(body, axis, scope):
        w.line(simd_pragma(rest, scope))
    with w.block(head):
        w.lines(f"const float {name} = {text};" for name, text in seeds.items())
        w.lines(print_statements(rest, scope))


def function_head(name: str, arguments: Sequence[str]) -> str:
    """A function head: on one line where it fits, else one argument a line."""
    line = f"{name}({', '.join(arguments)})"
    return line if len(line) <= 110 else f"{name}(\n    " + ",\n    ".join(arguments) + "\n)"


def positive_sizes(bodies: Sequence[Body]) -> list[sympy.Expr]:
    """Sizes of checked dimensions that may be zero: a clamped index would read an empty buffer."""
    found = [s.size for body in bodies for s in body if isinstance(s, Check) and s.mask is None]
    return [size for size in dict.fromkeys(found) if not size.is_positive]


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _count(axes: Sequence[Axis]) -> sympy.Expr:
    return sympy.Mul(*(a.size for a in axes))


def _atom(expr: sympy.Expr) -> str:
    text = index(expr)
    return text if expr.is_Symbol or expr.is_Integer else f"({text})"


def _product(a: str, b: str) -> str:
    return f"{a} * {b}" if b.isalnum() else f"{a} * ({b})"
