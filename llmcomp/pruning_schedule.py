"""Pruning while a model is trained: a little more after every few steps of the optimizer, up to a target.

    schedule = llmcomp.PruningSchedule(model, llmcomp.Movement(0.5), steps=1000)
    for batch in batches:
        model(**batch).loss.backward(); optimizer.step(); schedule.step(); optimizer.zero_grad()

The part that is pruned rises from `initial` to the target as 1 - (1 - t) ** 3 (Zhu and Gupta 2017, arXiv:1710.01878):
fast at first, while there is much to choose from.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import OptionError, PruneError
from llmcomp.masks import Held, held, hold
from llmcomp.pruning import PruneSpec, Pruning, planned, pruning_of
from llmcomp.saliency import keep_largest
from llmcomp.sparsity import Magnitude, Movement, Sparsity, parse_sparsity, require_fraction


def cubic(progress: float, initial: float, final: float) -> float:
    """The sparsity at `progress` in [0, 1]."""
    return final + (initial - final) * (1 - progress) ** 3


def _require_gradual(by: Sparsity) -> None:
    """Refuse what has no sparsity of each matrix that could rise.

    Raises:
        OptionError: says which can.
    """
    if not isinstance(by, Magnitude | Movement) or getattr(by, "scope", "tensor") != "tensor":
        raise OptionError(
            f"expected Magnitude of each tensor, or Movement, in a schedule, found {by!r}: pass Magnitude(0.5), which "
            'is "50%", or Movement(0.5); all others prune at once, by llmcomp.prune_'
        )


class PruningSchedule:
    """Prunes `model` by `step()` calls. At the end, and when it is dropped before it, the masks go on to hold."""

    def __init__(
        self, model: nn.Module, spec: PruneSpec, steps: int, begin: int = 0, every: int = 1, initial: float = 0.0
    ) -> None:
        """`spec` as for `prune_`, of Magnitude and Movement; steps `begin` to `begin + steps` prune, each `every`-th.

        Raises:
            OptionError: an unknown spec, or a schedule that does not end.
            PruneError: a matrix that is chosen is not trained, or does not fit. The model is then as it was.
        """
        for name, value, least in (("steps", steps, 1), ("begin", begin, 0), ("every", every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(
                    f"expected {name} to be a whole number from {least} on, found {value!r}: pass steps=1000"
                )
        if every > steps:
            raise OptionError(
                f"expected the schedule to prune in its {steps} steps, found every={every}: pass a smaller one"
            )
        require_fraction("initial", initial)
        self.steps, self.begin, self.every, self.initial, self.count = steps, begin, every, initial, 0
        given = parse_sparsity(spec) if isinstance(spec, str) else spec
        if isinstance(given, Sparsity):
            _require_gradual(given)
        self._plans = planned(model, given)
        chosen = [plan for plan in self._plans if plan.by is not None]
        for plan in chosen:
            assert plan.by is not None
            _require_gradual(plan.by)
            if not plan.site.weight.requires_grad:
                raise PruneError(f"expected weights that are trained, found {plan.site.name} frozen: leave it out")
        if not chosen:
            left = "; ".join(f"{plan.site.label}: {plan.reason}" for plan in self._plans[:3]) or "it has none"
            raise PruneError(f"expected matrices to prune in this model, found none ({left}): pass another spec")
        self._matrices = [
            _Matrix(plan.site.name, plan.site.holders, plan.by.sparsity, isinstance(plan.by, Movement))
            for plan in chosen
            if isinstance(plan.by, Magnitude | Movement)
        ]

    @property
    def progress(self) -> float:
        """How much of the schedule is done, in [0, 1]."""
        return min(max(self.count - self.begin, 0) / self.steps, 1.0)

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.progress == 1

    def step(self) -> None:
        """To be called after each step of the optimizer.

        Raises:
            PruneError: it is time to prune, by movement, and no gradient was ever seen.
        """
        passed = self.count + 1 - self.begin
        prunes = 0 < passed <= self.steps and (passed % self.every == 0 or passed == self.steps)
        matrices = self._measured() if prunes else []
        self.count += 1
        for matrix in matrices:
            matrix.prune(cubic(self.progress, min(self.initial, matrix.target), matrix.target))

    def _measured(self) -> list["_Matrix"]:
        """The matrices of which is known what their weights are worth."""
        found = [matrix for matrix in self._matrices if matrix.is_measured]
        missing = [matrix for matrix in self._matrices if not matrix.is_measured]
        if missing and not found:
            raise PruneError(
                f"expected gradients of {missing[0].name} to prune by movement, found none since the schedule began: "
                "call backward() before step(), on the model that the schedule was made for"
            )
        for matrix in missing:
            if not matrix.warned:
                matrix.warned = True
                warnings.warn(f"{matrix.name} is not pruned yet: no gradient has reached it", stacklevel=3)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: steps, masks, and what movement has measured. The weights are the model's."""
        return {"count": self.count, "matrices": {m.name: m.state() for m in self._matrices}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a schedule of the same model and spec was; to be called after the weights are loaded.

        Raises:
            PruneError: it is the state of another schedule. This one is then as it was.
        """
        if (problem := self._misfit(state)) is not None:
            raise PruneError(
                f"expected the state of a schedule of {', '.join(m.name for m in self._matrices)}, found {problem}: "
                "pass what state_dict() of a schedule of the same model and spec gave"
            )
        self.count, given = state["count"], state["matrices"]
        for matrix in self._matrices:
            matrix.load(given[matrix.name])

    def _misfit(self, state: object) -> str | None:
        """Why something is not the state of this schedule, or None."""
        if not isinstance(state, Mapping):
            return repr(state)
        count, given = state.get("count"), state.get("matrices")
        if not isinstance(given, Mapping) or set(given) != {m.name for m in self._matrices}:
            return (
                f"one of {', '.join(map(str, given)) or 'none'}" if isinstance(given, Mapping) else f"one of {given!r}"
            )
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            return f"count={count!r}"
        return next((problem for m in self._matrices if (problem := m.misfit(given[m.name])) is not None), None)

    def report(self) -> Pruning:
        """What is pruned by now, matrix by matrix."""
        return pruning_of(self._plans)


class _Matrix:
    """One weight on its way; by movement, with what it is worth, and the values of what is pruned."""

    def __init__(self, name: str, holders: tuple[nn.Module, ...], target: float, moves: bool) -> None:
        self.name, self.holders, self.target = name, holders, target
        weight = self.weight
        self.worth = torch.zeros_like(weight, dtype=torch.float32) if moves else None
        self.values = weight.detach().clone() if moves else None
        self.is_measured, self.warned = not moves, False
        hold(holders, "weight", weight.detach() != 0).watch = self._watch if moves else None

    @property
    def weight(self) -> nn.Parameter:
        """The weight; load_state_dict(assign=True) may have put another there."""
        weight = self.holders[0]._parameters["weight"]
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def held(self) -> Held:
        """What keeps the weight at zero, also where somebody let it go."""
        found = held(self.weight)
        if found is None:
            found = hold(self.holders, "weight", self.weight.detach() != 0)
            found.watch = self._watch if self.worth is not None else None
        return found

    def state(self) -> dict[str, Tensor]:
        state = {"mask": self.held.mask, "worth": self.worth, "values": self.values}
        return {key: value.clone() for key, value in state.items() if value is not None}

    def misfit(self, state: object) -> str | None:
        """Why a state is not that of this matrix, or None."""
        if not isinstance(state, Mapping):
            return f"for {self.name} {state!r}"
        if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            return f"for {self.name} {wrong[0]}={state[wrong[0]]!r}"
        mine = {key: (value.shape, value.dtype) for key, value in self.state().items()}
        found = {key: (value.shape, value.dtype) for key, value in state.items()}
        return None if mine == found else f"for {self.name} {found}, not {mine}"

    def load(self, state: Mapping[str, Tensor]) -> None:
        device = self.weight.device
        self.held.mask = state["mask"].to(device, copy=True)
        if self.worth is not None:
            self.worth, self.values = (state[key].to(device, copy=True) for key in ("worth", "values"))
            self.is_measured = bool(self.worth.any())
        self.held.apply()

    def _watch(self, gradient: Tensor) -> None:
        assert self.worth is not None and self.values is not None
        values = torch.where(self.held.mask, self.weight.detach(), self.values)
        self.is_measured = True
        self.worth -= values.float() * gradient.float()

    @torch.no_grad()
    def prune(self, sparsity: float) -> None:
        if self.worth is None or self.values is None:
            self.held.mask = keep_largest(self.weight.float().abs(), sparsity) & self.held.mask
        else:
            self.values = torch.where(self.held.mask, self.weight, self.values)
            self.held.mask = keep_largest(self.worth, sparsity)
            self.weight.copy_(self.values)
        self.held.apply()
