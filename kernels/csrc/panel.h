// Products across a panel: weight rows packed in strips of STRIP outputs, [k / DEEP][STRIP][DEEP codes], so that the lanes are
// outputs. Packing pays when the panel meets enough rows of x.
#pragma once

#include "integer.h"
#include "transpose.h"

namespace {

constexpr int64_t STRIP = NP * ACROSS;
constexpr int64_t PIECE = 4 * DEEP;           // codes of a row that are packed at once
constexpr int64_t SLICE = STRIP * 4;          // bytes of a strip for DEEP inputs
static_assert(DEEP * sizeof(Code) == 4);

inline int64_t strip_bytes(int64_t width) { return (width + PIECE - 1) / PIECE * 4 * SLICE; }

// PIECE codes of a weight row, as the products want them.
QUAMBA_INLINE v4 piece(const int8_t *p) {
    typedef int8_t Bytes __attribute__((vector_size(PIECE)));
    typedef Code Codes __attribute__((vector_size(16)));
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    const Codes c = __builtin_convertvector(b, Codes);
    return (v4)(OFFSET ? c ^ static_cast<Code>(-128) : c);  // as bytes, + 128 turns the sign bit over
}

// 1 <= count rows of `width` codes, `stride` apart; the strip's other outputs repeat the last one. `piece`: 16 bytes of N codes.
template <int64_t N, typename Piece>
inline void pack(const int8_t *weight, int64_t stride, int64_t width, int64_t count, char *strip, const Piece &piece) {
    const int64_t whole = width / N * N;
    for (int64_t n = 0; n < STRIP; n += 4) {
        const int8_t *w[4];
        for (int64_t i = 0; i < 4; ++i) w[i] = weight + (n + i < count ? n + i : count - 1) * stride;
        char *to = strip + n * 4;
        v4 r[4];
        for (int64_t k = 0; k < whole; k += N) {
            for (int i = 0; i < 4; ++i) r[i] = piece(w[i] + k);
            transpose4(r);
            for (int i = 0; i < 4; ++i, to += SLICE) std::memcpy(to, &r[i], sizeof(v4));
        }
        if (whole == width) continue;
        for (int i = 0; i < 4; ++i) {
            int8_t tail[N] = {};
            std::memcpy(tail, w[i] + whole, static_cast<size_t>(width - whole));
            r[i] = piece(tail);
        }
        transpose4(r);
        for (int i = 0; i < 4; ++i, to += SLICE) std::memcpy(to, &r[i], sizeof(v4));
    }
}

inline void pack(const int8_t *weight, int64_t width, int64_t count, char *strip) {
    pack<PIECE>(weight, width, width, count, strip, [](const int8_t *p) QUAMBA_BODY { return piece(p); });
}

// sums[m * sums_stride + n] for M rows of x and a strip; x is zero from its width on, up to a multiple of PIECE.
template <int M>
inline void across(const Code *x, int64_t stride, const char *strip, int64_t width, int32_t *sums, int64_t sums_stride) {
    Wide acc[M][NP];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NP; ++v) acc[m][v] = zero();
    for (const char *end = strip + strip_bytes(width); strip < end; strip += SLICE, x += DEEP) {
        Wide w[NP];
#pragma GCC unroll 4
        for (int v = 0; v < NP; ++v) w[v] = load_bits(strip + v * static_cast<int64_t>(sizeof(Wide)));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Wide a = spread(x + m * stride);
#pragma GCC unroll 4
            for (int v = 0; v < NP; ++v) acc[m][v] = multiply_add(acc[m][v], a, w[v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NP; ++v) store_bits(sums + m * sums_stride + v * ACROSS, acc[m][v]);
}

}  // namespace
