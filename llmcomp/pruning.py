"""`llmcomp.prune_`: weights of a model become zero, in place, and stay zero while it is trained.

    llmcomp.prune_(model, "2:4")
    llmcomp.prune_(model, llmcomp.Wanda(0.5), batches)                       # batches of token ids
    llmcomp.prune_(model, {"*.mlp.*": llmcomp.Magnitude(0.5), "*.self_attn.*": None})
    llmcomp.prune_(model, llmcomp.Structured(channels=0.25, layers=1))
    llmcomp.prune_(model, llmcomp.Zeros())                                   # hold what a loaded model has pruned

Masks are zeros of the weights themselves, which every way of saving keeps; llmcomp/masks.py says how they hold.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from llmcomp.errors import OptionError, PruneError
from llmcomp.masks import held, hold
from llmcomp.prune_data import prune_with_data
from llmcomp.quantized import QuantizedTensor
from llmcomp.saliency import keep_blocks, keep_largest, keep_of_groups
from llmcomp.sites import Chosen, Site, by_function, by_patterns, computed_sites, is_linear, sites, why_computed
from llmcomp.sparsity import NM, Block, Magnitude, Movement, Sparsity, Structured, Zeros, parse_sparsity
from llmcomp.token_batches import Batches, token_batches
from llmcomp.units import unit_masks

PruneChoice = Sparsity | str | None
PruneSpec = Sparsity | str | Mapping[str, PruneChoice] | Callable[[str, nn.Module], PruneChoice]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class PrunedRow:
    """What became of one parameter: `by` is None where it was left as it was, for `reason`."""

    name: str
    shape: tuple[int, ...]
    by: Sparsity | None
    reason: str
    zeros: int

    @property
    def sparsity(self) -> float:
        """The part of the weights that is zero."""
        count = torch.Size(self.shape).numel()
        return self.zeros / count if count else 0.0


@dataclass(frozen=True)
class Pruning:
    """What `prune_` did, parameter by parameter. Prints as a table."""

    rows: tuple[PrunedRow, ...]

    @property
    def pruned(self) -> tuple[PrunedRow, ...]:
        """The parameters with masks."""
        return tuple(r for r in self.rows if r.by is not None)

    @property
    def left(self) -> tuple[PrunedRow, ...]:
        """The parameters that were left alone, with the reason."""
        return tuple(r for r in self.rows if r.by is None)

    @property
    def sparsity(self) -> float:
        """The part of all these weights that is zero."""
        total = sum(torch.Size(r.shape).numel() for r in self.rows)
        return sum(r.zeros for r in self.rows) / total if total else 0.0

    def __str__(self) -> str:
        lines = [
            f"{r.name:40} {r.by!s:40} {r.sparsity:7.2%} zero" if r.by else f"{r.name:40} left alone: {r.reason}"
            for r in self.rows
        ]
        return "\n".join([*lines, f"{'together':40} {'':40} {self.sparsity:7.2%} zero"])


@dataclass(frozen=True)
class Plan:
    """One matrix and how it is pruned: by `by`, or not, for `reason`."""

    site: Site
    by: Sparsity | None
    reason: str


def prune_(model: nn.Module, spec: PruneSpec, batches: Batches | None = None) -> Pruning:
    """Set weights of `model` to zero in place, and keep them so; returns what became of each matrix.

    `spec` is a value of llmcomp/sparsity.py or its name ("2:4", "50%"), for all linear layers but the one that gives
    logits; or a mapping from patterns of module names to such values (the first that matches counts; None: leave it);
    or a function of (name, module). `batches`, for those that choose by data, are as for `calibrate`: token ids (batch,
    length), a few dozen of some hundred tokens. The masks of an earlier call go on to hold.

    Raises:
        OptionError: an unknown spec, or a pattern that no module matches.
        PruneError: data is needed and missing, a matrix does not fit what a mapping or function chose for it, or a
            model has no such units, or would keep none of them.
        FormatError: batches that are no token ids of the model.
            The model is then as it was.
    """
    given = parse_sparsity(spec) if isinstance(spec, str) else spec
    if isinstance(given, Structured):
        return _prune_units(model, given, batches)
    plans = planned(model, given)
    if any(isinstance(plan.by, Movement) for plan in plans):
        raise OptionError("expected weights to prune now, found Movement, which looks at training: use PruningSchedule")
    wanted = [plan for plan in plans if plan.by is not None]
    with_data = [plan for plan in wanted if plan.by is not None and plan.by.needs_data]
    if with_data:
        assert with_data[0].by is not None
        batches = _require_data(with_data[0].by, batches)
    masks = {id(plan.site): mask for plan, mask in by_weights([p for p in wanted if p.by and not p.by.needs_data])}
    if with_data and batches is not None:
        masks |= prune_with_data(model, [(plan.site, plan.by) for plan in with_data if plan.by], batches)
    for plan in wanted:
        _hold(plan.site, masks[id(plan.site)])
        if isinstance(plan.by, Zeros):
            _hold_biases(plan.site)
    return pruning_of(plans)


def _require_data(by: Sparsity, batches: Batches | None) -> Batches:
    """The batches.

    Raises:
        PruneError: there are none.
    """
    if batches is None:
        raise PruneError(f"expected batches of token ids for {by!r}, found none: pass prune_(model, spec, batches)")
    return batches


def planned(model: nn.Module, spec: object) -> list[Plan]:
    """How every matrix of linear layers and embeddings is pruned.

    Raises:
        OptionError, PruneError: see `prune_`.
    """
    require_model(model)
    choose = _chooser(model, spec)
    plans = []
    for site in _sites(model):
        by, reason = choose(site)
        if by is not None and (problem := _misfit(site, by)) is not None:
            if not isinstance(spec, Sparsity):
                raise PruneError(f"{site.name}: {problem}")
            by, reason = None, problem
        plans.append(Plan(site, by, reason))
    return plans


def require_model(model: object) -> None:
    """Refuse what has no weights with values.

    Raises:
        PruneError: says what was found.
    """
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise PruneError(f"expected a model (torch.nn.Module) to prune, found {found}: pass an instance")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            how = "is lazy: run the model once first" if is_lazy(parameter) else "is on the meta device: load it first"
            raise PruneError(f"expected weights with values to prune, found {name}, which {how}")


def _sites(model: nn.Module) -> list[Site]:
    """The matrices that may be pruned, and those that something else masks."""
    return [*sites(model), *computed_sites(model)]


def _misfit(site: Site, by: Sparsity) -> str | None:
    """Why a matrix can't be pruned so, or None."""
    weight, columns = site.weight, site.matrix.shape[-1]
    if (computed := why_computed(site.holders[0])) is not None:
        return computed
    if isinstance(weight, QuantizedTensor):
        return f"it is {weight.format}: prune a model before it is quantized"
    if weight.dtype not in FLOATS or 0 in weight.shape:
        return f"the weight is {weight.dtype} of shape {tuple(weight.shape)}"
    if isinstance(by, NM) and columns % by.m:
        return f"{by.m} does not divide its {columns} inputs"
    if isinstance(by, Block) and (by.height > site.matrix.shape[0] or by.width > columns):
        return f"it is {site.matrix.shape[0]} x {columns}, smaller than a block of {by.height} x {by.width}"
    if by.needs_data and not any(map(is_linear, site.holders)):
        return "it is an embedding, which has no inputs to measure: choose by magnitude"
    if not bool(torch.isfinite(weight).all()):
        raise PruneError(f"{site.name}: expected finite weights to prune, found NaN or infinity: repair the checkpoint")
    return None


def _chooser(model: nn.Module, spec: object) -> Chosen[Sparsity]:
    if isinstance(spec, Sparsity):
        return lambda site: _of_one(site, spec)
    if isinstance(spec, Mapping):
        return by_patterns(model, {str(pattern): _value(choice) for pattern, choice in spec.items()}, _sites(model))
    if isinstance(spec, type):
        raise OptionError(f"expected a way of pruning, found the class {spec.__name__}: pass {spec.__name__}()")
    if callable(spec):
        _require_two_arguments(spec)
        return by_function(model, lambda name, module: _value(spec(name, module)))
    raise OptionError(
        f"expected a way of pruning, a mapping from patterns of module names to such or a function, found {spec!r}: "
        'pass "2:4", for example'
    )


def _require_two_arguments(function: Callable[..., object]) -> None:
    try:
        signature(function).bind("name", nn.Identity())
    except TypeError as problem:
        raise OptionError(
            f"expected a function of (name, module) that says how to prune, found {function!r}: {problem}"
        ) from problem
    except ValueError:  # some of C have no signature
        return


def _value(choice: object) -> Sparsity | None:
    found = parse_sparsity(choice) if isinstance(choice, str) else choice
    if isinstance(found, Structured):
        raise OptionError(f"expected {found} for a whole model, found it for some of its modules: pass it by itself")
    if found is None or isinstance(found, Sparsity):
        return found
    raise OptionError(f"expected a way of pruning, its name or None, found {choice!r}: pass '2:4', for example")


def _of_one(site: Site, by: Sparsity) -> tuple[Sparsity | None, str]:
    if isinstance(by, Zeros):
        return (by, "") if bool((site.weight == 0).any()) else (None, "it holds no zeros")
    if not any(map(is_linear, site.holders)):
        return None, "it is an embedding"
    return (None, "it gives logits") if site.is_head else (by, "")


@torch.no_grad()
def by_weights(plans: Sequence[Plan]) -> list[tuple[Plan, Tensor]]:
    """The masks of matrices that are pruned by their weights alone, shaped like the weights."""
    together: dict[Sparsity, list[Plan]] = {}
    for plan in plans:
        assert plan.by is not None
        together.setdefault(plan.by, []).append(plan)
    made: list[tuple[Plan, Tensor]] = []
    for by, group in together.items():
        if isinstance(by, Magnitude) and by.scope == "global":
            made += zip(group, masks_together([plan.site.weight for plan in group], by.sparsity), strict=True)
        else:
            made += [(plan, mask_of(plan.site.weight, by, plan.site.transposed)) for plan in group]
    return made


def masks_together(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """The masks of matrices of which a part goes, the smallest weights of all of them."""
    worth = torch.cat([weight.float().abs().flatten() for weight in weights])
    parts = keep_largest(worth, sparsity).split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


@torch.no_grad()
def mask_of(weight: Tensor, by: Sparsity, transposed: bool = False) -> Tensor:
    """The mask of one matrix (N, K), or (K, N) where `transposed`, that is chosen by its weights."""
    match by:
        case Zeros():
            return weight != 0
        case Magnitude():
            return keep_largest(weight.float().abs(), by.sparsity)
        case NM() | Block():
            worth = weight.float().abs()
            mask = _structured(worth.t() if transposed else worth, by)
            return mask.t().contiguous() if transposed else mask
    raise AssertionError(f"{by} chooses by data")


def _structured(worth: Tensor, by: NM | Block) -> Tensor:
    if isinstance(by, NM):
        return keep_of_groups(worth, by.n, by.m)
    return keep_blocks(worth, by.sparsity, by.height, by.width)


def _prune_units(model: nn.Module, by: Structured, batches: Batches | None) -> Pruning:
    require_model(model)
    given = token_batches(model, _require_data(by, batches)) if by.needs_data else []
    found = unit_masks(model, by, given)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and (mask := found.masks.get(id(parameter))) is not None:
                hold((module,), key, _and(parameter, mask))
    return pruning_of_units(model, by, found.masks, found.left)


def pruning_of_units(model: nn.Module, by: Structured, pruned: Container[int], left: Mapping[int, str]) -> Pruning:
    """The report on the parameters with these ids, as they are now; `left` says why some lose no unit."""
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in pruned:
            rows.append(PrunedRow(name, tuple(parameter.shape), by, "", _zeros(parameter)))
        elif (reason := left.get(id(parameter))) is not None:
            rows.append(PrunedRow(name, tuple(parameter.shape), None, reason, _zeros(parameter)))
    return Pruning(tuple(rows))


def _hold(site: Site, mask: Tensor) -> None:
    hold(site.holders, "weight", _and(site.weight, mask))


def _hold_biases(site: Site) -> None:
    """Biases that are zero where a whole row of weights is belong to removed units."""
    rows = site.matrix.flatten(1)
    for module in site.holders:
        bias = module._parameters.get("bias")
        if bias is not None and bool((removed := (bias == 0) & (rows == 0).all(1)).any()):
            hold((module,), "bias", _and(bias, ~removed))


def _and(parameter: Tensor, mask: Tensor) -> Tensor:
    """`mask`, and what holds already."""
    before = held(parameter)
    return mask if before is None else mask & before.mask.to(mask.device)


def pruning_of(plans: Sequence[Plan]) -> Pruning:
    """The report on matrices, as they are now."""
    return Pruning(tuple(_row(plan) for plan in plans))


def _row(plan: Plan) -> PrunedRow:
    zeros = _zeros(plan.site.weight)
    return PrunedRow(plan.site.name, tuple(plan.site.weight.shape), plan.by, plan.reason, zeros)


def _zeros(weight: Tensor) -> int:
    return int((weight == 0).sum()) if not isinstance(weight, QuantizedTensor) else 0
