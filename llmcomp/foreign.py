"""Checkpoints that GPTQ, AWQ or compressed-tensors quantized: what their config says, how a weight of theirs is read.

    quantization_config of config.json   ->   Source: the names of a weight's tensors, and a function that repacks them

What can be seen from the tensors themselves (bits, groups, zero points, order of inputs) is seen there, so settings of
single layers need no care. The config is asked for what they do not tell: the version of GPTQ's zero points, the order
of AWQ's codes, and whether activations are quantized.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from llmcomp import layouts
from llmcomp.errors import FormatError
from llmcomp.layouts import Parts, Repacked

# Settings as they stand in config.json.
Settings = Mapping[str, Any]
Read = Callable[[nn.Module, Parts, Sequence[int]], Repacked]
OTHERWISE = "quantize the float checkpoint with llmcomp instead"


@dataclass(frozen=True)
class Source:
    """How the weight of a layer is stored: as tensors of these names, of which `sign` tells that it is quantized.

    `read` makes a weight (N, K) of them, or raises a FormatError.
    """

    names: tuple[str, ...]
    sign: str
    read: Read


def reads(method: str) -> bool:
    """Whether checkpoints of this `quant_method` are read."""
    return method in _SOURCES


def source(settings: Settings) -> Source:
    """How a checkpoint with these settings stores its weights.

    Raises:
        FormatError: in a way that is not supported.
    """
    method = _SOURCES.get(str(settings.get("quant_method")))
    if method is None:
        raise FormatError(
            f"expected a checkpoint that was quantized by {', '.join(_SOURCES)}, found "
            f"{settings.get('quant_method')!r}: {OTHERWISE}"
        )
    return method(settings)


def _require(what: str, found: object, known: Sequence[object]) -> None:
    if found not in known:
        names = ", ".join(repr(k) for k in known if k is not None)
        raise FormatError(f"expected the {what} of the checkpoint to be one of {names}, found {found!r}: {OTHERWISE}")


def _gptq(settings: Settings) -> Source:
    version = settings.get("checkpoint_format") or settings.get("format")
    _require("checkpoint_format", version, (None, "gptq", "gptq_v2"))
    offset = 0 if version == "gptq_v2" else 1

    def read(module: nn.Module, parts: Parts, shape: Sequence[int]) -> Repacked:
        if settings.get("desc_act") and not parts.has("g_idx"):
            raise FormatError(f"expected {parts.layer}.g_idx where desc_act is set, found none: it is incomplete")
        return layouts.gptq(parts, shape, offset)

    return Source(("qweight", "qzeros", "scales", "g_idx"), "qweight", read)


def _awq(settings: Settings) -> Source:
    version = settings.get("version") or settings.get("format")
    _require("version", version.lower() if isinstance(version, str) else version, (None, "gemm"))
    return Source(("qweight", "qzeros", "scales"), "qweight", lambda module, parts, shape: layouts.awq(parts, shape))


FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


def _compressed_tensors(settings: Settings) -> Source:
    groups: list[Settings] = list((settings.get("config_groups") or {}).values())
    for held in (settings, *groups):
        _require("format", held.get("format"), (None, *FORMATS))
    _require("sparsity format", (settings.get("sparsity_config") or {}).get("format"), (None, "dense"))
    if settings.get("transform_config"):
        raise FormatError(f"expected weights without transforms, found a transform_config: {OTHERWISE}")
    if any(_activations(group) == "other" for group in groups):
        warnings.warn(
            "the checkpoint quantizes activations in a way that llmcomp does not (it does: 8 bits, symmetric, each "
            "token when it comes): its weights are read as they are, its activations stay float",
            stacklevel=2,
        )
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    unread = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
    return Source((*names, *unread), "weight_scale", partial(_read_compressed, groups))


def _read_compressed(groups: Sequence[Settings], module: nn.Module, parts: Parts, shape: Sequence[int]) -> Repacked:
    read = layouts.packed if parts.has("weight_packed") else layouts.plain
    repacked = read(parts, shape)
    group = next((g for g in groups if _targets(g, parts.layer, module)), None)
    if group is None or _activations(group) != "dynamic" or repacked.format.bits != 8 or repacked.format.group:
        return repacked
    return replace(repacked, format=replace(repacked.format, dynamic=True))


def _activations(group: Settings) -> str:
    """What a group of layers does to what it multiplies: "float", "dynamic" as our formats do, or "other"."""
    found, weights = group.get("input_activations"), group.get("weights") or {}
    if not found:
        return "float"
    wanted = {"num_bits": 8, "type": weights.get("type", "int"), "strategy": "token", "dynamic": True}
    default = {"num_bits": 8, "type": "int", "symmetric": True} | found
    ours = all(default.get(key) == value for key, value in wanted.items()) and default["symmetric"]
    return "dynamic" if ours and weights.get("num_bits", 8) == 8 else "other"


def _targets(group: Settings, name: str, module: nn.Module) -> bool:
    """Whether a group means this layer: by name, by a pattern `re:...` of names, or by the name of a class."""
    classes = {kind.__name__ for kind in type(module).__mro__}
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else target == name or target in classes
        for target in group.get("targets") or ()
    )


_SOURCES: Mapping[str, Callable[[Settings], Source]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
