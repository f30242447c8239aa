"""2:4 sparse matrices as kernels read them: two of every four neighbours along k, and which.

A row (K,) of bfloat16, padded with zeros to blocks of 128, takes 144 bytes for each block:

    16 bytes     4 masks of 32 bits, one for every 32 columns: bit 2 i is column i, bit 2 i + 1 column 16 + i
    128 bytes    4 times 16 values, those whose bits are set, in the order of the bits

1.125 bytes for a weight that takes 2 where it is dense. A group of four has four bits of mask, as many as two indices
of two bits. In the order of the bits, 32 expanded values are two vectors of 16 floats: their even and odd halves.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.formats import Format
from llmcomp.saliency import keep_of_groups

COLUMNS, BYTES = 128, 144  # of a block
SIDE = 32  # columns of a mask


@dataclass(frozen=True)
class TwoFour(Format):
    """How a Contract says that its weights are stored so."""

    stem: ClassVar[str] = "2:4"


class NotTwoFour(ValueError):
    """A matrix of which some group of four has more than two weights."""


def is_two_four(weight: Tensor) -> bool:
    """Whether no group of four neighbours along k of (N, K) holds more than two numbers other than zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    a, b, c, d = ((weight != 0).view(torch.uint8)[:, i::4] for i in range(4))
    return bool((a + b + c + d <= 2).all())


def pack(weight: Tensor) -> Tensor:
    """The bytes (N, 144 * ceil(K / 128)) uint8 of a bfloat16 matrix.

    Raises:
        NotTwoFour: it is not 2:4 sparse.
    """
    assert weight.dtype == torch.bfloat16
    if not is_two_four(weight):
        raise NotTwoFour(f"a matrix of shape {tuple(weight.shape)} is not 2:4 sparse")
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % COLUMNS))
    rows, blocks = len(padded), padded.shape[1] // COLUMNS
    kept = keep_of_groups((padded != 0).to(torch.uint8), 2, 4)
    kept, values = (_ordered(x.view(rows, blocks, 4, SIDE)) for x in (kept, padded))
    set_bits = kept.view(torch.uint8).unflatten(-1, (-1, 8))
    masks = torch.stack([set_bits[..., i] << i for i in range(8)]).sum(0, dtype=torch.uint8).flatten(2)
    chosen = values.view(torch.int16)[kept].view(rows, blocks, 4 * SIDE // 2).view(torch.uint8)
    return torch.cat([masks, chosen], -1).flatten(1)


def unpack(codes: Tensor, columns: int) -> Tensor:
    """The bfloat16 matrix (N, columns)."""
    parts = codes.unflatten(1, (-1, BYTES))
    bits = torch.arange(8, device=codes.device, dtype=torch.uint8)
    kept = (parts[..., :16].unsqueeze(-1) >> bits & 1).bool().flatten(-2).unflatten(-1, (4, SIDE))
    values = torch.zeros(kept.shape, dtype=torch.bfloat16, device=codes.device)
    values[kept] = parts[..., 16:].contiguous().view(torch.bfloat16).flatten()
    matrix: Tensor = values.unflatten(-1, (SIDE // 2, 2)).transpose(-1, -2).flatten(1)[:, :columns]
    return matrix


def _ordered(sides: Tensor) -> Tensor:
    """Columns (..., 32) in the order of the bits."""
    ordered: Tensor = sides.unflatten(-1, (2, SIDE // 2)).transpose(-1, -2).flatten(-2)
    return ordered


@custom_op("llmcomp::pack_two_four", mutates_args=())
def pack_two_four(weight: Tensor) -> Tensor:
    """`pack` as an operator."""
    return pack(weight)


@pack_two_four.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], -(-weight.shape[1] // COLUMNS) * BYTES, dtype=torch.uint8)


@custom_op("llmcomp::two_four_linear", mutates_args=())
def two_four_linear(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times a packed matrix (N, K), plus bias (N,): (..., N), contiguous, dtype of x.

    Computed in float32 (float64 where x is) and rounded once.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = unpack(codes, x.shape[-1]).to(wide)
    product = torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    return product.to(x.dtype).contiguous()


@two_four_linear.register_fake
def _(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])
