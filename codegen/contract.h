// The operand of a Contract: packed once, then multiplied with one tile of weight rows after the other.
//
// A kernel takes the rows of the operand in blocks. Of each block every thread packs its share of the rows (or all of
// them for itself, where that is less work than waiting for the others), then computes its share of the columns.
#pragma once
#include "micro.h"
#include "work.h"

namespace contract {

using micro::W;
using work::round_up;

constexpr int64_t TILE = 32;  // columns of a tile
constexpr int64_t WIDE_TILE = 1024;  // the same where weights are stored (K, N), for long runs in memory
constexpr int64_t BLOCK = 256;  // operand rows that are packed between two barriers
constexpr int64_t DEPTH_BLOCK = 2048;  // of this depth, a panel of the operand and a tile of weights fit the L2 cache
constexpr int64_t PRIVATE = 16384;  // elements that a thread packs in less time than a barrier would take

// All sections of a kernel in a row, measured in weight rows: a thread computes the tiles that begin in its part.
struct Tiles {
    op::Share part;
    int64_t before = 0;

    // The tiles of the next section: it has `count` tiles of `cost` weight rows each.
    op::Share next(int64_t count, int64_t cost) {
        const auto first_from = [&](int64_t at) {
            return op::clamp_index((at - before + cost - 1) / cost, count + 1);
        };
        const op::Share tiles = {first_from(part.first), first_from(part.last)};
        before += count * cost;
        return tiles;
    }
};

// Columns of a tile where weights are stored (K, N): many for few rows (long runs in memory), and so that every thread
// gets the same number of tiles.
INLINE int64_t wide_tile(int64_t columns, int64_t rows, int64_t team) {
    const int64_t most = rows <= 8 ? WIDE_TILE : WIDE_TILE / 8;
    const int64_t each = (columns + team - 1) / team;
    const int64_t tiles = (each + most - 1) / most;
    return round_up((each + tiles - 1) / tiles, TILE);
}

// What all kinds of operand share: where the packed rows of a block are, and who packs which. A packed row is a
// multiple of MULTIPLE long, with room for EXTRA elements behind.
template <typename Packed, int64_t PANEL_, int64_t MULTIPLE, int64_t EXTRA = 0>
struct Packing {
    static constexpr int64_t PANEL = PANEL_;  // rows that are multiplied together

    const int64_t depth, stride;  // a packed row has `stride` elements, zeros behind the first `depth`
    const work::Member member;
    const bool shared;
    float* const line;  // one row, before it is packed
    Packed* const packed;
    int64_t count = 0;  // rows of the current block

    static int64_t stride_of(int64_t depth) { return round_up(depth, MULTIPLE) + EXTRA; }
    static bool share(int64_t rows, int64_t depth, int64_t team) { return team > 1 && rows * depth > PRIVATE; }
    static int64_t block_size(int64_t rows, int64_t depth) {
        return round_up(op::minimum(rows, BLOCK), PANEL) * stride_of(depth);
    }
    // Bytes that a team needs.
    static int64_t bytes(int64_t rows, int64_t depth, int64_t team) {
        const int64_t blocks = share(rows, depth, team) ? 1 : team;
        return team * stride_of(depth) * sizeof(float) + blocks * block_size(rows, depth) * sizeof(Packed);
    }

    Packing(char* memory, int64_t rows, int64_t depth, int64_t team)
        : depth(depth), stride(stride_of(depth)), member(team), shared(share(rows, depth, team)),
          line((float*)memory + member.rank * stride),
          packed((Packed*)((float*)memory + team * stride) + (shared ? 0 : member.rank) * block_size(rows, depth)) {
        for (int64_t k = depth; k < stride; ++k) line[k] = 0;
    }

    // Start a block of `rows` rows, once nobody needs the last one: the rows that this thread has to pack.
    op::Share start(int64_t rows) {
        if (shared && count) {
#pragma omp barrier
        }
        count = rows;
        return shared ? member.share(rows) : op::Share{0, rows};
    }

    // All rows of the block are packed when this returns.
    void finish() {
        if (shared) {
#pragma omp barrier
        }
    }
};

// ---- weights stored along k: nn.Linear ------------------------------------------------------------------------------

// Up to FEW rows are packed for `micro::dots`, more for `micro::outer`, W or 2 W at a time.
template <typename Weight, typename Graph, int64_t MULTIPLE = 2 * W>
struct Operand : Packing<typename micro::Format<Weight, Graph>::Packed, 2 * W, MULTIPLE> {
    typedef micro::Format<Weight, Graph> F;
    typedef typename F::Packed Packed;
    typedef Packing<Packed, 2 * W, MULTIPLE> Base;
    using Base::PANEL, Base::count, Base::depth, Base::line, Base::packed, Base::stride;
    using Base::Base;

    // Rows that a panel has room for: those behind the last are not set, nor are results of theirs read.
    static int64_t room(int64_t rows) {
        return rows <= 2 ? rows : rows <= 4 && micro::FEW >= 4 ? 4 : rows <= micro::FEW ? 8 : rows <= W ? W : 2 * W;
    }

    // Pack `line` as row `row` of the block.
    void pack(int64_t row) {
        const int64_t panel = row - row % PANEL, at = row - panel;
        const int64_t slots = room(op::minimum(PANEL, count - panel));
        Packed* to = packed + panel * stride;
        if (slots <= micro::FEW) {
            for (int64_t k = 0; k < stride; k += F::STEP) F::pack(to + k * slots + at * F::STEP, line + k);
        } else {
            for (int64_t k = 0; k < stride; k += F::GROUP)
                for (int64_t g = 0; g < F::GROUP; ++g) to[k * slots + at * F::GROUP + g] = line[k + g];
        }
    }

    // out[row][column] = operand row . weight row, for the rows of a panel and `width` weight rows from `w` on.
    // `next` is where the weights begin that are read after these.
    void multiply(
        int64_t panel, float* out, int64_t ldo, const Weight* w, int64_t ld, int64_t width, const Weight* next
    ) const {
        const Packed* x = packed + panel * stride;
        const int64_t rows = op::minimum(PANEL, count - panel);
        switch (room(rows)) {
            case 1: return few<1>(out, ldo, w, ld, x, width, next);
            case 2: return few<2>(out, ldo, w, ld, x, width, next);
            case W: return many<1>(out, ldo, w, ld, x, width, rows);
            case 2 * W: return many<2>(out, ldo, w, ld, x, width, rows);
        }
        if constexpr (micro::FEW >= 8)
            return rows <= 4 ? few<4>(out, ldo, w, ld, x, width, next) : few<8>(out, ldo, w, ld, x, width, next);
    }

    template <int64_t C>
    void few(
        float* out, int64_t ldo, const Weight* w, int64_t ld, const Packed* x, int64_t width, const Weight* next
    ) const {
        int64_t n = 0;
        for (; n + 4 <= width; n += 4)
            micro::dots<F, 4, C>(
                out + n, ldo, w + n * ld, ld, x, depth, n + 8 <= width ? w + (n + 4) * ld : next, ld
            );
        for (; n < width; ++n) micro::dots<F, 1, C>(out + n, ldo, w + n * ld, ld, x, depth, next, ld);
    }

    // The products come out with the rows of the operand innermost; they are turned around on the way to `out`.
    template <int64_t V>
    void many(
        float* out, int64_t ldo, const Weight* w, int64_t ld, const Packed* x, int64_t width, int64_t rows
    ) const {
        for (int64_t n0 = 0; n0 < width; n0 += TILE) {
            const int64_t columns = op::minimum(TILE, width - n0);
            alignas(64) float products[TILE * V * W] = {};
            for (int64_t k = 0; k < depth; k += DEPTH_BLOCK) {
                const int64_t part = op::minimum(DEPTH_BLOCK, depth - k);
                int64_t n = 0;
                for (; n + 8 <= columns; n += 8) add<8, V>(products + n * V * W, w + (n0 + n) * ld + k, ld, x + k * V * W, part);
                for (; n < columns; ++n) add<1, V>(products + n * V * W, w + (n0 + n) * ld + k, ld, x + k * V * W, part);
            }
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t n = 0; n < columns; ++n) out[m * ldo + n0 + n] = products[n * V * W + m];
        }
    }

    // products += R weight rows . V vectors of operand rows, over `part` of the depth.
    template <int64_t R, int64_t V>
    static void add(float* products, const Weight* w, int64_t ld, const Packed* x, int64_t part) {
        constexpr int64_t LDB = V * W * F::GROUP;
        if constexpr (F::GROUP > 1 || sizeof(Weight) == sizeof(float)) {
            micro::outer<F, R, V>(products, V * W, w, ld, x, LDB, part);
        } else {
            constexpr int64_t STEP = 256;
            alignas(64) float wide[R * STEP];
            for (int64_t k = 0; k < part; k += STEP) {
                const int64_t some = op::minimum(STEP, part - k);
                for (int64_t r = 0; r < R; ++r) micro::widen_row(wide + r * STEP, w + r * ld + k, some);
                micro::outer<micro::Singles<float>, R, V>(products, V * W, wide, STEP, x + k * V * W, LDB, some);
            }
        }
    }
};

// ---- weights stored along n: (K, N), GPT-2's Conv1D -------------------------------------------------------------------

// Up to 8 rows are multiplied with the weights where they are, more with a copy of some of the weights in the cache.
template <typename Weight, typename Graph>
struct ColumnOperand : Packing<typename micro::ColumnFormat<Weight, Graph>::Packed, 64, 2 * W> {
    typedef micro::ColumnFormat<Weight, Graph> F;
    typedef typename F::Packed Packed;
    typedef Packing<Packed, 64, 2 * W> Base;
    using Base::PANEL, Base::count, Base::depth, Base::line, Base::packed, Base::stride;
    using Base::Base;

    static constexpr int64_t FEW = 8, K_STEP = 64;
    static constexpr int64_t PRODUCTS = WIDE_TILE * FEW;  // room for the products of a panel and a tile

    void pack(int64_t row) {
        for (int64_t k = 0; k < stride; ++k) packed[row * stride + k] = line[k];
    }

    // out[row][column] = operand row . weight column, for the rows of a panel and `width` columns from `w` on.
    void multiply(int64_t panel, float* out, int64_t ldo, const Weight* w, int64_t ld, int64_t width) const {
        const Packed* x = packed + panel * stride;
        const int64_t rows = op::minimum(PANEL, count - panel);
        if (rows > FEW) return many(out, ldo, x, rows, w, ld, width);
        if (rows > 4) return micro::columns<F, 8>(out, ldo, x, stride, w, ld, width, depth);
        if (rows > 2) return micro::columns<F, 4>(out, ldo, x, stride, w, ld, width, depth);
        if (rows > 1) return micro::columns<F, 2>(out, ldo, x, stride, w, ld, width, depth);
        return micro::columns<F, 1>(out, ldo, x, stride, w, ld, width, depth);
    }

    void many(
        float* out, int64_t ldo, const Packed* x, int64_t rows, const Weight* w, int64_t ld, int64_t width
    ) const {
        alignas(64) Packed copy[K_STEP * TILE];
        __builtin_memset(out, 0, rows * ldo * sizeof(float));
        for (int64_t k = 0; k < depth; k += K_STEP) {
            const int64_t part = op::minimum(K_STEP, depth - k);
            for (int64_t n = 0; n < width; n += TILE) {
                micro::pack_columns<F, TILE>(copy, w + k * ld + n, ld, width - n, part);
                int64_t m = 0;
                for (; m + 8 <= rows; m += 8) add<8>(out + m * ldo + n, ldo, x + m * stride + k, copy, part);
                for (; m < rows; ++m) add<1>(out + m * ldo + n, ldo, x + m * stride + k, copy, part);
            }
        }
    }

    template <int64_t R>
    void add(float* out, int64_t ldo, const Packed* x, const Packed* copy, int64_t part) const {
        for (int64_t v = 0; v < TILE; v += 2 * W)
            micro::outer<F, R, 2>(out + v, ldo, x, stride, copy + v * F::GROUP, TILE * F::GROUP, part);
    }
};

// A tile of weights that are stored along neither axis, copied row by row.
template <typename Weight>
INLINE const Weight* gather(
    Weight* to, const Weight* from, int64_t row_stride, int64_t k_stride, int64_t width, int64_t depth
) {
    for (int64_t n = 0; n < width; ++n)
        for (int64_t k = 0; k < depth; ++k) to[n * depth + k] = from[n * row_stride + k * k_stride];
    return to;
}

}  // namespace contract
