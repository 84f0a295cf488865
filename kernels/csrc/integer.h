// Integer dot products, exact in int32 for all int8 codes. Two forms: along rows (both operands lie in memory as stored), and
// across a panel (the weight is packed so that lanes are outputs and x is spread over them).
//
// Without dot-product instructions codes become int16, since the 8-bit multiply of plain AVX2 saturates. VNNI multiplies
// unsigned by signed: it gets weight + 128, and 128 * sum(x) is taken away from the sums. Wrapping on the way does no harm.
#pragma once

#include "simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Each instruction set defines
//   Code: x in memory, as the products want it; OFFSET: what is added to the weights
//   Wide: a register; STEP: codes in one; ACROSS: int32 in one; DEEP: codes that meet in one int32
//   MR, NR: rows of x and of the weight in a tile along rows; MP, NP: rows of x and registers of weight in one across a panel
//   load_wide(x), widen(weight), multiply_add(sums, x, weight), store_sums(p, a, b, c, d): the total of each register

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define QUAMBA_VNNI

typedef int8_t Code;
constexpr int OFFSET = 128;
constexpr int64_t DEEP = 4;

#if defined(__AVX512VNNI__)
QUAMBA_INLINE __m256i dot(__m256i acc, __m256i u8, __m256i s8) { return _mm256_dpbusd_epi32(acc, u8, s8); }
#else
QUAMBA_INLINE __m256i dot(__m256i acc, __m256i u8, __m256i s8) { return _mm256_dpbusd_avx_epi32(acc, u8, s8); }
#endif

#elif defined(__ARM_FEATURE_DOTPROD)

typedef int8_t Code;
constexpr int OFFSET = 0;
constexpr int64_t DEEP = 4;

#else

typedef int16_t Code;
constexpr int OFFSET = 0;
constexpr int64_t DEEP = 2;

#endif

#if defined(__AVX2__)
QUAMBA_INLINE void store_sums(int32_t *p, __m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i r = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), r);
}
#endif

#if defined(__AVX512VNNI__)

typedef __m512i Wide;
constexpr int64_t STEP = 64, ACROSS = 16;
constexpr int64_t MR = 6, NR = 4, MP = 12, NP = 2;

QUAMBA_INLINE Wide zero() { return _mm512_setzero_si512(); }
QUAMBA_INLINE Wide plus(Wide a, Wide b) { return _mm512_add_epi32(a, b); }
QUAMBA_INLINE Wide load_bits(const void *p) { return _mm512_loadu_si512(p); }
QUAMBA_INLINE void store_bits(void *p, Wide a) { _mm512_storeu_si512(p, a); }
QUAMBA_INLINE Wide load_wide(const Code *p) { return load_bits(p); }
QUAMBA_INLINE Wide widen(const int8_t *p) { return _mm512_xor_si512(load_bits(p), _mm512_set1_epi8(-128)); }
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide x, Wide w) { return _mm512_dpbusd_epi32(acc, w, x); }
QUAMBA_INLINE __m256i halves(Wide a) {
    return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
}
QUAMBA_INLINE void store_sums(int32_t *p, Wide a, Wide b, Wide c, Wide d) {
    store_sums(p, halves(a), halves(b), halves(c), halves(d));
}
QUAMBA_INLINE Wide repeat(int32_t bits) { return _mm512_set1_epi32(bits); }

#elif defined(__AVX2__)

typedef __m256i Wide;
constexpr int64_t ACROSS = 8;
constexpr int64_t MR = 3, NR = 4, MP = 6, NP = 2;

QUAMBA_INLINE Wide zero() { return _mm256_setzero_si256(); }
QUAMBA_INLINE Wide plus(Wide a, Wide b) { return _mm256_add_epi32(a, b); }
QUAMBA_INLINE Wide load_bits(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
QUAMBA_INLINE void store_bits(void *p, Wide a) { _mm256_storeu_si256(static_cast<__m256i *>(p), a); }
QUAMBA_INLINE Wide load_wide(const Code *p) { return load_bits(p); }
QUAMBA_INLINE Wide repeat(int32_t bits) { return _mm256_set1_epi32(bits); }
#if defined(__AVXVNNI__)
constexpr int64_t STEP = 32;
QUAMBA_INLINE Wide widen(const int8_t *p) { return _mm256_xor_si256(load_bits(p), _mm256_set1_epi8(-128)); }
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide x, Wide w) { return dot(acc, w, x); }
#else
constexpr int64_t STEP = 16;
QUAMBA_INLINE Wide widen(const int8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide x, Wide w) { return _mm256_add_epi32(acc, _mm256_madd_epi16(x, w)); }
#endif

#elif defined(__SSE2__)

typedef __m128i Wide;
constexpr int64_t STEP = 8, ACROSS = 4;
constexpr int64_t MR = 3, NR = 4, MP = 6, NP = 2;

QUAMBA_INLINE Wide zero() { return _mm_setzero_si128(); }
QUAMBA_INLINE Wide plus(Wide a, Wide b) { return _mm_add_epi32(a, b); }
QUAMBA_INLINE Wide load_bits(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
QUAMBA_INLINE void store_bits(void *p, Wide a) { _mm_storeu_si128(static_cast<__m128i *>(p), a); }
QUAMBA_INLINE Wide load_wide(const Code *p) { return load_bits(p); }
QUAMBA_INLINE Wide widen(const int8_t *p) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8);
}
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide x, Wide w) { return _mm_add_epi32(acc, _mm_madd_epi16(x, w)); }
QUAMBA_INLINE void store_sums(int32_t *p, Wide a, Wide b, Wide c, Wide d) {
    const __m128i ab0 = _mm_unpacklo_epi32(a, b), ab1 = _mm_unpackhi_epi32(a, b);
    const __m128i cd0 = _mm_unpacklo_epi32(c, d), cd1 = _mm_unpackhi_epi32(c, d);
    const __m128i ab = _mm_add_epi32(ab0, ab1), cd = _mm_add_epi32(cd0, cd1);
    const __m128i r = _mm_add_epi32(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), r);
}
QUAMBA_INLINE Wide repeat(int32_t bits) { return _mm_set1_epi32(bits); }

#elif defined(__ARM_FEATURE_DOTPROD)

typedef int32x4_t Wide;
constexpr int64_t STEP = 16, ACROSS = 4;
constexpr int64_t MR = 4, NR = 4, MP = 6, NP = 4;

QUAMBA_INLINE Wide zero() { return vdupq_n_s32(0); }
QUAMBA_INLINE Wide plus(Wide a, Wide b) { return vaddq_s32(a, b); }
QUAMBA_INLINE Wide load_bits(const void *p) { return vreinterpretq_s32_s8(vld1q_s8(static_cast<const int8_t *>(p))); }
QUAMBA_INLINE void store_bits(void *p, Wide a) { vst1q_s8(static_cast<int8_t *>(p), vreinterpretq_s8_s32(a)); }
QUAMBA_INLINE Wide load_wide(const Code *p) { return load_bits(p); }
QUAMBA_INLINE Wide widen(const int8_t *p) { return load_bits(p); }
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide x, Wide w) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}
QUAMBA_INLINE void store_sums(int32_t *p, Wide a, Wide b, Wide c, Wide d) {
    const Wide r = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
    std::memcpy(p, &r, sizeof r);
}
QUAMBA_INLINE Wide repeat(int32_t bits) { return vdupq_n_s32(bits); }

#else

// Plain vectors: pairs of int16.
typedef int32_t Wide __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(8)));
typedef int16_t Pairs __attribute__((vector_size(16)));
constexpr int64_t STEP = 8, ACROSS = 4;
constexpr int64_t MR = 3, NR = 4, MP = 4, NP = 2;

QUAMBA_INLINE Wide zero() { return Wide{}; }
QUAMBA_INLINE Wide plus(Wide a, Wide b) { return a + b; }
QUAMBA_INLINE Wide load_bits(const void *p) {
    Wide r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
QUAMBA_INLINE void store_bits(void *p, Wide a) { std::memcpy(p, &a, sizeof a); }
QUAMBA_INLINE Wide load_wide(const Code *p) { return load_bits(p); }
QUAMBA_INLINE Wide widen(const int8_t *p) {
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    return (Wide)__builtin_convertvector(b, Pairs);
}
QUAMBA_INLINE Wide multiply_add(Wide acc, Wide x, Wide w) {
#if defined(__aarch64__)
    const int16x8_t a = (int16x8_t)x, b = (int16x8_t)w;
    return acc + (Wide)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
#else
    return acc + (x >> 16) * (w >> 16) + (x << 16 >> 16) * (w << 16 >> 16);
#endif
}
QUAMBA_INLINE void store_sums(int32_t *p, Wide a, Wide b, Wide c, Wide d) {
    const Wide all[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) p[i] = all[i][0] + all[i][1] + all[i][2] + all[i][3];
}
QUAMBA_INLINE Wide repeat(int32_t bits) { return Wide{} + bits; }

#endif

// DEEP codes, in every int32.
QUAMBA_INLINE Wide spread(const Code *p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return repeat(bits);
}

// A barrier to reordering, no instruction.
#if defined(QUAMBA_EMULATED)
QUAMBA_INLINE void keep(Wide &) {}
#elif defined(__AVX512VNNI__)
QUAMBA_INLINE void keep(Wide &a) { asm volatile("" : "+v"(a)); }
#elif defined(__SSE2__)
QUAMBA_INLINE void keep(Wide &a) { asm volatile("" : "+x"(a)); }
#elif defined(__aarch64__)
QUAMBA_INLINE void keep(Wide &a) { asm volatile("" : "+w"(a)); }
#else
QUAMBA_INLINE void keep(Wide &) {}
#endif

}  // namespace
