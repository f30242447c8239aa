// Tiles of weights that are 2:4 sparse, stored as llmcomp/pairs.py says: what packed.h needs to know of them.
#pragma once
#include "packed.h"

namespace packed {

#if defined(__AVX512VBMI2__) && defined(__AVX512F__) && defined(__AVX512BW__)
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

constexpr int64_t MASKS = BLOCK / 8;  // bytes of the masks of a block

// Where the masks of a row of a matrix end and what is kept begins.
INLINE int64_t kept_at(int64_t depth) { return (depth + BLOCK - 1) / BLOCK * MASKS; }

template <typename T>
INLINE T mask_at(const uint8_t* p) {
    T bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return bits;
}

#if LLMCOMP_EXPANDS
struct Half {
    uint8_t bytes[32];
};
typedef uint64_t Wide __attribute__((vector_size(64)));

// 32 bytes, twice.
INLINE Wide twice(const uint8_t* p) {
    Wide v;
    __asm__("vbroadcasti64x4 %1, %0" : "=v"(v) : "m"(*(const Half*)p));
    return v;
}

// The next byte of `kept` wherever a bit is set, `other` elsewhere.
template <typename V>
INLINE V expand_bytes(Wide kept, uint64_t bits, V other) {
    __asm__("vpexpandb %1, %0%{%2%}" : "+v"(other) : "v"(kept), "Yk"(bits));
    return other;
}
#endif

// A block of bytes: those whose bits are set, in order, and `other` elsewhere.
INLINE void expand_block(uint8_t* to, const uint8_t* masks, const uint8_t* kept, uint8_t other) {
#if LLMCOMP_EXPANDS
    const Wide others = Wide{} + other * 0x0101010101010101u;
    for (int64_t i = 0; i < 2; ++i)
        store(to + 64 * i, expand_bytes(twice(kept + 32 * i), mask_at<uint64_t>(masks + 8 * i), others));
#else
    for (int64_t i = 0; i < BLOCK; ++i) to[i] = masks[i / 8] >> i % 8 & 1 ? *kept++ : other;
#endif
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// What they have in common; `Dense` is how codes are read where all are stored.
template <typename Self, typename Dense>
struct SparseCodes : Dense {
    static constexpr bool INTEGER = Dense::INTEGER;
    static constexpr int64_t STEP = BLOCK;
    using Dense::Dense;

    MEMBER const uint8_t* masks(int64_t n, int64_t b) const { return (const uint8_t*)this->codes + n * this->ld + b * MASKS; }
    MEMBER const uint8_t* kept(int64_t n, int64_t b, int64_t depth) const {
        return (const uint8_t*)this->codes + n * this->ld + kept_at(depth) + b * Self::KEPT;
    }

    template <int64_t R, int64_t C, typename Code>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const Code*) const {
        Vec acc[R][C] = {};
        for (int64_t b = 0; b * BLOCK < depth; ++b, x += C * BLOCK)
            for (int64_t r = 0; r < R; ++r) {
                float w[BLOCK];
                ((const Self*)this)->floats(w, n + r, b, depth);
                for (int64_t i = 0; i < BLOCK; i += W)
                    for (int64_t c = 0; c < C; ++c) acc[r][c] = fma(load<Vec>(w + i), load<Vec>(x + c * BLOCK + i), acc[r][c]);
            }
        micro::store_sums<R, C>(out, ldo, acc);
    }

    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        for (int64_t b = 0; b * BLOCK < depth; ++b) {
            float block[BLOCK];
            ((const Self*)this)->floats(block, n, b, depth);
            __builtin_memcpy(to + b * BLOCK, block, op::minimum(BLOCK, depth - b * BLOCK) * sizeof(float));
        }
    }
};

constexpr int64_t ALIKE = 32;  // neighbours along k that have one scale, in any format

// Block `b` of a row of numbers times the scales of their groups. Behind the last group there are only zeros.
template <int64_t GROUP, typename Scale>
MEMBER void store_scaled(float* to, const int8_t* numbers, const Scale* scale, int64_t b, int64_t groups) {
    for (int64_t i = 0; i < BLOCK; i += W) {
        Vec v = micro::widen(numbers + i);
        if constexpr (GROUP > 0) v *= splat(scale_of(scale[op::minimum((b * BLOCK + i) / GROUP, groups - 1)]));
        store(to + i, v);
    }
}

template <typename Scale, int64_t GROUP>
struct SparseBytes : SparseCodes<SparseBytes<Scale, GROUP>, Bytes<int8_t, Scale, GROUP>> {
    static constexpr int64_t KEPT = BLOCK / 2, BYTES = MASKS + KEPT;
    typedef SparseCodes<SparseBytes, Bytes<int8_t, Scale, GROUP>> Base;
    SparseBytes(const uint8_t* codes, const Scale* scale, int64_t ld, int64_t ldg, int64_t groups)
        : Base((const int8_t*)codes, scale, ld, ldg, groups) {}

    MEMBER void runs(Run (&run)[BLOCK / ELEMENTS], int64_t n, int64_t b, int64_t depth) const {
        const uint8_t *const masks = this->masks(n, b), *const kept = this->kept(n, b, depth);
#if LLMCOMP_EXPANDS && defined(__AVX512VNNI__)
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i)
            run[i] = expand_bytes(twice(kept + 32 * i), mask_at<uint64_t>(masks + 8 * i), Run{}) ^ uint8_t(integers::SHIFT);
#else
        uint8_t line[BLOCK];
        expand_block(line, masks, kept, 0);
        for (int64_t i = 0; i < BLOCK / ELEMENTS; ++i) run[i] = integers::codes((const int8_t*)line + i * ELEMENTS);
#endif
    }

    MEMBER void floats(float* to, int64_t n, int64_t b, int64_t depth) const {
        uint8_t line[BLOCK];
        expand_block(line, this->masks(n, b), this->kept(n, b, depth), 0);
        store_scaled<GROUP>(to, (const int8_t*)line, this->scale + n * this->ldg, b, this->groups);
    }
};

template <typename Scale, int64_t GROUP, bool ZEROS, typename Kind>
struct SparseNibbles : SparseCodes<SparseNibbles<Scale, GROUP, ZEROS, Kind>, Nibbles<Scale, GROUP, ZEROS, Kind>> {
    static constexpr int64_t KEPT = BLOCK / 4, BYTES = MASKS + KEPT;
    typedef SparseCodes<SparseNibbles, Nibbles<Scale, GROUP, ZEROS, Kind>> Base;
    using Base::Base;

    // The code of nothing in the group of column `k`.
    MEMBER uint8_t nothing(int64_t n, int64_t k) const {
        if constexpr (!ZEROS) return Kind::SHIFT;
        else return this->zero[n * this->ldg + op::minimum(k / GROUP, this->groups - 1)];
    }

    MEMBER void runs(Run (&run)[BLOCK / ELEMENTS], int64_t n, int64_t b, int64_t depth) const {
        const uint8_t *const masks = this->masks(n, b), *const kept = this->kept(n, b, depth);
#if LLMCOMP_EXPANDS && defined(__AVX512VNNI__)
        const Run raw = (Run)twice(kept), codes[2] = {integers::lower(raw), integers::upper(raw)};
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
            const int64_t k = b * BLOCK + 64 * i;
            Run other = Run{} + nothing(n, k);
            if constexpr (ZEROS && GROUP == 32) {
                const Run second = Run{} + nothing(n, k + 32);
                other = (Run)__builtin_shufflevector((Wide)other, (Wide)second, 0, 1, 2, 3, 8, 9, 10, 11);
            }
            run[i] = expand_bytes((Wide)codes[i], mask_at<uint64_t>(masks + 8 * i), other);
        }
#else
        uint8_t line[BLOCK];
        codes_of(line, n, b, depth);
        for (int64_t i = 0; i < BLOCK / ELEMENTS; ++i) run[i] = integers::bytes(line + i * ELEMENTS);
#endif
    }

    MEMBER void codes_of(uint8_t* to, int64_t n, int64_t b, int64_t depth) const {
        const uint8_t *const masks = this->masks(n, b), *const kept = this->kept(n, b, depth);
        uint8_t codes[BLOCK / 2];
        for (int64_t i = 0; i < BLOCK / 2; ++i) codes[i] = i < KEPT ? kept[i] & 15 : kept[i - KEPT] >> 4;
        expand_block(to, masks, codes, 255);
        for (int64_t i = 0; i < BLOCK; i += ALIKE) {
            const uint8_t other = nothing(n, b * BLOCK + i);
            for (int64_t j = i; j < i + ALIKE; ++j) to[j] = to[j] == 255 ? other : to[j];
        }
    }

    MEMBER void floats(float* to, int64_t n, int64_t b, int64_t depth) const {
        uint8_t line[BLOCK];
        codes_of(line, n, b, depth);
        for (int64_t i = 0; i < BLOCK; i += ALIKE) {
            const uint8_t other = nothing(n, b * BLOCK + i);
            for (int64_t j = i; j < i + ALIKE; ++j) line[j] -= other;
        }
        store_scaled<GROUP>(to, (const int8_t*)line, this->scale + n * this->ldg, b, this->groups);
    }
};

// ---- bfloat16 -------------------------------------------------------------------------------------------------------

// Meeting an operand in float; in bf16 (Graph) where an instruction adds up products of pairs.
template <typename Graph>
struct TwoFour {
    typedef bf16 Scale;
    static constexpr int64_t GROUP = 0, STEP = 32, KEPT = BLOCK, BYTES = MASKS + KEPT, HALF = STEP / 2;
    static constexpr bool ZEROS = false, INTEGER = false, PAIRS = IN_PAIRS<Graph>;
    static constexpr int64_t LONG = PAIRS ? HALF : STEP;  // floats that a step of the operand takes
    const uint8_t* codes;
    const Scale* scale;
    int64_t ld, ldg, groups;

#if LLMCOMP_EXPANDS
    // The 32 weights of a step, in order, as 16 pairs of bf16.
    static MEMBER Bits expand(Bits kept, uint32_t bits) {
        Bits v;
        __asm__("vpexpandw %1, %0%{%2%}%{z%}" : "=v"(v) : "v"(kept), "Yk"(bits));
        return v;
    }

    // acc + the products of both halves of every lane.
    static MEMBER Vec dot(Bits a, Bits b, Vec acc) {
#if defined(__AVX512BF16__)
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#endif
        return acc;
    }

    // Step `s` of a row of weights meets C rows of the operand. With one of them, steps take turns to add to two sums:
    // none waits for the last.
    template <int64_t C>
    static MEMBER void add(Vec (&even)[C], Vec (&odd)[C], Bits w, const float* x, int64_t s) {
#pragma GCC unroll 8
        for (int64_t c = 0; c < C; ++c) {
            if constexpr (PAIRS) {
                Vec& sum = (s & 1 && C == 1 ? odd : even)[c];
                sum = dot(w, load<Bits>(x + c * HALF), sum);
            } else {
                even[c] = fma(Vec(w << 16), load<Vec>(x + c * STEP), even[c]);
                odd[c] = fma(Vec(w & 0xffff0000u), load<Vec>(x + c * STEP + HALF), odd[c]);
            }
        }
    }

    template <int64_t R, int64_t C>
    static MEMBER void store(float* out, int64_t ldo, Vec (&even)[R][C], const Vec (&odd)[R][C]) {
        for (int64_t r = 0; r < R; ++r)
            for (int64_t c = 0; c < C; ++c) even[r][c] += odd[r][c];
        micro::store_sums<R, C>(out, ldo, even);
    }

    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t* next) const {
        const uint8_t* masks = codes + n * ld;
        const uint8_t* kept = masks + kept_at(depth);
        Vec even[R][C] = {}, odd[R][C] = {};
        const int64_t blocks = (depth + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; ++b, masks += MASKS, kept += KEPT, next += R * BYTES) {
            if constexpr (R > 1)
                for (int64_t i = 0; i < R * BYTES; i += 64) __builtin_prefetch(next + i + AHEAD, 0, 2);
#pragma GCC unroll 4
            for (int64_t s = 0; s < 4; ++s, x += C * LONG)
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const uint32_t bits = mask_at<uint32_t>(masks + r * ld + s * 4);
                    add(even[r], odd[r], expand((Bits)twice(kept + r * ld + s * STEP), bits), x, s);
                }
        }
        store(out, ldo, even, odd);
    }
#else
    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t*) const {
        Vec acc[R][C] = {};
        for (int64_t b = 0; b * BLOCK < depth; ++b, x += C * BLOCK)
            for (int64_t r = 0; r < R; ++r) {
                float w[BLOCK];
                floats(w, n + r, b, depth);
                for (int64_t i = 0; i < BLOCK; i += W)
                    for (int64_t c = 0; c < C; ++c) {
                        const float* const from = x + i / STEP * C * STEP + c * STEP + i % STEP;
                        acc[r][c] = fma(load<Vec>(w + i), load<Vec>(from), acc[r][c]);
                    }
            }
        micro::store_sums<R, C>(out, ldo, acc);
    }
#endif

    MEMBER void floats(float* to, int64_t n, int64_t b, int64_t depth) const {
        bf16 block[BLOCK];
        const uint8_t* const row = codes + n * ld;
        const uint8_t *const masks = row + b * MASKS, *const kept = row + kept_at(depth) + b * KEPT;
#if LLMCOMP_EXPANDS
        for (int64_t s = 0; s < BLOCK / STEP; ++s)
            micro::store(block + s * STEP, expand((Bits)twice(kept + s * STEP), mask_at<uint32_t>(masks + 4 * s)));
#else
        for (int64_t i = 0, next = 0; i < BLOCK; ++i) {
            const bool holds = masks[i / 8] >> i % 8 & 1;
            block[i] = holds ? mask_at<bf16>(kept + 2 * next++) : bf16{};
        }
#endif
        for (int64_t i = 0; i < BLOCK; ++i) to[i] = block[i];
    }

    // Row `n` as floats, to the end of its last block.
    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        for (int64_t b = 0; b * BLOCK < depth; ++b) floats(to + b * BLOCK, n, b, depth);
    }
};

// The same with zeros anywhere (llmcomp/masked.py): `codes` is where the table has an entry for the row.
template <typename Graph>
struct Masked : TwoFour<Graph> {
    typedef TwoFour<Graph> Base;
    using Base::STEP, Base::LONG, Base::codes, Base::ld;

    // Where the masks (0) or the numbers (1) of a row begin.
    MEMBER const uint8_t* start(int64_t n, int64_t which) const {
        const uint8_t* const entry = codes + n * ld;
        int64_t distance;
        __builtin_memcpy(&distance, entry + 8 * which, 8);
        return entry + distance;
    }

#if LLMCOMP_EXPANDS
    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t*) const {
        const uint8_t *masks[R], *kept[R];
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) masks[r] = start(n + r, 0), kept[r] = start(n + r, 1);
        const int64_t ahead = start(n + R, 1) - kept[0];  // the same columns of the rows that are read next
        Vec even[R][C] = {}, odd[R][C] = {};
        const int64_t blocks = (depth + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
            for (int64_t r = 0; r < R; ++r)
                for (int64_t i = 0; i < BLOCK; i += 64) __builtin_prefetch(kept[r] + ahead + i, 0, 2);
#pragma GCC unroll 4
            for (int64_t s = 0; s < BLOCK / STEP; ++s, x += C * LONG)
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) {
                    const uint32_t bits = mask_at<uint32_t>(masks[r] + b * MASKS + 4 * s);
                    const Bits from = load<Bits>(kept[r]);
                    kept[r] += 2 * __builtin_popcount(bits);  // the next load waits for this: not after the products
                    Base::add(even[r], odd[r], Base::expand(from, bits), x, s);
                }
        }
        Base::store(out, ldo, even, odd);
    }
#else
    template <int64_t R, int64_t C>
    MEMBER void dots(float* out, int64_t ldo, int64_t n, const float* x, int64_t depth, const uint8_t*) const {
        for (int64_t r = 0; r < R; ++r) {
            const uint8_t *const masks = start(n + r, 0), *kept = start(n + r, 1);
            for (int64_t c = 0; c < C; ++c) out[c * ldo + r] = 0;
            for (int64_t k = 0; k < depth; ++k)
                if (masks[k / 8] >> k % 8 & 1) {
                    const float w = mask_at<bf16>(kept);
                    kept += 2;
                    for (int64_t c = 0; c < C; ++c) out[c * ldo + r] += w * x[k / STEP * C * STEP + c * STEP + k % STEP];
                }
        }
    }
#endif

    MEMBER void unpack(float* to, int64_t n, int64_t depth) const {
        const uint8_t *const masks = start(n, 0), *kept = start(n, 1);
        for (int64_t k = 0; k < depth; ++k) {
            const bool holds = masks[k / 8] >> k % 8 & 1;
            to[k] = holds ? float(mask_at<bf16>(kept)) : 0.0f;
            kept += 2 * holds;
        }
    }
};

template <typename Weights, typename Graph>
struct Sparse : Operand<Weights, Graph> {
    typedef Operand<Weights, Graph> Base;
    using Base::Base;

    // As the weights of a step come out: in pairs of bf16, or the even ones before the odd ones.
    void pack(int64_t row) {
        if (!LLMCOMP_EXPANDS || this->unpacks()) return Base::pack(row);
        constexpr int64_t STEP = Weights::STEP, HALF = Weights::HALF;
        const int64_t slots = Base::room(this->count);
        const float* const line = this->line;
        for (int64_t k = 0; k < this->stride; k += STEP) {
            if constexpr (Weights::PAIRS) {
                bf16* const to = (bf16*)this->packed + k * slots + row * STEP;
                for (int64_t i = 0; i < STEP; ++i) to[i] = line[k + i];
            } else {
                float* const to = (float*)this->packed + k * slots + row * STEP;
                for (int64_t i = 0; i < STEP; ++i) to[i / 2 + i % 2 * HALF] = line[k + i];
            }
        }
    }
};

}  // namespace packed
