// Ops on rows of floats: quantization (static, or with a scale found for each row) and RMSNorm.
#include "elementary.h"
#include "ops.h"
#include "parallel.h"
#include "token.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread

template <typename Row>
int each_row(const quamba_rows_args &a, const Row &row) {
    return parallel_for(a.rows, worthwhile(a.threads, a.rows * a.width, GRAIN), [&](int64_t begin, int64_t end) -> int {
        for (int64_t m = begin; m < end; ++m)
            if (const int status = row(m, a.x + m * a.width)) return status;
        return QUAMBA_OK;
    });
}

}  // namespace

int quantize(const quamba_rows_args &a) {
    return each_row(a, [&](int64_t m, const float *x) {
        store_row(a, x, m);
        return QUAMBA_OK;
    });
}

int rms_norm(const quamba_rows_args &a) {
    const int64_t bytes = a.width * static_cast<int64_t>(sizeof(float));
    return each_row(a, [&](int64_t m, const float *x) {
        F16 squares = splat(0.0f);
        by_lanes(a.width, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
            const F16 v = load(x + c, lanes);
            squares = squares + v * v;
        });
        const float mean = sum(squares) / static_cast<float>(a.width);
        const F16 r = splat(1.0f / __builtin_sqrtf(mean + static_cast<float>(a.eps)));
        auto *y = a.codes ? static_cast<float *>(scratch(bytes)) : a.y + m * a.width;
        if (!y) return QUAMBA_OUT_OF_MEMORY;
        by_lanes(a.width, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
            store(y + c, load(x + c, lanes) * r * load(a.weight + c, lanes), lanes);
        });
        if (a.codes) store_row(a, y, m);
        return QUAMBA_OK;
    });
}

void exp2_array(const float *x, float *y, int64_t n) {
    by_lanes(n, [&](int64_t i, int64_t lanes) QUAMBA_BODY { store(y + i, exp2(load(x + i, lanes)), lanes); });
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
