// What Python hands over: the operations of a model and the batch of a step. Mirrored in native/abi.py.
#pragma once

#include <cstdint>

namespace headrace {

extern "C" {

enum Format : int32_t { kInt4 = 0, kInt8 = 1, kBf16 = 2 };

enum Epilogue : int32_t { kStore = 0, kAdd = 1, kSilu = 2, kGelu = 3 };

enum Kind : int32_t { kEmbedOp = 0, kLinearOp = 1, kAttendOp = 2, kNormAddOp = 3 };

// Rows of all activations are fp32 and lie densely in the buffers of a step.
struct Linear {
    int32_t format;
    int32_t in_size;
    int32_t out_size;    // kSilu, kGelu: gate and up together, in panels of 8 gates and their 8 ups
    int32_t epilogue;    // kAdd: into the target
    int32_t source;      // buffer
    int32_t target;      // buffer
    int32_t on_samples;  // input rows are those whose logits are wanted
    float norm_eps;
    int32_t input_bits;  // 16, or 8 for int4 weights: what inputs are rounded to
    int32_t padding;
    const float* norm_weight;  // [in_size], or null: no normalisation of the input
    const float* bias;         // [out_size], or null
    const void* panels;
};

struct Attend {
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t layer;
    int32_t rope;    // index into Step.frequencies
    int32_t window;  // positions; 0: all
    int32_t source;  // buffer of queries, keys, values
    int32_t target;  // buffer
    float scale;
    float soft_cap;  // 0: none
    float norm_eps;
    int32_t padding;
    const float* q_norm;  // [head_dim], or null
    const float* k_norm;
};

struct Embed {
    int32_t format;
    int32_t size;
    int32_t target;
    float scale;
    const void* panels;
};

// target += norm(source) * weight
struct NormAdd {
    int32_t size;
    int32_t source;
    int32_t target;
    float norm_eps;
    const float* norm_weight;
};

struct Op {
    int32_t kind;
    int32_t padding;
    const void* what;
};

struct Step {
    int64_t num_rows;
    int64_t num_sequences;
    int64_t num_samples;
    int64_t table_width;
    const int64_t* token_ids;       // [rows]
    const int64_t* positions;       // [rows]
    const int64_t* write_blocks;    // [rows]
    const int64_t* write_slots;     // [rows]
    const int64_t* cu_seqlens;      // [sequences + 1]
    const int64_t* block_tables;    // [sequences, table_width]
    const int64_t* kv_lengths;      // [sequences]
    const int64_t* sample_rows;     // [samples]
    const int32_t* slot_positions;  // [blocks, block_tokens], or null: entry i has position i
    uint16_t* arena;                // bf16 [blocks, layers, 2, block_tokens, kv_heads, head_dim]
    int64_t num_layers;
    int64_t block_tokens;
    float* buffers[6];
    int64_t num_ropes;
    const double* frequencies;  // [ropes, head_dim / 2], radians per position
    int64_t rope_size;          // head_dim / 2
};

}  // extern "C"

}  // namespace headrace
