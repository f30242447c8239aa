"""The memory that a program asks for, call by call; a full device is told with what it was for.

zeros = empty_strided((1, 8, 4096, 64), (...), dtype=torch.bfloat16, device=cpu)
    ->   MemoryFullError: expected 4.0 MiB on cpu for a tensor of shape (1, 8, 4096, 64), found too little memory
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcomp.headroom import memory_full


def empty_strided(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device, what: str = "a tensor"
) -> Tensor:
    """A tensor of undefined content: a result of a program, `what` says of which kind.

    Raises:
        MemoryFullError: the device has too little memory.
    """
    try:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    except RuntimeError as error:
        count = math.prod(shape) * dtype.itemsize
        raise memory_full(count, f"{what} of shape {tuple(shape)}", device, error) from error


def intermediates(count: int) -> Tensor:
    """`count` bytes for what kernels of one call hand to each other, on the CPU.

    Raises:
        MemoryFullError: there is too little memory.
    """
    try:
        return torch.empty(count, dtype=torch.uint8)
    except RuntimeError as error:
        raise memory_full(count, "intermediate results", "cpu", error) from error
