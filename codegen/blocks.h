// Weights whose zeros come in blocks, stored as llmcomp/blocks.py says: what a Contract needs to know of them.
//
// A row is a run of numbers and a list of the columns where they belong, WIDTH neighbours each. Rows of the same row of
// blocks have one list between them: then a part of the operand is read once for all of them.
#pragma once
#include "contract.h"

#define MEMBER inline __attribute__((always_inline))

namespace blocks {

using micro::Vec;
using micro::W;
using micro::load;

constexpr int64_t DEPTH = 128;  // that the operand is padded to: the width of any block divides it

// A tile of rows; `codes` is where the table has an entry for the first, the others are `ld` bytes apart.
template <typename Weight_, int64_t WIDTH_>
struct Tile {
    typedef Weight_ Weight;
    static constexpr int64_t WIDTH = WIDTH_;
    const uint8_t* codes;
    const void* scale;
    int64_t ld, ldg, groups;

    // Where the list (0) or the numbers (1) of a row begin.
    MEMBER const char* start(int64_t n, int64_t which) const {
        const char* const entry = (const char*)codes + n * ld;
        int64_t distance;
        __builtin_memcpy(&distance, entry + 8 * which, 8);
        return entry + distance;
    }
    MEMBER const int16_t* list(int64_t n) const { return (const int16_t*)start(n, 0); }
    MEMBER const Weight* numbers(int64_t n) const { return (const Weight*)start(n, 1); }
};

// Whether R rows have one list.
template <int64_t R, typename Tile>
MEMBER bool alike(const Tile& w, int64_t n) {
    bool same = true;
    for (int64_t r = 1; r < R; ++r) same &= w.list(n + r) == w.list(n);
    return same;
}

// ---- few rows of the operand ------------------------------------------------------------------------------------------

// Steps of WIDTH or STEP weights, whichever is more, in which `columns` of their list meet C operand rows.
template <typename F, int64_t WIDTH, int64_t C>
struct Steps {
    static constexpr int64_t COLUMNS = WIDTH < F::STEP ? F::STEP / WIDTH : 1;  // of the list, in a step
    static constexpr int64_t COUNT = WIDTH < F::STEP ? 1 : WIDTH / F::STEP;
    typedef typename F::Packed Packed;
    static_assert(COLUMNS <= 2, "halves of a vector");

    template <int64_t R>
    static MEMBER void add(
        Vec (&acc)[R][C], const typename F::Weight* const (&w)[R], const Packed* x, const int16_t* columns
    ) {
        if constexpr (COLUMNS == 1) {
            const Packed* const at = x + columns[0] * WIDTH * C;
#pragma GCC unroll 4
            for (int64_t s = 0; s < COUNT; ++s) {
                typename F::Raw raw[R];
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) raw[r] = F::read(w[r] + s * F::STEP);
                micro::multiply<F, R, C>(acc, raw, at + s * C * F::STEP);
            }
        } else {
            typename F::Raw raw[R];
#pragma GCC unroll 4
            for (int64_t r = 0; r < R; ++r) raw[r] = F::read(w[r]);
#pragma GCC unroll 8
            for (int64_t c = 0; c < C; ++c) {
                Packed both[F::STEP];
                join(both, half(x, columns[0], c), half(x, columns[1], c));
#pragma GCC unroll 4
                for (int64_t r = 0; r < R; ++r) acc[r][c] = F::product(raw[r], both, acc[r][c]);
            }
        }
    }

    // The part of a packed step that meets half a step of weights.
    static MEMBER const Packed* half(const Packed* x, int64_t column, int64_t c) {
        return x + column / 2 * C * F::STEP + c * F::STEP + column % 2 * PART;
    }
    static constexpr int64_t PART = sizeof(Packed) == 2 ? F::STEP / 2 : F::STEP / 4;

    // Two halves as one step: in order, or in even and odd elements.
    static MEMBER void join(Packed* to, const Packed* a, const Packed* b) {
        typedef float Half __attribute__((vector_size(2 * W)));
        for (int64_t i = 0; i < F::STEP; i += 2 * PART)
            micro::store(to + i, joined(load<Half>(a + i), load<Half>(b + i), micro::AllLanes<int(W)>()));
    }
    template <typename Half, int... LANE>
    static MEMBER Vec joined(Half a, Half b, micro::Lanes<LANE...>) {
        return __builtin_shufflevector(a, b, LANE...);
    }
};

// acc += the products of R rows that have this list, by turns in U sums; meanwhile what lies at `next` is fetched.
template <typename F, int64_t WIDTH, int64_t U, int64_t R, int64_t C>
MEMBER void walk(
    Vec (&acc)[U][R][C], const typename F::Weight* (&from)[R], const int16_t* list, const typename F::Packed* x,
    const char*& next
) {
    typedef Steps<F, WIDTH, C> S;
    constexpr int64_t TAKEN = S::COLUMNS * WIDTH, BYTES = R * TAKEN * sizeof(typename F::Weight);
    const int16_t* const stop = list + 1 + *list;
    const auto step = [&](Vec (&sums)[R][C]) __attribute__((always_inline)) {
        for (int64_t b = 0; b < BYTES; b += 64, next += 64) __builtin_prefetch(next, 0, 2);
        S::template add<R>(sums, from, x, list);
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) from[r] += TAKEN;
        list += S::COLUMNS;
    };
    for (++list; list + U * S::COLUMNS <= stop;)
#pragma GCC unroll 2
        for (int64_t u = 0; u < U; ++u) step(acc[u]);
    while (list < stop) step(acc[0]);
}

// out[c][r] for R rows from `n` on, whose numbers are read side by side where they have one list.
template <typename F, int64_t R, int64_t C, typename Tile>
void dots(float* out, int64_t ldo, const Tile& w, int64_t n, const typename F::Packed* x) {
    constexpr int64_t U = C == 1 ? 2 : 1;  // a single operand row needs twice as many independent sums
    typedef const typename F::Weight* Row;
    const char* next = w.start(n + R, 1);
    Vec acc[U][R][C] = {};
    if (R > 1 && alike<R>(w, n)) {
        Row from[R];
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) from[r] = w.numbers(n + r);
        walk<F, Tile::WIDTH>(acc, from, w.list(n), x, next);
    } else {
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) {
            Row from[1] = {w.numbers(n + r)};
            Vec one[U][1][C] = {};
            walk<F, Tile::WIDTH>(one, from, w.list(n + r), x, next);
#pragma GCC unroll 2
            for (int64_t u = 0; u < U; ++u)
#pragma GCC unroll 8
                for (int64_t c = 0; c < C; ++c) acc[u][r][c] = one[u][0][c];
        }
    }
    if constexpr (U == 2)
        for (int64_t r = 0; r < R; ++r) acc[0][r][0] += acc[1][r][0];
    micro::store_sums<R, C>(out, ldo, acc[0]);
}

// ---- more rows of the operand -----------------------------------------------------------------------------------------

template <typename F, typename Weight>
MEMBER auto factor(const Weight* p) {
    if constexpr (F::GROUP > 1) return F::broadcast(p);
    else return micro::splat(float(*p));
}

// products[r][c] = row n + r . V vectors of operand rows, for R rows that have one list.
template <typename F, int64_t R, int64_t V, typename Tile>
void outer(float* products, const Tile& w, int64_t n, const typename F::Packed* x) {
    Vec acc[R][V] = {};
    const int16_t* list = w.list(n);
    const typename Tile::Weight* from = w.numbers(n);
    const int64_t count = *list++, ld = count * Tile::WIDTH;
    for (int64_t j = 0; j < count; ++j, from += Tile::WIDTH) {
        const typename F::Packed* at = x + list[j] * Tile::WIDTH * V * W;
        for (int64_t k = 0; k < Tile::WIDTH; k += F::GROUP, at += F::GROUP * V * W) {
            typename F::Lanes lanes[V];
#pragma GCC unroll 2
            for (int64_t v = 0; v < V; ++v) lanes[v] = load<typename F::Lanes>(at + v * W * F::GROUP);
#pragma GCC unroll 8
            for (int64_t r = 0; r < R; ++r) {
                const auto one = factor<F>(from + r * ld + k);
#pragma GCC unroll 2
                for (int64_t v = 0; v < V; ++v) acc[r][v] = F::outer_product(one, lanes[v], acc[r][v]);
            }
        }
    }
    for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v) micro::store(products + (r * V + v) * W, acc[r][v]);
}

// ---- the operand ------------------------------------------------------------------------------------------------------

// Packed as for dense weights; blocks of it are skipped.
template <typename Tile, typename Graph>
struct Operand : contract::Operand<typename Tile::Weight, Graph, DEPTH> {
    typedef contract::Operand<typename Tile::Weight, Graph, DEPTH> Base;
    typedef typename Base::F F;
    typedef typename Base::Packed Packed;
    using Base::PANEL, Base::count, Base::packed, Base::stride;
    using Base::Base;

    int64_t room_for(int64_t) const { return 0; }
    const char* unpack(const char* nothing, const Tile&, int64_t) const { return nothing; }

    // out[row][column] = operand row . weight row, for the rows of a panel and `width` weight rows.
    template <typename Code>
    void multiply(int64_t panel, float* out, int64_t ldo, const Tile& w, const char*, int64_t width, const Code*) const {
        const Packed* x = packed + panel * stride;
        const int64_t rows = op::minimum(PANEL, count - panel);
        switch (Base::room(rows)) {
            case 1: return few<1>(out, ldo, w, x, width);
            case 2: return few<2>(out, ldo, w, x, width);
            case W: return many<1>(out, ldo, w, x, width, rows);
            case 2 * W: return many<2>(out, ldo, w, x, width, rows);
        }
        if constexpr (micro::FEW >= 8) return rows <= 4 ? few<4>(out, ldo, w, x, width) : few<8>(out, ldo, w, x, width);
    }

    template <int64_t C>
    void few(float* out, int64_t ldo, const Tile& w, const Packed* x, int64_t width) const {
        constexpr int64_t R = 4;
        int64_t n = 0;
        for (; n + R <= width; n += R) dots<F, R, C>(out + n, ldo, w, n, x);
        for (; n < width; ++n) dots<F, 1, C>(out + n, ldo, w, n, x);
    }

    // The products come out with the rows of the operand innermost; they are turned around on the way to `out`.
    template <int64_t V>
    void many(float* out, int64_t ldo, const Tile& w, const Packed* x, int64_t width, int64_t rows) const {
        constexpr int64_t R = 8;
        alignas(64) float products[R * V * W];
        for (int64_t n = 0, some; n < width; n += some) {
            some = n + R <= width && w.ld == ENTRY && alike<R>(w, n) ? R : 1;
            if (some == R) outer<F, R, V>(products, w, n, x);
            else outer<F, 1, V>(products, w, n, x);
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t i = 0; i < some; ++i) out[m * ldo + n + i] = products[i * V * W + m];
        }
    }
    static constexpr int64_t ENTRY = 16;
};

}  // namespace blocks
