"""What calibration keeps of the inputs of a matrix: second moment, mean and largest magnitude of each channel.

rows (tokens, K) of every batch  ->  Moments: second (K, K), magnitude (K,), largest (K,), all float32, and a count
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmcomp.errors import FormatError
from llmcomp.layerwise import Step

SAMPLE = 512  # rows that are kept, about


@dataclass(frozen=True)
class Moments:
    """Of the inputs x of one matrix: the sum of x x^T, the sum of |x|, the maximum of |x|, over `tokens`; some x."""

    tokens: int
    second: Tensor
    total: Tensor
    largest: Tensor
    sample: Tensor

    @staticmethod
    def of(rows: Tensor, sample: int = SAMPLE) -> "Moments":
        """Those of rows (tokens, K), of which `sample` are kept."""
        rows = rows.float()
        sizes = rows.abs()
        largest = sizes.amax(0) if len(rows) else sizes.new_zeros(rows.shape[1])
        some = rows[torch.linspace(0, len(rows) - 1, min(sample, len(rows)), device=rows.device).long()]
        return Moments(len(rows), rows.t() @ rows, sizes.sum(0), largest, some)

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x|."""
        return self.total / max(self.tokens, 1)

    def and_of(self, other: "Moments") -> "Moments":
        """Those of both sets of rows; takes the memory of the first."""
        self.second.add_(other.second)
        self.total.add_(other.total)
        largest = torch.maximum(self.largest, other.largest)
        sample = torch.cat([self.sample, other.sample])
        return Moments(self.tokens + other.tokens, self.second, self.total, largest, sample)

    def divided(self, scales: Tensor) -> "Moments":
        """Those of x / scales."""
        scales = scales.float()
        second = self.second / (scales[:, None] * scales)
        return Moments(self.tokens, second, self.total / scales, self.largest / scales, self.sample / scales)


def moments_of(step: Step, modules: Iterable[nn.Module]) -> dict[nn.Module, Moments]:
    """The moments of the inputs of linear modules of a layer, over all data; those that nothing reached are missing.

    Raises:
        FormatError: an input is NaN or infinite.
    """
    sample = -(-SAMPLE // len(step.walk.batches))
    found: dict[nn.Module, Moments] = {}
    last: list[tuple[Tensor, Moments]] = []  # query, key and value read one tensor: kept, its address is its own

    def see(module: nn.Module, rows: Tensor) -> None:
        if not last or last[0][0].data_ptr() != rows.data_ptr() or last[0][0].shape != rows.shape:
            last[:] = [(rows, Moments.of(rows, sample))]
        new = last[0][1]
        if module in found:
            found[module] = found[module].and_of(new)
        else:
            found[module] = Moments(new.tokens, new.second.clone(), new.total.clone(), new.largest, new.sample)

    step.watch({module: partial(see, module) for module in modules})
    for module, moments in found.items():
        check_finite(step.walk.names[module], moments)
    return found


def check_finite(name: str, moments: Moments) -> None:
    """Refuse inputs of a matrix that no codes can be found for.

    Raises:
        FormatError: one was NaN or infinite.
    """
    if not bool(moments.largest.isfinite().all()):
        raise FormatError(
            f"expected finite inputs of {name}, found NaN or infinity: run the model on the data in bfloat16 or "
            "float32 to see where they come from"
        )
