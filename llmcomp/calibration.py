"""`llmcomp.calibrate`: quantize a transformers decoder by GPTQ, on data, one layer after the other.

    batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    llmcomp.calibrate(model, batches, "int4")

    inputs of the first layer, for every batch
    for each layer:  second moments of the inputs of its matrices -> their codes -> inputs of the next layer

Each layer is calibrated on what the quantized layers before it give. In memory are the inputs of one layer and the
moments of its matrices.
"""

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from llmcomp.errors import FormatError
from llmcomp.formats import Format
from llmcomp.gptq import gptq
from llmcomp.quantization import Quantization, Row, Spec, chosen, is_conv, prepare_saving, quantize_
from llmcomp.quantized import QuantizedTensor


@dataclass
class _Call:
    """How a layer was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """The first layer is reached: what follows need not run."""


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
    plan = dict(chosen(model, spec))
    names = {id(module): name for name, module in model.named_modules()}
    calls = _first_calls(model, layers, batches)
    if not calls:
        raise FormatError("expected batches of token ids to calibrate on, found none: pass text of the model's kind")
    rows: list[Row] = []
    for layer in track(layers, "calibrating", disable=not sys.stderr.isatty()):
        formats = {m: plan[names[id(m)]] for m in layer.modules() if names[id(m)] in plan}
        moments = _moments(layer, formats, calls)
        for module, form in formats.items():
            rows.append(_quantize(names[id(module)], module, form, moments.get(module), damping))
        for call in calls:
            _advance(call, _first(layer(*call.args, **call.kwargs)))
    prepare_saving(model, {row.name: plan[row.name] for row in rows})
    rest = quantize_(model, spec, lambda weight: not isinstance(weight, QuantizedTensor))
    return Quantization((*rows, *rest.rows))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of equal layers that a decoder is made of: the longest of its module lists.

    Raises:
        FormatError: the model has none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    if not lists:
        raise FormatError("expected a decoder of equal layers to calibrate, found no list of them: use quantize_")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _first_calls(model: nn.Module, layers: nn.ModuleList, batches: Iterable[Tensor]) -> list[_Call]:
    """How the first layer is called for every batch."""
    calls: list[_Call] = []

    def reached(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, dict(kwargs)))
        raise _Reached

    device = next(model.parameters()).device
    hook = layers[0].register_forward_pre_hook(reached, with_kwargs=True)
    try:
        for ids in batches:
            try:
                model(ids.to(device), use_cache=False)
            except _Reached:
                continue
    finally:
        hook.remove()
    return calls


def _moments(layer: nn.Module, formats: Mapping[nn.Module, Format], calls: list[_Call]) -> dict[nn.Module, Tensor]:
    """The second moments of the inputs of the modules, over all calls of their layer."""
    moments: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten(0, -2).float()
        moment = rows.t() @ rows
        moments[module] = moments[module] + moment if module in moments else moment

    with ExitStack() as hooks:
        for module in formats:
            hooks.callback(module.register_forward_pre_hook(watch).remove)
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
    """The call of the next layer: as that of the last, with other hidden states."""
    if call.args:
        call.args = (hidden, *call.args[1:])
    else:
        call.kwargs["hidden_states"] = hidden
