"""2:4 sparse matrices of bfloat16 as kernels read them: two of every four neighbours along k, and which.

A row (K,) is stored as llmcomp/pairs.py says: 1.125 bytes for a weight that takes 2 where it is dense.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.library import custom_op

from llmcomp.formats import Format
from llmcomp.ops import wide_linear
from llmcomp.pairs import BLOCK, NotTwoFour, compress, expand, masks_of

__all__ = ["NotTwoFour", "TwoFour", "is_two_four", "pack", "unpack"]

BYTES = BLOCK // 8 + BLOCK  # of a block


@dataclass(frozen=True)
class TwoFour(Format):
    """How a Contract says that its weights are stored so."""

    stem: ClassVar[str] = "2:4"


def is_two_four(weight: Tensor) -> bool:
    """Whether no group of four neighbours along k of (N, K) holds more than two numbers other than zero."""
    return weight.dim() == 2 and weight.shape[1] % 4 == 0 and masks_of(weight != 0) is not None


def pack(weight: Tensor) -> Tensor:
    """The bytes (N, 144 * ceil(K / 128)) uint8 of a bfloat16 matrix.

    Raises:
        NotTwoFour: it is not 2:4 sparse.
    """
    assert weight.dtype == torch.bfloat16
    if weight.shape[1] % 4:
        raise NotTwoFour(f"a matrix of shape {tuple(weight.shape)} has no groups of four")
    bits = weight.contiguous().view(torch.int16)
    masks, kept = compress(bits, bits & 0x7FFF != 0)
    return torch.cat([masks, kept.view(torch.uint8)], 1)


def unpack(codes: Tensor, columns: int) -> Tensor:
    """The bfloat16 matrix (N, columns)."""
    at = codes.shape[1] // 9
    kept = codes[:, at:].contiguous().view(torch.bfloat16)
    return expand(codes[:, :at], kept, 0.0)[:, :columns]


@custom_op("llmcomp::pack_two_four", mutates_args=())
def pack_two_four(weight: Tensor) -> Tensor:
    """`pack` as an operator."""
    return pack(weight)


@pack_two_four.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], -(-weight.shape[1] // BLOCK) * BYTES, dtype=torch.uint8)


@custom_op("llmcomp::two_four_linear", mutates_args=())
def two_four_linear(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times a packed matrix (N, K), plus bias (N,): (..., N), contiguous, dtype of x.

    Computed in float32 (float64 where x is) and rounded once.
    """
    return wide_linear(x, unpack(codes, x.shape[-1]), bias)


@two_four_linear.register_fake
def _(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])
