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
constexpr int64_t TOKENS = LANES;   // whose inputs are read at once
constexpr int SIDE_TOKENS = 2;      // between reading and writing a state: more don't fit the registers

// What a task keeps of its head: states [N, 16] for 16 channels at a time; inputs of some tokens, dt 0 where masked.
struct Work {
    float *h;
    alignas(64) float dt[TOKENS], decay[TOKENS], B[TOKENS * QUAMBA_MAX_STATE], C[TOKENS * QUAMBA_MAX_STATE];
};

// Real values of `count` entries from `offset` on, to `out`, whose room is a multiple of 16.
void real(const void *x, bool is_int8, int64_t offset, const float *scale, int64_t stride, int64_t first, int64_t count,
          float *out) {
    by_lanes(count, [&](int64_t n, int64_t lanes) QUAMBA_BODY {
        F16 v = load_any(x, is_int8, offset + n, lanes);
        if (is_int8) v = v * load_vector(scale, stride, first + n, lanes);
        store(out + n, v);
    });
}

bool masked(const quamba_ssd_args &a, int64_t b, int64_t t) { return a.mask && !a.mask[b * a.length + t]; }

void read(const quamba_ssd_args &a, int64_t b, int64_t head, int64_t t0, int64_t tokens, Work &w) {
    const int64_t N = a.states, at = head / (a.heads / a.groups) * N;
    float raw[TOKENS] = {};
    for (int64_t i = 0; i < tokens; ++i) {
        const int64_t t = t0 + i;
        raw[i] = a.dt[b * a.dt_batch_stride + t * a.dt_token_stride + head] + a.dt_bias[head];
        const int64_t B_at = b * a.B_batch_stride + t * a.B_token_stride + at;
        const int64_t C_at = b * a.C_batch_stride + t * a.C_token_stride + at;
        real(a.B, a.B_is_int8, B_at, a.B_scale, a.B_scale_stride, at, N, w.B + i * QUAMBA_MAX_STATE);
        real(a.C, a.C_is_int8, C_at, a.C_scale, a.C_scale_stride, at, N, w.C + i * QUAMBA_MAX_STATE);
    }
    store(w.dt, min(static_cast<float>(a.dt_max), max(static_cast<float>(a.dt_min), softplus(load(raw)))));
    for (int64_t i = 0; i < tokens; ++i)
        if (masked(a, b, t0 + i)) w.dt[i] = 0.0f;
    store(w.decay, exp2(load(w.dt) * (a.A[head] * LOG2E)));
}

// K tokens, one after the other, the first of them `i`: h = exp(dt A) h + dt x B, and y = C h.
template <int K>
QUAMBA_INLINE void recur(const Work &w, int64_t i, const F16 *x, F16 *y, int64_t N, float *h) {
    F16 u[K];
    float decay[K];
    for (int k = 0; k < K; ++k) y[k] = splat(0.0f), u[k] = w.dt[i + k] * x[k], decay[k] = w.decay[i + k];
    const float *B = w.B + i * QUAMBA_MAX_STATE, *C = w.C + i * QUAMBA_MAX_STATE;
    for (int64_t n = 0; n < N; ++n) {
        F16 now = load(h + n * LANES);
        for (int k = 0; k < K; ++k) {
            now = decay[k] * now + u[k] * B[k * QUAMBA_MAX_STATE + n];
            y[k] = y[k] + now * C[k * QUAMBA_MAX_STATE + n];
        }
        store(h + n * LANES, now);
    }
}

// `count` channels from `channel` on, all of one head, and tokens t0 .. t0 + tokens.
void block(const quamba_ssd_args &a, const Work &w, int64_t b, int64_t channel, int64_t count, const F16 &D, int64_t t0,
           int64_t tokens, float *h) {
    const F16 scale = a.x_is_int8 ? load_vector(a.x_scale, a.x_scale_stride, channel, count) : splat(1.0f);
    for (int64_t i = 0, K; i < tokens; i += K) {
        F16 x[SIDE_TOKENS], y[SIDE_TOKENS];
        K = tokens - i >= SIDE_TOKENS ? SIDE_TOKENS : 1;
        for (int64_t k = 0; k < K; ++k) {
            const int64_t t = t0 + i + k;
            x[k] = load_any(a.x, a.x_is_int8, b * a.x_batch_stride + t * a.x_token_stride + channel, count);
            if (a.x_is_int8) x[k] = x[k] * scale;
            if (masked(a, b, t)) x[k] = splat(0.0f);
        }
        K == SIDE_TOKENS ? recur<SIDE_TOKENS>(w, i, x, y, a.states, h) : recur<1>(w, i, x, y, a.states, h);
        for (int64_t k = 0; k < K; ++k)
            store(a.y + (b * a.length + t0 + i + k) * a.heads * a.width + channel, y[k] + D * x[k], count);
    }
}

void one_head(const quamba_ssd_args &a, int64_t b, int64_t head, Work &w) {
    const int64_t N = a.states;
    float *state = a.state ? a.state + (b * a.heads + head) * a.width * N : nullptr;
    for (int64_t t0 = 0; t0 < a.length; t0 += TOKENS) {
        const int64_t tokens = a.length - t0 < TOKENS ? a.length - t0 : TOKENS;
        read(a, b, head, t0, tokens, w);
        by_lanes(a.width, [&](int64_t p, int64_t lanes) {
            const int64_t channel = head * a.width + p;
            float *h = w.h + p * N;
            if (a.length == 1 && state)
                for (int64_t i = 0; i < LANES * N; i += 16) __builtin_prefetch(state + (p + LANES) * N + i, 1);
            if (t0 == 0 && state) to_lanes(state + p * N, lanes, N, h);
            if (t0 == 0 && !state) std::memset(h, 0, static_cast<size_t>(N * LANES) * sizeof(float));
            block(a, w, b, channel, lanes, a.D_per_channel ? load(a.D + channel, lanes) : splat(a.D[head]), t0, tokens, h);
            if (t0 + tokens == a.length && state) from_lanes(h, lanes, N, state + p * N);
        });
    }
}

}  // namespace

int ssd(const quamba_ssd_args &a) {
    const int64_t width = (a.width + LANES - 1) / LANES * LANES;
    const int64_t threads = worthwhile(a.threads, a.batch * a.length * a.heads * a.width * a.states, GRAIN);
    return parallel_for(a.batch * a.heads, threads, [&](int64_t begin, int64_t end) -> int {
        Work work;
        work.h = static_cast<float *>(scratch((width * a.states + 1) * static_cast<int64_t>(sizeof(float))));
        if (!work.h) return QUAMBA_OUT_OF_MEMORY;
        for (int64_t task = begin; task < end; ++task) one_head(a, task / a.heads, task % a.heads, work);
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
