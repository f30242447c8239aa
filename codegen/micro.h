// Products of small tiles in vector registers: what the C++ kernels of Contract and Attend are built on.
//
//   dots      out[c][r] = sum_k w[r][k] * x[c][k]      vectors along k: few operand rows, weights streamed once
//   outer     out[r][c] += sum_k a[r][k] * b[k][c]     vectors along c: many operand rows, one factor broadcast
//   columns   out[m][n] = sum_k x[m][k] * w[k][n]      vectors along n: weights stored (K, N)
//
// Everything is written with the compiler's vector types, so the same text serves AVX-512, AVX2, SSE and NEON; the two
// instructions that those types cannot say (products of bf16 pairs, half to float) have a portable twin next to them.
#pragma once
#include "prelude.h"

namespace micro {

#if defined(__AVX512F__)
constexpr int64_t W = 16;  // floats in a vector
constexpr int64_t FEW = 8;  // operand rows that `dots` takes at most: their accumulators fit the registers
#elif defined(__AVX__)
constexpr int64_t W = 8;
constexpr int64_t FEW = 2;
#else
constexpr int64_t W = 4;
constexpr int64_t FEW = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));

// ---- vectors ----------------------------------------------------------------------------------------------------

template <typename V, typename T>
INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
}

template <typename V, typename T>
INLINE void store(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof(V));
}

// The first `count` elements, zeros behind them.
template <typename V, typename T>
INLINE V load_part(const T* p, int64_t count) {
    V v = {};
    __builtin_memcpy(&v, p, count * sizeof(T));
    return v;
}

INLINE Vec fma(Vec a, Vec b, Vec c) {
    Vec r;
    for (int64_t i = 0; i < W; ++i) r[i] = op::fma(a[i], b[i], c[i]);
    return r;
}

// Not 0 + x, which is another number than -0 where x is: the compiler would have to add.
INLINE Vec splat(float x) { return x - Vec{}; }

// ---- turning a square of lanes ------------------------------------------------------------------------------------------

template <int... LANE>
struct Lanes {};
#if defined(__clang__)
template <typename T, T... LANE>
using LanesOf = Lanes<LANE...>;
template <int N>
using AllLanes = __make_integer_seq<LanesOf, int, N>;
#else
template <int N>
using AllLanes = Lanes<__integer_pack(N)...>;
#endif

// Exchange blocks of S lanes: the upper blocks of `a` for the lower blocks of `b`.
template <int S, typename V, int... LANE>
INLINE void exchange(V& a, V& b, Lanes<LANE...>) {
    const V low = __builtin_shufflevector(a, b, (LANE & S ? int(W) + LANE - S : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & S ? int(W) + LANE : LANE + S)...);
    a = low;
}

template <int S, typename V>
INLINE void exchange_all(V (&rows)[W]) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S], AllLanes<W>());
}

// rows[i][j] <-> rows[j][i], in log2(W) rounds of exchanges.
template <typename V>
INLINE void transpose(V (&rows)[W]) {
    exchange_all<1>(rows);
    exchange_all<2>(rows);
    if constexpr (W > 4) exchange_all<4>(rows);
    if constexpr (W > 8) exchange_all<8>(rows);
}

// ---- sums of lanes ----------------------------------------------------------------------------------------------------

template <int S, typename V, int... LANE>
INLINE V rotate(V v, Lanes<LANE...>) {
    return __builtin_shufflevector(v, v, ((LANE + S) % int(W))...);
}

// One round: from N vectors to the first of every 2 S, their lanes taking turns of S.
template <int S, int64_t N, typename V>
INLINE void add_round(V (&v)[N]) {
    if constexpr (S < N) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < N; i += 2 * S) {
            exchange<S>(v[i], v[i + S], AllLanes<W>());
            v[i] += v[i + S];
        }
    } else if constexpr (S < W) {
        v[0] += rotate<S>(v[0], AllLanes<W>());
    }
}

// Lane i of the result is the sum of the lanes of v[i]; N is a power of two up to W.
template <int64_t N, typename V>
INLINE V sums(V (&v)[N]) {
    static_assert(N <= W && W <= 16, "as many lanes as vectors");
    add_round<1>(v);
    add_round<2>(v);
    add_round<4>(v);
    add_round<8>(v);
    return v[0];
}

INLINE float sum(Vec x) {
    Vec v[1] = {x};
    return sums(v)[0];
}

// ---- the largest of many ----------------------------------------------------------------------------------------------

template <int S, typename V>
INLINE V larger(V v) {
    const V other = rotate<S>(v, AllLanes<W>());
    return v > other ? v : other;
}

// The largest magnitude of `count` numbers, a multiple of W; NaN where one is not finite.
INLINE float magnitude(const float* x, int64_t count) {
    // As integers magnitudes lie in the order of the numbers, and what is not finite lies above them.
    Bits most = {};
    for (int64_t i = 0; i < count; i += W) {
        const Bits bits = load<Bits>(x + i) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    most = larger<1>(most);
    most = larger<2>(most);
    if constexpr (W > 4) most = larger<4>(most);
    if constexpr (W > 8) most = larger<8>(most);
    float largest;
    __builtin_memcpy(&largest, &most, sizeof(largest));
    return largest - largest == 0.0f ? largest : __builtin_nanf("");
}

// ---- widening -------------------------------------------------------------------------------------------------------

typedef uint16_t Halves __attribute__((vector_size(2 * W)));

INLINE Vec widen(const float* p) { return load<Vec>(p); }

INLINE Vec widen(const bf16* p) {
    return Vec(__builtin_convertvector(load<Halves>(p), Bits) << 16);
}

#if defined(__F16C__)
INLINE Vec widen(const f16* p) {
    Vec v;
    const Halves h = load<Halves>(p);
    __asm__("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
    return v;
}
#else
INLINE Vec widen(const f16* p) {
    Vec v;
    for (int64_t i = 0; i < W; ++i) v[i] = p[i];
    return v;
}
#endif

typedef int8_t Bytes __attribute__((vector_size(W)));
typedef int32_t Integers __attribute__((vector_size(4 * W)));

// GCC 12 takes the conversion of bytes apart, element by element.
INLINE Vec widen(const int8_t* p) {
    const Bytes bytes = load<Bytes>(p);
    Integers v;
#if defined(__AVX2__)
    __asm__("vpmovsxbd %1, %0" : "=v"(v) : "v"(bytes));
#else
    v = __builtin_convertvector(bytes, Integers);
#endif
    return __builtin_convertvector(v, Vec);
}

INLINE Bits widen_bytes(const uint8_t* p) {
    typedef uint8_t Octets __attribute__((vector_size(W)));
    const Octets bytes = load<Octets>(p);
#if defined(__AVX2__)
    Bits v;
    __asm__("vpmovzxbd %1, %0" : "=v"(v) : "v"(bytes));
    return v;
#else
    return __builtin_convertvector(bytes, Bits);
#endif
}

// An e4m3 is half of a f16 whose exponent is 8 less; not for NaN.
INLINE Vec widen(const e4m3* p) {
#if defined(__F16C__)
    typedef int16_t Signed __attribute__((vector_size(2 * W)));
    const Bytes bytes = load<Bytes>(p);
#if defined(__AVX2__)
    Signed extended;
    __asm__("vpmovsxbw %1, %0" : "=v"(extended) : "v"(bytes));
#else
    const Signed extended = __builtin_convertvector(bytes, Signed);
#endif
    Vec v;
    const Halves h = (Halves)(extended << 7) & 0xbfff;
    __asm__("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
    return v * 256.0f;
#else
    Vec v;
    for (int64_t i = 0; i < W; ++i) v[i] = p[i];
    return v;
#endif
}

// The first `count` elements widened, zeros behind them.
template <typename T>
INLINE Vec widen_part(const T* p, int64_t count) {
    T part[W] = {};
    __builtin_memcpy(part, p, count * sizeof(T));
    return widen(part);
}

template <typename T>
INLINE void widen_row(float* to, const T* from, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, widen(from + i));
    for (; i < count; ++i) to[i] = from[i];
}

// bf16, ties to even; not for NaN.
INLINE Halves narrow(Vec x) {
    const Bits b = (Bits)x;
    return __builtin_convertvector((b + 0x7fffu + (b >> 16 & 1)) >> 16, Halves);
}

INLINE void narrow_row(bf16* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, narrow(load<Vec>(from + i)));
    for (; i < count; ++i) to[i] = from[i];
}

// ---- formats --------------------------------------------------------------------------------------------------------
// How elements of a weight row meet the operand. `dots` reads STEP weights at once as `Raw`; the operand is packed so
// that `product` finds its STEP values behind one pointer. `outer` broadcasts GROUP neighbours along k as `Factor`.

// Widened to float one by one: float and f16.
template <typename T>
struct Singles {
    typedef T Weight;
    typedef float Packed;
    typedef Vec Raw, Lanes;  // Lanes: what a vector of packed columns is to `outer_product`
    static constexpr int64_t STEP = W, GROUP = 1;

    INLINE Raw read(const T* p) { return widen(p); }
    INLINE Raw read_part(const T* p, int64_t count) { return widen_part(p, count); }
    INLINE Vec product(Raw w, const float* x, Vec acc) { return fma(w, load<Vec>(x), acc); }
    INLINE void pack(float* to, const float* from) { store(to, load<Vec>(from)); }

    INLINE Vec broadcast(const float* p) { return splat(*p); }
    INLINE Vec broadcast_part(const float* p) { return splat(*p); }
    INLINE Vec outer_product(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }

    // GROUP * W neighbours along k.
    INLINE Vec row(const T* p) { return widen(p); }
    INLINE Vec row_part(const T* p, int64_t count) { return widen_part(p, count); }

    // GROUP rows of W columns, as `outer` reads them when they are packed.
    INLINE Vec columns(const T* p, int64_t) { return widen(p); }
    INLINE Vec columns_part(const T* p, int64_t, int64_t count) { return widen_part(p, count); }
};

// bf16 as 32-bit lanes: the even element is the low half, the odd one the high half, each a float after one instruction.
struct Split : Singles<float> {
    typedef bf16 Weight;
    typedef Bits Raw;
    static constexpr int64_t STEP = 2 * W;

    INLINE Raw read(const bf16* p) { return load<Bits>(p); }
    INLINE Raw read_part(const bf16* p, int64_t count) { return load_part<Bits>(p, count); }
    INLINE Vec product(Raw w, const float* x, Vec acc) {
        acc = fma(Vec(w << 16), load<Vec>(x), acc);
        return fma(Vec(w & 0xffff0000u), load<Vec>(x + W), acc);
    }
    INLINE void pack(float* to, const float* from) {
        for (int64_t i = 0; i < W; ++i) to[i] = from[2 * i], to[W + i] = from[2 * i + 1];
    }
};

#if defined(__AVX512BF16__)
// bf16 times bf16, two neighbours at a time, added up in float by one instruction.
struct Pairs {
    typedef bf16 Weight;
    typedef bf16 Packed;
    typedef Bits Raw, Lanes;
    static constexpr int64_t STEP = 2 * W, GROUP = 2;

    INLINE Vec dot(Bits a, Bits b, Vec acc) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
        return acc;
    }
    INLINE Raw read(const bf16* p) { return load<Bits>(p); }
    INLINE Raw read_part(const bf16* p, int64_t count) { return load_part<Bits>(p, count); }
    INLINE Vec product(Raw w, const bf16* x, Vec acc) { return dot(w, load<Bits>(x), acc); }
    INLINE void pack(bf16* to, const float* from) {
        for (int64_t i = 0; i < STEP; ++i) to[i] = from[i];
    }

    INLINE Bits broadcast(const bf16* p) { return Bits{} + load<uint32_t>(p); }
    INLINE Bits broadcast_part(const bf16* p) { return Bits{} + uint32_t(p->bits); }
    INLINE Vec outer_product(Bits a, Bits b, Vec acc) { return dot(a, b, acc); }

    INLINE Bits row(const bf16* p) { return load<Bits>(p); }
    INLINE Bits row_part(const bf16* p, int64_t count) { return load_part<Bits>(p, count); }

    INLINE Bits columns(const bf16* p, int64_t ld) { return zip(load<Halves>(p), load<Halves>(p + ld)); }
    INLINE Bits columns_part(const bf16* p, int64_t ld, int64_t count) {
        return zip(load_part<Halves>(p, count), load_part<Halves>(p + ld, count));
    }
    INLINE Bits zip(Halves a, Halves b) {
        return __builtin_convertvector(a, Bits) | __builtin_convertvector(b, Bits) << 16;
    }
};
#endif

// The format for weights of type `Weight` and an operand that the graph holds as `Operand`.
template <typename Weight, typename Operand>
struct Choose {
    typedef Singles<Weight> Format;
};
template <typename Operand>
struct Choose<bf16, Operand> {
    typedef Split Format;
};
#if defined(__AVX512BF16__)
template <>
struct Choose<bf16, bf16> {
    typedef Pairs Format;
};
#endif
template <typename Weight, typename Operand>
using Format = typename Choose<Weight, Operand>::Format;

// The same for weights stored (K, N): even and odd columns need not be told apart.
template <typename Weight, typename Operand>
struct ChooseColumns {
    typedef Singles<Weight> Format;
};
#if defined(__AVX512BF16__)
template <>
struct ChooseColumns<bf16, bf16> {
    typedef Pairs Format;
};
#endif
template <typename Weight, typename Operand>
using ColumnFormat = typename ChooseColumns<Weight, Operand>::Format;

// ---- dots -----------------------------------------------------------------------------------------------------------

// One step along k: R weight vectors times C operand vectors.
template <typename F, int64_t R, int64_t C>
INLINE void multiply(Vec (&acc)[R][C], const typename F::Raw (&w)[R], const typename F::Packed* x) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) acc[r][c] = F::product(w[r], x + c * F::STEP, acc[r][c]);
}

template <typename F, int64_t R, int64_t C>
INLINE void multiply_step(
    Vec (&acc)[R][C], const typename F::Weight* w, int64_t ld, const typename F::Packed* x, int64_t step
) {
    typename F::Raw raw[R];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) raw[r] = F::read(w + r * ld + step * F::STEP);
    multiply<F, R, C>(acc, raw, x + step * C * F::STEP);
}

// out[c][r] = the sum of the lanes of acc[r][c].
template <int64_t R, int64_t C>
INLINE void store_sums(float* out, int64_t ldo, const Vec (&acc)[R][C]) {
    constexpr int64_t AT_ONCE = R * C < W ? C : W / R;  // operand rows whose sums fit one vector
#pragma GCC unroll 8
    for (int64_t c0 = 0; c0 < C; c0 += AT_ONCE) {
        Vec lanes[AT_ONCE * R];
#pragma GCC unroll 16
        for (int64_t i = 0; i < AT_ONCE * R; ++i) lanes[i] = acc[i % R][c0 + i / R];
        float total[W];
        store(total, sums(lanes));
#pragma GCC unroll 8
        for (int64_t c = 0; c < AT_ONCE; ++c) __builtin_memcpy(out + (c0 + c) * ldo, total + c * R, R * sizeof(float));
    }
}

// R rows of weights times C rows of the operand, x packed as [step][C][STEP]; R is 4 or 1.
//
// Meanwhile the R rows at `next` are fetched into the second-level cache, one row after the other: memory is read in
// one stream although the registers work on R rows, which is worth a third of the bandwidth.
template <typename F, int64_t R, int64_t C>
INLINE void dots(
    float* out, int64_t ldo, const typename F::Weight* w, int64_t ld, const typename F::Packed* x, int64_t depth,
    const typename F::Weight* next, int64_t next_ld
) {
    constexpr int64_t U = C == 1 ? 2 : 1;  // a single operand row needs twice as many independent sums
    constexpr int64_t BYTES = R * U * F::STEP * sizeof(*w);
    Vec acc[U][R][C] = {};
    const int64_t steps = depth / F::STEP;
    int64_t s = 0;
    for (int64_t part = 0; part < R; ++part) {
        const char* line = (const char*)(next + part * next_ld);
        for (const int64_t stop = steps * (part + 1) / R; s + U <= stop; s += U, line += BYTES) {
            if constexpr (R > 1)
                for (int64_t b = 0; b < BYTES; b += 64) __builtin_prefetch(line + b, 0, 2);
#pragma GCC unroll 2
            for (int64_t u = 0; u < U; ++u) multiply_step<F>(acc[u], w, ld, x, s + u);
        }
    }
    for (; s < steps; ++s) multiply_step<F>(acc[0], w, ld, x, s);
    if (const int64_t rest = depth % F::STEP) {
        typename F::Raw raw[R];
        for (int64_t r = 0; r < R; ++r) raw[r] = F::read_part(w + r * ld + s * F::STEP, rest);
        multiply<F, R, C>(acc[0], raw, x + s * C * F::STEP);
    }
    if constexpr (U == 2)
        for (int64_t r = 0; r < R; ++r) acc[0][r][0] += acc[1][r][0];
    store_sums<R, C>(out, ldo, acc[0]);
}

// ---- outer ----------------------------------------------------------------------------------------------------------

// out[r][c] += sum_k a[r][k] b[k][c] for R rows and V vectors of columns; without ADD, = in place of +=. `read(k, v)`
// gives the vector v of the rows of b from k on, GROUP of them.
template <typename F, int64_t R, int64_t V, bool ADD, typename Read>
INLINE void outer_with(
    float* out, int64_t ldo, const typename F::Packed* a, int64_t lda, int64_t depth, const Read& read
) {
    Vec acc[R][V] = {};
    for (int64_t r = 0; r < R && ADD; ++r)
        for (int64_t v = 0; v < V; ++v) acc[r][v] = load<Vec>(out + r * ldo + v * W);
    int64_t k = 0;
    for (; k + F::GROUP <= depth; k += F::GROUP) {
        typename F::Lanes lanes[V];
#pragma GCC unroll 8
        for (int64_t v = 0; v < V; ++v) lanes[v] = read(k, v);
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r) {
            const auto factor = F::broadcast(a + r * lda + k);
#pragma GCC unroll 8
            for (int64_t v = 0; v < V; ++v) acc[r][v] = F::outer_product(factor, lanes[v], acc[r][v]);
        }
    }
    if (k < depth)
        for (int64_t r = 0; r < R; ++r)
            for (int64_t v = 0; v < V; ++v)
                acc[r][v] = F::outer_product(F::broadcast_part(a + r * lda + k), read(k, v), acc[r][v]);
    for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v) store(out + r * ldo + v * W, acc[r][v]);
}

// b is packed as [k / GROUP][c][GROUP], with `ldb` elements from one group to the next.
template <typename F, int64_t R, int64_t V, bool ADD = true>
void outer(
    float* out, int64_t ldo, const typename F::Packed* a, int64_t lda, const typename F::Packed* b, int64_t ldb,
    int64_t depth
) {
    outer_with<F, R, V, ADD>(out, ldo, a, lda, depth, [&](int64_t k, int64_t v) {
        return load<typename F::Lanes>(b + k / F::GROUP * ldb + v * W * F::GROUP);
    });
}

// ---- columns --------------------------------------------------------------------------------------------------------

// out[c][n] += sum over GROUPS groups of rows k of x[c][k] w[k][n], for C rows of the operand and W columns.
template <typename F, int64_t GROUPS, int64_t C, typename Read>
INLINE void columns_step(float* out, int64_t ldo, const typename F::Packed* x, int64_t ldx, const Read& read) {
    typename F::Lanes lanes[GROUPS];
#pragma GCC unroll 8
    for (int64_t g = 0; g < GROUPS; ++g) lanes[g] = read(g);
#pragma GCC unroll 8
    for (int64_t c = 0; c < C; ++c) {
        Vec acc = load<Vec>(out + c * ldo);
#pragma GCC unroll 8
        for (int64_t g = 0; g < GROUPS; ++g)
            acc = F::outer_product(F::broadcast(x + c * ldx + g * F::GROUP), lanes[g], acc);
        store(out + c * ldo, acc);
    }
}

// The same for `width` columns; the weights of the next step are fetched into the second-level cache.
template <typename F, int64_t GROUPS, int64_t C>
void columns_run(
    float* out, int64_t ldo, const typename F::Packed* x, int64_t ldx, const typename F::Weight* w, int64_t ld,
    int64_t width
) {
    constexpr int64_t LINE = 64 / sizeof(*w), ROWS = GROUPS * F::GROUP;
    int64_t n = 0;
    for (; n + LINE <= width; n += LINE) {
#pragma GCC unroll 8
        for (int64_t k = 0; k < ROWS; ++k) __builtin_prefetch(w + (ROWS + k) * ld + n, 0, 2);
#pragma GCC unroll 4
        for (int64_t j = n; j < n + LINE; j += W)
            columns_step<F, GROUPS, C>(out + j, ldo, x, ldx, [&](int64_t g) {
                return F::columns(w + g * F::GROUP * ld + j, ld);
            });
    }
    for (; n < width; n += W)
        columns_step<F, GROUPS, C>(out + n, ldo, x, ldx, [&](int64_t g) {
            return F::columns_part(w + g * F::GROUP * ld + n, ld, op::minimum(W, width - n));
        });
}

// out[c][n] = sum_k x[c][k] w[k][n]; x holds zeros behind `depth`, `ldo` is a multiple of W and at least `width`.
template <typename F, int64_t C>
void columns(
    float* out, int64_t ldo, const typename F::Packed* x, int64_t ldx, const typename F::Weight* w, int64_t ld,
    int64_t width, int64_t depth
) {
    __builtin_memset(out, 0, C * ldo * sizeof(float));
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) columns_run<F, 8 / F::GROUP, C>(out, ldo, x + k, ldx, w + k * ld, ld, width);
    // A last row without a partner is read twice, the second time against a zero.
    for (; k < depth; k += F::GROUP)
        columns_run<F, 1, C>(out, ldo, x + k, ldx, w + k * ld, k + F::GROUP <= depth ? ld : 0, width);
}

// Rows of N columns (a multiple of W) as `outer` wants them, [k / GROUP][column][GROUP], zeros behind `width`.
template <typename F, int64_t N>
void pack_columns(typename F::Packed* to, const typename F::Weight* w, int64_t ld, int64_t width, int64_t depth) {
    for (int64_t k = 0; k < depth; k += F::GROUP) {
        const int64_t next = k + F::GROUP <= depth ? ld : 0;
        for (int64_t n = 0; n < N; n += W, to += W * F::GROUP) {
            const typename F::Weight* at = w + k * ld + n;
            const bool whole = n + W <= width;
            store(to, whole ? F::columns(at, next) : F::columns_part(at, next, op::clamp_index(width - n, W)));
        }
    }
}

}  // namespace micro
