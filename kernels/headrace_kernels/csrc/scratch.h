// Memory that operations need between their phases; kept from step to step.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "step.h"

namespace headrace {

// Grows only; 64-byte aligned.
template <typename T>
class Room {
public:
    Room() = default;
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    ~Room() { std::free(data_); }

    T* at_least(int64_t count) {
        if (count > size_) {
            std::free(data_);
            const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
            data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = count;
        }
        return data_;
    }

    T* get() const { return data_; }

private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};

// Input rows of a linear layer, ready for the products of its format.
struct Rows {
    float* values;   // [rows, in_size], normalised
    int16_t* codes;  // [rows, in_size], round(value / scale); int8_t where the layer says so
    float* scales;   // [rows, in_size / 32]
    float* sums;     // [rows, in_size / 32], scale * sum of codes
};

// Few queries of one sequence, over a range of its entries.
struct Tile {
    int64_t sequence;
    int64_t first_row;
    int64_t num_rows;
    int64_t kv_begin;
    int64_t kv_end;
    int64_t part;   // place among the partial results, -1: the only one
    int64_t parts;  // on the first part: how many parts this tile was cut into
};

// A sequence of many queries.
struct Prompt {
    int64_t sequence;
    int64_t first_row;
    int64_t num_entries;
    int64_t first_tile;  // of its keys
};

// The entries of a tile of keys begin here.
struct KeyRun {
    int64_t prompt;
    int64_t entry;
};

// Queries of a prompt that share a tile of keys.
struct PromptTile {
    int64_t prompt;
    int64_t first_row;
    int64_t num_rows;
};

struct ThreadRoom {
    Room<float> values;
    Room<int16_t> codes;
    Room<float> scales;
    Room<float> panel_values;
    Room<float> attend;
};

struct Scratch {
    explicit Scratch(int threads) : thread(static_cast<size_t>(threads)) {}

    void clear() {
        tiles.clear();
        prompts.clear();
        key_tiles.clear();
        prompt_tiles.clear();
        num_parts = 0;
    }

    Room<float> values;
    Room<int16_t> codes;
    Room<float> scales;
    Room<float> partial;
    Room<float> rotation;  // [ropes, rows, 2, head_dim / 2]: cos, sin
    Room<uint8_t> spread;  // keys and values of all prompts, for the heads at work
    std::vector<Tile> tiles;
    std::vector<Prompt> prompts;
    std::vector<KeyRun> key_tiles;
    std::vector<PromptTile> prompt_tiles;
    int64_t num_parts = 0;
    std::vector<ThreadRoom> thread;
};

}  // namespace headrace
