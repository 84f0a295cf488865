// int4 weights to int8: for each group a table of its 16 possible results, then one lookup a code.
#pragma once

#include "quamba_cpu.h"
#include "simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// of[m][q]: the multiplier m times the code q, both as the bits that stand in memory.
struct Products {
    alignas(16) int8_t of[256][16];
    constexpr Products() : of() {
        for (int m = 0; m < 256; ++m)
            for (int q = 0; q < 16; ++q)
                of[m][q] = static_cast<int8_t>((m < 128 ? m : m - 256) * (q < 8 ? q : q - 16));
    }
};
constexpr Products PRODUCTS;

// 16 bytes to the results for their low and for their high halves.
#if defined(__AVX2__)
QUAMBA_INLINE void look_up(const int8_t *table, const uint8_t *packed, __m128i *low, __m128i *high) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table)), mask = _mm_set1_epi8(15);
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i *>(packed));
    *low = _mm_shuffle_epi8(t, _mm_and_si128(both, mask));
    *high = _mm_shuffle_epi8(t, _mm_and_si128(_mm_srli_epi16(both, 4), mask));
}

QUAMBA_INLINE void look_up(const int8_t *table, const uint8_t *packed, int8_t *low, int8_t *high) {
    __m128i l, h;
    look_up(table, packed, &l, &h);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(low), l);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(high), h);
}
#elif defined(__aarch64__)
QUAMBA_INLINE void look_up(const int8_t *table, const uint8_t *packed, int8x16_t *low, int8x16_t *high) {
    const int8x16_t t = vld1q_s8(table);
    const uint8x16_t both = vld1q_u8(packed);
    *low = vqtbl1q_s8(t, vandq_u8(both, vdupq_n_u8(15)));
    *high = vqtbl1q_s8(t, vshrq_n_u8(both, 4));
}

QUAMBA_INLINE void look_up(const int8_t *table, const uint8_t *packed, int8_t *low, int8_t *high) {
    int8x16_t l, h;
    look_up(table, packed, &l, &h);
    vst1q_s8(low, l);
    vst1q_s8(high, h);
}
#else
QUAMBA_INLINE void look_up(const int8_t *table, const uint8_t *packed, int8_t *low, int8_t *high) {
    for (int64_t j = 0; j < LANES; ++j) low[j] = table[packed[j] & 15], high[j] = table[packed[j] >> 4];
}
#endif

// A packed weight. By value, or each byte written could change it as far as the compiler knows.
struct Int4 {
    const uint8_t *packed;
    const void *scale;
    bool scale_is_float;
    int64_t half, groups;  // bytes in a group, groups in a row

    explicit Int4(const quamba_linear_args &a)
        : packed(static_cast<const uint8_t *>(a.weight)), scale(a.group_scale), scale_is_float(a.group_scale_is_float),
          half(a.group / 2), groups(a.group ? (a.inputs + a.group - 1) / a.group : 0) {}

    // The results of group `at` (row * groups + group) for the 16 codes, in the order of their bits: times an int8 scale;
    // times a float scale and rounded, into `buffer` of 16 bytes.
    QUAMBA_INLINE const int8_t *products(int64_t at) const {
        return PRODUCTS.of[static_cast<const uint8_t *>(scale)[at]];
    }
    QUAMBA_INLINE const int8_t *rounded(int64_t at, int8_t *buffer) const {
        const float g = static_cast<const float *>(scale)[at];
#if defined(__AVX2__)
        // Rounds half to even, saturates while packing; the order makes up for packing within halves of registers.
        const __m256 a = _mm256_setr_ps(0, 1, 2, 3, -8, -7, -6, -5), b = _mm256_setr_ps(4, 5, 6, 7, -4, -3, -2, -1);
        const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a, _mm256_set1_ps(g))),
                                                 _mm256_cvtps_epi32(_mm256_mul_ps(b, _mm256_set1_ps(g))));
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(buffer), bytes);
#else
        const float codes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
        store_codes(buffer, load(codes), splat(g), LANES);
#endif
        return buffer;
    }
};

// Row n with its padding; `plain`: without the group scales.
inline void expand_row(const Int4 w, int64_t n, bool plain, int8_t *out) {
    const uint8_t *packed = w.packed + n * w.groups * w.half;
    alignas(16) int8_t buffer[LANES];
    for (int64_t g = 0; g < w.groups; ++g, packed += w.half, out += 2 * w.half) {
        const int64_t at = n * w.groups + g;
        const int8_t *table = plain ? PRODUCTS.of[1] : w.scale_is_float ? w.rounded(at, buffer) : w.products(at);
        for (int64_t j = 0; j < w.half; j += LANES) look_up(table, packed + j, out + j, out + w.half + j);
    }
}

}  // namespace
