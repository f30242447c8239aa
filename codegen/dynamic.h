// The operand of a Contract whose weights are in a dynamic format: every row is quantized when it is packed.
//
//   int8    few rows: dot products along k, of the codes as they are read
//           more:     for each tile of weights, codes are turned around once, [k][column], then for every few rows
//                     sums[row][column] += codes of the columns . four neighbours of the row (integers.h)
//   fp8     the numbers that codes stand for, in the kernels for weights that are not dynamic (packed.h)
#pragma once
#include "packed.h"

namespace packed {

// A row becomes what the graph holds it as: what is quantized is that.
template <typename Graph>
INLINE void round_row(float* x, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        Graph held;
        held = x[k];
        x[k] = held;
    }
}

// The largest magnitude of a row over the largest code: what a code counts. NaN where a number is NaN or infinite.
INLINE float token_scale(const float* x, int64_t count, float largest_code) {
    const float scale = micro::magnitude(x, count) / largest_code;
    return scale == 0 ? 1.0f : scale;
}

// x / scale, no larger than `largest_code`.
INLINE Vec in_codes(const float* x, Vec scale, float largest_code) {
    const Vec v = load<Vec>(x) / scale, high = splat(largest_code);
    const Vec below = v > high ? high : v;
    return below < -high ? -high : below;
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

constexpr int64_t TOKENS = W == 16 ? 24 : 16;  // rows of a panel

template <typename Weights, typename Graph>
struct DynamicIntegers : contract::Packing<integers::Element, TOKENS, 64, 64> {
    typedef integers::Element Element;
    typedef integers::Whole Whole;
    typedef contract::Packing<Element, TOKENS, 64, 64> Base;
    using Base::PANEL, Base::count, Base::depth, Base::line, Base::packed, Base::stride;
    using Base::Base;

    static constexpr int64_t COLUMNS = 2 * W, ROWS = W == 16 ? 12 : W == 8 ? 4 : 8;  // of products that fit the registers
    static constexpr int SHIFT = integers::SHIFT;

    // What lies behind the codes of a row.
    struct Token {
        float scale;
        int32_t shift;  // what codes of weights that are met as larger ones add to its products

        float number(int32_t sum) const { return float(sum - shift) * scale; }
    };

    Element* row_at(int64_t row) const { return packed + row * stride; }
    Token& token(int64_t row) const { return *(Token*)(row_at(row) + stride - 64); }

    void pack(int64_t row) {
        round_row<Graph>(line, depth);
        const float scale = token_scale(line, stride - 64, 127.0f);
        const Vec divisor = splat(scale);
        Whole sum = {};
        for (int64_t k = 0; k < stride - 64; k += W) {
            const Whole n = integers::nearest(in_codes(line + k, divisor, 127.0f));
            integers::store_elements(row_at(row) + k, n);
            sum += n;
        }
        token(row) = {scale, SHIFT * integers::sum(sum)};
    }

    bool unpacks() const { return count > FEW; }

    // Bytes that `unpack` needs for `width` rows of weights.
    int64_t room_for(int64_t width) const {
        return unpacks() ? work::round_up(width, COLUMNS) * work::round_up(depth, ELEMENTS) * sizeof(Element) : 0;
    }

    // Codes of `width` rows of weights as [column / COLUMNS][k / PER][COLUMNS][PER], each PER of them a number of 32 bits.
    const int32_t* unpack(char* memory, const Weights& w, int64_t width) const {
        int32_t* to = (int32_t*)memory;
        if (!unpacks()) return to;
        const int64_t words = work::round_up(depth, ELEMENTS) / integers::PER;
        for (int64_t n = 0; n < width; n += COLUMNS, to += words * COLUMNS)
            for (int64_t half = 0; half < COLUMNS; half += W)
                for (int64_t k = 0; k < depth; k += ELEMENTS)
                    turn(to + k / integers::PER * COLUMNS + half, w.codes + (n + half) * w.ld + k, w.ld, width - n - half, depth - k);
        return (int32_t*)memory;
    }

    // ELEMENTS codes of up to W rows from `from` on, zeros for further rows.
    static void turn(int32_t* to, const int8_t* from, int64_t ld, int64_t rows, int64_t depth) {
        Whole square[W];
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) {
            Run codes = {};
            if (i < rows) codes = depth < ELEMENTS ? integers::codes_part(from + i * ld, depth) : integers::codes(from + i * ld);
            square[i] = (Whole)codes;
        }
        micro::transpose(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) store(to + i * COLUMNS, square[i]);
    }

    // out[row][column] = operand row . weight row, as contract::Operand; `dense` is what `unpack` gave.
    void multiply(
        int64_t panel, float* out, int64_t ldo, const Weights& w, const int32_t* dense, int64_t width, const int8_t* next
    ) const {
        const int64_t rows = op::minimum(PANEL, count - panel);
        if (unpacks()) return many(out, ldo, panel, rows, dense, width);
        if (rows == 1) return few<1>(out, ldo, w, width, next);
        if (rows == 2 || FEW == 2) return few<2>(out, ldo, w, width, next);
        if constexpr (FEW >= 8) return rows <= 4 ? few<4>(out, ldo, w, width, next) : few<8>(out, ldo, w, width, next);
    }

    // Products with up to C rows of the operand.
    template <int64_t C>
    void few(float* out, int64_t ldo, const Weights& w, int64_t width, const int8_t* next) const {
        constexpr int64_t R = C < 8 ? 4 : 2;
        int64_t n = 0;
        for (; n + R <= width; n += R) dots<R, C>(out + n, ldo, w.codes + n * w.ld, w.ld, n + 2 * R <= width ? w.codes + (n + R) * w.ld : next);
        for (; n < width; ++n) dots<1, C>(out + n, ldo, w.codes + n * w.ld, w.ld, next);
    }

    // The R rows at `next` are fetched meanwhile, in one stream.
    template <int64_t R, int64_t C>
    void dots(float* out, int64_t ldo, const int8_t* w, int64_t ld, const int8_t* next) const {
        constexpr int64_t U = C == 1 ? 2 : 1;  // a single row needs twice as many independent sums
        Whole acc[U][R][C] = {};
        int64_t k = 0;
        for (; k + U * ELEMENTS <= depth; k += U * ELEMENTS, next += R * U * ELEMENTS) {
            if constexpr (R > 1)
                for (int64_t i = 0; i < R * U * ELEMENTS; i += 64) __builtin_prefetch(next + i, 0, 2);
#pragma GCC unroll 2
            for (int64_t u = 0; u < U; ++u)
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) step<C>(acc[u][r], integers::codes(w + r * ld + k + u * ELEMENTS), k + u * ELEMENTS);
        }
        for (; k < depth; k += ELEMENTS)
            for (int64_t r = 0; r < R; ++r) step<C>(acc[0][r], integers::codes_part(w + r * ld + k, op::minimum(depth - k, ELEMENTS)), k);
#pragma GCC unroll 8
        for (int64_t c = 0; c < C; ++c) {
            Whole lanes[R];
#pragma GCC unroll 4
            for (int64_t r = 0; r < R; ++r) lanes[r] = U == 2 ? acc[0][r][c] + acc[U - 1][r][c] : acc[0][r][c];
            const Whole total = micro::sums(lanes);
            for (int64_t r = 0; r < R; ++r) out[c * ldo + r] = token(c).number(total[r]);
        }
    }

    template <int64_t C>
    MEMBER void step(Whole (&acc)[C], Run codes, int64_t k) const {
#pragma GCC unroll 8
        for (int64_t c = 0; c < C; ++c) acc[c] = integers::dot(codes, load<Run>(row_at(c) + k), acc[c]);
    }

    void many(float* out, int64_t ldo, int64_t panel, int64_t rows, const int32_t* dense, int64_t width) const {
        const int64_t words = work::round_up(depth, ELEMENTS) / integers::PER;
        for (int64_t n = 0; n < width; n += COLUMNS, dense += words * COLUMNS) {
            int64_t m = 0;
            for (; m + ROWS <= rows; m += ROWS) square<ROWS>(out + m * ldo + n, ldo, panel + m, dense, words);
            for (; m + 4 <= rows; m += 4) square<4>(out + m * ldo + n, ldo, panel + m, dense, words);
            for (; m < rows; ++m) square<1>(out + m * ldo + n, ldo, panel + m, dense, words);
        }
    }

    // R rows of the operand times COLUMNS columns.
    template <int64_t R>
    void square(float* out, int64_t ldo, int64_t row, const int32_t* dense, int64_t words) const {
        Whole acc[R][2] = {};
        const int32_t* const x = (const int32_t*)row_at(row);
        const int64_t ldx = stride / integers::PER;
        for (int64_t k = 0; k < words; ++k, dense += COLUMNS) {
            const Run low = load<Run>(dense), high = load<Run>(dense + W);
#pragma GCC unroll 16
            for (int64_t r = 0; r < R; ++r) {
                const Run four = (Run)(Whole{} + x[r * ldx + k]);
                acc[r][0] = integers::dot(low, four, acc[r][0]);
                acc[r][1] = integers::dot(high, four, acc[r][1]);
            }
        }
#pragma GCC unroll 16
        for (int64_t r = 0; r < R; ++r) {
            const Token& t = token(row + r);
            for (int64_t v = 0; v < 2; ++v) store(out + r * ldo + v * W, __builtin_convertvector(acc[r][v] - t.shift, Vec) * t.scale);
        }
    }
};

// ---- float8 ---------------------------------------------------------------------------------------------------------

// The nearest e4m3, of ties the even one, of numbers up to 448.
INLINE Vec round_e4m3(Vec v) {
    const Bits b = (Bits)v, sign = b & 0x80000000u, a = b ^ sign;
    const Bits normal = (a + 0x7ffffu + (a >> 20 & 1u)) & 0xfff00000u;
    const Bits small = (Bits)(((Vec)a + 0x1p14f) - 0x1p14f);  // multiples of 2 ** -9
    return (Vec)((a < 0x3c800000u ? small : normal) | sign);
}

template <typename Weights, typename Graph>
struct DynamicFloats : Operand<Weights, Graph> {
    typedef Operand<Weights, Graph> Base;
    using Base::PANEL, Base::count, Base::line, Base::stride;

    float* const scales;  // of the rows of the block

    static int64_t bytes(int64_t rows, int64_t depth, int64_t team) {
        return Base::bytes(rows, depth, team) + team * contract::BLOCK * sizeof(float);
    }

    DynamicFloats(char* memory, int64_t rows, int64_t depth, int64_t team)
        : Base(memory, rows, depth, team),
          scales((float*)(memory + Base::bytes(rows, depth, team)) + (Base::shared ? 0 : Base::member.rank) * contract::BLOCK) {}

    void pack(int64_t row) {
        round_row<Graph>(line, Base::depth);
        scales[row] = token_scale(line, stride, 448.0f);
        const Vec divisor = splat(scales[row]);
        for (int64_t k = 0; k < stride; k += W) store(line + k, round_e4m3(in_codes(line + k, divisor, 448.0f)));
        Base::pack(row);
    }

    template <typename Dense, typename Code>
    void multiply(
        int64_t panel, float* out, int64_t ldo, const Weights& w, const Dense* dense, int64_t width, const Code* next
    ) const {
        Base::multiply(panel, out, ldo, w, dense, width, next);
        for (int64_t m = 0; m < op::minimum(PANEL, count - panel); ++m)
            for (int64_t n = 0; n < width; ++n) out[m * ldo + n] *= scales[panel + m];
    }
};

template <typename Weights, typename Graph, bool INTEGER>
struct ChooseDynamic {
    typedef DynamicFloats<Weights, Graph> Type;
};
template <typename Weights, typename Graph>
struct ChooseDynamic<Weights, Graph, true> {
    typedef DynamicIntegers<Weights, Graph> Type;
};
template <typename Weights, typename Graph>
using Dynamic = typename ChooseDynamic<Weights, Graph, Weights::SIGNED>::Type;

}  // namespace packed
