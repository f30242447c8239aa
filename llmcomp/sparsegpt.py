"""SparseGPT: weights are removed column by column, the error of each made up for by the columns that follow.

Frantar and Alistarh 2023 (arXiv:2301.00774). With the upper Cholesky factor U of the inverse of the second moment of
the inputs, removing weight w of column k costs w^2 / U[k, k]^2; its error divided by U[k, k] is taken from the columns
behind it in proportion to U[k, k + 1:], as in GPTQ (llmcomp/gptq.py).
"""

import torch
from torch import Tensor

from llmcomp.gptq import inverse_factor
from llmcomp.saliency import keep_largest, keep_of_groups

BLOCK = 128  # columns whose masks are chosen, and whose updates reach the rest of the matrix, together


def sparsegpt(
    weight: Tensor, moment: Tensor, keep: float | tuple[int, int], damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The float32 matrix (N, K) that is left of `weight`, and its mask.

    `moment` (K, K) is the second moment of the inputs. `keep` is the part of the weights that goes, chosen among each
    128 columns, or (n, m): n of every m neighbours stay.

    Raises:
        FormatError: the damped moment can't be inverted.
    """
    rest = weight.float().clone()
    factor = inverse_factor(moment.float().clone(), damping)
    diagonal = factor.diagonal()
    rows, columns = rest.shape
    masks: list[Tensor] = []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(rows, stop - start, device=rest.device)
        if isinstance(keep, float):
            masks.append(keep_largest((rest[:, start:stop] / diagonal[start:stop]).square(), keep))
        for k in range(start, stop):
            if not isinstance(keep, float) and k % keep[1] == 0:
                some = slice(k, k + keep[1])
                masks.append(keep_of_groups((rest[:, some] / diagonal[some]).square(), *keep))
            goes = ~_column(masks, k, start if isinstance(keep, float) else k - k % keep[1])
            error = torch.where(goes, rest[:, k], 0.0) / factor[k, k]
            rest[:, k] = rest[:, k].masked_fill(goes, 0)
            rest[:, k + 1 : stop] -= error[:, None] * factor[k, k + 1 : stop]
            errors[:, k - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return rest, torch.cat(masks, 1)


def _column(masks: list[Tensor], k: int, first: int) -> Tensor:
    """Column k of the last of `masks`, which begins with column `first`."""
    return masks[-1][:, k - first]
