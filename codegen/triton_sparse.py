"""2:4 sparse weights in the Triton form of a Contract.

A row is masks, then words of 32 bits: the two bfloat16 that a group of four neighbours keeps (llmcomp/pairs.py). Words
are loaded as those of 4-bit codes are, BLOCK_K in a step, which are HALF = 4 * BLOCK_K of the depth.

few rows     the two of four operands that a word meets are chosen by the mask of its group: no weight is written out
more rows    a tile is spread out in registers, zeros between what is kept, for tl.dot: Triton has no sparse one
"""

from collections.abc import Callable

import torch

from llmcomp.codegen.kernel import Contract, Section
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.codegen.triton_packed import STREAMED, print_dot, words_of, zero_masked

GROUP = 4
"""Columns of which a word holds two."""


def print_chosen(
    w: Writer, kernel: Contract, section: Section, inside: str, even: bool, operand: Callable[[], str]
) -> None:
    """A step of few rows; `operand()` prints the operand at `k` and returns its name.

    A thread has quads of words, so [M, N, QUADS, 4]; the masks of a quad are 16 bits.
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
        at = f"{name}_masks.to(tl.pointer_type(tl.int16))[:, :, None] + quad[None, None]"
        masks = [f"{inside}[:, :, None]" if inside else "", "" if even else f"(quad * 4 < {words})[None, None]"]
        w.line(call(f"{name}_kept = tl.load", [at, *zero_masked(masks)]))
    _print_depths(w, kernel, even)
    w.line(f"x0, x1, x2, x3 = codes.quarters({operand()})")
    for a in section.accumulators:
        name = spell(a.name)
        arguments = [name, f"{name}_words", f"{name}_kept", "x0", "x1", "x2", "x3"]
        w.line(call(f"{name} = codes.add_chosen", arguments))


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
        w.line(call(f"{name}_kept = tl.load", [f"{name}_masks + word // 2", *zero_masked(masks)]))
    _print_depths(w, kernel, even)
    x = operand()
    for a in section.accumulators:
        name = spell(a.name)
        w.line(f"{name}_weight = codes.spread_kept({name}_words, {name}_kept.to(tl.int32) >> (word % 2 * 4))")
        print_dot(w, name, x, f"{name}_weight", native)


def _print_depths(w: Writer, kernel: Contract, even: bool) -> None:
    k = spell(str(kernel.depth.symbol))
    w.line(f"{k} = (start * {GROUP} + tl.arange(0, HALF))[None, :]")
    if not even:
        w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
