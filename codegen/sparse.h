// Tiles of weights that are 2:4 sparse, packed as llmcomp/two_four.py says: what packed.h needs to know of them.
#pragma once
#include "packed.h"

namespace packed {

#if defined(__AVX512VBMI2__) && defined(__AVX512F__)
#define LLMCOMP_EXPANDS 1
#else
#define LLMCOMP_EXPANDS 0
#endif

#if LLMCOMP_EXPANDS && defined(__AVX512BF16__)
template <typename Graph>
constexpr bool IN_PAIRS = false;
template <>
constexpr bool IN_PAIRS<bf16> = true;
#else
template <typename Graph>
constexpr bool IN_PAIRS = false;
#endif

// Meeting an operand in float; in bf16 (Graph) where an instruction adds up products of pairs.
template <typename Graph>
struct TwoFour {
    typedef bf16 Scale;
    static constexpr int64_t GROUP = 0, STEP = 32, BYTES = 144, HALF = STEP / 2;
    static constexpr bool ZEROS = false, INTEGER = false, PAIRS = IN_PAIRS<Graph>;
    const uint8_t* codes;
    const Scale* scale;
    int64_t ld, ldg, groups;

    static MEMBER uint32_t mask(const uint8_t* block, int64_t side) {
        uint32_t bits;
        __builtin_memcpy(&bits, block + 4 * side, 4);
        return bits;
    }

    // The 32 weights of a side of a block, in order.
    static MEMBER void side(float* to, const uint8_t* block, int64_t side) {
        const uint32_t bits = mask(block, side);
        const uint8_t* from = block + 16 + side * STEP;
        for (int64_t i = 0; i < STEP; ++i) {
            bf16 value = {};
            if (bits >> i & 1) {
                __builtin_memcpy(&value, from, 2);
                from += 2;
            }
            to[i / 2 + (i & 1) * HALF] = value;
        }
    }

#if LLMCOMP_EXPANDS
    typedef uint64_t Quads __attribute__((vector_size(32)));
    typedef uint64_t Wide __attribute__((vector_size(64)));

    // The same as 16 pairs of bf16.
    static MEMBER Bits expand(const uint8_t* block, int64_t side) {
        const Quads half = load<Quads>(block + 16 + side * STEP);
        const Wide values = __builtin_shufflevector(half, half, 0, 1, 2, 3, 0, 1, 2, 3);
        Bits v;
        __asm__("vpexpandw %1, %0%{%2%}%{z%}" : "=v"(v) : "v"(values), "Yk"(mask(block, side)));
        return v;
    }

    // acc + the products of both halves of every lane.
    static MEMBER Vec dot(Bits a, Bits b, Vec acc) {
#if defined(__AVX512BF16__)
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#endif
        return acc;
    }

    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t* next) const {
        const uint8_t* rows = codes + n * ld;
        constexpr int64_t LONG = PAIRS ? HALF : STEP;  // floats that a step of the operand takes
        Vec even[R][C] = {}, odd[R][C] = {};
        const int64_t blocks = (depth + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; ++b, rows += BYTES, next += R * BYTES) {
            if constexpr (R > 1)
                for (int64_t i = 0; i < R * BYTES; i += 64) __builtin_prefetch(next + i, 0, 2);
#pragma GCC unroll 4
            for (int64_t s = 0; s < 4; ++s, x += C * LONG)
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const Bits w = expand(rows + r * ld, s);
#pragma GCC unroll 8
                    for (int64_t c = 0; c < C; ++c) {
                        if constexpr (PAIRS) {
                            Vec& sum = (s & 1 && C == 1 ? odd : even)[r][c];
                            sum = dot(w, load<Bits>(x + c * HALF), sum);
                            continue;
                        }
                        even[r][c] = fma(Vec(w << 16), load<Vec>(x + c * STEP), even[r][c]);
                        odd[r][c] = fma(Vec(w & 0xffff0000u), load<Vec>(x + c * STEP + HALF), odd[r][c]);
                    }
                }
        }
        for (int64_t r = 0; r < R; ++r)
            for (int64_t c = 0; c < C; ++c) even[r][c] += odd[r][c];
        micro::store_sums<R, C>(out, ldo, even);
    }
#else
    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t*) const {
        Vec acc[R][C] = {};
        for (int64_t k = 0; k < depth; k += STEP, x += C * STEP)
            for (int64_t r = 0; r < R; ++r) {
                float w[STEP];
                side(w, codes + (n + r) * ld + k / BLOCK * BYTES, k % BLOCK / STEP);
                for (int64_t i = 0; i < STEP; i += W)
                    for (int64_t c = 0; c < C; ++c) acc[r][c] = fma(load<Vec>(w + i), load<Vec>(x + c * STEP + i), acc[r][c]);
            }
        micro::store_sums<R, C>(out, ldo, acc);
    }
#endif

    // Row `n` as floats.
    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        for (int64_t k = 0; k < depth; k += STEP)
            side(to + k, codes + n * ld + k / BLOCK * BYTES, k % BLOCK / STEP);
    }
};

template <typename Weights, typename Graph>
struct Sparse : Operand<Weights, Graph> {
    typedef Operand<Weights, Graph> Base;
    using Base::Base;

    void pack(int64_t row) {
        if (!Weights::PAIRS || this->unpacks()) return Base::pack(row);
        constexpr int64_t HALF = Weights::HALF;
        const int64_t slots = Base::room(this->count);
        auto* const to = (uint32_t*)this->packed + row * HALF;
        for (int64_t k = 0; k < this->stride; k += 2 * HALF) {
            uint16_t pairs[2 * HALF];
            for (int64_t i = 0; i < 2 * HALF; ++i) {
                bf16 value;
                value = this->line[k + i];
                pairs[i / HALF + i % HALF * 2] = value.bits;
            }
            __builtin_memcpy(to + k / 2 * slots, pairs, sizeof(pairs));
        }
    }
};

}  // namespace packed
