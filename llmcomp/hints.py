"""Sizes as they were in the call that was traced: for choices of speed, never of correctness."""

from collections.abc import Iterable
from math import prod

import torch
from torch.fx import Node

UNKNOWN = 1024  # stands for a size that depends on data


def hint(n: int | torch.SymInt) -> int:
    """The value of a size in the traced call."""
    if isinstance(n, torch.SymInt):
        return int(n.node.hint) if n.node.has_hint() else UNKNOWN
    return int(n)


def volume(shape: Iterable[int | torch.SymInt]) -> int:
    """The number of elements of `shape` in the traced call."""
    return prod(hint(n) for n in shape)


def elements(node: Node) -> int:
    """The number of elements of a tensor node in the traced call; 0 for other nodes."""
    value = node.meta.get("val")
    return volume(value.shape) if isinstance(value, torch.Tensor) else 0
