"""How close a result has to be, and when two token sequences are equal but for ties (DESIGN, section 6).

float32: the root-mean-square difference from eager is at most FLOAT32 of the result's own size.
Other types: the root-mean-square error against a float64 run is at most RATIO times eager's own error in the
same type, with a floor of one rounding of the output type. Tokens may differ only where the two candidates'
logits differ by less than eager's own error; such ties are counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = 2e-5
RATIO = 1.5


def rms(x: Tensor) -> float:
    """The root mean square of all elements, in float64."""
    return float(x.double().square().mean().sqrt())


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """The root-mean-square error of rounding `exact` to `dtype` once."""
    return rms(exact.to(dtype).double() - exact.double())


def assert_equal_float32(ours: Tensor, eager: Tensor) -> None:
    """Fail unless `ours` equals `eager` (both float32) up to the order of summation."""
    assert ours.shape == eager.shape and ours.dtype == eager.dtype, f"{ours.shape} {ours.dtype}"
    assert bool(ours.isfinite().all()) or not bool(eager.isfinite().all()), "not finite where eager is"
    error, size = rms(ours - eager), rms(eager)
    assert error <= FLOAT32 * size, f"rms difference {error:.3g} of {size:.3g}: {error / size:.3g} > {FLOAT32}"


def assert_no_worse(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fail unless the error of `ours` is at most RATIO times that of `eager`, both against `exact`."""
    assert ours.shape == eager.shape and ours.dtype == eager.dtype, f"{ours.shape} {ours.dtype}"
    error, own = rms(ours.double() - exact.double()), rms(eager.double() - exact.double())
    bar = max(RATIO * own, rounding(exact, ours.dtype))
    assert error <= bar, f"rms error {error:.3g}, eager's {own:.3g}: {error / max(own, 1e-300):.3g} > {RATIO}"


@dataclass(frozen=True)
class Divergence:
    """Where a row of tokens first differs: both sequences are equal before `position`."""

    row: int
    position: int
    ours: int
    eager: int


def divergences(ours: Tensor, eager: Tensor) -> tuple[Divergence, ...]:
    """The first difference of each row of two (batch, length) sequences, as far as both go."""
    length = min(ours.shape[1], eager.shape[1])
    found = []
    for row in range(eager.shape[0]):
        differs = (ours[row, :length] != eager[row, :length]).nonzero().flatten()
        if differs.numel():
            at = int(differs[0])
            found.append(Divergence(row, at, int(ours[row, at]), int(eager[row, at])))
    return tuple(found)


def is_tie(divergence: Divergence, eager: Tensor, exact: Tensor) -> bool:
    """Whether both candidates tie in the logits (vocabulary,) of that position.

    A tie is a gap, in the `eager` or in the `exact` (float64) logits, no wider than eager's own largest error: eager's
    errors may have driven apart two candidates that hardly differ.
    """
    gap = min(abs(float(logits[divergence.ours] - logits[divergence.eager])) for logits in (eager.double(), exact))
    return gap <= float((eager.double() - exact.double()).abs().max())
