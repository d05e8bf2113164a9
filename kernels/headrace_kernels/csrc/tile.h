// C += A B for a few rows of A and 16 columns of B, in fp32.
#pragma once

#include "lanes.h"

namespace headrace {

template <int R>
inline void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                        int64_t c_stride, int64_t depth) {
    F8 acc[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        acc[r][0] = load(c + r * c_stride);
        acc[r][1] = load(c + r * c_stride + kLanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
        const F8 b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F8 x = _mm256_broadcast_ss(a + r * a_stride + k);
            acc[r][0] = fma(x, b0, acc[r][0]);
            acc[r][1] = fma(x, b1, acc[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        store(c + r * c_stride, acc[r][0]);
        store(c + r * c_stride + kLanes, acc[r][1]);
    }
}

// The same for any number of rows.
inline void add_product(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                        int64_t c_stride, int64_t depth) {
    for (; rows >= 6; rows -= 6, a += 6 * a_stride, c += 6 * c_stride)
        add_product<6>(a, a_stride, b, b_stride, c, c_stride, depth);
    switch (rows) {
        case 5: return add_product<5>(a, a_stride, b, b_stride, c, c_stride, depth);
        case 4: return add_product<4>(a, a_stride, b, b_stride, c, c_stride, depth);
        case 3: return add_product<3>(a, a_stride, b, b_stride, c, c_stride, depth);
        case 2: return add_product<2>(a, a_stride, b, b_stride, c, c_stride, depth);
        case 1: return add_product<1>(a, a_stride, b, b_stride, c, c_stride, depth);
        default: return;
    }
}

}  // namespace headrace
