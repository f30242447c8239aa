"""Weights whose zeros come in blocks (llmcomp/blocks.py), in the Triton form of a Contract.

A program walks the list of the row of blocks that its columns belong to, BLOCK_K of the numbers that are kept at a
time: the weights of those are neighbours in memory, the operand is gathered by runs of the width of a block. Both forms
are what they are for dense weights otherwise. Accumulators have lists of their own, so each has a loop of its own.

Where columns of a program belong to several lists (a norm within a head owns a whole one), it walks one after another
with the other columns masked.
"""

from collections.abc import Callable
from math import gcd

import sympy
import torch

from llmcomp.blocks import RUN, Blocks
from llmcomp.codegen.kernel import Accumulator, Contract, Section, packing_of
from llmcomp.codegen.triton_body import Dim, Writer, call, indexed, narrowed, spell
from llmcomp.codegen.triton_expr import DTYPES
from llmcomp.codegen.triton_packed import STREAMED

MOST = 128
FEWEST = 16
"""Columns that a tile of tensor cores takes."""


def blocks_of(kernel: Contract) -> Blocks | None:
    """The blocks that weights are stored in, if they are."""
    packing = packing_of(kernel)
    form = None if packing is None else packing.format
    return form if isinstance(form, Blocks) else None


def listed_together(kernel: Contract) -> int:
    """Neighbouring columns, a power of two up to 128 of them, that always have one list."""
    form = blocks_of(kernel)
    found = MOST if form is None else form.height
    for section in kernel.sections if form is not None else ():
        if len(section.axes) > 1:
            found = gcd(found, _whole(section.axes[-1].size))
        for a in section.accumulators:
            found = gcd(found, _alignment(section, a))
    return found & -found


def _alignment(section: Section, a: Accumulator) -> int:
    """What divides the weight rows at which runs of columns begin."""
    last = section.axes[-1].symbol
    if sympy.expand(a.row.coeff(last) - 1) != 0:
        return 1
    terms = sympy.expand(a.row - last).as_coefficients_dict()
    return gcd(*(_whole(factor) if term.is_Symbol or term == 1 else 1 for term, factor in terms.items()))


def _whole(size: sympy.Expr) -> int:
    return int(size) if size.is_Integer else 1


def columns_of_program(kernel: Contract) -> int:
    """The most columns that a program should own."""
    found = listed_together(kernel)
    return MOST if found < FEWEST else found


def print_block_products(
    w: Writer,
    kernel: Contract,
    section: Section,
    form: str,
    columns: Dim,
    native: torch.dtype,
    operand: Callable[[], str],
) -> None:
    """The loops of a program over its lists; `operand()` prints the operand at `k` and returns its name."""
    found, whole = listed_together(kernel), columns.block.isdigit()
    one = found >= (int(columns.block) if whole else FEWEST)
    if not one:
        w.line(f"TOGETHER: tl.constexpr = min({found}, {columns.block})")
        w.line(f"part_of = tl.arange(0, {columns.block})[None, :] // TOGETHER")
    for a in section.accumulators:
        _print_starts(w, kernel, a, columns.inside)
        if one:
            _print_walk(w, kernel, a, form, columns.inside, native, operand)
            continue
        with w.block(f"for part in range(0, {columns.block} // TOGETHER)"):
            inside = f"{columns.inside} & " if columns.inside else ""
            w.line(f"part_inside = {inside}(part_of == part)")
            _print_walk(w, kernel, a, form, "part_inside", native, operand)


def _print_starts(w: Writer, kernel: Contract, a: Accumulator, inside: str) -> None:
    """Where the list and the numbers of every column begin, from the table."""
    name, buffer = spell(a.name), spell(a.weight.buffer)
    at = indexed(sympy.expand(a.weight.offset + a.row * a.weight.row_stride))
    mask = [f"mask={inside}", "other=0"] if inside else []
    w.line(f"{name}_at = {at}")
    w.line(f"{name}_entry = {buffer}.to(tl.pointer_type(tl.int64)) + {name}_at // 8")
    w.line(call(f"{name}_lists = {name}_at + tl.load", [f"{name}_entry", *mask]))
    w.line(call(f"{name}_numbers = {name}_at + tl.load", [f"{name}_entry + 1", *mask]))
    bytes = kernel.operand_dtype.itemsize
    w.line(f"{name}_numbers = tl.multiple_of({name}_numbers // {bytes}, ({RUN}, {RUN}))")


def _print_walk(
    w: Writer,
    kernel: Contract,
    a: Accumulator,
    form: str,
    inside: str,
    native: torch.dtype,
    operand: Callable[[], str],
) -> None:
    """One list, for the columns that are `inside`."""
    name, buffer, blocks = spell(a.name), spell(a.weight.buffer), blocks_of(kernel)
    assert blocks is not None
    width, k, depth = blocks.width, spell(str(kernel.depth.symbol)), kernel.depth.size
    lists = f"tl.where({inside}, {name}_lists, 0)" if inside else f"{name}_lists"
    w.line(f"first = tl.max(tl.max({lists}, axis=1), axis=0)")
    w.line(f"list = {buffer}.to(tl.pointer_type(tl.int16)) + first // 2")
    w.line(f"total = tl.load(list, mask=first > 0, other=0).to(tl.int32) * {width}")
    with w.block("for start in range(0, total, BLOCK_K)"):
        w.line("kept = start + tl.arange(0, BLOCK_K)")
        w.line(f"{k} = tl.load(list + 1 + kept // {width}, mask=kept < total, other=0).to(tl.int32) * {width}")
        w.line(f"{k} = ({k} + kept % {width})[None, :]")
        w.line(f"{k} = tl.max_contiguous(tl.multiple_of({k}, (1, {width})), (1, {width}))")
        w.line("k_inside = (kept < total)[None, :]")
        if not (depth.is_Integer and int(depth) % width == 0):
            w.line(f"k_inside = k_inside & ({k} < {indexed(depth)})")
        (_print_gemv if form == "gemv" else _print_dot)(w, kernel, name, buffer, inside, native, operand)


def _print_gemv(
    w: Writer, kernel: Contract, name: str, buffer: str, inside: str, native: torch.dtype, operand: Callable[[], str]
) -> None:
    mask = " & ".join(filter(None, [f"{inside}[:, :, None]" if inside else "", "(kept < total)[None, None, :]"]))
    at = f"{_numbers(kernel, buffer)} + {name}_numbers[:, :, None] + kept[None, None, :]"
    w.line(call(f"{name}_weight = tl.load", [at, f"mask={mask}", "other=0.0", STREAMED]))
    x = operand()
    weight = narrowed(f"{name}_weight", kernel.operand_dtype, torch.float32)
    w.line(f"{name} += {x}[:, None, :] * {weight}")


def _print_dot(
    w: Writer, kernel: Contract, name: str, buffer: str, inside: str, native: torch.dtype, operand: Callable[[], str]
) -> None:
    mask = " & ".join(filter(None, [inside, "(kept < total)[:, None]"]))
    at = f"{_numbers(kernel, buffer)} + {name}_numbers + kept[:, None]"
    w.line(call(f"{name}_weight = tl.load", [at, f"mask={mask}", "other=0.0"]))
    x = operand()
    w.line(f"{name} = prelude.dot({x}, {narrowed(f'{name}_weight', kernel.operand_dtype, native)}, {name})")


def _numbers(kernel: Contract, buffer: str) -> str:
    return f"{buffer}.to(tl.pointer_type({DTYPES[kernel.operand_dtype]}))"
