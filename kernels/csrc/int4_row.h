// One row of int8 x times int4 weights, where the instruction set can do it without expanding the weights into memory.
#pragma once

#include "int4.h"
#include "integer.h"

namespace {

#if defined(__AVX2__)

constexpr bool INT4_ROW = true;
constexpr int64_t INT4_AHEAD = 8;  // weight rows to prefetch ahead

QUAMBA_INLINE __m256i twice(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}

// x in the form that int4_row wants, zeros after `inputs` up to the weight's padding: int16, or int8 for integer scales.
inline void int4_row_x(const Int4 &w, const int8_t *x, int64_t inputs, void *out) {
    const int64_t width = 2 * w.half * w.groups;
    const int64_t size = w.scale_is_float ? 2 : 1;
    std::memset(out, 0, static_cast<size_t>(width * size));
    if (!w.scale_is_float)
        std::memcpy(out, x, static_cast<size_t>(inputs));
    else
        for (int64_t k = 0; k < inputs; ++k) static_cast<int16_t *>(out)[k] = x[k];
}

// Integer scales: the results are at most 120 in magnitude, and two of their products with |x| <= 128 fit int16.
template <int64_t HALF>
QUAMBA_INLINE Wide group_products(Wide acc, const int8_t *x, const uint8_t *packed, const int8_t *table) {
    const __m256i results = twice(table), mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const auto add = [&](const int8_t *p, __m256i halves) QUAMBA_BODY {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        const __m256i codes = _mm256_shuffle_epi8(results, _mm256_and_si256(halves, mask));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(codes, v));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones));
    };
    if (HALF == 16) {
        add(x, _mm256_srlv_epi32(twice(packed), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)));
        return acc;
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < HALF; j += 32) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed + j));
        add(x + j, both);
        add(x + HALF + j, _mm256_srli_epi16(both, 4));
    }
    return acc;
}

// Float scales: the results reach -128, and are widened.
template <int64_t HALF>
QUAMBA_INLINE Wide group_products(Wide acc, const int16_t *x, const uint8_t *packed, const int8_t *table) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < HALF; j += LANES) {
        __m128i low, high;
        look_up(table, packed + j, &low, &high);
        acc = multiply_add(acc, load_wide(x + j), _mm256_cvtepi8_epi16(low));
        acc = multiply_add(acc, load_wide(x + HALF + j), _mm256_cvtepi8_epi16(high));
    }
    return acc;
}

// sums[n] for weight rows n0 + n, n < 4; from `count` on they repeat the last.
template <int64_t HALF, typename X>
inline void int4_rows(const Int4 w, const X *x, int64_t n0, int64_t count, int32_t *sums) {
    Wide acc[4] = {zero(), zero(), zero(), zero()};
    int64_t at[4];
    alignas(16) int8_t buffer[4][LANES];
    for (int64_t n = 0; n < 4; ++n) at[n] = (n0 + (n < count ? n : count - 1)) * w.groups;
    for (int64_t g = 0; g < w.groups; ++g, x += 2 * HALF)
#pragma GCC unroll 4
        for (int64_t n = 0; n < 4; ++n) {
            const int8_t *table = sizeof(X) == 2 ? w.rounded(at[n] + g, buffer[n]) : w.products(at[n] + g);
            const uint8_t *packed = w.packed + (at[n] + g) * HALF;
            __builtin_prefetch(packed + INT4_AHEAD * w.groups * HALF);
            acc[n] = group_products<HALF>(acc[n], x, packed, table);
        }
    store_sums(sums, acc[0], acc[1], acc[2], acc[3]);
}

template <typename X>
inline void int4_rows(const Int4 &w, const X *x, int64_t n0, int64_t count, int32_t *sums) {
    if (w.half == 16)
        int4_rows<16>(w, x, n0, count, sums);
    else if (w.half == 32)
        int4_rows<32>(w, x, n0, count, sums);
    else
        int4_rows<64>(w, x, n0, count, sums);
}

inline void int4_row(const Int4 &w, const void *x, int64_t n0, int64_t count, int32_t *sums) {
    if (w.scale_is_float)
        int4_rows(w, static_cast<const int16_t *>(x), n0, count, sums);
    else
        int4_rows(w, static_cast<const int8_t *>(x), n0, count, sums);
}

#else

constexpr bool INT4_ROW = false;
inline void int4_row_x(const Int4 &, const int8_t *, int64_t, void *) {}
inline void int4_row(const Int4 &, const void *, int64_t, int64_t, int32_t *) {}

#endif

}  // namespace
