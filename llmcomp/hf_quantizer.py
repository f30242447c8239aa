"""Quantized weights in transformers: loading a checkpoint straight into a format, saving and loading what came of it.

    config = llmcomp.QuantizationConfig("int4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)     # weight by weight
    model.save_pretrained(other)                                                         # codes and scales
    model = AutoModelForCausalLM.from_pretrained(other, quantization_config=config)      # as they were saved
    model = AutoModelForCausalLM.from_pretrained(gptq, quantization_config=llmcomp.QuantizationConfig())

A safetensors file holds plain tensors, so a weight W is saved as W_codes, W_scale and W_zero, and the formats are
noted in the model's config. `quantize_` prepares a transformers model for `save_pretrained` in the same way.

A checkpoint that GPTQ, AWQ or compressed-tensors quantized is read where a config of ours is passed (transformers'
own way asks for their packages): its weights keep their values, and `weights` is not asked. It is saved as ours.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcomp import foreign
from llmcomp.errors import FormatError
from llmcomp.formats import Format, Packed, parse_format
from llmcomp.heap import leave_files, release_memory
from llmcomp.layouts import Parts
from llmcomp.quantization import Choice, chosen, parse_choice
from llmcomp.quantized import PARTS, QuantizedTensor
from llmcomp.sites import PROJECTIONS, is_conv, is_transposed

METHOD = "llmcomp"


class QuantizationConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes: `weights` is the name of a format, or a mapping from patterns of module names
    to names of formats or None, as for `llmcomp.quantize_`; "int8" where it is left out.

    `formats` is what a saved model notes: the format of every quantized weight, by its name. `stored`: the settings of
    a checkpoint that another method quantized, while it is loaded.

    Making one registers the method with transformers, which a saved model needs as well to be loaded.

    Raises:
        OptionError: a format that does not exist.
    """

    def __init__(
        self,
        weights: Format | str | Mapping[str, Choice] | None = None,
        formats: Mapping[str, str] | None = None,
        quant_method: str = METHOD,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        register()
        self.quant_method = quant_method  # type: ignore[assignment]
        self.weights: str | dict[str, str | None] = "int8" if weights is None else _named(weights)
        self.formats = dict(formats or {})
        self.stored = None if stored is None else dict(stored)
        self._given = weights is not None

    def to_dict(self) -> dict[str, Any]:
        """What is saved in the config of a model."""
        return {"quant_method": self.quant_method, "weights": self.weights, "formats": self.formats}

    def reading(self, stored: Mapping[str, Any]) -> "QuantizationConfig":
        """This, for a checkpoint with the settings `stored` of another method."""
        if self._given:
            warnings.warn(
                f"the checkpoint was quantized by {stored['quant_method']}: its weights are read as they are, and "
                f"{self.weights!r} is not asked for; quantize_ quantizes layers that are float in it",
                stacklevel=2,
            )
        return QuantizationConfig(self.weights, stored=stored)


def _named(weights: Format | str | Mapping[str, Choice]) -> str | dict[str, str | None]:
    """The names of formats, which exist."""
    if not isinstance(weights, Mapping):
        return str(parse_choice(weights))
    return {pattern: None if (form := parse_choice(c)) is None else str(form) for pattern, c in weights.items()}


def register() -> None:
    """Make transformers know the method; twice changes nothing more."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, QuantizationConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Quantizer)
    merge = AutoHfQuantizer.merge_quantization_configs
    if getattr(merge, "__module__", None) != __name__:
        setattr(AutoHfQuantizer, "merge_quantization_configs", staticmethod(_reading_others(merge)))  # noqa: B010


def _reading_others(merge: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """transformers' choice between the config of a checkpoint and the one passed, which refuses one of ours where the
    other is of another method: we take ours, for checkpoints that we read.
    """

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        found, given = quantization_config, quantization_config_from_args
        settings = found if isinstance(found, dict) else found.to_dict()
        if isinstance(given, QuantizationConfig) and foreign.reads(str(settings.get("quant_method"))):
            return given.reading(settings)
        return merge(found, given)

    return merge_quantization_configs


class Quantizer(HfQuantizer):
    """What transformers asks while it loads and saves a quantized model.

    Errors of a weight are kept until all are loaded: transformers would report them as its own, without their type.
    """

    quantization_config: QuantizationConfig
    serialized_names = {key: [f"{key}_{part}" for part in PARTS] for key in ("weight", *PROJECTIONS)}

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # others may load with the same one
        stored = self.quantization_config.stored
        self.source = None if stored is None else foreign.source(stored)
        self.formats: dict[str, Format] = {}
        self.problems: list[FormatError] = []
        self.missing: Collection[str] = ()
        self.stored: Collection[str] = ()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.source is not None:
            files = kwargs.get("checkpoint_files") or ()
            _refuse_lost_biases(model, files)
            self.stored = _layers_of(files, self.source.sign)
        elif self.pre_quantized:
            self.formats = {name: parse_format(text) for name, text in self.quantization_config.formats.items()}
        else:
            plan = chosen(model, self.quantization_config.weights, model.all_tied_weights_keys)
            self.formats = dict(plan)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.problems:
            more = f" (and {len(self.problems) - 1} more such weights)" if len(self.problems) > 1 else ""
            raise FormatError(f"{self.problems[0]}{more}") from self.problems[0]
        if self.source is not None:
            self._refuse_missing(model)
        leave_files(model)
        self.quantization_config.formats = {name: str(form) for name, form in self.formats.items()}
        if self.source is not None:
            self.quantization_config.stored = None
            self.quantization_config.weights = {
                name.removesuffix(".weight"): text for name, text in self.quantization_config.formats.items()
            }
        return model

    def _refuse_missing(self, model: Any) -> None:
        """Weights that the checkpoint has nothing for, beside others of the same name, or where it holds quantized ones
        that did not find their way into the model.
        """
        missing = sorted(set(self.missing) - set(model.all_tied_weights_keys))
        kinds = {name.split(".")[-2] for name in self.formats}
        lost = [name for name in missing if "." in name and name.split(".")[-2] in kinds]
        if lost:
            raise FormatError(
                f"expected the checkpoint to hold {lost[0]}, quantized or not, found nothing for it (and "
                f"{len(lost) - 1} more): it is incomplete, or its layers have other names than those of this model"
            )
        if not self.formats or (missing and len(self.formats) < len(self.stored)):
            apart = sorted({name.removesuffix(".weight") for name in self.formats} ^ set(self.stored))
            raise FormatError(
                f"expected every quantized weight of the checkpoint to belong to a layer of this model, found "
                f"{len(self.formats)} of {len(self.stored)} that do, and nothing for {missing[:1]} "
                f"({', '.join(apart[:2])}): weights that the model fuses, as those of experts, are not read quantized; "
                "load the float checkpoint"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight of a float checkpoint is quantized as it is loaded."""
        return not self.pre_quantized and param_name in self.formats

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to such a weight."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the parts of a stored weight become one."""
        if not self.pre_quantized:
            return []
        if self.source is None:
            return [WeightConverter(parts, key, [_Join(self)]) for key, parts in self.serialized_names.items()]
        names = [rf"\.{name}$" for name in (*self.source.names, "weight")]
        return [WeightConverter(names, ".weight", [_Repack(self)])]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The parameters of a model as plain tensors, and nothing for the file's header."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:  # what makes weights of parts has no inverse but this
            made = [c for c in conversions if any(isinstance(op, _Making) for op in getattr(c, "operations", ()))]
            model._weight_conversions = [c for c in conversions if c not in made]
        plain: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            if not isinstance(value, QuantizedTensor):
                plain[name] = value
                continue
            plain |= {f"{name}_{p}": part for p in PARTS if (part := getattr(value, p)) is not None}
        return plain, {}

    def is_serializable(self) -> bool:
        """Quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside quantized weights can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Quantized models can be compiled."""
        return True


def _layers_of(files: Collection[str], sign: str) -> set[str]:
    """The layers that a checkpoint holds quantized: those with a tensor named `sign`."""
    layers: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            layers |= {name.removesuffix(f".{sign}") for name in file.keys() if name.endswith(f".{sign}")}
    return layers


def _refuse_lost_biases(model: Any, files: Collection[str]) -> None:
    """GPTQ's tools write biases of zeros for layers that have none; other numbers would be lost.

    Raises:
        FormatError: names the bias.
    """
    modules = dict(model.named_modules())
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise FormatError(f"expected quantized weights in safetensors files, found {path}: convert the checkpoint")
        with safe_open(path, "pt") as file:
            for name in file.keys():
                module = modules.get(name.removesuffix(".bias"))
                if not name.endswith(".bias") or not isinstance(module, nn.Linear) or module.bias is not None:
                    continue
                if bool(file.get_tensor(name).any()):
                    raise FormatError(f"expected no {name}, since the model has none, found one that is not zero")


def attach(model: Any, formats: Mapping[str, Format]) -> None:
    """Let `save_pretrained` of a transformers model save its quantized weights; `formats` by name of the weight."""
    known = getattr(model, "hf_quantizer", None)
    if known is not None and not isinstance(known, Quantizer):
        return  # another method's model, some of whose layers were left to us: that method saves it
    config = known.quantization_config if known is not None else QuantizationConfig()
    config.formats |= {name: str(form) for name, form in formats.items()}
    config.weights = {name.removesuffix(".weight"): text for name, text in config.formats.items()}
    if known is None:
        model.hf_quantizer = Quantizer(config, pre_quantized=True)
        model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config = model.hf_quantizer.quantization_config


class _Making(ConversionOps):
    """Tensors of a checkpoint -> a parameter of the model."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: object) -> "_Making":
        return self  # transformers copies it for every weight

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        self.hf_quantizer.missing = missing_keys or ()
        tensors = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        module, _ = get_module_from_name(model, full_layer_name)
        try:
            made = self.made(tensors, module, full_layer_name)
        except FormatError as problem:
            self.hf_quantizer.problems.append(problem)
            made = nn.Parameter(torch.empty_like(_weight(module, full_layer_name), device="cpu"), requires_grad=False)
        return {full_layer_name: made}

    def made(self, tensors: Mapping[str, Tensor], module: nn.Module, name: str) -> Tensor:
        """The parameter `name` of `module`.

        Raises:
            FormatError: the tensors do not make one.
        """
        raise NotImplementedError


def _weight(module: nn.Module, name: str) -> Tensor:
    """The parameter of a module that has this name in the model."""
    weight = getattr(module, name.rpartition(".")[2])
    assert isinstance(weight, Tensor)
    return weight


class _Quantize(_Making):
    """A weight of the checkpoint -> the quantized parameter."""

    def made(self, tensors: Mapping[str, Tensor], module: nn.Module, name: str) -> Tensor:
        (weight,) = tensors.values()
        try:
            quantized = QuantizedTensor.quantize(weight, self.hf_quantizer.formats[name], is_transposed(module))
        except FormatError as problem:
            raise FormatError(f"{name}: {problem}") from problem
        release_memory()
        return nn.Parameter(quantized, requires_grad=False)


class _Join(_Making):
    """W_codes, W_scale and W_zero of a saved model -> the quantized parameter."""

    def made(self, tensors: Mapping[str, Tensor], module: nn.Module, name: str) -> Tensor:
        parts = {key.rsplit("_", 1)[-1]: value for key, value in tensors.items()}
        form = self.hf_quantizer.formats.get(name)
        if form is None or not {"codes", "scale"} <= parts.keys():
            raise FormatError(
                f"expected codes, scales and a format for {name}, found {', '.join(sorted(parts)) or 'none'} and the "
                f"format {form}: the checkpoint is incomplete"
            )
        weight, transposed = _weight(module, name), is_transposed(module)
        *lead, rows, columns = weight.mT.shape if transposed else weight.shape
        packed = Packed(parts["codes"], parts["scale"], parts.get("zero"))
        _require_fit(name, form, packed, (*lead, rows), columns)
        order = parts.get("order")
        if order is not None and not torch.equal(order.sort().values, torch.arange(columns, device=order.device)):
            raise FormatError(f"expected {name}_order to be an order of {columns} inputs, found none: it is damaged")
        made = QuantizedTensor(packed, form, weight.shape, weight.dtype, transposed, order)
        return nn.Parameter(made, requires_grad=False)


def _require_fit(name: str, form: Format, packed: Packed, rows: Sequence[int], columns: int) -> None:
    """Refuse packed parts that are not those of a weight (*rows, columns); scales of groups may be of any float."""
    wanted = form.quantize(torch.zeros(1, columns))
    for part in ("codes", "scale", "zero"):
        have, want = getattr(packed, part), getattr(wanted, part)
        if have is None or want is None:
            fits = have is None and want is None
        else:
            floats = bool(form.group) and want.dtype.is_floating_point and have.dtype.is_floating_point
            fits = tuple(have.shape) == (*rows, *want.shape[1:]) and (have.dtype == want.dtype or floats)
        if not fits:
            found = None if have is None else (tuple(have.shape), have.dtype)
            raise FormatError(
                f"expected {part} of {name} to be those of {form} for a weight of shape {(*rows, columns)}, found "
                f"{found}: the checkpoint does not belong to this model"
            )


class _Repack(_Making):
    """The tensors of a weight in another method's layout -> the quantized parameter; float weights as they are."""

    def made(self, tensors: Mapping[str, Tensor], module: nn.Module, name: str) -> Tensor:
        source = self.hf_quantizer.source
        assert source is not None
        parts = {pattern[2:-1]: value for pattern, value in tensors.items()}
        weight = module.weight
        assert isinstance(weight, Tensor)
        if parts.keys() == {"weight"} and parts["weight"].dtype not in (torch.int8, torch.float8_e4m3fn):
            return parts["weight"].to(weight.dtype)
        if "weight_scale" in parts and "weight" in parts:
            parts["weight"] = _narrow(parts["weight"])
        rows, columns = reversed(weight.shape) if is_conv(module) else weight.shape
        read = source.read(module, Parts(name.removesuffix(".weight"), parts), (rows, columns))
        self.hf_quantizer.formats[name] = read.format
        made = QuantizedTensor(read.packed, read.format, weight.shape, weight.dtype, is_conv(module), read.order)
        return nn.Parameter(made, requires_grad=False)


def _narrow(weight: Tensor) -> Tensor:
    """float8 as it was stored: transformers before 5.20 widens it on the way here."""
    if weight.dtype in (torch.int8, torch.float8_e4m3fn):
        return weight
    narrow = weight.to(torch.float8_e4m3fn)
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight
