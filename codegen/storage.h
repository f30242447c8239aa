// Tiles of weights in a storage format: codes of 8 or 4 bits, with scales for rows or for groups of neighbours along k.
//
//   dots      a few rows of the operand meet weights that are unpacked in registers, in float
//   run       codes as integers, for products in fixed point
//   unpack    a row in float
#pragma once
#include "integers.h"
#include "work.h"

#define MEMBER inline __attribute__((always_inline))

namespace packed {

using integers::ELEMENTS;
using integers::Run;
using micro::Bits;
using micro::FEW;
using micro::Vec;
using micro::W;
using micro::fma;
using micro::load;
using micro::splat;
using micro::store;

constexpr int64_t AHEAD = 4096;  // bytes from what is read next to what is fetched meanwhile: rows of codes are short
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

// ---- codes of 4 bits ------------------------------------------------------------------------------------------------
// A weight is (table[code] - zero) * scale of its group. As an integer it is `integer(code)`, SHIFT (or the zero point
// of its group) more than UNITS of what it is worth.

struct Plain {
    static constexpr bool INTEGER = true;
    static constexpr int SHIFT = 0;
    static constexpr float UNIT = 1;
    INLINE Run integer(Run codes) { return codes; }
};

struct Centred : Plain {
    static constexpr int SHIFT = 8;
};

// Halves, from -6 to 6: 12 more than twice their value.
struct Halves : Plain {
    static constexpr int SHIFT = 12;
    static constexpr float UNIT = 0.5f;
    INLINE Run integer(Run codes) {
        static constexpr uint8_t NUMBERS[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return integers::look_up(NUMBERS, codes);
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
    static constexpr int64_t BYTES = BLOCK / 2;  // of a block
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

    // Every run of block `b` of row `n`.
    MEMBER void runs(Run (&run)[BLOCK / ELEMENTS], int64_t n, int64_t b, int64_t) const {
        constexpr int64_t HALF = BLOCK / 2 / ELEMENTS;
#pragma GCC unroll 4
        for (int64_t i = 0; i < HALF; ++i) {
            const Run raw = integers::bytes(codes + n * ld + b * 64 + i * ELEMENTS);
            run[i] = Kind::integer(integers::lower(raw));
            run[HALF + i] = Kind::integer(integers::upper(raw));
        }
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

// ---- codes of 8 bits ------------------------------------------------------------------------------------------------

// Each is a number; with GROUP, times the scale of their group, otherwise the scale of a row is left to
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
    static constexpr bool ZEROS = false, SIGNED = IsInteger<Code>::VALUE, INTEGER = LLMCOMP_INTEGER_DOTS && SIGNED;
    static constexpr int SHIFT = integers::SHIFT;
    static constexpr float UNIT = 1;
    static constexpr int64_t STEP = W, BYTES = BLOCK;
    const Code* codes;
    const Scale* scale;
    int64_t ld, ldg, groups;
    static constexpr const uint8_t* zero = nullptr;

    Bytes(const Code* codes, const Scale* scale, int64_t ld, int64_t ldg, int64_t groups)
        : codes(codes), scale(scale), ld(ld), ldg(ldg), groups(groups) {}

    MEMBER void runs(Run (&run)[BLOCK / ELEMENTS], int64_t n, int64_t b, int64_t depth) const {
        const Code* const from = codes + n * ld + b * BLOCK;
        const int64_t rest = depth - b * BLOCK;
#pragma GCC unroll 8
        for (int64_t i = 0; i < BLOCK / ELEMENTS; ++i)
            if (rest >= BLOCK) run[i] = integers::codes(from + i * ELEMENTS);
            else run[i] = integers::codes_part(from + op::minimum(rest, i * ELEMENTS), op::clamp_index(rest - i * ELEMENTS, ELEMENTS + 1));
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

}  // namespace packed
