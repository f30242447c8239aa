"""The memory layout of 4-bit codes: 128 of a row in 64 bytes, so that 16 lanes of 32 bits unpack with shifts alone.

    byte 4 * l + i // 2 of a block holds code k = 16 * i + l, in its low half for an even i      (l < 16, i < 8)

Seen as 16 little-endian words, `(word[l] >> 4 * i) & 15` are 16 neighbours along k: a vector of 16 lanes unpacks a
block in 8 shifts, in the order in which the operand lies in memory, on a CPU and on a GPU. A row is padded to whole
blocks with zeros.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Codes of a block."""


def pack(codes: Tensor) -> Tensor:
    """Codes (..., K) uint8 in 0 .. 15 as bytes (..., 64 * ceil(K / 128)) uint8."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % BLOCK))
    lanes = padded.reshape(*codes.shape[:-1], -1, 4, 2, 16)  # block, byte of a word, half of a byte, word
    return (lanes[..., 0, :] | lanes[..., 1, :] << 4).transpose(-1, -2).flatten(-3).contiguous()


def unpack(data: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: bytes (..., 64 * ceil(columns / 128)) as codes (..., columns) uint8."""
    words = data.reshape(*data.shape[:-1], -1, 16, 4).transpose(-1, -2)
    return torch.stack((words & 15, words >> 4), dim=-2).flatten(-4)[..., :columns]
