// Mamba2's RMSNorm with its gate, group by group.
#include "elementary.h"
#include "ops.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // elements that are worth a thread

// Channels c0 .. c0 + count of row m, one group. y holds the gate or the gated input until the mean is known.
void group(const quamba_gated_norm_args &a, int64_t m, int64_t c0, int64_t count) {
    const float *x = a.x + m * a.x_row_stride + c0;
    float *y = a.y + m * a.width + c0;
    F16 squares = splat(0.0f);
    by_lanes(count, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
        F16 z = load_any(a.z, a.z_is_int8, m * a.z_row_stride + c0 + c, lanes), v = load(x + c, lanes);
        if (a.z_is_int8) z = z * load_vector(a.z_scale, a.z_scale_stride, c0 + c, lanes);
        const F16 gate = silu(z), gated = v * gate;
        if (!a.norm_before_gate) v = gated;
        squares = squares + v * v;
        store(y + c, a.norm_before_gate ? gate : gated, lanes);
    });
    if (!a.weight) return;
    const float mean = sum(squares) / static_cast<float>(count);
    const F16 r = splat(1.0f / __builtin_sqrtf(mean + static_cast<float>(a.eps)));
    by_lanes(count, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
        const F16 held = load(y + c, lanes), weight = load(a.weight + c0 + c, lanes);
        store(y + c, a.norm_before_gate ? load(x + c, lanes) * r * weight * held : held * r * weight, lanes);
    });
}

}  // namespace

int gated_norm(const quamba_gated_norm_args &a) {
    const int64_t threads = worthwhile(a.threads, a.rows * a.width, GRAIN), size = a.width / a.groups;
    return parallel_for(a.rows * a.groups, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t task = begin; task < end; ++task) group(a, task / a.groups, task % a.groups * size, size);
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
