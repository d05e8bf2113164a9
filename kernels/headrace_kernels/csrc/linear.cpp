// Products of fp32 rows with weights in their own quantised grid, or in bf16.
//
// Weights lie in panels of 16 outputs. int4 and int8 weights have a scale (int4 also a minimum) per output and 32
// inputs; the inputs are rounded to int16 with a scale per row and the same 32 inputs, which is finer than bf16,
// and the products of a block are summed exactly in int32. Nothing but masks and shifts lies between memory and
// product, and four rows share them: faster than fp32, and than weights unpacked once in memory, for any number of
// rows.
// Where a layer allows it, the inputs of int4 weights are rounded to int8: coarser than bf16, and twice as fast.
//
// Panel, per block of 32 inputs:
//   int4: fp16 scale[16], fp16 minimum[16], 8 vectors of 32 bytes; vector v, nibble n of the 16-bit lane l is
//         input 4 v + 2 (n / 2) + l % 2 of output 8 (n % 2) + l / 2, and weight = scale * nibble + minimum
//   int8: fp16 scale[16], 16 vectors of 32 bytes; vector v, byte n of the 16-bit lane l is input 2 v + l % 2 of
//         output 8 n + l / 2
//   bf16: [32][16]
#include "linear.h"

#include <algorithm>

#include "lanes.h"
#include "tile.h"

namespace headrace {
namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kTogether = 4;    // rows that share weights unpacked in registers
constexpr int64_t kAloneRows = 4;   // up to here every thread prepares the rows for itself, without a barrier
// Rows at work together, in bytes: a part of the second-level cache. A bf16 panel is spread anew for each such group.
constexpr int64_t kRowBytes = 192 << 10;
constexpr int64_t kBf16RowBytes = 320 << 10;
constexpr int64_t kDepth = 256;           // inputs of a panel at work together in fp32, 16 KiB

// How weights are unpacked and multiplied. Vector v of a block gives `groups` times 4 bytes of inputs for each output:
// out[g][h] are the inputs `inputs * (groups * v + g)` and following, of outputs 8 h and following.
struct Int4 {
    using Code = int16_t;
    static constexpr bool has_minimum = true;
    static constexpr int64_t vectors = 8;
    static constexpr int64_t head_bytes = 64;
    static constexpr int groups = 2, inputs = 2;

    static void unpack(const uint8_t* block, int64_t v, I8 (&out)[2][2]) {
        const I8 x = _mm256_loadu_si256(reinterpret_cast<const I8*>(block + head_bytes) + v);
        const I8 mask = _mm256_set1_epi16(15);
        out[0][0] = _mm256_and_si256(x, mask);
        out[0][1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
        out[1][0] = _mm256_and_si256(_mm256_srli_epi16(x, 8), mask);
        out[1][1] = _mm256_srli_epi16(x, 12);
    }
    static void add(I8 (&acc)[2], I8 x, const I8 (&weights)[2]) { add_products(acc, x, weights); }
    static I8 finish(I8 acc) { return acc; }
};

// The same weights for int8 inputs, which lie in the order 0, 2, 1, 3 within each four.
struct Int4Bytes : Int4 {
    using Code = int8_t;
    static constexpr int groups = 1, inputs = 4;

    static void unpack(const uint8_t* block, int64_t v, I8 (&out)[1][2]) {
        const I8 x = _mm256_loadu_si256(reinterpret_cast<const I8*>(block + head_bytes) + v);
        const I8 mask = _mm256_set1_epi8(15);
        out[0][0] = _mm256_and_si256(x, mask);
        out[0][1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
    }
    // A block adds up to 8 * 2 * 15 * 127 at most: it fits into int16.
    static void add(I8 (&acc)[2], I8 x, const I8 (&weights)[2]) { add_byte_products(acc, x, weights); }
    static I8 finish(I8 acc) { return finished(acc); }
};

struct Int8 {
    using Code = int16_t;
    static constexpr bool has_minimum = false;
    static constexpr int64_t vectors = 16;
    static constexpr int64_t head_bytes = 32;
    static constexpr int groups = 1, inputs = 2;

    static void unpack(const uint8_t* block, int64_t v, I8 (&out)[1][2]) {
        const I8 x = _mm256_loadu_si256(reinterpret_cast<const I8*>(block + head_bytes) + v);
        out[0][0] = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
        out[0][1] = _mm256_srai_epi16(x, 8);
    }
    static void add(I8 (&acc)[2], I8 x, const I8 (&weights)[2]) { add_products(acc, x, weights); }
    static I8 finish(I8 acc) { return acc; }
};

template <typename F>
constexpr int64_t block_bytes() {
    return F::head_bytes + F::vectors * 32;
}

int64_t panel_bytes(int32_t format, int64_t in_size) {
    switch (format) {
        case kInt4: return in_size / kBlock * block_bytes<Int4>();
        case kInt8: return in_size / kBlock * block_bytes<Int8>();
        default: return in_size * kPanel * 2;
    }
}

const uint16_t* head_of(const uint8_t* block) { return reinterpret_cast<const uint16_t*>(block); }

void write_codes(const I8 (&q)[4], int16_t* codes) {
    for (int i = 0; i < 4; i += 2) {
        const I8 packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[i], q[i + 1]), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<I8*>(codes + 8 * i), packed);
    }
}

void write_codes(const I8 (&q)[4], int8_t* codes) {
    const I8 packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const I8 ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m128i swap = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    _mm256_storeu_si256(reinterpret_cast<I8*>(codes), _mm256_shuffle_epi8(ordered, _mm256_broadcastsi128_si256(swap)));
}

template <typename Code>
void quantise(const float* x, int64_t size, Code* codes, float* scales, float* sums) {
    constexpr float kMost = sizeof(Code) == 1 ? 127.0f : 32767.0f;
    const F8 sign = all(-0.0f);
    for (int64_t b = 0; b < size / kBlock; ++b, x += kBlock, codes += kBlock) {
        const F8 v[4] = {load(x), load(x + 8), load(x + 16), load(x + 24)};
        F8 most = zero();
        for (const F8& part : v) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, part));
        const float scale = greatest(most) / kMost;
        // Below the normal numbers 1 / scale is infinite; such a block is zero for every purpose.
        const F8 inverse = all(scale >= 1.2e-38f ? 1.0f / scale : 0.0f);
        I8 q[4];
        for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        const I8 total = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        write_codes(q, codes);
        scales[b] = scale;
        sums[b] = scale * sum(_mm256_cvtepi32_ps(total));
    }
}

// Adds the finished products of a block: acc * scale of the weights * scale of the row (+ minimum * sum of the row).
template <typename F>
void add_block(const I8 (&acc)[2], const F8 (&scale)[2], const F8 (&minimum)[2], float row_scale, float row_sum,
               F8 (&out)[2]) {
#pragma GCC unroll 8
    for (int h = 0; h < 2; ++h) {
        if constexpr (F::has_minimum) out[h] = fma(minimum[h], all(row_sum), out[h]);
        out[h] = fma(_mm256_cvtepi32_ps(F::finish(acc[h])), _mm256_mul_ps(scale[h], all(row_scale)), out[h]);
    }
}

// out[r] = products of R rows with one panel, straight from its packed form.
template <typename F, int R>
void multiply_packed(const uint8_t* panel, const Rows& rows, int64_t first, int64_t in_size, float* out) {
    const int64_t blocks = in_size / kBlock;
    const auto* codes = reinterpret_cast<const typename F::Code*>(rows.codes) + first * in_size;
    F8 total[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = zero();
    for (int64_t b = 0; b < blocks; ++b, panel += block_bytes<F>()) {
        for (int64_t line = 0; line < block_bytes<F>(); line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(panel) + 4 * block_bytes<F>() + line, _MM_HINT_T0);
        I8 acc[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (int64_t v = 0; v < F::vectors; ++v) {
            I8 weights[F::groups][2];
            F::unpack(panel, v, weights);
#pragma GCC unroll 8
            for (int g = 0; g < F::groups; ++g) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const I8 x = broadcast4(codes + r * in_size + b * kBlock + F::inputs * (F::groups * v + g));
                    F::add(acc[r], x, weights[g]);
                }
            }
        }
        const uint16_t* head = head_of(panel);
        const F8 scale[2] = {load_f16(head), load_f16(head + 8)};
        F8 minimum[2] = {};
        if constexpr (F::has_minimum) {
            minimum[0] = load_f16(head + 16);
            minimum[1] = load_f16(head + 24);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int64_t at = (first + r) * blocks + b;
            add_block<F>(acc[r], scale, minimum, rows.scales[at], rows.sums[at], total[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        store(out + r * kPanel, total[r][0]);
        store(out + r * kPanel + kLanes, total[r][1]);
    }
}

// out[r] = products of R rows with one bf16 panel.
template <int R>
void multiply_bf16(const uint16_t* panel, const float* x, int64_t in_size, float* out) {
    constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums in flight hide the latency of each
    F8 acc[kChains][R][2];
    for (auto& chain : acc)
        for (auto& row : chain) row[0] = row[1] = zero();
    for (int64_t k = 0; k < in_size; k += kChains) {
        _mm_prefetch(reinterpret_cast<const char*>(panel + k * kPanel) + 1024, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int c = 0; c < kChains; ++c) {
            const F8 w0 = load_bf16(panel + (k + c) * kPanel), w1 = load_bf16(panel + (k + c) * kPanel + kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const F8 value = _mm256_broadcast_ss(x + r * in_size + k + c);
                acc[c][r][0] = fma(value, w0, acc[c][r][0]);
                acc[c][r][1] = fma(value, w1, acc[c][r][1]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int h = 0; h < 2; ++h) {
            F8 total = acc[0][r][h];
            for (int c = 1; c < kChains; ++c) total = _mm256_add_ps(total, acc[c][r][h]);
            store(out + r * kPanel + h * kLanes, total);
        }
    }
}

bool has_byte_inputs(const Linear& layer) { return layer.format == kInt4 && layer.input_bits == 8; }

template <int R>
void multiply_direct(const Linear& layer, const uint8_t* panel, const Rows& rows, int64_t first, float* out) {
    switch (layer.format) {
        case kInt4:
            return has_byte_inputs(layer) ? multiply_packed<Int4Bytes, R>(panel, rows, first, layer.in_size, out)
                                          : multiply_packed<Int4, R>(panel, rows, first, layer.in_size, out);
        case kInt8: return multiply_packed<Int8, R>(panel, rows, first, layer.in_size, out);
        default:
            return multiply_bf16<R>(reinterpret_cast<const uint16_t*>(panel), rows.values + first * layer.in_size,
                                    layer.in_size, out);
    }
}

// out[count][16] = products of up to kTogether rows with one panel.
void multiply_few(const Linear& layer, const uint8_t* panel, const Rows& rows, int64_t first, int64_t count,
                  float* out) {
    switch (count) {
        case 1: return multiply_direct<1>(layer, panel, rows, first, out);
        case 2: return multiply_direct<2>(layer, panel, rows, first, out);
        case 3: return multiply_direct<3>(layer, panel, rows, first, out);
        default: return multiply_direct<4>(layer, panel, rows, first, out);
    }
}

// out[count][16] = products of many rows with one panel.
void multiply(const Linear& layer, const uint8_t* panel, const Rows& rows, int64_t first, int64_t count,
              ThreadRoom& room, float* out) {
    if (layer.format != kBf16) {
        for (int64_t r = 0; r < count; r += kTogether)
            multiply_few(layer, panel, rows, first + r, std::min(kTogether, count - r), out + r * kPanel);
        return;
    }
    const int64_t in_size = layer.in_size;
    float* wide = room.panel_values.at_least(kDepth * kPanel);
    const auto* narrow = reinterpret_cast<const uint16_t*>(panel);
    std::fill(out, out + count * kPanel, 0.0f);
    for (int64_t k = 0; k < in_size; k += kDepth) {
        const int64_t depth = std::min(kDepth, in_size - k);
        for (int64_t i = 0; i < depth * kPanel; i += kLanes) store(wide + i, load_bf16(narrow + k * kPanel + i));
        add_product(count, rows.values + first * in_size + k, in_size, wide, kPanel, out, kPanel, depth);
    }
}

// Writes finished products of one panel where they belong.
void finish(const Linear& layer, int64_t panel, const float* products, int64_t count, float* target) {
    const int64_t begin = panel * kPanel, size = std::min<int64_t>(kPanel, layer.out_size - begin);
    const bool is_gated = layer.epilogue == kSilu || layer.epilogue == kGelu;
    const int64_t stride = is_gated ? layer.out_size / 2 : layer.out_size;
    for (int64_t r = 0; r < count; ++r, products += kPanel, target += stride) {
        float x[kPanel];
        std::memcpy(x, products, sizeof x);
        if (layer.bias != nullptr)
            for (int64_t i = 0; i < size; ++i) x[i] += layer.bias[begin + i];
        if (is_gated) {
            const F8 gate = layer.epilogue == kSilu ? silu(load(x)) : gelu(load(x));
            store(target + begin / 2, _mm256_mul_ps(gate, load(x + kLanes)));
        } else if (size == kPanel && layer.epilogue == kStore) {
            store(target + begin, load(x));
            store(target + begin + kLanes, load(x + kLanes));
        } else {
            for (int64_t i = 0; i < size; ++i)
                target[begin + i] = layer.epilogue == kAdd ? target[begin + i] + x[i] : x[i];
        }
    }
}

// Prepares rows begin to end.
void prepare(const Linear& layer, const Step& step, int64_t begin, int64_t end, const Rows& rows) {
    const int64_t size = layer.in_size, blocks = size / kBlock;
    for (int64_t row = begin; row < end; ++row) {
        const float* x = step.buffers[layer.source] + (layer.on_samples ? step.sample_rows[row] : row) * size;
        float* out = rows.values + row * size;
        if (layer.norm_weight != nullptr) {
            normalise(x, layer.norm_weight, layer.norm_eps, size, out);
            x = out;
        } else if (layer.format == kBf16) {
            std::copy(x, x + size, out);
        }
        if (has_byte_inputs(layer))
            quantise(x, size, reinterpret_cast<int8_t*>(rows.codes) + row * size, rows.scales + row * blocks,
                     rows.sums + row * blocks);
        else if (layer.format != kBf16)
            quantise(x, size, rows.codes + row * size, rows.scales + row * blocks, rows.sums + row * blocks);
    }
}

Rows room_for(const Linear& layer, int64_t count, Room<float>& values, Room<int16_t>& codes, Room<float>& scales) {
    const int64_t blocks = layer.in_size / kBlock;
    float* heads = scales.at_least(2 * count * blocks);
    return {values.at_least(count * layer.in_size), codes.at_least(count * layer.in_size), heads,
            heads + count * blocks};
}

}  // namespace

void normalise(const float* x, const float* weight, float eps, int64_t size, float* out) {
    double squares = 0.0;
    int64_t i = 0;
    F8 acc = zero();
    for (; i + kLanes <= size; i += kLanes) acc = fma(load(x + i), load(x + i), acc);
    squares = sum(acc);
    for (; i < size; ++i) squares += static_cast<double>(x[i]) * x[i];
    const float factor = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(size) + eps));
    for (i = 0; i + kLanes <= size; i += kLanes)
        store(out + i, _mm256_mul_ps(_mm256_mul_ps(load(x + i), all(factor)), load(weight + i)));
    for (; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

void run_linear(const Linear& layer, const Step& step, Scratch& scratch, Worker& worker) {
    const int64_t count = layer.on_samples ? step.num_samples : step.num_rows;
    if (count == 0) return;
    ThreadRoom& own = scratch.thread[static_cast<size_t>(worker.index)];
    const bool is_alone = count <= kAloneRows;
    const int64_t share = (count + worker.count - 1) / worker.count;
    Rows rows{};
    if (is_alone) {
        rows = room_for(layer, count, own.values, own.codes, own.scales);
        prepare(layer, step, 0, count, rows);
    } else {
        if (worker.index == 0) room_for(layer, count, scratch.values, scratch.codes, scratch.scales);
        worker.barrier();
        rows = room_for(layer, count, scratch.values, scratch.codes, scratch.scales);
        prepare(layer, step, std::min(count, share * worker.index), std::min(count, share * (worker.index + 1)), rows);
        worker.barrier();
    }
    const int64_t panels = (layer.out_size + kPanel - 1) / kPanel, bytes = panel_bytes(layer.format, layer.in_size);
    const auto* weights = static_cast<const uint8_t*>(layer.panels);
    const bool is_gated = layer.epilogue == kSilu || layer.epilogue == kGelu;
    const int64_t stride = is_gated ? layer.out_size / 2 : layer.out_size;
    float* target = step.buffers[layer.target];
    if (count <= kTogether) {
        constexpr int64_t kGrain = 4;
        for (int64_t begin; (begin = worker.claim(kGrain)) < panels;) {
            for (int64_t panel = begin; panel < std::min(panels, begin + kGrain); ++panel) {
                float products[kTogether * kPanel];
                multiply_few(layer, weights + panel * bytes, rows, 0, count, products);
                finish(layer, panel, products, count, target);
            }
        }
    } else {
        const bool is_bf16 = layer.format == kBf16;
        const int64_t row_bytes = layer.in_size * (is_bf16 ? 4 : has_byte_inputs(layer) ? 1 : 2);
        const int64_t most = std::max<int64_t>((is_bf16 ? kBf16RowBytes : kRowBytes) / row_bytes / 12, 1) * 12;
        const int64_t groups = (count + most - 1) / most, group = (count + groups - 1) / groups;
        float* products = own.attend.at_least(group * kPanel);
        for (int64_t item; (item = worker.claim(1)) < groups * panels;) {
            const int64_t first = item / panels * group, panel = item % panels, size = std::min(group, count - first);
            multiply(layer, weights + panel * bytes, rows, first, size, own, products);
            finish(layer, panel, products, size, target + first * stride);
        }
    }
    worker.barrier();
}

void run_embed(const Embed& layer, const Step& step, Worker& worker) {
    const int64_t size = layer.size, bytes = panel_bytes(layer.format, size);
    for (int64_t row = worker.index; row < step.num_rows; row += worker.count) {
        const int64_t token = step.token_ids[row], lane = token % kPanel, half = lane / 8, pair_lane = lane % 8 * 2;
        const uint8_t* panel = static_cast<const uint8_t*>(layer.panels) + token / kPanel * bytes;
        float* out = step.buffers[layer.target] + row * size;
        for (int64_t k = 0; k < size; ++k) {
            const int64_t block = k / kBlock, i = k % kBlock;
            float value;
            if (layer.format == kBf16) {
                value = from_bf16(reinterpret_cast<const uint16_t*>(panel)[k * kPanel + lane]);
            } else if (layer.format == kInt8) {
                const uint8_t* at = panel + block * block_bytes<Int8>();
                const int64_t byte = i / 2 * 32 + (pair_lane + i % 2) * 2 + half;
                const auto code = static_cast<int8_t>(at[Int8::head_bytes + byte]);
                value = _cvtsh_ss(head_of(at)[lane]) * static_cast<float>(code);
            } else {
                const uint8_t* at = panel + block * block_bytes<Int4>();
                const int64_t nibble = i / 2 % 2 * 2 + half;
                uint16_t lanes;
                std::memcpy(&lanes, at + Int4::head_bytes + i / 4 * 32 + (pair_lane + i % 2) * 2, sizeof lanes);
                const int code = lanes >> (4 * nibble) & 15;
                value = _cvtsh_ss(head_of(at)[lane]) * static_cast<float>(code) + _cvtsh_ss(head_of(at)[16 + lane]);
            }
            out[k] = value * layer.scale;
        }
    }
    worker.barrier();
}

}  // namespace headrace
