// Where keys and values lie in their blocks, and which of them a query sees.
#pragma once

#include <algorithm>
#include <limits>

#include "lanes.h"
#include "step.h"

namespace headrace {

constexpr int64_t kKeys = 64;  // keys of a tile
constexpr float kHidden = -std::numeric_limits<float>::infinity();

inline int64_t entry_stride(const Attend& layer) { return static_cast<int64_t>(layer.kv_heads) * layer.head_dim; }

// First element of a layer's keys (kind 0) or values (1) of one block.
inline uint16_t* block_of(const Step& step, const Attend& layer, int64_t block, int kind) {
    const int64_t kind_size = step.block_tokens * entry_stride(layer);
    return step.arena + ((block * step.num_layers + layer.layer) * 2 + kind) * kind_size;
}

// One entry of a sequence, for one KV head.
struct Entry {
    const uint16_t* key;
    const uint16_t* value;
    int32_t position;
};

inline Entry find_entry(const Attend& layer, const Step& step, int64_t sequence, int64_t kv_head, int64_t entry) {
    const int64_t block = step.block_tables[sequence * step.table_width + entry / step.block_tokens];
    const int64_t slot = entry % step.block_tokens, offset = slot * entry_stride(layer) + kv_head * layer.head_dim;
    return {block_of(step, layer, block, 0) + offset, block_of(step, layer, block, 1) + offset,
            step.slot_positions == nullptr ? static_cast<int32_t>(entry)
                                           : step.slot_positions[block * step.block_tokens + slot]};
}

inline bool is_hidden(const Attend& layer, int64_t query, int64_t key) {
    return key > query || (layer.window > 0 && query - key >= layer.window);
}

// Whether every query of a tile sees every one of these keys; positions are indices.
inline bool is_seen_by_all(const Attend& layer, int64_t first, int64_t last, int64_t begin, int64_t end) {
    return end - 1 <= first && (layer.window == 0 || last - begin < layer.window);
}

// The first entry, in whole tiles, that a query of a position and all later ones may see; positions are indices.
inline int64_t first_seen(const Attend& layer, int64_t position) {
    return layer.window > 0 && position >= layer.window ? (position - layer.window + 1) / kKeys * kKeys : 0;
}

// Turns products of a query with `count` keys into scores: capped, and hidden where the query must not look.
inline void cap_and_hide(const Attend& layer, int64_t query, const int32_t* positions, int64_t count, bool is_masked,
                         float* scores) {
    if (layer.soft_cap > 0) {
        const F8 most = all(layer.soft_cap);
        for (int64_t i = 0; i < kKeys; i += kLanes)
            store(scores + i, _mm256_mul_ps(tanh(_mm256_div_ps(load(scores + i), most)), most));
    }
    if (is_masked)
        for (int64_t i = 0; i < count; ++i)
            if (is_hidden(layer, query, positions[i])) scores[i] = kHidden;
    std::fill(scores + count, scores + kKeys, kHidden);
}

}  // namespace headrace
