"""`llmcomp.assign`: a format for each weight, under a budget in bits or in perplexity, by measured sensitivity.

    formats = llmcomp.assign(model, batches, llmcomp.Budget(bits=4.5))      # {"model.layers.0.mlp.up_proj": ...}
    llmcomp.quantize_(model, formats)
    llmcomp.calibrate(model, batches, llmcomp.Budget(bits=4.5))             # both at once

What a format costs is the mean Kullback-Leibler divergence of the next token's distribution from that of the float
model, with this one choice quantized and the rest float, as in ZeroQ (Cai et al. 2020, arXiv:2001.00281, section 3.2);
costs are taken to add up. Weights that read the same input (q, k and v; gate and up) are one choice: kernels merge them
where they have one format. So are those of all experts of a layer, which are one parameter. The choices of least
divergence within the budget, or of fewest bits, are a multiple-choice knapsack problem (`llmcomp/knapsack.py`).
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from llmcomp.errors import FormatError, OptionError
from llmcomp.formats import Format, bits_per_weight, parse_format
from llmcomp.knapsack import best_options
from llmcomp.layerwise import evaluating, run_model
from llmcomp.quantization import check_site, chosen
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, experts, is_linear, names_of, sites
from llmcomp.token_batches import Batches, TokenBatch, token_batches

DEFAULT = ("int4", "int4_g32", "int8")


@dataclass(frozen=True)
class Budget:
    """What quantized weights may cost: `bits` of memory for each on average, scales among them, or a relative `rise` of
    perplexity on calibration data (0.01: one percent); and the formats to choose from.

    Raises:
        OptionError: neither or both are given, or not in range, or there are no formats.
    """

    bits: float | None = None
    rise: float | None = None
    formats: tuple[Format | str, ...] = DEFAULT

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.rise) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise OptionError(
                f"expected a budget of bits or of a rise of perplexity, above 0, found bits={self.bits} and "
                f"rise={self.rise}: pass one, Budget(bits=4.5) or Budget(rise=0.01)"
            )
        if not self.formats or isinstance(self.formats, str):
            raise OptionError(f'expected several formats to choose from, found {self.formats!r}: pass ("int4", "int8")')

    @property
    def parsed(self) -> tuple[Format, ...]:
        """The formats; unknown names raise OptionError."""
        return tuple(f if isinstance(f, Format) else parse_format(f) for f in self.formats)


@dataclass(frozen=True)
class Option:
    """One format of a choice, None for float: its bits in all, and the divergence it causes."""

    format: Format | None
    bits: float
    cost: float


@dataclass(frozen=True)
class Choice:
    """Weights that get one format, of `options`; `weights` counts them."""

    sites: tuple[Site, ...]
    weights: int
    options: tuple[Option, ...]


@torch.no_grad()
def assign(model: nn.Module, batches: Batches, budget: Budget, tokens: int = 4096) -> dict[str, Format]:
    """A format for every weight of a linear layer, by the names of their modules, and of experts, by those of their
    parameters: a spec for `quantize_`, `calibrate` and `QuantizationConfig`. The model is as it was afterwards.

    Runs the model once for each choice and format, on batches, evenly chosen, of `tokens` tokens in all or a little
    more. Weights that no format fits stay float and count with their bits; embeddings that are no head do not count.

    Raises:
        OptionError: no choice of these formats keeps within the budget; says how near it comes.
        FormatError: as `calibrate`.
    """
    model = getattr(model, "_orig_mod", model)
    formats = budget.parsed
    with evaluating(model):
        data = _some(token_batches(model, batches), tokens)
        choices = _choices(model, data, formats)
        taken = (
            _within_bits(choices, budget.bits) if budget.bits else _within_rise(model, data, choices, budget.rise or 0)
        )
    pairs = [
        (site, choice.options[i].format) for choice, i in zip(choices, taken, strict=True) for site in choice.sites
    ]
    return {name: form for site, form in pairs if form is not None for name, _ in names_of(model, site)}


def _some(data: Sequence[TokenBatch], tokens: int) -> list[TokenBatch]:
    """Batches from all over the data, of so many tokens or a little more."""
    each = sum(batch.ids.numel() for batch in data) / len(data)
    count = min(len(data), max(1, math.ceil(tokens / each)))
    return [data[i * len(data) // count] for i in range(count)]


def _choices(model: nn.Module, data: Sequence[TokenBatch], formats: Sequence[Format]) -> list[Choice]:
    """What there is to choose, with measured costs."""
    units = _units(model, data[0])
    tried = [
        (unit, form)
        for unit in units
        for form in _formats_of(unit, formats)
        if all(_fits(model, site, form) for site in unit)
    ]
    costs = [0.0] * len(tried)
    for batch in track(data, "measuring formats", disable=not sys.stderr.isatty()):
        exact = _predicted(model, batch)
        for i, (unit, form) in enumerate(tried):
            with _quantized([(site, form) for site in unit]):
                costs[i] += _divergence(exact, _predicted(model, batch)) / len(data)
    choices = []
    for unit in units:
        weights = sum(site.weight.numel() for site in unit)
        floats = Option(None, 8.0 * sum(site.weight.nbytes for site in unit), 0.0)
        of_unit = [
            Option(
                form, sum(bits_per_weight(form, tuple(site.matrix.shape)) * site.weight.numel() for site in unit), cost
            )
            for (other, form), cost in zip(tried, costs, strict=True)
            if other is unit
        ]
        choices.append(Choice(tuple(unit), weights, tuple(of_unit or [floats])))
    return choices


def _units(model: nn.Module, batch: TokenBatch) -> list[list[Site]]:
    """The weights of linear layers, those that read one tensor together, and those of experts."""
    found: dict[int, list[Site]] = {}
    last: list[tuple[Tensor, int]] = []  # kept, so that no other tensor takes its address

    def see(site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if any(site is other for unit in found.values() for other in unit):
            return
        if not args or not last or args[0].data_ptr() != last[0][0].data_ptr() or args[0].shape != last[0][0].shape:
            last[:] = [(args[0] if args else torch.empty(0), len(found))]
        found.setdefault(last[0][1], []).append(site)

    linear = [site for site in _floats(sites(model)) if any(map(is_linear, site.holders))]
    with ExitStack() as hooks:
        for site in linear:
            for module in filter(is_linear, site.holders):
                hooks.callback(module.register_forward_pre_hook(partial(see, site)).remove)
        run_model(model, batch)
    reached = [site for unit in found.values() for site in unit]
    alone = [*(site for site in linear if not any(site is other for other in reached)), *_floats(experts(model))]
    return [*found.values(), *([site] for site in alone)]


def _floats(found: Iterable[Site]) -> list[Site]:
    return [site for site in found if not isinstance(site.weight, QuantizedTensor)]


def _formats_of(unit: Sequence[Site], formats: Sequence[Format]) -> list[Format]:
    """The formats as weights of this kind have them: rows of experts are not quantized."""
    experts = any(site.is_experts for site in unit)
    return list(dict.fromkeys(replace(form, dynamic=False) if experts else form for form in formats))


def _fits(model: nn.Module, site: Site, form: Format) -> bool:
    try:
        chosen(model, {site.name: form})
    except FormatError:
        return False
    check_site(site, form)
    return True


@contextmanager
def _quantized(pairs: Sequence[tuple[Site, Format]]) -> Iterator[None]:
    """Weights are rounded to these formats meanwhile."""
    try:
        for site, form in pairs:
            made = nn.Parameter(QuantizedTensor.quantize(site.weight, form, site.transposed), requires_grad=False)
            for holder in site.holders:
                holder._parameters[site.key] = made
        yield
    finally:
        for site, _ in pairs:
            for holder in site.holders:
                assert isinstance(site.weight, nn.Parameter)
                holder._parameters[site.key] = site.weight


def _predicted(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The logarithms of the probabilities of the next token, (batch, length, vocabulary) float32."""
    result = run_model(model, batch)
    logits = getattr(result, "logits", result[0] if isinstance(result, tuple) else result)
    assert isinstance(logits, Tensor)
    return log_softmax(logits.float(), -1)


def _divergence(exact: Tensor, found: Tensor) -> float:
    """The mean over positions of the Kullback-Leibler divergence, in nats."""
    return float(((exact - found) * exact.exp()).sum(-1).mean())


def _within_bits(choices: Sequence[Choice], bits: float) -> list[int]:
    weights = sum(choice.weights for choice in choices)
    taken = best_options(_each(choices, "cost"), _each(choices, "bits"), bits * weights)
    if taken is None:
        least = sum(map(min, _each(choices, "bits")))
        raise OptionError(
            f"expected a budget of at least {least / weights:.3f} bits for each weight, which the smallest of these "
            f"formats take, found {bits}: pass more, or smaller formats"
        )
    return taken


def _each(choices: Sequence[Choice], key: str) -> list[list[float]]:
    return [[getattr(option, key) for option in choice.options] for choice in choices]


def _within_rise(model: nn.Module, data: Sequence[TokenBatch], choices: Sequence[Choice], rise: float) -> list[int]:
    """The fewest bits whose costs add up to the rise, and for which it is measured with all of them."""
    exact = _loss(model, data)
    aim = allowed = math.log1p(rise)
    costs, bits = _each(choices, "cost"), _each(choices, "bits")
    while True:
        found = best_options(bits, costs, aim)
        taken = found or [of_choice.index(min(of_choice)) for of_choice in costs]
        options = [(site, c.options[t].format) for c, t in zip(choices, taken, strict=True) for site in c.sites]
        with _quantized([(site, form) for site, form in options if form is not None]):
            measured = _loss(model, data) - exact
        if measured <= allowed:
            return taken
        if found is None:
            raise OptionError(
                f"expected a rise of perplexity that these formats can keep, found {rise}: the best of them reach "
                f"{math.expm1(measured):.5f} on this data; pass more, or larger formats"
            )
        aim *= 0.9 * min(1.0, allowed / measured)


def _loss(model: nn.Module, data: Sequence[TokenBatch]) -> float:
    """The mean loss of a token, in nats."""
    total, count = 0.0, 0
    for batch in data:
        predicted, labels = _predicted(model, batch)[:, :-1], batch.ids[:, 1:]
        total -= float(predicted.gather(-1, labels.to(predicted.device)[..., None]).sum())
        count += labels.numel()
    return total / max(count, 1)
