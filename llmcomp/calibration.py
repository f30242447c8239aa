"""`llmcomp.calibrate`: quantize a transformers decoder on data, one layer after the other.

    batches = [tokenizer(text, return_tensors="pt") for text in texts]
    llmcomp.calibrate(model, batches, "int4", method="awq", checkpoint="half_done")

    for each layer:  scales that can be folded away -> moments of the inputs of its matrices -> the scales -> the codes
                     -> inputs of the next layer

`llmcomp/calibrated_layer.py` is what is done to a layer, `llmcomp/calibration_method.py` lists the methods. Each layer
is calibrated on what the quantized layers before it give.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from llmcomp.calibrated_layer import calibrated_layer
from llmcomp.calibration_checkpoint import Checkpoint, Finished, fingerprint
from llmcomp.calibration_method import Method
from llmcomp.formats import Format
from llmcomp.layerwise import layerwise
from llmcomp.mixed_precision import Budget, assign
from llmcomp.quantization import (
    Quantization,
    Row,
    Spec,
    check_site,
    chosen,
    every,
    prepare_saving,
    quantize_,
)
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, names_of
from llmcomp.token_batches import Batches


@dataclass(frozen=True)
class Calibration(Quantization):
    """What `calibrate` did, weight by weight; `unscaled` says of which no inputs were scaled, and why; `rounded` which
    were rounded, or experts of which, because too little of the data reached them."""

    unscaled: Mapping[str, str] = field(default_factory=dict)
    rounded: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        unscaled = [f"{name:40} not scaled: {why}" for name, why in self.unscaled.items()]
        return "\n".join([super().__str__(), *unscaled, *(f"{n:40} rounded: {why}" for n, why in self.rounded.items())])


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Batches,
    spec: Spec | Budget,
    method: str = "gptq",
    *,
    damping: float = 0.01,
    alpha: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Quantize weights of `model` in place, those of its decoder layers by `method`; the rest as `quantize_` does.

    `batches` are token ids (batch, length), or mappings with input_ids and maybe attention_mask, whose zeros do not
    count; a few dozen of some hundred tokens do. `spec` is as for `quantize_`, or a Budget, with which `assign` chooses
    formats first. `method` is "gptq", "awq", "smoothquant" (for dynamic formats), "awq+gptq" or "smoothquant+gptq".
    `damping`, a part of its mean, is added to the diagonal of GPTQ's moments; `alpha` is how much of the range of
    activations SmoothQuant moves into weights, None: searched for. Each expert is calibrated on the tokens routed to
    it; where they are few, it is rounded, and the result says so.

    With a folder as `checkpoint`, finished layers are written there, and a call with the same model, spec, method and
    data goes on from them, to the same result.

    Raises:
        OptionError: as `quantize_` and `assign`; the method does not exist or does nothing for the formats; the folder
            holds another calibration. The model is then as it was.
        FormatError: as `quantize_`; there is no data, or no decoder layers are found. The model is then as it was.
            Moments that GPTQ can't invert; layers before are then quantized.
    """
    model = getattr(model, "_orig_mod", model)
    how = Method(method, damping, alpha)
    if isinstance(spec, Budget):
        batches = list(batches)
        spec = assign(model, batches, spec)
    plan, places = _checked_plan(model, spec)
    how.check(plan.values())
    rows: list[Row] = []
    unscaled: dict[str, str] = {}
    rounded: dict[str, str] = {}
    with layerwise(model, batches) as steps:
        kept = None if checkpoint is None else Checkpoint(checkpoint, fingerprint(model, plan, how, steps.batches))
        modules = {name: module for module, name in steps.names.items()}
        for step in steps:
            found = None if kept is None else kept.load(step.index, modules)
            done = found or calibrated_layer(step, plan, how)
            if kept is not None and found is None:
                kept.save(step.index, done)
            _place(done, modules, places)
            rows += done.rows
            unscaled |= done.unscaled
            rounded |= done.rounded
    prepare_saving(model, {name: form for name, form in plan.items() if _is_quantized(places[name])})
    rest = quantize_(model, spec, lambda weight: not isinstance(weight, QuantizedTensor))
    return Calibration((*rows, *rest.rows), unscaled, rounded)


def _checked_plan(model: nn.Module, spec: Spec) -> tuple[dict[str, Format], dict[str, Site]]:
    """The format of every parameter that is quantized, by its name, and of every matrix where it is.

    Raises:
        OptionError, FormatError: as `quantize_`.
    """
    plan = dict(chosen(model, spec))
    places: dict[str, Site] = {}
    for site in every(model):
        places |= {site.parameter(name): site for name, _ in names_of(model, site)}
        if (form := plan.get(site.parameter(site.name))) is not None:
            check_site(site, form)
    return plan, places


def _is_quantized(site: Site) -> bool:
    """Whether the weight is quantized by now."""
    return isinstance(site.holders[0]._parameters[site.key], QuantizedTensor)


def _place(done: Finished, modules: Mapping[str, nn.Module], places: Mapping[str, Site]) -> None:
    """Put what calibration made of a layer into the model."""
    for name, value in done.parameters.items():
        owner, _, key = name.rpartition(".")
        if isinstance(value, QuantizedTensor):
            parameter = nn.Parameter(value, requires_grad=False)
            for holder in places[name].holders:
                setattr(holder, key, parameter)
        else:
            own = modules[owner]._parameters[key]
            assert own is not None
            own.copy_(value)
