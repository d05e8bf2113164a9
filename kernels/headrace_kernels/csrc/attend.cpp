// Attention of a step. Few queries read their keys in fp32 as they lie, with the running softmax of FlashAttention-2
// (arXiv:2307.08691, section 3.1), cut along the keys as in Flash-Decoding where few sequences have many entries;
// many queries go to prompt.cpp.
#include "attend.h"

#include <algorithm>

#include "keys.h"
#include "lanes.h"
#include "linear.h"
#include "prompt.h"
#include "tile.h"

namespace headrace {
namespace {

constexpr int64_t kFewRows = 16;     // queries of one KV head that read its keys as they lie
constexpr int64_t kSplitKeys = 64;   // fewest entries of a cut along the keys

void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const F8 a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
        store(head + half + i, fma(b, c, _mm256_mul_ps(a, s)));
    }
}

// Turns queries and keys of one row and writes its keys and values.
void write_row(const Attend& layer, const Step& step, const Scratch& scratch, int64_t row) {
    const int64_t dim = layer.head_dim, half = dim / 2;
    const float* cos = scratch.rotation.get() + (layer.rope * step.num_rows + row) * dim;
    float* qkv = step.buffers[layer.source] + row * (layer.heads + 2 * layer.kv_heads) * dim;
    for (int64_t head = 0; head < layer.heads + layer.kv_heads; ++head) {
        const float* norm = head < layer.heads ? layer.q_norm : layer.k_norm;
        if (norm != nullptr) normalise(qkv + head * dim, norm, layer.norm_eps, dim, qkv + head * dim);
        rotate(qkv + head * dim, cos, cos + half, half);
    }
    for (int kind = 0; kind < 2; ++kind) {
        const float* from = qkv + (layer.heads + kind * layer.kv_heads) * dim;
        uint16_t* block = block_of(step, layer, step.write_blocks[row], kind);
        uint16_t* to = block + step.write_slots[row] * entry_stride(layer);
        for (int64_t i = 0; i < entry_stride(layer); ++i) to[i] = to_bf16(from[i]);
    }
}

// Memory of one thread for a tile.
struct Work {
    float* queries;   // [rows][dim], scaled
    float* scores;    // [rows][kKeys]
    float* sums;      // [rows][dim]
    float* most;      // [rows]
    float* total;     // [rows]

    // The part of one of several KV heads with `rows` queries each.
    Work of_head(int64_t index, int64_t rows, int64_t dim) const {
        Work part = *this;
        part.queries += index * rows * dim;
        part.sums += index * rows * dim;
        part.most += index * rows;
        part.total += index * rows;
        return part;
    }
};

Work work_for(Room<float>& room, int64_t rows, int64_t dim) {
    const int64_t padded = (rows + 7) / 8 * 8;
    float* at = room.at_least(padded * (2 * dim + kKeys + 2));
    Work work{};
    work.queries = at;
    work.scores = work.queries + padded * dim;
    work.sums = work.scores + padded * kKeys;
    work.most = work.sums + padded * dim;
    work.total = work.most + padded;
    return work;
}

// Where the entries of one tile lie.
struct Keys {
    int64_t count;
    const uint16_t* keys[kKeys];
    const uint16_t* values[kKeys];
    int32_t positions[kKeys];

    // Turns to the next KV head.
    void next_head(int64_t dim) {
        for (int64_t i = 0; i < count; ++i) {
            keys[i] += dim;
            values[i] += dim;
        }
    }
};

// Finds `count` entries from `begin` on, of the first KV head, and asks for the memory of all.
void find_keys(const Attend& layer, const Step& step, int64_t sequence, int64_t begin, int64_t count, Keys& found) {
    found.count = count;
    for (int64_t i = 0; i < count; ++i) {
        const Entry entry = find_entry(layer, step, sequence, 0, begin + i);
        for (int64_t d = 0; d < entry_stride(layer); d += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(entry.key + d), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(entry.value + d), _MM_HINT_T0);
        }
        found.keys[i] = entry.key;
        found.values[i] = entry.value;
        found.positions[i] = entry.position;
    }
}

// Sixteen bf16 as their even and odd elements in fp32: a shift and a mask.
void load_halves(const uint16_t* p, F8& even, F8& odd) {
    const I8 x = _mm256_loadu_si256(reinterpret_cast<const I8*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Scores of R queries, whose elements lie as `load_halves` gives them.
template <int R>
void score_few(const Keys& found, const float* queries, int64_t dim, float* scores) {
    for (int64_t begin = 0; begin < found.count; begin += 8) {
        F8 parts[R][8];
        for (int64_t i = 0; i < 8; ++i) {
            const uint16_t* key = found.keys[std::min(begin + i, found.count - 1)];
            F8 even_sum[R], odd_sum[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) even_sum[r] = odd_sum[r] = zero();
            for (int64_t d = 0; d < dim; d += 16) {
                F8 even, odd;
                load_halves(key + d, even, odd);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    even_sum[r] = fma(even, load(queries + r * dim + d), even_sum[r]);
                    odd_sum[r] = fma(odd, load(queries + r * dim + d + kLanes), odd_sum[r]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) parts[r][i] = _mm256_add_ps(even_sum[r], odd_sum[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(scores + r * kKeys + begin, sums_of(parts[r]));
    }
}

// Adds weighted values to R sums, in the order of `load_halves`.
template <int R>
void weigh_few(const Keys& found, const float* weights, int64_t dim, float* sums) {
    for (int64_t d = 0; d < dim; d += 16) {
        F8 acc[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            acc[r][0] = load(sums + r * dim + d);
            acc[r][1] = load(sums + r * dim + d + kLanes);
        }
        for (int64_t i = 0; i < found.count; ++i) {
            F8 even, odd;
            load_halves(found.values[i] + d, even, odd);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const F8 weight = _mm256_broadcast_ss(weights + r * kKeys + i);
                acc[r][0] = fma(even, weight, acc[r][0]);
                acc[r][1] = fma(odd, weight, acc[r][1]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            store(sums + r * dim + d, acc[r][0]);
            store(sums + r * dim + d + kLanes, acc[r][1]);
        }
    }
}

// From [even 8][odd 8] per 16 elements to their order, or back.
void interleave(float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) {
        const F8 low = _mm256_unpacklo_ps(load(x + d), load(x + d + kLanes));
        const F8 high = _mm256_unpackhi_ps(load(x + d), load(x + d + kLanes));
        store(x + d, _mm256_permute2f128_ps(low, high, 0x20));
        store(x + d + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
    }
}

void deinterleave(float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) {
        const F8 a = load(x + d), b = load(x + d + kLanes);
        const F8 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);
        store(x + d, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8)));
        store(x + d + kLanes, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8)));
    }
}

// Adds one tile of keys to the running softmax.
void add_keys(const Attend& layer, const Step& step, const Tile& tile, const Keys& found, bool is_masked,
              const Work& work) {
    const int64_t dim = layer.head_dim, group = layer.heads / layer.kv_heads, rows = tile.num_rows * group;
    in_groups(rows, [&]<int R>(int64_t row) {
        score_few<R>(found, work.queries + row * dim, dim, work.scores + row * kKeys);
    });
    for (int64_t row = 0; row < rows; ++row) {
        float* scores = work.scores + row * kKeys;
        const int64_t query = step.positions[tile.first_row + row / group];
        cap_and_hide(layer, query, found.positions, found.count, is_masked, scores);
        F8 most = load(scores);
        for (int64_t i = kLanes; i < kKeys; i += kLanes) most = _mm256_max_ps(most, load(scores + i));
        const float before = work.most[row], now = std::max(before, greatest(most));
        if (now == kHidden) {
            std::fill(scores, scores + kKeys, 0.0f);
            continue;
        }
        F8 total = zero();
        for (int64_t i = 0; i < kKeys; i += kLanes) {
            const F8 weight = exp(_mm256_sub_ps(load(scores + i), all(now)));
            store(scores + i, weight);
            total = _mm256_add_ps(total, weight);
        }
        const float factor = before == kHidden ? 0.0f : std::exp(before - now);
        work.total[row] = work.total[row] * factor + sum(total);
        work.most[row] = now;
        if (factor != 1.0f)
            for (int64_t d = 0; d < dim; d += kLanes)
                store(work.sums + row * dim + d, _mm256_mul_ps(load(work.sums + row * dim + d), all(factor)));
    }
    in_groups(rows, [&]<int R>(int64_t row) {
        weigh_few<R>(found, work.scores + row * kKeys, dim, work.sums + row * dim);
    });
}

// Attends for the queries of one tile, in all heads.
void attend(const Attend& layer, const Step& step, const Tile& tile, Scratch& scratch, ThreadRoom& room) {
    const int64_t dim = layer.head_dim, group = layer.heads / layer.kv_heads, rows = tile.num_rows * group;
    const int64_t width = layer.heads + 2 * layer.kv_heads, all_rows = rows * layer.kv_heads;
    const Work all_work = work_for(room.attend, all_rows, dim);
    const auto head_of = [&](int64_t row) { return row / rows * group + row % group; };
    const auto token_of = [&](int64_t row) { return tile.first_row + row % rows / group; };
    for (int64_t row = 0; row < all_rows; ++row) {
        const float* q = step.buffers[layer.source] + (token_of(row) * width + head_of(row)) * dim;
        for (int64_t d = 0; d < dim; d += kLanes)
            store(all_work.queries + row * dim + d, _mm256_mul_ps(load(q + d), all(layer.scale)));
        deinterleave(all_work.queries + row * dim, dim);
    }
    std::fill(all_work.sums, all_work.sums + all_rows * dim, 0.0f);
    std::fill(all_work.most, all_work.most + all_rows, kHidden);
    std::fill(all_work.total, all_work.total + all_rows, 0.0f);
    const bool is_ordered = step.slot_positions == nullptr;
    const int64_t first = step.positions[tile.first_row], last = step.positions[tile.first_row + tile.num_rows - 1];
    const int64_t end = is_ordered ? std::min(tile.kv_end, last + 1) : tile.kv_end;
    int64_t begin = is_ordered ? std::max(tile.kv_begin, first_seen(layer, first)) : tile.kv_begin;
    Keys found[2];  // the next run of keys travels from memory while this one is computed
    if (begin < end) find_keys(layer, step, tile.sequence, begin, std::min(kKeys, end - begin), found[0]);
    for (int turn = 0; begin < end; begin += kKeys, turn ^= 1) {
        const int64_t next = begin + kKeys;
        if (next < end)
            find_keys(layer, step, tile.sequence, next, std::min(kKeys, end - next), found[turn ^ 1]);
        const int64_t count = found[turn].count;
        const bool is_masked = !is_ordered || !is_seen_by_all(layer, first, last, begin, begin + count);
        for (int64_t i = 0; i < layer.kv_heads; ++i) {
            add_keys(layer, step, tile, found[turn], is_masked, all_work.of_head(i, rows, dim));
            found[turn].next_head(dim);
        }
    }
    for (int64_t row = 0; row < all_rows; ++row) {
        float* sums = all_work.sums + row * dim;
        interleave(sums, dim);
        if (tile.part >= 0) {
            float* out = scratch.partial.get() + (tile.part * layer.heads + head_of(row)) * (dim + 2);
            std::copy(sums, sums + dim, out);
            out[dim] = all_work.most[row];
            out[dim + 1] = all_work.total[row];
            continue;
        }
        float* out = step.buffers[layer.target] + (token_of(row) * layer.heads + head_of(row)) * dim;
        const F8 factor = all(all_work.total[row] > 0 ? 1.0f / all_work.total[row] : 0.0f);
        for (int64_t d = 0; d < dim; d += kLanes) store(out + d, _mm256_mul_ps(load(sums + d), factor));
    }
}

// Joins the parts of a tile of one query for one head.
void merge(const Attend& layer, const Step& step, const Scratch& scratch, const Tile& tile, int64_t head) {
    const int64_t dim = layer.head_dim, stride = layer.heads * (dim + 2);
    const float* parts = scratch.partial.get() + tile.part * stride + head * (dim + 2);
    float most = kHidden, total = 0.0f;
    for (int64_t i = 0; i < tile.parts; ++i) most = std::max(most, parts[i * stride + dim]);
    float* out = step.buffers[layer.target] + (tile.first_row * layer.heads + head) * dim;
    std::fill(out, out + dim, 0.0f);
    if (most == kHidden) return;
    for (int64_t i = 0; i < tile.parts; ++i) {
        const float* part = parts + i * stride;
        const float factor = std::exp(part[dim] - most);
        total += factor * part[dim + 1];
        for (int64_t d = 0; d < dim; ++d) out[d] += factor * part[d];
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= total;
}

}  // namespace

void plan_attend(const Step& step, int threads, int group, Scratch& scratch) {
    const int64_t half = step.rope_size;
    float* rotation = scratch.rotation.at_least(step.num_ropes * step.num_rows * 2 * half);
    for (int64_t rope = 0; rope < step.num_ropes; ++rope) {
        for (int64_t row = 0; row < step.num_rows; ++row, rotation += 2 * half) {
            for (int64_t i = 0; i < half; ++i) {
                const double angle = static_cast<double>(step.positions[row]) * step.frequencies[rope * half + i];
                rotation[i] = static_cast<float>(std::cos(angle));
                rotation[half + i] = static_cast<float>(std::sin(angle));
            }
        }
    }
    scratch.clear();
    const bool is_scarce = threads > 1 && step.num_sequences < 2 * threads;
    for (int64_t s = 0; s < step.num_sequences; ++s) {
        const int64_t begin = step.cu_seqlens[s], count = step.cu_seqlens[s + 1] - begin, entries = step.kv_lengths[s];
        if (count * group > kFewRows) {
            plan_prompt(step, s, scratch);
            continue;
        }
        const int64_t wished = is_scarce && count == 1 ? std::min<int64_t>(entries / kSplitKeys, 2 * threads) : 1;
        const int64_t parts = std::max<int64_t>(wished, 1);
        const int64_t size = ((entries + parts - 1) / parts + kKeys - 1) / kKeys * kKeys;
        const int64_t used = (entries + size - 1) / size;
        for (int64_t i = 0; i < used; ++i)
            scratch.tiles.push_back({s, begin, count, i * size, std::min(entries, (i + 1) * size),
                                     used == 1 ? -1 : scratch.num_parts + i, i == 0 && used > 1 ? used : 0});
        if (used > 1) scratch.num_parts += used;
    }
}

void run_attend(const Attend& layer, const Step& step, Scratch& scratch, Worker& worker) {
    for (int64_t row = worker.index; row < step.num_rows; row += worker.count) write_row(layer, step, scratch, row);
    if (worker.index == 0) scratch.partial.at_least(scratch.num_parts * layer.heads * (layer.head_dim + 2));
    worker.barrier();
    attend_prompts(layer, step, scratch, worker);
    ThreadRoom& room = scratch.thread[static_cast<size_t>(worker.index)];
    const int64_t tiles = static_cast<int64_t>(scratch.tiles.size());
    for (int64_t item; (item = worker.claim(1)) < tiles;)
        attend(layer, step, scratch.tiles[static_cast<size_t>(item)], scratch, room);
    worker.barrier();
    if (scratch.num_parts == 0) return;
    for (const Tile& tile : scratch.tiles)
        if (tile.parts > 0)
            for (int64_t head = worker.index; head < layer.heads; head += worker.count)
                merge(layer, step, scratch, tile, head);
    worker.barrier();
}

}  // namespace headrace
