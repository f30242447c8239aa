"""The memory layout of 4-bit codes: 128 of a row in 64 bytes.

    byte b of a block holds code b in its low half and code 64 + b in its high half      (b < 64)

The low halves of neighbouring bytes are neighbours along k, and so are the high halves: a vector of bytes unpacks with
one mask, or one shift and a mask, in the order in which the operand lies in memory, and the groups of a row stay
together. A row is padded to whole blocks with zeros.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Codes of a block."""


def pack(codes: Tensor) -> Tensor:
    """Codes (..., K) uint8 in 0 .. 15 as bytes (..., 64 * ceil(K / 128)) uint8."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % BLOCK))
    halves = padded.reshape(*codes.shape[:-1], -1, 2, BLOCK // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2).contiguous()


def unpack(data: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: bytes (..., 64 * ceil(columns / 128)) as codes (..., columns) uint8."""
    blocks = data.reshape(*data.shape[:-1], -1, BLOCK // 2)
    return torch.stack((blocks & 15, blocks >> 4), dim=-2).flatten(-3)[..., :columns]
