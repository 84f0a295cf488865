// Products of int16 pairs summed into int32: exact for anything that was int8, unlike the 8-bit multiply of plain AVX2,
// which saturates. One step of a dot product takes STEP codes.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX2__)

constexpr int64_t STEP = 16;
typedef __m256i Wide;  // 16 int16, or 8 int32

QUAMBA_INLINE void keep(Wide &a) { asm volatile("" : "+x"(a)); }  // a barrier to reordering, no instruction
QUAMBA_INLINE Wide zero() { return _mm256_setzero_si256(); }
QUAMBA_INLINE Wide load_wide(const int16_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
QUAMBA_INLINE Wide widen(const int8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide a, Wide b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
QUAMBA_INLINE void store_sums(int32_t *p, Wide a, Wide b, Wide c, Wide d) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i r = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), r);
}

#elif defined(__SSE2__)

constexpr int64_t STEP = 8;
typedef __m128i Wide;

QUAMBA_INLINE void keep(Wide &a) { asm volatile("" : "+x"(a)); }
QUAMBA_INLINE Wide zero() { return _mm_setzero_si128(); }
QUAMBA_INLINE Wide load_wide(const int16_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
QUAMBA_INLINE Wide widen(const int8_t *p) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8);
}
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide a, Wide b) { return _mm_add_epi32(acc, _mm_madd_epi16(a, b)); }
QUAMBA_INLINE void store_sums(int32_t *p, Wide a, Wide b, Wide c, Wide d) {
    const __m128i ab0 = _mm_unpacklo_epi32(a, b), ab1 = _mm_unpackhi_epi32(a, b);
    const __m128i cd0 = _mm_unpacklo_epi32(c, d), cd1 = _mm_unpackhi_epi32(c, d);
    const __m128i ab = _mm_add_epi32(ab0, ab1), cd = _mm_add_epi32(cd0, cd1);
    const __m128i r = _mm_add_epi32(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), r);
}

#else

constexpr int64_t STEP = 8;
struct Wide {
    int32_t v[STEP];
};

QUAMBA_INLINE void keep(Wide &) {}
QUAMBA_INLINE Wide zero() { return Wide{}; }
template <typename T>
QUAMBA_INLINE Wide to_wide(const T *p) {
    Wide r;
    for (int i = 0; i < STEP; ++i) r.v[i] = p[i];
    return r;
}
QUAMBA_INLINE Wide load_wide(const int16_t *p) { return to_wide(p); }
QUAMBA_INLINE Wide widen(const int8_t *p) { return to_wide(p); }
QUAMBA_INLINE Wide multiply_add(Wide acc, const Wide &a, const Wide &b) {
    for (int i = 0; i < STEP; ++i) acc.v[i] += a.v[i] * b.v[i];
    return acc;
}
QUAMBA_INLINE int32_t total(const Wide &a) {
    int32_t r = 0;
    for (int i = 0; i < STEP; ++i) r += a.v[i];
    return r;
}
QUAMBA_INLINE void store_sums(int32_t *p, const Wide &a, const Wide &b, const Wide &c, const Wide &d) {
    p[0] = total(a), p[1] = total(b), p[2] = total(c), p[3] = total(d);
}

#endif

}  // namespace
