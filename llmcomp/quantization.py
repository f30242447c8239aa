"""`llmcomp.quantize_`: the weights of a model become quantized ones, in place, before it is compiled.

    llmcomp.quantize_(model, "int4")
    llmcomp.quantize_(model, {"*.mlp.*": "int4_g32", "*.self_attn.*": "int8", "lm_head": None})
    llmcomp.quantize_(model, lambda name, module: None if "router" in name else Int8())

`options={"weights": "int4"}` does the same to the weights that a compiled graph reads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from llmcomp.errors import FormatError, OptionError
from llmcomp.formats import Format, Int8, check, parse_format
from llmcomp.heap import release_memory
from llmcomp.latents import LATENT, forget, latent_of
from llmcomp.owners import models_of
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import ROOT, Chosen, Site, by_function, by_patterns, experts, is_linear, names_of, sites
from llmcomp.torchao_weights import is_torchao, repacked

Choice = Format | str | None
Spec = Format | str | Mapping[str, Choice] | Callable[[str, nn.Module], Choice]


@dataclass(frozen=True)
class Row:
    """What became of one weight: `format` is None where it was left as it was, for `reason`."""

    name: str
    shape: tuple[int, ...]
    format: Format | None
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Quantization:
    """What `quantize_` did, weight by weight. Prints as a table."""

    rows: tuple[Row, ...]

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The weights that are quantized now."""
        return tuple(r for r in self.rows if r.format is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        """The weights that were left alone, with the reason."""
        return tuple(r for r in self.rows if r.format is None)

    def __str__(self) -> str:
        lines = [
            f"{r.name or ROOT:40} {r.format!s:20} {r.bytes_before / 2**20:9.2f} -> {r.bytes_after / 2**20:8.2f} MiB"
            if r.format
            else f"{r.name or ROOT:40} left alone: {r.reason}"
            for r in self.rows
        ]
        before, after = (sum(getattr(r, key) for r in self.rows) for key in ("bytes_before", "bytes_after"))
        return "\n".join([*lines, f"{'together':40} {'':20} {before / 2**20:9.2f} -> {after / 2**20:8.2f} MiB"])


def quantize_(model: nn.Module, spec: Spec, only: Callable[[torch.Tensor], bool] = lambda weight: True) -> Quantization:
    """Quantize weights of `model` in place; returns what became of each.

    `spec` is a format or its name, for all linear layers (`nn.Linear`, and GPT-2's `Conv1D`) and the experts of
    transformers (which have formats without `dynamic`: their rows are not quantized); or a mapping from
    patterns of module names (as in `fnmatch`, the first that matches counts) to formats, None to leave a weight alone;
    or a function of (name, module). With a single format of 4 bits the head (the layer that gives logits) becomes int8.
    Embeddings are quantized where a mapping or function names them, or where the head is tied to them: once, for both.
    `only` narrows the weights down further. Quantized weights no longer require gradients. Weights that torchao
    quantized keep their values, in the format of ours that holds them.

    Raises:
        OptionError: an unknown format, or a pattern that no module matches.
        FormatError: a weight holds NaN or infinity, or does not fit the format that a mapping or function chose for it;
            with a single format, weights that do not fit are left alone and listed. The model is then as it was.
    """
    plans = [plan for plan in planned(model, spec) if only(plan[0].weight)]
    _check(plans)
    formats = {site.parameter(n): form for site, form, _ in plans if form is not None for n, _ in names_of(model, site)}
    rows = []
    while plans:
        rows.append(_apply(*plans.pop(0)))
        release_memory()  # of this weight: float and packed ones are not all there together
    prepare_saving(model, formats)
    return Quantization(tuple(rows))


def _check(plans: Sequence[tuple[Site, Format | None, str]]) -> None:
    for site, form, _ in plans:
        if form is not None:
            check_site(site, form)


def check_site(site: Site, form: Format) -> None:
    """Refuse a weight that a format can't hold.

    Raises:
        FormatError: names the weight and says what is wrong with it.
    """
    if is_torchao(site.weight):
        return  # its values are kept
    try:
        for matrix in site.matrices:
            check(matrix, form)
    except FormatError as problem:
        raise FormatError(f"{site.label}: {problem}") from problem


def every(model: nn.Module, tied: Mapping[str, str] | None = None) -> Iterator[Site]:
    """All matrices that can be quantized, each once; `tied` as for `sites`."""
    yield from sites(model, tied)
    yield from experts(model)


def chosen(model: nn.Module, spec: Spec, tied: Mapping[str, str] | None = None) -> list[tuple[str, Format]]:
    """The parameters that `spec` quantizes, by name (every one of those that are tied), and the formats.

    `tied`: pairs of names of parameters that will be one when the model is loaded.

    Raises:
        OptionError, FormatError: as `quantize_`, values of weights left aside: they may lie on the meta device.
    """
    plans = planned(model, spec, tied or {})
    return [(site.parameter(name), f) for site, f, _ in plans if f is not None for name, _ in names_of(model, site)]


def planned(
    model: nn.Module, spec: Spec, tied: Mapping[str, str] | None = None
) -> list[tuple[Site, Format | None, str]]:
    """What becomes of every weight: its format, or the reason why it has none.

    Raises:
        OptionError, FormatError: see `quantize_`.
    """
    choose = _chooser(model, spec)
    plans: list[tuple[Site, Format | None, str]] = []
    for site in every(model, tied):
        form, reason = choose(site)
        if form is not None and site.is_experts:
            form = replace(form, dynamic=False)
        if form is not None and is_torchao(site.weight):
            form, reason = _of_torchao(site)
        if form is not None and isinstance(site.weight, QuantizedTensor):
            form, reason = None, f"it is {site.weight.format} already"
        if form is not None and (problem := _misfit(site, form)) is not None:
            if not isinstance(spec, Format | str):
                raise FormatError(f"{site.label}: {problem}")
            form, reason = None, problem
        plans.append((site, form, reason))
    return plans


def _of_torchao(site: Site) -> tuple[Format | None, str]:
    """The format that keeps the values of a weight that torchao quantized, whatever was chosen."""
    try:
        return repacked(site.weight).format, ""
    except FormatError as problem:
        return None, f"it is torchao's {type(site.weight).__name__}: {problem}"


def prepare_saving(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Let `save_pretrained` of a model of transformers save quantized weights, given by the names of parameters."""
    if formats and hasattr(model, "save_pretrained"):
        from llmcomp.hf_quantizer import attach  # brings in transformers, whose model this is

        attach(model, formats)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """What is quantized inside of this is not afterwards."""
    before = [(m, dict(m._parameters), m.__dict__.get(LATENT)) for m in model.modules()]
    marks = ("hf_quantizer", "is_quantized", "quantization_method")
    unmarked = [(m, mark) for m in model.modules() for mark in marks if mark not in m.__dict__]
    config = getattr(model, "config", None)
    had_config = hasattr(config, "quantization_config")
    try:
        yield
    finally:
        for module, parameters, latent in before:
            module._parameters.update(parameters)
            if latent is not None:
                module.__dict__[LATENT] = latent
        for module, mark in unmarked:
            module.__dict__.pop(mark, None)
        if config is not None and not had_config and hasattr(config, "quantization_config"):
            del config.quantization_config


def quantize_inputs(inputs: Sequence[object], spec: Format) -> bool:
    """Quantize the weights among the inputs of a graph, in the models that hold them; whether any was.

    Raises:
        OptionError: a model is being trained, whose weights would stop to learn.
    """
    matrices = [x for x in inputs if isinstance(x, nn.Parameter) and x.dim() in (2, 3)]
    floats = [x for x in matrices if not isinstance(x, QuantizedTensor)]
    read, models = {id(x) for x in floats}, models_of(floats)
    if torch.is_grad_enabled() and any(model.training for model in models):
        raise OptionError(
            "expected a model in eval mode for the option weights, found one that is being trained: call model.eval(), "
            "or quantize_ the layers that stay as they are"
        )
    done = [quantize_(model, spec, lambda weight: id(weight) in read) for model in models]
    return any(found.quantized for found in done)


def _misfit(site: Site, form: Format) -> str | None:
    """Why a weight of this shape and dtype can't be stored in a format, or None."""
    if isinstance(site.weight, UninitializedParameter):
        return "the weight has no shape yet: run the model once"
    if site.elsewhere:
        return f"the weight is {site.elsewhere} too, of a module that reads no quantized weights"
    columns = site.matrix.shape[-1]
    if site.is_experts and form.two_four:
        return "no kernel multiplies the rows of experts with 2:4 sparse weights"
    if site.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the weight is {site.weight.dtype}"
    if 0 in site.weight.shape:
        return f"the weight has the shape {tuple(site.weight.shape)}"
    if form.group and columns % form.group:
        return f"a group of {form.group} does not divide its {columns} inputs: choose a smaller group"
    return None


def _chooser(model: nn.Module, spec: Spec) -> Chosen[Format]:
    """What decides the format of a weight.

    Raises:
        OptionError: see `quantize_`.
    """
    if isinstance(spec, Format | str):
        form = parse_choice(spec)
        assert form is not None
        return lambda site: _of_one(site, form)
    if isinstance(spec, Mapping):
        return by_patterns(model, {p: parse_choice(choice) for p, choice in spec.items()}, every(model))
    if callable(spec):
        return by_function(model, lambda name, module: parse_choice(spec(name, module)))
    raise OptionError(
        f"expected a format, a mapping from patterns of module names to formats or a function, found {spec!r}: "
        'pass "int4", for example'
    )


def parse_choice(choice: Choice) -> Format | None:
    """The format that is meant.

    Raises:
        OptionError: there is no such format.
    """
    if choice is None or (isinstance(choice, Format) and choice.stem):
        return choice
    if isinstance(choice, str):
        return parse_format(choice)
    raise OptionError(
        f"expected a format such as Int8(), the name of one or None, found {choice!r}: pass 'int8', for example"
    )


def _of_one(site: Site, form: Format) -> tuple[Format | None, str]:
    if not site.is_experts and not any(map(is_linear, site.holders)):
        return None, "it is an embedding"
    return (Int8() if site.is_head and form.bits == 4 else form), ""


def _bytes(weight: torch.Tensor) -> int:
    """What a weight takes in memory, parts of a subclass counted."""
    if not is_torchao(weight):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])  # type: ignore[attr-defined]


def left_alone(site: Site, reason: str) -> Row:
    """What is told of a weight that stays as it is."""
    if isinstance(site.weight, UninitializedParameter):
        return Row(site.name, (), None, reason, 0, 0)
    bytes = _bytes(site.weight)
    return Row(site.name, tuple(site.weight.shape), None, reason, bytes, bytes)


def _apply(site: Site, form: Format | None, reason: str) -> Row:
    if form is None:
        return left_alone(site, reason)
    before = _bytes(site.weight)
    if is_torchao(site.weight):
        read = repacked(site.weight)
        weight = site.weight
        quantized = QuantizedTensor(read.packed, read.format, weight.shape, weight.dtype, False, read.order)
    else:
        latent = latent_of(site.weight)
        quantized = QuantizedTensor.quantize(latent.current() if latent else site.weight, form, site.transposed)
    parameter = nn.Parameter(quantized, requires_grad=False)
    for module in site.holders:
        setattr(module, site.key, parameter)
        forget(module)
    return Row(site.name, tuple(quantized.shape), form, "", before, quantized.nbytes)
