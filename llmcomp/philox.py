"""Random numbers that a compiled program computes: a generator without state, written in tensor operators.

    words(token, step, key)     the same three numbers give the same 32 random bits, on every device

Nothing is drawn ahead, stored or read: the numbers are values of a kernel like any others, a replayed program
goes on where its counter is, and a row's numbers depend neither on its neighbours nor on how many steps are
computed at once.

Philox2x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER = 0xD256D193
WEYL = 0x9E3779B9
MASK = 0xFFFFFFFF


def words(low: Tensor, high: Tensor, key: Tensor) -> Tensor:
    """32 random bits, int64 from 0 to 2**32 - 1, for the counter (`low`, `high`) under `key`.

    All three are int64 from 0 to 2**32 - 1, of shapes that broadcast together.
    """
    for i in range(ROUNDS):
        # Wraps around to a negative number; the upper half is right once the sign that shifts in is cut off.
        product = low * MULTIPLIER
        upper = (product >> 32) & MASK
        low, high = upper ^ ((key + i * WEYL) & MASK) ^ high, product & MASK
    return low


def gumbel(low: Tensor, high: Tensor, key: Tensor) -> Tensor:
    """float32 numbers of the standard Gumbel distribution: adding them to logits makes argmax a draw.

    Large values come from small uniform numbers, where float32 is finest.
    """
    uniform = (words(low, high, key).float() + 0.5) * 2.0**-32
    # Rounding to float32 reaches 1, whose logarithm would be infinite.
    uniform = uniform.clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))
