"""Results that show memory with room behind it, and that `view` can be called on as on eager's.

    eager's logits   f32[B, s, V], strides (s V, V, 1)     contiguous: has to move when s grows
    lent             f32[B, s, V], strides (V, B V, 1)     position by position: grows in place

The strides of the two differ where a batch has several rows. Operators do not care, but `view` gives no tensor of
another shape where elements lie elsewhere: here it copies then, as `reshape` does. Copies and what is saved are plain.
"""

from typing import Any

import torch
from torch import Tensor


class LentTensor(Tensor):
    """A tensor as any other, but for `view`. What operators make of it is of no class of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def view(self, *shape: Any) -> Tensor:
        """`Tensor.view`, of a copy where this memory cannot be shown so."""
        try:
            return super().view(*shape)
        except RuntimeError:
            return self.contiguous().view(*shape)

    def view_as(self, other: Tensor) -> Tensor:
        """`view` with the shape of `other`."""
        return self.view(other.shape)

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        memo[id(self)] = copy = self.clone(memory_format=torch.contiguous_format)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone(memory_format=torch.contiguous_format).__reduce_ex__(protocol)


def lent(shown: Tensor) -> Tensor:
    """`shown`, or the same memory as a LentTensor where its strides are not those of a contiguous tensor."""
    return shown if shown.is_contiguous() else shown.as_subclass(LentTensor)
