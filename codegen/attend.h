// Attention with an online softmax: softmax(score(q . k)) . v, one block of keys after the other.
//
// The query heads that read one head of keys are rows of one problem, so keys and values are read once for all of them.
// Few rows (a decode step) are multiplied with keys and values where they are; more with a copy of a block, packed for
// `micro::outer`. A context that is long next to the number of heads is split among threads, and the parts combined
// (T. Dao et al., "Flash-Decoding for long-context inference", 2023; M. Milakov, N. Gimelshein, "Online normalizer
// calculation for softmax", 2018).
#pragma once
#include "micro.h"
#include "work.h"

namespace attend {

using micro::load, micro::splat, micro::store, micro::Vec, micro::W;

// (batch, head, position, channel) in elements.
template <typename T>
struct Strided {
    T* start;
    int64_t batch, head, position, channel;
    T* at(int64_t b, int64_t h, int64_t i) const { return start + b * batch + h * head + i * position; }
};

// A score that is q . k times the scale and nothing else; no sinks.
struct Plain {};
template <typename T>
constexpr bool is_plain = false;
template <>
constexpr bool is_plain<Plain> = true;

// A mask: look(flags, b, h, i, j, stop) says of the keys from j on whether query i sees them. Heads share it where not
// BY_HEAD.
template <bool BY_HEAD_, typename F>
struct Masked {
    static constexpr bool BY_HEAD = BY_HEAD_;
    const F& look;
    bool any(int64_t b, int64_t h, int64_t i, int64_t j, int64_t stop) const {
        uint8_t flags[STRIDE] = {}, found = 0;
        look(flags, b, h, i, j, stop);
        for (int64_t n = 0; n < STRIDE; ++n) found |= flags[n];
        return found;
    }
    static constexpr int64_t STRIDE = 64;
};
template <bool BY_HEAD, typename F>
Masked<BY_HEAD, F> masked(const F& look) { return {look}; }

// ---- softmax --------------------------------------------------------------------------------------------------------

// exp(x) for x <= 0, as op::exp but for results below the smallest normal float, which are 0.
INLINE Vec exp_negative(Vec x) {
    const Vec bounded = x < -87.0f ? splat(-87.0f) : x;  // NaN passes
    const Vec t = micro::fma(bounded, splat(0x1.715476p0f), splat(op::shifter));
    const Vec n = t - op::shifter;
    const Vec r = micro::fma(n, splat(-op::log2_low), micro::fma(n, splat(-op::log2_high), bounded));
    Vec q = micro::fma(splat(0.00139475975f), r, splat(0.00836724695f));
    q = micro::fma(q, r, splat(0.0416662656f));
    q = micro::fma(q, r, splat(0.166665375f));
    q = micro::fma(q, r, splat(0.5f));
    q = micro::fma(q, r * r, r) + 1.0f;
    const micro::Bits power = ((micro::Bits)t + 127u - op::bits<uint32_t>(op::shifter)) << 23;
    return x < -87.0f ? splat(0.0f) : q * (Vec)power;
}

INLINE float exp_negative(float x) { return exp_negative(splat(x))[0]; }

INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // of a NaN and a number it may be either

INLINE float highest(Vec v) {
    using micro::AllLanes, micro::rotate;
    v = maximum(v, rotate<1>(v, AllLanes<W>()));
    v = maximum(v, rotate<2>(v, AllLanes<W>()));
    if constexpr (W > 4) v = maximum(v, rotate<4>(v, AllLanes<W>()));
    if constexpr (W > 8) v = maximum(v, rotate<8>(v, AllLanes<W>()));
    return v[0];
}

INLINE void multiply(float* row, int64_t size, float factor) {
    for (int64_t c = 0; c < size; c += W) store(row + c, load<Vec>(row + c) * factor);
}

// What is known of a row after some of its keys.
struct Row {
    float highest, sum;
    int64_t first, stop;  // its visible keys
};

// Raise the maximum of a row: what was added up with the old one is made smaller.
INLINE void raise(Row& row, float highest, float* total, int64_t size) {
    if (!(highest > row.highest)) return;
    const float factor = row.highest == -op::inff ? 0.0f : exp_negative(row.highest - highest);
    row.highest = highest;
    row.sum *= factor;
    multiply(total, size, factor);
}

INLINE void put(float* to, Vec v) { store(to, v); }
#if defined(__AVX512BF16__)
INLINE void put(bf16* to, Vec v) {
    micro::Halves h;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
    store(to, h);
}
#endif

// Scores of a block of keys -> their weights, not yet divided by the sum. `size` is a multiple of W. What is written is
// multiplied by `factors`, the scales of the values, where SCALED.
template <bool SCALED, typename P>
INLINE void weigh(
    Row& row, float* scores, P* weights, int64_t size, float* total, int64_t channels, const float* factors
) {
    Vec best = splat(-op::inff);
    for (int64_t j = 0; j < size; j += W) best = maximum(load<Vec>(scores + j), best);
    raise(row, highest(best), total, channels);
    const float base = row.highest == -op::inff ? 0.0f : row.highest;
    Vec sum = {};
    for (int64_t j = 0; j < size; j += W) {
        const Vec e = exp_negative(load<Vec>(scores + j) - base);
        sum += e;
        if constexpr (SCALED) put(weights + j, e * load<Vec>(factors + j));
        else put(weights + j, e);
    }
    row.sum += micro::sum(sum);
}

// ---- attention ------------------------------------------------------------------------------------------------------

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

// How keys and values of type KV meet queries of type T: Dots for few rows, Columns for many.
template <typename KV, typename T>
struct Formats {
    typedef micro::Format<KV, T> Dots;
    typedef micro::ColumnFormat<KV, T> Columns;
};
#if defined(__AVX512BF16__)
// Codes next to bf16, which holds every one of them exactly: pairs for the instruction that bf16 has.
template <typename KV>
struct Codes : micro::Pairs {
    typedef KV Weight;
    INLINE micro::Bits pairs(Vec low, Vec high) {
        micro::Bits both;
        __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
        return both;
    }
    INLINE micro::Bits read(const KV* p) { return pairs(micro::widen(p), micro::widen(p + W)); }
    INLINE micro::Bits read_part(const KV* p, int64_t count) {
        const int64_t low = op::minimum(count, W);
        return pairs(micro::widen_part(p, low), micro::widen_part(p + low, count - low));
    }
    INLINE micro::Bits row(const KV* p) { return read(p); }
    INLINE micro::Bits row_part(const KV* p, int64_t count) { return read_part(p, count); }
    INLINE micro::Bits columns(const KV* p, int64_t ld) { return beside(micro::widen(p), micro::widen(p + ld)); }
    INLINE micro::Bits columns_part(const KV* p, int64_t ld, int64_t count) {
        return beside(micro::widen_part(p, count), micro::widen_part(p + ld, count));
    }
    INLINE micro::Bits beside(Vec a, Vec b) { return (micro::Bits)a >> 16 | (micro::Bits)b; }
};
template <>
struct Formats<int8_t, bf16> {
    typedef Codes<int8_t> Dots, Columns;
};
template <>
struct Formats<e4m3, bf16> {
    typedef Codes<e4m3> Dots, Columns;
};
#endif

// T: of q. KV: of k and v, T or a type of codes, of which each key and each value has a scale. GROUP query heads read
// one head of keys. DIRECT: channels of k and v are neighbours in memory.
template <typename T, typename KV, typename Out, int64_t GROUP, int64_t D, int64_t DV, bool DIRECT>
struct Attention {
    typedef typename Formats<KV, T>::Dots Dots;  // q . k, for few rows
    typedef typename Formats<KV, T>::Columns F;  // both products, for many rows
    typedef typename F::Packed Packed;
    static constexpr bool SCALED = !same<T, KV>;

    static constexpr int64_t ROWS = 128;  // query rows of an item
    static constexpr int64_t KEYS = 128;  // keys of a block
    static constexpr int64_t FEW = micro::FEW;
    static constexpr int64_t R = 8;  // rows in registers
    static constexpr int64_t Q_SIZE = work::round_up(D, 2 * W), V_SIZE = work::round_up(DV, W);
    static constexpr int64_t SPLIT = 256;  // keys that are worth a thread

    struct Scratch {
        alignas(64) typename Dots::Packed few[FEW * Q_SIZE];
        alignas(64) Packed q[ROWS * Q_SIZE];
        alignas(64) float scores[R * KEYS];
        alignas(64) Packed weights[R * KEYS];
        alignas(64) Packed keys[KEYS * Q_SIZE];
        alignas(64) Packed values[KEYS * V_SIZE];
        alignas(64) float totals[ROWS * V_SIZE];
        alignas(64) float key_scales[SCALED ? KEYS : W];
        alignas(64) float value_scales[SCALED ? KEYS : W];
        alignas(64) KV copy[DIRECT ? 1 : KEYS * (D > DV ? D : DV)];
        Row rows[ROWS];
    };
    struct Part {
        Row row;
        float total[V_SIZE];
    };

    const int64_t batch, kv_heads, queries, keys;
    const Strided<const T> q;
    const Strided<const KV> k, v;
    const Strided<Out> out;
    const float scale;
    const Strided<const float> k_scale, v_scale;

    // ---- how the work is cut ----

    int64_t rows() const { return GROUP * queries; }
    int64_t tiles() const { return (rows() + ROWS - 1) / ROWS; }
    int64_t problems() const { return batch * kv_heads * tiles(); }
    // Parts of the keys, so that every thread gets the same number of items.
    int64_t splits(int64_t team) const {
        int64_t common = team;
        for (int64_t rest = problems(); rest != 0;) {
            const int64_t r = common % rest;
            common = rest;
            rest = r;
        }
        return tiles() > 1 ? 1 : op::minimum(team / common, op::maximum<int64_t>(keys / SPLIT, 1));
    }
    int64_t items() const { return problems() * op::maximum<int64_t>(keys / SPLIT, 1); }
    int64_t effort() const { return problems() * op::minimum(rows(), ROWS) * keys * (D + DV); }
    int64_t bytes(int64_t team) const {
        const int64_t parts = splits(team) > 1 ? problems() * splits(team) * op::minimum(rows(), ROWS) : 0;
        return team * int64_t(sizeof(Scratch)) + parts * int64_t(sizeof(Part));
    }

    // One thread's share. start(i), end(i): the keys that query i may see; score(scores, b, h, i, j, stop): what
    // happens to the scores of the keys from j on; sink(h): a logit without a value; mask: see Masked.
    template <typename Start, typename End, typename Score, typename Sink, typename Mask>
    void run(
        char* memory, int64_t team, const Start& start, const End& end, const Score& score, const Sink& sink,
        const Mask& mask
    ) const {
        const work::Member member(team);
        Scratch& s = ((Scratch*)memory)[member.rank];
        Part* const parts = (Part*)((Scratch*)memory + team);
        const int64_t splits = this->splits(team), height = op::minimum(rows(), ROWS);
        for (int64_t item = member.rank; item < problems() * splits; item += member.size) {
            const int64_t problem = item / splits, tile = problem % tiles(), head = problem / tiles();
            const int64_t b = head / kv_heads, kv = head % kv_heads;
            const int64_t first = tile * ROWS, count = op::minimum(ROWS, rows() - first);
            const auto narrow = [&](Row& row, int64_t r) { this->narrow(s, row, r, b, kv, first, mask); };
            prepare(s, first, count, item % splits, splits, start, end, narrow);
            attend(s, b, kv, first, count, score);
            if (splits == 1) finish(s, b, kv, first, count, sink);
            else keep(s, parts + item * height, count);
        }
        if (splits == 1) return;
#pragma omp barrier
        for (int64_t problem = member.rank; problem < problems(); problem += member.size) {
            combine(s, parts + problem * splits * height, splits, height);
            finish(s, problem / kv_heads, problem % kv_heads, 0, height, sink);
        }
    }

    // Leave out the keys before the first and behind the last that row r sees: padding, and what a cache has not used.
    template <typename Mask>
    void narrow(Scratch& s, Row& row, int64_t r, int64_t b, int64_t kv, int64_t first, const Mask& mask) const {
        if constexpr (!is_plain<Mask>) {
            const int64_t i = (first + r) / GROUP, h = kv * GROUP + (first + r) % GROUP;
            if (!Mask::BY_HEAD && r > 0 && (first + r - 1) / GROUP == i) {
                row.first = s.rows[r - 1].first, row.stop = s.rows[r - 1].stop;
                return;
            }
            const auto behind = [&] { return op::maximum(row.first, row.stop - Mask::STRIDE); };
            const auto before = [&] { return op::minimum(row.stop, row.first + Mask::STRIDE); };
            while (row.first < row.stop && !mask.any(b, h, i, behind(), row.stop)) row.stop = behind();
            while (row.first < row.stop && !mask.any(b, h, i, row.first, before())) row.first = before();
        }
    }

    // Empty rows, with their visible keys; of those the part `split`.
    template <typename Start, typename End, typename Narrow>
    void prepare(
        Scratch& s, int64_t first, int64_t count, int64_t split, int64_t splits, const Start& start, const End& end,
        const Narrow& narrow
    ) const {
        int64_t low = keys, high = 0;
        for (int64_t r = 0; r < work::round_up(count, R); ++r) {
            const int64_t i = (first + op::minimum(r, count - 1)) / GROUP;
            Row& row = s.rows[r] = {-op::inff, 0, op::maximum<int64_t>(start(i), 0), op::minimum(end(i), keys)};
            if (r < count) narrow(row, r);
            else row.first = row.stop = 0;
            if (row.first >= row.stop) continue;
            low = op::minimum(low, row.first);
            high = op::maximum(high, row.stop);
        }
        const int64_t size = work::round_up((op::maximum(high - low, int64_t(0)) + splits - 1) / splits, KEYS);
        for (int64_t r = 0; r < count && splits > 1; ++r) {
            s.rows[r].first = op::maximum(s.rows[r].first, low + split * size);
            s.rows[r].stop = op::minimum(s.rows[r].stop, low + (split + 1) * size);
        }
        __builtin_memset(s.totals, 0, work::round_up(count, R) * V_SIZE * sizeof(float));
    }

    // ---- one item: rows against all their keys ----

    template <typename Score>
    void attend(Scratch& s, int64_t b, int64_t kv, int64_t first, int64_t count, const Score& score) const {
        int64_t low = keys, high = 0;
        for (int64_t r = 0; r < count; ++r) {
            if (s.rows[r].first >= s.rows[r].stop) continue;
            low = op::minimum(low, s.rows[r].first);
            high = op::maximum(high, s.rows[r].stop);
        }
        if constexpr (DIRECT) {
            // A decode step has GROUP rows, so smaller numbers are not worth code of their own.
            constexpr int64_t LEAST = GROUP <= 2 ? GROUP : GROUP <= 4 ? 4 : 8;
            if constexpr (LEAST <= FEW)
                if (rows() <= LEAST) return few<LEAST>(s, b, kv, first, count, low, high, score);
            if constexpr (2 * LEAST <= FEW)
                if (rows() <= 2 * LEAST) return few<2 * LEAST>(s, b, kv, first, count, low, high, score);
        }
        many(s, b, kv, first, count, low, high, score);
    }

    const T* query(int64_t b, int64_t kv, int64_t row) const { return q.at(b, kv * GROUP + row % GROUP, row / GROUP); }

    // Scores of one row for the keys [j, j + size) -> what the softmax takes, -inf where not visible.
    template <typename Score>
    void judge(
        const Scratch& s, const Row& row, float* scores, int64_t size, int64_t j, int64_t b, int64_t h, int64_t i,
        const Score& score
    ) const {
        const int64_t first = op::clamp_index(row.first - j, size + 1), stop = op::clamp_index(row.stop - j, size + 1);
        for (int64_t n = 0; n < size; n += W) {
            if constexpr (SCALED) store(scores + n, load<Vec>(scores + n) * load<Vec>(s.key_scales + n));
            else store(scores + n, load<Vec>(scores + n) * scale);
        }
        if constexpr (!is_plain<Score>)
            if (first < stop) score(scores + first, b, h, i, j + first, j + stop);
        for (int64_t n = 0; n < first; ++n) scores[n] = -op::inff;
        for (int64_t n = op::maximum(first, stop); n < size; ++n) scores[n] = -op::inff;
    }

    // The scales of the keys and values [j, j + size), zeros up to the next multiple of 2 W.
    void fetch_scales(Scratch& s, int64_t b, int64_t kv, int64_t j, int64_t size) const {
        if constexpr (SCALED) {
            for (int64_t n = 0; n < work::round_up(size, 2 * W); ++n) {
                s.key_scales[n] = n < size ? *k_scale.at(b, kv, j + n) * scale : 0.0f;
                s.value_scales[n] = n < size ? *v_scale.at(b, kv, j + n) : 0.0f;
            }
        }
    }

    // Up to C rows: keys and values are read where they are.
    template <int64_t C, typename Score>
    void few(
        Scratch& s, int64_t b, int64_t kv, int64_t first, int64_t count, int64_t low, int64_t high, const Score& score
    ) const {
        const KV *const keys_at = k.at(b, kv, 0), *const values_at = v.at(b, kv, 0);
        for (int64_t c = 0; c < C; ++c) {
            alignas(64) float line[Q_SIZE] = {};
            const T* from = query(b, kv, first + op::minimum(c, count - 1));
            for (int64_t d = 0; d < D; ++d) line[d] = from[d * q.channel];
            for (int64_t d = 0; d < Q_SIZE; d += Dots::STEP)
                Dots::pack(s.few + d * C + c * Dots::STEP, line + d);
        }
        for (int64_t j = low; j < high; j += KEYS) {
            const int64_t size = op::minimum(KEYS, high - j);
            // While keys are read the values of the block are fetched, and while these are read the next keys.
            const KV *const at = keys_at + j * k.position, *const values = values_at + j * v.position;
            fetch_scales(s, b, kv, j, size);
            int64_t n = 0;
            for (; n + 4 <= size; n += 4)
                micro::dots<Dots, 4, C>(
                    s.scores + n, KEYS, at + n * k.position, k.position, s.few, D, values + n * v.position, v.position
                );
            for (; n < size; ++n)
                micro::dots<Dots, 1, C>(s.scores + n, KEYS, at + n * k.position, k.position, s.few, D, at, 0);
            for (int64_t c = 0; c < count; ++c) {
                const int64_t i = (first + c) / GROUP, h = kv * GROUP + (first + c) % GROUP;
                float* const scores = s.scores + c * KEYS;
                judge(s, s.rows[c], scores, work::round_up(size, W), j, b, h, i, score);
                weigh<SCALED>(
                    s.rows[c], scores, s.weights + c * KEYS, work::round_up(size, W), s.totals + c * V_SIZE, V_SIZE,
                    s.value_scales
                );
            }
            add_values<C>(s, values, size, at + KEYS * k.position);
        }
    }

    // totals += weights . values for C rows and `size` keys, as many channels at a time as the registers hold.
    template <int64_t C>
    void add_values(Scratch& s, const KV* at, int64_t size, const KV* next_keys) const {
        constexpr int64_t SUMS = W == 16 ? 16 : 8, MOST = C == 1 ? 8 : SUMS / C;
        constexpr int64_t V = DV < 2 * W ? 1 : DV / W < MOST ? DV / W : MOST, WHOLE = DV / (V * W) * V * W;
        const auto next = [&](int64_t key) { return key + F::GROUP <= size ? v.position : 0; };
        for (int64_t c = 0; c < WHOLE; c += V * W)
            micro::outer_with<F, C, V, true>(
                s.totals + c, V_SIZE, s.weights, KEYS, size, [&](int64_t key, int64_t n) {
                    if (c == 0 && n == 0) fetch(next_keys + key * k.position);
                    return F::columns(at + key * v.position + c + n * W, next(key));
                });
        for (int64_t c = WHOLE; c < DV; c += W)
            micro::outer_with<F, C, 1, true>(
                s.totals + c, V_SIZE, s.weights, KEYS, size, [&](int64_t key, int64_t) {
                    return F::columns_part(at + key * v.position + c, next(key), op::minimum(W, DV - c));
                });
    }

    // A group of rows of keys into the second-level cache.
    void fetch(const KV* at) const {
#pragma GCC unroll 2
        for (int64_t g = 0; g < F::GROUP; ++g)
#pragma GCC unroll 8
            for (int64_t d = 0; d < D; d += 64 / sizeof(KV)) __builtin_prefetch(at + g * k.position + d, 0, 2);
    }

    // Any number of rows, R at a time against a packed block of keys and values.
    template <typename Score>
    void many(
        Scratch& s, int64_t b, int64_t kv, int64_t first, int64_t count, int64_t low, int64_t high, const Score& score
    ) const {
        for (int64_t r = 0; r < work::round_up(count, R); ++r) {
            const T* from = query(b, kv, first + op::minimum(r, count - 1));
            for (int64_t d = 0; d < D; ++d) s.q[r * Q_SIZE + d] = r < count ? float(from[d * q.channel]) : 0.0f;
        }
        for (int64_t j = low; j < high; j += KEYS) {
            const int64_t size = op::minimum(KEYS, high - j);
            pack_keys(s, k.at(b, kv, j), size);
            pack_values(s, v.at(b, kv, j), size);
            fetch_scales(s, b, kv, j, size);
            for (int64_t r = 0; r < count; r += R) {
                int64_t last = 0, begin = keys;
                for (int64_t n = r; n < r + R; ++n) {
                    last = op::maximum(last, s.rows[n].stop);
                    if (s.rows[n].first < s.rows[n].stop) begin = op::minimum(begin, s.rows[n].first);
                }
                const int64_t visible = op::minimum(size, last - j);
                if (visible > 0 && begin < j + size) block(s, r, b, kv, first, j, visible, score);
            }
        }
    }

    // R rows against `visible` packed keys, from key j on.
    template <typename Score>
    void block(
        Scratch& s, int64_t r, int64_t b, int64_t kv, int64_t first, int64_t j, int64_t visible, const Score& score
    ) const {
        const int64_t size = work::round_up(visible, 2 * W);
        for (int64_t n = 0; n < size; n += 2 * W)
            micro::outer<F, R, 2, false>(
                s.scores + n, KEYS, s.q + r * Q_SIZE, Q_SIZE, s.keys + n * F::GROUP, KEYS * F::GROUP, D
            );
        for (int64_t n = 0; n < R; ++n) {
            const int64_t row = first + r + n;
            float* const scores = s.scores + n * KEYS;
            judge(s, s.rows[r + n], scores, size, j, b, kv * GROUP + row % GROUP, row / GROUP, score);
            weigh<SCALED>(
                s.rows[r + n], scores, s.weights + n * KEYS, size, s.totals + (r + n) * V_SIZE, V_SIZE, s.value_scales
            );
        }
        float* const totals = s.totals + r * V_SIZE;
        int64_t c = 0;
        for (; c + 2 * W <= V_SIZE; c += 2 * W)
            micro::outer<F, R, 2>(
                totals + c, V_SIZE, s.weights, KEYS, s.values + c * F::GROUP, V_SIZE * F::GROUP, visible
            );
        if (c < V_SIZE)
            micro::outer<F, R, 1>(
                totals + c, V_SIZE, s.weights, KEYS, s.values + c * F::GROUP, V_SIZE * F::GROUP, visible
            );
    }

    // ---- packing ----

    // Rows whose channels are neighbours: where they are, or a copy.
    const KV* rows_of(
        Scratch& s, const KV* from, int64_t channel, int64_t& position, int64_t size, int64_t width
    ) const {
        if constexpr (DIRECT) return from;
        for (int64_t n = 0; n < size; ++n)
            for (int64_t d = 0; d < width; ++d) s.copy[n * width + d] = from[n * position + d * channel];
        position = width;
        return s.copy;
    }

    // Keys as [channel / GROUP][key][GROUP]; those behind the last are zeros.
    void pack_keys(Scratch& s, const KV* from, int64_t size) const {
        constexpr int64_t SPAN = W * F::GROUP;
        int64_t position = k.position;
        from = rows_of(s, from, k.channel, position, size, D);
        for (int64_t n = 0; n < work::round_up(size, 2 * W); n += W) {
            for (int64_t d = 0; d < D; d += SPAN) {
                typename F::Lanes lanes[W];
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i) {
                    const KV* at = from + (n + i) * position + d;
                    if (n + i >= size) lanes[i] = typename F::Lanes{};
                    else lanes[i] = d + SPAN <= D ? F::row(at) : F::row_part(at, D - d);
                }
                micro::transpose(lanes);
                Packed* to = s.keys + (d / F::GROUP * KEYS + n) * F::GROUP;
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; ++i)
                    if (d + i * F::GROUP < D) store(to + i * KEYS * F::GROUP, lanes[i]);
            }
        }
    }

    // Values as [key / GROUP][channel][GROUP].
    void pack_values(Scratch& s, const KV* from, int64_t size) const {
        int64_t position = v.position;
        from = rows_of(s, from, v.channel, position, size, DV);
        micro::pack_columns<F, V_SIZE>(s.values, from, position, DV, size);
    }

    // ---- results ----

    // Divide by the sum of the weights; rows that saw nothing are zeros.
    template <typename Sink>
    void finish(Scratch& s, int64_t b, int64_t kv, int64_t first, int64_t count, const Sink& sink) const {
        for (int64_t r = 0; r < count; ++r) {
            const int64_t i = (first + r) / GROUP, h = kv * GROUP + (first + r) % GROUP;
            Row& row = s.rows[r];
            float* const total = s.totals + r * V_SIZE;
            if constexpr (!is_plain<Sink>) {
                raise(row, sink(h), total, V_SIZE);
                if (sink(h) > -op::inff) row.sum += exp_negative(sink(h) - row.highest);
            }
            const float factor = row.sum == 0 ? 0.0f : 1 / row.sum;
            Out* const to = out.at(b, h, i);
            for (int64_t c = 0; c < DV; ++c) to[c * out.channel] = total[c] * factor;
        }
    }

    void keep(const Scratch& s, Part* parts, int64_t count) const {
        for (int64_t r = 0; r < count; ++r) {
            parts[r].row = s.rows[r];
            for (int64_t c = 0; c < V_SIZE; ++c) parts[r].total[c] = s.totals[r * V_SIZE + c];
        }
    }

    // The parts of a problem, `height` rows each, put together.
    void combine(Scratch& s, const Part* parts, int64_t splits, int64_t height) const {
        for (int64_t r = 0; r < height; ++r) {
            Row& row = s.rows[r] = {-op::inff, 0, 0, 0};
            float* const total = s.totals + r * V_SIZE;
            for (int64_t c = 0; c < V_SIZE; ++c) total[c] = 0;
            for (int64_t n = 0; n < splits; ++n) {
                const Part& part = parts[n * height + r];
                if (part.row.highest == -op::inff) continue;
                raise(row, part.row.highest, total, V_SIZE);
                const float factor = exp_negative(part.row.highest - row.highest);
                row.sum += part.row.sum * factor;
                for (int64_t c = 0; c < V_SIZE; ++c) total[c] += part.total[c] * factor;
            }
        }
    }
};

}  // namespace attend
