"""How far two sequences agree."""

from collections.abc import Sequence

import torch
from torch import Tensor


def common_prefix(a: Sequence[Tensor], b: Sequence[Tensor], axes: Sequence[int]) -> int:
    """The number of positions, from the first on, at which each of the tensors `a` equals that of `b`.

    `axes` are the axes along the sequence, one for each pair. The comparison runs on the device of the tensors
    and is waited for once.
    """
    agree: Tensor | None = None
    for x, y, axis in zip(a, b, axes, strict=True):
        if x.dtype != y.dtype or x.device != y.device or _rest(x, axis) != _rest(y, axis):
            return 0
        length = min(x.shape[axis], y.shape[axis])
        same = (x.narrow(axis, 0, length) == y.narrow(axis, 0, length)).movedim(axis, 0).flatten(1).all(1)
        agree = same if agree is None else agree[:length] & same[: len(agree)]
    if agree is None:
        return 0
    return int(agree.long().cumprod(0).sum())


def _rest(x: Tensor, axis: int) -> torch.Size:
    return torch.Size([*x.shape[:axis], *x.shape[axis + 1 :]])
