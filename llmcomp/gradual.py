"""Weights that are pruned a little more at a time: how each way of pruning looks at a part of its target.

Magnitude, Block    that part of the weights, of each matrix or of all together
NM(2, 4)            3 of 4 stay once a quarter is to go, 2 of 4 at the end
Structured          that part of the heads, channels and layers that are to go
Movement            that part, by what training has told by then
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from llmcomp.masks import Held, held, hold
from llmcomp.pruning import Plan, mask_of, masks_together
from llmcomp.saliency import keep_largest
from llmcomp.sparsity import NM, Block, Magnitude, Movement, Sparsity
from llmcomp.unit_worth import worth_of
from llmcomp.units import Units

Rise = Callable[[float], float]
"""From the part of the weights that is to go in the end to what is to go now."""
NEARLY = 1e-9  # 1 / 49 * 49 is a little less than 1


class Gradual:
    """A parameter on its way to its zeros."""

    def __init__(self, name: str, holders: tuple[nn.Module, ...], key: str, mask: Tensor) -> None:
        self.name, self.holders, self.key = name, holders, key
        hold(holders, key, mask)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter; load_state_dict(assign=True) may have put another there."""
        weight = self.holders[0]._parameters[self.key]
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def held(self) -> Held:
        """What keeps the weight at zero, also where somebody let it go."""
        return held(self.weight) or hold(self.holders, self.key, self.weight.detach() != 0)

    def state(self) -> dict[str, Tensor]:
        """Its mask, and what else is known of it."""
        return {"mask": self.held.mask.clone()}

    def misfit(self, state: object) -> str | None:
        """Why a state is not that of this parameter, or None."""
        if not isinstance(state, Mapping):
            return f"for {self.name} {state!r}"
        if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            return f"for {self.name} {wrong[0]}={state[wrong[0]]!r}"
        mine = {key: (value.shape, value.dtype) for key, value in self.state().items()}
        found = {key: (value.shape, value.dtype) for key, value in state.items()}
        return None if mine == found else f"for {self.name} {found}, not {mine}"

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.held.mask = state["mask"].to(self.weight.device, copy=True)
        self.held.apply()

    def lose(self, mask: Tensor) -> None:
        """Set more weights to zero."""
        kept = self.held
        kept.mask = mask & kept.mask.to(mask.device)
        kept.apply()


class Moving(Gradual):
    """One that is pruned by movement: with what its weights are worth, and the values of those that are pruned."""

    def __init__(self, name: str, holders: tuple[nn.Module, ...], key: str, mask: Tensor) -> None:
        super().__init__(name, holders, key, mask)
        weight = self.weight.detach()
        self.worth, self.values = torch.zeros_like(weight, dtype=torch.float32), weight.clone()
        self.is_measured = self.warned = False
        self.held.watch = self._watch

    @property
    def held(self) -> Held:
        """What keeps the weight at zero, and sees its gradients."""
        found = super().held
        found.watch = self._watch
        return found

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "worth": self.worth.clone(), "values": self.values.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.worth, self.values = (state[key].to(self.weight.device, copy=True) for key in ("worth", "values"))
        self.is_measured = bool(self.worth.any())
        super().load(state)

    def _watch(self, gradient: Tensor) -> None:
        values = torch.where(self.held.mask, self.weight.detach(), self.values)
        self.is_measured = True
        self.worth -= values.float() * gradient.float()

    @torch.no_grad()
    def move(self, sparsity: float) -> None:
        """Let the weights of least worth go, and others come back."""
        self.values = torch.where(self.held.mask, self.weight, self.values)
        self.held.mask = keep_largest(self.worth, sparsity)
        self.weight.copy_(self.values)
        self.held.apply()


# ---- ways of pruning ------------------------------------------------------------------------------------------------


def _due(rise: Rise, number: int, count: int) -> int:
    """How many go now, where so many of so many are to go in the end."""
    return int(rise(number / count) * count + NEARLY)


class Way(Protocol):
    """Parameters that are pruned in one way."""

    @property
    def parameters(self) -> Sequence[Gradual]:
        """All of them."""

    def prune(self, rise: Rise) -> None:
        """Prune as much as is due."""


class ByWeights:
    """Matrices that one value prunes by their weights: each by itself, or all together."""

    def __init__(self, by: Magnitude | Block | NM, plans: Sequence[Plan]) -> None:
        self.by, self.transposed = by, [plan.site.transposed for plan in plans]
        self.parameters = [Gradual(*_named(plan)) for plan in plans]

    @torch.no_grad()
    def prune(self, rise: Rise) -> None:
        weights = [parameter.weight for parameter in self.parameters]
        if isinstance(self.by, Magnitude) and self.by.scope == "global":
            masks = masks_together(weights, rise(self.by.sparsity))
        else:
            masks = [self._mask(w, turned, rise) for w, turned in zip(weights, self.transposed, strict=True)]
        for parameter, mask in zip(self.parameters, masks, strict=True):
            parameter.lose(mask)

    def _mask(self, weight: Tensor, transposed: bool, rise: Rise) -> Tensor:
        if not isinstance(self.by, NM):
            return mask_of(weight, replace(self.by, sparsity=rise(self.by.sparsity)), transposed)
        n, m = self.by.n, self.by.m
        gone = _due(rise, m - n, m)
        return mask_of(weight, NM(m - gone, m), transposed) if gone else torch.ones_like(weight, dtype=torch.bool)


class ByMovement:
    """Matrices that one value prunes by movement."""

    def __init__(self, by: Movement, plans: Sequence[Plan]) -> None:
        self.sparsity, self.parameters = by.sparsity, [Moving(*_named(plan)) for plan in plans]

    def prune(self, rise: Rise) -> None:
        for matrix in self.parameters:
            if matrix.is_measured:
                matrix.move(rise(self.sparsity))


def way_of(by: Sparsity, plans: Sequence[Plan]) -> Way:
    """How matrices are pruned by a value."""
    if isinstance(by, Movement):
        return ByMovement(by, plans)
    assert isinstance(by, Magnitude | Block | NM), f"{by} is not gradual"
    return ByWeights(by, plans)


def _named(plan: Plan) -> tuple[str, tuple[nn.Module, ...], str, Tensor]:
    return plan.site.name, plan.site.holders, "weight", plan.site.weight.detach() != 0


class OfUnits:
    """Parameters that lose heads, channels and layers of least magnitude."""

    def __init__(self, model: nn.Module, units: Units) -> None:
        self.model, self.units = model, units
        self.parameters = [Gradual(name, (m,), key, _free(m, key)) for name, m, key in units.parameters(model)]

    def prune(self, rise: Rise) -> None:
        found = self.units
        worth = worth_of(self.model, found.layers, found.blocks, found.by.criterion, ())
        masks = found.masks(worth, partial(_due, rise)).masks
        for parameter in self.parameters:
            if (mask := masks.get(id(parameter.weight))) is not None:
                parameter.lose(mask)


def _free(module: nn.Module, key: str) -> Tensor:
    """Where a parameter is free to change now: zeros that nobody chose are."""
    parameter = module._parameters[key]
    assert parameter is not None
    before = held(parameter)
    return torch.ones_like(parameter, dtype=torch.bool) if before is None else before.mask
