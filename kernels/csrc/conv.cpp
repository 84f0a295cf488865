// Depthwise causal convolution with SiLU, a block of channels and a window of tokens at a time.
//
// int8 inputs are summed in float32, exactly: 64 products of at most 2^14 stay below 2^24.
#include "elementary.h"
#include "ops.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t BLOCK = 64;       // channels
constexpr int64_t TOKENS = 32;      // new tokens in a window
constexpr int64_t GRAIN = 1 << 10;  // outputs that are worth a thread: each waits for some six vectors of parameters

inline float value(const void *p, bool is_int8, int64_t i) {
    return is_int8 ? static_cast<float>(static_cast<const int8_t *>(p)[i]) : static_cast<const float *>(p)[i];
}

// `count` rows of `width` entries from p[at] on to `width` rows of BLOCK, zeros from `count` on.
inline void turn(const void *p, bool is_int8, int64_t at, int64_t count, int64_t width, float *out) {
    for (int64_t k = 0; k < width; ++k) {
        for (int64_t c = 0; c < count; ++c) out[k * BLOCK + c] = value(p, is_int8, at + c * width + k);
        for (int64_t c = count; c < BLOCK; ++c) out[k * BLOCK + c] = 0.0f;
    }
}

// Channels c0 .. c0 + count of one sequence.
void block(const quamba_conv_args &a, int64_t b, int64_t c0, int64_t count) {
    const int64_t past = a.taps - 1;
    alignas(64) float weight[QUAMBA_MAX_TAPS * BLOCK], window[(QUAMBA_MAX_TAPS + TOKENS) * BLOCK];
    const int64_t state_at = (b * a.channels + c0) * past;
    turn(a.weight, a.is_int8, c0 * a.taps, count, a.taps, weight);
    turn(a.state, a.is_int8, state_at, a.state ? count : 0, past, window);

    for (int64_t t0 = 0; t0 < a.length; t0 += TOKENS) {
        const int64_t tokens = a.length - t0 < TOKENS ? a.length - t0 : TOKENS;
        const uint8_t *mask = a.mask ? a.mask + b * a.length + t0 : nullptr;
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t from = b * a.x_batch_stride + (t0 + t) * a.x_token_stride + c0;
            by_lanes(count, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
                const F16 x = mask && !mask[t] ? splat(0.0f) : load_any(a.x, a.is_int8, from + c, lanes);
                store(window + (past + t) * BLOCK + c, x);
            });
        }
        by_lanes(count, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
            const int64_t channel = c0 + c;
            const F16 one = splat(1.0f);
            const F16 weight_scale = a.is_int8 ? load(a.weight_scale + channel, lanes) : one;
            const F16 x_scale = a.is_int8 ? load_vector(a.x_scale, a.x_scale_stride, channel, lanes) : one;
            const F16 bias = a.bias ? load(a.bias + channel, lanes) : splat(0.0f);
            const F16 inv = a.codes ? load_vector(a.inv, a.inv_stride, channel, lanes) : one;
            for (int64_t t = 0; t < tokens; ++t) {
                F16 y = load(window + t * BLOCK + c) * load(weight + c);
                for (int64_t k = 1; k < a.taps; ++k)
                    y = y + load(window + (t + k) * BLOCK + c) * load(weight + k * BLOCK + c);
                if (a.is_int8) y = y * weight_scale * x_scale;
                y = silu(y + bias);
                if (mask && !mask[t]) y = splat(0.0f);
                const int64_t at = (b * a.length + t0 + t) * a.channels + channel;
                if (a.codes)
                    store_codes(a.codes + at, y, inv, lanes);
                else
                    store(a.y + at, y, lanes);
            }
        });
        std::memmove(window, window + tokens * BLOCK, static_cast<size_t>(past * BLOCK) * sizeof(float));
    }
    if (!a.state) return;
    for (int64_t k = 0; k < past; ++k)
        for (int64_t c = 0; c < count; ++c) {
            const float last = window[k * BLOCK + c];
            const int64_t at = state_at + c * past + k;
            if (a.is_int8)
                static_cast<int8_t *>(a.state)[at] = static_cast<int8_t>(last);
            else
                static_cast<float *>(a.state)[at] = last;
        }
}

// The same for a single token and PAST inputs before it: nothing is turned, the state moves where it is. Sum: exact for T.
template <typename T, typename Sum, int PAST>
void one_token(const quamba_conv_args &a, int64_t b, int64_t c0, int64_t count) {
    const bool masked = a.mask && !a.mask[b];
    const T *__restrict__ x = static_cast<const T *>(a.x) + b * a.x_batch_stride + c0;
    const T *__restrict__ weight = static_cast<const T *>(a.weight) + c0 * (PAST + 1);
    T *__restrict__ state = static_cast<T *>(a.state) + (b * a.channels + c0) * PAST;
    by_lanes(count, [&](int64_t c, int64_t lanes) {
        float sums[LANES] = {};
        for (int64_t i = 0; i < lanes; ++i, weight += PAST + 1, state += PAST) {
            T window[PAST + 1], w[PAST + 1];
            std::memcpy(window, state, sizeof(T) * PAST);
            std::memcpy(w, weight, sizeof w);
            window[PAST] = masked ? T(0) : x[c + i];
            Sum sum = static_cast<Sum>(window[0]) * w[0];
            for (int k = 1; k <= PAST; ++k) sum += static_cast<Sum>(window[k]) * w[k];
            std::memcpy(state, window + 1, sizeof(T) * PAST);
            sums[i] = static_cast<float>(sum);
        }
        const int64_t channel = c0 + c, at = b * a.channels + channel;
        F16 y = load(sums);
        if (a.is_int8)
            y = y * load(a.weight_scale + channel, lanes) * load_vector(a.x_scale, a.x_scale_stride, channel, lanes);
        y = silu(y + (a.bias ? load(a.bias + channel, lanes) : splat(0.0f)));
        if (masked) y = splat(0.0f);
        if (a.codes)
            store_codes(a.codes + at, y, load_vector(a.inv, a.inv_stride, channel, lanes), lanes);
        else
            store(a.y + at, y, lanes);
    });
}

}  // namespace

int conv(const quamba_conv_args &a) {
    const int64_t blocks = (a.channels + BLOCK - 1) / BLOCK;
    const int64_t threads = worthwhile(a.threads, a.batch * a.length * a.channels, GRAIN);
    return parallel_for(a.batch * blocks, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t c0 = task % blocks * BLOCK, left = a.channels - c0;
            const int64_t count = left < BLOCK ? left : BLOCK;
            if (a.length == 1 && a.state && a.taps == 4)  // as all models have it
                a.is_int8 ? one_token<int8_t, int32_t, 3>(a, task / blocks, c0, count)
                          : one_token<float, float, 3>(a, task / blocks, c0, count);
            else
                block(a, task / blocks, c0, count);
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
