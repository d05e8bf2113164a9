// Eight fp32 lanes on AVX2, and the few operations that the kernels need.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace headrace {

using F8 = __m256;
using I8 = __m256i;

constexpr int kLanes = 8;
constexpr int kPanel = 16;  // outputs of a linear layer that are computed together

inline F8 zero() { return _mm256_setzero_ps(); }
inline F8 all(float x) { return _mm256_set1_ps(x); }
inline F8 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F8 x) { _mm256_storeu_ps(p, x); }
inline F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }

inline F8 load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline F8 load_bf16(const uint16_t* p) {
    const I8 wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Four bytes, in every four.
inline I8 broadcast4(const void* codes) {
    int32_t bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

inline float sum(F8 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The sums of eight vectors.
inline F8 sums_of(const F8 (&x)[8]) {
    const F8 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const F8 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// The greatest elements of eight vectors.
inline F8 greatest_of(const F8 (&x)[8]) {
    F8 four[4], two[2];
    for (int i = 0; i < 4; ++i)
        four[i] = _mm256_max_ps(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        two[i] = _mm256_max_ps(_mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    return _mm256_max_ps(_mm256_permute2f128_ps(two[0], two[1], 0x20), _mm256_permute2f128_ps(two[0], two[1], 0x31));
}

inline float greatest(F8 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Adds the products of pairs of int16 to two sums: acc[h] + x.lo * w[h].lo + x.hi * w[h].hi. In assembly, because the
// compiler would add products of several inputs first and then lack registers for them: a third slower.
inline void add_products(I8 (&acc)[2], I8 x, const I8 (&w)[2]) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    for (int h = 0; h < 2; ++h) acc[h] = _mm256_dpwssd_epi32(acc[h], x, w[h]);
#elif defined(__AVXVNNI__)
    for (int h = 0; h < 2; ++h) acc[h] = _mm256_dpwssd_avx_epi32(acc[h], x, w[h]);
#else
    I8 products;
    asm("vpmaddwd %[w0], %[x], %[products]\n\t"
        "vpmaddwd %[w1], %[x], %[x]\n\t"
        "vpaddd %[products], %[acc0], %[acc0]\n\t"
        "vpaddd %[x], %[acc1], %[acc1]"
        : [acc0] "+x"(acc[0]), [acc1] "+x"(acc[1]), [x] "+x"(x), [products] "=&x"(products)
        : [w0] "x"(w[0]), [w1] "x"(w[1]));
#endif
}

// The same for signed bytes of x and unsigned ones of w: of 4 bytes for each int32, or of 2 for each int16 where there
// is no instruction for it; `finished` makes int32 of it. Without that instruction the sums must stay below 32768.
inline void add_byte_products(I8 (&acc)[2], I8 x, const I8 (&w)[2]) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    for (int h = 0; h < 2; ++h) acc[h] = _mm256_dpbusd_epi32(acc[h], w[h], x);
#elif defined(__AVXVNNI__)
    for (int h = 0; h < 2; ++h) acc[h] = _mm256_dpbusd_avx_epi32(acc[h], w[h], x);
#else
    I8 products;
    asm("vpmaddubsw %[x], %[w0], %[products]\n\t"
        "vpmaddubsw %[x], %[w1], %[x]\n\t"
        "vpaddw %[products], %[acc0], %[acc0]\n\t"
        "vpaddw %[x], %[acc1], %[acc1]"
        : [acc0] "+x"(acc[0]), [acc1] "+x"(acc[1]), [x] "+x"(x), [products] "=&x"(products)
        : [w0] "x"(w[0]), [w1] "x"(w[1]));
#endif
}

inline I8 finished(I8 byte_products) {
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    return byte_products;
#else
    return _mm256_madd_epi16(byte_products, _mm256_set1_epi16(1));
#endif
}

// exp within 1.26 ulp for every float from -87.33 to 88 (measured against fp64); 0 below, exp(88) above.
inline F8 exp(F8 x) {
    const F8 low = all(-87.33f);
    const F8 is_zero = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    x = _mm256_min_ps(all(88.0f), _mm256_max_ps(low, x));  // in this order NaN stays NaN
    const F8 n = _mm256_round_ps(_mm256_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F8 r = _mm256_fnmadd_ps(n, all(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, all(-2.12194440e-4f), r);
    F8 p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, all(1.0f)));
    const I8 power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(is_zero, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

inline F8 sigmoid(F8 x) {
    const F8 e = exp(_mm256_sub_ps(zero(), _mm256_andnot_ps(all(-0.0f), x)));  // exp(-|x|) never overflows
    const F8 small = _mm256_div_ps(e, _mm256_add_ps(all(1.0f), e));
    const F8 large = _mm256_div_ps(all(1.0f), _mm256_add_ps(all(1.0f), e));
    return _mm256_blendv_ps(large, small, x);
}

inline F8 tanh(F8 x) { return fma(all(2.0f), sigmoid(_mm256_add_ps(x, x)), all(-1.0f)); }

inline F8 silu(F8 x) { return _mm256_mul_ps(x, sigmoid(x)); }

inline F8 gelu(F8 x) {  // 0.5 x (1 + tanh(y)) = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)
    const F8 y = _mm256_mul_ps(x, fma(_mm256_mul_ps(x, x), all(0.044715f), all(1.0f)));
    return _mm256_mul_ps(x, sigmoid(_mm256_mul_ps(y, all(1.5957691216f))));
}

}  // namespace headrace
