"""Device functions of generated Triton kernels that multiply by the codes of weights, few instructions for each.

A word of 32 bits holds 8 codes of 4 bits, or 4 bytes. A code that is cut out in its place is, read as a float32, a
denormal number: code * 2**(place - 149). A GPU multiplies those as fast as others and without an error, so no integer
is converted: the operand is multiplied by 2**(149 - place) before, and all sums of products are in units of 2**-74,
half of it, so that neither operands (up to 2**53) nor products (from 2**-52 on) leave the range of float32.

    integers    code                                      cut out with a mask
    e2m1        the float4 of mxfp4                       shifted so that its exponent is the float32's own
    nf4         an integer that stands for the number     looked up: PRMT has 8 bytes to choose from
    bytes       code + 128                                cut out with a mask; 128 is subtracted
    float8      itself                                    shifted so that its exponent is the float32's own

Imported by generated files only: this module needs triton.
"""

import torch
import triton
import triton.language as tl

from llmcomp.codegen.triton_prelude import INTERPRETED, device, div, dot, float8_bits, from_float8, nf4, to_float8

PORTABLE = tl.constexpr(triton.knobs.runtime.interpret or torch.version.hip is not None)
UNIT = tl.constexpr(2.0**74)
"""What sums of products are multiplied by in the end."""
NF4_STEP = tl.constexpr(1 / 15130.933298559172)
"""The numbers of NF4 are (code of NF4_CODES - NF4_ZERO) * NF4_STEP, with errors of 1.3e-5 (root mean square).

Step and zero were searched for: bits 7 of the codes c and c + 8 are equal, which saves instructions in `nf4_codes`.
"""
NF4_ZERO = tl.constexpr(16134.0)
NF4_CODES = (
    1003,
    5600,
    8189,
    10159,
    11830,
    13338,
    14756,
    16134,
    17338,
    18569,
    19858,
    21247,
    22802,
    24647,
    27073,
    31265,
)


def _bytes(codes: tuple[int, ...], shift: int) -> int:
    return int.from_bytes(bytes((c >> shift) & 255 for c in codes), "little", signed=True)


NF4_LOW = tl.constexpr(tuple(_bytes(NF4_CODES[i : i + 4], 0) for i in range(0, 16, 4)))
NF4_HIGH = tl.constexpr(tuple(_bytes(NF4_CODES[i : i + 4], 8) for i in range(0, 16, 4)))


@device
def quarters(x: tl.tensor) -> tl.tensor:
    """Operands [M, 16 * Q] as four tiles [M, Q, 4], of which tile j is multiplied by byte j of words [1, N, Q, 4]."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // 16, 4, 2, 2])
    even, odd = tl.split(pairs)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@device
def add_sums(sums: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """`sums` [M, 1, Q] and those of the operands of each Q, in units of the products."""
    return sums + (tl.sum((x0 + x1) + (x2 + x3), axis=2) * 2.0**-74)[:, None, :]


@device
def _times(x: tl.tensor, number: tl.tensor, power: tl.constexpr) -> tl.tensor:
    """[M, Q, 4] times the float32 whose bits are [1, N, Q, 4], times 2**power."""
    return (x * 2.0**power)[:, None, :, :] * number.to(tl.float32, bitcast=True)


@device
def add_integers(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, half: tl.constexpr
) -> tl.tensor:
    """`part` [M, N, Q, 4] and the products with the codes of a half of each byte; a float32 has room up to bit 22."""
    late = words >> 12
    if half == 0:
        part += _times(x0, words & 0xF, 75)
        part += _times(x1, words & 0xF00, 67)
        part += _times(x2, words & 0xF0000, 59)
        part += _times(x3, late & 0xF000, 63)
    else:
        part += _times(x0, words & 0xF0, 71)
        part += _times(x1, words & 0xF000, 63)
        part += _times(x2, late & 0xF00, 67)
        part += _times(x3, late & 0xF0000, 59)
    return part


@device
def _e2m1(words: tl.tensor, place: tl.constexpr) -> tl.tensor:
    """The bits of a float32, 2**-126 times the float4 at bits `place`: the sign comes along as the highest bit."""
    return ((words << (28 - place)) >> 6) & -0x7E400000


@device
def _byte(words: tl.tensor, place: tl.constexpr) -> tl.tensor:
    """Bytes at bits `place` (0 or 8) as denormal numbers, less 128."""
    return (words & (0xFF << place)).to(tl.float32, bitcast=True) - 2.0 ** (place - 142)


@device
def add_bytes(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor
) -> tl.tensor:
    """`part` [M, N, Q, 4] and the products with signed bytes.

    Adding 128 makes bytes positive. That is taken away before they are multiplied: the scale of a row of zeros is 1,
    and what is left of 128 minus 128 times the operands would show.
    """
    words = words ^ -0x7F7F7F80
    late = words >> 16
    part += (x0 * 2.0**75)[:, None, :, :] * _byte(words, 0)
    part += (x1 * 2.0**67)[:, None, :, :] * _byte(words, 8)
    part += (x2 * 2.0**75)[:, None, :, :] * _byte(late, 0)
    part += (x3 * 2.0**67)[:, None, :, :] * _byte(late, 8)
    return part


@device
def add_float8(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor
) -> tl.tensor:
    """`part` [M, N, Q, 4] and the products with floats e4m3 of 8 bits."""
    part += _times(x0, float8_bits(words << 24), 46)
    part += _times(x1, float8_bits(words << 16), 46)
    part += _times(x2, float8_bits(words << 8), 46)
    part += _times(x3, float8_bits(words), 46)
    return part


@device
def add_e2m1(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, half: tl.constexpr
) -> tl.tensor:
    """As `add_integers`, with floats of 4 bits."""
    part += _times(x0, _e2m1(words, 4 * half), 52)
    part += _times(x1, _e2m1(words, 4 * half + 8), 52)
    part += _times(x2, _e2m1(words, 4 * half + 16), 52)
    part += _times(x3, _e2m1(words, 4 * half + 24), 52)
    return part


@device
def permute(a: tl.tensor, b: tl.tensor, selector: tl.tensor) -> tl.tensor:
    """PRMT: four bytes of the eight of `a` and `b` (int32); each of the low four nibbles of `selector` picks one.

    A nibble above 7 picks byte (nibble - 8) and repeats its highest bit eight times.
    """
    if PORTABLE:
        result = tl.zeros_like(selector)
        for i in tl.static_range(4):
            nibble = selector >> (4 * i)
            chosen = tl.where((nibble & 4) != 0, b, a) >> (8 * (nibble & 3)) & 255
            chosen = tl.where((nibble & 8) != 0, (chosen >> 7) * 255, chosen)
            result |= chosen << (8 * i)
        return result
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@device
def _choose(words: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    return permute(tl.full(words.shape, low, tl.int32), tl.full(words.shape, high, tl.int32), words)


@device
def _nf4_low(words: tl.tensor) -> tl.tensor:
    """The low bytes of NF4_CODES for the codes at bits 0, 4, 8 and 12."""
    of_low = _choose(words & 0x77777777, NF4_LOW[0], NF4_LOW[1])
    of_high = _choose(words & 0x77777777, NF4_LOW[2], NF4_LOW[3])
    is_high = permute(tl.full(words.shape, -0x7F7F7F80, tl.int32), tl.full(words.shape, -0x7F7F7F80, tl.int32), words)
    return of_low ^ ((of_low ^ of_high) & is_high)


@device
def _small(words: tl.tensor, table: tl.constexpr) -> tl.tensor:
    """The bytes of a table for the codes at bits 0, 4, 8 and 12; all are below 128, so a nibble above 7 finds 0."""
    return _choose(words, table[0], table[1]) | _choose(words ^ -0x77777778, table[2], table[3])


@device
def _pair(low: tl.tensor, high: tl.tensor, number: tl.constexpr) -> tl.tensor:
    """Byte `number` of `low` and that of `high` above it."""
    return permute(low, high, tl.full(low.shape, 0xCC40 + 0x1111 * number, tl.int32))


@device
def add_nf4(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, half: tl.constexpr
) -> tl.tensor:
    """As `add_integers`, for NF4_CODES."""
    low, high = _nf4_low(words), _small(words, NF4_HIGH)
    part += _times(x0, _pair(low, high, half), 75)
    part += _times(x1, _pair(low, high, half + 2), 75)
    low, high = _nf4_low(words >> 16), _small(words >> 16, NF4_HIGH)
    part += _times(x2, _pair(low, high, half), 75)
    part += _times(x3, _pair(low, high, half + 2), 75)
    return part


@device
def add_exact_nf4(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, half: tl.constexpr
) -> tl.tensor:
    """As `add_e2m1`, with the very numbers of NF4, chosen bit by bit, for operands in float32."""
    part += (x0 * 2.0**-74)[:, None, :, :] * nf4((words >> (4 * half)) & 15)
    part += (x1 * 2.0**-74)[:, None, :, :] * nf4((words >> (4 * half + 8)) & 15)
    part += (x2 * 2.0**-74)[:, None, :, :] * nf4((words >> (4 * half + 16)) & 15)
    part += (x3 * 2.0**-74)[:, None, :, :] * nf4((words >> (4 * half + 24)) & 15)
    return part


# ---- codes of words [W, N] spread out along the depth, as float32 numbers [4 * W, N] --------------------


@device
def _spread(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor) -> tl.tensor:
    """Row 4 * w + j is row w of tile j."""
    tiles = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.permute(tiles, [0, 2, 3, 1]), [4 * c0.shape[0], c0.shape[1]])


@device
def scaled(numbers: tl.tensor, scale: tl.tensor, zero: tl.tensor, shifted: tl.constexpr) -> tl.tensor:
    """(numbers - zero) * scale, where `scale` and `zero` [S, N] are those of 4 * W / S neighbours."""
    runs = tl.reshape(numbers, [scale.shape[0], numbers.shape[0] // scale.shape[0], numbers.shape[1]])
    if shifted:
        runs = runs - (tl.zeros_like(scale) + zero)[:, None, :]
    return tl.reshape(runs * scale[:, None, :], numbers.shape)


@device
def _as_float(code: tl.tensor) -> tl.tensor:
    """2**23 and an integer below it, as float32: its mantissa is the integer."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@device
def spread_integers(words: tl.tensor, half: tl.constexpr, zero: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """(codes - zero) * scale."""
    c0 = _as_float((words >> (4 * half)) & 15)
    c1 = _as_float((words >> (4 * half + 8)) & 15)
    c2 = _as_float((words >> (4 * half + 16)) & 15)
    c3 = _as_float((words >> (4 * half + 24)) & 15)
    return scaled(_spread(c0, c1, c2, c3), scale, zero + 8388608.0, True)


@device
def spread_e2m1(words: tl.tensor, half: tl.constexpr, zero: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Floats of 4 bits times scale; they have no `zero`."""
    c0 = _e2m1(words, 4 * half)
    c1 = _e2m1(words, 4 * half + 8)
    c2 = _e2m1(words, 4 * half + 16)
    c3 = _e2m1(words, 4 * half + 24)
    return scaled(_spread(c0, c1, c2, c3).to(tl.float32, bitcast=True) * 2.0**126, scale, zero, False)


@device
def spread_nf4(words: tl.tensor, half: tl.constexpr, zero: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """(NF4_CODES - zero) * scale, in steps of NF4_STEP."""
    low = _nf4_low(words)
    high = _small(words, NF4_HIGH)
    c0 = _as_float(_pair(low, high, half))
    c1 = _as_float(_pair(low, high, half + 2))
    low = _nf4_low(words >> 16)
    high = _small(words >> 16, NF4_HIGH)
    c2 = _as_float(_pair(low, high, half))
    c3 = _as_float(_pair(low, high, half + 2))
    return scaled(_spread(c0, c1, c2, c3), scale * NF4_STEP, zero + 8388608.0, True)


@device
def spread_exact_nf4(words: tl.tensor, half: tl.constexpr, zero: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The very numbers of NF4, times scale."""
    c0 = (words >> (4 * half)) & 15
    c1 = (words >> (4 * half + 8)) & 15
    c2 = (words >> (4 * half + 16)) & 15
    c3 = (words >> (4 * half + 24)) & 15
    return scaled(nf4(_spread(c0, c1, c2, c3)), scale, zero, False)


# ---- 2:4 sparse weights: words of two bfloat16, and the masks of the groups of four that they are kept of ------------


@device
def _low(words: tl.tensor) -> tl.tensor:
    return (words << 16).to(tl.float32, bitcast=True)


@device
def _high(words: tl.tensor) -> tl.tensor:
    return (words & -0x10000).to(tl.float32, bitcast=True)


@device
def add_chosen(
    acc: tl.tensor, words: tl.tensor, kept: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor
) -> tl.tensor:
    """`acc` [M, N, Q] and the products of words [1, N, Q, 4] with the operands that `kept` [1, N, Q] chooses."""
    masks = kept.to(tl.int32)[:, :, :, None] >> (tl.arange(0, 4) * 4)[None, None, None, :]
    first, second = _of_group(masks, x0, x1, x2, x3)
    return acc + tl.sum(first * _low(words) + second * _high(words), axis=3)


@device
def spread_kept(words: tl.tensor, masks: tl.tensor) -> tl.tensor:
    """Words [W, N] with the masks of their groups as float32 numbers [4 * W, N]."""
    w0, w1, w2, w3 = _placed(_low(words), _high(words), masks)
    return _spread(w0, w1, w2, w3)


@device
def eighths(x: tl.tensor) -> tl.tensor:
    """Operands [M, 32 * Q] as eight tiles [M, Q, 4], of which tile j belongs to column j of those of a word."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 32, 4, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@device
def _of_group(masks: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """The two operands [M, N, Q, 4] out of four [M, Q, 4] that the low bits of `masks` [1, N, Q, 4] choose."""
    x1, x2 = x1[:, None, :, :], x2[:, None, :, :]
    first = tl.where((masks & 1) != 0, x0[:, None, :, :], tl.where((masks & 2) != 0, x1, x2))
    second = tl.where((masks & 8) != 0, x3[:, None, :, :], tl.where((masks & 4) != 0, x2, x1))
    return first, second


@device
def chosen_bytes(
    words: tl.tensor, kept: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor,
    x4: tl.tensor, x5: tl.tensor, x6: tl.tensor, x7: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The products [M, N, Q] of words [1, N, Q, 4] of signed bytes with the operands that `kept` [1, N, Q] chooses, in
    units of the products. See `add_bytes`.
    """
    masks = kept[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]
    words = words ^ -0x7F7F7F80
    late = words >> 16
    first, second = _of_group(masks, x0 * 2.0**75, x1 * 2.0**75, x2 * 2.0**75, x3 * 2.0**75)
    part = first * _byte(words, 0) + second * (_byte(words, 8) * 2.0**-8)
    first, second = _of_group(masks >> 4, x4 * 2.0**75, x5 * 2.0**75, x6 * 2.0**75, x7 * 2.0**75)
    part += first * _byte(late, 0) + second * (_byte(late, 8) * 2.0**-8)
    return tl.sum(part, axis=3)


@device
def chosen_nibbles(
    words: tl.tensor, kept: tl.tensor, half: tl.constexpr, zero: tl.tensor,
    x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor,
    x4: tl.tensor, x5: tl.tensor, x6: tl.tensor, x7: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The products [M, N, Q] of 4-bit codes less `zero`, in the low or the high halves of the bytes of words
    [1, N, Q, 4], with the operands that `kept` [1, N, Q] chooses.
    """
    masks = kept[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]
    words = words >> (4 * half)
    first, second = _of_group(masks, x0, x1, x2, x3)
    part = first * _less(words, zero) + second * _less(words >> 8, zero)
    first, second = _of_group(masks >> 4, x4, x5, x6, x7)
    part += first * _less(words >> 16, zero) + second * _less(words >> 24, zero)
    return tl.sum(part, axis=3)


@device
def _less(words: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """The lowest 4 bits less `zero`, a whole number: they become the last bits of 2**23 as a float32."""
    return ((words & 15) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@device
def spread_kept_bytes(words: tl.tensor, masks: tl.tensor) -> tl.tensor:
    """Words [W, N] of signed bytes with the masks of their groups as float32 numbers [8 * W, N]."""
    a, b = ((words << 24) >> 24).to(tl.float32), ((words << 16) >> 24).to(tl.float32)
    c, d = ((words << 8) >> 24).to(tl.float32), (words >> 24).to(tl.float32)
    return _spread_groups(a, b, c, d, masks)


@device
def spread_kept_nibbles(
    words: tl.tensor, masks: tl.tensor, half: tl.constexpr, zero: tl.tensor, scale: tl.tensor
) -> tl.tensor:
    """Words [W, N] of 4-bit codes with the masks of their groups as float32 numbers [8 * W, N]: the low halves, or the
    high ones, less `zero`, times `scale`.
    """
    words = words >> (4 * half)
    a, b = _less(words, zero) * scale, _less(words >> 8, zero) * scale
    c, d = _less(words >> 16, zero) * scale, _less(words >> 24, zero) * scale
    return _spread_groups(a, b, c, d, masks)


@device
def _spread_groups(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, masks: tl.tensor) -> tl.tensor:
    """What two groups of four keep, [W, N] each, in its columns: [8 * W, N]."""
    w0, w1, w2, w3 = _placed(a, b, masks)
    w4, w5, w6, w7 = _placed(c, d, masks >> 4)
    even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
    tiles = tl.permute(tl.join(even, odd), [0, 2, 3, 4, 1])
    return tl.reshape(tiles, [8 * a.shape[0], a.shape[1]])


@device
def _placed(a: tl.tensor, b: tl.tensor, masks: tl.tensor) -> tl.tensor:
    """Two numbers as the four columns of a group, where the low bits of `masks` are set."""
    w0 = tl.where((masks & 1) != 0, a, 0.0)
    w1 = tl.where((masks & 2) != 0, tl.where((masks & 1) != 0, b, a), 0.0)
    w2 = tl.where((masks & 4) != 0, tl.where((masks & 8) != 0, a, b), 0.0)
    w3 = tl.where((masks & 8) != 0, b, 0.0)
    return w0, w1, w2, w3


# ---- operands that are quantized as well ----------------------------------------------------------------


@device
def quotient(x: tl.tensor, factor: tl.tensor, divisor: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """x * factor / divisor, rounded as a division rounds it: the rest that a first guess leaves is divided too."""
    x = x * factor
    if INTERPRETED:  # its fma rounds twice
        return div(x, divisor)
    else:
        guess = x * inverse
        return tl.fma(tl.fma(-1.0 * guess, divisor, x), inverse, guess)


@device
def low_bytes_of(q: tl.tensor) -> tl.tensor:
    """Numbers up to 127 in size, rounded to even, as the low bytes of int32: 1.5 * 2**23 has no fraction."""
    return (q + 12582912.0).to(tl.int32, bitcast=True)


@device
def bytes_of(q: tl.tensor) -> tl.tensor:
    """Numbers up to 127 in size, rounded to even, as int8."""
    return low_bytes_of(q).to(tl.int8)


@device
def rounded_to_bytes(q: tl.tensor) -> tl.tensor:
    """Numbers up to 127 in size, rounded to even."""
    return (q + 12582912.0) - 12582912.0


@device
def float8_of(q: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """Numbers up to 448 in size as the bits of floats e4m3."""
    if native and not INTERPRETED:
        return q.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return to_float8(q)


@device
def rounded_to_float8(q: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """Numbers up to 448 in size, rounded to floats e4m3."""
    if native and not INTERPRETED:
        return q.to(tl.float8e4nv).to(tl.float32)
    else:
        return from_float8(to_float8(q))


@device
def dot_bytes(x: tl.tensor, weight: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + x @ weight, exact in int32."""
    if INTERPRETED:
        return acc + tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee").to(tl.int32)
    else:
        return tl.dot(x, weight, acc, out_dtype=tl.int32)


@device
def dot_float8(x: tl.tensor, weight: tl.tensor, acc: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """acc + x @ weight of the bits of floats e4m3, in float32; bfloat16 holds them where they are not `native`.

    Tensor cores add up the products of a step with fewer bits than float32 has, the steps are added in float32.
    """
    if INTERPRETED:
        return dot(from_float8(x), from_float8(weight), acc)
    elif native:
        x = x.to(tl.float8e4nv, bitcast=True)
        return tl.dot(x, weight.to(tl.float8e4nv, bitcast=True), acc, max_num_imprecise_acc=x.shape[1])
    else:
        return tl.dot(from_float8(x).to(tl.bfloat16), from_float8(weight).to(tl.bfloat16), acc)


@device
def dot4(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """DP4A: acc + the products of the four signed bytes of `a` and of `b` (int32)."""
    if PORTABLE:
        for i in tl.static_range(4):
            acc += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@device
def words_of(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """Words of the low bytes of four int32."""
    return (x0 & 0xFF) | ((x1 & 0xFF) << 8) | ((x2 & 0xFF) << 16) | (x3 << 24)


@device
def add_dot4(
    part: tl.tensor, words: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor
) -> tl.tensor:
    """`part` [M, N, Q, 4] (int32) and the products of bytes with bytes."""
    return dot4(words_of(x0, x1, x2, x3)[:, None, :, :], words, part)
