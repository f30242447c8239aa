"""Quantized weights in the Triton form of a Contract.

codes of 8 bits   loaded like dense weights, then made float; scales of groups are loaded beside them
codes of 4 bits   loaded as 32-bit words: BLOCK_K counts words, each is unpacked in eight steps, and step i of
                  word w is the code k = w // 16 * 128 + i % 2 * 64 + w % 16 * 4 + i // 2 (llmcomp/nibbles.py)
"""

from collections.abc import Callable, Sequence

import sympy
import torch

from llmcomp.codegen.kernel import Accumulator, Contract, Packing, Section, packing_of
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.formats import Int4, Mxfp4, Nf4
from llmcomp.nibbles import BLOCK

WORD = 8
"""Codes of 4 bits in a word."""


def words_of(kernel: Contract) -> sympy.Expr | None:
    """The words of a weight row, where they are of 4-bit codes."""
    packing = packing_of(kernel)
    if packing is None or packing.format.bits == 8:
        return None
    return sympy.expand(kernel.sections[0].accumulators[0].weight.row_stride / 4)


def zero_masked(parts: Sequence[str]) -> list[str]:
    """The mask of a load that gives zeros outside."""
    mask = " & ".join(p for p in parts if p)
    return [f"mask={mask}", "other=0"] if mask else []


def print_rows(w: Writer, kernel: Contract, section: Section) -> None:
    """The rows of the weights of a program, by which scales are found; words start at `_rows`, as addresses."""
    for a in section.accumulators:
        packing, name = a.weight.packing, spell(a.name)
        assert packing is not None
        if packing.scale is not None:
            w.line(f"{name}_scale_rows = {spell(packing.scale)} + ({indexed(a.row)}) * {indexed(packing.groups)}")
        if packing.zero is not None:
            w.line(f"{name}_zero_rows = {spell(packing.zero)} + ({indexed(a.row)}) * {indexed(packing.groups)}")
        if packing.format.bits == 4:
            w.line(f"{name}_rows = {name}_rows.to(tl.pointer_type(tl.int32))")


def print_words(
    w: Writer,
    kernel: Contract,
    section: Section,
    form: str,
    inside: str,
    even: bool,
    native: torch.dtype,
    operand: Callable[[], str],
) -> None:
    """A step of BLOCK_K words: `operand()` prints the operand at `k` and returns its name."""
    k, words = spell(str(kernel.depth.symbol)), words_of(kernel)
    assert words is not None
    w.line("word = start + tl.arange(0, BLOCK_K)")
    lane, column = _shapes(form)
    masks = [f"{inside}{column}" if inside else "", "" if even else f"(word < {indexed(words)}){lane}"]
    for a in section.accumulators:
        head = f"{spell(a.name)}_words = tl.load"
        w.line(call(head, [f"{spell(a.name)}_rows{column} + word{lane}", *zero_masked(masks)]))
    with w.block(f"for part in tl.static_range({WORD})"):
        w.line(f"depth = word // 16 * {BLOCK} + part % 2 * {BLOCK // 2} + word % 16 * 4 + part // 2")
        w.line(f"{k} = depth[None, :]")
        masks = [masks[0]]
        if not even:
            w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
            masks.append(f"(depth < {indexed(kernel.depth.size)}){lane}")
        x = operand()
        for a in section.accumulators:
            name = spell(a.name)
            value = _value(w, a, f"{name}_words >> 4 * part & 15", form, masks)
            _print_product(w, name, x, value, form, native)


def _shapes(form: str) -> tuple[str, str]:
    """How the depth and the columns are indexed in a tile of weights: [1, N, K] for gemv, [K, N] for dot."""
    return ("[None, None, :]", "[:, :, None]") if form == "gemv" else ("[:, None]", "")


def _print_product(w: Writer, name: str, x: str, value: str, form: str, native: torch.dtype) -> None:
    if form == "gemv":
        w.line(f"{name} += {x}[:, None, :] * {value}")
        return
    narrow = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
    weight = f"prelude.narrow({value}, {narrow[native]})" if native in narrow else value
    w.line(f"{name} = prelude.dot({x}, {weight}, {name})")


def _value(w: Writer, a: Accumulator, code: str, form: str, masks: Sequence[str]) -> str:
    """Print what the codes of a tile stand for, in float32; the name of the result."""
    packing, name = a.weight.packing, spell(a.name)
    assert packing is not None
    kind = packing.format
    table = {Int4: "({}).to(tl.float32)", Nf4: "prelude.nf4({})", Mxfp4: "prelude.e2m1({})"}[type(kind)]
    lane, column = _shapes(form)
    at = f"(depth // {kind.group}){lane}"
    value = table.format(code)
    if isinstance(kind, Int4):
        shift = "8.0"
        if packing.zero is not None:
            w.line(call(f"{name}_zero = tl.load", [f"{name}_zero_rows{column} + {at}", *zero_masked(masks)]))
            shift = f"{name}_zero.to(tl.float32)"
        value = f"({value} - {shift})"
    w.line(call(f"{name}_scale = tl.load", [f"{name}_scale_rows{column} + {at}", *zero_masked(masks)]))
    w.line(f"{name}_weight = {value} * {_scale(packing, f'{name}_scale')}")
    return f"{name}_weight"


def _scale(packing: Packing, name: str) -> str:
    return f"prelude.power_of_two({name})" if isinstance(packing.format, Mxfp4) else f"{name}.to(tl.float32)"


def print_scaled(w: Writer, a: Accumulator, weight: str, k: str, form: str, masks: Sequence[str]) -> str:
    """Print codes of 8 bits times the scales of their groups; the name of the result. `k` is [1, K], [K] for dot."""
    packing, name = a.weight.packing, spell(a.name)
    assert packing is not None
    if packing.scale is None:
        return weight
    lane, column = "[:, None, :]" if form == "gemv" else "[:, None]", _shapes(form)[1]
    at = f"{name}_scale_rows{column} + ({k} // {packing.format.group}){lane}"
    w.line(call(f"{name}_scale = tl.load", [at, *zero_masked(masks)]))
    w.line(f"{name}_scaled = {weight} * {_scale(packing, f'{name}_scale')}")
    return f"{name}_scaled"
