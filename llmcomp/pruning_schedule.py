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

from torch import Tensor, nn

from llmcomp.errors import OptionError, PruneError
from llmcomp.gradual import Moving, OfUnits, Way, way_of
from llmcomp.pruning import Plan, PruneSpec, Pruning, planned, pruning_of, pruning_of_units, require_model
from llmcomp.sparsity import Sparsity, Structured, Zeros, parse_sparsity, require_fraction
from llmcomp.units import Units


def cubic(progress: float, initial: float, final: float) -> float:
    """The sparsity at `progress` in [0, 1]."""
    return final + (initial - final) * (1 - progress) ** 3


def _require_gradual(by: Sparsity) -> None:
    """Refuse what can't be chosen again at each step, or has nothing that could rise.

    Raises:
        OptionError: says why.
    """
    if by.needs_data:
        raise OptionError(
            f"expected weights that a schedule can choose again at each step, found {by!r}, which runs the model on "
            "calibration data to choose: choose by magnitude or Movement(0.5), or prune at once, by llmcomp.prune_"
        )
    if isinstance(by, Zeros):
        raise OptionError(
            'expected a part that rises, found Zeros(), which holds what is zero: pass "50%", or call llmcomp.prune_'
        )


class PruningSchedule:
    """Prunes `model` by `step()` calls. At the end, and when it is dropped before it, the masks go on to hold."""

    def __init__(
        self, model: nn.Module, spec: PruneSpec, steps: int, begin: int = 0, every: int = 1, initial: float = 0.0
    ) -> None:
        """`spec` as for `prune_`, of what needs no data, or Movement; steps `begin` to `begin + steps` prune, each
        `every`-th. llmcomp/gradual.py says what a part of a target is.

        Raises:
            OptionError: an unknown spec, one that can't be followed step by step, or a schedule that does not end.
            PruneError: a weight that is chosen is not trained, or does not fit, or units that can't be removed (see
                `prune_`). The model is then as it was.
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
        self._model, self._given = model, given
        self._plans = [] if isinstance(given, Structured) else planned(model, given)
        self._ways = self._of_units(given) if isinstance(given, Structured) else self._of_matrices()
        self._parameters = [parameter for way in self._ways for parameter in way.parameters]

    def _of_matrices(self) -> list[Way]:
        together: dict[Sparsity, list[Plan]] = {}
        for plan in self._plans:
            if plan.by is not None:
                _require_gradual(plan.by)
                _require_trained(plan.site.name, plan.site.weight)
                together.setdefault(plan.by, []).append(plan)
        if not together:
            left = "; ".join(f"{plan.site.label}: {plan.reason}" for plan in self._plans[:3]) or "it has none"
            raise PruneError(f"expected matrices to prune in this model, found none ({left}): pass another spec")
        return [way_of(by, plans) for by, plans in together.items()]

    def _of_units(self, by: Structured) -> list[Way]:
        require_model(self._model)
        units = Units(self._model, by)
        if not units.wanted:
            raise PruneError(f"expected heads, channels or layers to remove, found less than one of them in {by}")
        for name, module, key in units.parameters(self._model):
            _require_trained(name, module._parameters[key])
        return [OfUnits(self._model, units)]

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
        if prunes:
            self._require_measured()
        self.count += 1
        for way in self._ways if prunes else ():
            way.prune(lambda target: cubic(self.progress, min(self.initial, target), target))

    def _require_measured(self) -> None:
        """Ask that for some matrix it is known what its weights are worth, and tell of those for which it is not."""
        missing = [p for p in self._parameters if isinstance(p, Moving) and not p.is_measured]
        if len(missing) == len(self._parameters):
            raise PruneError(
                f"expected gradients of {missing[0].name} to prune by movement, found none since the schedule began: "
                "call backward() before step(), on the model that the schedule was made for"
            )
        for matrix in missing:
            if not matrix.warned:
                matrix.warned = True
                warnings.warn(f"{matrix.name} is not pruned yet: no gradient has reached it", stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: steps, masks, and what movement has measured. The weights are the model's."""
        return {"count": self.count, "matrices": {m.name: m.state() for m in self._parameters}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a schedule of the same model and spec was; to be called after the weights are loaded.

        Raises:
            PruneError: it is the state of another schedule. This one is then as it was.
        """
        if (problem := self._misfit(state)) is not None:
            raise PruneError(
                f"expected the state of a schedule of {', '.join(m.name for m in self._parameters)}, found {problem}: "
                "pass what state_dict() of a schedule of the same model and spec gave"
            )
        self.count, given = state["count"], state["matrices"]
        for matrix in self._parameters:
            matrix.load(given[matrix.name])

    def _misfit(self, state: object) -> str | None:
        """Why something is not the state of this schedule, or None."""
        if not isinstance(state, Mapping):
            return repr(state)
        count, given = state.get("count"), state.get("matrices")
        if not isinstance(given, Mapping) or set(given) != {m.name for m in self._parameters}:
            return (
                f"one of {', '.join(map(str, given)) or 'none'}" if isinstance(given, Mapping) else f"one of {given!r}"
            )
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            return f"count={count!r}"
        return next((problem for m in self._parameters if (problem := m.misfit(given[m.name])) is not None), None)

    def report(self) -> Pruning:
        """What is pruned by now, matrix by matrix."""
        if not isinstance(self._given, Structured):
            return pruning_of(self._plans)
        pruned = {id(p.weight) for p in self._parameters if not bool(p.held.mask.all())}
        return pruning_of_units(self._model, self._given, pruned, {})


def _require_trained(name: str, weight: Tensor | None) -> None:
    if weight is None or not weight.requires_grad:
        raise PruneError(f"expected weights that are trained, found {name} frozen: leave it out")
