// What generated C++ kernels build on: 16-bit floats, checked indices and the operations of a kernel body.
//
// No header but <stdint.h>, so that a kernel compiles in a fraction of a second, for x86-64 and aarch64, with gcc
// and clang. Functions that are printed in vector loops are free of branches; rare ones call the C library.
//
// Polynomials are minimax fits made for this file (Remez exchange in 40 digits); range reductions follow W. J. Cody
// and W. Waite, "Software Manual for the Elementary Functions", 1980. tests/test_cpp_expr.py holds every function
// to 2.5 units in the last place.
#pragma once
#include <stdint.h>

#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
#endif

#define INLINE static inline __attribute__((always_inline))

namespace op {

template <typename To, typename From>
INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To y;
    __builtin_memcpy(&y, &x, sizeof(y));
    return y;
}

// ---- 16-bit floats: conversions round to nearest even and keep NaN and infinity -------------------------------

INLINE uint16_t to_bfloat16(float x) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return uint16_t(x != x ? 0x7fc0u : rounded);
}

INLINE float from_bfloat16(uint16_t x) {
    return bits<float>(uint32_t(x) << 16);
}

// In integer arithmetic, because gcc 12 does not vectorize conversions of _Float16. Below 2^-14 a half is a multiple
// of 2^-24: adding 0.5 makes the float adder round to one.
INLINE uint16_t to_float16(float x) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;
    const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000u;
    const uint32_t finite = a < 0x38800000u ? subnormal : normal;
    const uint32_t huge = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return uint16_t(sign | (a >= 0x477ff000u ? huge : finite));
}

INLINE float from_float16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16;
    const uint32_t a = x & 0x7fffu;
    const uint32_t shifted = a << 13;
    const uint32_t normal = shifted + (a >= 0x7c00u ? 0x70000000u : 0x38000000u);
    const float subnormal = bits<float>(shifted | 0x38800000u) - 0x1p-14f;
    return bits<float>(sign | (a < 0x400u ? bits<uint32_t>(subnormal) : normal));
}

// float8 e4m3: four bits of exponent, three of mantissa, no infinities; 0x7f is NaN.
INLINE uint8_t to_float8(float x) {
    const uint32_t u = bits<uint32_t>(x), a = u & 0x7fffffffu;
    const uint32_t normal = (a + 0x7ffffu + (a >> 20 & 1u)) >> 20;
    const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0x1p14f) - bits<uint32_t>(0x1p14f);
    const uint32_t finite = a < 0x3c800000u ? subnormal : normal - (120u << 3);
    return uint8_t(u >> 24 & 0x80u) | uint8_t(a > 0x43e80000u ? 0x7fu : finite);
}

INLINE float from_float8(uint8_t x) {
    const uint32_t sign = uint32_t(x & 0x80u) << 24;
    const float a = bits<float>(uint32_t(x & 0x7fu) << 20) * 0x1p120f;
    return bits<float>(sign | ((x & 0x7fu) == 0x7fu ? 0x7fc00000u : bits<uint32_t>(a)));
}

INLINE float round_bfloat16(float x) { return from_bfloat16(to_bfloat16(x)); }
INLINE float round_float16(float x) { return from_float16(to_float16(x)); }

}  // namespace op

struct bf16 {
    uint16_t bits;
    __attribute__((always_inline)) void operator=(float x) { bits = op::to_bfloat16(x); }
    __attribute__((always_inline)) operator float() const { return op::from_bfloat16(bits); }
};

struct f16 {
    uint16_t bits;
    __attribute__((always_inline)) void operator=(float x) { bits = op::to_float16(x); }
    __attribute__((always_inline)) operator float() const { return op::from_float16(bits); }
};

struct e4m3 {
    uint8_t bits;
    __attribute__((always_inline)) void operator=(float x) { bits = op::to_float8(x); }
    __attribute__((always_inline)) operator float() const { return op::from_float8(bits); }
};

namespace op {

constexpr double inf = __builtin_inf();
constexpr double nan = __builtin_nan("");
constexpr float inff = __builtin_inff();
constexpr float nanf = __builtin_nanf("");

// ---- limits ---------------------------------------------------------------------------------------------------

template <typename T>
constexpr bool is_bool = T(2) == T(1);
template <typename T>
constexpr bool is_float = T(0.5) != T(0) && !is_bool<T>;
template <typename T>
constexpr bool is_signed = T(-1) < T(0);

template <typename T>
INLINE constexpr T highest() {
    if constexpr (is_float<T>) return T(inf);
    else if constexpr (is_signed<T>) return T(~(uint64_t(1) << (8 * sizeof(T) - 1)));
    else return T(-1);
}

template <typename T>
INLINE constexpr T lowest() {
    if constexpr (is_float<T>) return T(-inf);
    else if constexpr (is_signed<T>) return T(-highest<T>() - 1);
    else return T(0);
}

// ---- comparison and sign: NaN wins in minimum and maximum, loses in fmin and fmax -------------------------------

template <typename T>
INLINE T minimum(T a, T b) { return a != a ? a : (a < b ? a : b); }
template <typename T>
INLINE T maximum(T a, T b) { return a != a ? a : (a > b ? a : b); }
template <typename T>
INLINE T fmin(T a, T b) { return b != b || a < b ? a : b; }
template <typename T>
INLINE T fmax(T a, T b) { return b != b || a > b ? a : b; }
template <typename T>
INLINE T sign(T x) { return T(T(0) < x) - T(x < T(0)); }

INLINE float abs(float x) { return __builtin_fabsf(x); }
INLINE double abs(double x) { return __builtin_fabs(x); }
template <typename T>
INLINE T abs(T x) { return x < T(0) ? T(-x) : x; }

INLINE bool isinf(float x) { return abs(x) == inff; }
INLINE bool isinf(double x) { return abs(x) == inf; }
INLINE float copysign(float x, float y) { return __builtin_copysignf(x, y); }
INLINE double copysign(double x, double y) { return __builtin_copysign(x, y); }

// ---- conversion -------------------------------------------------------------------------------------------------

// Floats go to unsigned integers through int64_t: the direct conversion of a negative value has no defined result.
template <typename To, typename From>
INLINE To convert(From x) {
    constexpr bool small_unsigned = !is_float<To> && !is_bool<To> && !is_signed<To> && sizeof(To) < 8;
    if constexpr (is_float<From> && small_unsigned) return To(int64_t(x));
    else return To(x);
}

// ---- indices ----------------------------------------------------------------------------------------------------

INLINE bool outside_index(int64_t i, int64_t size) { return uint64_t(i) >= uint64_t(size); }
INLINE bool outside_wrapped_index(int64_t i, int64_t size) { return i < -size || i >= size; }

INLINE int64_t clamp_index(int64_t i, int64_t size) {
    const int64_t low = i < size ? i : size - 1;
    return low > 0 ? low : 0;
}
INLINE int64_t clamp_wrapped_index(int64_t i, int64_t size) { return clamp_index(i < 0 ? i + size : i, size); }

// ---- integers -----------------------------------------------------------------------------------------------------
// Arithmetic wraps (the compiler is told so); division by zero gives 0, and the kernel reports it.

template <typename T>
INLINE T trunc_div(T a, T b) {
    if (b == 0) return 0;
    if (b == T(-1) && is_signed<T>) return T(-a);
    return T(a / b);
}

template <typename T>
INLINE T fmod(T a, T b) {
    if (b == 0 || (b == T(-1) && is_signed<T>)) return 0;
    return T(a % b);
}

template <typename T>
INLINE T floor_div(T a, T b) {
    const T q = trunc_div(a, b);
    return T(q - T(fmod(a, b) != 0 && (a < 0) != (b < 0)));
}

template <typename T>
INLINE T remainder(T a, T b) {
    const T r = fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? T(r + b) : r;
}

template <typename T>
INLINE T pow(T base, T exponent) {
    if (exponent < 0) return base == 1 ? T(1) : base == T(-1) ? (exponent & 1 ? T(-1) : T(1)) : T(0);
    T result = 1;
    for (; exponent != 0; exponent = T(exponent >> 1), base = T(base * base))
        if (exponent & 1) result = T(result * base);
    return result;
}

template <typename T>
INLINE T shift_left(T a, T b) {
    const bool wide = b < 0 || b >= T(8 * sizeof(T));
    return wide ? T(0) : T(uint64_t(a) << (wide ? 0 : b));
}

template <typename T>
INLINE T shift_right(T a, T b) {
    const int last = 8 * sizeof(T) - (is_signed<T> ? 1 : 0);
    if (b < 0 || b >= T(8 * sizeof(T))) return is_signed<T> ? T(a >> last) : T(0);
    return T(a >> b);
}

// ---- C library --------------------------------------------------------------------------------------------------

#define C_LIBRARY(name)                                              \
    INLINE float name(float x) { return __builtin_##name##f(x); }    \
    INLINE double name(double x) { return __builtin_##name(x); }
#define C_LIBRARY_DOUBLE(name) \
    INLINE double name(double x) { return __builtin_##name(x); }
#define C_LIBRARY_WIDE(name)                                                    \
    INLINE float name(float x) { return float(__builtin_##name(double(x))); }   \
    INLINE double name(double x) { return __builtin_##name(x); }
#define C_LIBRARY_BINARY(name)                                                     \
    INLINE float name(float x, float y) { return __builtin_##name##f(x, y); }      \
    INLINE double name(double x, double y) { return __builtin_##name(x, y); }

C_LIBRARY(sqrt)
C_LIBRARY(floor)
C_LIBRARY(ceil)
C_LIBRARY(trunc)
C_LIBRARY(log10)
C_LIBRARY(sin)
C_LIBRARY(cos)
C_LIBRARY(tan)
C_LIBRARY(asin)
C_LIBRARY(acos)
C_LIBRARY(atan)
C_LIBRARY_WIDE(sinh)  // the float version has errors of more than 2 units
C_LIBRARY_WIDE(cosh)
C_LIBRARY(asinh)
C_LIBRARY(acosh)
C_LIBRARY(atanh)
C_LIBRARY_WIDE(erfc)
C_LIBRARY_DOUBLE(exp)
C_LIBRARY_DOUBLE(exp2)
C_LIBRARY_DOUBLE(expm1)
C_LIBRARY_DOUBLE(log)
C_LIBRARY_DOUBLE(log2)
C_LIBRARY_DOUBLE(log1p)
C_LIBRARY_DOUBLE(tanh)
C_LIBRARY_DOUBLE(erf)
C_LIBRARY_BINARY(pow)
C_LIBRARY_BINARY(atan2)
C_LIBRARY_BINARY(fmod)
C_LIBRARY_BINARY(hypot)

INLINE float round_even(float x) { return __builtin_rintf(x); }
INLINE double round_even(double x) { return __builtin_rint(x); }

// Without an instruction for it fma is a slow call, and its one rounding less is not worth that.
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
INLINE float fma(float a, float b, float c) { return a * b + c; }
INLINE double fma(double a, double b, double c) { return a * b + c; }
#endif

// Python's rules, as torch has them: the remainder has the sign of the divisor.
template <typename T>
INLINE T float_remainder(T a, T b) {
    const T r = fmod(a, b);
    return r != 0 && (b < 0) != (r < 0) ? r + b : r;
}

template <typename T>
INLINE T float_floor_div(T a, T b) {
    if (b == 0) return a / b;
    const T r = fmod(a, b);
    const T quotient = (a - r) / b - T(r != 0 && (b < 0) != (r < 0));
    if (quotient == 0) return copysign(T(0), a / b);
    const T whole = floor(quotient);
    return quotient - whole > T(0.5) ? whole + 1 : whole;
}

INLINE float remainder(float a, float b) { return float_remainder(a, b); }
INLINE double remainder(double a, double b) { return float_remainder(a, b); }
INLINE float floor_div(float a, float b) { return float_floor_div(a, b); }
INLINE double floor_div(double a, double b) { return float_floor_div(a, b); }

// ---- float functions that vectorize -------------------------------------------------------------------------------

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of a float of moderate size.
constexpr float shifter = 0x1.8p23f;
// log(2) in two parts, the first with trailing zeros: its products with small integers are exact.
constexpr float log2_high = 0x1.62e4p-1f, log2_low = 0x1.7f7d1cp-20f;

// x = n log(2) + r with |r| <= log(2)/2.
struct Reduced {
    int32_t n;
    float r;
};

INLINE Reduced reduce_exp(float x) {
    const float t = fma(x, 0x1.715476p0f, shifter);
    const float n = t - shifter;
    const float r = fma(n, -log2_low, fma(n, -log2_high, x));
    return {int32_t(bits<uint32_t>(t) - bits<uint32_t>(shifter)), r};
}

// exp(r) - 1 for |r| <= log(2)/2.
INLINE float expm1_small(float r) {
    float q = 0.00139475975f;
    q = fma(q, r, 0.00836724695f);
    q = fma(q, r, 0.0416662656f);
    q = fma(q, r, 0.166665375f);
    q = fma(q, r, 0.5f);
    return fma(q, r * r, r);
}

// 2^n for -126 <= n <= 127.
INLINE float power_of_two(int32_t n) { return bits<float>(uint32_t(n + 127) << 23); }

// (1 + y) 2^n in two steps, so that subnormal results and those near overflow are right.
INLINE float scale(float y, int32_t n) {
    const int32_t half = n >> 1;
    return (1 + y) * power_of_two(half) * power_of_two(n - half);
}

INLINE float clamp(float x, float low, float high) {
    const float raised = x < low ? low : x;  // comparisons with NaN are false: it passes
    return raised > high ? high : raised;
}

INLINE float exp(float x) {
    const Reduced e = reduce_exp(clamp(x, -104.0f, 89.0f));
    return scale(expm1_small(e.r), e.n);
}

// exp(x) for |x| <= 80, where 2^n is a float and needs no care.
INLINE float exp_moderate(float x) {
    const Reduced e = reduce_exp(x);
    const float s = power_of_two(e.n);
    return fma(expm1_small(e.r), s, s);
}

INLINE float exp2(float x) {
    const float c = clamp(x, -151.0f, 129.0f);
    const float t = c + shifter;
    const float n = t - shifter;
    return scale(expm1_small((c - n) * 0x1.62e43p-1f), int32_t(bits<uint32_t>(t) - bits<uint32_t>(shifter)));
}

INLINE float expm1(float x) {
    const Reduced e = reduce_exp(clamp(x, -18.0f, 89.0f));
    const float half = power_of_two(e.n - 1);  // 2^128 is not a float, half of it is
    const float y = 2 * fma(expm1_small(e.r), half, half - 0.5f);
    return x == 0 ? x : y;
}

// log(1 + f) - f for sqrt(1/2) <= 1 + f <= sqrt(2).
INLINE float log1p_small(float f) {
    float p = 0.0674665123f;
    p = fma(p, f, -0.116756544f);
    p = fma(p, f, 0.118881591f);
    p = fma(p, f, -0.124055885f);
    p = fma(p, f, 0.142195523f);
    p = fma(p, f, -0.166679963f);
    p = fma(p, f, 0.200021192f);
    p = fma(p, f, -0.250000089f);
    p = fma(p, f, 0.333333135f);
    return f * f * fma(p, f, -0.5f);
}

// x = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), for positive finite x.
struct Split {
    float n, f;
};

INLINE Split split(float x) {
    const bool subnormal = x < 0x1p-126f;
    const uint32_t u = bits<uint32_t>(subnormal ? x * 0x1p25f : x);
    const int32_t n = int32_t(u - 0x3f3504f3u) >> 23;
    return {float(n - (subnormal ? 25 : 0)), bits<float>(u - (uint32_t(n) << 23)) - 1};
}

INLINE float log_limits(float x, float y) {
    const float low = x == 0 ? -inff : (x < 0 ? nanf : y);
    return x < inff ? low : x;
}

INLINE float log(float x) {
    const Split s = split(x);
    const float y = s.f + fma(s.n, log2_low, log1p_small(s.f));
    return log_limits(x, fma(s.n, log2_high, y));
}

INLINE float log2(float x) {
    const Split s = split(x);
    const float rest = log1p_small(s.f);
    const float y = fma(s.f, 0x1.715476p0f, fma(rest, 0x1.715476p0f, s.f * 0x1.4ae0cp-26f));
    return log_limits(x, s.n + y);
}

// log(1 + x) from u = 1 + x rounded, corrected by what the rounding lost.
INLINE float log1p(float x) {
    const float u = 1 + x;
    const float lost = u >= 2 ? 1 - (u - x) : x - (u - 1);
    const float y = log(u) + lost / u;
    const float low = u == 0 || x == inff ? log(u) : y;
    return x == 0 ? x : low;
}

INLINE float tanh(float x) {
    const float a = abs(x), z = x * x;
    float p = -0.00571704563f;
    p = fma(p, z, 0.020650588f);
    p = fma(p, z, -0.0537434965f);
    p = fma(p, z, 0.133314908f);
    p = fma(p, z, -0.333332837f);
    const float small = fma(p * z, x, x);
    const float b = a > 10 ? 10.0f : a;
    const float large = copysign(1 - 2 / (exp_moderate(2 * b) + 1), x);
    return a < 0.625f ? small : large;
}

// Of a negative x from exp(x), so that small results keep their digits.
template <typename T>
INLINE T sigmoid(T x) {
    const T e = exp(-abs(x));
    return (x < 0 ? e : T(1)) / (1 + e);
}

// Above 1, erf(x) = 1 - exp(-x Q(x)).
INLINE float erf(float x) {
    const float a = abs(x), z = x * x;
    float p = 7.88912294e-05f;
    p = fma(p, z, -0.000802084222f);
    p = fma(p, z, 0.00518953567f);
    p = fma(p, z, -0.0268544443f);
    p = fma(p, z, 0.112836003f);
    p = fma(p, z, -0.37612626f);
    p = fma(p, z, 0.128379166f);
    const float b = a > 4 ? 4.0f : a;
    float q = -0.000210181985f;
    q = fma(q, b, 0.00318311621f);
    q = fma(q, b, -0.0227860827f);
    q = fma(q, b, 0.105096661f);
    q = fma(q, b, 0.635846376f);
    q = fma(q, b, 1.12847555f);
    const float small = fma(p, x, x);
    const float large = copysign(1 - exp_moderate(-b * q), x);
    return a < 1 ? small : large;
}

// ---- threads --------------------------------------------------------------------------------------------------

// Threads that are worth starting for `work` elements in `items` indivisible items: starting one costs about as
// much as this many elements.
constexpr int64_t work_per_thread = 8192;

INLINE int64_t team(int64_t threads, int64_t items, int64_t work) {
    const int64_t most = minimum(items, work / work_per_thread);
    return maximum(minimum(threads, most), int64_t(1));
}

// The items of one thread of the current team.
struct Share {
    int64_t first, last;
};

INLINE Share share(int64_t items) {
#ifdef _OPENMP
    const int64_t rank = omp_get_thread_num(), team = omp_get_num_threads();
    return {items * rank / team, items * (rank + 1) / team};
#else
    return {0, items};
#endif
}

// Step through an index space: the last axis first, each with its size, the outermost without.
INLINE void advance(int64_t& outermost) { ++outermost; }
template <typename... Outer>
INLINE void advance(int64_t& i, int64_t size, Outer&&... outer) {
    if (++i == size) {
        i = 0;
        advance(outer...);
    }
}

INLINE void report(int64_t* status, int64_t failed) {
    if (failed) __atomic_fetch_or(status, failed, __ATOMIC_RELAXED);
}

// Call the kernel at an address, unless an earlier one failed.
template <typename... Arguments>
INLINE void call(int64_t* status, void* function, Arguments... arguments) {
    if (*status == 0) reinterpret_cast<void (*)(Arguments..., int64_t*)>(function)(arguments..., status);
}

}  // namespace op

#pragma omp declare reduction(maximum : float, double, int8_t, int16_t, int32_t, int64_t, uint8_t, bool : omp_out = \
        op::maximum(omp_out, omp_in)) initializer(omp_priv = omp_orig)
#pragma omp declare reduction(minimum : float, double, int8_t, int16_t, int32_t, int64_t, uint8_t, bool : omp_out = \
        op::minimum(omp_out, omp_in)) initializer(omp_priv = omp_orig)
