"""Scales of what the second matrices of experts read, folded into the first: AWQ's, other ones for each expert.

    down[e](gate(up[e](x)))  =  (down[e] * s)(gate(up[e] / s))      of up[e] those rows that the gate only multiplies by

Which rows these are is found by trying powers of two, with which every product is the same number. Gates that do more
with them than multiply (GPT-OSS clamps them and adds one) let no scale through.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmcomp.awq import awq_scales
from llmcomp.expert_calibration import DOWN, Given, is_enough
from llmcomp.formats import Format
from llmcomp.moments import Moments
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, matrix, reading_key


@torch.no_grad()
def scale_down(site: Site, form: Format, given: Given) -> str:
    """Scale the second matrices of experts in place, and the first against it; or why that can't be.

    Experts with too few rows stay as they are.
    """
    module = given.module
    if isinstance(getattr(module, reading_key(module)), QuantizedTensor):
        return f"{reading_key(module)} is quantized already"
    rows = multiplied_rows(given, site.matrix.shape[-1])
    if rows is None:
        return "its gate does more than multiply"
    for expert, reader in enumerate(site.matrices):
        moments = Moments.of(given.inputs(DOWN, expert))
        if not is_enough(moments, reader):
            continue
        scales = awq_scales([reader.float()], [form], moments, torch.arange(reader.shape[1], device=reader.device))
        _divide(module, expert, rows, scales)
        reader.copy_(reader.float() * scales)
    return ""


def _divide(module: nn.Module, expert: int, rows: Tensor, scales: Tensor) -> None:
    key = reading_key(module)
    source, bias = matrix(module)[expert], getattr(module, f"{key}_bias", None)
    source[rows] = (source[rows].float() / scales[:, None]).to(source.dtype)
    if bias is not None:
        bias[expert, rows] = (bias[expert, rows].float() / scales).to(bias.dtype)


def multiplied_rows(given: Given, columns: int) -> Tensor | None:
    """Outputs of the first product that the gate only multiplies by, one for each of its own; None: there are none."""
    outputs, place = matrix(given.module).shape[1], matrix(given.module).device
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 3, 64)[:, None]  # clamps are felt by large numbers
    product = (torch.randn(64, outputs, generator=generator) * sizes).to(place)
    powers = 2.0 ** (torch.randint(0, 2, (columns,), generator=generator) * 2 - 1).to(place)  # 1/2 and 2
    for rows in _candidates(outputs, columns):
        other = product.clone()
        other[:, rows] *= powers
        if torch.equal(given.gate(other), given.gate(product) * powers):
            return rows.to(place)
    return None


def _candidates(outputs: int, columns: int) -> Iterator[Tensor]:
    each = torch.arange(columns)
    if outputs == 2 * columns:  # behind those of the gate or before them, or in turns
        yield from (each + columns, each, 2 * each + 1, 2 * each)
    elif outputs == columns:
        yield each
