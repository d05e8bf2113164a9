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

// The same for any number of rows, in groups as equal as they can be: one or two rows alone would wait for their sums.
inline void add_product(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                        int64_t c_stride, int64_t depth) {
    constexpr int64_t kMost = 6;
    for (int64_t groups = (rows + kMost - 1) / kMost; groups > 0; --groups) {
        const int64_t size = (rows + groups - 1) / groups;
        switch (size) {
            case 1: add_product<1>(a, a_stride, b, b_stride, c, c_stride, depth); break;
            case 2: add_product<2>(a, a_stride, b, b_stride, c, c_stride, depth); break;
            case 3: add_product<3>(a, a_stride, b, b_stride, c, c_stride, depth); break;
            case 4: add_product<4>(a, a_stride, b, b_stride, c, c_stride, depth); break;
            case 5: add_product<5>(a, a_stride, b, b_stride, c, c_stride, depth); break;
            default: add_product<6>(a, a_stride, b, b_stride, c, c_stride, depth); break;
        }
        rows -= size;
        a += size * a_stride;
        c += size * c_stride;
    }
}

}  // namespace headrace
