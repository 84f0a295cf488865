/* The instructions of the AVX-512 and AVX-VNNI variants, written out lane by lane after Intel's Software Developer's Manual,
 * so that those variants' sources run on any machine with AVX2. Included ahead of a source with QUAMBA_EMULATED = 512 or 256. */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define EMULATED static inline __attribute__((always_inline, unused))

/* VPDPBUSD: four products of unsigned with signed bytes are added to each int32, without saturation. */
EMULATED void emulated_dot(int32_t *sums, const uint8_t *a, const int8_t *b, int count) {
    for (int i = 0; i < count; ++i) {
        uint32_t sum = (uint32_t)sums[i];
        for (int j = 0; j < 4; ++j) sum += (uint32_t)((int32_t)a[4 * i + j] * (int32_t)b[4 * i + j]);
        sums[i] = (int32_t)sum;
    }
}

EMULATED __m256i emulated_dot256(__m256i sums, __m256i a, __m256i b) {
    int32_t s[8];
    uint8_t u[32];
    int8_t v[32];
    memcpy(s, &sums, 32), memcpy(u, &a, 32), memcpy(v, &b, 32);
    emulated_dot(s, u, v, 8);
    memcpy(&sums, s, 32);
    return sums;
}
#undef _mm256_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_epi32 emulated_dot256
#define _mm256_dpbusd_avx_epi32 emulated_dot256

#if QUAMBA_EMULATED == 256
#define __AVXVNNI__ 1
#else
#define __AVX512F__ 1
#define __AVX512VNNI__ 1

EMULATED __m512i emulated_dot512(__m512i sums, __m512i a, __m512i b) {
    int32_t s[16];
    uint8_t u[64];
    int8_t v[64];
    memcpy(s, &sums, 64), memcpy(u, &a, 64), memcpy(v, &b, 64);
    emulated_dot(s, u, v, 16);
    memcpy(&sums, s, 64);
    return sums;
}
#define _mm512_dpbusd_epi32 emulated_dot512

EMULATED __m512i emulated_load512(const void *p) {
    __m512i r;
    memcpy(&r, p, 64);
    return r;
}
#define _mm512_loadu_si512 emulated_load512
#define _mm512_storeu_si512(p, a) \
    do {                          \
        const __m512i stored = a; \
        memcpy(p, &stored, 64);   \
    } while (0)

EMULATED __m512i emulated_all8(int8_t x) {
    __m512i r;
    memset(&r, (uint8_t)x, 64);
    return r;
}
EMULATED __m512i emulated_all32(int32_t x) {
    typedef int32_t Lanes __attribute__((vector_size(64)));
    return (__m512i)(x + (Lanes){});
}
#define _mm512_setzero_si512() emulated_all8(0)
#define _mm512_set1_epi8 emulated_all8
#define _mm512_set1_epi32 emulated_all32
#define _mm512_xor_si512(a, b) ((a) ^ (b))

EMULATED __m512i emulated_add(__m512i a, __m512i b) {
    typedef uint32_t Lanes __attribute__((vector_size(64)));
    return (__m512i)((Lanes)a + (Lanes)b);
}

EMULATED __m256i emulated_half(__m512i a, int which) {
    __m256i r;
    memcpy(&r, (const char *)&a + 32 * which, 32);
    return r;
}
#define _mm512_add_epi32 emulated_add
#define _mm512_castsi512_si256(a) emulated_half(a, 0)
#define _mm512_extracti64x4_epi64 emulated_half
#define _mm512_castps_si512(a) ((__m512i)(a))

/* VMAXPS, VMINPS: the second operand when the comparison fails, so for NaN and for equal zeros. */
EMULATED __m512 emulated_max(__m512 a, __m512 b) { return a > b ? a : b; }
EMULATED __m512 emulated_min(__m512 a, __m512 b) { return a < b ? a : b; }
#define _mm512_max_ps emulated_max
#define _mm512_min_ps emulated_min

/* VPMOVSXBD, VCVTDQ2PS, VPMOVDB: sign extension, conversion to float, the low byte of each int32. */
EMULATED __m512i emulated_widen(__m128i a) {
    int8_t bytes[16];
    int32_t lanes[16];
    __m512i r;
    memcpy(bytes, &a, 16);
    for (int i = 0; i < 16; ++i) lanes[i] = bytes[i];
    memcpy(&r, lanes, 64);
    return r;
}
EMULATED __m512 emulated_float(__m512i a) {
    int32_t lanes[16];
    __m512 r;
    memcpy(lanes, &a, 64);
    for (int i = 0; i < 16; ++i) r[i] = (float)lanes[i];
    return r;
}
EMULATED __m128i emulated_low_bytes(__m512i a) {
    uint8_t from[64], bytes[16];
    __m128i r;
    memcpy(from, &a, 64);
    for (int i = 0; i < 16; ++i) bytes[i] = from[4 * i];
    memcpy(&r, bytes, 16);
    return r;
}
#define _mm512_cvtepi8_epi32 emulated_widen
#define _mm512_cvtepi32_ps emulated_float
#define _mm512_cvtepi32_epi8 emulated_low_bytes
#endif
