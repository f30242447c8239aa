"""`llmcomp.calibrate`: quantize a transformers decoder by GPTQ, on data, one layer after the other.

    batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    llmcomp.calibrate(model, batches, "int4")

    how each layer is called, for every batch, and the inputs of the first
    for each layer:  second moments of the inputs of its matrices -> their codes -> inputs of the next layer

Each layer is calibrated on what the quantized layers before it give. In memory are the inputs of one layer, the masks
and positions that each is given, and the moments of the matrices of one.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from llmcomp.formats import Format
from llmcomp.gptq import gptq
from llmcomp.layerwise import Step, layerwise
from llmcomp.quantization import (
    Quantization,
    Row,
    Spec,
    check_site,
    chosen,
    is_conv,
    names_of,
    prepare_saving,
    quantize_,
    sites,
)
from llmcomp.quantized import QuantizedTensor
from llmcomp.token_batches import Batches


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches, spec: Spec, damping: float = 0.01) -> Quantization:
    """Quantize weights of `model` in place, those of its decoder layers by GPTQ; the rest as `quantize_` does.

    `batches` are token ids (batch, length); a few dozen of some hundred tokens do. `spec` is as for `quantize_`.
    Weights that saw no data (experts that no token reached) are rounded.

    Raises:
        OptionError, FormatError: as `quantize_`; FormatError also where there is no data or no decoder layers are
            found. The model is then as it was.
    """
    plan, holders = _checked_plan(model, spec)
    rows: list[Row] = []
    with layerwise(model, batches) as steps:
        for step in steps:
            formats = {m: plan[name] for m, name in step.linears.items() if name in plan}
            formats = {m: form for m, form in formats.items() if not isinstance(m.weight, QuantizedTensor)}
            moments = _moments(step, formats)
            for module, form in formats.items():
                name = step.linears[module]
                rows.append(_quantize(name, module, form, moments.get(module), damping))
                for other in holders[name]:
                    other.weight = module.weight
    prepare_saving(model, {row.name: plan[row.name] for row in rows})
    rest = quantize_(model, spec, lambda weight: not isinstance(weight, QuantizedTensor))
    return Quantization((*rows, *rest.rows))


def _checked_plan(model: nn.Module, spec: Spec) -> tuple[dict[str, Format], dict[str, tuple[nn.Module, ...]]]:
    """The format of every weight that is quantized, by the name of its module, and the modules that hold it.

    Raises:
        OptionError, FormatError: as `quantize_`.
    """
    plan = dict(chosen(model, spec))
    holders: dict[str, tuple[nn.Module, ...]] = {}
    for site in sites(model):
        holders |= dict.fromkeys((name for name, _ in names_of(model, site)), site.holders)
        if (form := plan.get(site.name)) is not None:
            check_site(site, form)
    return plan, holders


def _moments(step: Step, formats: Mapping[nn.Module, Format]) -> dict[nn.Module, Tensor]:
    """The second moments of the inputs of the modules, over all calls of their layer."""
    moments: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, rows: Tensor) -> None:
        moment = rows.float().t() @ rows.float()
        moments[module] = moments[module] + moment if module in moments else moment

    step.watch({module: partial(watch, module) for module in formats})
    return moments


def _quantize(name: str, module: nn.Module, form: Format, moment: Tensor | None, damping: float) -> Row:
    weight = module.weight
    assert isinstance(weight, Tensor)
    transposed = is_conv(module)
    if moment is None:
        made = QuantizedTensor.quantize(weight, form, transposed)
    else:
        packed = gptq(weight.t() if transposed else weight, moment, form, damping)
        made = QuantizedTensor(packed, form, weight.shape, weight.dtype, transposed)
    module.weight = nn.Parameter(made, requires_grad=False)
    return Row(name, tuple(made.shape), form, "", weight.nbytes, made.nbytes)
