"""Weights that stay zero: masks that hold through any torch optimizer.

    weight.grad      is zero where the mask is, as soon as it is computed
    weight           is set to zero there again after every step of every optimizer that updates it

The weight itself is plain and holds zeros, so it is saved and loaded as ever, by anybody; what is kept beside it (one
bool for each weight, in the module that owns it) follows `copy.deepcopy` and pickling of the module, and holds what
`load_state_dict` puts in its place.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

HELD = "_llmcomp_held"


Watch = Callable[[Tensor], None]


class Held:
    """A parameter and the mask (bool, of its shape) outside of which it stays zero.

    `watch` is shown every gradient before the mask is laid on it.
    """

    def __init__(self, parameter: nn.Parameter, mask: Tensor, watch: Watch | None = None) -> None:
        assert mask.shape == parameter.shape and mask.dtype == torch.bool
        _install()
        self.parameter, self.mask, self.watch = parameter, mask, watch
        setattr(parameter, HELD, self)
        self.hook = parameter.register_hook(self._of_gradient) if parameter.requires_grad else None
        self.apply()

    def _of_gradient(self, gradient: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(gradient)
        return gradient.masked_fill(~self.mask.to(gradient.device), 0)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the parameter to zero outside of the mask."""
        self.parameter.masked_fill_(~self.mask.to(self.parameter.device), 0)

    def release(self) -> None:
        """Let the parameter be."""
        if self.hook is not None:
            self.hook.remove()
        if getattr(self.parameter, HELD, None) is self:
            delattr(self.parameter, HELD)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        return Held(deepcopy(self.parameter, memo), self.mask.clone())

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (self.parameter, self.mask)


def hold(holders: Sequence[nn.Module], name: str, mask: Tensor) -> Held:
    """Keep the parameter `name` of `holders`, which share it, at zero outside of `mask`; replaces an earlier mask."""
    parameter = holders[0]._parameters[name]
    assert isinstance(parameter, nn.Parameter)
    if (before := held(parameter)) is not None:
        before.release()
    made = Held(parameter, mask, None if before is None else before.watch)
    for module in holders:
        module.__dict__.setdefault(HELD, {})[name] = made
        if _loaded not in module._load_state_dict_post_hooks.values():
            module.register_load_state_dict_post_hook(_loaded)
    return made


def _loaded(module: nn.Module, problems: Any) -> None:
    """Hold the parameters that load_state_dict(assign=True) put in the place of others."""
    kept: dict[str, Held] = module.__dict__.get(HELD, {})
    for name, before in kept.items():
        parameter = module._parameters.get(name)
        if parameter is not None and parameter is not before.parameter and parameter.shape == before.mask.shape:
            before.release()
            kept[name] = held(parameter) or Held(parameter, before.mask, before.watch)


def held(parameter: Tensor) -> Held | None:
    """What keeps a parameter at zero in places, if anything does."""
    found: Held | None = getattr(parameter, HELD, None)
    return found


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that hold in a model, by the names of the parameters: True where a weight is free to change."""
    found = {}
    for name, module in model.named_modules():
        for parameter, kept in module.__dict__.get(HELD, {}).items():
            found[f"{name}.{parameter}" if name else parameter] = kept.mask
    return found


def release(model: nn.Module) -> None:
    """Forget the masks of a model: its zeros may become other numbers again."""
    for module in model.modules():
        for kept in module.__dict__.pop(HELD, {}).values():
            kept.release()


@cache
def _install() -> None:
    """Torch's optimizers tell us of every step, once for the process."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (kept := held(parameter)) is not None:
                kept.apply()
