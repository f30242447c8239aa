"""One decoder layer, calibrated: scales are folded away, then the codes of linear layers and of experts are found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from llmcomp.calibration_checkpoint import Finished
from llmcomp.calibration_method import Method
from llmcomp.expert_calibration import DOWN, Given, quantized_experts, watched
from llmcomp.expert_folds import scale_down
from llmcomp.find_folds import Folds, find_folds
from llmcomp.folding import Fold, fold
from llmcomp.formats import Format
from llmcomp.layerwise import Step
from llmcomp.moments import Moments, moments_of
from llmcomp.quantization import Row
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, has_experts, is_conv, matrix, reading_key

Formats = Mapping[nn.Module, Format]
Routed = Sequence[tuple[Site, Format]]


def calibrated_layer(step: Step, plan: Mapping[str, Format], method: Method) -> Finished:
    """Scale the matrices of a layer and find their codes, which do not replace them yet.

    `plan` has the formats by the names of parameters in the model.

    Raises:
        FormatError: as `moments_of` and `Method.codes`.
    """
    linear = {m: plan[key] for m, name in step.linears.items() if (key := f"{name}.weight") in plan}
    linear = {m: form for m, form in linear.items() if not isinstance(m.weight, QuantizedTensor)}
    routed = [(site, plan[site.name]) for site in step.experts if site.name in plan]
    scaled = _scaled(step, linear, routed, method)
    made = {f"{step.linears[m]}.weight": _codes(m, form, scaled.moments.get(m), method) for m, form in linear.items()}
    unreached = [m for m in linear if m not in scaled.moments and method.reads_data]
    rounded = {step.linears[m]: "no token reached it" for m in unreached}
    for site, form in routed:
        made[site.name], why = quantized_experts(site, form, scaled.given[site.holders[0]], method)
        rounded |= {site.name: why} if why else {}
    rows = tuple(_row(name.removesuffix(".weight"), codes) for name, codes in made.items())
    return Finished(scaled.parameters(step) | made, rows, scaled.unscaled, rounded)


@dataclass(frozen=True)
class _Scaled:
    """A layer after scales were folded away: what its matrices read now, which no scale reached, and what changed."""

    moments: Mapping[nn.Module, Moments]
    given: Mapping[nn.Module, Given]
    unscaled: Mapping[str, str]
    changed: Sequence[nn.Module]

    def parameters(self, step: Step) -> dict[str, Tensor]:
        """All that modules hold that changed, by the names in the model."""
        own = [(step.walk.names[module], module) for module in self.changed]
        return {f"{name}.{key}": p for name, module in own for key, p in module.named_parameters(recurse=False)}


def _scaled(step: Step, linear: Formats, routed: Routed, method: Method) -> _Scaled:
    readers = {**linear, **{site.holders[0]: form for site, form in routed if site.key != DOWN}}
    wanted = method.scaled(readers)
    folds = find_folds(step, wanted) if wanted else Folds((), {})
    with watched(site.holders[0] for site, _ in routed) as given:
        moments = moments_of(step, [*linear, *(m for m in wanted if m not in linear)])
    for found in folds.found:
        _fold(found, readers, moments, given, method)
    unscaled = {_label(step, module): why for module, why in folds.reasons.items()}
    changed = [module for found in folds.found for module in found.modules]
    for site, form in routed:
        if site.key == DOWN and method.scales_experts:
            why = scale_down(site, form, given[site.holders[0]])
            unscaled |= {site.name: why} if why else {}
            changed += [] if why else site.holders
    return _Scaled(moments, given, unscaled, changed)


def _fold(
    found: Fold,
    formats: Formats,
    moments: dict[nn.Module, Moments],
    given: Mapping[nn.Module, Given],
    method: Method,
) -> None:
    """Scale what a fold's readers read, and what is known of it."""
    read = next(moments[r] for r in found.readers if r in formats)
    columns = fold(found, method.scales(found, formats, read))[found.channels]
    for reader in found.readers:
        if reader in moments:
            moments[reader] = moments[reader].divided(columns)
        if reader in given:
            given[reader].divide(columns)


def _label(step: Step, module: nn.Module) -> str:
    name = step.walk.names[module]
    return f"{name}.{reading_key(module)}" if has_experts(module) else name


def _codes(module: nn.Module, form: Format, moments: Moments | None, method: Method) -> QuantizedTensor:
    weight, packed = module.weight, method.codes(matrix(module), form, moments)
    assert isinstance(weight, Tensor)
    return QuantizedTensor(packed, form, weight.shape, weight.dtype, is_conv(module))


def _row(name: str, made: QuantizedTensor) -> Row:
    return Row(name, tuple(made.shape), made.format, "", made.numel() * made.dtype.itemsize, made.nbytes)
