"""Where a model keeps its matrices, each once, and which of them a mapping of patterns or a function means.

sites(model)      linear layers and embeddings, by the names of their modules: model.layers.0.mlp.up_proj
experts(model)    matrices of experts, several in one parameter, by its name: model.layers.0.mlp.experts.down_proj
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

from llmcomp.errors import OptionError

T = TypeVar("T")
Chosen = Callable[["Site"], tuple[T | None, str]]
"""What is done to a matrix: (it, ""), or (None, why nothing is)."""
EXPERTS = ("is_transposed", "has_gate", "has_bias")  # what the decorator of transformers notes on a module
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
ROOT = "(the layer itself)"  # a layer that is the model has no name


@dataclass(frozen=True)
class Site:
    """A matrix of weights and every module that holds it: several where weights are tied.

    `elsewhere` names a parameter that it is too, of a module that is neither a linear layer nor an embedding. `key` is
    the attribute of the holders that is the weight. One of experts holds several matrices (E, N, K).
    """

    name: str
    holders: tuple[nn.Module, ...]
    weight: Tensor
    transposed: bool
    is_head: bool
    elsewhere: str = ""
    key: str = "weight"

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or ROOT

    @property
    def matrix(self) -> Tensor:
        """The weight as (N, K), a view where it is kept as (K, N); (E, N, K) of experts."""
        return self.weight.mT if self.transposed else self.weight

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Each matrix (N, K)."""
        return self.matrix.unbind() if self.is_experts else (self.matrix,)

    @property
    def is_experts(self) -> bool:
        """Whether these are matrices of experts."""
        return self.key != "weight"

    def parameter(self, name: str) -> str:
        """The parameter that a name of this (one of `names_of`) stands for."""
        return name if self.is_experts else f"{name}.weight".lstrip(".")


def sites(model: nn.Module, tied: Mapping[str, str] | None = None) -> Iterator[Site]:
    """The matrices of linear layers and embeddings of a model, each once, in the order of its modules.

    `tied`: pairs of names of parameters that count as one.
    """
    head, held = _head(model), _held(model, tied or {})
    for parameters in held.values():
        holders = [(name, m) for name, key, m in parameters if key == "weight" and _reads(m)]
        linear = [pair for pair in holders if is_linear(pair[1])]
        if not holders:
            continue
        name, module = (linear or holders)[0]
        weight = module._parameters["weight"]
        assert weight is not None
        modules = tuple({id(m): m for _, m in holders}.values())
        is_head = (bool(linear) and len(linear) < len(holders)) or any(m is head for m in modules)
        others = [f"{name}.{key}".lstrip(".") for name, key, m in parameters if key != "weight" or not _reads(m)]
        yield Site(name, modules, weight, is_conv(module), is_head, others[0] if others else "")


def experts(model: nn.Module) -> Iterator[Site]:
    """The matrices of experts that transformers multiplies with sorted rows (`use_experts_implementation`)."""
    for name, module in model.named_modules():
        if not has_experts(module):
            continue
        for key, weight in module._parameters.items():
            if weight is not None and weight.dim() == 3 and key in PROJECTIONS:
                yield Site(f"{name}.{key}".lstrip("."), (module,), weight, is_transposed(module), False, key=key)


def computed_sites(model: nn.Module) -> Iterator[Site]:
    """Matrices of linear layers and embeddings whose weight is no parameter: it is computed of others in every call."""
    head = _head(model)
    for name, module in model.named_modules():
        if _reads(module) and why_computed(module) is not None and isinstance(weight := module.weight, Tensor):
            yield Site(name, (module,), weight.detach(), is_conv(module), module is head)


def why_computed(module: nn.Module, key: str = "weight") -> str | None:
    """What computes an attribute that a module has for a parameter, and how that is ended; None where it is one."""
    if key in module._parameters or not isinstance(getattr(module, key, None), Tensor):
        return None
    if f"{key}_orig" in module._parameters and f"{key}_mask" in module._buffers:
        return f'torch.nn.utils.prune masks it: call torch.nn.utils.prune.remove(module, "{key}") first'
    return f"its {key} is computed in every call: end that first, as torch.nn.utils.parametrize.remove_parametrizations"


def has_experts(module: nn.Module) -> bool:
    """Whether a module is experts of transformers."""
    return all(isinstance(getattr(module, mark, None), bool) for mark in EXPERTS)


def _held(model: nn.Module, tied: Mapping[str, str]) -> dict[int, list[tuple[str, str, nn.Module]]]:
    """Every parameter by its identity: the modules that hold it, with their names and that of the attribute."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                of = named.get(tied.get(f"{name}.{key}", ""), parameter)
                found.setdefault(id(of), []).append((name, key, module))
    return found


def _reads(module: nn.Module) -> bool:
    """Whether a module takes its weight for a matrix that may be quantized."""
    return is_linear(module) or isinstance(module, nn.Embedding)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer that keeps its weight as (K, N)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weights as (K, N), or as (E, K, N)."""
    return is_conv(module) or (has_experts(module) and bool(module.is_transposed))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv(module)


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits, where the model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # transformers' way of saying that there is none
        return None
    return head if isinstance(head, nn.Module) else None


def names_of(model: nn.Module, site: Site) -> list[tuple[str, nn.Module]]:
    """The modules that hold a weight, with their names; of experts, with that of the parameter."""
    if site.is_experts:
        return [(site.name, site.holders[0])]
    held = {id(holder) for holder in site.holders}
    return [(name, m) for name, m in model.named_modules(remove_duplicate=False) if id(m) in held]


def reading_key(module: nn.Module) -> str:
    """The attribute that multiplies what a module is given: of experts their first projection."""
    if not has_experts(module):
        return "weight"
    return "gate_up_proj" if module.has_gate else "up_proj"


def matrix(module: nn.Module) -> Tensor:
    """The weight that a linear layer multiplies what it is given by, as (N, K), a view where it is kept as (K, N); of
    experts (E, N, K)."""
    weight = getattr(module, reading_key(module))
    assert isinstance(weight, Tensor)
    return weight.mT if is_transposed(module) else weight


# ---- which of them --------------------------------------------------------------------------------------------------


def by_patterns(model: nn.Module, choices: Mapping[str, T | None], found: Iterable[Site]) -> Chosen[T]:
    """The choice of the first pattern (as in `fnmatch`) that matches a name of one of the matrices `found`; None leaves
    it alone.

    Raises:
        OptionError: a pattern matches no matrix.
    """
    names = [name for site in found for name, _ in names_of(model, site)]
    for pattern in choices:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(
                f"expected every pattern to match a linear layer or an embedding, found {pattern!r}, which matches "
                f"none: the names are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )

    def choose(site: Site) -> tuple[T | None, str]:
        for pattern, choice in choices.items():
            if any(fnmatchcase(name, pattern) for name, _ in names_of(model, site)):
                return choice, "" if choice is not None else f"{pattern!r} leaves it alone"
        return None, "no pattern matches it"

    return choose


def by_function(model: nn.Module, function: Callable[[str, nn.Module], T | None]) -> Chosen[T]:
    """What a function of (name, module) chooses for one of the modules that hold a matrix; None leaves it alone."""

    def choose(site: Site) -> tuple[T | None, str]:
        found = (function(name, module) for name, module in names_of(model, site))
        choice = next((c for c in found if c is not None), None)
        return choice, "" if choice is not None else "the function leaves it alone"

    return choose
