"""Contract as Triton, in two forms that share everything but the inner loop.

    gemv   few rows: weights stream through registers once, a program owns BLOCK_N columns and adds up
           products of [BLOCK_M, BLOCK_N, BLOCK_K]; no tensor cores, so no padding of the rows
    dot    more rows: `tl.dot` on tiles

Both: the sections of columns are ranges of program numbers. The prologue is computed again by every program
(a row is small and lies in L2). Experts: a second grid dimension, whose programs walk the rows of their
expert, the last ones the rows behind those of all experts, whose products are zeros. A section with a reduction
along its last axis (a norm within a head) gives a program that axis whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import sympy
import torch

from llmcomp.codegen.kernel import (
    MATRIX,
    Accumulator,
    Body,
    Check,
    Compute,
    Contract,
    Index,
    Load,
    Reduce,
    Section,
    Statement,
    Store,
    inputs,
    packing_of,
    phases,
    vectors,
)
from llmcomp.codegen.triton_blocks import blocks_of, columns_of_program, print_block_products
from llmcomp.codegen.triton_body import (
    Dim,
    Tile,
    Value,
    Writer,
    call,
    chunks,
    indexed,
    load_text,
    make_buffers,
    narrowed,
    own,
    spell,
    statements,
)
from llmcomp.codegen.triton_dynamic import (
    is_dynamic,
    print_products,
    print_quantized,
    print_scaled_rows,
    sums_integers,
    with_token_scale,
)
from llmcomp.codegen.triton_expr import NARROW_FLOATS
from llmcomp.codegen.triton_file import (
    LAUNCH,
    arguments,
    config_functions,
    count,
    decode,
    extents_function,
    file_head,
    flatten,
    flattened,
    host_text,
    jit_function,
    launcher,
    unpack,
)
from llmcomp.codegen.triton_packed import (
    columns_of_word,
    gemv_total,
    is_coded,
    is_halved,
    is_sparse,
    masks_of,
    print_codes_dot,
    print_quads,
    print_rows,
    print_scaled,
    print_sizes,
    quad_of,
    words_of,
)
from llmcomp.codegen.triton_sparse import print_chosen, print_spread_dot

# Up to this many rows (of one expert, on average) the gemv form is faster than padding to a tensor core tile.
GEMV_ROWS = 4
# A depth that is a multiple of this is never masked: the launcher chooses a BLOCK_K that divides it.
EVEN_DEPTH = 64
# Likewise a row of words of 4-bit codes.
EVEN_WORDS = 32
# Likewise columns: BLOCK_N is never larger.
EVEN_COLUMNS = 128
MINIMUM_DOT = 16
# Results of a thread whose epilogue is simple.
ROOM = 64
# Operations of an epilogue that keep many values of each element in registers.
LONG = frozenset("tanh sinh cosh asinh acosh atanh expm1 log1p pow erfc sin cos tan fmod remainder".split())


def render_contract(kernel: Contract) -> str:
    """The Triton text of a Contract."""
    kernel = with_token_scale(replace(kernel, sections=distinct(kernel)))
    forms = forms_of(kernel)
    w = Writer()
    file_head(w, codes=packing_of(kernel) is not None)
    for form in forms:
        _print_form(w, kernel, form, _function_name(kernel, form, forms))
    _print_extents(w, kernel)
    _print_launch(w, kernel, forms)
    return w.text()


def forms_of(kernel: Contract) -> tuple[str, ...]:
    """The forms that some size of the rows may want."""
    rows, experts = kernel.rows.size, kernel.expert_count
    if not (rows.is_Integer and experts.is_Integer):
        return "gemv", "dot"
    return ("gemv",) if int(rows) <= GEMV_ROWS * int(experts) else ("dot",)


def _function_name(kernel: Contract, form: str, forms: Sequence[str]) -> str:
    return kernel.name if len(forms) == 1 else f"{kernel.name}_{form}"


# ---- sections -----------------------------------------------------------------------------------------


def distinct(kernel: Contract) -> tuple[Section, ...]:
    """The sections with names that no other section uses: Triton would join equal names after a branch."""
    if len(kernel.sections) == 1:
        return kernel.sections
    taken = {b.name for b in kernel.buffers} | {s.out for s in kernel.operand if not isinstance(s, Store)}
    result = []
    for number, section in enumerate(kernel.sections):
        own = {str(a.symbol) for a in section.axes} | {a.name for a in section.accumulators}
        own |= {s.out for s in section.epilogue if not isinstance(s, Store)}
        axes = {str(a.symbol) for a in section.axes}
        result.append(renamed(section, {n: f"{n}_{number}" for n in own if n in taken or n in axes}))
        taken |= own
    return tuple(result)


def renamed(section: Section, names: Mapping[str, str]) -> Section:
    """A section with other names for axes and values."""
    symbols = {s: _symbol(s, names[str(s)]) for s in _symbols(section) if str(s) in names}
    axes = tuple(replace(a, symbol=symbols.get(a.symbol, a.symbol)) for a in section.axes)
    accumulators = tuple(
        replace(a, name=names.get(a.name, a.name), row=a.row.xreplace(symbols)) for a in section.accumulators
    )
    epilogue = tuple(_renamed_statement(s, names, symbols) for s in section.epilogue)
    return Section(axes, accumulators, epilogue)


def _symbol(like: sympy.Symbol, name: str) -> sympy.Symbol:
    return sympy.Symbol(name, **like.assumptions0)


def _symbols(section: Section) -> set[sympy.Symbol]:
    found = {a.symbol for a in section.axes}
    for s in section.epilogue:
        if isinstance(s, Load | Store):
            found |= s.index.free_symbols
        elif isinstance(s, Index):
            found |= s.expr.free_symbols
        elif isinstance(s, Check):
            found |= s.size.free_symbols
    return found


def _renamed_statement(
    s: Statement, names: Mapping[str, str], symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> Statement:
    def new(name: str | None) -> str | None:
        return None if name is None else names.get(name, name)

    match s:
        case Load():
            return replace(s, out=names.get(s.out, s.out), index=s.index.xreplace(symbols), mask=new(s.mask))
        case Store():
            value = names.get(s.value, s.value)
            return replace(s, index=s.index.xreplace(symbols), value=value, mask=new(s.mask))
        case Index():
            return replace(s, out=names.get(s.out, s.out), expr=s.expr.xreplace(symbols))
        case Check():
            out, value = names.get(s.out, s.out), names.get(s.value, s.value)
            return replace(s, out=out, value=value, size=s.size.xreplace(symbols), mask=new(s.mask))
        case Reduce():
            return replace(s, out=names.get(s.out, s.out), value=names.get(s.value, s.value))
        case Compute():
            args = tuple(names.get(a, a) if isinstance(a, str) else a for a in s.args)
            return replace(s, out=names.get(s.out, s.out), args=args)


def whole_axis(section: Section) -> int:
    """The columns that a program must own together, as the epilogue reduces along them; 0 if any will do."""
    if not any(isinstance(s, Reduce) for s in section.epilogue):
        return 0
    size = int(section.axes[-1].size)
    return max(MINIMUM_DOT, 1 << (size - 1).bit_length())


def programs(section: Section, block: str, text: Callable[[sympy.Expr], str] = indexed) -> str:
    """The number of programs of a section, in a kernel or (with `host_text`) in its launcher."""
    if whole_axis(section):
        return text(count(section.axes[:-1]))
    return f"({text(count(section.axes))} + {block} - 1) // {block}"


# ---- the kernel ---------------------------------------------------------------------------------------


def _print_form(w: Writer, kernel: Contract, form: str, name: str) -> None:
    doc = {
        "gemv": "Few rows: a program streams the weights of BLOCK_N columns through registers.",
        "dot": "A program computes BLOCK_M rows of BLOCK_N columns on tensor cores.",
    }[form]
    blocks = ["BLOCK_M", "BLOCK_N", "BLOCK_K", *(["FLOAT8"] if _asks_for_float8(kernel) else [])]
    with jit_function(w, kernel, _bodies(kernel), name, blocks, doc):
        if _even(kernel):
            w.line(f"tl.static_assert({indexed(_steps(kernel))} % BLOCK_K == 0)")
        print_sizes(w, kernel, form)
        with _rows(w, kernel):
            tile = _operand_tile(kernel)
            _print_prologue(w, kernel, tile)
            _print_sections(w, kernel, form, tile)


def _asks_for_float8(kernel: Contract) -> bool:
    return is_dynamic(kernel) and not sums_integers(kernel)


def _bodies(kernel: Contract) -> list[Body]:
    return [kernel.operand, *(s.epilogue for s in kernel.sections)]


def _steps(kernel: Contract) -> sympy.Expr:
    """What BLOCK_K counts: the depth, or the words that hold a row of 4-bit weights."""
    words = words_of(kernel)
    return kernel.depth.size if words is None else words


def _even(kernel: Contract) -> bool:
    depth, words = kernel.depth.size, words_of(kernel)
    if blocks_of(kernel) is not None:
        return False
    if words is None:
        return bool(depth.is_Integer and int(depth) % EVEN_DEPTH == 0)
    return bool(depth == columns_of_word(kernel) * words and int(words) % EVEN_WORDS == 0)


def _factor(expr: sympy.Expr) -> str:
    return indexed(expr) if expr.is_Integer or expr.is_Symbol else f"({indexed(expr)})"


@contextmanager
def _rows(w: Writer, kernel: Contract) -> Iterator[None]:
    """Print which rows a program computes; what is written inside runs for them."""
    m, rows = spell(str(kernel.rows.symbol)), indexed(kernel.rows.size)
    if kernel.experts is not None:
        ends = spell(kernel.experts)
        w.line("program = tl.program_id(0)")
        w.line("expert = tl.program_id(1)")
        w.line(f"first_row = tl.load({ends} + expert - 1, mask=expert > 0, other=0)")
        experts = _factor(kernel.expert_count)
        w.line(f"{MATRIX} = tl.minimum(expert, {experts} - 1).to(tl.int64)")
        w.line(f"end_row = tl.load({ends} + expert, mask=expert < {experts}, other={rows})")
        w.line(f"depth_end = tl.where(expert < {experts}, {indexed(_steps(kernel))}, 0)  # nobody's rows give zeros")
        with w.block("for start_row in range(first_row, end_row, BLOCK_M)"):
            w.line(f"{m} = (start_row + tl.arange(0, BLOCK_M)[:, None]).to(INDEX)")
            w.line(f"row_inside = {m} < end_row")
            yield
        return
    if kernel.rows.size == 1:
        w.line("program = tl.program_id(0)")
        w.line(f"{m} = tl.arange(0, BLOCK_M)[:, None]")
    else:
        w.line(f"tiles = tl.cdiv({rows}, BLOCK_M)")
        w.line("program = tl.program_id(0) // tiles")
        first = "(tl.program_id(0) % tiles).to(INDEX) * BLOCK_M"
        w.line(f"{m} = {first} + tl.arange(0, BLOCK_M)[:, None]")
    w.line(f"row_inside = {m} < {rows}")
    yield


def _operand_tile(kernel: Contract) -> Tile:
    m, k = str(kernel.rows.symbol), str(kernel.depth.symbol)
    block = "BLOCK_K" if words_of(kernel) is None else "HALF"
    dims = (Dim("m", "BLOCK_M", "row_inside"), Dim("k", block, "" if _even(kernel) else "k_inside"))
    symbols = {m: frozenset({"m"}), k: frozenset({"k"})}
    return Tile(make_buffers(kernel.buffers), dims, symbols, inner="k", inner_at=spell(k))


def _print_prologue(w: Writer, kernel: Contract, tile: Tile) -> None:
    """The reductions of the operand's rows, and what follows from them."""
    for phase in phases(kernel.operand, kernel.depth.symbol):
        w.lines(statements(phase.scalars, tile))
        if any(isinstance(s, Reduce) for s in phase.body):
            chunks(w, phase.body, kernel.depth, tile)


def main_body(kernel: Contract) -> Body:
    """What the operand's value needs at a point along the depth, once the reductions of its row are known."""
    varying = vectors(kernel.operand, kernel.depth.symbol)
    by_name = {s.out: s for s in kernel.operand if not isinstance(s, Store)}
    needed: set[str] = set()
    pending = [kernel.operand_value]
    while pending:
        name = pending.pop()
        if name in varying and name not in needed:
            needed.add(name)
            pending.extend(inputs(by_name[name]))
    return tuple(s for s in kernel.operand if not isinstance(s, Reduce | Store) and s.out in needed)


def _print_sections(w: Writer, kernel: Contract, form: str, tile: Tile) -> None:
    """The branches over the sections, each a range of program numbers."""
    if len(kernel.sections) == 1:
        _print_section(w, kernel, kernel.sections[0], 0, "program", form, tile)
        return
    for number, section in enumerate(kernel.sections[:-1]):
        before = f"end_{number - 1} + " if number else ""
        w.line(f"end_{number} = {before}{programs(section, 'BLOCK_N')}")
    last = len(kernel.sections) - 1
    for number, section in enumerate(kernel.sections):
        keyword = "if" if number == 0 else "elif"
        first = "program" if number == 0 else f"(program - end_{number - 1})"
        with w.block("else" if number == last else f"{keyword} program < end_{number}"):
            _print_section(w, kernel, section, number, first, form, tile)


def _print_section(
    w: Writer, kernel: Contract, section: Section, number: int, program: str, form: str, tile: Tile
) -> None:
    suffix = f"_{number}" if len(kernel.sections) > 1 else ""
    if not whole_axis(section):
        section = _flat(section, own(f"column{suffix}"))
    epilogue = _section_tile(w, kernel, section, program, suffix)
    block = epilogue.dim("n").block
    for a in section.accumulators if blocks_of(kernel) is None else ():
        w.line(f"{spell(a.name)}_rows = {_weight_rows(a, kernel)}")
    quads = form == "gemv" and quad_of(kernel) > 0
    if packing_of(kernel) is not None:
        print_rows(w, kernel, section, quads or words_of(kernel) is not None, masks_of(kernel))
    for a in section.accumulators:
        shape = f"[BLOCK_M, {block}, {'QUADS' if quads else 'BLOCK_K'}]" if form == "gemv" else f"[BLOCK_M, {block}]"
        integers = sums_integers(kernel) and (quads or form == "dot")
        w.line(f"{spell(a.name)} = tl.zeros({shape}, {'tl.int32' if integers else 'tl.float32'})")
    if blocks_of(kernel) is not None:
        native = torch.float32 if form == "gemv" else dot_dtype(kernel, section)
        operand = partial(_print_operand, w, kernel, tile, native, form)
        print_block_products(w, kernel, section, form, epilogue.dim("n"), native, operand)
    else:
        depth = indexed(_steps(kernel)) if kernel.experts is None else "depth_end"
        with w.block(f"for start in range(0, {depth}, BLOCK_K)"):
            _print_step(w, kernel, section, form, epilogue.dim("n"), tile)
    for a in section.accumulators:
        if form == "gemv":
            total = gemv_total(kernel, a) if quads and is_coded(kernel) else f"tl.sum({spell(a.name)}, axis=2)"
            w.line(f"{spell(a.name)} = {total}")
        print_scaled_rows(w, kernel, a.name)
        epilogue.values[a.name] = Value(torch.float32, frozenset({"m", "n"}))
    w.lines(statements(section.epilogue, epilogue))


def _print_step(w: Writer, kernel: Contract, section: Section, form: str, columns: Dim, tile: Tile) -> None:
    """What a program does with BLOCK_K of the depth."""
    even, native = _even(kernel), torch.float32 if form == "gemv" else dot_dtype(kernel, section)
    operand = partial(_print_operand, w, kernel, tile, native, form)
    if is_sparse(kernel) and form == "gemv":
        print_chosen(w, kernel, section, columns.inside, even, operand)
    elif is_sparse(kernel):
        print_spread_dot(w, kernel, section, columns.inside, even, native, operand)
    elif form == "gemv" and quad_of(kernel):
        print_quads(w, kernel, section, columns.block, columns.inside, even, operand)
    elif words_of(kernel) is not None:
        print_codes_dot(w, kernel, section, columns.inside, even, native, operand)
    else:
        (_print_gemv if form == "gemv" else _print_dot)(w, kernel, section, columns.inside, tile)


def _flat(section: Section, column: sympy.Symbol) -> Section:
    """A section with addresses in terms of the column number, where its axes occur as that."""
    accumulators = (replace(a, row=flattened(a.row, section.axes, column)) for a in section.accumulators)
    epilogue = tuple(flatten(s, section.axes, column) for s in section.epilogue)
    return replace(section, accumulators=tuple(accumulators), epilogue=epilogue)


def _section_tile(w: Writer, kernel: Contract, section: Section, program: str, suffix: str) -> Tile:
    """Print the columns of a program and how they decode into the axes; the tile of the epilogue."""
    *outer, last = section.axes
    m, n = str(kernel.rows.symbol), str(last.symbol)
    whole, inside = whole_axis(section), f"col_inside{suffix}"
    used = {name for s in section.epilogue for name in inputs(s)}
    used |= {str(s) for a in section.accumulators for s in a.row.free_symbols}
    symbols = {m: frozenset({"m"}), n: frozenset({"n"}), f"@column{suffix}": frozenset({"n"})}
    if whole:
        w.lines(decode(program, outer, used))
        w.line(f"{spell(n)} = tl.arange(0, {whole})[None, :]")
        if last.size == whole:
            inside = ""
        else:
            w.line(f"{inside} = {spell(n)} < {indexed(last.size)}")
    else:
        column, size = f"column{suffix}", count(section.axes)
        w.line(f"{column} = ({program} * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)[None, :]")
        w.lines(decode(column, section.axes, used))
        symbols |= {str(a.symbol): frozenset({"n"}) for a in outer}
        if size.is_Integer and int(size) % EVEN_COLUMNS == 0:
            inside = ""
        elif size.is_Integer:
            w.line(f"{inside} = prelude.below({column}, {indexed(size)}, BLOCK_N)")
        else:
            w.line(f"{inside} = {column} < {indexed(size)}")
    dims = (Dim("m", "BLOCK_M", "row_inside"), Dim("n", str(whole) if whole else "BLOCK_N", inside))
    return Tile(make_buffers(kernel.buffers), dims, symbols, inner="n", inner_at=spell(n))


def _weight_rows(a: Accumulator, kernel: Contract) -> str:
    """The addresses of the first element of each weight row of a program, [1, BLOCK_N]."""
    expert = ""
    if kernel.experts is not None:
        expert = f" + {MATRIX} * {indexed(a.weight.expert_stride)}"
    at = sympy.expand(a.weight.offset + a.row * a.weight.row_stride)
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    bits = ".to(tl.pointer_type(tl.uint8))" if dtypes[a.weight.buffer] == torch.float8_e4m3fn else ""
    return f"{spell(a.weight.buffer)}{bits}{expert} + {indexed(at)}"


def _print_operand(w: Writer, kernel: Contract, tile: Tile, native: torch.dtype, form: str) -> str:
    """Print what weights are multiplied by in a [BLOCK_M, BLOCK_K] tile, zero beyond the depth; its name."""
    if not is_dynamic(kernel):
        return _print_value(w, kernel, tile, native)
    return print_quantized(w, kernel, _print_value(w, kernel, tile, torch.float32), form, quad_of(kernel) > 0)


def _print_value(w: Writer, kernel: Contract, tile: Tile, native: torch.dtype) -> str:
    """Print the value of the operand, in the dtype `native`."""
    body, value = main_body(kernel), spell(kernel.operand_value)
    match body:
        case (Load() as load,) if tile.buffers[load.buffer] == native and load.mask is None:
            head, parts, _ = load_text(load, tile, widen=False)
            w.line(call(head, [*parts, *([] if _even(kernel) else ["other=0.0"])]))
            return value
    w.lines(statements(body, tile))
    known = tile.values[kernel.operand_value]
    if "k" not in known.dims:
        w.line(f"{value} = tl.broadcast_to({value}, [BLOCK_M, {tile.dim('k').block}])")
    if not _even(kernel):
        w.line(f"{value} = tl.where(k_inside, {value}, 0.0)")
    text = narrowed(value, known.dtype, native)
    if text == value:
        return value
    w.line(f"operand = {text}")
    return "operand"


def _print_gemv(w: Writer, kernel: Contract, section: Section, inside: str, tile: Tile) -> None:
    """A step along the depth: the weights first, they have the longest way."""
    k = spell(str(kernel.depth.symbol))
    w.line(f"{k} = start + tl.arange(0, BLOCK_K)[None, :]")
    if not _even(kernel):
        w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
    parts = [f"{inside}[:, :, None]" if inside else "", "" if _even(kernel) else "k_inside[:, None, :]"]
    for a in section.accumulators:
        at = f"{spell(a.name)}_rows[:, :, None] + {_step(f'{k}[:, None, :]', a)}"
        load = [at, *_zero_masked(parts), 'eviction_policy="evict_first"']
        w.line(call(f"{spell(a.name)}_weight = tl.load", load))
    x = _print_operand(w, kernel, tile, torch.float32, "gemv")
    for a in section.accumulators:
        weight = _widened(f"{spell(a.name)}_weight", tile.buffers[a.weight.buffer])
        if a.weight.packing is not None:
            weight = print_scaled(w, a, weight, k, "gemv", parts)
        w.line(f"{spell(a.name)} += {x}[:, None, :] * {weight}")


def _print_dot(w: Writer, kernel: Contract, section: Section, inside: str, tile: Tile) -> None:
    """A step along the depth with tensor cores."""
    k = spell(str(kernel.depth.symbol))
    w.line("depth = start + tl.arange(0, BLOCK_K)")
    w.line(f"{k} = depth[None, :]")
    if not _even(kernel):
        w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
    native = dot_dtype(kernel, section)
    x = _print_operand(w, kernel, tile, native, "dot")
    tail = "" if _even(kernel) else f"(depth < {indexed(kernel.depth.size)})[:, None]"
    for a in section.accumulators:
        load = [f"{spell(a.name)}_rows + {_step('depth[:, None]', a)}", *_zero_masked([inside, tail])]
        w.line(call(f"{spell(a.name)}_weight = tl.load", load))
        weight = f"{spell(a.name)}_weight"
        if is_dynamic(kernel):
            print_products(w, kernel, spell(a.name), x)
            continue
        if a.weight.packing is None:
            weight = narrowed(weight, tile.buffers[a.weight.buffer], native)
        else:
            wide = _widened(weight, tile.buffers[a.weight.buffer])
            weight = narrowed(print_scaled(w, a, wide, "depth", "dot", [inside, tail]), torch.float32, native)
        w.line(f"{spell(a.name)} = prelude.dot({x}, {weight}, {spell(a.name)})")


def _widened(weight: str, dtype: torch.dtype) -> str:
    """Weights that were loaded as float32; a float8 is loaded as its bits."""
    return f"prelude.from_float8({weight})" if dtype == torch.float8_e4m3fn else narrowed(weight, dtype, torch.float32)


def dot_dtype(kernel: Contract, section: Section) -> torch.dtype:
    """The dtype that a section is multiplied in: a 16-bit one where operand and weights all have it."""
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    packed = packing_of(kernel) is not None  # then weights are made what the operand is
    found = {kernel.operand_dtype, *(dtypes[a.weight.buffer] for a in section.accumulators if not packed)}
    return found.pop() if len(found) == 1 and found < NARROW_FLOATS else torch.float32


def _step(k: str, a: Accumulator) -> str:
    return k if a.weight.k_stride == 1 else f"{k} * {indexed(a.weight.k_stride)}"


def _zero_masked(parts: Sequence[str]) -> list[str]:
    mask = " & ".join(p for p in parts if p)
    return [f"mask={mask}", "other=0.0"] if mask else []


# ---- the launcher -------------------------------------------------------------------------------------


def _print_extents(w: Writer, kernel: Contract) -> None:
    columns = sum((count(s.axes) * len(s.accumulators) for s in kernel.sections), sympy.Integer(0))
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    weights = {a.weight.buffer for s in kernel.sections for a in s.accumulators}
    fields = {
        "rows": kernel.rows.size,
        "columns": columns,
        "depth": _steps(kernel),
        "parts": sympy.Integer(max(len(s.accumulators) for s in kernel.sections)),
        "width": sympy.Integer(max(whole_axis(s) for s in kernel.sections)),
        "bytes": sympy.Integer(max(dtypes[name].itemsize for name in weights)),
        "experts": kernel.expert_count,
        "across": any(a.weight.k_stride != 1 for s in kernel.sections for a in s.accumulators),
    }
    if blocks_of(kernel) is not None:
        fields["together"] = sympy.Integer(columns_of_program(kernel))
    if words_of(kernel) is not None or blocks_of(kernel) is not None:
        fields["bytes"] = sympy.Integer(kernel.operand_dtype.itemsize)
    if quad_of(kernel):
        fields["quad"] = sympy.Integer(quad_of(kernel))
    if is_sparse(kernel) and is_coded(kernel):
        fields["operands"] = sympy.Integer(32)
    if is_halved(kernel):
        fields |= {"quads": sympy.Integer(4), "together": 64 / fields["parts"]}
    room = min(_room(s) for s in kernel.sections)
    if is_halved(kernel) and fields["parts"] > 1:
        room = min(room, ROOM // 16)  # what is spread out of two matrices takes the registers
    if room < ROOM:
        fields["room"] = sympy.Integer(room)
    extents_function(w, kernel.sizes, "Product", fields)


def _room(section: Section) -> int:
    """Results of a section for which a thread has registers: fewer where its epilogue holds much of each."""
    if whole_axis(section):
        return ROOM // 4
    long = any(isinstance(s, Compute) and s.op in LONG for s in section.epilogue)
    return ROOM // 2 if long else ROOM


def _print_launch(w: Writer, kernel: Contract, forms: Sequence[str]) -> None:
    config_functions(w, forms, f"shape.rows <= {GEMV_ROWS} * shape.experts")
    with launcher(w, LAUNCH):
        if any(count(s.axes).free_symbols for s in kernel.sections):
            unpack(w, [spell(str(s)) for s in kernel.sizes], "sizes")
        w.line('BLOCK_N = config["BLOCK_N"]')
        w.line(f"programs = {' + '.join(programs(s, 'BLOCK_N', host_text) for s in kernel.sections)}")
        if kernel.experts is not None:
            w.line("grid = (programs, shape.experts + 1)")
        elif kernel.rows.size == 1:
            w.line("grid = (programs,)")
        else:
            w.line('grid = (programs * triton.cdiv(shape.rows, config["BLOCK_M"]),)')
        name = spell(kernel.name)
        if len(forms) > 1:
            name = "kernel"
            w.line(f'kernel = {kernel.name}_gemv if config.form == "gemv" else {kernel.name}_dot')
        index = "INDEX=launches.index_type(buffers, shape.rows)"
        float8 = ["FLOAT8=launches.multiplies_float8(buffers[0].device)"] if _asks_for_float8(kernel) else []
        passed = [*arguments(kernel, _bodies(kernel)), index, *float8, "**config.options()"]
        w.line(call(f"return [{name}[grid]", passed, "]"))
