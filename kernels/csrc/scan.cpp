// Mamba1's selective scan (arXiv 2312.00752, Algorithm 2): 16 channels in the lanes, token after token.
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
constexpr int64_t AHEAD = 2;        // tokens to prefetch: they lie pages apart, where the hardware doesn't guess

inline const char *at(const void *base, int64_t element, int64_t size) {
    return static_cast<const char *>(base) + element * size;
}

// Channels c0 .. c0 + count of one sequence.
void block(const quamba_scan_args &a, int64_t b, int64_t c0, int64_t count) {
    const int64_t N = a.states;
    // 1. Parameters and state, transposed to [N, 16]; A in units of log 2.
    alignas(64) float A[2 * QUAMBA_MAX_STATE * LANES];
    float *h = A + N * LANES;
    to_lanes(a.A + c0 * N, count, N, A);
    for (int64_t n = 0; n < N; ++n) store(A + n * LANES, load(A + n * LANES) * splat(LOG2E));
    float *state = a.state ? a.state + (b * a.channels + c0) * N : nullptr;
    if (state)
        to_lanes(state, count, N, h);
    else
        std::memset(h, 0, static_cast<size_t>(N * LANES) * sizeof(float));
    const F16 D = load(a.D + c0, count), dt_bias = load(a.dt_bias + c0, count), zero = splat(0.0f);
    const F16 u_scale = a.u_is_int8 ? load_vector(a.u_scale, a.u_scale_stride, c0, count) : zero;
    const F16 z_scale = a.z_is_int8 ? load_vector(a.z_scale, a.z_scale_stride, c0, count) : zero;

    for (int64_t t = 0; t < a.length; ++t) {
        // 2. The token's inputs.
        if (t + AHEAD < a.length) {
            const int64_t ahead = t + AHEAD;
            __builtin_prefetch(at(a.u, b * a.u_batch_stride + ahead * a.u_token_stride + c0, a.u_is_int8 ? 1 : 4));
            __builtin_prefetch(at(a.z, b * a.z_batch_stride + ahead * a.z_token_stride + c0, a.z_is_int8 ? 1 : 4));
            __builtin_prefetch(a.dt + b * a.dt_batch_stride + ahead * a.dt_token_stride + c0);
            __builtin_prefetch(a.y + (b * a.length + ahead) * a.channels + c0, 1);
        }
        F16 u = load_any(a.u, a.u_is_int8, b * a.u_batch_stride + t * a.u_token_stride + c0, count);
        F16 z = load_any(a.z, a.z_is_int8, b * a.z_batch_stride + t * a.z_token_stride + c0, count);
        if (a.u_is_int8) u = u * u_scale;
        if (a.z_is_int8) z = z * z_scale;
        F16 dt = softplus(load(a.dt + b * a.dt_batch_stride + t * a.dt_token_stride + c0, count) + dt_bias);
        if (a.mask && !a.mask[b * a.length + t]) u = dt = zero;
        const F16 dtu = dt * u;
        const float *B = a.B + b * a.B_batch_stride + t * a.B_token_stride;
        const float *C = a.C + b * a.C_batch_stride + t * a.C_token_stride;
        // 3. Recur, h = exp(dt A) h + dt B u, and read out, y = C h.
        F16 y = zero;
        for (int64_t n = 0; n < N; ++n) {
            const F16 now = exp2(dt * load(A + n * LANES)) * load(h + n * LANES) + dtu * splat(B[n]);
            store(h + n * LANES, now);
            y = y + now * splat(C[n]);
        }
        store(a.y + (b * a.length + t) * a.channels + c0, (y + D * u) * silu(z), count);
    }
    if (state) from_lanes(h, count, N, state);
}

}  // namespace

int scan(const quamba_scan_args &a) {
    const int64_t blocks = (a.channels + LANES - 1) / LANES;
    const int64_t threads = worthwhile(a.threads, a.batch * a.length * a.channels * a.states, GRAIN);
    return parallel_for(a.batch * blocks, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t c0 = task % blocks * LANES, left = a.channels - c0;
            block(a, task / blocks, c0, left < LANES ? left : LANES);
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
