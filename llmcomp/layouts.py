"""Weights as GPTQ, AWQ and compressed-tensors store them, in a format of ours with the same values.

    layout   tensors of a weight (N, K) with b bits and G groups                     codes in an int32
    gptq     qweight (K b / 32, N), qzeros (G, N b / 32), scales (G, N), g_idx (K,)  neighbours along K (zeros: N)
    awq      qweight (K, N / 8), qzeros (G, N / 8), scales (G, N)                    outputs 0 2 4 6 1 3 5 7 of eight
    packed   weight_packed (N, K b / 32), weight_scale (N, G), weight_shape (2,),    neighbours along K (zeros: N)
             weight_zero_point (N b / 32, G), weight_g_idx (K,)
    plain    weight (N, K) int8 or float8_e4m3fn, weight_scale (N, 1) or (1,)        none: an element is a code

The first code of an int32 stands in its lowest bits. All of them mean (code - zero) * scale. Zeros of gptq are stored
less one (modulo 2^b), or as they are in its second version. Codes, zero points and scales are kept bit by bit; a scale
that more than 128 neighbours share is repeated for each 128 of them. Where `g_idx` scatters the inputs over the groups,
columns are stored sorted by group, and the result says in which order.

Sources: AutoGPTQ's and GPTQModel's linear layers, AutoAWQ's WQLinear_GEMM, the compressors of compressed-tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.errors import FormatError
from llmcomp.formats import GROUPS, Format, Fp8, Int4, Int8, Packed

# Output 0 of eight neighbours is the first code of a word, output 1 the fifth, and so on.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Repacked:
    """A weight in a format of ours; `order`: the column of the weight that each stored column is."""

    packed: Packed
    format: Format
    order: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """The tensors of one weight, by the last part of their names; refusals name `layer`."""

    layer: str
    tensors: Mapping[str, Tensor]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.tensors

    def get(self, name: str, shape: Sequence[int], *dtypes: torch.dtype) -> Tensor:
        """A tensor of this shape, -1 where any size will do, and of one of `dtypes`.

        Raises:
            FormatError: there is none, or it is another.
        """
        wanted = f"{' or '.join(map(str, dtypes))} of shape ({', '.join('any' if n < 0 else str(n) for n in shape)})"
        value = self.tensors.get(name)
        if value is None:
            raise FormatError(
                f"expected {self.layer}.{name}, {wanted}, found only {', '.join(sorted(self.tensors)) or 'nothing'} of "
                f"{self.layer}: the checkpoint is incomplete"
            )
        fits = value.dim() == len(shape) and all(n in (-1, m) for n, m in zip(shape, value.shape, strict=True))
        if not fits or value.dtype not in dtypes:
            raise FormatError(
                f"expected {self.layer}.{name} to be {wanted}, found {value.dtype} of shape {tuple(value.shape)}: the "
                "checkpoint does not belong to this model"
            )
        return value


def gptq(parts: Parts, shape: Sequence[int], zero_offset: int) -> Repacked:
    """A weight (N, K) of a GPTQ checkpoint; `zero_offset`: what zero points are stored less (1, in version 2: 0).

    Raises:
        FormatError: a tensor is missing or wrong, or no format holds these codes.
    """
    rows, columns = shape
    qweight = parts.get("qweight", (-1, rows), torch.int32)
    bits = _bits(parts.layer, qweight.shape[0], columns)
    scales = parts.get("scales", (-1, rows), *SCALES)
    zeros = _codes(parts.get("qzeros", (scales.shape[0], -(-rows * bits // 32)), torch.int32), bits)[:, :rows]
    zeros = (zeros + zero_offset) & (2**bits - 1)
    codes = _codes(qweight.t(), bits)[:, :columns]
    order = _order(parts, "g_idx", scales.shape[0], columns)
    return held(parts.layer, codes, scales.t(), zeros.t(), bits, order)


def awq(parts: Parts, shape: Sequence[int]) -> Repacked:
    """A weight (N, K) of an AWQ checkpoint in the layout that AutoAWQ calls gemm.

    Raises:
        FormatError: a tensor is missing or wrong.
    """
    rows, columns = shape
    qweight = parts.get("qweight", (columns, -(-rows // 8)), torch.int32)
    scales = parts.get("scales", (-1, rows), *SCALES)
    qzeros = parts.get("qzeros", (scales.shape[0], -(-rows // 8)), torch.int32)
    codes, zeros = (_awq_codes(words)[:, :rows].t() for words in (qweight, qzeros))
    return held(parts.layer, codes, scales.t(), zeros, 4)


def packed(parts: Parts, shape: Sequence[int]) -> Repacked:
    """A weight (N, K) of compressed-tensors' pack-quantized.

    Raises:
        FormatError: a tensor is missing or wrong, or no format holds these codes.
    """
    rows, columns = shape
    stated = parts.get("weight_shape", (2,), torch.int64, torch.int32)
    if stated.tolist() != [rows, columns]:
        raise FormatError(
            f"expected {parts.layer}.weight_shape to say {[rows, columns]}, found {stated.tolist()}: the checkpoint "
            "does not belong to this model"
        )
    words = parts.get("weight_packed", (rows, -1), torch.int32)
    bits = _bits(parts.layer, words.shape[1], columns)
    scales = parts.get("weight_scale", (rows, -1), *SCALES)
    if parts.has("weight_zero_point"):
        stored = parts.get("weight_zero_point", (-(-rows * bits // 32), scales.shape[1]), torch.int32)
        zeros = _codes(stored.t(), bits)[:, :rows].t()
    else:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    order = _order(parts, "weight_g_idx", scales.shape[1], columns)
    return held(parts.layer, _codes(words, bits)[:, :columns], scales, zeros, bits, order)


def plain(parts: Parts, shape: Sequence[int]) -> Repacked:
    """A weight (N, K) of compressed-tensors' int-quantized, float-quantized or naive-quantized with 8 bits.

    Raises:
        FormatError: a tensor is missing or wrong, or scales are neither of rows nor of the whole.
    """
    rows, columns = shape
    codes = parts.get("weight", (rows, columns), torch.int8, torch.float8_e4m3fn)
    scale = parts.tensors.get("weight_scale")
    if scale is None or scale.dtype not in SCALES or tuple(scale.shape) not in ((rows, 1), (rows,), (1,), (1, 1), ()):
        found = None if scale is None else f"{scale.dtype} of shape {tuple(scale.shape)}"
        raise FormatError(
            f"expected {parts.layer}.weight_scale to hold a float for each of the {rows} rows, or one for all of them, "
            f"found {found}: scales of blocks are not supported, quantize the float checkpoint instead"
        )
    if parts.has("weight_zero_point") and bool(parts.tensors["weight_zero_point"].float().any()):
        raise FormatError(f"expected {parts.layer} to be symmetric, found zero points: 8 bits have no room for them")
    scale = scale.float().reshape(-1).expand(rows).contiguous()
    return Repacked(Packed(codes.contiguous(), scale), Int8() if codes.dtype == torch.int8 else Fp8())


def _bits(layer: str, words: int, columns: int) -> int:
    """The bits of a code, of which `columns` fill so many words.

    Raises:
        FormatError: neither 4 nor 8.
    """
    for bits in (4, 8):
        if words == -(-columns * bits // 32):
            return bits
    raise FormatError(
        f"expected codes of 4 or 8 bits for the {columns} inputs of {layer}, found {words} words of 32 bits "
        f"({words * 32 / columns:.3g} bits for each): other widths are not supported, quantize the float checkpoint "
        "instead"
    )


def _codes(words: Tensor, bits: int) -> Tensor:
    """int32 (R, C) as the codes (R, C * 32 / bits) uint8 in them, the lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _awq_codes(words: Tensor) -> Tensor:
    places = torch.tensor(AWQ_PLACES, device=words.device)
    eights = _codes(words, 4).reshape(words.shape[0], -1, 8)
    return eights.index_select(-1, places).flatten(-2)


def _order(parts: Parts, name: str, groups: int, columns: int) -> Tensor | None:
    """The columns sorted by group, where they are not so already.

    Raises:
        FormatError: groups are of different sizes.
    """
    if not parts.has(name):
        return None
    index = parts.get(name, (columns,), torch.int32, torch.int64)
    expected = torch.arange(columns, device=index.device) * groups // columns
    if columns % groups == 0 and torch.equal(index.long(), expected):
        return None
    if columns % groups or not torch.equal(index.long().sort().values, expected):
        raise FormatError(
            f"expected {parts.layer}.{name} to put {columns / groups:.4g} inputs into each of {groups} groups, found "
            "groups of other sizes: the checkpoint is damaged"
        )
    return torch.argsort(index.long(), stable=True)


def held(layer: str, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, order: Tensor | None = None) -> Repacked:
    """Codes 0 .. 2^bits - 1 (N, K) with scales and zero points (N, groups) in the format that holds them.

    Raises:
        FormatError: none does; it names `layer`.
    """
    columns, groups = codes.shape[1], scale.shape[1]
    if order is not None:
        codes = codes.index_select(1, order)
    shared = columns // groups if columns % groups == 0 else 0
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    if bits == 8 and not symmetric:
        raise FormatError(
            f"expected the zero points of {layer}, which has 8 bits, to be 128, found {zero.min()} to {zero.max()}: "
            "Int8 is symmetric, quantize the float checkpoint instead"
        )
    if bits == 8 and groups == 1:
        return Repacked(Packed(_signed(codes), scale.float().flatten()), Int8(), order)
    group = next((g for g in reversed(GROUPS) if shared and shared % g == 0), None)
    if group is None:
        raise FormatError(
            f"expected the inputs of {layer} to share scales in groups of {', '.join(map(str, GROUPS))} or multiples, "
            f"found {columns} inputs and {groups} groups: quantize the float checkpoint instead"
        )
    scale, zero = (t.repeat_interleave(shared // group, 1).contiguous() for t in (scale, zero))
    if bits == 8:
        return Repacked(Packed(_signed(codes), scale), Int8(group), order)
    form = Int4(group, symmetric)
    return Repacked(form.packed(codes, scale, None if symmetric else zero), form, order)


def _signed(codes: Tensor) -> Tensor:
    """Codes 0 .. 255 around 128 as int8."""
    return (codes ^ 128).view(torch.int8).contiguous()
