"""`llmcomp.calibrate`: quantize a transformers decoder by GPTQ, on data, one layer after the other.

    batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    llmcomp.calibrate(model, batches, "int4")

    how each layer is called, for every batch, and the inputs of the first
    for each layer:  second moments of the inputs of its matrices -> their codes -> inputs of the next layer

Each layer is calibrated on what the quantized layers before it give. In memory are the inputs of one layer, the masks
and positions that each is given, and the moments of the matrices of one.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from llmcomp.errors import FormatError
from llmcomp.formats import Format
from llmcomp.gptq import gptq
from llmcomp.quantization import (
    Quantization,
    Row,
    Spec,
    check_site,
    chosen,
    is_conv,
    is_linear,
    names_of,
    prepare_saving,
    quantize_,
    sites,
)
from llmcomp.quantized import QuantizedTensor


@dataclass
class _Call:
    """How a layer was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], spec: Spec, damping: float = 0.01) -> Quantization:
    """Quantize weights of `model` in place, those of its decoder layers by GPTQ; the rest as `quantize_` does.

    `batches` are token ids (batch, length); a few dozen of some hundred tokens do. `spec` is as for `quantize_`.
    Weights that saw no data (experts that no token reached) are rounded.

    Raises:
        OptionError, FormatError: as `quantize_`; FormatError also where there is no data or no decoder layers are
            found. The model is then as it was.
    """
    layers = decoder_layers(model)
    plan, holders = _checked_plan(model, spec)
    names = {id(module): name for name, module in model.named_modules()}
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        calls = _calls(model, layers, batches)
        rows: list[Row] = []
        position = 0
        for layer, of_layer in zip(track(layers, "calibrating", disable=not sys.stderr.isatty()), calls, strict=True):
            formats = {m: plan[names[id(m)]] for m in layer.modules() if is_linear(m) and names[id(m)] in plan}
            formats = {m: form for m, form in formats.items() if not isinstance(m.weight, QuantizedTensor)}
            moments = _moments(layer, formats, of_layer)
            for module, form in formats.items():
                row = _quantize(names[id(module)], module, form, moments.get(module), damping)
                for other in holders[names[id(module)]]:
                    other.weight = module.weight
                rows.append(row)
            position += 1
            for index, call in enumerate(of_layer):
                hidden = _first(layer(*call.args, **call.kwargs))
                if position < len(calls):
                    _advance(calls[position][index], hidden)
            of_layer.clear()
    finally:
        for module, training in was_training.items():
            module.training = training
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


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of equal layers that a decoder is made of: of its module lists the one with most parameters.

    Raises:
        FormatError: the model has none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    if not lists:
        raise FormatError("expected a decoder of equal layers to calibrate, found no list of them: use quantize_")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _calls(model: nn.Module, layers: nn.ModuleList, batches: Iterable[Tensor]) -> list[list[_Call]]:
    """How each layer is called, for every batch: layers may differ in masks and positions.

    Raises:
        FormatError: there are no batches, or a layer is not called once for each.
    """
    calls: list[list[_Call]] = [[] for _ in layers]

    def hook(into: list[_Call], keeps_hidden: bool) -> Callable[..., None]:
        def reached(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(args, dict(kwargs))
            if not keeps_hidden:  # they come from the layer before, once that is quantized
                _advance(call, torch.empty(0))
            into.append(call)

        return reached

    device, count = next(model.parameters()).device, 0
    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(hook(calls[i], i == 0), with_kwargs=True).remove)
        for ids in batches:
            model(ids.to(device), use_cache=False)
            count += 1
    if count == 0:
        raise FormatError("expected batches of token ids to calibrate on, found none: pass text of the model's kind")
    if any(len(of_layer) != count for of_layer in calls):
        raise FormatError(
            "expected every decoder layer to run once for a batch, found one that does not: use quantize_"
        )
    return calls


def _moments(layer: nn.Module, formats: Mapping[nn.Module, Format], calls: list[_Call]) -> dict[nn.Module, Tensor]:
    """The second moments of the inputs of the modules, over all calls of their layer."""
    moments: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        rows = given.flatten(0, -2).float()
        moment = rows.t() @ rows
        moments[module] = moments[module] + moment if module in moments else moment

    with ExitStack() as hooks:
        for module in formats:
            hooks.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        for call in calls:
            layer(*call.args, **call.kwargs)
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


def _first(result: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


def _advance(call: _Call, hidden: Tensor) -> None:
    """Put other hidden states into the call of a layer."""
    if call.args:
        call.args = (hidden, *call.args[1:])
    else:
        call.kwargs["hidden_states"] = hidden
