// A row's int8 codes: with given scales, or with one that is found for it.
#pragma once

#include "quamba_cpu.h"
#include "simd.h"

namespace {

inline float largest(const float *x, int64_t width) {
    F16 most = splat(0.0f);
    vi unordered[PARTS] = {};  // a maximum drops NaN; the scale of a row that holds one is NaN
    by_lanes(width, [&](int64_t c, int64_t left) QUAMBA_BODY {
        const F16 v = load(x + c, left);
        for (int i = 0; i < PARTS; ++i) {
            most.part[i] = larger(most.part[i], (vf)((vi)v.part[i] & 0x7fffffff));
            unordered[i] |= (vi)(v.part[i] != v.part[i]);
        }
    });
    float lanes[LANES], r = 0.0f;
    store(lanes, most);
    for (float v : lanes) r = r > v ? r : v;
    for (const vi &part : unordered)
        for (size_t lane = 0; lane < sizeof(vi) / sizeof(int32_t); ++lane)
            if (part[lane]) return __builtin_nanf("");
    return r;
}

// `x`: what row m comes to before it is rounded.
inline void store_row(const quamba_rows_args &a, const float *x, int64_t m) {
    float found = 0.0f;
    if (!a.inv) {
        const float absmax = largest(x, a.width);
        found = 127.0f / (absmax < 1e-10f ? 1e-10f : absmax);
        a.scale[m] = absmax / 127.0f;
    }
    const float *inv = a.inv ? a.inv : &found;
    const int64_t stride = a.inv ? a.inv_stride : 0;
    by_lanes(a.width, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
        store_codes(a.codes + m * a.width + c, load(x + c, lanes), load_vector(inv, stride, c, lanes), lanes);
    });
}

}  // namespace
