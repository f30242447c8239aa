"""Quantized weights in transformers: loading a checkpoint straight into a format, saving and loading what came of it.

    config = llmcomp.QuantizationConfig("int4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)     # weight by weight
    model.save_pretrained(other)                                                         # codes and scales
    model = AutoModelForCausalLM.from_pretrained(other, quantization_config=config)      # as they were saved

A safetensors file holds plain tensors, so a weight W is saved as W_codes, W_scale and W_zero, and the formats are
noted in the model's config. `quantize_` prepares a transformers model for `save_pretrained` in the same way.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcomp.errors import FormatError
from llmcomp.formats import Format, Packed, parse_format
from llmcomp.quantization import Choice, chosen, is_conv
from llmcomp.quantized import PARTS, QuantizedTensor

METHOD = "llmcomp"


class QuantizationConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes: `weights` is the name of a format, or a mapping from patterns of module names
    to names of formats or None, as for `llmcomp.quantize_`.

    `formats` is what a saved model notes: the format of every quantized weight, by its name.

    Making one registers the method with transformers, which a saved model needs as well to be loaded.
    """

    def __init__(
        self,
        weights: Format | str | Mapping[str, Choice] = "int8",
        formats: Mapping[str, str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        register()
        self.quant_method = quant_method  # type: ignore[assignment]
        named = (
            {pattern: None if c is None else str(c) for pattern, c in weights.items()}
            if isinstance(weights, Mapping)
            else str(weights)
        )
        self.weights: str | dict[str, str | None] = named
        self.formats = dict(formats or {})


def register() -> None:
    """Make transformers know the method; twice changes nothing more."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, QuantizationConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Quantizer)


class Quantizer(HfQuantizer):
    """What transformers asks while it loads and saves a quantized model."""

    quantization_config: QuantizationConfig
    serialized_names = {"weight": [f"weight_{part}" for part in PARTS]}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self.formats = {name: parse_format(text) for name, text in self.quantization_config.formats.items()}
        else:
            self.formats = {f"{name}.weight": form for name, form in chosen(model, self.quantization_config.weights)}
            for pair in model.all_tied_weights_keys.items():  # they are tied only when they are loaded
                if (form := next((self.formats[name] for name in pair if name in self.formats), None)) is not None:
                    self.formats |= dict.fromkeys(pair, form)
            self.quantization_config.formats = {name: str(form) for name, form in self.formats.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight of a float checkpoint is quantized as it is loaded."""
        return not self.pre_quantized and param_name in self.formats

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to such a weight."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """How the parts of a saved weight become one."""
        return {"deserialize": _Join}

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The parameters of a model as plain tensors, and nothing for the file's header."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:  # what joins the parts has no inverse but this
            joins = [c for c in conversions if any(isinstance(op, _Join) for op in getattr(c, "operations", ()))]
            model._weight_conversions = [c for c in conversions if c not in joins]
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


def attach(model: Any, formats: Mapping[str, Format]) -> None:
    """Let `save_pretrained` of a transformers model save its quantized weights; `formats` by name of the weight."""
    known = getattr(model, "hf_quantizer", None)
    if known is not None and not isinstance(known, Quantizer):
        return  # another method's model, some of whose layers were left to us: that method saves it
    config = known.quantization_config if known is not None else QuantizationConfig()
    config.formats |= {name: str(form) for name, form in formats.items()}
    if known is None:
        model.hf_quantizer = Quantizer(config, pre_quantized=True)
        model.config.quantization_config = config
        model.is_quantized, model.quantization_method = True, METHOD


class _Quantize(ConversionOps):
    """A weight of the checkpoint -> the quantized parameter."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, full_layer_name)
        form = self.quantizer.formats[full_layer_name]
        try:
            made = QuantizedTensor.quantize(weight, form, is_conv(module))
        except FormatError as problem:
            raise FormatError(f"{full_layer_name}: {problem}") from problem
        return {full_layer_name: nn.Parameter(made, requires_grad=False)}


class _Join(ConversionOps):
    """W_codes, W_scale and W_zero of a saved model -> the quantized parameter."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        parts = {name.rsplit("_", 1)[-1]: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        form = self.hf_quantizer.formats.get(full_layer_name)
        module, _ = get_module_from_name(model, full_layer_name)
        shape, dtype = module.weight.shape, module.weight.dtype
        if form is None or not {"codes", "scale"} <= parts.keys():
            raise FormatError(
                f"expected codes, scales and a format for {full_layer_name}, found {', '.join(sorted(parts)) or 'none'}"
                f" and the format {form}: the checkpoint is incomplete"
            )
        packed = Packed(parts["codes"], parts["scale"], parts.get("zero"))
        wanted = form.quantize(torch.zeros(1, shape[0] if is_conv(module) else shape[1]))
        rows = shape[1] if is_conv(module) else shape[0]
        for name in PARTS:
            have, want = getattr(packed, name), getattr(wanted, name)
            if (have is None) != (want is None) or (
                have is not None and (tuple(have.shape), have.dtype) != ((rows, *want.shape[1:]), want.dtype)
            ):
                found = None if have is None else (tuple(have.shape), have.dtype)
                raise FormatError(
                    f"expected {name} of {full_layer_name} to be those of {form} for a weight of shape {tuple(shape)}, "
                    f"found {found}: the checkpoint does not belong to this model"
                )
        made = QuantizedTensor(packed, form, shape, dtype, is_conv(module))
        return {full_layer_name: nn.Parameter(made, requires_grad=False)}
