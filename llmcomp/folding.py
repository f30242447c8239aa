"""Scales of the channels that matrices read, folded into what precedes them, so that a float model stays what it is.

    reader(source(x))  =  (reader * s)(source(x) / s)        s: one number for each channel that the readers read

    form       the source                                  what becomes of it
    SCALE      a norm that multiplies by weight            weight / s, bias / s
    ONE_PLUS   a norm that multiplies by 1 + weight        (1 + weight) / s - 1
    ROWS       a linear layer some of whose outputs reach  those rows of weight and bias / s
               the readers unmixed (v -> o, up -> down)

AWQ (Lin et al. 2023) and SmoothQuant (Xiao et al. 2022) choose the scales; `llmcomp/find_folds.py` finds the folds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from llmcomp.sites import matrix, reading_key


class Form(Enum):
    """How a source multiplies what it gives."""

    SCALE = "scale"
    ONE_PLUS = "one_plus"
    ROWS = "rows"


@dataclass(frozen=True, eq=False)
class Fold:
    """Channels that `source` gives and all `readers` read: column k of a reader reads channel `channels[k]`. Readers
    are linear layers, routers and experts.

    `rows` are the outputs of a linear source that hold the channels, in their order; all that a norm gives.
    """

    source: nn.Module
    form: Form
    rows: Tensor
    channels: Tensor
    readers: tuple[nn.Module, ...]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that a fold changes."""
        return (self.source, *self.readers)


@torch.no_grad()
def fold(found: Fold, scales: Tensor) -> Tensor:
    """Divide what the source gives by `scales` (channels,), positive; multiply the columns of the readers.

    Returns the scales that were taken: a norm's weight is rounded to its dtype, and what it then is divided by goes
    into the readers, so that a fold of bfloat16 weights is as exact as one of float32.
    """
    taken = _into_rows(found, scales) if found.form is Form.ROWS else _into_norm(found, scales)
    for reader in found.readers:
        _scale_columns(reader, taken[found.channels])
    return taken


def _into_norm(found: Fold, scales: Tensor) -> Tensor:
    weight = found.source.weight
    assert isinstance(weight, Tensor)
    one = float(found.form is Form.ONE_PLUS)
    given = _wide(weight) + one  # what it multiplies by
    scales = scales.to(given)
    wanted = (given / scales - one).to(weight.dtype)
    vanished = (_wide(wanted) + one == 0) & (given != 0)
    weight.copy_(torch.where(vanished, weight, wanted))
    left = _wide(weight) + one
    taken = torch.where(left == 0, scales, given / left)
    if isinstance(bias := getattr(found.source, "bias", None), Tensor):
        bias.copy_(_wide(bias) / taken)
    return taken


def _into_rows(found: Fold, scales: Tensor) -> Tensor:
    rows, bias = matrix(found.source), found.source.bias
    rows[found.rows] = (_wide(rows[found.rows]) / scales.to(rows.device)[:, None]).to(rows.dtype)
    if isinstance(bias, Tensor):
        bias[found.rows] = (_wide(bias[found.rows]) / scales.to(bias.device)).to(bias.dtype)
    return scales


def _scale_columns(reader: nn.Module, scales: Tensor) -> None:
    weight = matrix(reader)
    weight.copy_(_wide(weight) * scales.to(weight.device))


def _wide(values: Tensor) -> Tensor:
    """In a dtype to compute in: float64 stays, the rest becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


@contextmanager
def restored(found: Fold) -> Iterator[None]:
    """Whatever happens to the parameters of a fold meanwhile, they are what they were afterwards."""
    read = [(m, name, m._parameters.get(name)) for m in found.modules for name in (reading_key(m), "bias")]
    parameters = [(m, name, p) for m, name, p in read if p is not None]
    values = [p.detach().clone() for _, _, p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, name, parameter), value in zip(parameters, values, strict=True):
                parameter.copy_(value)
                module._parameters[name] = parameter
