// Weights in a storage format: codes of 8 or 4 bits, with scales for rows or for groups of neighbours along k.
//
// Up to FEW rows of the operand meet the codes as they are read: a weight is unpacked in registers and never stored, and
// multiplied in float, or as an integer with an operand in fixed point. For more rows a tile of weights is unpacked once
// into the cache, and contract.h does the rest.
#pragma once
#include "contract.h"

#define MEMBER inline __attribute__((always_inline))

namespace packed {

using micro::Bits;
using micro::FEW;
using micro::Vec;
using micro::W;
using micro::fma;
using micro::load;
using micro::splat;
using micro::store;

constexpr int64_t BLOCK = 128;  // codes of 4 bits in 64 bytes, as llmcomp/nibbles.py lays them out

// Scales as they are stored, in any float; bytes are exponents of a power of two.
template <typename T>
INLINE float scale_of(T s) { return s; }
INLINE float scale_of(uint8_t exponent) { return op::bits<float>(uint32_t(exponent) << 23); }

// ---- a table of 16 numbers ------------------------------------------------------------------------------------------

struct Table {
    Vec part[16 / W];
};

// The numbers at the low 4 bits of every lane.
#if defined(__AVX512F__)
INLINE Vec at(const Table& t, Bits index) {
    Vec v;
    __asm__("vpermps %2, %1, %0" : "=v"(v) : "v"(index), "v"(t.part[0]));
    return v;
}
#elif defined(__AVX2__)
INLINE Vec at(const Table& t, Bits index) {
    Vec low, high;
    __asm__("vpermps %2, %1, %0" : "=x"(low) : "x"(index), "x"(t.part[0]));
    __asm__("vpermps %2, %1, %0" : "=x"(high) : "x"(index), "x"(t.part[1]));
    return (index & 8) != 0 ? high : low;
}
#else
INLINE Vec at(const Table& t, Bits index) {
    Vec v;
    for (int64_t i = 0; i < W; ++i) v[i] = t.part[(index[i] & 15) / W][(index[i] & 15) % W];
    return v;
}
#endif

INLINE Table table_of(const float* numbers) {
    Table t;
    for (int64_t i = 0; i < 16 / W; ++i) t.part[i] = load<Vec>(numbers + i * W);
    return t;
}

// ---- the operand as integers ----------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LLMCOMP_INTEGER_DOTS 1
#else
#define LLMCOMP_INTEGER_DOTS 0
#endif

typedef uint8_t Run __attribute__((vector_size(64)));  // 64 neighbours along k

#if LLMCOMP_INTEGER_DOTS
typedef int32_t Whole __attribute__((vector_size(64)));

// Lane by lane, four unsigned bytes times four signed ones.
INLINE Whole dot(Run w, Run x, Whole acc) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}

// A block of an operand row in fixed point: digits of 8 bits each, in units of `scale`. Two digits (for bf16 and f16)
// resolve a 65,000th of the largest number of the block, three (for float) a 16 millionth. Weights are met as unsigned
// bytes, SHIFT more than they are worth: sums of products start at minus what that adds, for both halves of the
// block or (PARTS is 2) each.
template <int64_t DIGITS, int SHIFT, int64_t PARTS>
struct alignas(64) Fixed {
    Run digits[2][DIGITS];  // of each half of the block, the highest first
    Whole start[SHIFT ? PARTS : 1][DIGITS];
    float scale;

    // What the sums of the products with every digit come to, lane by lane.
    static MEMBER Vec number(const Whole (&sums)[DIGITS]) {
        if constexpr (DIGITS == 2) return __builtin_convertvector((sums[0] << 8) + sums[1], Vec);
        Vec v = __builtin_convertvector(sums[0], Vec);
        for (int64_t d = 1; d < DIGITS; ++d) v = v * 256.0f + __builtin_convertvector(sums[d], Vec);
        return v;
    }

    // `totals` gets the sums of the numbers of every group of GROUP.
    template <int64_t GROUP>
    void set(const float* x, float* totals) {
        constexpr float LARGEST = DIGITS == 2 ? 32512.0f : 8323072.0f;  // 127 in the highest digit, after any rounding
        Vec most = {}, probe = {};
        for (int64_t i = 0; i < BLOCK; i += W) {
            const Vec v = load<Vec>(x + i);
            const Vec a = v < 0.0f ? -v : v;
            most = a > most ? a : most;
            probe += v * 0.0f;  // NaN where a number is NaN or infinite: integers hold neither
        }
        float largest = 0;
        for (int64_t i = 0; i < W; ++i) largest = op::maximum(largest, most[i]);
        scale = largest / LARGEST + micro::sum(probe);
        const Vec inverse = splat(largest > 0 ? LARGEST / largest : 0.0f);
        for (auto& part : start)
            for (Whole& digit : part) digit = Whole{};
        for (int64_t half = 0; half < 2; ++half) {
            for (int64_t i = 0; i < 64; i += W) {
                const Vec v = load<Vec>(x + half * 64 + i) * inverse;
                Whole n;
                __asm__("vcvtps2dq %1, %0" : "=v"(n) : "v"(v));  // to nearest, ties to even
                for (int64_t d = DIGITS - 1; d >= 0; --d) {
                    const Whole high = d ? (n + 128) >> 8 : Whole{};
                    const Whole digit = n - (high << 8);
                    micro::Bytes bytes;
                    __asm__("vpmovdb %1, %0" : "=v"(bytes) : "v"(digit));
                    store((uint8_t*)&digits[half][d] + i, bytes);
                    n = high;
                }
            }
            Whole sums[DIGITS];
            for (int64_t d = 0; d < DIGITS; ++d) {
                sums[d] = dot(Run{} + 1, digits[half][d], Whole{});
                if constexpr (SHIFT > 0) start[half % PARTS][d] -= SHIFT * sums[d];
            }
            if constexpr (GROUP > 0) {
                const Vec lanes = number(sums);
                for (int64_t g = 0; g < (GROUP < 64 ? 2 : 1); ++g) {
                    float total = 0;
                    for (int64_t l = 0; l < (GROUP < 64 ? W / 2 : W); ++l) total += lanes[g * W / 2 + l];
                    float& to = totals[GROUP < 64 ? half * 2 + g : GROUP < 128 ? half : 0];
                    to = (GROUP == 128 && half ? to : 0.0f) + total * scale;
                }
            }
        }
    }
};
#endif

// ---- what a tile of weights is --------------------------------------------------------------------------------------
// `run` gives 64 codes as unsigned bytes, each SHIFT (or the zero point of its group) more than UNITS of a weight, where
// they are integers. `unpack` gives a row in float.

// Codes of 4 bits; a weight is (table[code] - zero) * scale of its group.
struct Plain {
    static constexpr bool INTEGER = true;
    static constexpr int SHIFT = 0;
    static constexpr float UNIT = 1;
    INLINE Run bytes(Run codes) { return codes; }
};

struct Centred : Plain {
    static constexpr int SHIFT = 8;
};

// Halves, from -6 to 6: 12 more than twice their value.
struct Halves : Plain {
    static constexpr int SHIFT = 12;
    static constexpr float UNIT = 0.5f;
    INLINE Run bytes(Run codes) {
        const Run table = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0, 12, 13, 14, 15, 16, 18, 20, 24, 12, 11,
                           10, 9, 8, 6, 4, 0, 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0, 12, 13, 14, 15,
                           16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#if LLMCOMP_INTEGER_DOTS
        Run v;
        __asm__("vpshufb %1, %2, %0" : "=v"(v) : "v"(codes), "v"(table));
        return v;
#else
        return table + codes;  // not called
#endif
    }
};

struct Looked : Plain {
    static constexpr bool INTEGER = false;
};

template <typename Scale_, int64_t GROUP_, bool ZEROS_, typename Kind>
struct Nibbles : Kind {
    typedef Scale_ Scale;
    static constexpr int64_t GROUP = GROUP_;
    static constexpr bool ZEROS = ZEROS_, INTEGER = LLMCOMP_INTEGER_DOTS && Kind::INTEGER;
    static constexpr int64_t STEP = BLOCK;  // of the operand that meets weights in float
    const uint8_t* codes;
    const Scale* scale;
    const uint8_t* zero;
    int64_t ld, ldg, groups;  // from one row to the next, of codes and of scales; scales of a row
    const float* numbers;

    Nibbles(
        const uint8_t* codes, const Scale* scale, const uint8_t* zero, int64_t ld, int64_t ldg, int64_t groups,
        const float* numbers
    )
        : codes(codes), scale(scale), zero(zero), ld(ld), ldg(ldg), groups(groups), numbers(numbers) {}

    // Both halves of block `b` of row `n`.
    MEMBER void runs(Run (&run)[2], int64_t n, int64_t b, int64_t) const {
        const Run raw = load<Run>(codes + n * ld + b * 64);
        typedef uint16_t Pairs __attribute__((vector_size(64)));
        run[0] = Kind::bytes(raw & 15);
        run[1] = Kind::bytes((Run)((Pairs)raw >> 4) & 15);
    }

    // What the 16 codes stand for in group `g` of row `n`.
    MEMBER Table scaled(const Table& table, int64_t n, int64_t g) const {
        const Vec s = splat(scale_of(scale[n * ldg + g]));
        Table t;
        for (int64_t i = 0; i < 16 / W; ++i)
            t.part[i] = (ZEROS ? table.part[i] - float(zero[n * ldg + g]) : table.part[i]) * s;
        return t;
    }

    // The weights of R rows from `n` on along one block, W at a time, for `meet(r, k, weights)`.
    template <int64_t R, typename Meet>
    MEMBER void block(const Table& table, int64_t n, int64_t b, int64_t depth, const Meet& meet) const {
#pragma GCC unroll 4
        for (int64_t g = 0; g < BLOCK / GROUP; ++g) {
            if (b * BLOCK + g * GROUP >= depth) return;
            Table t[R];
#pragma GCC unroll 4
            for (int64_t r = 0; r < R; ++r) t[r] = scaled(table, n + r, b * (BLOCK / GROUP) + g);
#pragma GCC unroll 8
            for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += W)
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const Bits bytes = micro::widen_bytes(codes + (n + r) * ld + b * 64 + k % 64);
                    meet(r, k, at(t[r], k < 64 ? bytes : bytes >> 4));
                }
        }
    }

    // out[c][r] = row r of the weights . row c of the operand, packed as [block][c][128].
    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t* next) const {
        constexpr int64_t U = C == 1 ? 2 : 1;  // a single operand row needs twice as many independent sums
        const Table table = table_of(numbers);
        Vec acc[U][R][C] = {};
        for (int64_t b = 0; b * BLOCK < depth; ++b, x += C * BLOCK, next += R * 64) {
            if constexpr (R > 1)
                for (int64_t r = 0; r < R; ++r) __builtin_prefetch(next + r * 64, 0, 2);
            block<R>(table, n, b, depth, [&](int64_t r, int64_t k, Vec w) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int64_t c = 0; c < C; ++c) {
                    Vec& sum = acc[k / W % U][r][c];
                    sum = fma(w, load<Vec>(x + c * BLOCK + k), sum);
                }
            });
        }
        if constexpr (U == 2)
            for (int64_t r = 0; r < R; ++r) acc[0][r][0] += acc[1][r][0];
        micro::store_sums<R, C>(out, ldo, acc[0]);
    }

    // Row `n` as floats.
    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        const Table table = table_of(numbers);
        for (int64_t b = 0; b * BLOCK < depth; ++b)
            block<1>(table, n, b, depth, [&](int64_t, int64_t k, Vec w) __attribute__((always_inline)) {
                store(to + b * BLOCK + k, w);
            });
    }
};

// Codes of 8 bits, each a number; with GROUP, times the scale of their group, otherwise the scale of a row is left to
// the epilogue.
template <typename Code>
struct IsInteger {
    static constexpr bool VALUE = false;
};
template <>
struct IsInteger<int8_t> {
    static constexpr bool VALUE = true;
};

template <typename Code, typename Scale_, int64_t GROUP_>
struct Bytes {
    typedef Scale_ Scale;
    static constexpr int64_t GROUP = GROUP_;
    static constexpr bool ZEROS = false, INTEGER = LLMCOMP_INTEGER_DOTS && IsInteger<Code>::VALUE;
    static constexpr int SHIFT = 128;
    static constexpr float UNIT = 1;
    static constexpr int64_t STEP = W;
    const Code* codes;
    const Scale* scale;
    int64_t ld, ldg, groups;
    static constexpr const uint8_t* zero = nullptr;

    MEMBER void runs(Run (&run)[2], int64_t n, int64_t b, int64_t depth) const {
        const Code* const from = codes + n * ld + b * BLOCK;
        const int64_t rest = depth - b * BLOCK;
        if (rest >= BLOCK) {
            run[0] = load<Run>(from) ^ 128;
            run[1] = load<Run>(from + 64) ^ 128;
        } else {  // what lies behind the row meets zeros
            run[0] = micro::load_part<Run>(from, op::minimum(rest, int64_t(64))) ^ 128;
            run[1] = micro::load_part<Run>(from + op::minimum(rest, int64_t(64)), op::maximum(rest - 64, int64_t(0))) ^ 128;
        }
    }

    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const Code* next) const {
        typedef micro::Singles<Code> F;
        const Code* const w = codes + n * ld;
        if constexpr (GROUP == 0) {
            micro::dots<F, R, C>(out, ldo, w, ld, x, depth, next, ld);
        } else {
            Vec acc[R][C] = {};
            for (int64_t k = 0; k < depth; k += GROUP, x += C * GROUP, next += R * GROUP) {
                if constexpr (R > 1)
                    for (int64_t i = 0; i < R * GROUP; i += 64) __builtin_prefetch(next + i, 0, 2);
                Vec part[R][C] = {};
#pragma GCC unroll 8
                for (int64_t s = 0; s < GROUP / W; ++s) micro::multiply_step<F>(part, w + k, ld, x, s);
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const Vec factor = splat(scale_of(scale[(n + r) * ldg + k / GROUP]));
#pragma GCC unroll 8
                    for (int64_t c = 0; c < C; ++c) acc[r][c] = fma(part[r][c], factor, acc[r][c]);
                }
            }
            micro::store_sums<R, C>(out, ldo, acc);
        }
    }

    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        const Code* const w = codes + n * ld;
        if constexpr (GROUP == 0) {
            micro::widen_row(to, w, depth);
        } else {
            for (int64_t k = 0; k < depth; k += GROUP) {
                const Vec factor = splat(scale_of(scale[n * ldg + k / GROUP]));
                for (int64_t i = k; i < k + GROUP; i += W) store(to + i, micro::widen(w + i) * factor);
            }
        }
    }
};

// ---- integer products -----------------------------------------------------------------------------------------------

#if LLMCOMP_INTEGER_DOTS
// Scales of up to W groups, zeros behind them.
template <typename T>
INLINE Vec scales_of(const T* p, int64_t count) { return micro::widen_part(p, count); }
INLINE Vec scales_of(const uint8_t* p, int64_t count) {
    uint8_t part[W] = {};
    __builtin_memcpy(part, p, count);
    return Vec(micro::widen_bytes(part) << 23);
}
INLINE Vec zeros_of(const uint8_t* p, int64_t count) {
    uint8_t part[W] = {};
    __builtin_memcpy(part, p, count);
    return __builtin_convertvector(Whole(micro::widen_bytes(part)), Vec);
}

// The factors of a run: one number for all of its lanes, or one for each of its two groups of 32.
template <int64_t GROUP>
INLINE Vec factors(const float* f) {
    if constexpr (GROUP != 32) return splat(f[0]);
    const Whole lanes = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    return lanes ? splat(f[1]) : splat(f[0]);
}

// What integer products of a tile of weights need to know of both sides.
template <typename Weights, typename Graph>
struct Integers {
    static constexpr int64_t GROUP = Weights::GROUP, DIGITS = sizeof(Graph) == 4 ? 3 : 2;
    static constexpr int64_t PARTS = GROUP == 64 || GROUP == 32 ? 2 : 1;  // sums that are finished in a block
    static constexpr int SHIFT = Weights::ZEROS ? 0 : Weights::SHIFT;
    typedef Fixed<DIGITS, SHIFT, PARTS> X;

    // Floats behind the blocks of a row: sums of its groups.
    static MEMBER int64_t totals(int64_t stride) { return GROUP ? work::round_up(stride / (GROUP ? GROUP : 1), W) : 0; }

    // acc += R rows of weights times C rows of the operand along block `b`; `f` are the factors of its groups.
    template <int64_t R, int64_t C>
    static MEMBER void block(
        Vec (&acc)[R][C], const Weights& w, int64_t n, const X* x, int64_t b, int64_t depth, const float* f
    ) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) {
            Run run[2];
            w.runs(run, n + r, b, depth);
#pragma GCC unroll 8
            for (int64_t c = 0; c < C; ++c) {
                Whole sums[DIGITS];
#pragma GCC unroll 2
                for (int64_t h = 0; h < 2; ++h) {
#pragma GCC unroll 4
                    for (int64_t d = 0; d < DIGITS; ++d) {
                        if (h == 0 || PARTS == 2) sums[d] = SHIFT ? x[c].start[h][d] : Whole{};
                        sums[d] = dot(run[h], x[c].digits[h][d], sums[d]);
                    }
                    if (h == 0 && PARTS == 1) continue;
                    const Vec value = X::number(sums) * x[c].scale;
                    if constexpr (GROUP == 0) acc[r][c] += value;
                    else acc[r][c] = fma(value, factors<GROUP>(f + r * W + (PARTS == 2 ? h * 64 / GROUP : 0)), acc[r][c]);
                }
            }
        }
    }

    // out[c][r] = row r of the weights . row c of the operand, packed as [block][c]; `totals` of row c are `ldt` behind
    // those of the row before.
    template <int64_t R, int64_t C, typename Code>
    static MEMBER void dots(
        float* out, int64_t ldo, const Weights& w, int64_t n, const X* x, const float* totals, int64_t ldt,
        int64_t depth, const Code* next
    ) {
        constexpr int64_t BYTES = R * BLOCK * (Weights::STEP == BLOCK ? 1 : 2) / 2, PER = GROUP ? BLOCK / GROUP : 1;
        constexpr int64_t CHUNK = W / PER;  // blocks whose factors are made at once
        const int64_t blocks = (depth + BLOCK - 1) / BLOCK;
        Vec acc[R][C] = {}, shifted[R][C] = {};
        for (int64_t first = 0; first < blocks; first += CHUNK) {
            alignas(64) float f[R][W];
            if constexpr (GROUP > 0) {
                const int64_t g = first * PER, count = op::minimum(w.groups - g, W);
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const Vec factor = scales_of(w.scale + (n + r) * w.ldg + g, count) * Weights::UNIT;
                    store(f[r], factor);
                    if constexpr (Weights::ZEROS) {
                        const Vec shift = factor * zeros_of(w.zero + (n + r) * w.ldg + g, count);
#pragma GCC unroll 8
                        for (int64_t c = 0; c < C; ++c)
                            shifted[r][c] = fma(shift, load<Vec>(totals + c * ldt + g), shifted[r][c]);
                    }
                }
            }
            const int64_t last = op::minimum(first + CHUNK, blocks);
            for (int64_t b = first; b < last; ++b, x += C, next += BYTES) {
                if constexpr (R > 1)
                    for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i, 0, 2);
                block<R, C>(acc, w, n, x, b, depth, f[0] + (b - first) * PER);
            }
        }
        if constexpr (Weights::ZEROS)
            for (int64_t r = 0; r < R; ++r)
                for (int64_t c = 0; c < C; ++c) acc[r][c] -= shifted[r][c];
        micro::store_sums<R, C>(out, ldo, acc);
    }
};
#endif

// ---- the operand ----------------------------------------------------------------------------------------------------

// What unpacked weights are, so that contract.h multiplies them at its best.
template <typename Graph>
struct Unpacked {
    typedef float Type;
};
#if defined(__AVX512BF16__)
template <>
struct Unpacked<bf16> {
    typedef bf16 Type;
};
#endif

template <typename Weights, typename Graph>
struct Operand : contract::Operand<typename Unpacked<Graph>::Type, Graph, BLOCK> {
    typedef typename Unpacked<Graph>::Type Dense;
    typedef contract::Operand<Dense, Graph, BLOCK> Base;
    using Base::count, Base::depth, Base::line, Base::packed, Base::stride;
    using Base::Base;

    static constexpr int64_t STEP = Weights::STEP;

    // Whether the rows of the block meet unpacked weights.
    bool unpacks() const { return count > FEW; }

    void pack(int64_t row) {
        if (unpacks()) return Base::pack(row);
        const int64_t slots = Base::room(count);
#if LLMCOMP_INTEGER_DOTS
        if constexpr (Weights::INTEGER) {
            typedef Integers<Weights, Graph> I;
            static_assert((sizeof(typename I::X) + 16) * FEW <= BLOCK * Base::PANEL * sizeof(*packed), "room for fixed point");
            auto* const to = (typename I::X*)packed;
            float* const sums = totals(slots) + row * I::totals(stride);
            constexpr int64_t GROUP = Weights::GROUP, PER = GROUP ? BLOCK / GROUP : 0;
            for (int64_t b = 0; b < stride / BLOCK; ++b)
                to[b * slots + row].template set<GROUP>(line + b * BLOCK, sums + b * PER);
            // Sums are read W at a time: what meets no group must be a number.
            for (int64_t g = stride / BLOCK * PER; g < I::totals(stride); ++g) sums[g] = 0;
            return;
        }
#endif
        float* const to = (float*)packed;
        for (int64_t k = 0; k < stride; k += STEP)
            __builtin_memcpy(to + k * slots + row * STEP, line + k, STEP * sizeof(float));
    }

#if LLMCOMP_INTEGER_DOTS
    // Sums of the groups of every row, behind the blocks of all of them.
    float* totals(int64_t slots) const {
        return (float*)((typename Integers<Weights, Graph>::X*)packed + stride / BLOCK * slots);
    }
#endif

    // Bytes that `unpack` needs for `width` rows of weights.
    int64_t room_for(int64_t width) const { return unpacks() ? width * stride * sizeof(Dense) : 0; }

    // The first `width` rows of weights, `stride` elements apart, where the block meets them unpacked.
    const Dense* unpack(char* memory, const Weights& w, int64_t width) const {
        Dense* const to = (Dense*)memory;
        for (int64_t n = 0; n < width && unpacks(); ++n) {
            if constexpr (sizeof(Dense) == sizeof(float)) {
                w.unpack(to + n * stride, n, depth);
            } else {
                w.unpack(line, n, depth);
                micro::narrow_row(to + n * stride, line, depth);
            }
        }
        return to;
    }

    // out[row][column] = operand row . weight row, as contract::Operand; `dense` is what `unpack` gave.
    template <typename Code>
    void multiply(
        int64_t panel, float* out, int64_t ldo, const Weights& w, const Dense* dense, int64_t width, const Code* next
    ) const {
        if (unpacks()) return Base::multiply(panel, out, ldo, dense, stride, width, dense);
        switch (Base::room(count)) {
            case 1: return few<1>(out, ldo, w, width, next);
            case 2: return few<2>(out, ldo, w, width, next);
        }
        if constexpr (FEW >= 8) return count <= 4 ? few<4>(out, ldo, w, width, next) : few<8>(out, ldo, w, width, next);
    }

    template <int64_t C, typename Code>
    void few(float* out, int64_t ldo, const Weights& w, int64_t width, const Code* next) const {
        constexpr int64_t R = C < 8 ? 4 : 2;  // as many sums as the registers hold
        int64_t n = 0;
        for (; n + R <= width; n += R)
            some<R, C>(out + n, ldo, w, n, n + 2 * R <= width ? w.codes + (n + R) * w.ld : next);
        for (; n < width; ++n) some<1, C>(out + n, ldo, w, n, next);
    }

    template <int64_t R, int64_t C, typename Code>
    MEMBER void some(float* out, int64_t ldo, const Weights& w, int64_t n, const Code* next) const {
#if LLMCOMP_INTEGER_DOTS
        if constexpr (Weights::INTEGER) {
            typedef Integers<Weights, Graph> I;
            const auto* const x = (const typename I::X*)packed;
            return I::template dots<R, C>(out, ldo, w, n, x, totals(C), I::totals(stride), depth, next);
        }
#endif
        w.template dots<R, C>(out, ldo, n, (const float*)packed, depth, next);
    }
};

}  // namespace packed
