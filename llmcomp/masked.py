"""Matrices of bfloat16 with zeros anywhere, stored as masks and what is not zero: for kernels of the CPU.

    16 (N + 1) bytes    for every row: how far from here its masks and its numbers begin; and where those of all end
    N * P / 8 bytes     masks: bit i is column i, of rows that are padded to P columns, whole blocks of 128
    the rest            numbers, in order; behind them 64 bytes that may be read

A weight takes 1/8 byte, and 2 more where it is not zero. How much room there is for numbers is fixed when a graph is
compiled.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.formats import Format
from llmcomp.ops import wide_linear
from llmcomp.pairs import BLOCK, NotSparse

ENTRY = 16  # bytes of the table for a row
BEHIND = 64
PAGE, SLACK = 4096, 50


@dataclass(frozen=True)
class Masked(Format):
    """How a Contract says that its weights are stored so."""

    stem: ClassVar[str] = "masked"


def room(weight: Tensor) -> int:
    """Bytes that (N, K) takes, and some: another that was pruned in the same way should fit too."""
    numbers = int(torch.count_nonzero(weight))
    return -(-(_fixed(*weight.shape) + 2 * (numbers + numbers // SLACK)) // PAGE) * PAGE


def _fixed(rows: int, columns: int) -> int:
    return ENTRY * (rows + 1) + rows * -(-columns // BLOCK) * (BLOCK // 8) + BEHIND


def pack(weight: Tensor, bytes: int) -> Tensor:
    """A bfloat16 matrix (N, K) in so many bytes (uint8).

    Raises:
        NotSparse: it does not fit.
    """
    rows, columns = weight.shape
    something = weight != 0
    numbers = weight[something]
    if (rest := bytes - _fixed(rows, columns) - 2 * len(numbers)) < 0:
        raise NotSparse(f"a matrix of shape {(rows, columns)} with {len(numbers)} numbers does not fit {bytes} bytes")
    bits = torch.nn.functional.pad(something, (0, -columns % BLOCK)).view(torch.uint8).unflatten(1, (-1, 8))
    masks = bits[..., 0].clone()
    for i in range(1, 8):
        masks |= bits[..., i] << i
    at = torch.arange(rows + 1, device=weight.device)
    ends = torch.nn.functional.pad(something.sum(1).cumsum(0), (1, 0))
    starts = torch.stack([at * masks.shape[1], masks.numel() + 2 * ends], 1)
    table = starts + (ENTRY * (rows + 1) - ENTRY * at).unsqueeze(1)
    parts = [table.view(torch.uint8).flatten(), masks.flatten(), numbers.view(torch.uint8)]
    return torch.cat([*parts, masks.new_zeros(rest + BEHIND)])


def unpack(codes: Tensor, rows: int, columns: int) -> Tensor:
    """The bfloat16 matrix (rows, columns)."""
    blocks = -(-columns // BLOCK)
    first = ENTRY * (rows + 1)
    masks = codes[first : first + rows * blocks * (BLOCK // 8)].view(rows, -1)
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
    something = (masks.unsqueeze(-1) >> bits & 1).flatten(1).bool()
    start = first + masks.numel()
    matrix = torch.zeros(something.shape, dtype=torch.bfloat16, device=codes.device)
    matrix[something] = codes[start : start + 2 * int(something.sum())].clone().view(torch.bfloat16)
    return matrix[:, :columns]


@custom_op("llmcomp::pack_masked", mutates_args=())
def pack_masked(weight: Tensor, bytes: int) -> Tensor:
    """`pack` as an operator."""
    return pack(weight, bytes)


@pack_masked.register_fake
def _(weight: Tensor, bytes: int) -> Tensor:
    return weight.new_empty(bytes, dtype=torch.uint8)


@custom_op("llmcomp::masked_linear", mutates_args=())
def masked_linear(x: Tensor, codes: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x (..., K) times a packed matrix (outputs, K), plus bias (outputs,): (..., outputs), contiguous, dtype of x.

    Computed in float32 (float64 where x is) and rounded once.
    """
    return wide_linear(x, unpack(codes, outputs, x.shape[-1]), bias)


@masked_linear.register_fake
def _(x: Tensor, codes: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
