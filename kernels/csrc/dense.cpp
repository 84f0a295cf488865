// Linear with float weights, of 32 or 16 bits, for a few rows of float x: each weight is read once.
#include "half.h"
#include "ops.h"
#include "parallel.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t BLOCK = 4;        // weight rows a task
constexpr int64_t AHEAD = 2;        // tasks to prefetch ahead
constexpr int64_t GRAIN = 1 << 15;  // products that are worth a thread

template <int KIND>
QUAMBA_INLINE F16 load_weight(const void *p, int64_t at, int64_t lanes) {
    if (KIND == QUAMBA_FLOAT32) return load(static_cast<const float *>(p) + at, lanes);
    return load_half<KIND>(static_cast<const uint16_t *>(p) + at, lanes);
}

// Rows m .. m + M of x times `count` weight rows from n0 on; those beyond repeat the last.
template <int KIND, int M>
void tile(const quamba_linear_args &a, int64_t m, int64_t n0, int64_t count) {
    constexpr int N = BLOCK;
    const float *x = static_cast<const float *>(a.x) + m * a.inputs;
    int64_t at[N];
    for (int n = 0; n < N; ++n) at[n] = (n0 + (n < count ? n : count - 1)) * a.inputs;
    F16 acc[M][N];
    for (int i = 0; i < M; ++i)
        for (int n = 0; n < N; ++n) acc[i][n] = splat(0.0f);
    by_lanes(a.inputs, [&](int64_t k, int64_t lanes) QUAMBA_BODY {
        F16 v[M];
        for (int i = 0; i < M; ++i) v[i] = load(x + i * a.inputs + k, lanes);
        for (int n = 0; n < N; ++n) {
            constexpr int64_t size = KIND == QUAMBA_FLOAT32 ? 4 : 2;
            if (M == 1)
                __builtin_prefetch(static_cast<const char *>(a.weight) + (at[n] + AHEAD * BLOCK * a.inputs + k) * size);
            const F16 w = load_weight<KIND>(a.weight, at[n] + k, lanes);
            for (int i = 0; i < M; ++i) acc[i][n] = acc[i][n] + v[i] * w;
        }
    });
    for (int i = 0; i < M; ++i)
        for (int64_t n = 0; n < count; ++n) {
            const float y = sum(acc[i][n]);
            a.y[(m + i) * a.outputs + n0 + n] = a.bias ? y + a.bias[n0 + n] : y;
        }
}

template <int KIND>
int run(const quamba_linear_args &a) {
    const int64_t threads = worthwhile(a.threads, a.rows * a.outputs * a.inputs, GRAIN);
    return parallel_for((a.outputs + BLOCK - 1) / BLOCK, threads, [&](int64_t begin, int64_t end) -> int {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t n0 = task * BLOCK, count = a.outputs - n0 < BLOCK ? a.outputs - n0 : BLOCK;
            int64_t m = 0;
            for (; m + 2 <= a.rows; m += 2) tile<KIND, 2>(a, m, n0, count);
            if (m < a.rows) tile<KIND, 1>(a, m, n0, count);
        }
        return QUAMBA_OK;
    });
}

}  // namespace

int dense(const quamba_linear_args &a) {
    switch (a.weight_kind) {
    case QUAMBA_FLOAT32: return run<QUAMBA_FLOAT32>(a);
    case QUAMBA_FLOAT16: return run<QUAMBA_FLOAT16>(a);
    default: return run<QUAMBA_BFLOAT16>(a);
    }
}

}  // namespace quamba::QUAMBA_ISA
