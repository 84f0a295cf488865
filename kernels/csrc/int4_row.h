// One row of int8 x times int4 weights, where the instruction set can do it without expanding the weights into memory.
#pragma once

#include "int4.h"
#include "integer.h"

namespace {

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)

constexpr bool INT4_ROW = true;
#if defined(__AVX2__) && !defined(QUAMBA_VNNI)
constexpr bool PAIRS = true;  // integer scales multiply sums of pairs
#else
constexpr bool PAIRS = false;
#endif
constexpr int64_t INT4_AHEAD = 4096;  // bytes to prefetch ahead

// Each instruction set defines group_products(sums, x, packed, table): the group's products added to a register of sums.
#if defined(__AVX2__)

typedef __m256i Int4Sums;
QUAMBA_INLINE Int4Sums no_sums() { return _mm256_setzero_si256(); }
QUAMBA_INLINE __m256i load32(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
QUAMBA_INLINE __m256i twice(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}

#if defined(QUAMBA_VNNI)
template <int64_t HALF>
QUAMBA_INLINE Int4Sums group_products(Int4Sums acc, const int8_t *x, const uint8_t *packed, const int8_t *table) {
    const __m256i results = _mm256_xor_si256(twice(table), _mm256_set1_epi8(-128)), mask = _mm256_set1_epi8(15);  // + OFFSET
    if (HALF == 16) {
        const __m256i halves = _mm256_srlv_epi32(twice(packed), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        return dot(acc, _mm256_shuffle_epi8(results, _mm256_and_si256(halves, mask)), load32(x));
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < HALF; j += 32) {
        const __m256i both = load32(packed + j);
        acc = dot(acc, _mm256_shuffle_epi8(results, _mm256_and_si256(both, mask)), load32(x + j));
        acc = dot(acc, _mm256_shuffle_epi8(results, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask)), load32(x + HALF + j));
    }
    return acc;
}
#else
// Integer scales: code + 8 is at most 15, so that four steps of two products fit int16; they are multiplied by the scale and
// widened at once. `extra` takes the 8 away again, int16.
template <int64_t HALF>
QUAMBA_INLINE Int4Sums group_products(Int4Sums acc, const int8_t *x, const int8_t *extra, const uint8_t *packed, int8_t scale) {
    const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(-120);  // 8 in both halves
    __m256i sum = load32(extra);
    if (HALF == 16) {
        const __m256i both = _mm256_xor_si256(twice(packed), flip);
        const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), mask);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, load32(x)));
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j + 32 <= HALF; j += 32) {
        const __m256i both = _mm256_xor_si256(load32(packed + j), flip);
        const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(low, load32(x + j)));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(high, load32(x + HALF + j)));
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(scale)));
}

// Eight groups of 32 and of one weight row, two in a register's halves. x has their inputs in that order.
QUAMBA_INLINE Int4Sums eight_groups(Int4Sums acc, const int8_t *x, const int8_t *extra, const uint8_t *packed, const int8_t *scale) {
    const __m256i mask = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(-120);
    int64_t bytes;
    std::memcpy(&bytes, scale, sizeof bytes);
    const __m256i scales = _mm256_broadcastsi128_si256(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(bytes)));
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
        const __m256i both = _mm256_xor_si256(load32(packed + 32 * p), flip);
        const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        __m256i sum = _mm256_add_epi16(load32(extra + 32 * p), _mm256_maddubs_epi16(low, load32(x + 64 * p)));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(high, load32(x + 64 * p + 32)));
        const int32_t first = 0x01000100 + 0x04040404 * p, second = first + 0x02020202;  // bytes of the two scales
        const __m256i which = _mm256_setr_epi32(first, first, first, first, second, second, second, second);
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_shuffle_epi8(scales, which)));
    }
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

#if !defined(__AVX2__) || defined(QUAMBA_VNNI)
inline Int4Sums eight_groups(Int4Sums acc, const int8_t *, const int8_t *, const uint8_t *, const int8_t *) { return acc; }
#endif

// sums[n] for weight rows n0 + n, n < 4; from `count` on they repeat the last.
template <int64_t HALF, typename X>
inline void int4_rows(const Int4 w, const X *x, int64_t n0, int64_t count, int32_t *sums) {
    Int4Sums acc[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
    int64_t at[4];
    alignas(16) int8_t buffer[4][LANES];
    for (int64_t n = 0; n < 4; ++n) at[n] = (n0 + (n < count ? n : count - 1)) * w.groups;
    const bool rounded = sizeof(X) == 2 || (sizeof(Code) == 1 && w.scale_is_float);
    const int8_t *extra = reinterpret_cast<const int8_t *>(x) + w.groups * 2 * HALF;
    int64_t g = 0;
    if constexpr (PAIRS && sizeof(X) == 1 && HALF == 16)
        for (; g + 8 <= w.groups; g += 8, x += 8 * 32, extra += 4 * 32)
#pragma GCC unroll 4
            for (int64_t n = 0; n < 4; ++n) {
                const uint8_t *packed = w.packed + (at[n] + g) * HALF;
                __builtin_prefetch(packed + INT4_AHEAD), __builtin_prefetch(packed + INT4_AHEAD + 64);
                acc[n] = eight_groups(acc[n], x, extra, packed, static_cast<const int8_t *>(w.scale) + at[n] + g);
            }
    for (; g < w.groups; ++g, x += 2 * HALF, extra += 32)
#pragma GCC unroll 4
        for (int64_t n = 0; n < 4; ++n) {
            const uint8_t *packed = w.packed + (at[n] + g) * HALF;
            __builtin_prefetch(packed + INT4_AHEAD);
            if constexpr (PAIRS && sizeof(X) == 1) {
                const int8_t scale = static_cast<const int8_t *>(w.scale)[at[n] + g];
                acc[n] = group_products<HALF>(acc[n], x, extra, packed, scale);
            } else {
                const int8_t *table = rounded ? w.rounded(at[n] + g, buffer[n]) : w.products(at[n] + g);
                acc[n] = group_products<HALF>(acc[n], x, packed, table);
            }
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

// x as `load_rows` leaves it; without dot products and for integer scales int8, in its place, and `extra` for each group.
inline void int4_row_x(const Int4 &w, const int8_t *x, int64_t inputs, void *out) {
#if defined(__AVX2__) && !defined(QUAMBA_VNNI)
    if (w.scale_is_float) return;
    const int64_t group = 2 * w.half, width = group * w.groups;
    auto *codes = static_cast<int8_t *>(out);
    std::memcpy(codes, x, static_cast<size_t>(inputs));
    std::memset(codes + inputs, 0, static_cast<size_t>(width - inputs));
    const int64_t paired = group == 32 ? w.groups / 8 * 8 * 32 : 0;  // inputs that `eight_groups` reads
    auto *extra = codes + width;
    for (int64_t k = 0; k < paired; k += 64) {
        int8_t middle[16];
        std::memcpy(middle, codes + k + 16, sizeof middle);
        std::memcpy(codes + k + 16, codes + k + 32, sizeof middle);
        std::memcpy(codes + k + 32, middle, sizeof middle);
    }
    for (int64_t k = 0, step; k < width; k += step, extra += 32) {
        step = k < paired ? 64 : group;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = k; i < k + step; i += 32)
            sum = _mm256_sub_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(8), load32(codes + i)));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(extra), sum);
    }
#else
    (void)w, (void)x, (void)inputs, (void)out;
#endif
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
