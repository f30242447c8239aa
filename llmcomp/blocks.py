"""Matrices whose zeros come in blocks, as kernels read them: the blocks that hold something, and a list of where.

A matrix (N, K) is cut into blocks of `height` rows and `width` columns. Rows of blocks have a list of the columns of
blocks that are kept, counted in blocks. What is kept of a row of the matrix lies in one run, so that of a row of blocks
is a small dense matrix.

    16 (N + 1) bytes    for every row: how far from here its list and its numbers begin; and where those of all end
    lists               int16: how many, then which; to a multiple of 64 bytes
    the rest            numbers, row after row, in multiples of 32; behind them 64 bytes that may be read

How much room there is for lists and numbers is fixed when a graph is compiled.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.formats import Format
from llmcomp.ops import wide_linear
from llmcomp.pairs import NotSparse

ENTRY = 16  # bytes of the table for a row
BEHIND = 64
RUN = 32  # numbers of which what is kept of a row is a multiple
HEIGHTS = (1, 8, 16, 32, 64)
WIDTHS = (16, 32, 64)
PAGE, SLACK = 4096, 50


@dataclass(frozen=True)
class Blocks(Format):
    """How a Contract says that its weights are stored so."""

    stem: ClassVar[str] = "blocks"
    height: int = 32
    width: int = 32


def kept(weight: Tensor, height: int, width: int) -> Tensor:
    """Which blocks (N / height, K / width), both rounded up, of a matrix hold something: bool.

    `height` and `width` are powers of two, and 8 divides `width`.
    """
    rows, columns = weight.shape
    some = weight != 0
    if rows % height or columns % width:
        some = torch.nn.functional.pad(some, (0, -columns % width, 0, -rows % height))
    return merged(some.contiguous().view(torch.int64), height, width // 8) != 0


def merged(some: Tensor, height: int, width: int) -> Tensor:
    """The bits set anywhere in blocks of a matrix of numbers or bools; halved again and again, which is fast."""
    while width > 1:
        some, width = some[:, ::2] | some[:, 1::2], width // 2
    while height > 1:
        some, height = some[::2] | some[1::2], height // 2
    return some


def room(weight: Tensor, height: int, width: int) -> int:
    """Bytes that (N, K) takes, and some: another that was pruned in the same way should fit too."""
    lists, numbers = _sizes(_in_runs(kept(weight, height, width), width), len(weight), height, width)
    exactly = ENTRY * (len(weight) + 1) + lists + numbers * weight.itemsize + BEHIND
    return -(-(exactly + numbers // SLACK * weight.itemsize) // PAGE) * PAGE


def numbers_in(bytes: int, rows: int, itemsize: int) -> int:
    """About how many numbers so many bytes hold, of a matrix of so many rows."""
    return max(0, bytes - ENTRY * (rows + 1) - BEHIND) // itemsize


def _in_runs(some: Tensor, width: int) -> Tensor:
    """Blocks to keep (B, J), so that every row keeps a multiple of RUN numbers: with some that hold nothing."""
    if width >= RUN:
        return some
    some = torch.nn.functional.pad(some, (0, some.shape[1] % 2))
    odd = some.sum(1) % 2 == 1
    first = some.int().argmin(1)  # which holds nothing: of an even number of blocks an odd one is kept
    return some | odd.unsqueeze(1) & (torch.arange(some.shape[1], device=some.device) == first.unsqueeze(1))


def _sizes(some: Tensor, rows: int, height: int, width: int) -> tuple[int, int]:
    """The bytes of all lists, and the numbers of all rows."""
    counts = some.sum(1)
    heights = torch.full_like(counts, height)
    heights[-1] = rows - height * (len(counts) - 1)
    return -(-2 * int((counts + 1).sum()) // 64) * 64 + -ENTRY * (rows + 1) % 64, int((counts * heights).sum()) * width


def pack(weight: Tensor, height: int, width: int, bytes: int) -> Tensor:
    """A matrix (N, K) in so many bytes (uint8).

    Raises:
        NotSparse: it does not fit.
    """
    rows, columns = weight.shape
    some = _in_runs(kept(weight, height, width), width)
    lists, numbers = _sizes(some, rows, height, width)
    first = ENTRY * (rows + 1) + lists
    if (rest := bytes - first - numbers * weight.itemsize - BEHIND) < 0:
        raise NotSparse(
            f"a matrix of shape {(rows, columns)} with {numbers} numbers in blocks does not fit {bytes} bytes"
        )
    counts = some.sum(1)
    begin = torch.nn.functional.pad((counts + 1).cumsum(0), (1, 0))
    entries = torch.zeros(lists // 2, dtype=torch.int16, device=weight.device)
    entries[begin[:-1]] = counts.to(torch.int16)
    at = torch.arange(int(begin[-1]), device=weight.device)
    which = torch.ones_like(at, dtype=torch.bool)
    which[begin[:-1]] = False
    entries[at[which]] = some.nonzero()[:, 1].to(torch.int16)
    of_row = torch.arange(rows, device=weight.device) // height
    padded = torch.nn.functional.pad(weight, (0, width * some.shape[1] - columns)).unflatten(1, (-1, width))
    values = padded[some[of_row]].flatten()
    ends = torch.nn.functional.pad((counts[of_row] * width * weight.itemsize).cumsum(0), (1, 0)) + first
    starts = torch.stack([torch.cat([2 * begin[of_row], begin.new_zeros(1)]) + ENTRY * (rows + 1), ends], 1)
    table = starts - ENTRY * torch.arange(rows + 1, device=weight.device).unsqueeze(1)
    parts = [x.contiguous().view(torch.uint8).flatten() for x in (table, entries, values)]
    return torch.cat([*parts, parts[0].new_zeros(rest + BEHIND)])


def unpack(codes: Tensor, dtype: torch.dtype, rows: int, columns: int, width: int) -> Tensor:
    """The matrix (rows, columns) of `dtype`."""
    table = codes[: ENTRY * rows].view(torch.int64).view(rows, 2)
    starts = table + ENTRY * torch.arange(rows, device=codes.device).unsqueeze(1)
    halves = codes[: codes.numel() // 2 * 2].view(torch.int16)
    counts = halves[starts[:, 0] // 2].long()
    row = torch.arange(rows, device=codes.device).repeat_interleave(counts)
    within = torch.arange(len(row), device=codes.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    column = halves[starts[row, 0] // 2 + 1 + within].long()
    blocks = -(-columns // max(width, RUN)) * max(width, RUN) // width
    matrix = torch.zeros(rows, blocks, width, dtype=dtype, device=codes.device)
    if rows and len(row):
        first = int(starts[0, 1])
        matrix[row, column] = (
            codes[first : first + len(row) * width * dtype.itemsize].clone().view(dtype).view(-1, width)
        )
    return matrix.flatten(1)[:, :columns]


@custom_op("llmcomp::pack_blocks", mutates_args=())
def pack_blocks(weight: Tensor, height: int, width: int, bytes: int) -> Tensor:
    """`pack` as an operator."""
    return pack(weight, height, width, bytes)


@pack_blocks.register_fake
def _(weight: Tensor, height: int, width: int, bytes: int) -> Tensor:
    return weight.new_empty(bytes, dtype=torch.uint8)


@custom_op("llmcomp::block_linear", mutates_args=())
def block_linear(x: Tensor, codes: Tensor, bias: Tensor | None, outputs: int, height: int, width: int) -> Tensor:
    """x (..., K) times a packed matrix (outputs, K) of the dtype of x, plus bias (outputs,): (..., outputs),
    contiguous, dtype of x.

    Computed in float32 (float64 where x is) and rounded once.
    """
    return wide_linear(x, unpack(codes, x.dtype, outputs, x.shape[-1], width), bias)


@block_linear.register_fake
def _(x: Tensor, codes: Tensor, bias: Tensor | None, outputs: int, height: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
