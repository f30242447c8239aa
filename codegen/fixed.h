// Weights in integers times an operand in fixed point: 128 neighbours along k share a scale, digits are integers.
//
// 16 bits (for bf16 and f16) resolve a 65,000th of the largest number of a block, 24 (for float) a 16 millionth.
#pragma once
#include "storage.h"

namespace packed {

#if LLMCOMP_INTEGER_DOTS
using integers::Whole;
using integers::dot;

constexpr int64_t RUNS = BLOCK / ELEMENTS;

// A block of an operand row, in units of `scale`. Sums of products with codes that are SHIFT more than they are worth
// start at minus what that adds, for each of the PARTS of a block that are summed apart.
template <int64_t DIGITS, int SHIFT, int64_t PARTS>
struct alignas(64) Fixed {
    static constexpr int BITS = integers::BITS;
    static constexpr bool ONE_SUM = DIGITS * BITS == 16;  // all digits fit a sum of 32 bits
    Run digits[RUNS][DIGITS];  // the highest first
    Whole start[SHIFT ? PARTS : 1][DIGITS];
    float scale;

    // The products of part `p` of the codes of a block, lane by lane.
    MEMBER Vec product(const Run (&codes)[RUNS], int64_t p) const {
        Whole sums[DIGITS];
#pragma GCC unroll 3
        for (int64_t d = 0; d < DIGITS; ++d) {
            if constexpr (SHIFT > 0) sums[d] = start[p][d];
            else sums[d] = Whole{};
            if (ONE_SUM && d) sums[d] += sums[d - 1] << BITS;
#pragma GCC unroll 8
            for (int64_t i = p * (RUNS / PARTS); i < (p + 1) * (RUNS / PARTS); ++i)
                sums[d] = dot(codes[i], digits[i][d], sums[d]);
        }
        return number(sums);
    }

    // What sums come to; with ONE_SUM the last one holds the others.
    static MEMBER Vec number(const Whole (&sums)[DIGITS]) {
        if constexpr (ONE_SUM) return __builtin_convertvector(sums[DIGITS - 1], Vec);
        Vec v = __builtin_convertvector(sums[0], Vec);
        for (int64_t d = 1; d < DIGITS; ++d) v = v * float(1 << BITS) + __builtin_convertvector(sums[d], Vec);
        return v;
    }

    // Set the block to BLOCK numbers; `totals` gets the sums of the numbers of every group of GROUP.
    template <int64_t GROUP>
    void set(const float* x, float* totals) {
        constexpr float LARGEST = ONE_SUM ? 32512.0f : 8323072.0f;  // 127 in the highest 8 bits, after any rounding
        const float largest = micro::magnitude(x, BLOCK);
        scale = largest / LARGEST;  // NaN where a number is not finite: integers hold no such
        const Vec inverse = splat(largest > 0 ? LARGEST / largest : 0.0f);
        Whole sum = {};
        for (auto& part : start)
            for (Whole& digit : part) digit = Whole{};
        for (int64_t r = 0; r < RUNS; ++r) {
            for (int64_t i = 0; i < ELEMENTS; i += W) {
                const int64_t k = r * ELEMENTS + i;
                const Whole whole = integers::nearest(load<Vec>(x + k) * inverse);
                Whole n = whole;
                for (int64_t d = DIGITS - 1; d >= 0; --d) {
                    const Whole high = d ? (n + (1 << (BITS - 1))) >> BITS : Whole{};
                    integers::store_elements((integers::Element*)&digits[r][d] + i, n - (high << BITS));
                    n = high;
                }
                if constexpr (GROUP > 0) {
                    sum += whole;
                    if ((k + W) % GROUP == 0) {
                        totals[k / GROUP] = float(integers::sum(sum)) * scale;
                        sum = Whole{};
                    }
                }
            }
            for (int64_t d = 0; d < DIGITS && SHIFT; ++d)
                start[r / (RUNS / PARTS)][d] -= SHIFT * dot(integers::ones(), digits[r][d], Whole{});
        }
    }
};

// Scales and zero points of up to W groups, zeros behind them.
template <typename T>
INLINE Vec scales_of(const T* p, int64_t count) { return count == W ? micro::widen(p) : micro::widen_part(p, count); }
INLINE Vec bytes_of(const uint8_t* p, int64_t count) {
    if (count == W) return Vec(micro::widen_bytes(p));
    uint8_t part[W] = {};
    __builtin_memcpy(part, p, count);
    return Vec(micro::widen_bytes(part));
}
INLINE Vec scales_of(const uint8_t* p, int64_t count) { return Vec(Bits(bytes_of(p, count)) << 23); }
INLINE Vec zeros_of(const uint8_t* p, int64_t count) { return __builtin_convertvector(Whole(bytes_of(p, count)), Vec); }

// What integer products of a tile of weights need to know of both sides.
template <typename Weights, typename Graph>
struct Integers {
    static constexpr int64_t GROUP = Weights::GROUP, DIGITS = sizeof(Graph) == 4 ? (integers::BITS == 8 ? 3 : 2) : 16 / integers::BITS;
    static constexpr int64_t PER = GROUP ? BLOCK / GROUP : 1;  // groups of a block
    static constexpr int64_t PARTS = PER < RUNS ? PER : RUNS;
    static constexpr int SHIFT = Weights::ZEROS ? 0 : Weights::SHIFT;
    typedef Fixed<DIGITS, SHIFT, PARTS> X;

    // Of the floats behind the blocks of a row, first the scales of its groups, then as many sums.
    static MEMBER int64_t groups(int64_t stride) { return GROUP ? work::round_up(stride / (GROUP ? GROUP : 1), W) : 0; }

    // The factors of a part of a block: one number for all lanes, or one for each of its two groups of 32.
    static MEMBER Vec factors(const float* f, int64_t p) {
        if constexpr (PER == PARTS) return splat(f[p]);
        Whole lanes = {};
        for (int64_t i = W / 2; i < W; ++i) lanes[i] = -1;
        return lanes ? splat(f[2 * p + 1]) : splat(f[2 * p]);
    }

    // Set block `b` of the operand, and what lies at `floats` for its groups.
    static void set(X& x, int64_t b, const float* line, float* floats, int64_t stride) {
        x.template set<GROUP>(line + b * BLOCK, floats + groups(stride) + b * PER);
        for (int64_t g = 0; g < PER && GROUP; ++g) floats[b * PER + g] = x.scale;
    }

    // out[c][r] = row r of the weights . row c of the operand, packed as [block][c]; `floats` of row c are those of its
    // groups, 2 `ldf` behind those of the row before.
    template <int64_t R, int64_t C, typename Code>
    static MEMBER void dots(
        float* out, int64_t ldo, const Weights& w, int64_t n, const X* x, const float* floats, int64_t ldf,
        int64_t depth, const Code* next
    ) {
        constexpr int64_t BYTES = R * Weights::BYTES;
        constexpr int64_t CHUNK = W / PER;  // blocks whose factors are made at once
        const int64_t blocks = (depth + BLOCK - 1) / BLOCK;
        Vec acc[R][C] = {}, shifted[R][C] = {};
        for (int64_t first = 0; first < blocks; first += CHUNK) {
            alignas(64) float f[R][C][W];
            if constexpr (GROUP > 0) {
                const int64_t g = first * PER, count = op::minimum(w.groups - g, W);
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const Vec factor = scales_of(w.scale + (n + r) * w.ldg + g, count) * Weights::UNIT;
                    Vec shift = {};
                    if constexpr (Weights::ZEROS) shift = factor * zeros_of(w.zero + (n + r) * w.ldg + g, count);
#pragma GCC unroll 8
                    for (int64_t c = 0; c < C; ++c) {
                        const float* const own = floats + 2 * c * ldf + g;
                        store(f[r][c], factor * load<Vec>(own));
                        if constexpr (Weights::ZEROS) shifted[r][c] = fma(shift, load<Vec>(own + ldf), shifted[r][c]);
                    }
                }
            }
            const int64_t last = op::minimum(first + CHUNK, blocks);
            for (int64_t b = first; b < last; ++b, x += C, next += BYTES) {
                if constexpr (R > 1)
                    for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i + AHEAD, 0, 2);
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    Run codes[RUNS];
                    w.runs(codes, n + r, b, depth);
#pragma GCC unroll 8
                    for (int64_t c = 0; c < C; ++c)
#pragma GCC unroll 8
                        for (int64_t p = 0; p < PARTS; ++p) {
                            Vec factor;
                            if constexpr (GROUP) factor = factors(f[r][c] + (b - first) * PER, p);
                            else factor = splat(x[c].scale);
                            acc[r][c] = fma(x[c].product(codes, p), factor, acc[r][c]);
                        }
                }
            }
        }
        if constexpr (Weights::ZEROS)
            for (int64_t r = 0; r < R; ++r)
                for (int64_t c = 0; c < C; ++c) acc[r][c] -= shifted[r][c];
        micro::store_sums<R, C>(out, ldo, acc);
    }
};
#endif

}  // namespace packed
