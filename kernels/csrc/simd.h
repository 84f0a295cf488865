// Sixteen float lanes on every instruction set, in as many registers as it takes.
//
// Lane arithmetic is plain IEEE (no fused multiply-add), sums run over 16 lanes whatever the register width: all variants
// give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define QUAMBA_WIDTH 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define QUAMBA_WIDTH 8
#elif defined(__SSE2__)
#include <emmintrin.h>
#define QUAMBA_WIDTH 4
#else
#define QUAMBA_WIDTH 4
#endif

#define QUAMBA_INLINE inline __attribute__((always_inline))
#define QUAMBA_BODY __attribute__((always_inline))  // of a lambda

namespace {

typedef float vf __attribute__((vector_size(4 * QUAMBA_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * QUAMBA_WIDTH)));
typedef float vf_anywhere __attribute__((vector_size(4 * QUAMBA_WIDTH), aligned(1), may_alias));

constexpr int64_t LANES = 16;
constexpr int WIDTH = QUAMBA_WIDTH;
constexpr int PARTS = 16 / QUAMBA_WIDTH;

// K times sixteen lanes: long chains of arithmetic run K side by side, or each waits for its own results.
template <int K>
struct F {
    vf part[K * PARTS];
};
typedef F<1> F16;
constexpr int SIDE = PARTS < 4 ? 4 / PARTS : 1;  // the K that keeps the registers busy

#define QUAMBA_LANEWISE(op)                                                          \
    template <int K>                                                                 \
    QUAMBA_INLINE F<K> operator op(const F<K> &a, const F<K> &b) {                   \
        F<K> r;                                                                      \
        for (int i = 0; i < K * PARTS; ++i) r.part[i] = a.part[i] op b.part[i];      \
        return r;                                                                    \
    }                                                                                \
    template <int K>                                                                 \
    QUAMBA_INLINE F<K> operator op(const F<K> &a, float b) {                         \
        F<K> r;                                                                      \
        for (int i = 0; i < K * PARTS; ++i) r.part[i] = a.part[i] op b;              \
        return r;                                                                    \
    }                                                                                \
    template <int K>                                                                 \
    QUAMBA_INLINE F<K> operator op(float a, const F<K> &b) {                         \
        F<K> r;                                                                      \
        for (int i = 0; i < K * PARTS; ++i) r.part[i] = a op b.part[i];              \
        return r;                                                                    \
    }
QUAMBA_LANEWISE(+)
QUAMBA_LANEWISE(-)
QUAMBA_LANEWISE(*)
QUAMBA_LANEWISE(/)
#undef QUAMBA_LANEWISE

template <int K = 1>
QUAMBA_INLINE F<K> splat(float value) {
    F<K> r;
    for (vf &part : r.part) part = value - vf{};
    return r;
}

template <int K>
QUAMBA_INLINE F<K> repeat(const F16 &a) {
    F<K> r;
    for (int i = 0; i < K * PARTS; ++i) r.part[i] = a.part[i % PARTS];
    return r;
}

// Register by register: a memcpy of the whole may go through memory in smaller pieces.
template <int K = 1>
QUAMBA_INLINE F<K> load(const float *p) {
    F<K> r;
    for (int i = 0; i < K * PARTS; ++i) r.part[i] = *reinterpret_cast<const vf_anywhere *>(p + i * WIDTH);
    return r;
}

template <int K>
QUAMBA_INLINE void store(float *p, const F<K> &a) {
    for (int i = 0; i < K * PARTS; ++i) *reinterpret_cast<vf_anywhere *>(p + i * WIDTH) = a.part[i];
}

// `count` < 16 lanes; the others read as 0 and aren't written.
QUAMBA_INLINE F16 load(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}

QUAMBA_INLINE void store(float *p, const F16 &a, int64_t count) {
    if (count >= LANES) return store(p, a);
    float lanes[LANES];
    store(lanes, a);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

template <typename T>
QUAMBA_INLINE F16 load_integers(const T *p, int64_t count) {
    T in[LANES] = {};
    if (count >= LANES)
        std::memcpy(in, p, sizeof in);
    else
        for (int64_t i = 0; i < count; ++i) in[i] = p[i];
    float lanes[LANES];
    for (int64_t i = 0; i < LANES; ++i) lanes[i] = static_cast<float>(in[i]);
    return load(lanes);
}

QUAMBA_INLINE F16 load_integers(const int8_t *p, int64_t count) {
    int8_t lanes[LANES] = {};
    if (count < LANES) {
        for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
        p = lanes;
    }
#if defined(__SSE2__)
    F16 r;
#if defined(__AVX512F__)
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    r.part[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(all));
#elif defined(__AVX2__)
    for (int i = 0; i < PARTS; ++i) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + i * WIDTH));
        r.part[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
#else
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    const __m128i two[2] = {_mm_unpacklo_epi8(all, all), _mm_unpackhi_epi8(all, all)};
    for (int i = 0; i < PARTS; ++i) {
        const __m128i w = two[i / 2];
        r.part[i] = _mm_cvtepi32_ps(_mm_srai_epi32(i % 2 ? _mm_unpackhi_epi16(w, w) : _mm_unpacklo_epi16(w, w), 24));
    }
#endif
    return r;
#else
    return load_integers<int8_t>(p, LANES);
#endif
}

QUAMBA_INLINE F16 load_any(const void *p, bool is_int8, int64_t offset, int64_t count) {
    return is_int8 ? load_integers(static_cast<const int8_t *>(p) + offset, count)
                   : load(static_cast<const float *>(p) + offset, count);
}

// One value a channel, or (stride 0) one value for all.
QUAMBA_INLINE F16 load_vector(const float *p, int64_t stride, int64_t offset, int64_t count) {
    return stride == 0 ? splat(p[0]) : load(p + offset, count);
}

#if defined(__AVX512F__)
QUAMBA_INLINE vf larger(vf a, vf b) { return _mm512_max_ps(a, b); }
QUAMBA_INLINE vf smaller(vf a, vf b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
QUAMBA_INLINE vf larger(vf a, vf b) { return _mm256_max_ps(a, b); }
QUAMBA_INLINE vf smaller(vf a, vf b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
QUAMBA_INLINE vf larger(vf a, vf b) { return _mm_max_ps(a, b); }
QUAMBA_INLINE vf smaller(vf a, vf b) { return _mm_min_ps(a, b); }
#else
QUAMBA_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
QUAMBA_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
#endif

// NaN in the second argument comes back.
template <int K>
QUAMBA_INLINE F<K> max(float bound, const F<K> &a) {
    F<K> r;
    for (int i = 0; i < K * PARTS; ++i) r.part[i] = larger(bound - vf{}, a.part[i]);
    return r;
}

template <int K>
QUAMBA_INLINE F<K> min(float bound, const F<K> &a) {
    F<K> r;
    for (int i = 0; i < K * PARTS; ++i) r.part[i] = smaller(bound - vf{}, a.part[i]);
    return r;
}

// Sum of the lanes, halving: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
QUAMBA_INLINE float sum(const F16 &a) {
    float lanes[LANES];
    store(lanes, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even

// int8 codes of real * inv; NaN gives 0.
QUAMBA_INLINE void store_codes(int8_t *p, const F16 &real, const F16 &inv, int64_t count) {
    const F16 r = min(127.0f, max(-128.0f, real * inv)) + splat(ROUND);  // the code stands in the low byte
    alignas(16) int8_t codes[LANES];
#if defined(__AVX512F__)
    const __m128i all = _mm512_cvtepi32_epi8(_mm512_castps_si512(r.part[0]));
    std::memcpy(codes, &all, sizeof codes);
#elif defined(__SSE2__)
    __m128i bits[4];
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX2__)
        const __m256i two = _mm256_castps_si256(r.part[i / 2]);
        bits[i] = i % 2 ? _mm256_extracti128_si256(two, 1) : _mm256_castsi256_si128(two);
#else
        bits[i] = _mm_castps_si128(r.part[i]);
#endif
        bits[i] = _mm_and_si128(bits[i], _mm_set1_epi32(0xff));
    }
    const __m128i low = _mm_packs_epi32(bits[0], bits[1]), high = _mm_packs_epi32(bits[2], bits[3]);
    const __m128i all = _mm_packus_epi16(low, high);
    std::memcpy(codes, &all, sizeof codes);
#else
    int32_t bits[LANES];
    std::memcpy(bits, &r, sizeof bits);
    for (int64_t i = 0; i < LANES; ++i) codes[i] = static_cast<int8_t>(bits[i]);
#endif
    if (count >= LANES)
        std::memcpy(p, codes, LANES);
    else
        for (int64_t i = 0; i < count; ++i) p[i] = codes[i];
}

// Calls body(index, lanes) for 16 entries at a time, and once for what is left.
template <typename Body>
QUAMBA_INLINE void by_lanes(int64_t n, const Body &body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, LANES);
    if (i < n) body(i, n - i);
}

}  // namespace
