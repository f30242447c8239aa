"""Quantized weights in the Triton form of a Contract.

codes of 8 bits   loaded like dense weights, then made float; scales of groups are loaded beside them
codes of 4 bits   loaded as 32-bit words, BLOCK_K of them in a step. llmcomp/codes.py lays a row out so that the low
                  halves of the bytes of a step are HALF = 4 * BLOCK_K codes, in runs of 64 neighbours along k, and the
                  high halves are the 64 neighbours behind each run: the operand is loaded once for each half
"""

from collections.abc import Callable, Sequence

import sympy
import torch

from llmcomp.blocks import Blocks
from llmcomp.codegen.kernel import MATRIX, Accumulator, Contract, Packing, Section, packing_of
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.codegen.triton_dynamic import sums_integers
from llmcomp.formats import Fp8, Int4, Int8, Mxfp4, Nf4
from llmcomp.nibbles import BLOCK
from llmcomp.two_four import TwoFour

STREAMED = 'eviction_policy="evict_first"'
RUN = BLOCK // 2
"""Codes that are neighbours along k in one half of neighbouring bytes."""


def words_of(kernel: Contract) -> sympy.Expr | None:
    """The words of a weight row, where they are of 4-bit codes, or of what a 2:4 sparse matrix keeps."""
    packing = packing_of(kernel)
    row = kernel.sections[0].accumulators[0].weight.row_stride
    if packing is None or packing.format.bits == 8 and not is_sparse(kernel):
        return None
    return sympy.expand((row - masks_of(kernel)) / 4)


def is_sparse(kernel: Contract) -> bool:
    """Whether weights are 2:4 sparse, and stored without zeros."""
    packing = packing_of(kernel)
    return packing is not None and (packing.format.two_four or isinstance(packing.format, TwoFour))


def is_coded(kernel: Contract) -> bool:
    """Whether weights are codes of a format, and no numbers."""
    packing = packing_of(kernel)
    return packing is not None and not isinstance(packing.format, TwoFour | Blocks)


def is_halved(kernel: Contract) -> bool:
    """Whether what 2:4 sparse weights keep are codes of 4 bits, two of which share a byte."""
    packing = packing_of(kernel)
    return packing is not None and packing.format.two_four and packing.format.bits == 4


def masks_of(kernel: Contract) -> sympy.Expr:
    """The bytes of the masks of a weight row, of those 2:4 sparse: a bit for every column."""
    packing = packing_of(kernel)
    row = kernel.sections[0].accumulators[0].weight.row_stride
    if packing is None or not is_sparse(kernel):
        return sympy.Integer(0)
    return row / (3 if is_halved(kernel) else 5 if is_coded(kernel) else 9)


def columns_of_word(kernel: Contract) -> int:
    """Columns that a word stands for: neighbours along k, or two runs of 8 that are."""
    return 16 if is_halved(kernel) else 8 if is_coded(kernel) else 4


def quad_of(kernel: Contract) -> int:
    """What 16 bytes of a weight row hold of what BLOCK_K counts, where the gemv form loads codes as quads; or 0."""
    if words_of(kernel) is not None:
        return 4
    packing = packing_of(kernel)
    if packing is None or isinstance(packing.format, Blocks):
        return 0
    strides = {a.weight.row_stride for s in kernel.sections for a in s.accumulators}
    aligned = all(n.is_Integer and int(n) % 16 == 0 for n in strides)
    return 16 if aligned else 0


def zero_masked(parts: Sequence[str]) -> list[str]:
    """The mask of a load that gives zeros outside."""
    mask = " & ".join(p for p in parts if p)
    return [f"mask={mask}", "other=0"] if mask else []


def print_sizes(w: Writer, kernel: Contract, form: str) -> None:
    """What follows from BLOCK_K, where it counts words, or codes that are loaded as quads."""
    if words_of(kernel) is not None:
        w.line(f"HALF: tl.constexpr = BLOCK_K * {8 if is_sparse(kernel) and is_coded(kernel) else 4}")
    if form == "gemv" and quad_of(kernel):
        w.line(f"QUADS: tl.constexpr = BLOCK_K // {quad_of(kernel)}")


def print_rows(w: Writer, kernel: Contract, section: Section, words: bool, masks: sympy.Expr) -> None:
    """The rows of the weights of a program, by which scales are found; `words` start at `_rows`, as addresses, behind
    bytes of `masks` where there are some.
    """
    for a in section.accumulators:
        packing, name = _packing(a), spell(a.name)
        for part, buffer in (("scale", packing.scale), ("zero", packing.zero)):
            if buffer is not None:
                row = indexed(a.row)
                if kernel.experts is not None:
                    row += f" + {MATRIX} * {indexed(a.weight.expert_stride / a.weight.row_stride)}"
                w.line(f"{name}_{part}_rows = {spell(buffer)} + ({row}) * {indexed(packing.groups)}")
        if masks != 0:
            w.line(f"{name}_masks = {name}_rows")
            w.line(f"{name}_rows = {name}_rows + {indexed(masks)}")
        if words:
            w.line(f"{name}_rows = {name}_rows.to(tl.pointer_type(tl.int32))")


def _packing(a: Accumulator) -> Packing:
    assert a.weight.packing is not None
    return a.weight.packing


def _print_half(w: Writer, kernel: Contract, even: bool) -> None:
    """The depths of the codes of a half."""
    k = spell(str(kernel.depth.symbol))
    w.line("run = start * 4 + tl.arange(0, HALF)")
    w.line(f"{k} = (run // {RUN} * {BLOCK} + half * {RUN} + run % {RUN})[None, :]")
    if not even:
        w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")


# ---- few rows -------------------------------------------------------------------------------------------


def print_quads(
    w: Writer, kernel: Contract, section: Section, block: str, inside: str, even: bool, operand: Callable[[], str]
) -> None:
    """A step for `block` columns; `operand()` prints the operand at `k` and returns its name.

    A thread has whole quads of words, so [M, N, QUADS, 4]: the 16 bytes, or the 16 codes of a half, have one scale.
    Their products are added up as they are, then shifted by what the operands add up to, and scaled.
    """
    first, *_ = section.accumulators
    _load_quads(w, kernel, section, inside, even)
    both = words_of(kernel) is None or _packing(first).format.group == BLOCK  # a quad has one scale
    if both:
        _start_sums(w, kernel, section, block)
    if words_of(kernel) is None:
        k = spell(str(kernel.depth.symbol))
        w.line(f"{k} = start + tl.arange(0, BLOCK_K)[None, :]")
        if not even:
            w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
        _add_products(w, kernel, section, operand)
    else:
        with w.block("for half in tl.static_range(2)"):
            if not both:
                _start_sums(w, kernel, section, block)
            _print_half(w, kernel, even)
            _add_products(w, kernel, section, operand)
            if not both:
                _add_scaled(w, kernel, section, inside, even, f"quad // 4 * {BLOCK} + half * {RUN} + quad % 4 * 16")
    if both:
        step = "quad * 16" if words_of(kernel) is None else f"quad // 4 * {BLOCK}"
        _add_scaled(w, kernel, section, inside, even, step)


def _load_quads(w: Writer, kernel: Contract, section: Section, inside: str, even: bool) -> None:
    w.line(f"quad = start // {quad_of(kernel)} + tl.arange(0, QUADS)")
    w.line("word = quad[:, None] * 4 + tl.arange(0, 4)[None, :]")
    tail = "" if even else f"(word < {indexed(section.accumulators[0].weight.row_stride / 4)})[None, None]"
    masks = [f"{inside}[:, :, None, None]" if inside else "", tail]
    for a in section.accumulators:
        at = f"{spell(a.name)}_rows[:, :, None, None] + word[None, None]"
        w.line(call(f"{spell(a.name)}_words = tl.load", [at, *zero_masked(masks), STREAMED]))


def _start_sums(w: Writer, kernel: Contract, section: Section, block: str) -> None:
    if _shift(kernel, section.accumulators[0]):
        w.line("sums = tl.zeros([BLOCK_M, 1, QUADS], tl.float32)")
    for a in section.accumulators:
        dtype = "tl.int32" if sums_integers(kernel) else "tl.float32"
        w.line(f"{spell(a.name)}_part = tl.zeros([BLOCK_M, {block}, QUADS, 4], {dtype})")


def _add_products(w: Writer, kernel: Contract, section: Section, operand: Callable[[], str]) -> None:
    w.line(f"x0, x1, x2, x3 = codes.quarters({operand()})")
    if _shift(kernel, section.accumulators[0]):
        w.line("sums = codes.add_sums(sums, x0, x1, x2, x3)")
    half = [] if words_of(kernel) is None else ["half"]
    for a in section.accumulators:
        part = f"{spell(a.name)}_part"
        arguments = [part, f"{spell(a.name)}_words", "x0", "x1", "x2", "x3", *half]
        w.line(call(f"{part} = codes.{_adder(kernel, a)}", arguments))


def _add_scaled(w: Writer, kernel: Contract, section: Section, inside: str, even: bool, first: str) -> None:
    """Add what the sections of a step come to; the codes of a quad begin at depth `first`."""
    group = _packing(section.accumulators[0]).format.group
    masks = [f"{inside}[:, :, None]" if inside else ""]
    if group:
        w.line(f"first = {first}")
        masks.append("" if even else f"(first < {indexed(kernel.depth.size)})[None, None, :]")
    for a in section.accumulators:
        name, shift = spell(a.name), _shift(kernel, a)
        if group:
            load_scale(w, a, "[:, :, None]", f"(first // {group})[None, None, :]", masks)
        part = f"tl.sum({name}_part, axis=3)"
        part = f"({part} - sums * {shift})" if shift else part
        w.line(f"{name} += {part} * {scale_text(_packing(a), f'{name}_scale')}" if group else f"{name} += {part}")


def load_scale(w: Writer, a: Accumulator, column: str, at: str, masks: Sequence[str]) -> None:
    name, packing = spell(a.name), _packing(a)
    w.line(call(f"{name}_scale = tl.load", [f"{name}_scale_rows{column} + {at}", *zero_masked(masks)]))
    if packing.zero is not None:
        w.line(call(f"{name}_zero = tl.load", [f"{name}_zero_rows{column} + {at}", *zero_masked(masks)]))


def _adder(kernel: Contract, a: Accumulator) -> str:
    exact = kernel.operand_dtype == torch.float32
    nf4 = "add_exact_nf4" if exact else "add_nf4"
    if sums_integers(kernel):
        return "add_dot4"
    kinds = {Int8: "add_bytes", Fp8: "add_float8", Int4: "add_integers", Mxfp4: "add_e2m1", Nf4: nf4}
    return kinds[type(_packing(a).format)]


def _shift(kernel: Contract, a: Accumulator) -> str:
    """What is subtracted from the codes of an accumulator; "" where it is nothing."""
    if _packing(a).zero is not None:
        return f"{spell(a.name)}_zero.to(tl.float32)"
    shifts = {"add_integers": "8.0", "add_nf4": "codes.NF4_ZERO"}
    return shifts.get(_adder(kernel, a), "")


def gemv_total(kernel: Contract, a: Accumulator) -> str:
    """The products of an accumulator [M, N, QUADS], added up, as numbers."""
    if sums_integers(kernel) or is_halved(kernel):
        return f"tl.sum({spell(a.name)}, axis=2)"
    step = " * codes.NF4_STEP" if _adder(kernel, a) == "add_nf4" else ""
    return f"tl.sum({spell(a.name)}, axis=2) * (codes.UNIT{step})"


# ---- more rows ------------------------------------------------------------------------------------------


def print_codes_dot(
    w: Writer,
    kernel: Contract,
    section: Section,
    inside: str,
    even: bool,
    native: torch.dtype,
    operand: Callable[[], str],
) -> None:
    """A step of BLOCK_K words on tensor cores: for each half, they are spread out to [HALF, N] weights."""
    words = words_of(kernel)
    assert words is not None
    w.line("word = start + tl.arange(0, BLOCK_K)[:, None]")
    masks = [inside, "" if even else f"(word < {indexed(words)})"]
    for a in section.accumulators:
        w.line(call(f"{spell(a.name)}_words = tl.load", [f"{spell(a.name)}_rows + word", *zero_masked(masks)]))
    group = _packing(section.accumulators[0]).format.group
    same = min(group, RUN)  # neighbours that have the same scale
    with w.block("for half in tl.static_range(2)"):
        _print_half(w, kernel, even)
        x = operand()
        w.line(f"first = start * 4 + tl.arange(0, HALF // {same})[:, None] * {same}")
        w.line(f"first = first // {RUN} * {BLOCK} + half * {RUN} + first % {RUN}")
        masks = [inside, "" if even else f"(first < {indexed(kernel.depth.size)})"]
        for a in section.accumulators:
            name = spell(a.name)
            load_scale(w, a, "", f"first // {group}", masks)
            function = _adder(kernel, a).replace("add_", "spread_")
            arguments = [f"{name}_words", "half", _shift(kernel, a) or "0.0", scale_text(_packing(a), f"{name}_scale")]
            w.line(call(f"{name}_weight = codes.{function}", arguments))
            print_dot(w, name, x, f"{name}_weight", native)


def print_dot(w: Writer, name: str, x: str, weight: str, native: torch.dtype) -> None:
    """The products of a tile with weights in float32, in the dtype `native`."""
    narrow = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
    weight = f"prelude.narrow({weight}, {narrow[native]})" if native in narrow else weight
    w.line(f"{name} = prelude.dot({x}, {weight}, {name})")


def scale_text(packing: Packing, name: str) -> str:
    return f"prelude.power_of_two({name})" if isinstance(packing.format, Mxfp4) else f"{name}.to(tl.float32)"


# ---- codes of 8 bits ------------------------------------------------------------------------------------


def print_scaled(w: Writer, a: Accumulator, weight: str, k: str, form: str, masks: Sequence[str]) -> str:
    """Print codes of 8 bits times the scales of their groups; the name of the result. `k` is [1, K], [K] for dot."""
    packing, name = _packing(a), spell(a.name)
    if packing.scale is None:
        return weight
    lane, column = ("[:, None, :]", "[:, :, None]") if form == "gemv" else ("[:, None]", "")
    at = f"{name}_scale_rows{column} + ({k} // {packing.format.group}){lane}"
    w.line(call(f"{name}_scale = tl.load", [at, *zero_masked(masks)]))
    w.line(f"{name}_scaled = {weight} * {scale_text(packing, f'{name}_scale')}")
    return f"{name}_scaled"
