// The operand of a Contract whose weights are in a storage format.
//
// Up to FEW rows of the operand meet the codes as they are read: a weight is unpacked in registers and never stored, and
// multiplied in float, or as an integer with an operand in fixed point. For more rows a tile of weights is unpacked once
// into the cache, and contract.h does the rest.
#pragma once
#include "contract.h"
#include "fixed.h"
#include "storage.h"

namespace packed {

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
            static_assert((sizeof(typename I::X) + 32) * FEW <= BLOCK * Base::PANEL * sizeof(*packed), "room for fixed point");
            auto* const to = (typename I::X*)packed;
            const int64_t groups = I::groups(stride);
            float* const own = floats(slots) + 2 * row * groups;
            for (int64_t b = 0; b < stride / BLOCK; ++b) I::set(to[b * slots + row], b, line, own, stride);
            // Floats are read W at a time: what meets no group must be a number.
            for (int64_t g = stride / BLOCK * I::PER; g < groups; ++g) own[g] = own[groups + g] = 0;
            return;
        }
#endif
        float* const to = (float*)packed;
        for (int64_t k = 0; k < stride; k += STEP)
            __builtin_memcpy(to + k * slots + row * STEP, line + k, STEP * sizeof(float));
    }

#if LLMCOMP_INTEGER_DOTS
    // What is known of the groups of every row, behind the blocks of all of them.
    float* floats(int64_t slots) const {
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
            return I::template dots<R, C>(out, ldo, w, n, x, floats(C), I::groups(stride), depth, next);
        }
#endif
        w.template dots<R, C>(out, ldo, n, (const float*)packed, depth, next);
    }
};

}  // namespace packed
