// Products of queries with keys and of weights with values are sums of int16 products in int32: exact, and half
// again as fast as fp32. What is rounded, and how finely, depends on one vector alone, so that the result of a query
// does not depend on what else is computed with it, nor on keys and finite values that it does not see:
//   query, key   by its length: a dot product of two stays within int32 whatever their direction (Cauchy-Schwarz),
//                and a code of a query is about 2^-16 of the length
//   value        by its largest element, to 13 to 14 bits
//   weights      of a query for the keys of a tile, times the scales of their values: by their sum and the greatest
//                of them, to 13 to 16 bits
// Keys and values are bf16: with scales that are powers of two nearly all of their elements keep all their digits.
// The running softmax is that of FlashAttention-2 (arXiv:2307.08691, section 3.1).
#include "prompt.h"

#include <algorithm>
#include <cmath>

#include "keys.h"
#include "lanes.h"
#include "tile.h"

namespace headrace {
namespace {

constexpr int64_t kQueries = 32;  // tokens that share a tile of keys
constexpr int64_t kRows = 24;     // queries at work together: what they need stays in the nearest cache
constexpr int64_t kMostSpread = 64 << 20;  // bytes of keys and values spread at a time, unless one head takes more

constexpr float kMostCode = 32767.0f;
// Their product is below 2^31, with room for the rounding of 256 elements.
constexpr float kMostKeyLength = 40000.0f, kMostQueryLength = 53600.0f;
constexpr float kMostValue = 8191.0f;
constexpr float kMostWeights = 262100.0f;  // sum; (kMostWeights + kKeys / 2) * kMostValue < 2^31

// Keys and values of a tile in the order of the products; what it lacks is zero.
struct KeyTile {
    int16_t* keys;        // [dim / 2][kKeys][2]
    int16_t* values;      // [kKeys / 2][dim][2]
    float* key_scales;    // [kKeys]
    float* value_scales;  // [kKeys]
    int32_t* positions;   // [kKeys]
};

int64_t key_tile_bytes(int64_t dim) { return kKeys * (4 * dim + 12); }

KeyTile key_tile_at(uint8_t* memory, int64_t dim) {
    KeyTile tile{};
    tile.keys = reinterpret_cast<int16_t*>(memory);
    tile.values = tile.keys + kKeys * dim;
    tile.key_scales = reinterpret_cast<float*>(tile.values + kKeys * dim);
    tile.value_scales = tile.key_scales + kKeys;
    tile.positions = reinterpret_cast<int32_t*>(tile.value_scales + kKeys);
    return tile;
}

F8 magnitude(F8 x) { return _mm256_andnot_ps(all(-0.0f), x); }

// The int16 of 16 int32, in order.
I8 narrow(I8 low, I8 high) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8); }

// The greatest powers of two up to x, for normal numbers above 0; NaN stays NaN.
F8 power_below(F8 x) {
    const F8 power = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
    return _mm256_or_ps(power, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

I8 codes_of(F8 x, F8 factor) { return _mm256_cvtps_epi32(_mm256_mul_ps(x, factor)); }

// Rounds eight vectors by their lengths to codes[8][dim]; `element(i, d)` gives eight elements of vector i. Returns the
// scales of the codes.
template <bool are_keys, typename F>
F8 round_by_length(int64_t dim, const F& element, int16_t* codes) {
    F8 squares[8], most[8];
    for (int i = 0; i < 8; ++i) {
        squares[i] = most[i] = zero();
        for (int64_t d = 0; d < dim; d += kLanes) {
            const F8 x = element(i, d);
            squares[i] = fma(x, x, squares[i]);
            most[i] = _mm256_max_ps(most[i], magnitude(x));
        }
    }
    const F8 length = _mm256_sqrt_ps(sums_of(squares));
    const F8 finest = _mm256_min_ps(_mm256_div_ps(all(kMostCode), greatest_of(most)),
                                    _mm256_div_ps(all(are_keys ? kMostKeyLength : kMostQueryLength), length));
    const F8 factor = are_keys ? power_below(finest) : finest;
    // Shorter than the root of the smallest number it is zero for every purpose.
    const F8 is_some = _mm256_cmp_ps(length, zero(), _CMP_NEQ_UQ);
    float factors[8];
    store(factors, _mm256_and_ps(factor, is_some));
    for (int i = 0; i < 8; ++i) {
        const F8 scale = all(factors[i]);
        for (int64_t d = 0; d < dim; d += 2 * kLanes) {
            const I8 low = codes_of(element(i, d), scale), high = codes_of(element(i, d + kLanes), scale);
            _mm256_storeu_si256(reinterpret_cast<I8*>(codes + i * dim + d), narrow(low, high));
        }
    }
    return _mm256_and_ps(_mm256_div_ps(all(1.0f), factor), is_some);
}

// out[j][i] = in[i][j] of eight vectors of int32.
void transpose8(const I8 (&in)[8], I8* out, int64_t stride) {
    I8 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256(out + i * stride, _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
        _mm256_storeu_si256(out + (i + 4) * stride, _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
    }
}

void spread_keys(const Entry* entries, int64_t count, int64_t dim, ThreadRoom& room, const KeyTile& out) {
    int16_t* codes = room.codes.at_least(8 * dim);
    for (int64_t begin = 0; begin < kKeys; begin += 8) {
        const auto element = [&](int64_t i, int64_t d) {
            return begin + i < count ? load_bf16(entries[begin + i].key + d) : zero();
        };
        store(out.key_scales + begin, round_by_length<true>(dim, element, codes));
        for (int64_t d = 0; d < dim; d += 16) {
            I8 rows[8];
            for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_si256(reinterpret_cast<const I8*>(codes + i * dim + d));
            transpose8(rows, reinterpret_cast<I8*>(out.keys + d * kKeys + 2 * begin), kKeys / kLanes);
        }
    }
}

void spread_values(const Entry* entries, int64_t count, int64_t dim, const KeyTile& out) {
    const auto element = [&](int64_t i, int64_t d) { return i < count ? load_bf16(entries[i].value + d) : zero(); };
    for (int64_t begin = 0; begin < kKeys; begin += 8) {
        F8 most[8], poison[8];  // the latter is 0, or NaN if any element is NaN or infinite
        for (int i = 0; i < 8; ++i) {
            most[i] = poison[i] = zero();
            for (int64_t d = 0; d < dim; d += kLanes) {
                const F8 x = element(begin + i, d);
                most[i] = _mm256_max_ps(most[i], magnitude(x));
                poison[i] = _mm256_add_ps(poison[i], _mm256_sub_ps(x, x));
            }
        }
        // Less than twice that power of two is the largest element, and less than kMostValue + 1 its code.
        const F8 scale = fma(power_below(greatest_of(most)), all(2.0f / (kMostValue + 1)), sums_of(poison));
        // Below the normal numbers 1 / scale is infinite; such a value is zero for every purpose.
        const F8 is_some = _mm256_cmp_ps(scale, all(1.2e-38f), _CMP_NLT_UQ);
        store(out.value_scales + begin, _mm256_and_ps(scale, is_some));
        float factors[8];
        store(factors, _mm256_and_ps(_mm256_div_ps(all(1.0f), scale), is_some));
        for (int64_t i = 0; i < 8; i += 2) {
            auto* target = reinterpret_cast<I8*>(out.values + (begin + i) * dim);
            for (int64_t d = 0; d < dim; d += kLanes) {
                const I8 low = codes_of(element(begin + i, d), all(factors[i]));
                const I8 high = codes_of(element(begin + i + 1, d), all(factors[i + 1]));
                _mm256_storeu_si256(target++, _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa));
            }
        }
    }
}

void spread(const Attend& layer, const Step& step, const Prompt& prompt, int64_t kv_head, int64_t begin,
            ThreadRoom& room, const KeyTile& out) {
    const int64_t count = std::min(kKeys, prompt.num_entries - begin);
    Entry entries[kKeys];
    for (int64_t i = 0; i < count; ++i) {
        entries[i] = find_entry(layer, step, prompt.sequence, kv_head, begin + i);
        out.positions[i] = entries[i].position;
    }
    spread_keys(entries, count, layer.head_dim, room, out);
    spread_values(entries, count, layer.head_dim, out);
}

// Products of R rows with 16 columns: use(r, h, sums) gets the sum over pairs of a[r][pair] and b[pair][column], for
// columns 8 h and following.
template <int R, typename F>
void multiply(const int16_t* a, int64_t a_stride, const int16_t* b, int64_t columns, int64_t pairs, const F& use) {
    I8 acc[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const auto* at = reinterpret_cast<const I8*>(b + 2 * columns * pair);
        const I8 w[2] = {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const I8 x = broadcast4(a + r * a_stride + 2 * pair);
            add_products(acc[r], x, w);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        use(r, 0, acc[r][0]);
        use(r, 1, acc[r][1]);
    }
}

// Memory of a tile of queries, in whole eights of rows, and of the rows at work.
struct Work {
    int16_t* queries;      // [rows][dim]
    float* query_scales;   // [rows]
    float* sums;           // [rows][dim]
    float* most;           // [rows]
    float* total;          // [rows]
    float* scores;         // [kRows][kKeys]
    int16_t* weights;      // [kRows][kKeys]
    float* weight_scales;  // [kRows]
    float* decays;         // [kRows]: what earlier sums shrink by
};

Work work_for(ThreadRoom& room, int64_t rows, int64_t dim) {
    Work work{};
    work.queries = room.codes.at_least(rows * dim + kRows * kKeys);
    work.weights = work.queries + rows * dim;
    const int64_t size = rows * (dim + 3) + kRows * (kKeys + 2);
    float* at = room.attend.at_least(size);
    std::fill(at, at + size, 0.0f);
    work.sums = at;
    work.query_scales = work.sums + rows * dim;
    work.most = work.query_scales + rows;
    work.total = work.most + rows;
    work.scores = work.total + rows;
    work.weight_scales = work.scores + kRows * kKeys;
    work.decays = work.weight_scales + kRows;
    std::fill(work.most, work.most + rows, kHidden);
    return work;
}

// Scores of R rows with a tile of keys. Not inlined: amid more code the compiler keeps the sums in memory, which takes
// three times as long.
template <int R>
[[gnu::noinline]] void score(const Work& work, int64_t row, int64_t slot, int64_t dim, const KeyTile& tile) {
    const int16_t* queries = work.queries + row * dim;
    for (int64_t key = 0; key < kKeys; key += kPanel)
        multiply<R>(queries, dim, tile.keys + 2 * key, kKeys, dim / 2, [&](int r, int h, I8 products) {
            const int64_t at = key + h * kLanes;
            const F8 scale = _mm256_mul_ps(load(tile.key_scales + at), all(work.query_scales[row + r]));
            store(work.scores + (slot + r) * kKeys + at, _mm256_mul_ps(_mm256_cvtepi32_ps(products), scale));
        });
}

// Adds the weighted values of a tile to the sums of R rows; not inlined either.
template <int R>
[[gnu::noinline]] void weigh(const Work& work, int64_t row, int64_t slot, int64_t dim, const KeyTile& tile) {
    const int16_t* weights = work.weights + slot * kKeys;
    for (int64_t d = 0; d < dim; d += kPanel)
        multiply<R>(weights, kKeys, tile.values + 2 * d, dim, kKeys / 2, [&](int r, int h, I8 products) {
            const F8 scale = all(work.weight_scales[slot + r]), decay = all(work.decays[slot + r]);
            float* sums = work.sums + (row + r) * dim + d + h * kLanes;
            store(sums, fma(_mm256_cvtepi32_ps(products), scale, _mm256_mul_ps(load(sums), decay)));
        });
}

// 2^x for x from -126 to 0, and 0 below; within 2.6e-6, finer than any code.
F8 power_of_two(F8 x) {
    const F8 is_some = _mm256_cmp_ps(x, all(-126.0f), _CMP_NLT_UQ);  // NaN stays NaN
    const F8 rounder = all(12583039.0f), rounded = _mm256_add_ps(x, rounder);  // last bits: round(x) + 127
    const F8 r = _mm256_sub_ps(x, _mm256_sub_ps(rounded, rounder));
    F8 p = fma(all(9.570102207362652e-3f), r, all(5.591786280274391e-2f));
    p = fma(p, r, all(2.40247443318367e-1f));
    p = fma(p, r, all(6.931217908859253e-1f));
    p = fma(p, r, all(9.999992847442627e-1f));
    const F8 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(rounded), 23));
    return _mm256_and_ps(_mm256_mul_ps(p, power), is_some);
}

// Turns the scores of eight rows into codes of their weights and moves their running softmax on.
void weights_of_rows(const Work& work, int64_t row, int64_t slot, const KeyTile& tile) {
    constexpr float kLog2E = 1.44269504f;
    float* scores = work.scores + slot * kKeys;
    F8 most[8], total[8], scaled_total[8], scaled_most[8];
    for (int r = 0; r < 8; ++r) {
        most[r] = load(scores + r * kKeys);
        for (int64_t i = kLanes; i < kKeys; i += kLanes) most[r] = _mm256_max_ps(most[r], load(scores + r * kKeys + i));
    }
    const F8 before = load(work.most + row), now = _mm256_max_ps(before, greatest_of(most));
    float greatest_scores[8];  // 0 without a key that is seen: all weights are then 0
    store(greatest_scores, _mm256_and_ps(now, _mm256_cmp_ps(now, all(kHidden), _CMP_NEQ_UQ)));
    for (int r = 0; r < 8; ++r) {
        total[r] = scaled_total[r] = scaled_most[r] = zero();
        for (int64_t i = 0; i < kKeys; i += kLanes) {
            const F8 below = _mm256_sub_ps(load(scores + r * kKeys + i), all(greatest_scores[r]));
            const F8 weight = power_of_two(_mm256_mul_ps(below, all(kLog2E)));
            const F8 scaled = _mm256_mul_ps(weight, load(tile.value_scales + i));
            total[r] = _mm256_add_ps(total[r], weight);
            scaled_total[r] = _mm256_add_ps(scaled_total[r], scaled);
            scaled_most[r] = _mm256_max_ps(scaled_most[r], scaled);
            store(scores + r * kKeys + i, scaled);
        }
    }
    const F8 decay = power_of_two(_mm256_mul_ps(_mm256_sub_ps(before, now), all(kLog2E)));
    const F8 decays = _mm256_blendv_ps(decay, all(1.0f), _mm256_cmp_ps(before, now, _CMP_EQ_OQ));
    store(work.decays + slot, decays);
    store(work.total + row, fma(load(work.total + row), decays, sums_of(total)));
    store(work.most + row, now);
    const F8 sums = sums_of(scaled_total);
    const F8 is_some = _mm256_cmp_ps(sums, all(1e-30f), _CMP_NLT_UQ);  // else its inverse might be infinite
    const F8 factor = _mm256_min_ps(_mm256_div_ps(all(kMostCode), greatest_of(scaled_most)),
                                    _mm256_div_ps(all(kMostWeights), sums));
    store(work.weight_scales + slot, _mm256_and_ps(_mm256_div_ps(all(1.0f), factor), is_some));
    float factors[8];
    store(factors, _mm256_and_ps(factor, is_some));
    auto* codes = reinterpret_cast<I8*>(work.weights + slot * kKeys);
    for (int64_t i = 0; i < 8 * kKeys; i += 2 * kLanes) {
        const F8 scale = all(factors[i / kKeys]);
        const I8 low = codes_of(load(scores + i), scale), high = codes_of(load(scores + i + kLanes), scale);
        _mm256_storeu_si256(codes++, narrow(low, high));
    }
}

// What one thread does for one tile of queries and one KV head.
class QueryTile {
public:
    QueryTile(const Attend& layer, const Step& step, const PromptTile& tile, int64_t kv_head, ThreadRoom& room)
        : layer_(layer), step_(step), tile_(tile), kv_head_(kv_head), dim_(layer.head_dim),
          group_(layer.heads / layer.kv_heads), rows_(tile.num_rows * group_),
          work_(work_for(room, (rows_ + 7) / 8 * 8, dim_)) {
        const int64_t width = layer.heads + 2 * layer.kv_heads;
        for (int64_t row = 0; row < rows_; row += 8) {
            const float* queries[8];
            for (int64_t i = 0; i < 8; ++i) {
                const int64_t some = std::min(row + i, rows_ - 1);
                queries[i] = step.buffers[layer.source] + (token(some) * width + head(some)) * dim_;
            }
            const F8 scales = round_by_length<false>(
                dim_, [&](int64_t i, int64_t d) { return load(queries[i] + d); }, work_.queries + row * dim_);
            store(work_.query_scales + row, _mm256_mul_ps(scales, all(layer.scale)));
        }
    }

    // Adds `count` keys to the running softmax of all rows.
    void add(const KeyTile& keys, int64_t count, bool is_masked) const {
        for (int64_t row = 0; row < rows_; row += kRows) {
            const int64_t size = std::min(kRows, rows_ - row);
            in_groups(size, [&]<int R>(int64_t slot) { score<R>(work_, row + slot, slot, dim_, keys); });
            if (is_masked || count < kKeys || layer_.soft_cap > 0)
                for (int64_t slot = 0; slot < size; ++slot)
                    cap_and_hide(layer_, step_.positions[token(row + slot)], keys.positions, count, is_masked,
                                 work_.scores + slot * kKeys);
            for (int64_t slot = 0; slot < size; slot += 8) weights_of_rows(work_, row + slot, slot, keys);
            in_groups(size, [&]<int R>(int64_t slot) { weigh<R>(work_, row + slot, slot, dim_, keys); });
        }
    }

    void write() const {
        for (int64_t row = 0; row < rows_; ++row) {
            const float* sums = work_.sums + row * dim_;
            float* out = step_.buffers[layer_.target] + (token(row) * layer_.heads + head(row)) * dim_;
            const F8 factor = all(work_.total[row] > 0 ? 1.0f / work_.total[row] : 0.0f);
            for (int64_t d = 0; d < dim_; d += kLanes) store(out + d, _mm256_mul_ps(load(sums + d), factor));
        }
    }

private:
    int64_t token(int64_t row) const { return tile_.first_row + row / group_; }
    int64_t head(int64_t row) const { return kv_head_ * group_ + row % group_; }

    const Attend& layer_;
    const Step& step_;
    const PromptTile& tile_;
    const int64_t kv_head_, dim_, group_, rows_;
    const Work work_;
};

void attend(const Attend& layer, const Step& step, const Scratch& scratch, const PromptTile& tile, int64_t kv_head,
            uint8_t* spread_head, ThreadRoom& room) {
    const Prompt& prompt = scratch.prompts[static_cast<size_t>(tile.prompt)];
    const bool is_ordered = step.slot_positions == nullptr;
    const int64_t first = step.positions[tile.first_row], last = step.positions[tile.first_row + tile.num_rows - 1];
    const int64_t end = is_ordered ? std::min(prompt.num_entries, last + 1) : prompt.num_entries;
    const QueryTile queries(layer, step, tile, kv_head, room);
    for (int64_t begin = is_ordered ? first_seen(layer, first) : 0; begin < end; begin += kKeys) {
        const int64_t count = std::min(kKeys, end - begin), bytes = key_tile_bytes(layer.head_dim);
        const KeyTile keys = key_tile_at(spread_head + (prompt.first_tile + begin / kKeys) * bytes, layer.head_dim);
        queries.add(keys, count, !is_ordered || !is_seen_by_all(layer, first, last, begin, begin + count));
    }
    queries.write();
}

}  // namespace

void plan_prompt(const Step& step, int64_t sequence, Scratch& scratch) {
    const int64_t begin = step.cu_seqlens[sequence], end = step.cu_seqlens[sequence + 1];
    const int64_t entries = step.kv_lengths[sequence], prompt = static_cast<int64_t>(scratch.prompts.size());
    scratch.prompts.push_back({sequence, begin, entries, static_cast<int64_t>(scratch.key_tiles.size())});
    for (int64_t entry = 0; entry < entries; entry += kKeys) scratch.key_tiles.push_back({prompt, entry});
    // Backwards: the last queries see most keys, and the longest work should begin first.
    for (int64_t row = begin + (end - begin - 1) / kQueries * kQueries; row >= begin; row -= kQueries)
        scratch.prompt_tiles.push_back({prompt, row, std::min(kQueries, end - row)});
}

void attend_prompts(const Attend& layer, const Step& step, Scratch& scratch, Worker& worker) {
    const int64_t key_tiles = static_cast<int64_t>(scratch.key_tiles.size());
    const int64_t tiles = static_cast<int64_t>(scratch.prompt_tiles.size());
    if (tiles == 0) return;
    const int64_t bytes = key_tile_bytes(layer.head_dim), head_bytes = key_tiles * bytes;
    const int64_t together = std::clamp<int64_t>(kMostSpread / head_bytes, 1, layer.kv_heads);
    if (worker.index == 0) scratch.spread.at_least(together * head_bytes);
    worker.barrier();
    uint8_t* memory = scratch.spread.get();
    ThreadRoom& room = scratch.thread[static_cast<size_t>(worker.index)];
    for (int64_t head = 0; head < layer.kv_heads; head += together) {
        const int64_t heads = std::min(together, layer.kv_heads - head);
        for (int64_t item; (item = worker.claim(1)) < heads * key_tiles;) {
            const int64_t index = item % key_tiles, own = item / key_tiles;
            const KeyRun& run = scratch.key_tiles[static_cast<size_t>(index)];
            const Prompt& prompt = scratch.prompts[static_cast<size_t>(run.prompt)];
            const int64_t first = step.positions[prompt.first_row];
            if (step.slot_positions == nullptr && run.entry < first_seen(layer, first)) continue;
            spread(layer, step, prompt, head + own, run.entry, room,
                   key_tile_at(memory + own * head_bytes + index * bytes, layer.head_dim));
        }
        worker.barrier();
        for (int64_t item; (item = worker.claim(1)) < heads * tiles;)
            attend(layer, step, scratch, scratch.prompt_tiles[static_cast<size_t>(item / heads)], head + item % heads,
                   memory + item % heads * head_bytes, room);
        worker.barrier();
    }
}

}  // namespace headrace
