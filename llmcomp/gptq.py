"""GPTQ: the codes of a matrix, column by column, the error of each made up for by the columns that follow.

Frantar et al. 2022 (arXiv:2210.17323). The matrix W (N, K) multiplies inputs x (K,); what counts is the error of W x,
whose second moment over calibration data is H = sum x x^T (K, K). With the upper Cholesky factor U of H^-1, the error
e of column k divided by U[k, k] is taken from the columns behind it in proportion to U[k, k + 1:].
"""

import torch
from torch import Tensor

from llmcomp.errors import FormatError
from llmcomp.formats import Format, Packed, check

BLOCK = 128  # columns whose updates reach the rest of the matrix together


def gptq(weight: Tensor, moment: Tensor, form: Format, damping: float = 0.01) -> Packed:
    """The codes of a float matrix (N, K) in `form`, for inputs whose second moment is `moment` (K, K), float32.

    Inputs that were never other than zero leave their columns to rounding. `damping`, a part of the mean of the
    diagonal, is added to it.

    Raises:
        FormatError: as `Format.quantize`; the damped moment can't be inverted.
    """
    check(weight, form)
    rest = weight.float().clone()
    factor = inverse_factor(moment.float().clone(), damping)
    rows, columns = rest.shape
    group = form.group or columns
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    scale, zero = form.scales(rest.unsqueeze(1))
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(rows, stop - start, device=rest.device)
        for k in range(start, stop):
            if k % group == 0:
                if form.group:
                    scale, zero = form.scales(rest[:, k : k + group].unsqueeze(1))
                scales.append(scale)
                zeros += [] if zero is None else [zero]
            column = rest[:, k].view(rows, 1, 1)
            code = form.round(column, scale, zero)
            error = (column - form.numbers(code, scale, zero)).view(rows) / factor[k, k]
            rest[:, k + 1 : stop] -= error[:, None] * factor[k, k + 1 : stop]
            errors[:, k - start] = error
            codes.append(code.view(rows, 1))
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return form.packed(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1) if zeros else None)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moment."""
    diagonal = moment.diagonal()
    seen = diagonal > 0
    mean = diagonal[seen].mean() if bool(seen.any()) else torch.ones_like(diagonal[0])
    diagonal[~seen] = mean
    diagonal += damping * mean
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:
        raise FormatError(
            f"expected inputs whose second moment can be inverted, found none with a damping of {damping}: "
            "pass more damping, 0.01 for example, or more data"
        ) from error
    return factor
