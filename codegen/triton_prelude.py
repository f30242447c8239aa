"""Device functions of generated Triton kernels: rounding, dot, reductions, and mathematics that `tl` lacks.

Imported by generated files only: this module needs triton. Everything here runs on a GPU and under Triton's
interpreter, so there is no libdevice and no inline assembly. Where the interpreter computes something else
than a GPU (bfloat16 is wrong in it), the branch is on `INTERPRETED` and hidden in this file.

Polynomials are least-maximum fits made for this file; float64 variants refine them or run longer series.
"""

from collections.abc import Callable

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def device(function: Callable[..., tl.tensor]) -> Callable[..., tl.tensor]:
    """`triton.jit`, but plain Python under the interpreter, where a call of a jitted function takes long."""
    jitted: Callable[..., tl.tensor] = function if INTERPRETED else triton.jit(function)
    return jitted


def combiner(function: Callable[..., tl.tensor]) -> Callable[..., tl.tensor]:
    """What `tl.reduce` takes: always a jitted function."""
    jitted: Callable[..., tl.tensor] = triton.jit(function)
    return jitted


# ---- values in memory ---------------------------------------------------------------------------------


@device
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 `x` as `dtype`, rounded to nearest even. (The interpreter's own conversion truncates.)"""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@device
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 `x`, rounded to what `dtype` can hold."""
    return narrow(x, dtype).to(tl.float32)


@device
def float8_bits(word: tl.tensor) -> tl.tensor:
    """The bits of a float32, 2**-120 times the float8 e4m3 in the highest byte of `word` (int32); not for NaN.

    The shift repeats the sign; the mask leaves it, the exponent, which falls on the float32's own, and the mantissa.
    """
    return (word >> 4) & -0x78100000


@device
def from_float8(x: tl.tensor) -> tl.tensor:
    """The bits of a float8 e4m3 (uint8) as float32, on every GPU; not for NaN."""
    return float8_bits(x.to(tl.int32) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36


@device
def to_float8(x: tl.tensor) -> tl.tensor:
    """The bits (uint8) of float32 `x` as a float8 e4m3, rounded to nearest even, on every GPU; up to 448, or NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2^-6 a float8 is a multiple of 2^-9: adding 2^14 makes the float adder round to one.
    low = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, low, normal)
    return (tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@device
def decoded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Codes of a quantized cache, int8 or the bits of a float8 (uint8), as `dtype`, which holds them exactly."""
    if x.dtype == tl.uint8:
        return narrow(from_float8(x), dtype)
    elif INTERPRETED:
        return narrow(x.to(tl.float32), dtype)
    else:
        return x.to(dtype)


@device
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2 ** (exponent - 127) of a stored exponent (uint8), as float32."""
    return (exponent.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@device
def e2m1(code: tl.tensor) -> tl.tensor:
    """The number that a 4-bit float e2m1 stands for: sign, two bits of exponent, one of mantissa."""
    half = (code & 1).to(tl.float32) * 0.5
    exponent = (code >> 1) & 3
    normal = (1.0 + half) * power_of_two(exponent + 126)
    magnitude = tl.where(exponent == 0, half, normal)
    return tl.where(code >= 8, -1.0 * magnitude, magnitude)


@device
def choose4(b0: tl.tensor, b1: tl.tensor, v0: float, v1: float, v2: float, v3: float) -> tl.tensor:
    """v0, v1, v2 or v3: the one whose number has the bits b1 b0."""
    return tl.where(b1, tl.where(b0, v3, v2), tl.where(b0, v1, v0))


@device
def nf4(code: tl.tensor) -> tl.tensor:
    """The number that a NormalFloat code stands for (llmcomp/formats.py): a tree of choices, bit by bit."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    v0 = choose4(b0, b1, -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    v1 = choose4(b0, b1, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    v2 = choose4(b0, b1, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    v3 = choose4(b0, b1, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
    return tl.where(code >= 8, tl.where(b2, v3, v2), tl.where(b2, v1, v0))


@device
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + a @ b in float32. (The interpreter would multiply the bit patterns of bfloat16.)"""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@device
def below(index: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> tl.tensor:
    """index < size; known to hold, so that no mask is computed, where `block` divides `size`."""
    if size % block == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < size


@device
def inside(index: tl.tensor, end: tl.tensor, whole: tl.constexpr) -> tl.tensor:
    """index < end; known to hold, so that no mask is computed, where the block is `whole`."""
    if whole:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < end


@device
def checked_index(
    index: tl.tensor, size: tl.tensor, wrap: tl.constexpr, inside: tl.tensor, status_ptr: tl.tensor
) -> tl.tensor:
    """`index` clamped into [0, size), from the end where negative and `wrap`; reports those outside.

    `inside` masks the indices that count. Without `status_ptr` (None) nothing is reported.
    """
    if wrap:
        index = tl.where(index < 0, index + size, index)
    if status_ptr is not None:
        failed = ((index < 0) | (index >= size)) & inside
        tl.store(status_ptr + tl.zeros_like(failed.to(tl.int32)), 1, mask=failed)
    return tl.minimum(tl.maximum(index, 0), size - 1)


# ---- reductions along an axis, which is kept with size 1 ----------------------------------------------


@device
def total(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The sum."""
    return tl.sum(x, axis=axis, keep_dims=True).to(x.dtype)


@combiner
def _multiply(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a * b


@device
def product(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The product."""
    return tl.reduce(x, axis, _multiply, keep_dims=True)


@device
def largest(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The maximum; NaN if there is one."""
    best = tl.max(x, axis=axis, keep_dims=True).to(x.dtype)
    if x.dtype.is_floating():
        best = tl.where(tl.max((x != x).to(tl.int32), axis=axis, keep_dims=True) > 0, float("nan"), best)
    return best


@device
def smallest(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The minimum; NaN if there is one."""
    best = tl.min(x, axis=axis, keep_dims=True).to(x.dtype)
    if x.dtype.is_floating():
        best = tl.where(tl.max((x != x).to(tl.int32), axis=axis, keep_dims=True) > 0, float("nan"), best)
    return best


@device
def any_true(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Whether any element is not zero."""
    return tl.max((x != 0).to(tl.int32), axis=axis, keep_dims=True) > 0


@device
def all_true(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Whether no element is zero."""
    return tl.min((x != 0).to(tl.int32), axis=axis, keep_dims=True) > 0


@device
def first_at(x: tl.tensor, best: tl.tensor, index: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The smallest of `index` where `x` is `best` (NaN is NaN), as int64."""
    found = (x == best) | ((x != x) & (best != best))
    return tl.min(tl.where(found, index.to(tl.int64), 0x7FFFFFFFFFFFFFFF), axis=axis, keep_dims=True)


@device
def larger(x: tl.tensor, best: tl.tensor) -> tl.tensor:
    """Whether `x` replaces `best` in a running maximum: NaN wins, the first of equals stays."""
    return (x > best) | ((x != x) & (best == best))


@device
def lesser(x: tl.tensor, best: tl.tensor) -> tl.tensor:
    """Whether `x` replaces `best` in a running minimum: NaN wins, the first of equals stays."""
    return (x < best) | ((x != x) & (best == best))


# ---- arithmetic ---------------------------------------------------------------------------------------


@device
def maximum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The larger; NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@device
def minimum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The smaller; NaN if one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@device
def div(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@device
def reciprocal(x: tl.tensor) -> tl.tensor:
    """1 / x, correctly rounded."""
    return div(tl.full((), 1.0, x.dtype), x)


@device
def sqrt(x: tl.tensor) -> tl.tensor:
    """The square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@device
def sign(x: tl.tensor) -> tl.tensor:
    """-1, 0 or 1; 0 for NaN, as torch has it."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@device
def copysign(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The magnitude of `x` with the sign of `y`."""
    if x.dtype == tl.float64:
        magnitude = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        return (magnitude | (y.to(tl.int64, bitcast=True) & -0x8000000000000000)).to(tl.float64, bitcast=True)
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return (magnitude | (y.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@device
def trunc(x: tl.tensor) -> tl.tensor:
    """Rounded towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@device
def round_even(x: tl.tensor) -> tl.tensor:
    """Rounded to the nearest integer, halves to even: adding 2**23 (2**52) leaves no fraction bits."""
    if x.dtype == tl.float64:
        ulp_is_one = tl.full((), 4503599627370496.0, tl.float64)
    else:
        ulp_is_one = tl.full((), 8388608.0, tl.float32)
    a = tl.abs(x)
    return copysign(tl.where(a < ulp_is_one, (a + ulp_is_one) - ulp_is_one, a), x)


@device
def floor_div(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Integers: quotient rounded down. Floats: as torch.floor_divide."""
    if x.dtype.is_floating():
        rest = fmod(x, y)
        quotient = div(x - rest, y)
        quotient = tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)
        whole = tl.floor(quotient)
        whole = tl.where(quotient - whole > 0.5, whole + 1, whole)
        return tl.where(y == 0, div(x, y), tl.where(quotient == 0, copysign(x * 0, div(x, y)), whole))
    else:
        quotient = x // y
        return tl.where((quotient * y != x) & ((x < 0) != (y < 0)), quotient - 1, quotient)


@device
def trunc_div(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, rounded towards zero."""
    return trunc(div(x, y))


@device
def fmod(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The rest of x / y with the sign of `x`, in double precision: exact for quotients below 2**300.

    A step takes 52 bits off the quotient; x - round(x / y) * y is exact in a fused multiply-add.
    """
    rest = x.to(tl.float64)
    by = y.to(tl.float64)
    for _ in range(0, 6):
        rest = tl.fma(-1.0 * trunc(rest / by), by, rest)
    rest = tl.where((rest != 0) & ((rest < 0) != (x < 0)), rest + copysign(by, x.to(tl.float64)), rest)
    rest = tl.where(tl.abs(x) < tl.abs(y), x.to(tl.float64), rest)  # by may be infinite
    rest = tl.where((tl.abs(x) == float("inf")) | (y == 0) | (y != y) | (x != x), float("nan"), rest)
    return copysign(rest.to(x.dtype), x)


@device
def remainder(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The modulo with the sign of `y`."""
    if x.dtype.is_floating():
        rest = fmod(x, y)
    else:
        rest = x % y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@device
def bitwise_not(x: tl.tensor) -> tl.tensor:
    """~x. For uint8 the interpreter of Triton 3.6 has no ~."""
    if x.dtype == tl.uint8:
        return x ^ 255
    else:
        return ~x


@device
def shift_left(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x << y; 0 where `y` is no bit of `x`."""
    inside = (y >= 0) & (y < x.dtype.primitive_bitwidth)
    return tl.where(inside, x << tl.where(inside, y, 0), 0).to(x.dtype)


@device
def shift_right(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x >> y; all sign bits (0 for unsigned integers) where `y` is no bit of `x`."""
    inside = (y >= 0) & (y < x.dtype.primitive_bitwidth)
    shifted = (x >> tl.where(inside, y, x.dtype.primitive_bitwidth - 1)).to(x.dtype)
    if x.dtype.is_int_unsigned():
        shifted = tl.where(inside, shifted, 0).to(x.dtype)
    return shifted


@device
def hypot(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """sqrt(x*x + y*y) without overflow: float32 in double precision, float64 scaled."""
    infinite = (tl.abs(x) == float("inf")) | (tl.abs(y) == float("inf"))
    if x.dtype == tl.float64:
        big = tl.maximum(tl.abs(x), tl.abs(y))
        ratio = tl.minimum(tl.abs(x), tl.abs(y)) / tl.where(big == 0, 1, big)
        length = big * tl.sqrt(1 + ratio * ratio) + (x - x) + (y - y)
    else:
        a = x.to(tl.float64)
        b = y.to(tl.float64)
        length = tl.sqrt(a * a + b * b).to(tl.float32)
    return tl.where(infinite, float("inf"), length)


# ---- exponentials and logarithms ----------------------------------------------------------------------


@device
def exp(x: tl.tensor) -> tl.tensor:
    """e**x. float32: split (Cody and Waite) before the hardware's 2**x, which alone loses |x| ulps."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = minimum(maximum(x, -110.0), 90.0)
        whole = tl.floor(x * 1.4426950408889634 + 0.5)
        part = tl.fma(whole, -0.693359375, x)
        part = tl.fma(whole, 2.12194440e-4, part)
        half = tl.floor(whole * 0.5)
        return tl.exp2(part * 1.4426950408889634) * tl.exp2(half) * tl.exp2(whole - half)


@device
def fast_exp(x: tl.tensor) -> tl.tensor:
    """e**x for the weights of a softmax: those that matter are near 0, where the hardware is exact enough."""
    return tl.exp2(x * 1.4426950408889634)


@device
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e**-x)."""
    return reciprocal(1 + exp(-1.0 * x))


@device
def expm1(x: tl.tensor) -> tl.tensor:
    """e**x - 1: the power series, nested, on [-1, 1]."""
    series = tl.full((), 1.0, x.dtype)
    if x.dtype == tl.float64:
        for i in tl.static_range(0, 17):
            series = series * x * (1.0 / (18 - i)) + 1
    else:
        for i in tl.static_range(0, 11):
            series = series * x * (1.0 / (12 - i)) + 1
    return tl.where(tl.abs(x) < 1, series * x, exp(x) - 1)


@device
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x), corrected for the rounding of the sum (Kahan)."""
    u = 1 + x
    corrected = tl.log(u) * div(x, u - 1)
    return tl.where((u == 1) | (x == float("inf")), x, corrected)


@device
def log10(x: tl.tensor) -> tl.tensor:
    """The decimal logarithm."""
    return tl.log(x) * 0.4342944819032518


@device
def pow(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x**y as C has it: float32 in double precision; float64 to |y * log2(x)| units in the last place."""
    base = tl.abs(x).to(tl.float64)
    exponent = y.to(tl.float64)
    power = tl.exp2(exponent * tl.log2(base))
    half = exponent * 0.5
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(half) != half) & (tl.abs(exponent) < 9007199254740992.0)
    negative = copysign(tl.full((), 1.0, x.dtype), x) < 0
    power = tl.where(negative & odd, -1.0 * power, power)
    power = tl.where((x < 0) & (tl.abs(x) != float("inf")) & (whole == 0), float("nan"), power)
    return tl.where((y == 0) | (x == 1) | ((x == -1) & (tl.abs(y) == float("inf"))), 1.0, power).to(x.dtype)


@device
def power(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x**y of integers, by squaring; 0 for negative exponents except those of 1 and -1."""
    result = tl.where((y < 0) & (x * x != 1), 0, 1).to(x.dtype)
    exponent = tl.where(y < 0, -y, y)
    for _ in range(0, x.dtype.primitive_bitwidth):
        result = tl.where((exponent & 1) != 0, result * x, result).to(x.dtype)
        x = (x * x).to(x.dtype)
        exponent = exponent >> 1
    return result


# ---- hyperbolic functions -----------------------------------------------------------------------------


@device
def tanh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic tangent. float32: an odd polynomial near 0, elsewhere 1 - 2 / (e**2x + 1)."""
    if x.dtype == tl.float64:
        growth = expm1(2 * minimum(tl.abs(x), 20.0))
        return copysign(div(growth, growth + 2), x)
    else:
        a = tl.abs(x)
        z = a * a
        series = -0.00570498692514 * z + 0.0206390871564
        series = series * z - 0.0537397150479
        series = series * z + 0.133314421975
        series = series * z - 0.33333281942
        far = 1 - div(tl.full((), 2.0, x.dtype), exp(2 * a) + 1)
        return copysign(tl.where(a < 0.625, series * z * a + a, far), x)


@device
def sinh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic sine."""
    a = tl.abs(x)
    growth = expm1(a)
    root = exp(0.5 * a)
    return copysign(tl.where(a < 20, 0.5 * (growth + div(growth, growth + 1)), 0.5 * root * root), x)


@device
def cosh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic cosine."""
    a = tl.abs(x)
    growth = exp(a)
    root = exp(0.5 * a)
    return tl.where(a < 20, 0.5 * (growth + reciprocal(growth)), 0.5 * root * root)


@device
def asinh(x: tl.tensor) -> tl.tensor:
    """The inverse hyperbolic sine."""
    a = tl.abs(x)
    square = tl.where(a < 268435456.0, a * a, 0.0)
    near = log1p(a + div(square, 1 + sqrt(1 + square)))
    return copysign(tl.where(a < 268435456.0, near, tl.log(a) + 0.6931471805599453), x)


@device
def acosh(x: tl.tensor) -> tl.tensor:
    """The inverse hyperbolic cosine; NaN below 1."""
    t = tl.where(x < 268435456.0, x - 1, 1.0)
    near = log1p(t + sqrt(t * (2 + t)))
    value = tl.where(x < 268435456.0, near, tl.log(x) + 0.6931471805599453)
    return tl.where(x < 1, float("nan"), value)


@device
def atanh(x: tl.tensor) -> tl.tensor:
    """The inverse hyperbolic tangent."""
    a = tl.abs(x)
    return copysign(0.5 * log1p(div(2 * a, 1 - a)), x)


# ---- trigonometric functions --------------------------------------------------------------------------


@device
def next_piece(rest: tl.tensor, quarters: tl.tensor, part: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(rest, quarters) with `part` quarter turns more: whole turns are dropped, whole quarters counted."""
    rest += part - 4.0 * tl.floor(part * 0.25)
    whole = tl.floor(rest + 0.5)
    return rest - whole, quarters + whole


@device
def quarter_turns(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float32 |x| as (quarter turns, rest in [-pi/4, pi/4]), right for every `x` (Payne and Hanek).

    2/pi in pieces of 24 bits: in double precision the product with one is exact, and so is dropping whole turns
    from it. libdevice, which `tl.sin` calls, keeps a table in local memory for large `x`.
    """
    x = tl.abs(x).to(tl.float64)
    rest, quarters = next_piece(tl.zeros_like(x), tl.zeros_like(x), x * 0.6366197466850281)
    rest, quarters = next_piece(rest, quarters, x * 2.5682552973194106e-08)
    rest, quarters = next_piece(rest, quarters, x * 2.937095214933759e-16)
    rest, quarters = next_piece(rest, quarters, x * 3.2543794001732456e-23)
    rest, quarters = next_piece(rest, quarters, x * 1.2089613708828537e-29)
    rest, quarters = next_piece(rest, quarters, x * 5.667556795740071e-37)
    rest, quarters = next_piece(rest, quarters, x * 2.6204031112097215e-44)
    rest, quarters = next_piece(rest, quarters, x * 7.053957680880629e-52)
    return quarters.to(tl.int32), (rest * 1.5707963267948966).to(tl.float32)


@device
def wave(quarters: tl.tensor, r: tl.tensor) -> tl.tensor:
    """sin(quarters * pi/2 + r) for |r| up to pi/4."""
    z = r * r
    sine = ((-0.000195172346673 * z + 0.00833217768623) * z + -0.166666549367) * z * r + r
    cosine = ((2.4438379431e-05 * z + -0.00138873669096) * z + 0.0416666468546) * z * z + (1 - 0.5 * z)
    value = tl.where((quarters & 1) != 0, cosine, sine)
    return tl.where((quarters & 2) != 0, -1.0 * value, value)


@device
def sin(x: tl.tensor) -> tl.tensor:
    """The sine."""
    if x.dtype == tl.float64:
        return tl.sin(x)
    else:
        quarters, rest = quarter_turns(x)
        return wave(quarters, rest) * tl.where(copysign(tl.full((), 1.0, x.dtype), x) < 0, -1.0, 1.0)


@device
def cos(x: tl.tensor) -> tl.tensor:
    """The cosine."""
    if x.dtype == tl.float64:
        return tl.cos(x)
    else:
        quarters, rest = quarter_turns(x)
        return wave(quarters + 1, rest)


@device
def tan(x: tl.tensor) -> tl.tensor:
    """The tangent."""
    return div(sin(x), cos(x))


@device
def atan(x: tl.tensor) -> tl.tensor:
    """The inverse tangent: reduced to [0, tan(pi/8)], an odd polynomial, and for float64 one Newton step."""
    a = tl.abs(x)
    inverted = a > 1
    t = tl.where(inverted, reciprocal(tl.where(inverted, a, 1.0)), a)
    turned = t > 0.4142135623730950
    u = tl.where(turned, div(t - 1, t + 1), t)
    z = u * u
    series = -0.0602630522766 * z + 0.105698288064
    series = series * z - 0.142395326696
    series = series * z + 0.199981830411
    series = series * z - 0.33333306893
    angle = series * z * u + u
    if x.dtype == tl.float64:
        sine = tl.sin(angle)
        cosine = tl.cos(angle)
        angle += (u * cosine - sine) / (cosine + u * sine)
    angle = tl.where(turned, angle + 0.7853981633974483, angle)
    angle = tl.where(inverted, 1.5707963267948966 - angle, angle)
    return copysign(angle, x)


@device
def atan2(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    """The angle of the point (x, y)."""
    a = tl.abs(x)
    b = tl.abs(y)
    both_infinite = (a == float("inf")) & (b == float("inf"))
    ratio = tl.where(both_infinite, 1.0, div(b, tl.where(a == 0, 1.0, a)))
    angle = tl.where(a == 0, (b != 0).to(x.dtype) * 1.5707963267948966, atan(ratio))
    behind = copysign(tl.full((), 1.0, x.dtype), x) < 0
    angle = copysign(tl.where(behind, 3.141592653589793 - angle, angle), y)
    return tl.where((x != x) | (y != y), float("nan"), angle)


@device
def asin(x: tl.tensor) -> tl.tensor:
    """The inverse sine."""
    return atan(div(x, sqrt((1 - x) * (1 + x))))


@device
def acos(x: tl.tensor) -> tl.tensor:
    """The inverse cosine."""
    return 2 * atan(sqrt(div(1 - x, 1 + x)))


@device
def erfc(x: tl.tensor) -> tl.tensor:
    """1 - erf(x); from 0.5 on t * exp(P(t) - x*x), t = 2/(2 + |x|), the square split to keep its low bits."""
    a = tl.abs(x)
    t = div(tl.full((), 2.0, x.dtype), 2 + a)
    s = 2.5 * t - 1
    if x.dtype == tl.float64:
        fit = 1.687846329533732e-10 * s - 1.61621615608673178e-9
        fit = fit * s + 9.76046436750221233e-10
        fit = fit * s + 1.40994933863350255e-8
        fit = fit * s - 2.45192111851615759e-8
        fit = fit * s - 5.31929270801858235e-8
        fit = fit * s + 1.8949080034629114e-7
        fit = fit * s + 5.28390726394716458e-8
        fit = fit * s - 9.72775771215453066e-7
        fit = fit * s + 6.95243576622994032e-7
        fit = fit * s + 4.01005870961605928e-6
        fit = fit * s - 6.39761762949552814e-6
        fit = fit * s - 0.0000147709204613643289
        fit = fit * s + 0.0000388737134766610535
        fit = fit * s + 0.0000545358300685761108
        fit = fit * s - 0.000211315535426843024
        fit = fit * s - 0.000242661965879143038
        fit = fit * s + 0.00115976090138431527
        fit = fit * s + 0.00162099493099197464
        fit = fit * s - 0.0069752546844417622
    else:
        fit = 2.966181149e-5 * s - 0.0001362687442
        fit = fit * s - 0.000223771991
        fit = fit * s + 0.001099767118
        fit = fit * s + 0.001614671014
        fit = fit * s - 0.006954694786
    fit = fit * s - 0.0183674738093654296
    fit = fit * s + 0.0463760849528351931
    fit = fit * s + 0.518768445016172145
    fit = fit * s - 0.804072310106957537
    square = tl.minimum(a, 100.0) * tl.minimum(a, 100.0)
    low = tl.fma(tl.minimum(a, 100.0), tl.minimum(a, 100.0), -1.0 * square)
    tail = t * exp(-1.0 * square) * exp(fit - low)
    tail = tl.where(x < 0, 2 - tail, tail)
    return tl.where(x != x, x, tl.where(a < 0.5, 1 - tl.erf(x), tail))
