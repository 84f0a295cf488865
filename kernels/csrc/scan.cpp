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
constexpr int64_t BLOCK = 64;       // channels a task: whole lines of the inputs, which lie pages apart from token to token
constexpr int64_t TOKENS = 8;       // whose inputs are read at once

// What a task keeps of its channels. For 16 of them at a time: A [N, 16] in units of log 2, then states [N, 16]; then
// exp(dt A) of a token. Inputs [TOKENS, BLOCK].
struct Work {
    float *lanes, *decay;
    alignas(64) float u[TOKENS * BLOCK] = {}, dt[TOKENS * BLOCK] = {}, gate[TOKENS * BLOCK] = {};
};

inline const char *at(const void *base, int64_t element, int64_t size) {
    return static_cast<const char *>(base) + element * size;
}

void read(const quamba_scan_args &a, int64_t b, int64_t t0, int64_t tokens, int64_t c0, int64_t count, Work &w) {
    for (int64_t i = 0; i < tokens; ++i) {
        const int64_t t = t0 + i, ahead = t + TOKENS;
        const int64_t u_at = b * a.u_batch_stride + c0, z_at = b * a.z_batch_stride + c0, dt_at = b * a.dt_batch_stride + c0;
        if (ahead < a.length) {
            __builtin_prefetch(at(a.u, u_at + ahead * a.u_token_stride, a.u_is_int8 ? 1 : 4));
            __builtin_prefetch(at(a.z, z_at + ahead * a.z_token_stride, a.z_is_int8 ? 1 : 4));
            for (int64_t c = 0; c < count; c += LANES) __builtin_prefetch(a.dt + dt_at + ahead * a.dt_token_stride + c);
        }
        const bool masked = a.mask && !a.mask[b * a.length + t];
        by_lanes(count, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
            F16 u = load_any(a.u, a.u_is_int8, u_at + t * a.u_token_stride + c, lanes);
            F16 z = load_any(a.z, a.z_is_int8, z_at + t * a.z_token_stride + c, lanes);
            if (a.u_is_int8) u = u * load_vector(a.u_scale, a.u_scale_stride, c0 + c, lanes);
            if (a.z_is_int8) z = z * load_vector(a.z_scale, a.z_scale_stride, c0 + c, lanes);
            store(w.u + i * BLOCK + c, masked ? splat(0.0f) : u);
            store(w.gate + i * BLOCK + c, z);
            store(w.dt + i * BLOCK + c, load(a.dt + dt_at + t * a.dt_token_stride + c, lanes) + load(a.dt_bias + c0 + c, lanes));
        });
        for (int64_t c = 0; c < BLOCK; c += SIDE * LANES) {
            float *gate = w.gate + i * BLOCK + c, *dt = w.dt + i * BLOCK + c;
            store(gate, silu(load<SIDE>(gate)));
            store(dt, masked ? splat<SIDE>(0.0f) : softplus(load<SIDE>(dt)));
        }
    }
}

// Sixteen channels, a token: h = exp(dt A) h + dt B u; returns y = C h.
QUAMBA_INLINE F16 recur(const F16 &u, const F16 &dt, float *lanes, float *decay, const float *B, const float *C,
                        int64_t N) {
    const float *A = lanes;
    float *h = lanes + N * LANES;
    const F16 dtu = dt * u;
    F16 y = splat(0.0f);
    int64_t n = 0;
    for (; n + SIDE <= N; n += SIDE) store(decay + n * LANES, exp2(repeat<SIDE>(dt) * load<SIDE>(A + n * LANES)));
    for (; n < N; ++n) store(decay + n * LANES, exp2(dt * load(A + n * LANES)));
    for (n = 0; n < N; ++n) {
        const F16 now = load(decay + n * LANES) * load(h + n * LANES) + dtu * B[n];
        store(h + n * LANES, now);
        y = y + now * C[n];
    }
    return y;
}

// Channels c0 .. c0 + count of one sequence.
void block(const quamba_scan_args &a, int64_t b, int64_t c0, int64_t count, Work &w) {
    const int64_t N = a.states;
    float *state = a.state ? a.state + (b * a.channels + c0) * N : nullptr;
    by_lanes(count, [&](int64_t c, int64_t lanes) {
        float *A = w.lanes + 2 * c * N, *h = A + N * LANES;
        to_lanes(a.A + (c0 + c) * N, lanes, N, A);
        for (int64_t n = 0; n < N; ++n) store(A + n * LANES, load(A + n * LANES) * LOG2E);
        if (state)
            to_lanes(state + c * N, lanes, N, h);
        else
            std::memset(h, 0, static_cast<size_t>(N * LANES) * sizeof(float));
    });

    for (int64_t t0 = 0; t0 < a.length; t0 += TOKENS) {
        const int64_t tokens = a.length - t0 < TOKENS ? a.length - t0 : TOKENS;
        read(a, b, t0, tokens, c0, count, w);
        by_lanes(count, [&](int64_t c, int64_t lanes) {
            const F16 D = load(a.D + c0 + c, lanes);
            for (int64_t i = 0; i < tokens; ++i) {
                const int64_t t = t0 + i;
                const float *B = a.B + b * a.B_batch_stride + t * a.B_token_stride;
                const float *C = a.C + b * a.C_batch_stride + t * a.C_token_stride;
                const F16 u = load(w.u + i * BLOCK + c), dt = load(w.dt + i * BLOCK + c);
                const F16 y = recur(u, dt, w.lanes + 2 * c * N, w.decay, B, C, N);
                store(a.y + (b * a.length + t) * a.channels + c0 + c, (y + D * u) * load(w.gate + i * BLOCK + c), lanes);
            }
        });
    }
    if (!state) return;
    by_lanes(count, [&](int64_t c, int64_t lanes) { from_lanes(w.lanes + (2 * c + LANES) * N, lanes, N, state + c * N); });
}

}  // namespace

int scan(const quamba_scan_args &a) {
    const int64_t blocks = (a.channels + BLOCK - 1) / BLOCK;
    const int64_t threads = worthwhile(a.threads, a.batch * a.length * a.channels * a.states, GRAIN);
    return parallel_for(a.batch * blocks, threads, [&](int64_t begin, int64_t end) -> int {
        Work work;
        work.lanes = static_cast<float *>(scratch((2 * BLOCK + LANES) * a.states * static_cast<int64_t>(sizeof(float))));
        if (!work.lanes) return QUAMBA_OUT_OF_MEMORY;
        work.decay = work.lanes + 2 * BLOCK * a.states;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t c0 = task % blocks * BLOCK, left = a.channels - c0;
            block(a, task / blocks, c0, left < BLOCK ? left : BLOCK, work);
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
