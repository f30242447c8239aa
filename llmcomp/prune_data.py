"""Masks that are chosen by data: Wanda and SparseGPT, one decoder layer after the other.

    for each layer:  what its matrices are given -> their masks, applied -> inputs of the next layer

Matrices that see no data (outside of the layers, or experts that no token reached) are pruned by magnitude.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmcomp.layerwise import layerwise
from llmcomp.saliency import keep_largest_of_rows, keep_of_groups, wanda
from llmcomp.sites import Site
from llmcomp.sparsegpt import sparsegpt
from llmcomp.sparsity import NM, Part, SparseGPT, Sparsity
from llmcomp.token_batches import Batches


@torch.no_grad()
def prune_with_data(model: nn.Module, chosen: Sequence[tuple[Site, Sparsity]], batches: Batches) -> dict[int, Tensor]:
    """Prune matrices in place; returns their masks by the id of the site.

    Raises:
        FormatError: as `layerwise`; a moment can't be inverted. The weights are then as they were.
    """
    by_module = {module: (site, by) for site, by in chosen for module in site.holders}
    originals: list[tuple[Tensor, Tensor]] = []
    masks: dict[int, Tensor] = {}
    try:
        with layerwise(model, batches, "pruning") as steps:
            for step in steps:
                found = [m for m in step.linears if m in by_module and id(by_module[m][0]) not in masks]
                sums = {m: _Sums(of_pairs=_compensates(by_module[m][1])) for m in found}
                step.watch({m: sums[m].add for m in found})
                for module in found:
                    site, by = by_module[module]
                    if id(site) not in masks:
                        originals.append((site.weight, site.weight.clone()))
                        masks[id(site)] = _prune(site, by, sums[module].total)
        for site, by in chosen:
            if id(site) not in masks:
                masks[id(site)] = _prune(site, by, None)
    except BaseException:
        for weight, original in originals:
            weight.copy_(original)
        raise
    return masks


class _Sums:
    """Over all inputs of a matrix: their squares (K,), or the products of all pairs (K, K)."""

    def __init__(self, of_pairs: bool) -> None:
        self.of_pairs = of_pairs
        self.total: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        rows = rows.float()
        found = rows.t() @ rows if self.of_pairs else rows.square().sum(0)
        self.total = found if self.total is None else self.total + found


def _compensates(by: Sparsity) -> bool:
    return isinstance(by, SparseGPT) or (isinstance(by, NM) and by.criterion == "sparsegpt")


def _prune(site: Site, by: Sparsity, total: Tensor | None) -> Tensor:
    """Prune one matrix by what its inputs sum to, or by magnitude where that is not known; returns its mask."""
    weight = site.matrix
    if total is not None and _compensates(by):
        if isinstance(by, SparseGPT):
            left, mask = sparsegpt(weight, total, by.sparsity, by.damping)
        else:
            assert isinstance(by, NM)
            left, mask = sparsegpt(weight, total, (by.n, by.m), SparseGPT.damping)
        weight.copy_(left)
    else:
        worth = weight.float().abs() if total is None else wanda(weight, total)
        mask = _rule(by)(worth)
        weight.masked_fill_(~mask, 0)
    return mask.t().contiguous() if site.transposed else mask


def _rule(by: Sparsity) -> Callable[[Tensor], Tensor]:
    """From what the weights are worth to the mask."""
    if isinstance(by, NM):
        return lambda worth: keep_of_groups(worth, by.n, by.m)
    assert isinstance(by, Part)
    return lambda worth: keep_largest_of_rows(worth, by.sparsity)
