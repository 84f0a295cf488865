// x Hᵀ with H = outer ⊗ H_{2^k}: butterflies for the power of two, then the small outer matrix across segments.
#include "ops.h"
#include "parallel.h"
#include "simd.h"
#include "token.h"

namespace quamba::QUAMBA_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // elements that are worth a thread

// Pairs of entries `half` < WIDTH apart inside one register: (a, b) -> (a + b, a - b).
template <int half>
QUAMBA_INLINE vf within(const vf &x) {
    vi from, sign;
    for (int i = 0; i < WIDTH; ++i) from[i] = i ^ half, sign[i] = i & half ? INT32_MIN : 0;
#if defined(__clang__)
    vf other;
    for (int i = 0; i < WIDTH; ++i) other[i] = x[i ^ half];
#else
    const vf other = __builtin_shuffle(x, from);
#endif
    return other + (vf)((vi)x ^ sign);
}

// The transform of n entries, n a power of two: strides 1, 2, 4, ... in turn.
void butterflies(float *x, int64_t n) {
    int64_t half = 1;
    if (n >= WIDTH) {
        for (int64_t i = 0; i < n; i += WIDTH) {
            vf v;
            std::memcpy(&v, x + i, sizeof v);
            v = within<2>(within<1>(v));
            if (WIDTH > 4) v = within<4>(v);
            if (WIDTH > 8) v = within<8>(v);
            std::memcpy(x + i, &v, sizeof v);
        }
        half = WIDTH;
    }
    for (; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            if (half >= LANES)
                for (int64_t j = i; j < i + half; j += LANES) {
                    const F16 a = load(x + j), b = load(x + j + half);
                    store(x + j, a + b);
                    store(x + j + half, a - b);
                }
            else
                for (int64_t j = i; j < i + half; ++j) {
                    const float a = x[j], b = x[j + half];
                    x[j] = a + b, x[j + half] = a - b;
                }
}

}  // namespace

int hadamard(const quamba_rows_args &a) {
    const int64_t n = a.width / a.blocks, order = a.weight ? a.order : 1, power = n / order;
    const F16 norm = splat(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(n))));
    const int64_t threads = worthwhile(a.threads, a.rows * a.width, GRAIN);
    return parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) -> int {
        auto *work = static_cast<float *>(scratch((n + a.width) * static_cast<int64_t>(sizeof(float))));
        if (!work) return QUAMBA_OUT_OF_MEMORY;
        for (int64_t m = begin; m < end; ++m) {
            float *row = a.codes ? work + n : a.y + m * a.width;
            for (int64_t b = 0; b < a.width; b += n) {
                std::memcpy(work, a.x + m * a.width + b, static_cast<size_t>(n) * sizeof(float));
                for (int64_t s = 0; s < order; ++s) butterflies(work + s * power, power);
                for (int64_t s = 0; s < order; ++s)
                    by_lanes(power, [&](int64_t c, int64_t lanes) QUAMBA_BODY {
                        F16 y = load(work + (order > 1 ? c : s * power + c), lanes);
                        if (order > 1) {
                            const float *sign = a.weight + s * order;
                            y = y * sign[0];
                            for (int64_t r = 1; r < order; ++r) y = y + load(work + r * power + c, lanes) * sign[r];
                        }
                        store(row + b + s * power + c, y * norm, lanes);
                    });
            }
            if (a.codes) store_row(a, row, m);
        }
        return QUAMBA_OK;
    });
}

}  // namespace quamba::QUAMBA_ISA
