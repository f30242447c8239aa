// Weights in a storage format: codes of 8 or 4 bits, with scales for rows or for groups of neighbours along k.
//
// Up to FEW rows of the operand meet the codes as they are read: a weight is unpacked in registers, multiplied in float
// and never stored. For more rows a tile of weights is unpacked once into the cache, and contract.h does the rest.
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

// Scales as they are stored; bytes are exponents of a power of two.
INLINE float scale_of(bf16 s) { return s; }
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

// ---- what a tile of weights is --------------------------------------------------------------------------------------

// Codes of 4 bits; a weight is (table[code] - zero) * scale of its group.
template <typename Scale, int64_t GROUP, bool ZEROS>
struct Nibbles {
    static constexpr int64_t STEP = BLOCK;  // weights that are read at once
    const uint8_t* codes;
    const Scale* scale;
    const uint8_t* zero;
    int64_t ld, groups;  // from one row to the next
    const float* numbers;

    // What the 16 codes stand for in group `g` of row `n`.
    MEMBER Table scaled(const Table& table, int64_t n, int64_t g) const {
        const Vec s = splat(scale_of(scale[n * groups + g]));
        Table t;
        for (int64_t i = 0; i < 16 / W; ++i)
            t.part[i] = (ZEROS ? table.part[i] - float(zero[n * groups + g]) : table.part[i]) * s;
        return t;
    }

    // The weights of R rows from `n` on along one block, for `meet(r, i, v, weights)`: k = 16 i + W v and the next W.
    template <int64_t R, typename Meet>
    MEMBER void block(const Table& table, int64_t n, int64_t b, int64_t depth, const Meet& meet) const {
        Bits words[R][16 / W];
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int64_t v = 0; v < 16 / W; ++v) words[r][v] = load<Bits>(codes + (n + r) * ld + b * 64 + v * W * 4);
#pragma GCC unroll 4
        for (int64_t g = 0; g < BLOCK / GROUP; ++g) {
            if (b * BLOCK + g * GROUP >= depth) return;
            Table t[R];
#pragma GCC unroll 4
            for (int64_t r = 0; r < R; ++r) t[r] = scaled(table, n + r, b * (BLOCK / GROUP) + g);
#pragma GCC unroll 8
            for (int64_t i = g * GROUP / 16; i < (g + 1) * GROUP / 16; ++i)
#pragma GCC unroll 4
                for (int64_t v = 0; v < 16 / W; ++v)
#pragma GCC unroll 4
                    for (int64_t r = 0; r < R; ++r) meet(r, i, v, at(t[r], words[r][v] >> (4 * i)));
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
            block<R>(table, n, b, depth, [&](int64_t r, int64_t i, int64_t v, Vec w) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int64_t c = 0; c < C; ++c) {
                    Vec& sum = acc[i % U][r][c];
                    sum = fma(w, load<Vec>(x + c * BLOCK + i * 16 + v * W), sum);
                }
            });
        }
        if constexpr (U == 2)
            for (int64_t r = 0; r < R; ++r) acc[0][r][0] += acc[1][r][0];
        micro::store_sums<R, C>(out, ldo, acc[0]);
    }

    // Row `n` as floats, up to the end of its last block.
    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        const Table table = table_of(numbers);
        for (int64_t b = 0; b * BLOCK < depth; ++b)
            block<1>(table, n, b, depth, [&](int64_t, int64_t i, int64_t v, Vec w) __attribute__((always_inline)) {
                store(to + b * BLOCK + i * 16 + v * W, w);
            });
    }
};

// Codes of 8 bits, each a number; with GROUP, times the scale of their group, otherwise the scale of a row is left to
// the epilogue.
template <typename Code, typename Scale, int64_t GROUP>
struct Bytes {
    static constexpr int64_t STEP = W;
    const Code* codes;
    const Scale* scale;
    int64_t ld, groups;

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
                    const Vec factor = splat(scale_of(scale[(n + r) * groups + k / GROUP]));
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
                const Vec factor = splat(scale_of(scale[n * groups + k / GROUP]));
                for (int64_t i = k; i < k + GROUP; i += W) store(to + i, micro::widen(w + i) * factor);
            }
        }
    }
};

// ---- the operand ----------------------------------------------------------------------------------------------------

// What unpacked weights are, so that contract.h multiplies them at its best.
#if defined(__AVX512BF16__)
template <typename Graph>
struct Unpacked {
    typedef float Type;
};
template <>
struct Unpacked<bf16> {
    typedef bf16 Type;
};
#else
template <typename Graph>
struct Unpacked {
    typedef float Type;
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
        float* const to = (float*)packed;
        const int64_t slots = Base::room(count);
        for (int64_t k = 0; k < stride; k += STEP)
            __builtin_memcpy(to + k * slots + row * STEP, line + k, STEP * sizeof(float));
    }

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
        const float* const x = (const float*)packed;
        int64_t n = 0;
        for (; n + R <= width; n += R)
            w.template dots<R, C>(out + n, ldo, n, x, depth, n + 2 * R <= width ? w.codes + (n + R) * w.ld : next);
        for (; n < width; ++n) w.template dots<1, C>(out + n, ldo, n, x, depth, next);
    }
};

}  // namespace packed
