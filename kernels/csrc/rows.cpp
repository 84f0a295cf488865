// Ops on rows of floats: quantization (static, or with a scale found for each row) and RMSNorm.
#include "elementary.h"
#include "ops.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread

template <typename Row>
int each_row(const quamba_rows_args &a, const Row &row) {
    return parallel_for(a.rows, worthwhile(a.threads, a.rows * a.width, GRAIN), [&](int64_t begin, int64_t end) -> int {
        for (int64_t m = begin; m < end; ++m) row(m, a.x + m * a.width);
        return QUAMBA_OK;
    });
}

void codes_of(const quamba_rows_args &a, const float *x, int64_t m, const float *inv, int64_t inv_stride) {
    by_lanes(a.width, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
        store_codes(a.codes + m * a.width + c, load(x + c, lanes), load_vector(inv, inv_stride, c, lanes), lanes);
    });
}

float largest(const float *x, int64_t width) {
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

}  // namespace

int quantize(const quamba_rows_args &a) {
    return each_row(a, [&](int64_t m, const float *x) {
        if (a.inv) return codes_of(a, x, m, a.inv, a.inv_stride);
        const float absmax = largest(x, a.width);
        const float inv = 127.0f / (absmax < 1e-10f ? 1e-10f : absmax);
        a.scale[m] = absmax / 127.0f;
        codes_of(a, x, m, &inv, 0);
    });
}

int rms_norm(const quamba_rows_args &a) {
    return each_row(a, [&](int64_t m, const float *x) {
        F16 squares = splat(0.0f);
        by_lanes(a.width, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
            const F16 v = load(x + c, lanes);
            squares = squares + v * v;
        });
        const float mean = sum(squares) / static_cast<float>(a.width);
        const F16 r = splat(1.0f / __builtin_sqrtf(mean + static_cast<float>(a.eps)));
        by_lanes(a.width, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
            const int64_t at = m * a.width + c;
            const F16 y = load(x + c, lanes) * r * load(a.weight + c, lanes);
            if (a.codes)
                store_codes(a.codes + at, y, load_vector(a.inv, a.inv_stride, c, lanes), lanes);
            else
                store(a.y + at, y, lanes);
        });
    });
}

void exp_array(const float *x, float *y, int64_t n) {
    by_lanes(n, [&](int64_t i, int64_t lanes) QUAMBA_BODY { store(y + i, exp(load(x + i, lanes)), lanes); });
}

void softplus_array(const float *x, float *y, int64_t n) {
    by_lanes(n, [&](int64_t i, int64_t lanes) QUAMBA_BODY { store(y + i, softplus(load(x + i, lanes)), lanes); });
}

void silu_array(const float *x, float *y, int64_t n) {
    by_lanes(n, [&](int64_t i, int64_t lanes) QUAMBA_BODY { store(y + i, silu(load(x + i, lanes)), lanes); });
}

}  // namespace quamba::QUAMBA_ISA
