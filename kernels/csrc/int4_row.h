// One row of int8 x times int4 weights, where the instruction set can do it without expanding the weights into memory.
#pragma once

#include "int4.h"
#include "integer.h"

namespace {

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)

constexpr bool INT4_ROW = true;
constexpr int64_t INT4_AHEAD = 4096;  // bytes to prefetch ahead

// Each instruction set defines group_products(sums, x, packed, table): the group's products added to a register of sums.
#if defined(__AVX2__)

typedef __m256i Int4Sums;
QUAMBA_INLINE Int4Sums no_sums() { return _mm256_setzero_si256(); }
QUAMBA_INLINE __m256i load32(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
QUAMBA_INLINE __m256i twice(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}

// Calls add(k, codes) for the results of inputs k .. k + 32 of a group.
template <int64_t HALF, typename Add>
QUAMBA_INLINE void by_codes(const uint8_t *packed, __m256i results, const Add &add) {
    const __m256i mask = _mm256_set1_epi8(15);
    if (HALF == 16) {
        const __m256i halves = _mm256_srlv_epi32(twice(packed), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        return add(0, _mm256_shuffle_epi8(results, _mm256_and_si256(halves, mask)));
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < HALF; j += 32) {
        const __m256i both = load32(packed + j);
        add(j, _mm256_shuffle_epi8(results, _mm256_and_si256(both, mask)));
        add(HALF + j, _mm256_shuffle_epi8(results, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask)));
    }
}

#if defined(QUAMBA_VNNI)
template <int64_t HALF>
QUAMBA_INLINE Int4Sums group_products(Int4Sums acc, const int8_t *x, const uint8_t *packed, const int8_t *table) {
    const __m256i results = _mm256_xor_si256(twice(table), _mm256_set1_epi8(-128));  // + OFFSET
    by_codes<HALF>(packed, results, [&](int64_t k, __m256i codes) QUAMBA_BODY { acc = dot(acc, codes, load32(x + k)); });
    return acc;
}
#else
// Integer scales: the results are at most 120 in magnitude, and two of their products with |x| <= 128 fit int16.
template <int64_t HALF>
QUAMBA_INLINE Int4Sums group_products(Int4Sums acc, const int8_t *x, const uint8_t *packed, const int8_t *table) {
    by_codes<HALF>(packed, twice(table), [&](int64_t k, __m256i codes) QUAMBA_BODY {
        const __m256i v = load32(x + k);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(codes, v));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
    return acc;
}

// Float scales: the results reach -128, and are widened.
template <int64_t HALF>
QUAMBA_INLINE Int4Sums group_products(Int4Sums acc, const int16_t *x, const uint8_t *packed, const int8_t *table) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < HALF; j += LANES) {
        __m128i low, high;
        look_up(table, packed + j, &low, &high);
        acc = multiply_add(acc, load_wide(x + j), _mm256_cvtepi8_epi16(low));
        acc = multiply_add(acc, load_wide(x + HALF + j), _mm256_cvtepi8_epi16(high));
    }
    return acc;
}
#endif

#else

typedef Wide Int4Sums;
QUAMBA_INLINE Int4Sums no_sums() { return zero(); }

template <int64_t HALF>
QUAMBA_INLINE Int4Sums group_products(Int4Sums acc, const int8_t *x, const uint8_t *packed, const int8_t *table) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < HALF; j += LANES) {
        int8x16_t low, high;
        look_up(table, packed + j, &low, &high);
        acc = vdotq_s32(acc, vld1q_s8(x + j), low);
        acc = vdotq_s32(acc, vld1q_s8(x + HALF + j), high);
    }
    return acc;
}

#endif

// sums[n] for weight rows n0 + n, n < 4; from `count` on they repeat the last.
template <int64_t HALF, typename X>
inline void int4_rows(const Int4 w, const X *x, int64_t n0, int64_t count, int32_t *sums) {
    Int4Sums acc[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
    int64_t at[4];
    alignas(16) int8_t buffer[4][LANES];
    for (int64_t n = 0; n < 4; ++n) at[n] = (n0 + (n < count ? n : count - 1)) * w.groups;
    const bool rounded = sizeof(X) == 2 || (sizeof(Code) == 1 && w.scale_is_float);
    for (int64_t g = 0; g < w.groups; ++g, x += 2 * HALF)
#pragma GCC unroll 4
        for (int64_t n = 0; n < 4; ++n) {
            const int8_t *table = rounded ? w.rounded(at[n] + g, buffer[n]) : w.products(at[n] + g);
            const uint8_t *packed = w.packed + (at[n] + g) * HALF;
            __builtin_prefetch(packed + INT4_AHEAD);
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

// x as `load_rows` leaves it; for integer scales int8 does, in its place.
inline void int4_row_x(const Int4 &w, const int8_t *x, int64_t inputs, void *out) {
    if (sizeof(Code) == 1 || w.scale_is_float) return;
    std::memset(out, 0, static_cast<size_t>(2 * w.half * w.groups));
    std::memcpy(out, x, static_cast<size_t>(inputs));
}

inline void int4_row(const Int4 &w, const void *x, int64_t n0, int64_t count, int32_t *sums) {
    if (w.scale_is_float)
        int4_rows(w, static_cast<const Code *>(x), n0, count, sums);
    else
        int4_rows(w, static_cast<const int8_t *>(x), n0, count, sums);
}

#else

constexpr bool INT4_ROW = false;
inline void int4_row_x(const Int4 &, const int8_t *, int64_t, void *) {}
inline void int4_row(const Int4 &, const void *, int64_t, int64_t, int32_t *) {}

#endif

}  // namespace
