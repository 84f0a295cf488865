// [channels, width] in memory to [width, 16 lanes] and back.
#pragma once

#include "simd.h"

namespace {

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

#if defined(__clang__)
#define QUAMBA_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define QUAMBA_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, v4i{i, j, k, l})
#endif

QUAMBA_INLINE void transpose4(v4 r[4]) {
    const v4 a = QUAMBA_PICK(r[0], r[1], 0, 4, 1, 5), b = QUAMBA_PICK(r[0], r[1], 2, 6, 3, 7);
    const v4 c = QUAMBA_PICK(r[2], r[3], 0, 4, 1, 5), d = QUAMBA_PICK(r[2], r[3], 2, 6, 3, 7);
    r[0] = QUAMBA_PICK(a, c, 0, 1, 4, 5);
    r[1] = QUAMBA_PICK(a, c, 2, 3, 6, 7);
    r[2] = QUAMBA_PICK(b, d, 0, 1, 4, 5);
    r[3] = QUAMBA_PICK(b, d, 2, 3, 6, 7);
}
#undef QUAMBA_PICK

// 4 x 4 floats, rows `from_stride` apart, to rows `to_stride` apart.
QUAMBA_INLINE void transpose4(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    v4 r[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&r[i], from + i * from_stride, sizeof(v4));
    transpose4(r);
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &r[i], sizeof(v4));
}

// 16 x 16 bytes, rows `from_stride` apart, to rows of 16.
inline void transpose16(const int8_t *from, int64_t from_stride, int8_t *to) {
#if defined(__SSE2__)
    __m128i r[16], s[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i * from_stride));
    for (int stage = 0; stage < 4; ++stage) {  // each interleaves the first half of the rows with the second
        for (int i = 0; i < 8; ++i) s[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]), s[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        for (int i = 0; i < 16; ++i) r[i] = s[i];
    }
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i * 16), r[i]);
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[j * 16 + i] = from[i * from_stride + j];
#endif
}

// Lanes from `channels` on become 0.
inline void to_lanes(const float *from, int64_t channels, int64_t width, float *to) {
    const int64_t whole = channels == LANES ? width / 4 * 4 : 0;
    for (int64_t n = 0; n < whole; n += 4)
        for (int64_t c = 0; c < LANES; c += 4) transpose4(from + c * width + n, width, to + n * LANES + c, LANES);
    for (int64_t n = whole; n < width; ++n)
        for (int64_t c = 0; c < LANES; ++c) to[n * LANES + c] = c < channels ? from[c * width + n] : 0.0f;
}

inline void from_lanes(const float *from, int64_t channels, int64_t width, float *to) {
    const int64_t whole = channels == LANES ? width / 4 * 4 : 0;
    for (int64_t n = 0; n < whole; n += 4)
        for (int64_t c = 0; c < LANES; c += 4) transpose4(from + n * LANES + c, LANES, to + c * width + n, width);
    for (int64_t n = whole; n < width; ++n)
        for (int64_t c = 0; c < channels; ++c) to[c * width + n] = from[n * LANES + c];
}

}  // namespace
