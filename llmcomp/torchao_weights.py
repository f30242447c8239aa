"""Weights that torchao quantized, in a format of ours with the same values.

    Int8Tensor                  a scale for each row                       ->  Int8, dynamic where its activations are
    Float8Tensor                e4m3, a scale for each row or one for all  ->  Fp8, dynamic where its activations are
    IntxUnpackedToInt8Tensor    4 or 8 bits, groups of inputs or rows      ->  Int4 or Int8

Weights keep their values; activations that are quantized are rounded on a slightly other grid (torchao divides by
max / 127.5, with -128 among the codes). They are known by name: torchao is not imported. A compiled model that holds
others, or these, runs them as torchao spells them out, in which a weight is made float as a whole.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmcomp.errors import FormatError
from llmcomp.formats import Format, Fp8, Int8, Packed
from llmcomp.layouts import Repacked, held


def is_torchao(weight: Tensor) -> bool:
    """Whether torchao quantized this."""
    return type(weight).__module__.split(".")[0] == "torchao"


def repacked(weight: Tensor) -> Repacked:
    """The same weight (N, K) in a format of ours.

    Raises:
        FormatError: no format holds it.
    """
    kind = type(weight).__name__
    reader = _READERS.get(kind)
    if reader is None:
        raise FormatError(f"expected torchao's {', '.join(_READERS)}, found {kind}: it is left to torchao")
    return reader(weight)


def _int8(weight: Any) -> Repacked:
    _require(weight.block_size == [1, weight.shape[1]], "a scale for each row", weight.block_size)
    zero = getattr(weight, "zero_point", None)
    _require(zero is None or not bool(zero.any()), "zero points of 0", "others")
    _require(getattr(weight, "act_pre_scale", None) is None, "inputs as they are", "a scale for them")
    _require(getattr(weight, "act_quant_scale", None) is None, "activations without a fixed scale", "one")
    return Repacked(Packed(weight.qdata, weight.scale.float().flatten()), _dynamic(weight, Int8()))


def _float8(weight: Any) -> Repacked:
    rows, columns = weight.shape
    _require(weight.qdata.dtype == torch.float8_e4m3fn, "float8_e4m3fn", weight.qdata.dtype)
    _require(weight.block_size in ([1, columns], [rows, columns]), "a scale for each row", weight.block_size)
    scale = weight.scale.float().flatten().expand(rows).contiguous()
    return Repacked(Packed(weight.qdata, scale), _dynamic(weight, Fp8()))


def _intx(weight: Any) -> Repacked:
    bits = {"torch.int4": 4, "torch.int8": 8}.get(str(weight.target_dtype), 0)
    _require(bits != 0, "int4 or int8", weight.target_dtype)
    _require(weight.activation_quantization is None, "float activations", weight.activation_quantization)
    _require(weight.block_size[0] == 1, "groups of inputs", weight.block_size)
    codes, zero = ((part.int() + 2 ** (bits - 1)).to(torch.uint8) for part in (weight.qdata, weight.zero_point))
    return held("the weight", codes, weight.scale, zero, bits)


def _dynamic(weight: Any, form: Int8 | Fp8) -> Format:
    """The format that quantizes activations as the weight says."""
    wanted = weight.act_quant_kwargs
    if wanted is None:
        return form
    symmetric = getattr(getattr(wanted, "mapping_type", None), "name", "SYMMETRIC") == "SYMMETRIC"
    rows = type(wanted.granularity).__name__ == "PerRow"
    _require(rows and symmetric, "symmetric activations with a scale for each token", wanted)
    return type(form)(dynamic=True)


def _require(fits: bool, expected: str, found: object) -> None:
    if not fits:
        raise FormatError(f"expected {expected}, found {found}: it is left to torchao")


_READERS: Mapping[str, Callable[[Any], Repacked]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}
