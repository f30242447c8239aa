"""What llmcomp changes in the running process when its backend is first named; twice changes nothing more.

1. `torch.compile(model, backend="llmcomp").generate(...)` runs compiled. Torch forwards `generate` to the
   original module, whose calls are eager.
2. Dynamo's default limit of 8 graphs for one function becomes 256, because all transformers models share one
   function and the ninth graph of the process would silently run eager. A limit that the user set stays.
3. Passes become subsystems of torch's CompilerBisector.

Modules compiled by other backends behave as before, but for the new default of 2.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llmcomp import compat

# As many as Dynamo allows for one function in any case (accumulated_recompile_limit).
RECOMPILE_LIMIT = 256


def install(backend: Callable[..., Any], subsystems: Sequence[str]) -> None:
    """Register `backend` with torch; `subsystems` are the names of its passes, in order."""
    compat.raise_default_recompile_limit(RECOMPILE_LIMIT)
    compat.add_bisect_subsystems("llmcomp", subsystems)
    compat.optimized_module().generate = _generate_of(backend)


def _generate_of(backend: Callable[..., Any]) -> property:
    """The attribute `generate` of compiled modules."""

    def get(compiled: Any) -> Any:
        if compat.backend_of(compiled) is not backend:
            # Python then asks the module's __getattr__, which forwards to the original module as ever.
            raise AttributeError("generate")
        return stand_in(compiled._orig_mod, compiled).generate

    def set_(compiled: Any, value: object) -> None:
        compiled._orig_mod.generate = value

    def delete(compiled: Any) -> None:
        del compiled._orig_mod.generate

    return property(get, set_, delete)


def behind(model: Any) -> tuple[Any, Callable[..., Any]] | None:
    """The module that `model` stands in for and its compiled calls; None where it is no stand-in."""
    found: tuple[Any, Callable[..., Any]] | None = getattr(type(model), "_llmcomp_behind", None)
    return found


def stand_in(original: Any, call: Callable[..., Any]) -> Any:
    """Return an object that is the module `original` in everything but its calls, which are those of `call`.

    It shares the attributes of that module, so what is set on one is set on the other. The module itself is
    left as it is: eager, in other threads and during the call too.
    """
    kind = type(original)
    names = {
        "__call__": lambda self, *args, **kwargs: call(*args, **kwargs),
        # Transformers would compile decoding with a static cache once more, with Inductor.
        "get_compiled_call": lambda self, compile_config: self.__call__,
        "_llmcomp_behind": (original, call),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    made: Any = object.__new__(type(kind.__name__, (kind,), names))
    object.__setattr__(made, "__dict__", original.__dict__)
    return made
