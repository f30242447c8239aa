"""Rows that keep two of every four neighbours along k: a mask of which, and those two.

A row (K,), padded with zeros to blocks of 128, is stored as

    K / 8 bytes    masks: bit i is column i; every group of four has two bits that are set
    the rest       what is kept, in order, two for every group of four

The mask of a group takes as many bits as two indices of two bits. It says without any arithmetic where the two go: the
first to column 0 if bit 0 is set, else to 1 if bit 1 is, else to 2.
"""

import torch
from torch import Tensor

BLOCK = 128  # columns that a row is padded to
FEWER = (3, 3, 3, 3, 5, 5, 6, 0, 9, 9, 10, 0, 12, 0, 0, 0)
"""The masks of two columns for those that hold something, of at most two; 0 where they are more."""


class NotSparse(ValueError):
    """A matrix that holds too much to be stored in the way that was asked for."""


class NotTwoFour(NotSparse):
    """A matrix of which some group of four keeps more than two."""


def masks_of(something: Tensor) -> Tensor | None:
    """The masks (N, G) uint8, each of 4 bits, of groups of four in a matrix (N, 4 G) of bool; None where one of them
    has more than two.
    """
    a, b, c, d = (something.view(torch.uint8)[:, i::4] for i in range(4))
    if bool((a + b + c + d > 2).any()):
        return None
    held = a | b << 1 | c << 2 | d << 3
    return torch.tensor(FEWER, dtype=torch.uint8, device=held.device)[held.int()]


def compress(values: Tensor, something: Tensor) -> tuple[Tensor, Tensor]:
    """The masks as bytes (N, B / 8) uint8, and the values that are kept (N, B / 2), of (N, K) padded to whole blocks B.

    `values` may be any numbers; `something` says where they must be kept.

    Raises:
        NotTwoFour: these are more than two in a group of four.
    """
    rest = -values.shape[1] % BLOCK
    if rest:
        values, something = (torch.nn.functional.pad(x, (0, rest)) for x in (values, something))
    if (masks := masks_of(something)) is None:
        raise NotTwoFour(f"a matrix of shape {tuple(values.shape)} is not 2:4 sparse")
    v0, v1, v2, v3 = (values[:, i::4] for i in range(4))
    b0, b1, b2, b3 = _bits(masks)
    first = torch.where(b0, v0, torch.where(b1, v1, v2))
    second = torch.where(b3, v3, torch.where(b2, v2, v1))
    return masks[:, ::2] | masks[:, 1::2] << 4, torch.stack([first, second], -1).flatten(1)


def expand(masks: Tensor, kept: Tensor, other: Tensor | float) -> Tensor:
    """The inverse: (..., B) of masks (..., B / 8) and what is kept (..., B / 2), and `other` where nothing was.

    `other` broadcasts to (..., B / 4), the groups of four.
    """
    b0, b1, b2, b3 = _bits(torch.stack([masks & 15, masks >> 4], -1).flatten(-2))
    a, b = kept.unflatten(-1, (-1, 2)).unbind(-1)
    rest = torch.as_tensor(other, dtype=kept.dtype, device=kept.device)
    columns = (
        torch.where(b0, a, rest),
        torch.where(b1, torch.where(b0, b, a), rest),
        torch.where(b2, torch.where(b3, a, b), rest),
        torch.where(b3, b, rest),
    )
    return torch.stack(columns, -1).flatten(-2)


def _bits(masks: Tensor) -> list[Tensor]:
    return [(masks >> i & 1).view(torch.bool) for i in range(4)]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes (..., K) uint8 in 0 .. 15, K a multiple of 64: byte b of 32 has code b low and code 32 + b high."""
    low, high = codes.unflatten(-1, (-1, 2, BLOCK // 4)).unbind(-2)
    packed: Tensor = (low | high << 4).flatten(-2)
    return packed


def unpack_nibbles(data: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    blocks = data.unflatten(-1, (-1, BLOCK // 4))
    return torch.stack((blocks & 15, blocks >> 4), dim=-2).flatten(-3)
