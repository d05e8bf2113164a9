// Work on a few rows at a time, and C += A B for rows of A and 16 columns of B, in fp32.
#pragma once

#include "lanes.h"

namespace headrace {

// Calls work.template operator()<R>(first) for all rows: in groups of six at most, as there are registers for, and as
// equal as they can be, since one or two rows alone would wait for their sums.
template <typename F>
inline void in_groups(int64_t rows, const F& work) {
    constexpr int64_t kMost = 6;
    int64_t row = 0;
    for (int64_t groups = (rows + kMost - 1) / kMost; groups > 0; --groups) {
        const int64_t size = (rows - row + groups - 1) / groups;
        switch (size) {
            case 1: work.template operator()<1>(row); break;
            case 2: work.template operator()<2>(row); break;
            case 3: work.template operator()<3>(row); break;
            case 4: work.template operator()<4>(row); break;
            case 5: work.template operator()<5>(row); break;
            default: work.template operator()<6>(row); break;
        }
        row += size;
    }
}

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
    in_groups(rows, [&]<int R>(int64_t row) {
        add_product<R>(a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, depth);
    });
}

}  // namespace headrace
