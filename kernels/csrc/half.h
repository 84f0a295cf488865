// Floats of 16 bits, and lanes of any kind. Conversions are exact, or round half to even.
#pragma once

#include "quamba_cpu.h"
#include "simd.h"

namespace {

typedef uint16_t vh __attribute__((vector_size(2 * QUAMBA_WIDTH)));

QUAMBA_INLINE float from_bits(uint32_t bits) {
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
}

QUAMBA_INLINE uint32_t to_bits(float value) {
    uint32_t r;
    std::memcpy(&r, &value, sizeof r);
    return r;
}

QUAMBA_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = to_bits(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

QUAMBA_INLINE uint16_t to_float16(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, most = bits & 0x7fffffff;
    if (most > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (most >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more: infinite
    if (most < 0x38800000)  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits
        return static_cast<uint16_t>(sign | (to_bits(from_bits(most) + 0.5f) - to_bits(0.5f)));
    const uint32_t rebased = most - 0x38000000;
    return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

// 16 bits at a time in the high (bfloat16) or low half of each lane.
template <int KIND>
QUAMBA_INLINE vf widen_half(vi bits) {
    if (KIND == QUAMBA_BFLOAT16) return (vf)(bits << 16);
    const vi most = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const vf scaled = (vf)(most << 13) * from_bits(0x77800000);  // times 2^112: right for all but infinities and NaN
    const vi special = (most >= 0x7c00) & 0x7f800000;
    return (vf)((vi)scaled | special | sign);
}

template <int KIND>
QUAMBA_INLINE F16 load_half(const uint16_t *p, int64_t count) {
    uint16_t some[LANES] = {};
    if (count < LANES) {
        for (int64_t i = 0; i < count; ++i) some[i] = p[i];
        p = some;
    }
    F16 r;
    for (int i = 0; i < PARTS; ++i) {
        vh bits;
        std::memcpy(&bits, p + i * WIDTH, sizeof bits);
        r.part[i] = widen_half<KIND>(__builtin_convertvector(bits, vi));
    }
    return r;
}

// `count` entries from p[offset] on, of any kind.
QUAMBA_INLINE F16 load_kind(const void *p, int64_t kind, int64_t offset, int64_t count) {
    switch (kind) {
    case QUAMBA_FLOAT16: return load_half<QUAMBA_FLOAT16>(static_cast<const uint16_t *>(p) + offset, count);
    case QUAMBA_BFLOAT16: return load_half<QUAMBA_BFLOAT16>(static_cast<const uint16_t *>(p) + offset, count);
    case QUAMBA_INT8: return load_integers(static_cast<const int8_t *>(p) + offset, count);
    default: return load(static_cast<const float *>(p) + offset, count);
    }
}

QUAMBA_INLINE void store_one(void *p, int64_t kind, int64_t at, float value) {
    switch (kind) {
    case QUAMBA_FLOAT16: static_cast<uint16_t *>(p)[at] = to_float16(value); break;
    case QUAMBA_BFLOAT16: static_cast<uint16_t *>(p)[at] = to_bfloat16(value); break;
    case QUAMBA_INT8: static_cast<int8_t *>(p)[at] = static_cast<int8_t>(value); break;
    default: static_cast<float *>(p)[at] = value;
    }
}

}  // namespace
