"""2:4 sparse weights in the Triton form of a Contract.

A row is masks, then words of 32 bits: the two bfloat16 that a group of four neighbours keeps, or the four codes of 8
bits that two such groups keep (llmcomp/pairs.py). Words are loaded as those of 4-bit codes are, BLOCK_K in a step, and
stand for HALF of the depth, 4 or 8 each. Of codes of 4 bits the low halves of bytes are like such codes of 8 bits, in
runs of 64 neighbours along k, and the high halves are the 64 neighbours behind each run.

few rows     the two of four operands that a word meets are chosen by the mask of its group: no weight is written out
more rows    a tile is spread out in registers, zeros between what is kept, for tl.dot: Triton has no sparse one
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llmcomp.codegen.kernel import Accumulator, Contract, Section
from llmcomp.codegen.triton_body import Writer, call, indexed, spell
from llmcomp.codegen.triton_packed import (
    RUN,
    STREAMED,
    columns_of_word,
    is_coded,
    is_halved,
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
    masks = [f"{inside}[:, :, None, None]" if inside else "", "" if even else f"(word < {words})[None, None]"]
    for a in section.accumulators:
        at = f"{spell(a.name)}_rows[:, :, None, None] + word[None, None]"
        w.line(call(f"{spell(a.name)}_words = tl.load", [at, *zero_masked(masks), STREAMED]))
    quads = [f"{inside}[:, :, None]" if inside else "", "" if even else f"(quad * 4 < {words})[None, None]"]
    with _halves(w, kernel):
        for a in section.accumulators:
            _load_kept(w, kernel, a, even, quads)
        _print_depths(w, kernel, even)
        _print_chosen_products(w, kernel, section, operand())


def _load_kept(w: Writer, kernel: Contract, a: Accumulator, even: bool, masks: list[str]) -> None:
    """The masks of every quad, and the scale of its codes."""
    quad = "(quad // 2 * 4 + half * 2 + quad % 2)" if is_halved(kernel) else "quad"
    bits = f"tl.int{4 * _together(kernel)}"
    at = f"{spell(a.name)}_masks.to(tl.pointer_type({bits}))[:, :, None] + {quad}[None, None]"
    w.line(call(f"{spell(a.name)}_kept = tl.load", [at, *zero_masked(masks)]))
    if (group := group_of(a)) > 0:
        first = f"quad // 2 * {2 * RUN} + half * {RUN} + quad % 2 * 32" if is_halved(kernel) else "quad * 32"
        w.line(f"first = {first}")
        tail = "" if even else f"(first < {indexed(kernel.depth.size)})[None, None]"
        load_scale(w, a, "[:, :, None]", f"(first // {group})[None, None]", [*masks[:1], tail])


def _print_chosen_products(w: Writer, kernel: Contract, section: Section, x: str) -> None:
    operands = ", ".join(f"x{i}" for i in range(_together(kernel)))
    w.line(f"{operands} = codes.{'eighths' if is_coded(kernel) else 'quarters'}({x})")
    for a in section.accumulators:
        name = spell(a.name)
        kept = [f"{name}_words", f"{name}_kept"]
        if not is_coded(kernel):
            w.line(call(f"{name} = codes.add_chosen", [name, *kept, operands]))
            continue
        if is_halved(kernel):
            w.line(call(f"{name}_part = codes.chosen_nibbles", [*kept, "half", _zero(a, "[:, :, :, None]"), operands]))
        else:
            w.line(call(f"{name}_part = codes.chosen_bytes", [*kept, operands]))
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
        w.line(call(f"{spell(a.name)}_words = tl.load", [f"{spell(a.name)}_rows + word", *zero_masked(masks)]))
    byte = f"word // 8 * {RUN // 4} + half * 8 + word % 8" if is_halved(kernel) else "word"
    with _halves(w, kernel):
        for a in section.accumulators:
            at = f"{spell(a.name)}_masks + {byte if is_coded(kernel) else 'word // 2'}"
            w.line(call(f"{spell(a.name)}_kept = tl.load", [at, *zero_masked(masks)]))
        _print_depths(w, kernel, even)
        x = operand()
        for a in section.accumulators:
            _print_spread(w, kernel, a, inside, even)
            print_dot(w, spell(a.name), x, f"{spell(a.name)}_weight", native)


def _print_spread(w: Writer, kernel: Contract, a: Accumulator, inside: str, even: bool) -> None:
    """The weights of a step, zeros between what is kept."""
    name = spell(a.name)
    kept = f"{name}_kept.to(tl.int32)"
    if is_halved(kernel):
        w.line(f"first = word // 8 * {2 * RUN} + half * {RUN} + word % 8 * 8")
        masks = [inside, "" if even else f"(first < {indexed(kernel.depth.size)})"]
        load_scale(w, a, "", f"first // {group_of(a)}", masks)
        arguments = [f"{name}_words", kept, "half", _zero(a), _scale(a)]
        w.line(call(f"{name}_weight = codes.spread_kept_nibbles", arguments))
    elif is_coded(kernel):
        w.line(f"{name}_weight = codes.spread_kept_bytes({name}_words, {kept})")
        _print_scaled(w, kernel, a, inside, even)
    else:
        w.line(f"{name}_weight = codes.spread_kept({name}_words, {kept} >> (word % 2 * 4))")


def _print_scaled(w: Writer, kernel: Contract, a: Accumulator, inside: str, even: bool) -> None:
    """Multiply numbers that are spread out by the scales of their groups."""
    if (group := group_of(a)) == 0:
        return
    w.line(f"first = start * 8 + tl.arange(0, HALF // {group})[:, None] * {group}")
    masks = [inside, "" if even else f"(first < {indexed(kernel.depth.size)})"]
    load_scale(w, a, "", f"first // {group}", masks)
    w.line(f"{spell(a.name)}_weight = codes.scaled({spell(a.name)}_weight, {_scale(a)}, 0.0, False)")


@contextmanager
def _halves(w: Writer, kernel: Contract) -> Iterator[None]:
    """What is written inside runs for both halves of bytes, where these are two codes."""
    if is_halved(kernel):
        with w.block("for half in tl.static_range(2)"):
            yield
    else:
        yield


def group_of(a: Accumulator) -> int:
    """Codes of a row that have one scale; 0 where all have, which the epilogue knows of."""
    return 0 if a.weight.packing is None else a.weight.packing.format.group


def _scale(a: Accumulator) -> str:
    assert a.weight.packing is not None
    return scale_text(a.weight.packing, f"{spell(a.name)}_scale")


def _zero(a: Accumulator, shape: str = "") -> str:
    """The code that stands for 0, a number or of every group."""
    assert a.weight.packing is not None
    return "8.0" if a.weight.packing.zero is None else f"{spell(a.name)}_zero.to(tl.float32){shape}"


def _together(kernel: Contract) -> int:
    """Neighbours along k that a word, or its codes in one half of the bytes, stand for."""
    return min(columns_of_word(kernel), 8)


def _print_depths(w: Writer, kernel: Contract, even: bool) -> None:
    k = spell(str(kernel.depth.symbol))
    if is_halved(kernel):
        w.line("run = start * 8 + tl.arange(0, HALF)")
        w.line(f"{k} = (run // {RUN} * {2 * RUN} + half * {RUN} + run % {RUN})[None, :]")
    else:
        w.line(f"{k} = (start * {columns_of_word(kernel)} + tl.arange(0, HALF))[None, :]")
    if not even:
        w.line(f"k_inside = {k} < {indexed(kernel.depth.size)}")
