"""Storage formats of weights: the arithmetic of each, in torch.

    format               bits   a weight is worth                    codes
    Int8()               8      code * scale[row]                    -127 .. 127
    Int8(group=g)        8      code * scale[row, k // g]            -127 .. 127
    Fp8()                8      code * scale[row]                    float8_e4m3fn, up to 448
    Int4(group=g)        4      (code - zero[row, k // g]) * scale   0 .. 15
    Int4(symmetric=True) 4      (code - 8) * scale[row, k // g]      0 .. 15
    Nf4(group=g)         4      TABLE[code] * scale[row, k // g]     quantiles of the normal distribution
    Mxfp4()              4      TABLE[code] * 2 ** (scale - 127)     float4 e2m1, an exponent for every 32 weights

Rows are outputs (channels) of a linear layer, k counts its inputs. Quantizing rounds to the nearest code, ties to the
even one, against the scale as it is stored, and clips; a row or group of zeros gets codes that give zeros back.
Codes of 4 bits are laid out as `llmcomp/nibbles.py` says.

With `two_four` (Int8 and Int4) a matrix that is 2:4 sparse keeps the codes of two of every four neighbours along k, as
llmcomp/pairs.py says; the others are zero.

With `dynamic` (Int8 and Fp8 of whole rows) linear layers quantize their operand too, each token when it comes:
`llmcomp/dynamic.py`. What is stored, and what a lookup in a table gives, is the same as without.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llmcomp.errors import FormatError, OptionError
from llmcomp.nibbles import pack, unpack
from llmcomp.pairs import NotTwoFour, compress, expand, pack_nibbles, unpack_nibbles

# QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of N(0, 1), zero among them, scaled to [-1, 1].
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# OCP Microscaling Formats (MX) v1.0, section 5.3.3: sign, two bits of exponent, one of mantissa.
E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUPS = (32, 64, 128)
MOST_INPUTS = (2**31 - 1) // 127**2  # products of int8 with int8 that an int32 holds the sum of
AT_ONCE = 2**22  # weights that are quantized together: several float32 copies of them are made


@dataclass(frozen=True)
class Packed:
    """A quantized matrix (N, K): `codes` (N, K), or (N, K / 2 rounded up to 64 bytes) uint8 for 4 bits; `scale` (N,)
    float32, or (N, K / group) bfloat16 (float16 or float32 where others stored them so), uint8 exponents for mxfp4;
    `zero` (N, K / group) uint8 where there is one.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class Format:
    """What all formats share. `group` neighbours along k share a scale; 0: all of a row do. `dynamic`: linear layers
    quantize their operand to the same codes. `two_four`: what is zero in a 2:4 sparse matrix is not stored.
    """

    group: int = 0
    dynamic: bool = field(default=False, kw_only=True)
    two_four: bool = field(default=False, kw_only=True)
    bits: ClassVar[int] = 8
    stem: ClassVar[str] = ""
    groups: ClassVar[tuple[int, ...]] = (0, *GROUPS)

    def __post_init__(self) -> None:
        if self.group not in self.groups:
            raise OptionError(
                f"expected the group of {type(self).__name__} to be one of {', '.join(map(str, self.groups))}, found "
                f"{self.group!r}: pass one of these{' (0: one scale for each row)' if 0 in self.groups else ''}"
            )
        if self.two_four and (not isinstance(self, Int8 | Int4) or self.dynamic):
            raise OptionError(
                f"expected int8 or int4 for weights that are 2:4 sparse, found {self}: choose one of these"
            )
        if self.dynamic and (self.bits != 8 or self.group):
            raise OptionError(
                f"expected int8 or fp8 with a scale for each row, for activations that are quantized too, found "
                f"{self}: leave out {'the group' if self.bits == 8 else 'dynamic'}, or pass Int8(dynamic=True)"
            )

    @property
    def table(self) -> tuple[float, ...] | None:
        """What the 16 codes of a 4-bit format stand for, before zero and scale."""
        return None

    def __str__(self) -> str:
        group = "" if self.group == type(self).group else f"_g{self.group}"
        return self.stem + group + ("_dynamic" if self.dynamic else "") + ("_2:4" if self.two_four else "")

    def quantize(self, weight: Tensor) -> Packed:
        """The codes of a float matrix (N, K).

        Raises:
            FormatError: it is no matrix, `group` does not divide K, or it holds NaN or infinite numbers.
        """
        check(weight, self)
        step = max(1, AT_ONCE // weight.shape[1])
        first = self._some(weight[:step])
        if len(weight) <= step:
            return first
        parts = (first.codes, first.scale, first.zero)
        codes, scale, zero = (p if p is None else p.new_empty(len(weight), *p.shape[1:]) for p in parts)
        assert codes is not None and scale is not None
        for at in range(0, len(weight), step):
            some, rows = self._some(weight[at : at + step]), slice(at, at + step)
            codes[rows], scale[rows] = some.codes, some.scale
            if zero is not None and some.zero is not None:
                zero[rows] = some.zero
        return Packed(codes, scale, zero)

    def _some(self, rows: Tensor) -> Packed:
        parts = grouped(rows.float(), self.group)
        scale, zero = self.scales(parts)
        return self.packed(self.round(parts, scale, zero).flatten(-2), scale, zero)

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Packed:
        """Codes (N, K), scales and zero points (N, groups) as they are stored."""
        stored = scale if self.group else scale.flatten()
        if self.two_four:
            try:
                return Packed(self.without_zeros(codes, zero), stored, zero)
            except NotTwoFour as error:
                raise FormatError(f"expected a 2:4 sparse weight for {self}: {error}; prune it first") from error
        return Packed(pack(codes) if self.bits == 4 else codes, stored, zero)

    def zero_codes(self, zero: Tensor | None) -> Tensor | int:
        """The codes that stand for 0: one for all, or (..., groups)."""
        return 0

    def without_zeros(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        """Codes (N, K) of a 2:4 sparse matrix as bytes (N, B / 8 + B / 2 * bits / 8) uint8, of whole blocks B.

        Raises:
            NotTwoFour: more than two of four neighbours are not zero.
        """
        zeros = self.zero_codes(zero)
        spread = zeros if isinstance(zeros, int) else zeros.repeat_interleave(self.group, 1)
        masks, kept = compress(codes, codes != spread)
        return torch.cat([masks, pack_nibbles(kept) if self.bits == 4 else kept.view(torch.uint8)], 1)

    def with_zeros(self, stored: Tensor, zero: Tensor | None, columns: int) -> Tensor:
        """The inverse of `without_zeros`: codes (..., columns)."""
        at = stored.shape[-1] // (5 if self.bits == 8 else 3)
        kept = stored[..., at:].contiguous()
        kept = unpack_nibbles(kept) if self.bits == 4 else kept.view(torch.int8)
        zeros = self.zero_codes(zero)
        if not isinstance(zeros, int):  # one for every group of four
            zeros = zeros.repeat_interleave(self.group // 4, -1)
            zeros = torch.nn.functional.pad(zeros, (0, kept.shape[-1] // 2 - zeros.shape[-1]))
        return expand(stored[..., :at], kept, zeros)[..., :columns]

    def dequantize(self, packed: Packed, columns: int, dtype: torch.dtype) -> Tensor:
        """The matrix (..., columns) that `packed` stands for, computed in float32 and rounded once to `dtype`.

        Leading dimensions are free: rows that were gathered out of a matrix are dequantized the same way.
        """
        codes = self.codes(packed, columns)
        scale = packed.scale if self.group else packed.scale.unsqueeze(-1)
        numbers = self.numbers(grouped(codes, self.group), scale, packed.zero).flatten(-2)
        most = min(torch.finfo(dtype).max, torch.finfo(numbers.dtype).max)
        return numbers.clamp(-most, most).to(dtype)  # codes reach beyond the largest weight

    def codes(self, packed: Packed, columns: int) -> Tensor:
        """A byte for every code (..., columns)."""
        if self.two_four:
            return self.with_zeros(packed.codes, packed.zero, columns)
        return unpack(packed.codes, columns) if self.bits == 4 else packed.codes

    # ---- the arithmetic: of groups (..., groups, K / groups) with scales and zero points (..., groups) as stored ----

    def scales(self, parts: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale of every group of float weights, and its zero point where the format has one."""
        raise NotImplementedError

    def round(self, parts: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest code of every float weight."""
        raise NotImplementedError

    def numbers(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What codes stand for, in float32."""
        return codes.float() * scale.float().unsqueeze(-1)


def check(weight: Tensor, format: Format) -> None:
    """Refuse what `format` can't hold.

    Raises:
        FormatError: says which.
    """
    shape = tuple(weight.shape)
    if weight.dim() != 2 or not weight.dtype.is_floating_point or 0 in shape:
        raise FormatError(f"expected a float matrix to quantize, found {weight.dtype} of shape {shape}: leave it out")
    if format.group and shape[1] % format.group:
        raise FormatError(
            f"expected the {shape[1]} inputs of a weight to be a multiple of the group, found a group of "
            f"{format.group}: choose a group that divides them, or leave this weight out"
        )
    if isinstance(format, Int8) and format.dynamic and shape[1] > MOST_INPUTS:
        raise FormatError(
            f"expected at most {MOST_INPUTS} inputs of a weight whose products are added up in 32 bits, found "
            f"{shape[1]}: choose int8"
        )
    if not all(bool(torch.isfinite(rows).all()) for rows in weight.split(max(1, AT_ONCE // shape[1]))):
        raise FormatError("expected finite weights to quantize, found NaN or infinity: repair the checkpoint")


def rounded(weight: Tensor, form: Format) -> Tensor:
    """What the codes of a matrix (N, K) stand for, in float32."""
    return form.dequantize(form.quantize(weight), weight.shape[1], torch.float32)


def grouped(values: Tensor, group: int) -> Tensor:
    """(..., K) as (..., groups, group); one group where `group` is 0."""
    return values.reshape(*values.shape[:-1], -1, group or values.shape[-1])


def _nonzero(scale: Tensor) -> Tensor:
    """Scales of all-zero groups become 1: any code would do, a division by zero would not."""
    return torch.where(scale == 0, 1.0, scale)


def _stored(scale: Tensor, group: int) -> Tensor:
    """Scales as they are stored: float32 for rows, bfloat16 for groups."""
    if not group:
        return _nonzero(scale)
    most = torch.finfo(torch.bfloat16).max
    return _nonzero(_nonzero(scale).clamp(-most, most).bfloat16())


@dataclass(frozen=True)
class Int8(Format):
    """Symmetric int8: scale = max |w| / 127, code = round(w / scale) in -127 .. 127.

    With `dynamic` a token x becomes codes in the same way, scale = max |x| / 127; the product with a row of the weight
    is the sum of the products of the codes, exact in int32, times the scale of the token, times that of the row.
    """

    stem: ClassVar[str] = "int8"

    def scales(self, parts: Tensor) -> tuple[Tensor, Tensor | None]:
        return _stored(parts.abs().amax(-1) / 127, self.group), None

    def round(self, parts: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return torch.round(parts / scale.float().unsqueeze(-1)).clamp_(-127, 127).to(torch.int8)


@dataclass(frozen=True)
class Fp8(Format):
    """float8 e4m3 (no infinities): scale = max |w| / 448, code = w / scale rounded by the type.

    With `dynamic` a token x becomes codes in the same way, scale = max |x| / 448; the product with a row of the weight
    is the sum of the products of the codes, in float32, times the scale of the token, times that of the row.
    """

    stem: ClassVar[str] = "fp8"
    groups: ClassVar[tuple[int, ...]] = (0,)

    def scales(self, parts: Tensor) -> tuple[Tensor, Tensor | None]:
        return _stored(parts.abs().amax(-1) / 448, self.group), None

    def round(self, parts: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (parts / scale.unsqueeze(-1)).clamp_(-448, 448).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Int4(Format):
    """4-bit integers, with a zero point for each group or symmetric.

    Asymmetric: scale = (max - min) / 15 over the group and zero, zero = round(-min / scale), code = round(w / scale) +
    zero in 0 .. 15. Symmetric, as llama.cpp's Q4_0: scale = -(the weight of largest magnitude) / 8, so that weight has
    code 0 and the scale may be negative; code = round(w / scale) + 8 in 0 .. 15.
    """

    group: int = 128
    symmetric: bool = False
    bits: ClassVar[int] = 4
    stem: ClassVar[str] = "int4"
    groups: ClassVar[tuple[int, ...]] = GROUPS

    @property
    def table(self) -> tuple[float, ...]:
        return tuple(float(code - 8 if self.symmetric else code) for code in range(16))

    def __str__(self) -> str:
        stem, *rest = super().__str__().partition("_2:4")
        return "".join([stem, "_symmetric" if self.symmetric else "", *rest])

    def zero_codes(self, zero: Tensor | None) -> Tensor | int:
        return 8 if zero is None else zero

    def scales(self, parts: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
            return _stored(largest / -8, self.group), None
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = _stored((high / 16 - low / 16) / 15 * 16, self.group)  # high - low may be too large
        return scale, torch.round(-low / scale.float()).clamp_(0, 15).to(torch.uint8)

    def round(self, parts: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        codes = torch.round(parts / scale.float().unsqueeze(-1)) + _shift(zero)
        return codes.clamp_(0, 15).to(torch.uint8)

    def numbers(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (codes.float() - _shift(zero)) * scale.float().unsqueeze(-1)


def _shift(zero: Tensor | None) -> Tensor | float:
    return 8.0 if zero is None else zero.float().unsqueeze(-1)


@dataclass(frozen=True)
class Coded(Format):
    """4-bit codes that stand for the numbers of a table."""

    bits: ClassVar[int] = 4

    def round(self, parts: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self._nearest((parts / scale_of(scale).unsqueeze(-1)).contiguous())

    def numbers(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return torch.tensor(self.table, device=codes.device)[codes.int()] * scale_of(scale).unsqueeze(-1)

    def _nearest(self, values: Tensor) -> Tensor:
        """The codes of the numbers of the table that are nearest to `values` (ties: the even code), as uint8."""
        assert self.table is not None
        order = sorted(range(16), key=lambda code: (self.table[code], code))  # type: ignore[index]
        numbers = torch.tensor([self.table[code] for code in order], device=values.device)
        middles = (numbers[1:] + numbers[:-1]) / 2
        low, high = torch.bucketize(values, middles), torch.bucketize(values, middles, right=True)
        codes = torch.tensor(order, dtype=torch.uint8, device=values.device)
        below, above = codes[low], codes[high]
        return torch.where(below % 2 == 0, below, above)


@dataclass(frozen=True)
class Nf4(Coded):
    """NormalFloat of QLoRA: scale = max |w| of the group, code = the nearest of NF4_TABLE to w / scale."""

    group: int = 64
    stem: ClassVar[str] = "nf4"
    groups: ClassVar[tuple[int, ...]] = GROUPS

    @property
    def table(self) -> tuple[float, ...]:
        return NF4_TABLE

    def scales(self, parts: Tensor) -> tuple[Tensor, Tensor | None]:
        return _stored(parts.abs().amax(-1), self.group), None


@dataclass(frozen=True)
class Mxfp4(Coded):
    """OCP MXFP4: 32 weights share the scale 2 ** (floor(log2(max |w|)) - 2), codes are float4 e2m1, clipped at 6."""

    group: int = 32
    stem: ClassVar[str] = "mxfp4"
    groups: ClassVar[tuple[int, ...]] = (32,)

    @property
    def table(self) -> tuple[float, ...]:
        return E2M1_TABLE

    def scales(self, parts: Tensor) -> tuple[Tensor, Tensor | None]:
        _, exponent = torch.frexp(parts.abs().amax(-1))  # max = mantissa * 2 ** exponent, mantissa in [0.5, 1)
        return (exponent - 3 + 127).clamp_(1, 254).to(torch.uint8), None


def scale_of(stored: Tensor) -> Tensor:
    """Stored scales as float32: uint8 is the exponent of a power of two (e8m0 of the MX formats), biased by 127."""
    if stored.dtype != torch.uint8:
        return stored.float()
    return (stored.int() << 23).view(torch.float32)


FORMATS: tuple[type[Format], ...] = (Int8, Fp8, Int4, Nf4, Mxfp4)
_NAME = re.compile(
    r"(?P<stem>[a-z0-9]+?)(?:_g(?P<group>\d+))?(?P<symmetric>_symmetric)?(?P<dynamic>_dynamic)?(?P<two_four>_2:4)?"
)


def names() -> tuple[str, ...]:
    """Every name that `parse_format` accepts."""
    every = [kind(group) for kind in FORMATS for group in kind.groups]
    every += [Int4(group, symmetric=True) for group in Int4.groups]
    every += [Int8(dynamic=True), Fp8(dynamic=True)]
    return tuple(map(str, every))


def parse_format(name: str) -> Format:
    """The format of a name: "int8", "int8_g64", "fp8", "int4" (groups of 128), "int4_g32_symmetric", "nf4", "mxfp4",
    "int8_dynamic", "fp8_dynamic".

    Raises:
        OptionError: no format has this name; lists those that exist.
    """
    found = _NAME.fullmatch(name)
    kind = next((k for k in FORMATS if found and k.stem == found["stem"]), None)
    if found is None or kind is None or (found["symmetric"] and kind is not Int4):
        raise OptionError(f"expected the name of a weight format, found {name!r}: the names are {', '.join(names())}")
    group = kind.group if found["group"] is None else int(found["group"])
    dynamic, two_four = found["dynamic"] is not None, found["two_four"] is not None
    if found["symmetric"]:
        return Int4(group, symmetric=True, dynamic=dynamic, two_four=two_four)
    return kind(group, dynamic=dynamic, two_four=two_four)


def packed_bytes(format: Format, shape: Sequence[int]) -> int:
    """Bytes that a matrix (N, K) takes where it is stored, scales and zero points among them."""
    rows, columns = shape
    padded = math.ceil(columns / 128) * 128 if format.bits == 4 or format.two_four else columns
    stored = padded * (format.bits // 2 + 1 if format.two_four else format.bits)
    scales = 1 if not format.group else columns // format.group
    per_scale = 32 if not format.group else 8 if isinstance(format, Mxfp4) else 16
    if isinstance(format, Int4) and not format.symmetric:
        per_scale += 8
    return rows * (stored + scales * per_scale) // 8


def bits_per_weight(format: Format, shape: Sequence[int]) -> float:
    """Bits that a weight of a matrix (..., N, K) takes in memory, scales and zero points among them."""
    return 8 * packed_bytes(format, shape[-2:]) / math.prod(shape[-2:])
