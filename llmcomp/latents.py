"""Weights that are trained as floats and used as what a storage format makes of them: straight-through training.

    weight            holds what the format makes of the latent value: forward and backward see that
    optimizer.step()  updates the latent value, with the gradient of the weight as its own; then the weight follows
    ... (closure)     sees what the format makes of the latent values that the optimizer tries

The gradient passes rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432). Nothing is added to the
graph, and what is written into a weight becomes its latent value at the next step. `state_dict` has the latent values,
from which quantizing makes what was trained with; loading one makes them latent. Masks of llmcomp/masks.py hold too.
"""

import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from llmcomp.formats import Format
from llmcomp.masks import held
from llmcomp.quantized import QuantizedTensor

LATENT = "_llmcomp_latent"
Closure = Callable[[], Any]


class Latent:
    """The float values behind a parameter (N, K), or (K, N) where `transposed`."""

    def __init__(self, parameter: nn.Parameter, format: Format, transposed: bool, values: Tensor | None = None) -> None:
        _install()
        self.parameter, self.format, self.transposed = parameter, format, transposed
        self.values = parameter.detach().clone() if values is None else values
        self._stepper: weakref.ref[torch.optim.Optimizer] | None = None
        setattr(parameter, LATENT, self)
        self._use()

    def rounded(self) -> Tensor:
        """What the format makes of the latent values: what `quantize_` will store."""
        return QuantizedTensor.quantize(self.values, self.format, self.transposed).dequantize()

    @torch.no_grad()
    def _use(self) -> None:
        self.parameter.copy_(self.rounded())
        self._version = self.parameter._version

    @property
    def stepper(self) -> torch.optim.Optimizer | None:
        """The optimizer that is taking a step: the parameter holds the latent values."""
        return None if self._stepper is None else self._stepper()

    @torch.no_grad()
    def current(self) -> Tensor:
        """The latent values, those among them that others wrote into the parameter since."""
        self.values = self.values.to(self.parameter)  # the model may have been moved
        values = self.values
        if self.parameter._version != self._version:
            values = torch.where(self.parameter == self.rounded(), values, self.parameter)
        mask = held(self.parameter)
        return values if mask is None else values.masked_fill(~mask.mask.to(values.device), 0)

    @torch.no_grad()
    def lend(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the latent values into the parameter, for a step."""
        if self.stepper is None:
            self.values = self.current()
            self.parameter.copy_(self.values)
            self._stepper = weakref.ref(optimizer)

    @torch.no_grad()
    def follow(self) -> None:
        """Take what the parameter holds for the latent values, and let it hold what the format makes of them."""
        if (mask := held(self.parameter)) is not None:
            mask.apply()
        self.values = self.parameter.detach().clone()
        self._stepper = None
        self._use()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Latent":
        return Latent(deepcopy(self.parameter, memo), self.format, self.transposed, self.current().clone())

    def __reduce__(self) -> tuple[Any, ...]:
        return Latent, (self.parameter, self.format, self.transposed, self.current())


def train_latent(holders: Sequence[nn.Module], format: Format, transposed: bool) -> Latent:
    """Let the weight that `holders` share be used as `format` makes it."""
    parameter = holders[0]._parameters["weight"]
    assert isinstance(parameter, nn.Parameter)
    before = latent_of(parameter)
    made = Latent(parameter, format, transposed, None if before is None else before.current())
    for module in holders:
        if LATENT not in module.__dict__:
            module.register_state_dict_post_hook(_save)
            module.register_load_state_dict_post_hook(_loaded)
        module.__dict__[LATENT] = made
    return made


def latent_of(parameter: Tensor) -> Latent | None:
    """What keeps the latent values of a parameter, if it has any."""
    found: Latent | None = getattr(parameter, LATENT, None)
    return found


def forget(module: nn.Module) -> None:
    """Drop the latent values of a module whose weight has been replaced."""
    if LATENT in module.__dict__:
        module.__dict__[LATENT] = None


def _latent_in(module: nn.Module) -> Latent | None:
    found: Latent | None = module.__dict__.get(LATENT)
    return found if found is not None and module._parameters.get("weight") is found.parameter else None


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if (latent := _latent_in(module)) is not None and f"{prefix}weight" in state:
        state[f"{prefix}weight"] = latent.current()


def _loaded(module: nn.Module, problems: Any) -> None:
    latent: Latent | None = module.__dict__.get(LATENT)
    parameter = module._parameters.get("weight")
    if latent is None or parameter is None:
        return
    if parameter is not latent.parameter:  # load_state_dict(assign=True)
        module.__dict__[LATENT] = latent_of(parameter) or Latent(parameter, latent.format, latent.transposed)
    elif parameter._version != latent._version:
        latent.follow()


@cache
def _install() -> None:
    """Torch's optimizers tell us of every step, once for the process."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    latents = _of(optimizer)
    for latent in latents:
        latent.lend(optimizer)
    if not latents:
        return None
    if len(args) > 1 and args[1] is not None:  # after the optimizer itself
        return (args[0], _evaluating(args[1], latents), *args[2:]), kwargs
    if kwargs.get("closure") is not None:
        return args, kwargs | {"closure": _evaluating(kwargs["closure"], latents)}
    return None


def _evaluating(closure: Closure, latents: Sequence[Latent]) -> Closure:
    """A closure that finds in the parameters what formats make of what an optimizer put there."""

    def evaluate() -> Any:
        lent = [(latent, optimizer) for latent in latents if (optimizer := latent.stepper) is not None]
        for latent, _ in lent:
            latent.follow()
        try:
            return closure()
        finally:
            for latent, optimizer in lent:
                latent.lend(optimizer)

    return evaluate


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for latent in _of(optimizer):
        if latent.stepper is None or latent.stepper is optimizer:  # else this step is a part of another's
            latent.lend(optimizer)
            latent.follow()


def _of(optimizer: torch.optim.Optimizer) -> list[Latent]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [latent for p in parameters if (latent := latent_of(p)) is not None]
