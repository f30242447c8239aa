"""Finds blocks of zeros in a matrix, and says whether kernels that skip them are faster than the whole matrix.

A part of passes/compress.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.blocks import HEIGHTS, WIDTHS, Blocks, kept, merged

SAMPLE = 64  # rows that are looked at first
NOTABLE = 0.25  # blocks that are zero: below, nothing is said of them
DTYPES = (torch.bfloat16, torch.float32)
SLOWER = {1: 1.1, 8: 1.02}  # bytes of blocks that are so high count for more, where others would do
NARROW = 1.05  # likewise those of the smallest width
# Rows of the operand, and the least part of blocks that must be zero there: of high blocks, and of those of one row.
# Measured on AVX-512 with two threads, 4096 x 4096: 1 to 4 rows, times dense, 1.3 to 1.6 and 1.2 at 30%, 1.9 to 2.2 and
# 1.9 at 50%; 8 rows 0.9 to 1.1 and 0.5 at 30%, 1.3 to 1.6 and 0.8 at 50%; 64 to 256 rows, times the library, 1.3 to 1.5
# at 20% (float32: 1.0 at 30%) and 0.6 at 35%, 1.6 to 2.2 and 0.8 at 50%, 2.9 to 3.6 and 1.3 at 75%. With AVX2 alone
# more, but for 4 and 8 rows that meet blocks of one row: 0.6 at 30%, 0.8 at 50%.
LEAST = ((2, 0.25, 0.3), (4, 0.25, 0.65), (8, 0.4, 0.65), (2**31, 0.35, 0.7))


@dataclass(frozen=True)
class Found:
    """Blocks of a matrix, and what part of them is zero."""

    form: Blocks
    zeros: float

    def bytes_of_weight(self, itemsize: int) -> float:
        """Bytes that are read for a weight of the matrix, on average."""
        return (1 - self.zeros) * (itemsize + 2 / (self.form.height * self.form.width))

    def __str__(self) -> str:
        return f"{self.zeros:.0%} of its blocks of {self.form.height} x {self.form.width} weights are zero"

    def stays_dense(self, rows: int) -> str | None:
        """Why an operand of so many rows should meet the whole matrix, or None."""
        least = next(high if self.form.height > 1 else one for most, high, one in LEAST if rows <= most)
        if self.zeros >= least:
            return None
        return f"{rows} rows meet them, for which below {least:.0%} that is faster"


def find_blocks(value: Tensor) -> Found | None:
    """The blocks in which most of a matrix (N, K) is zero; None where that is less than NOTABLE of it in any."""
    some = value[:: max(1, value.shape[0] // SAMPLE)]
    if 1 - float(kept(some, 1, WIDTHS[0]).float().mean()) < NOTABLE:
        return None
    return min(_forms(value), key=lambda f: _cost(f, value.itemsize), default=None)


def _cost(found: Found, itemsize: int) -> float:
    narrow = NARROW if found.form.width == WIDTHS[0] else 1.0
    return found.bytes_of_weight(itemsize) * SLOWER.get(found.form.height, 1.0) * narrow


def _forms(value: Tensor) -> Iterator[Found]:
    """The forms of blocks of which some are zero, with that part: where none is, none of larger ones is."""
    rows, columns = value.shape
    narrow = kept(value, 1, WIDTHS[0])
    room = (0, -narrow.shape[1] % (WIDTHS[-1] // WIDTHS[0]), 0, -rows % HEIGHTS[-1])
    narrow, before = torch.nn.functional.pad(narrow, room) if any(room) else narrow, WIDTHS[0]
    for width in WIDTHS:
        narrow, before = merged(narrow, 1, width // before), width
        some, low = narrow, HEIGHTS[0]
        for height in HEIGHTS:
            some, low = merged(some, height // low, 1), height
            zeros = 1 - int(some.sum()) / (-(-rows // height) * -(-columns // width))
            if zeros < NOTABLE:
                break
            yield Found(Blocks(height=height, width=width), zeros)
