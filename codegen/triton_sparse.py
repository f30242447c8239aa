"""2:4 sparse weights in the Triton form of a Contract.

A row is masks, then words of 32 bits: the two bfloat16 that a group of four neighbours keeps, or the four codes of 8
bits that two such groups keep (llmcomp/pairs.py). Words are loaded as those of 4-bit codes are, BLOCK_K in a step, and
stand for HALF of the depth, 4 or 8 each.

few rows     the two of four operands that a word meets are chosen by the mask of its group: no weight is written out
more rows    a tile is spread out in registers, zeros between what is kept, for tl.dot: Triton has no sparse one
"""

from collections.abc import Callable

import torch

from llmcomp.codegen.kernel import Accumulator, Contract, Section
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.codegen.triton_packed import (
    STREAMED,
    columns_of_word,
    is_coded,
    load_scale,
    print_dot,
    scale_text,
    words_of,
    zero_masked,
)


def print_chosen(
    w: Writer, kernel: Contract, section: Section, inside: str, even: bool, operand: Callable[[], str]
) -> None:
    """A step of few rows; `operand()` prints the operand at `k` and returns its name.

    A thread has quads of words, so [M, N, QUADS, 4]; the masks of a quad are 16 or 32 bits.
    """
    words = indexed(words_of(kernel) or 0)
    w.line("quad = start // 4 + tl.arange(0, QUADS)")
    w.line("word = quad[:, None] * 4 + tl.arange(0, 4)[None, :]")
    column = f"{inside}[:, :, None, None]" if inside else ""
    for a in section.accumulators:
        name = spell(a.name)
        at = f"{name}_rows[:, :, None, None] + word[None, None]"
        masks = [column, "" if even else f"(word < {words})[None, None]"]
        w.line(call(f"{name}_words = tl.load", [at, *zero_masked(masks), STREAMED]))
        bits = f"tl.int{4 * columns_of_word(kernel)}"
        at = f"{name}_masks.to(tl.pointer_type({bits}))[:, :, None] + quad[None, None]"
        quads = [f"{inside}[:, :, None]" if inside else "", "" if even else f"(quad * 4 < {words})[None, None]"]
        w.line(call(f"{name}_kept = tl.load", [at, *zero_masked(quads)]))
        if (group := group_of(a)) > 0:
            load_scale(w, a, "[:, :, None]", f"(quad * 32 // {group})[None, None]", quads)
    _print_depths(w, kernel, even)
    operands = ", ".join(f"x{i}" for i in range(columns_of_word(kernel)))
    w.line(f"{operands} = codes.{'eighths' if is_coded(kernel) else 'quarters'}({operand()})")
    for a in section.accumulators:
        name = spell(a.name)
        if not is_coded(kernel):
            w.line(call(f"{name} = codes.add_chosen", [name, f"{name}_words", f"{name}_kept", operands]))
            continue
        w.line(call(f"{name}_part = codes.chosen_bytes", [f"{name}_words", f"{name}_kept", operands]))
        w.line(f"{name} += {name}_part" + (f" * {_scale(a)}" if group_of(a) else ""))


def print_spread_dot(
    w: Writer,
    kernel: Contract,
    section: Section,
    inside: str,
    even: bool,
    native: torch.dtype,
    operand: Callable[[], str],
) -> None:
    """A step of BLOCK_K words on tensor cores."""
    words = indexed(words_of(kernel) or 0)
    w.line("word = start + tl.arange(0, BLOCK_K)[:, None]")
    masks = [inside, "" if even else f"(word < {words})"]
    for a in section.accumulators:
        name = spell(a.name)
        w.line(call(f"{name}_words = tl.load", [f"{name}_rows + word", *zero_masked(masks)]))
        byte = "word" if is_coded(kernel) else "word // 2"
        w.line(call(f"{name}_kept = tl.load", [f"{name}_masks + {byte}", *zero_masked(masks)]))
    _print_depths(w, kernel, even)
    x = operand()
    for a in section.accumulators:
        name = spell(a.name)
        if is_coded(kernel):
            w.line(f"{name}_weight = codes.spread_kept_bytes({name}_words, {name}_kept.to(tl.int32))")
            _print_scaled(w, kernel, a, inside, even)
        else:
            w.line(f"{name}_weight = codes.spread_kept({name}_words, {name}_kept.to(tl.int32) >> (word % 2 * 4))")
        print_dot(w, name, x, f"{name}_weight", native)


def _print_scaled(w: Writer, kernel: Contract, a: Accumulator, inside: str, even: bool) -> None:
    """Multiply numbers that are spread out by the scales of their groups."""
    if (group := group_of(a)) == 0:
        return
    w.line(f"first = start * 8 + tl.arange(0, HALF // {group})[:, None] * {group}")
    masks = [inside, "" if even else f"(first < {indexed(kernel.depth.size)})"]
    load_scale(w, a, "", f"first // {group}", masks)
    w.line(f"{spell(a.name)}_weight = codes.scaled({spell(a.name)}_weight, {_scale(a)}, 0.0, False)")


def group_of(a: Accumulator) -> int:
    """Codes of a row that have one scale; 0 where all have, which the epilogue knows of."""
    return 0 if a.weight.packing is None else a.weight.packing.format.group


def _scale(a: Accumulator) -> str:
    assert a.weight.packing is not None
    return scale_text(a.weight.packing, f"{spell(a.name)}_scale")


def _print_depths(w: Writer, kernel: Contract, even: bool) -> None:
    k = spell(str(kernel.depth.symbol))
    w.line(f"{k} = (start * {columns_of_word(kernel)} + tl.arange(0, HALF))[None, :]")
    if not even:
        w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
