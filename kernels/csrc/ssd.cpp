// Mamba2's scan (arXiv 2405.21060, section 2, eq. 2), token after token: 16 channels of a head in the lanes.
//
// A channel's arithmetic is the same at every token and doesn't depend on its neighbours: the result doesn't depend on
// threads, nor on how a sequence is split over calls.
#include "elementary.h"
#include "ops.h"
#include "parallel.h"
#include "transpose.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // state updates that are worth a thread
constexpr int64_t AHEAD = 2;        // tokens to prefetch

// Real values of `count` entries from `offset` on, to `out`, whose room is a multiple of 16.
void real(const void *x, bool is_int8, int64_t offset, const float *scale, int64_t stride, int64_t first, int64_t count,
          float *out) {
    by_lanes(count, [&](int64_t n, int64_t lanes) QUAMBA_BODY {
        F16 v = load_any(x, is_int8, offset + n, lanes);
        if (is_int8) v = v * load_vector(scale, stride, first + n, lanes);
        store(out + n, v);
    });
}

// Channels p0 .. p0 + count of one head of one sequence.
void block(const quamba_ssd_args &a, int64_t b, int64_t head, int64_t p0, int64_t count) {
    const int64_t N = a.states, group = head / (a.heads / a.groups), channel = head * a.width + p0;
    alignas(64) float h[QUAMBA_MAX_STATE * LANES];
    alignas(64) float B[QUAMBA_MAX_STATE], C[QUAMBA_MAX_STATE];
    float *state = a.state ? a.state + ((b * a.heads + head) * a.width + p0) * N : nullptr;
    if (state)
        to_lanes(state, count, N, h);
    else
        std::memset(h, 0, static_cast<size_t>(N * LANES) * sizeof(float));
    const F16 zero = splat(0.0f), D = a.D_per_channel ? load(a.D + channel, count) : splat(a.D[head]);
    const F16 x_scale = a.x_is_int8 ? load_vector(a.x_scale, a.x_scale_stride, channel, count) : zero;
    const F16 A = splat(a.A[head] * LOG2E), dt_bias = splat(a.dt_bias[head]);
    const F16 dt_min = splat(static_cast<float>(a.dt_min)), dt_max = splat(static_cast<float>(a.dt_max));

    for (int64_t t = 0; t < a.length; ++t) {
        const int64_t x_at = b * a.x_batch_stride + t * a.x_token_stride + channel;
        if (t + AHEAD < a.length)
            __builtin_prefetch(static_cast<const char *>(a.x) + (x_at + AHEAD * a.x_token_stride) * (a.x_is_int8 ? 1 : 4));
        // 1. The token's inputs; a masked one has x = 0 and dt = 0.
        const bool masked = a.mask && !a.mask[b * a.length + t];
        F16 x = load_any(a.x, a.x_is_int8, x_at, count);
        if (a.x_is_int8) x = x * x_scale;
        F16 dt = softplus(splat(a.dt[b * a.dt_batch_stride + t * a.dt_token_stride + head]) + dt_bias);
        for (int i = 0; i < PARTS; ++i) dt.part[i] = smaller(dt_max.part[i], larger(dt_min.part[i], dt.part[i]));
        if (masked) x = dt = zero;
        const int64_t offset = group * N;
        real(a.B, a.B_is_int8, b * a.B_batch_stride + t * a.B_token_stride + offset, a.B_scale, a.B_scale_stride, offset, N, B);
        real(a.C, a.C_is_int8, b * a.C_batch_stride + t * a.C_token_stride + offset, a.C_scale, a.C_scale_stride, offset, N, C);
        // 2. Recur, h = exp(dt A) h + dt x B, and read out, y = C h.
        const F16 decay = exp2(dt * A), u = dt * x;
        F16 y = zero;
        for (int64_t n = 0; n < N; ++n) {
            const F16 now = decay * load(h + n * LANES) + u * splat(B[n]);
            store(h + n * LANES, now);
            y = y + now * splat(C[n]);
        }
        store(a.y + (b * a.length + t) * a.heads * a.width + channel, y + D * x, count);
    }
    if (state) from_lanes(h, count, N, state);
}

}  // namespace

int ssd(const quamba_ssd_args &a) {
    const int64_t blocks = (a.width + LANES - 1) / LANES, tasks = a.batch * a.heads * blocks;
    const int64_t threads = worthwhile(a.threads, a.batch * a.length * a.heads * a.width * a.states, GRAIN);
    return parallel_for(tasks, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t p0 = task % blocks * LANES, head = task / blocks, left = a.width - p0;
            block(a, head / a.heads, head % a.heads, p0, left < LANES ? left : LANES);
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
