"""Whose parameters a compiled graph reads: for options that change the weights of the model itself.

parameters (inputs of a graph)  ->  the modules that hold them  ->  the models that those belong to
"""

import gc
from collections.abc import Sequence

from torch import Tensor, nn


def models_of(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The outermost living modules that hold any of `parameters`; of a wrapper of torch.compile, what it wraps."""
    wanted = {id(p) for p in parameters}
    # `isinstance` would ask weak proxies what they stand for.
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and "_modules" in o.__dict__]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    reached: dict[int, nn.Module] = {}
    pending = [m for m in modules if any(id(p) in wanted for p in m._parameters.values())]
    while pending:
        module = pending.pop()
        if id(module) not in reached:
            reached[id(module)] = module
            pending += parents.get(id(module), [])
    outermost = [_unwrapped(m) for m in reached.values() if not parents.get(id(m))]
    return list({id(m): m for m in outermost}.values())


def _unwrapped(module: nn.Module) -> nn.Module:
    while (wrapped := module._modules.get("_orig_mod")) is not None:
        module = wrapped
    return module
