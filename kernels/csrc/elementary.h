// exp2, exp, softplus and silu on 16 lanes. Their largest relative errors were measured against float64 on ten million points.
#pragma once

#include "simd.h"

namespace {

constexpr float LOG2E = 1.44269504088896341f;

// 2^n * p(f), |f| <= 1/2; `shifted` is n + ROUND, n in -127..128. p is minimax of degree 5 with p(0) = 1.
// 0 for n = -127, infinity for n = 128.
template <int K>
QUAMBA_INLINE F<K> power_of_two(const F<K> &shifted, const F<K> &f) {
    F<K> p = 0x1.5bba14p-10f * f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
    F<K> r;
    for (int i = 0; i < K * PARTS; ++i) {
        // ROUND's bits end in nine zeros, so the low bits of `shifted` are n in two's complement.
        const vi scale = ((vi)shifted.part[i] + 127) << 23;
        r.part[i] = p.part[i] * (vf)scale;
    }
    return r;
}

// 2^t: 0 below -126.5, infinity above 127.5, NaN stays NaN. Largest relative error 2.0e-7 on [-87, 88]. The scans call it with
// dt * (A log2 e), whose two roundings add at most 1.2e-7 |t| ln 2 to that.
template <int K>
QUAMBA_INLINE F<K> exp2(const F<K> &t) {
    const F<K> x = min(128.0f, max(-127.0f, t));
    const F<K> shifted = x + ROUND;
    return power_of_two(shifted, x - (shifted - ROUND));
}

// exp(x): n ln 2 is taken away in two steps, so that large |x| lose nothing. 0 below -87.7, infinity above 88.37.
// Largest relative error 2.1e-7 on [-87, 88].
template <int K>
QUAMBA_INLINE F<K> exp(const F<K> &t) {
    const F<K> x = min(88.8f, max(-88.0f, t));
    const F<K> shifted = x * LOG2E + ROUND;
    const F<K> n = shifted - ROUND;
    const F<K> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    return power_of_two(shifted, r * LOG2E);
}

// log(1 + e) for 0 <= e < 2^64: log of u = 1 + e = 2^k (1 + m), plus what rounding took from u.
template <int K>
QUAMBA_INLINE F<K> log1p(const F<K> &e) {
    const F<K> u = 1.0f + e;
    const F<K> lost = (e - (u - 1.0f)) / u;
    F<K> k, m;
    for (int i = 0; i < K * PARTS; ++i) {
        const vi bits = (vi)u.part[i] - 0x3f3504f3;  // sqrt(1/2): 1 + m lies in [sqrt(1/2), sqrt(2))
        k.part[i] = __builtin_convertvector(bits >> 23, vf);
        m.part[i] = (vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    }
    F<K> q = -0.07634497433900833f * m + 0.127615824341774f;
    q = q * m + -0.13160184025764465f;
    q = q * m + 0.14201757311820984f;
    q = q * m + -0.16623356938362122f;
    q = q * m + 0.20001226663589478f;
    q = q * m + -0.2500081956386566f;
    q = q * m + 0.3333333134651184f;
    const F<K> m2 = m * m;
    F<K> r = q * m * m2 + (k * -2.12194440e-4f + lost);  // ln 2 = 0.693359375 - 2.1219444e-4
    r = r - 0.5f * m2;
    return (m + r) + k * 0.693359375f;
}

// log(1 + exp(x)), x itself above 20. Largest relative error 2.3e-7 on [-87, 100].
template <int K>
QUAMBA_INLINE F<K> softplus(const F<K> &x) {
    const F<K> soft = log1p(exp(min(20.0f, x)));
    F<K> r;
    for (int i = 0; i < K * PARTS; ++i) r.part[i] = x.part[i] > 20.0f ? x.part[i] : soft.part[i];
    return r;
}

// x / (1 + exp(-x)). Largest relative error 2.5e-7 on [-87, 88].
template <int K>
QUAMBA_INLINE F<K> silu(const F<K> &x) {
    return x / (1.0f + exp(0.0f - x));
}

}  // namespace
