// Many rows of x times int4 weights with integer group scales, for plain AVX2: 8-bit multiplications, which int8 weights
// would overflow. x + 128 is at most 255 and a code at most 8 in magnitude, so that eight steps of two products fit int16;
// they are then multiplied by the group's scale and widened at once. 128 times the sum of the results is taken away.
#pragma once

#include "int4.h"
#include "panel.h"

namespace {

#if defined(__AVX2__) && !defined(QUAMBA_VNNI)

constexpr bool INT4_PANEL = true;
constexpr int64_t FITTING = 32;  // inputs whose products int16 can sum, in pairs

// A strip: what to take away, int32 [STRIP]; then for each group its scales, int32 [STRIP] with int16 twice, and its codes,
// [group / 4][STRIP][4].
inline int64_t int4_strip_bytes(int64_t groups, int64_t group) { return STRIP * (4 + groups * (4 + group)); }

// x as the products want it, zeros up to the weight's width.
inline void int4_panel_x(const int8_t *x, int64_t rows, int64_t inputs, int64_t width, uint8_t *out) {
    for (int64_t m = 0; m < rows; ++m, x += inputs, out += width) {
        for (int64_t k = 0; k < inputs; ++k) out[k] = static_cast<uint8_t>(x[k] ^ -128);
        std::memset(out + inputs, 128, static_cast<size_t>(width - inputs));
    }
}

// Weight rows n0 .. n0 + count, 1 <= count; `codes`: room for STRIP rows.
inline void pack_int4(const Int4 &w, int64_t n0, int64_t count, int8_t *codes, char *strip) {
    const int64_t group = 2 * w.half, width = w.groups * group, left = count < STRIP ? count : STRIP;
    const auto *scale = static_cast<const int8_t *>(w.scale);
    auto *extra = reinterpret_cast<uint32_t *>(strip);
    strip += SLICE;
    for (int64_t n = 0; n < left; ++n) expand_row(w, n0 + n, true, codes + n * width);
    for (int64_t n = 0; n < STRIP; ++n) extra[n] = 0;
    for (int64_t g = 0; g < w.groups; ++g, strip += STRIP * (4 + group)) {
        auto *scales = reinterpret_cast<int16_t *>(strip);
        for (int64_t n = 0; n < STRIP; ++n) {
            const int64_t row = n < left ? n : left - 1;
            const int8_t *c = codes + row * width + g * group, m = scale[(n0 + row) * w.groups + g];
            int32_t sum = 0;
            for (int64_t k = 0; k < group; ++k) sum += c[k];
            extra[n] += static_cast<uint32_t>(128 * m) * static_cast<uint32_t>(sum);
            scales[2 * n] = scales[2 * n + 1] = m;
        }
        pack<16>(codes + g * group, width, group, left, strip + SLICE, [](const int8_t *p) QUAMBA_BODY {
            v4 r;
            std::memcpy(&r, p, sizeof r);
            return r;
        });
    }
}

// sums[m * sums_stride + n] for M rows of x and a strip.
template <int M>
inline void across_int4(const uint8_t *x, int64_t width, const char *strip, int64_t groups, int64_t group, int32_t *sums,
                        int64_t sums_stride) {
    static_assert(NP == 2);
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < NP; ++v)
            store_bits(sums + m * sums_stride + v * ACROSS, _mm256_sub_epi32(zero(), load_bits(strip + v * 32)));
    strip += SLICE;
    for (int64_t g = 0; g < groups; ++g) {
        const char *codes = strip + SLICE;
        for (int64_t k0 = 0; k0 < group; k0 += FITTING, x += FITTING) {
            Wide acc[M][NP];
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
            for (int64_t k = 0; k < FITTING; k += 4, codes += SLICE) {
                const Wide w0 = load_bits(codes), w1 = load_bits(codes + 32);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) {
                    int32_t bits;
                    std::memcpy(&bits, x + m * width + k, sizeof bits);
                    const Wide a = repeat(bits), p0 = _mm256_maddubs_epi16(a, w0), p1 = _mm256_maddubs_epi16(a, w1);
                    acc[m][0] = _mm256_add_epi16(acc[m][0], p0);
                    acc[m][1] = _mm256_add_epi16(acc[m][1], p1);
                    keep(acc[m][0]), keep(acc[m][1]);  // in this order, or the compiler runs out of registers
                }
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
                for (int v = 0; v < NP; ++v) {
                    int32_t *to = sums + m * sums_stride + v * ACROSS;
                    const Wide scaled = _mm256_madd_epi16(acc[m][v], load_bits(strip + v * 32));
                    store_bits(to, plus(load_bits(to), scaled));
                }
        }
        strip = codes;
    }
}

#else

constexpr bool INT4_PANEL = false;
inline int64_t int4_strip_bytes(int64_t, int64_t) { return 0; }
inline void int4_panel_x(const int8_t *, int64_t, int64_t, int64_t, uint8_t *) {}
inline void pack_int4(const Int4 &, int64_t, int64_t, int8_t *, char *) {}
template <int M>
inline void across_int4(const uint8_t *, int64_t, const char *, int64_t, int64_t, int32_t *, int64_t) {}

#endif

}  // namespace
